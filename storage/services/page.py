"""The farm's web page: a process of its own, which reads Redis and tells whoever has its token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config import WebConfig
from cluster.errors import StartError
from storage.services.loopback import choose_ports
from storage.services.process import ServiceProcess
from storage.services.state_dir import StateDir, random_secret

_NAME = "page"
_TOKEN = "page-token"  # noqa: S105 - the name of its file
_READY_S = 60.0
_OK = 200
#: Seconds that it may take to answer that it is there.
_ANSWER_S = 5.0
#: Seconds that it may take to end by itself: it drops who looks on at once.
_STOP_S = 2.0
#: Where it is reached when it listens on every address of the machine.
_EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - as they are configured


class PageService:
    """The page's process. Callers hold the lock ``page`` to start or stop it."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self.process = ServiceProcess(state, _NAME)

    def __repr__(self) -> str:
        return f"PageService({self.process!r})"

    @property
    def processes(self) -> Sequence[ServiceProcess]:
        """Return its process."""
        return (self.process,)

    @property
    def token_file(self) -> Path:
        """Return the file of the token that opens the page, made on first use."""
        return self._state.secret_file(_TOKEN, random_secret)

    @property
    def url(self) -> str:
        """Return ``http://HOST:PORT`` as it was last started; "" where it was not, or was stopped."""
        record = self.process.record()
        if record is None or not record.pid:
            return ""
        host = _reached_at(record.command[-2])
        return f"http://{f'[{host}]' if ':' in host else host}:{record.ports.get('http', 0)}"

    def is_alive(self) -> bool:
        """Tell whether it runs and answers."""
        record = self.process.record()
        if record is None or not self.process.is_alive():
            return False
        return self._answers(_reached_at(record.command[-2]), record.ports.get("http", 0))

    def start(self, config: WebConfig, digest: str) -> bool:
        """Start it unless it runs as it should; tell whether that was so.

        Args:
            config: Where it listens; a port that is free is chosen where none is named, and the same again.
            digest: Of what else it was started with: with another one it starts anew.

        Raises:
            StartError: it did not start.
        """
        ports = self.process.ports
        port = config.port or ports.get("http", 0)
        record = self.process.record()
        is_as_wanted = record is not None and record.command == self._command(config.host, port, digest)
        if is_as_wanted and self.is_alive():
            return False
        self.process.stop(deadline_s=_STOP_S)
        if config.port:
            self._start(config.host, config.port, digest)
            return True
        try:
            self._start(config.host, choose_ports(["http"], ports)["http"], digest)
        except StartError:
            # Once more: the port was taken between being chosen and being bound.
            self.process.stop(deadline_s=_STOP_S)
            self._start(config.host, choose_ports(["http"], {})["http"], digest)
        return True

    def stop(self) -> list[str]:
        """End it; return its name if it ran."""
        return [_NAME] if self.process.stop(deadline_s=_STOP_S) else []

    def _start(self, host: str, port: int, digest: str) -> None:
        _ = self.token_file
        self.process.start(self._command(host, port, digest), ports={"http": port})
        self.process.wait_until(lambda: self._answers(_reached_at(host), port), deadline_s=_READY_S)

    def _answers(self, host: str, port: int) -> bool:
        """Tell whether a page that knows our token answers there: a port may be taken by somebody else."""
        from http.client import HTTPConnection, HTTPException  # noqa: PLC0415 - 20 ms that `status` is spared

        connection = HTTPConnection(host, port, timeout=_ANSWER_S)
        try:
            bearer = f"Bearer {self.token_file.read_text().strip()}"
            connection.request("HEAD", "/static/icon.svg", headers={"Authorization": bearer})
            return connection.getresponse().status == _OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _command(self, host: str, port: int, digest: str) -> tuple[str, ...]:
        # -P: the working directory is no place to import from.
        return (sys.executable, "-P", "-m", "lazyfarm.web", str(self._state.root), digest, host, str(port))


def page_url(state_dir: Path) -> str:
    """Return where a farm's page was started; "" where none was."""
    return PageService(StateDir(state_dir)).url


def page_link(state_dir: Path) -> str:
    """Return the address that opens the page, with the token in it; "" where none was started."""
    page = PageService(StateDir(state_dir))
    return f"{page.url}/?token={page.token_file.read_text().strip()}" if page.url else ""


def _reached_at(host: str) -> str:
    return _EVERY.get(host, host)
