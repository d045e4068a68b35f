"""A process that serves HTTP at an address that it keeps: what the farm's page and its gateway have alike."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from cluster.config import GatewayConfig, WebConfig
from cluster.errors import StartError
from storage.services.loopback import choose_ports
from storage.services.process import ServiceProcess
from storage.services.state_dir import StateDir, random_secret

_READY_S = 60.0
#: Where it is reached when it listens on every address of the machine.
_EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - as they are configured

_Config = TypeVar("_Config", WebConfig, GatewayConfig)


class HttpService(ABC, Generic[_Config]):
    """The process ``python -m MODULE STATE_DIR DIGEST HOST PORT``. Callers hold its lock to start or stop it."""

    #: Its own, that of its lock and its log, and the beginning of its token's.
    name: ClassVar[str]
    #: What is run.
    module: ClassVar[str]
    #: Seconds that it may take to end by itself.
    stop_s: ClassVar[float]

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self.process = ServiceProcess(state, self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.process!r})"

    @property
    def processes(self) -> Sequence[ServiceProcess]:
        """Return its process."""
        return (self.process,)

    @property
    def token_file(self) -> Path:
        """Return the file of the token that lets in, made on first use."""
        return self._state.secret_file(f"{self.name}-token", random_secret)

    @property
    def url(self) -> str:
        """Return ``SCHEME://HOST:PORT`` as it was last started; "" where it was not, or was stopped."""
        record = self.process.record()
        if record is None or not record.pid:
            return ""
        host = _reached_at(record.command[-2])
        scheme, port = _only(record.ports)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def is_alive(self) -> bool:
        """Tell whether it runs and answers."""
        record = self.process.record()
        if record is None or not self.process.is_alive():
            return False
        return self._is_answered(_reached_at(record.command[-2]), record.ports)

    def start(self, config: _Config, digest: str) -> bool:
        """Start it unless it runs as it should; tell whether that was so.

        Args:
            config: Where it listens; a port that is free is chosen where none is named, and the same again.
            digest: Of what else it was started with: with another one it starts anew.

        Raises:
            StartError: it did not start.
        """
        scheme, ports = self._scheme(config), self.process.ports
        port = config.port or ports.get(scheme, 0)
        record = self.process.record()
        is_as_wanted = record is not None and record.command == self._command(config.host, port, digest)
        if is_as_wanted and self.is_alive():
            return False
        self.process.stop(deadline_s=self.stop_s)
        if config.port:
            self._start(config.host, {scheme: config.port}, digest)
            return True
        try:
            self._start(config.host, choose_ports([scheme], ports), digest)
        except StartError:
            # Once more: the port was taken between being chosen and being bound.
            self.process.stop(deadline_s=self.stop_s)
            self._start(config.host, choose_ports([scheme], {}), digest)
        return True

    def stop(self) -> list[str]:
        """End it; return its name if it ran."""
        return [self.name] if self.process.stop(deadline_s=self.stop_s) else []

    @abstractmethod
    def _scheme(self, config: _Config) -> str:
        """Return ``http`` or ``https``."""

    @abstractmethod
    def _answers(self, host: str, port: int, scheme: str) -> bool:
        """Tell whether it is this very service that answers there: a port may be taken by somebody else.

        Raises:
            OSError, HTTPException: nobody does, or not by HTTP.
        """

    def _start(self, host: str, ports: dict[str, int], digest: str) -> None:
        _ = self.token_file
        _, port = _only(ports)
        self.process.start(self._command(host, port, digest), ports=ports)
        self.process.wait_until(lambda: self._is_answered(_reached_at(host), ports), deadline_s=_READY_S)

    def _is_answered(self, host: str, ports: dict[str, int]) -> bool:
        from http.client import HTTPException  # noqa: PLC0415 - 20 ms that `status` is spared

        scheme, port = _only(ports)
        try:
            return self._answers(host, port, scheme)
        except (OSError, HTTPException):
            return False

    def _command(self, host: str, port: int, digest: str) -> tuple[str, ...]:
        # -P: the working directory is no place to import from.
        return (sys.executable, "-P", "-m", self.module, str(self._state.root), digest, host, str(port))


def _only(ports: dict[str, int]) -> tuple[str, int]:
    """Return the scheme and the port of a process that has one."""
    return next(iter(ports.items()), ("http", 0))


def _reached_at(host: str) -> str:
    return _EVERY.get(host, host)
