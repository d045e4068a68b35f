"""A farm to break: a switch for every fault point, proxies before its stores, and what must hold afterwards.

Every process of the farm gets one standing plan, in which each point has a rule to kill, to hang and to fail;
each rule needs a claim (a file that nobody has made), and all claims are taken. So nothing happens until a
test gives one up: then the first process that passes the point takes it, acts, and nobody else does.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import secrets
import signal
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from cluster.config import S3Config
from cluster.errors import LeaseNotFoundError
from cluster.faultpoints import FaultPoint
from cluster.lease import LeaseId
from cluster.ref import BlobRecord
from lazyfarm.farm import Farm
from lazyfarm.leases import open_leases
from storage.blobs import S3ContentStore
from storage.connect import connect_sync
from storage.faults import HITS_VARIABLE, PLAN_VARIABLE
from storage.refs import BLOB
from storage.services.local import LocalServices
from tests.doubles.checker import CheckedFarm
from tests.doubles.farm import RunningFarm, running_farm
from tests.doubles.observed import eventually
from tests.doubles.registry import Image, LayerCompression, Registry, build_image, build_layer, docker_registry
from tests.doubles.registry_faults import RegistryFaultProxy, registry_fault_proxy
from tests.doubles.s3_faults import Hang, S3FaultProxy

MIB = 1024 * 1024
PART_BYTES = 5 * MIB
LEASE_TTL_S = 2.0
#: Ranges of one layer at once: what may be fetched twice when an owner dies is a part for each.
RANGES = 3

#: Short, so that faults show within a test's patience.
SETTINGS = {
    "LAZYFARM__FLIGHT__LEASE_TTL_S": str(LEASE_TTL_S),
    "LAZYFARM__FLIGHT__POLL_S": "0.5",
    "LAZYFARM__FLIGHT__DEADLINE_S": "60",
    "LAZYFARM__CACHE__LEASE_TTL_S": "6",
    "LAZYFARM__COLLECT__EVERY_S": "1",
    "LAZYFARM__COLLECT__GRACE_S": "1",
    "LAZYFARM__COLLECT__SCRUB_BYTES_PER_S": "0",
    "LAZYFARM__BUILD__SCHEDULERS": "2",
    "LAZYFARM__BUILD__CLAIM_TTL_S": "2",
    "LAZYFARM__FETCH__PART_BYTES": str(PART_BYTES),
    "LAZYFARM__FETCH__WHOLE_UP_TO_BYTES": "0",
    "LAZYFARM__FETCH__PARALLEL_FROM_BYTES": str(16 * MIB),
    "LAZYFARM__FETCH__RANGES_PER_LAYER": str(RANGES),
    "LAZYFARM__FETCH__STALL_TIMEOUT_S": "2",
    "LAZYFARM__FETCH__ATTEMPTS": "3",
    "LAZYFARM__FETCH__RETRY_BUDGET_S": "15",
    "LAZYFARM__REGISTRIES__DEFAULT__TIMEOUT_S": "3",
    "LAZYFARM__REGISTRIES__DEFAULT__ATTEMPTS": "4",
    "LAZYFARM__REGISTRIES__DEFAULT__RETRY_BUDGET_S": "10",
    "LAZYFARM__S3__TIMEOUT_S": "5",
    "LAZYFARM__S3__ATTEMPTS": "4",
}


# -- fault points -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A process that hangs at a fault point until the gate opens."""

    path: Path

    @property
    def pid(self) -> int | None:
        """Return the process at the gate."""
        try:
            text = Path(f"{self.path}.arrived").read_text().split()
        except FileNotFoundError:
            return None
        return int(text[-1]) if text else None

    async def arrival(self) -> int:
        """Wait for a process at the gate; return its pid."""
        pid = await eventually(lambda: self.pid, f"somebody at {self.path.name}")
        assert pid is not None
        return pid

    def open(self) -> None:
        """Let it go on."""
        self.path.touch()


