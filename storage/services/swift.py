"""The embedded S3 server: OpenStack Swift, four processes on loopback."""

from __future__ import annotations

import http.client
import os
import pwd
import secrets
import subprocess
from functools import partial
from pathlib import Path

from cluster.config import S3Config
from cluster.errors import StartError
from storage.services.loopback import HOST, choose_ports
from storage.services.process import ServiceProcess
from storage.services.state_dir import StateDir, write_atomic
from storage.services.swift_environment import ensure_environment, python_of
from storage.services.swift_settings import PROXY, STORAGE_SERVERS, SwiftSettings

_DEVICE = "sd1"
_READY_S = 60.0
_RINGS_S = 60.0
_MODULES = {
    "account": "swift.account.server",
    "container": "swift.container.server",
    "object": "swift.obj.server",
    "proxy": "swift.proxy.server",
}


class SwiftService:
    """Swift with its data in ``STATE/s3`` and its secret in ``STATE/secrets/s3-credentials``."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._root = state.root / "s3"
        self._servers = {name: ServiceProcess(state, f"s3-{name}") for name in (*STORAGE_SERVERS, PROXY)}

    @property
    def processes(self) -> list[ServiceProcess]:
        """Return its processes, in the order they are stopped."""
        return [self._servers[name] for name in (PROXY, *reversed(STORAGE_SERVERS))]

    def is_alive(self) -> bool:
        """Tell whether all of its processes run."""
        return all(process.is_alive() for process in self.processes)

    def reached_by(self, config: S3Config) -> S3Config:
        """Return *config* with what is needed to reach this server."""
        port = self._servers[PROXY].ports.get(PROXY, 0)
        return S3Config(
            endpoint=f"http://{HOST}:{port}",
            region=config.region,
            bucket=config.bucket,
            credentials_file=str(self._credentials_file()),
            ca_file="",
            timeout_s=config.timeout_s,
            attempts=config.attempts,
            connections=config.connections,
        )

    def start(self, config: S3Config, *, environment: Path | None = None) -> bool:
        """Start what doesn't run; tell whether anything was started. The caller holds the lock ``s3``.

        A server that died is started alone on its old port: the others find it there. If the port was
        taken meanwhile, all four start anew on ports of their own; so they do where *config* was changed.

        Raises:
            StartError: a server did not start.
        """
        python: Path | None = None
        for last_try in (False, False, True):
            if self.is_alive() and self._is_configured(config) and self._is_healthy():
                return python is not None
            python = python or python_of(environment or ensure_environment())
            try:
                self._start_missing(config, python)
            except StartError:
                # A port was taken between its choice and its use, or a server that ran when it was looked at
                # has died since. One that runs but never answers is not helped by another try.
                if last_try or self.is_alive():
                    raise
        return True

    def stop(self) -> list[str]:
        """End its processes; return the names of those that ran."""
        return [process.name for process in self.processes if process.stop()]

    def _start_missing(self, config: S3Config, python: Path) -> None:
        dead = [name for name, process in self._servers.items() if not process.is_alive()]
        before = {name: process.ports.get(name, 0) for name, process in self._servers.items()}
        ports = {**before, **choose_ports(dead, before)}
        if ports != before or not self._has_rings() or not self._is_configured(config) or not dead:
            dead = list(self._servers)
            for process in self.processes:
                process.stop()
            ports = choose_ports(dead, before)
        self._prepare(config, ports, python)
        for name in dead:
            self._servers[name].start(
                [
                    str(python),
                    "-I",
                    "-m",
                    _MODULES[name],
                    str(self._settings(config, ports).etc / f"{name}.conf"),
                    "-v",
                ],
                # eventlet's own resolver takes 0.4 s to import, and here are no names to resolve.
                environment={"EVENTLET_NO_GREENDNS": "yes"},
                ports={name: ports[name]},
            )
        for name in (*STORAGE_SERVERS, PROXY):
            self._servers[name].wait_until(partial(_answers, ports[name]), deadline_s=_READY_S)

    def _settings(self, config: S3Config, ports: dict[str, int]) -> SwiftSettings:
        access_key_id, secret_access_key = _read_credentials(self._credentials_file())
        return SwiftSettings(
            root=self._root,
            ports=ports,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            region=config.region,
            user=_user_name(),
        )

    def _prepare(self, config: S3Config, ports: dict[str, int], python: Path) -> None:
        """Write the configuration and, for new ports, the rings."""
        settings = self._settings(config, ports)
        for directory in (settings.etc, self._root / "srv" / _DEVICE, self._root / "recon"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in settings.files().items():
            write_atomic(settings.etc / name, text)
        wanted = [f"{name}={ports[name]}" for name in STORAGE_SERVERS]
        marker = settings.etc / "rings"
        if self._has_rings() and marker.read_text() == " ".join(wanted):
            return
        marker.unlink(missing_ok=True)
        _build_rings(python, settings.etc, wanted)
        write_atomic(marker, " ".join(wanted))

    def _has_rings(self) -> bool:
        return (self._root / "etc" / "rings").exists()

    def _is_configured(self, config: S3Config) -> bool:
        """Tell whether what runs was started with *config*."""
        settings = self._settings(config, {name: process.ports.get(name, 0) for name, process in self._servers.items()})
        try:
            return all((settings.etc / name).read_text() == text for name, text in settings.files().items())
        except OSError:
            return False

    def _is_healthy(self) -> bool:
        return all(_answers(process.ports.get(name, 0)) for name, process in self._servers.items())

    def _credentials_file(self) -> Path:
        # Swift's access key is ACCOUNT:USER, and its configuration splits names at "_".
        return self._state.secret_file(
            "s3-credentials",
            lambda: f"access_key_id = lazyfarm:farm\nsecret_access_key = {secrets.token_hex(32)}\n",
        )


def _build_rings(python: Path, etc: Path, wanted: list[str]) -> None:
    script = Path(__file__).with_name("swift_rings.py")
    try:
        subprocess.run(  # noqa: S603 - a fixed command
            [str(python), "-I", str(script), str(etc), _DEVICE, *wanted],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_RINGS_S,
            env={**os.environ, "EVENTLET_NO_GREENDNS": "yes"},
        )
    except subprocess.CalledProcessError as exc:
        reason = (exc.stderr or "").strip().splitlines()[-1:] or [f"exit {exc.returncode}"]
        raise StartError("S3 server", f"its rings can't be built: {reason[0]}", "") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise StartError("S3 server", f"its rings can't be built: {type(exc).__name__}", "") from exc


def _answers(port: int) -> bool:
    """Tell whether a Swift server on *port* answers ``GET /healthcheck``, whatever its answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _read_credentials(path: Path) -> tuple[str, str]:
    values: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition("=")
        values[name.strip()] = value.strip()
    return values["access_key_id"], values["secret_access_key"]


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as exc:
        raise StartError("S3 server", f"user {os.geteuid()} has no name in /etc/passwd, which Swift needs", "") from exc
