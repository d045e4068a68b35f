"""Everything that the demo's steps and the benchmarks stand on: registries, a thin link, and a farm of three nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.config import Config
from lazyfarm.settings import load_running
from storage.connect import connect_sync
from storage.keys import Keys
from tests.demo.farm_process import CommandFailedError, Driver, FarmProcesses
from tests.demo.link import ThinLink
from tests.demo.signals import be_deaf
from tests.demo.traffic import Traffic
from tests.demo.work import Work
from tests.doubles.oci_layout import LayoutImage, push
from tests.doubles.registry import Image, docker_registry
from tests.doubles.token_server import token_server

NODES = 3
_MIB = 1 << 20
_USER, _PASSWORD = "demo", "demo-password"
_FLIGHT_DEADLINE_S = 90.0
_POLL_S = 0.05

_CONFIG = """\
[farm]
name = "demo"

[ray]
nodes = {nodes}
node_cpus = 1

{more}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A flight's owner at one moment."""

    name: str
    node: str
    pid: int
    parts: int


class Stage:
    """Set up on entering, gone without a trace on leaving, whatever happened in between."""

    def __init__(self, say: Callable[[str], None], config: str = "") -> None:
        self.say = say
        self._config = config
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Not /tmp: that is memory on some machines, and overlay mounts want a disk. Short: Ray puts sockets there.
            self.directory = Path(tempfile.mkdtemp(prefix="lazyfarm-", dir="/var/tmp"))
            stack.callback(self._remove)
            self._registry = stack.enter_context(docker_registry())
            self._link = stack.enter_context(ThinLink(self._registry.host))
            self._tokens = stack.enter_context(token_server(self.directory))
            self._tokens.allow(_USER, _PASSWORD, {"*": {"pull", "push"}})
            self._token_registry = stack.enter_context(
                docker_registry(self._tokens.registry_config, authorize=self._tokens.root)
            )
            self._farm = FarmProcesses(self.directory / "farm", self.directory / "logs")
            stack.callback(self._farm_down)
            stack.callback(self._farm.close)
            # First of all on the way out, also where `up` was interrupted: a second Ctrl-C must not stop that.
            stack.callback(self.say, "taking everything down")
            stack.callback(be_deaf)
            self._farm_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- the farm -----------------------------------------------------------------------------------------

    def cli(self, *arguments: str) -> dict[str, Any]:
        """Run a ``lazyfarm`` command, as a user does."""
        return self._farm.cli(*arguments)

    def driver(
        self, do: str, subject: str, *options: str, node: str | None = None, with_credentials: bool = False
    ) -> Driver:
        """Start a driver (see :mod:`tests.demo.driver`), logged in to the registry with a token server if asked to."""
        environment = {"DOCKER_CONFIG": str(self._docker_config())} if with_credentials else None
        return self._farm.driver(do, subject, *options, node=node, environment=environment)

    def process(self, module: str, *arguments: str) -> Driver:
        """Start a module as a driver that says what it has to say in lines of JSON."""
        return self._farm.process(module, *arguments)

    @property
    def config(self) -> Config:
        """Return the farm's configuration, with the addresses of what runs."""
        return load_running(self._farm.state_dir, {}).config

    def workers(self) -> dict[str, int]:
        """Return each fetch worker's process ID by its node."""
        actors = self._farm.cli("status", may_fail=True)["actors"]
        return {actor["node"]: actor["pid"] for actor in actors if actor["kind"] == "fetch-worker"}

    def nodes(self) -> list[str]:
        """Return the live nodes' names."""
        return [node["id"] for node in self._farm.cli("status", may_fail=True)["nodes"] if node["alive"]]

    def wait_owner(self, digest: str, *, min_parts: int = 0, other_than: str = "") -> Owner:
        """Wait until the flight of a blob has an owner, not *other_than*, that has done *min_parts*."""
        config = self.config
        call = ("flight_state", (Keys(config.farm.name).prefix, f"blob:{digest}"))
        link = connect_sync(config.redis)
        deadline = time.monotonic() + _FLIGHT_DEADLINE_S
        try:
            while time.monotonic() < deadline:
                [found] = link.run_many([call], may_repeat=True)
                if found is not None:
                    _fence, name, _left_ms, _aborting, _current, _total, _waiters, parts = found
                    if name.decode() != other_than and parts >= min_parts:
                        # Flights know a worker as NODE/TOKEN.
                        node = name.decode().partition("/")[0]
                        return Owner(name=name.decode(), node=node, pid=self.workers()[node], parts=parts)
                time.sleep(_POLL_S)
        finally:
            link.close()
        raise CommandFailedError(f"after {_FLIGHT_DEADLINE_S:.0f} s the flight of {digest} has no such owner")

    # -- registries ---------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """Return ``HOST:PORT`` of the open registry, over the thin link."""
        return self._link.host

    def reference(self, name: str) -> str:
        """Return the reference of an image of the open registry, over the thin link."""
        return f"{self.host}/{name}"

    def direct_reference(self, name: str) -> str:
        """Return the reference of an image of the open registry, past the link."""
        return f"{self._registry.host}/{name}"

    def push(self, image: LayoutImage, name: str) -> None:
        """Push an image to the open registry, past the link."""
        push(image, self.direct_reference(name))

    def push_image(self, image: Image, name: str) -> None:
        """Push an image that was made in memory likewise."""
        repository, _, tag = name.rpartition(":")
        self._registry.push(repository, tag, image)

    def private_reference(self, name: str) -> str:
        """Return the reference of an image of the registry with a token server."""
        return f"{self._token_registry.host}/{name}"

    def push_private(self, image: LayoutImage, name: str) -> None:
        """Push an image there."""
        push(image, self.private_reference(name), credentials=f"{_USER}:{_PASSWORD}")

    @contextmanager
    def thin(self, bytes_per_s: float) -> Iterator[None]:
        """Let no more through the link for a while."""
        self._link.bytes_per_s = max(bytes_per_s, float(_MIB))
        try:
            yield
        finally:
            self._link.bytes_per_s = None

    @contextmanager
    def counting(self, *images: LayoutImage) -> Iterator[Traffic]:
        """Count what both registries are asked for *images* in the block; the counts are there after it."""
        traffic = Traffic()
        registries = (self._registry, self._token_registry)
        for registry in registries:
            registry.forget()
        self._tokens.requests.clear()
        yield traffic
        for registry in registries:
            traffic.take(registry.requests(), *images)
        traffic.token_requests = len(self._tokens.requests)

    @contextmanager
    def working(self) -> Iterator[Work]:
        """Note what the farm's workers say that they did in the block; it is there after it."""
        work = Work(self._farm.state_dir / "logs")
        yield work
        work.read()

    # -- setting up and taking down ------------------------------------------------------------------------

    def _farm_up(self) -> None:
        config = self.directory / "demo.toml"
        config.write_text(_CONFIG.format(nodes=NODES, more=self._config))
        began = time.monotonic()
        up = self._farm.cli("up", "--config", str(config))
        self.say(
            f"farm up in {time.monotonic() - began:.0f} s: {len(up['nodes'])} nodes; "
            + ", ".join(f"{actor['name']} {actor['pid']}" for actor in up["actors"])
        )

    def _farm_down(self) -> None:
        if self._farm.state_dir.exists():
            self._farm.cli("down", "--purge")

    def _docker_config(self) -> Path:
        directory = self.directory / "docker"
        directory.mkdir(mode=0o700, exist_ok=True)
        secret = b64encode(f"{_USER}:{_PASSWORD}".encode()).decode()
        file = directory / "config.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps({"auths": {self._token_registry.host: {"auth": secret}}}))
        return directory

    def _remove(self) -> None:
        # `down --purge` unmounts; what a failure left mounted must not be deleted through.
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed([point for point in mounted if point.startswith(f"{self.directory}/")]):
            subprocess.run(["umount", "--lazy", point], check=False, timeout=30)
        if os.environ.get("LAZYFARM_DEMO_KEEP"):
            self.say(f"kept {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)