class FaultSwitches:
    """The standing plan's claims. Files of *directory*."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.hits = directory / "hits"
        plan = []
        for point in FaultPoint:
            where = directory / point
            plan += [
                f"{point}=kill!{where}.kill",
                f"{point}=hang:{where}.gate!{where}.hang",
                f"{point}=error:UnavailableError!{where}.error",
                f"{point}@2+=kill!{where}.kill-later",
            ]
        (directory / "plan").write_text("\n".join(plan))
        self.reset()

    @property
    def environ(self) -> dict[str, str]:
        """Return what makes a process follow the plan."""
        return {PLAN_VARIABLE: str(self._directory / "plan"), HITS_VARIABLE: str(self.hits)}

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Make what is started meanwhile, and all that it starts, follow the plan."""
        os.environ.update(self.environ)
        try:
            yield
        finally:
            for name in self.environ:
                del os.environ[name]

    def reset(self) -> None:
        """Let nothing more happen, and everybody who hangs go on."""
        for point in FaultPoint:
            for action in ("kill", "hang", "error", "kill-later"):
                self._claim(point, action).touch()
            self._gate(point).touch()

    def kill(self, point: FaultPoint, *, later: bool = False) -> Callable[[], bool]:
        """Kill the next process that passes *point* (*later*: not for the first time); tell whether it happened."""
        claim = self._claim(point, "kill-later" if later else "kill")
        claim.unlink()
        return claim.exists

    def fail(self, point: FaultPoint) -> Callable[[], bool]:
        """Raise UnavailableError in the next that passes *point*; tell whether it happened."""
        claim = self._claim(point, "error")
        claim.unlink()
        return claim.exists

    def hang(self, point: FaultPoint) -> Gate:
        """Make the next process that passes *point* wait at the gate."""
        gate = self._gate(point)
        gate.unlink()
        Path(f"{gate}.arrived").unlink(missing_ok=True)
        self._claim(point, "hang").unlink()
        return Gate(gate)

    def _claim(self, point: FaultPoint, action: str) -> Path:
        return self._directory / f"{point}.{action}"

    def _gate(self, point: FaultPoint) -> Path:
        return self._directory / f"{point}.gate"


# -- the farm -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BrokenFarm(CheckedFarm):
    """A farm of three nodes with something to break on every side."""

    faults: FaultSwitches
    #: Between the farm and its S3 server.
    s3_proxy: S3FaultProxy
    #: Between the farm and the open registry.
    proxy: RegistryFaultProxy
    registry: Registry
    #: Of images: never those of another run on the same farm.
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(secrets.randbits(48)))

    # -- drivers --

    @contextlib.asynccontextmanager
    async def driver(self, **options: Any) -> AsyncIterator[Farm]:
        """Join as a driver of this process; several at once are several sessions."""
        farm = await self.running.connect(**options)
        try:
            yield farm
        finally:
            await farm.close()

    def s3_back(self) -> None:
        """Let S3 work again."""
        for plan in self.s3_proxy._plans:
            if isinstance(plan.then, Hang):
                plan.then.proceed.set()
        self.s3_proxy._plans.clear()

    def restart_redis(self) -> None:
        """Kill Redis and start it again, as ``up`` does."""
        self.kill_redis()
        self.start_redis()

    def kill_redis(self) -> None:
        """Kill Redis; whoever needs it waits."""
        os.kill(json.loads((self.running.state_dir / "run" / "redis.json").read_text())["pid"], signal.SIGKILL)

    def start_redis(self) -> None:
        """Start Redis again, as ``up`` does."""
        assert LocalServices(self.running.state_dir, self.running.settings.wanted).up_redis().was_started

    @contextlib.contextmanager
    def redis_refuses_writes(self) -> Iterator[None]:
        """Have no memory for one more write while the body runs: each is answered by an error."""
        link = connect_sync(self.running.settings.config.redis)
        try:
            link.execute("CONFIG", "SET", "maxmemory", 1)
            yield
        finally:
            link.execute("CONFIG", "SET", "maxmemory", 0)
            link.close()

    def heal(self) -> None:
        """Disarm everything, and count anew."""
        self.faults.reset()
        self.proxy.forget()
        self.proxy.bytes_per_s = None
        self.s3_back()

    # -- images --

    def image(
        self,
        *sizes: int,
        repository: str = "app",
        tag: str | None = None,
        compression: LayerCompression = "zstd",
        registry: Registry | None = None,
    ) -> tuple[str, Image]:
        """Push an image that nobody has seen, with layers of *sizes* bytes; return its name at the proxy."""
        seed = next(self._seeds)
        dice = random.Random(seed)  # noqa: S311 -- reproducible bytes, not secrets
        layers = [
            build_layer({f"data-{n}": dice.randbytes(size), "shared": b"%d" % n}, compression=compression)
            for n, size in enumerate(sizes)
        ]
        image = build_image(layers, label=str(seed))
        found = tag or f"t{seed}"
        (registry or self.registry).push(repository, found, image)
        host = registry.host if registry is not None else self.proxy.host
        return f"{host}/{repository}:{found}", image

    def fetched(self, image: Image) -> dict[str, int]:
        """Return the bytes that the registry gave of each layer."""
        return {layer.digest: self.proxy.blob_bytes[layer.digest] for layer in image.layers}

    def assert_fetched(self, image: Image, *, lost_owners: int = 0) -> None:
        """I1: each byte once, and with each owner lost at most one part more for each range that was open."""
        for layer in image.layers:
            got, size = self.proxy.blob_bytes[layer.digest], len(layer.data)
            most = size + lost_owners * min(size, RANGES * PART_BYTES)
            assert got <= most, f"{layer.digest}: {got} bytes served of {size}, at most {most} are right"
            if not lost_owners:
                assert got == size, f"{layer.digest}: {got} bytes served of {size}"

    @staticmethod
    def was_fetched_once(proxy: RegistryFaultProxy, image: Image) -> bool:
        """Tell whether each byte of an image's layers came once through a proxy, before which one has to log in."""
        # The bodies of a few 401s are counted with them.
        return all(0 <= proxy.blob_bytes[layer.digest] - len(layer.data) < 8192 for layer in image.layers)

    async def end_flights(self, *images: Image) -> None:
        """Let go of what fetches hold for two minutes, for those who wait for them: here nobody does."""
        async with open_leases(self.running.settings) as leases:
            for digest in (digest for image in images for digest in _digests(image)):
                with contextlib.suppress(LeaseNotFoundError):
                    await leases.release(LeaseId(f"flight:{digest}"))

    def objects_of(self, image: Image) -> list[str]:
        """Return the objects in S3 of an image's layers and manifest."""
        prefixes = (f"blobs/{digest.replace(':', '/')}/" for digest in _digests(image))
        return [found.key for prefix in prefixes for found in self.store.objects(prefix)]

    # -- what is recorded --

    async def blob(self, digest: str) -> BlobRecord | None:
        """Return the record of a blob that is present."""
        value = await self.redis("GET", f"{self.prefix}:blob:{digest}")
        return None if value is None else BLOB.decode(value)

    async def owner_of(self, digest: str) -> str | None:
        """Return the node that owns the flight of a blob."""
        if f"flight:blob:{digest}" not in await self.live_flights():
            return None
        value = await self.redis("HGET", f"{self.prefix}:flight:blob:{digest}", "owner")
        return None if value is None else value.decode().partition("/")[0]

    async def worker_pids(self) -> dict[str, int]:
        """Return the fetch workers' pids, by node."""
        return {actor.node: actor.pid for actor in await self.actors() if actor.kind == "fetch-worker"}

    # -- invariants --

    async def assert_whole(self, image: Image | None = None) -> None:
        """Repaired by itself: every worker is there again, and all is consistent."""

        async def all_there() -> bool:
            return len(await self.worker_pids()) == 3

        await eventually(all_there, "three workers")
        await self.assert_consistent(image)


def assert_extracted(path: str, image: Image) -> None:
    """Every file of the image's layers is at *path*, byte for byte, through the hash of its tar."""
    expected: dict[str, bytes] = {}
    for layer in image.layers:
        data = layer.data
        if layer.media_type.endswith("+zstd"):
            data = zstandard.decompress(data)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
            for member in tar:
                opened = tar.extractfile(member)
                assert opened is not None
                expected[member.name] = opened.read()
    for name, content in expected.items():
        assert Path(path, name).read_bytes() == content, f"{name} has other bytes"


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process while the body runs: alive, and doing nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def broken_farm(s3: S3Config) -> Iterator[BrokenFarm]:
    """Bring a farm up whose every process follows the standing plan, behind proxies."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-faults-")))
        faults = FaultSwitches(directory)
        s3_proxy = stack.enter_context(S3FaultProxy(s3))
        with faults.followed():
            running = stack.enter_context(running_farm(nodes=3, environ=environ_of(s3_proxy.config)))
        yield stack.enter_context(behind_proxies(running, faults, s3_proxy, s3))


def environ_of(s3: S3Config) -> dict[str, str]:
    """Return the settings of a farm over that S3 server."""
    return {
        **SETTINGS,
        "LAZYFARM__S3__ENDPOINT": s3.endpoint,
        "LAZYFARM__S3__BUCKET": s3.bucket,
        "LAZYFARM__S3__CREDENTIALS_FILE": s3.credentials_file,
    }


@contextlib.contextmanager
def behind_proxies(
    running: RunningFarm, faults: FaultSwitches, s3_proxy: S3FaultProxy, s3: S3Config
) -> Iterator[BrokenFarm]:
    """Put what it takes to break a farm around one that runs."""
    with contextlib.ExitStack() as stack:
        running.environ.update(faults.environ)
        registry = stack.enter_context(docker_registry())
        proxy = stack.enter_context(registry_fault_proxy(registry.url))
        store = S3ContentStore(s3)
        stack.callback(store.close)
        stack.callback(faults.reset)
        yield BrokenFarm(running=running, faults=faults, s3_proxy=s3_proxy, proxy=proxy, registry=registry, store=store)


def _digests(image: Image) -> list[str]:
    return [image.digest, *(layer.digest for layer in image.layers)]
