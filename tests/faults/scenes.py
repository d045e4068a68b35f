"""Brings cells of the matrix about: a farm into situations, a fault upon a part of it, and what comes of each.

One scene is one part and one fault; the situations that are wanted of it are brought about side by side, so that a
farm is broken once for all of them. Each keeps its own promise, whatever became of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import tempfile
from abc import abstractmethod
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.join import leave
from cluster.config import S3Config
from cluster.errors import ClusterError
from cluster.faultpoints import FaultPoint
from cluster.job import JobEvent, JobId, JobState
from lazyfarm.collection import open_collection
from lazyfarm.farm import Farm
from lazyfarm.graph import image as image_state
from lazyfarm.jobs import open_jobs
from lazyfarm.leases import open_leases
from lazyfarm.ref import Ref
from storage.services.process import SERVICE_MARK, marked_pids
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService
from tests.doubles.builds import Gate as OpGate
from tests.doubles.builds import states, wait_for
from tests.doubles.driver_process import DriverProcess, driver_process
from tests.doubles.faults import LEASE_TTL_S, MIB, PART_BYTES, RANGES, BrokenFarm, Gate, assert_extracted, eventually
from tests.doubles.network import cut_off, refused, silenced
from tests.doubles.registry import Image, Registry, docker_registry
from tests.doubles.registry_faults import RegistryFaultProxy, Respond, registry_fault_proxy
from tests.doubles.s3_faults import Answer
from tests.doubles.token_server import TokenServer, token_server
from tests.faults.matrix import Cell, Fault, Part, Situation

T = TypeVar("T")

#: Seconds that a server is dead or cut off: longer than the lease of a flight, and than a job's claim.
HOLD_S = 3.0
PAUSE_S = 30.0
SLOW_S = 5.0
#: Seconds of each tenth of a second in which what is slow runs.
_SLOW_RUNS_S = 0.01
#: Seconds within which every caller has to have ended.
_ENDS_WITHIN_S = 90.0
_HEAD, _NODES = "n0", ("n0", "n1", "n2")
#: Times that an op is begun until one runs beside the head.
_TRIES = 8
_USER = ("alice", "wonder-land-2f9c")
assert HOLD_S > LEASE_TTL_S

_ACTORS = {
    Part.SCHEDULER: "solver-scheduler",
    Part.SHARD: "cache-shard",
    Part.FETCH_WORKER: "fetch-worker",
    Part.OP_WORKER: "op-worker",
    Part.SUPERVISOR: "supervisor",
}


@dataclass
class Source:
    """Where images come from."""

    registry: Registry
    proxy: RegistryFaultProxy
    tokens: TokenServer | None = None

    @property
    def credentials(self) -> dict[str, tuple[str, str]]:
        """Return what a driver needs to read there."""
        return {self.proxy.host: _USER} if self.tokens is not None else {}


@contextlib.contextmanager
def private_source() -> Iterator[Source]:
    """Run a registry with a token server, behind a proxy: of one scene, which may kill all of them."""
    with (
        tempfile.TemporaryDirectory(prefix="lf-tokens-") as directory,
        token_server(Path(directory)) as tokens,
        docker_registry(tokens.registry_config, authorize=tokens.root) as registry,
        registry_fault_proxy(registry.url) as proxy,
    ):
        tokens.allow(*_USER, {"*": {"pull", "push"}})
        yield Source(registry, proxy, tokens)


# -- a scene ----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A part, a fault, and situations side by side."""

    lab: BrokenFarm
    s3: S3Config
    part: Part
    fault: Fault
    source: Source
    #: What ops are built upon.
    base: str
    stack: AsyncExitStack
    #: The node that the fault is about, where it is about one.
    here: str = _NODES[1]
    drivers: list[DriverProcess] = field(default_factory=list)
    calls: list[asyncio.Task[Any]] = field(default_factory=list)
    #: Of drivers that are processes: by itself one would go on for 30 s after its driver's end.
    jobs: list[JobId] = field(default_factory=list)

    @property
    def elsewhere(self) -> tuple[str, str]:
        """Return the other nodes."""
        one, two = (node for node in _NODES if node != self.here)
        return one, two

    @property
    def is_head_gone(self) -> bool:
        """Tell whether the cluster ends, and every process of it."""
        return self.part is Part.HEAD and self.fault in (Fault.KILLED, Fault.RESTARTED)

    @property
    def may_run_again(self) -> bool:
        """Tell whether an op may be begun once more: who runs it dies, or can't say for a lease that he does."""
        is_lost = self.part in (Part.OP_WORKER, Part.RAYLET, Part.HEAD, Part.REDIS, Part.SCHEDULER)
        return is_lost and self.fault is not Fault.SLOW

    @property
    def may_fail(self) -> bool:
        """Tell whether calls may end with an error: what they need is away for longer than they try."""
        is_node_gone = self.part is Part.RAYLET and self.fault in (Fault.KILLED, Fault.RESTARTED)
        return is_node_gone or self.part in (Part.REDIS, Part.S3, Part.REGISTRY, Part.TOKEN_SERVER)

    async def driver(self) -> Farm:
        """Join as a driver of this process, to the scene's end."""
        return await self.stack.enter_async_context(self.lab.driver(credentials=self.source.credentials))

    async def driver_process(self, *arguments: str) -> DriverProcess:
        """Start a driver that is a process of its own."""
        running = self.lab.running
        started = await self.stack.enter_async_context(
            driver_process(running.state_dir, *arguments, environ=running.environ)
        )
        self.drivers.append(started)
        return started

    def image(self, *sizes: int) -> tuple[str, Image]:
        """Push an image that nobody has seen; return its name."""
        name, image = self.lab.image(*sizes, registry=self.source.registry)
        return name.replace(self.source.registry.host, self.source.proxy.host), image

    def call(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Begin a call, which is over when the scene is."""
        self.calls.append(asyncio.ensure_future(work))
        return self.calls[-1]

    async def end(self) -> None:
        """Let everybody go on, and end what did not."""
        self.lab.heal()
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)
        async with open_jobs(self.lab.running.settings) as jobs:
            for job in self.jobs:
                await jobs.cancel(job)

    async def is_joined(self, image: Image) -> None:
        """Wait until somebody waits for the flight of an image's one layer."""
        (layer,) = image.layers
        await eventually(lambda: self.lab.keys(f"waiters:blob:{layer.digest}"), "somebody to wait")

    def assert_fetched(self, image: Image, *, lost_owners: int) -> None:
        """I1, and a few bytes more where the bodies of refusals are counted with them."""
        for layer in image.layers:
            got, size = self.source.proxy.blob_bytes[layer.digest], len(layer.data)
            most = size + lost_owners * min(size, RANGES * PART_BYTES) + (8192 if self.source.tokens else 0)
            assert size <= got <= most, f"{layer.digest}: {got} bytes served of {size}, at most {most} are right"


async def play(lab: BrokenFarm, s3: S3Config, base: str, cells: Collection[Cell]) -> dict[Cell, BaseException | None]:
    """Bring cells of one part and fault about; return what broke each promise."""
    (part,), (fault,) = {cell.part for cell in cells}, {cell.fault for cell in cells}
    async with AsyncExitStack() as stack:
        is_private = part in (Part.REGISTRY, Part.TOKEN_SERVER)
        source = stack.enter_context(private_source()) if is_private else Source(lab.registry, lab.proxy)
        scene = Scene(lab=lab, s3=s3, part=part, fault=fault, source=source, base=base, stack=stack)
        # Before what the calls run on is closed, and with everything that hangs let go.
        stack.push_async_callback(scene.end)
        under_way = {cell: _SITUATIONS[cell.situation](scene) for cell in sorted(cells, key=_order)}
        for each in under_way.values():
            async with asyncio.timeout(60):
                await each.begin()
        async with happening(scene):
            for each in under_way.values():
                each.go_on()
        return {cell: await _outcome(each) for cell, each in under_way.items()}


def _order(cell: Cell) -> int:
    # The op first: where it runs is "here".
    return list(_SITUATIONS).index(cell.situation)


async def _outcome(situation: UnderWay) -> BaseException | None:
    try:
        async with asyncio.timeout(_ENDS_WITHIN_S):
            await situation.see()
    except Exception as exc:  # noqa: BLE001 - it is the cell's, and raised there
        return exc
    return None


# -- situations -------------------------------------------------------------------------------------------------


@dataclass
class UnderWay:
    """A farm in a situation."""

    scene: Scene

    @abstractmethod
    async def begin(self) -> None:
        """Bring the farm there."""

    def go_on(self) -> None:
        """Let what was held up there go on: the fault has happened, or is happening."""

    @abstractmethod
    async def see(self) -> None:
        """Check the promise, when the fault is over."""


@dataclass
class Idle(UnderWay):
    """Nothing is under way."""

    async def begin(self) -> None:
        """Do nothing."""

    async def see(self) -> None:
        """Pull and extract something new."""
        name, image = self.scene.image(MIB)
        # A driver of its own: of what the fault did to the others' connections it knows nothing.
        async with self.scene.lab.driver(credentials=self.scene.source.credentials) as driver:
            ref = await driver.pull(name, plain_http=True)
            assert_extracted((await ref.extract(self.scene.here)).path, image)


@dataclass
class Running(UnderWay):
    """A command runs."""

    gate: OpGate = field(init=False)
    #: Of a driver of this process.
    result: asyncio.Future[str] | None = None
    #: Of a driver that is a process of its own.
    job: JobId | None = None

    async def begin(self) -> None:
        """Start it, and note where it runs."""
        scene = self.scene
        kept_busy = []
        for _ in range(_TRIES):
            before = scene.lab.containers()
            await self._start()
            (scene.here,) = (node for node, ids in scene.lab.containers().items() if ids - before.get(node, set()))
            if scene.part is not Part.RAYLET or scene.here != _HEAD:
                break
            # Held until another node is preferred: for ops of schedulers that were killed, others may count as busy.
            assert self.result is not None
            kept_busy.append((self.gate, self.result))
        else:
            raise AssertionError("every op runs on the head, whose end would be everything's")
        for gate, result in kept_busy:
            await gate.open_until(result)

    async def _start(self) -> None:
        scene = self.scene
        self.gate = OpGate(scene.lab)
        command = f"{self.gate.command}; head -c 20 /dev/urandom > /random"
        if scene.part is Part.DRIVER or scene.is_head_gone:
            do = "submit" if scene.is_head_gone else "build"
            process = await scene.driver_process(do, scene.base, self.gate.name, command)
            self.job = JobId((await process.said())["job"])
            scene.jobs.append(self.job)
            await eventually(self.gate.came, "the command to run", within_s=60)
        if not scene.is_head_gone:
            driver = await scene.driver()
            events: list[JobEvent] = []
            graph = image_state(scene.base, plain_http=True).run(command, mounts=[self.gate.mount]).named("op")
            self.result = scene.call(_ref_of(driver.solve(graph, on_event=events.append)))
            # What the command says was said before, where it runs for another's job already.
            await eventually(lambda: states(events, "op"), "the job to come to it", within_s=40)
            await eventually(self.gate.came, "the command to run", within_s=40)

    async def see(self) -> None:
        """Let it end."""
        if self.result is not None:
            await self.gate.open_until(self.result)
        else:
            await self.gate.open_until(self.scene.call(self._ends()))
        scene = self.scene
        assert 1 <= self.gate.came() <= (2 if scene.may_run_again else 1)

    async def _ends(self) -> None:
        assert self.job is not None
        async with open_jobs(self.scene.lab.running.settings) as jobs:
            ended = await jobs.follow(self.job, lambda _event: None)
        assert ended.state is JobState.DONE


async def _ref_of(job: object) -> str:
    result = await wait_for(job)  # type: ignore[arg-type]
    return str(result.ref.id)


@dataclass
class _Extracts(UnderWay):
    """Two callers extract one image; the first one's is a process where drivers are what the fault is about."""

    name: str = ""
    image: Image = field(init=False)
    paths: list[asyncio.Future[str]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def go_on(self) -> None:
        """Open the gates."""
        for gate in self.gates:
            gate.open()

    def push(self, size: int) -> None:
        """Push the image that it is about."""
        self.name, self.image = self.scene.image(size)

    def hang(self, point: FaultPoint) -> Gate:
        """Hold the next one up who comes to a point."""
        gate = self.scene.lab.faults.hang(point)
        self.gates.append(gate)
        return gate

    async def extract(self, node: str, *, as_victim: bool = False) -> None:
        """Begin an extract."""
        scene = self.scene
        if scene.is_head_gone or (as_victim and scene.part is Part.DRIVER):
            process = await scene.driver_process("extract", self.name, node)
            if not as_victim or scene.is_head_gone:
                self.paths.append(scene.call(_path_of(process)))
            return
        driver = await scene.driver()
        ref = await driver.pull(self.name, plain_http=True)
        self.paths.append(scene.call(_extracted(ref, node)))

    async def see(self) -> None:
        """Check what each caller got."""
        scene = self.scene
        has_failed = scene.is_head_gone
        for path in self.paths:
            try:
                found = await path
            except ClusterError:
                if not scene.may_fail:
                    raise
                has_failed = True
            else:
                if not scene.is_head_gone:  # whatever came of it there: it has ended
                    assert_extracted(found, self.image)
        if has_failed:
            async with scene.lab.driver(credentials=scene.source.credentials) as driver:
                ref = await driver.pull(self.name, plain_http=True)
                assert_extracted((await ref.extract(scene.here)).path, self.image)


@dataclass
class Pulling(_Extracts):
    """A fetch whose owner is here, and another driver who waits for it elsewhere."""

    async def begin(self) -> None:
        """Begin it, until the owner has recorded a part."""
        self.push(17 * MIB)
        gate = self.hang(FaultPoint.FETCH_PART_RECORDED)
        await self.extract(self.scene.here, as_victim=True)
        await gate.arrival()
        await self.extract(self.scene.elsewhere[1])
        await self.scene.is_joined(self.image)

    async def see(self) -> None:
        """Check the bytes, and how many were fetched."""
        await super().see()
        self.scene.assert_fetched(self.image, lost_owners=1)


@dataclass
class TakingOver(_Extracts):
    """An owner elsewhere falls silent, and who waits for it here has taken its fence and fetches the rest."""

    async def begin(self) -> None:
        """Begin a fetch elsewhere, stop its worker, and end it once the other has the fence."""
        scene = self.scene
        self.push(12 * MIB)
        first = self.hang(FaultPoint.FETCH_PART_RECORDED)
        await self.extract(scene.elsewhere[0])
        pid = await first.arrival()
        await self.extract(scene.here, as_victim=True)
        await scene.is_joined(self.image)
        # Not before it renews its lease: held up for longer, it would be taken for silent itself.
        second = self.hang(FaultPoint.FETCH_PART_RECEIVED)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await second.arrival() != pid
        finally:
            os.kill(pid, signal.SIGKILL)
            first.open()

    async def see(self) -> None:
        """Check the bytes, and how many were fetched."""
        await super().see()
        self.scene.assert_fetched(self.image, lost_owners=2)


@dataclass
class Extracting(_Extracts):
    """A layer is unpacked here, and not published."""

    async def begin(self) -> None:
        """Unpack it."""
        self.push(MIB)
        gate = self.hang(FaultPoint.EXTRACT_APPLIED)
        await self.extract(self.scene.here, as_victim=True)
        await gate.arrival()
        if self.scene.part is Part.DRIVER:
            await self.extract(self.scene.here)


@dataclass
class Pushing(_Extracts):
    """The layers of an image are at their target, its manifest is not."""

    target: str = ""
    pushed: list[asyncio.Future[str]] = field(default_factory=list)

    async def begin(self) -> None:
        """Push them."""
        scene = self.scene
        self.push(MIB)
        self.target = f"{scene.source.proxy.host}/pushed-{secrets.token_hex(4)}:t"
        gate = self.hang(FaultPoint.PUSH_MANIFEST_BEFORE)
        if scene.part is Part.DRIVER:
            await scene.driver_process("push", self.name, self.target)
            await gate.arrival()
        driver = await scene.driver()
        ref = await driver.pull(self.name, plain_http=True)
        self.pushed.append(scene.call(_pushed(driver, ref, self.target)))
        await gate.arrival()

    async def see(self) -> None:
        """Look at the target."""
        for each in self.pushed:
            try:
                assert await each == self.image.digest
            except ClusterError:
                if not self.scene.may_fail:
                    raise
                async with self.scene.lab.driver(credentials=self.scene.source.credentials) as driver:
                    ref = await driver.pull(self.name, plain_http=True)
                    await driver.push(ref, self.target, plain_http=True)
        repository = self.target.partition("/")[2].partition(":")[0]
        status, _, body = self.scene.source.registry.call(
            "GET", f"/v2/{repository}/manifests/t", headers={"Accept": self.image.media_type}, repository=repository
        )
        assert (status, body) == (200, self.image.manifest)


@dataclass
class Collecting(UnderWay):
    """A driver prunes, and has removed the top of what nothing holds, and nothing below that."""

    gate: Gate = field(init=False)
    #: What the filter that is pruned by says; the image goes whole, but for what is pinned.
    filter: str = ""
    gone: Image = field(init=False)
    pinned: Image = field(init=False)

    async def begin(self) -> None:
        """Pin one of two images that are whole in S3, and prune the other."""
        lab = self.scene.lab
        # Of the open registry: no part of what the fault is about.
        (gone, self.gone), (pinned, self.pinned) = lab.image(MIB, MIB), lab.image(MIB)
        async with driver_process(lab.running.state_dir, "unlazy", gone, pinned) as puller:
            assert "unlazied" in await puller.said()
            await puller.process.wait()
        async with open_leases(lab.running.settings) as leases:
            await leases.pin_named(pinned)
        await lab.end_flights(self.gone, self.pinned)
        self.filter = f"description~={gone}|{pinned}"
        self.gate = lab.faults.hang(FaultPoint.COLLECT_REMOVED)
        await self.scene.driver_process("prune", self.filter)
        await self.gate.arrival()

    def go_on(self) -> None:
        """Let it remove the rest."""
        self.gate.open()

    async def see(self) -> None:
        """Prune again, whatever became of who did."""
        lab = self.scene.lab
        async with open_collection(lab.running.settings) as collection:
            await collection.prune(everything=True, filters=[self.filter])
            left = {use.digest for use in (await collection.usage()).refs}
        assert not left & {layer.digest for layer in self.gone.layers}
        await eventually(lambda: not lab.objects_of(self.gone), "the objects to be deleted", within_s=45)
        for layer in self.pinned.layers:
            record = await lab.blob(layer.digest)
            assert record is not None
            assert await asyncio.to_thread(lab.digest_in_s3, record) == layer.digest


async def _path_of(process: DriverProcess) -> str:
    said = await process.said()
    while "pulled" in said:
        said = await process.said()
    return said.get("path", "")


async def _extracted(ref: Ref, node: str) -> str:
    return (await ref.extract(node)).path


async def _pushed(driver: Farm, ref: Ref, target: str) -> str:
    return (await driver.push(ref, target, plain_http=True)).digest


#: In the order in which they are brought about.
_SITUATIONS: dict[Situation, type[UnderWay]] = {
    Situation.RUNNING: Running,
    Situation.EXTRACTING: Extracting,
    Situation.PUSHING: Pushing,
    Situation.TAKING_OVER: TakingOver,
    Situation.PULLING: Pulling,
    Situation.COLLECTING: Collecting,
    Situation.IDLE: Idle,
}


# -- faults -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def happening(scene: Scene) -> AsyncIterator[None]:
    """Do the fault to the part, let the body run while it lasts, and make it good."""
    if scene.is_head_gone:
        # This process is in the cluster that ends.
        await asyncio.to_thread(leave)
    match scene.fault:
        case Fault.CUT_OFF:
            with _cut_off(scene, await _pids(scene)):
                yield
                await asyncio.sleep(HOLD_S)  # the fault itself
        case Fault.PAUSED:
            pids = await _pids(scene)
            _send(pids, signal.SIGSTOP)
            try:
                yield
                await asyncio.sleep(PAUSE_S)  # likewise
            finally:
                _send(pids, signal.SIGCONT)
        case Fault.SLOW:
            pids = await _pids(scene)
            yield
            await _slow(pids)
        case Fault.ERRORS:
            with _answering_errors(scene):
                yield
                await asyncio.sleep(HOLD_S)  # likewise
        case Fault.KILLED | Fault.RESTARTED:
            async with _ended(scene):
                yield


@contextlib.asynccontextmanager
async def _ended(scene: Scene) -> AsyncIterator[None]:
    by = signal.SIGKILL if scene.fault is Fault.KILLED else signal.SIGTERM
    if scene.part is Part.TOKEN_SERVER:
        # A thread of this process: its clients see what they would of a dead one.
        assert scene.source.tokens is not None
        with refused(_port(scene.source.tokens.url)):
            yield
            if scene.fault is Fault.KILLED:
                await asyncio.sleep(HOLD_S)
        return
    if scene.part is Part.REGISTRY:
        await asyncio.to_thread(scene.source.registry.stop, by)
    else:
        pids = await _pids(scene)
        _send(pids, by)
        if scene.part in (Part.REDIS, Part.S3):
            # Started again only then: one that is about to end still looks as if it ran.
            await eventually(lambda: not any(map(_runs, pids)), f"{scene.part} to end")
    yield
    if scene.fault is Fault.KILLED and scene.part in (Part.REDIS, Part.S3, Part.REGISTRY):
        await asyncio.sleep(HOLD_S)
    match scene.part:
        case Part.REDIS:
            await asyncio.to_thread(scene.lab.start_redis)
        case Part.S3:
            await asyncio.to_thread(_start_s3, scene.s3)
        case Part.REGISTRY:
            await asyncio.to_thread(scene.source.registry.start)
        case Part.RAYLET | Part.HEAD:
            await asyncio.to_thread(scene.lab.running.cli, "up", "--nodes", "3", timeout_s=120)
        case _:
            pass  # a driver is gone for good; an actor comes back


async def _pids(scene: Scene) -> list[int]:  # noqa: PLR0911 - one a part
    """Return the processes that are the part."""
    run = scene.lab.running.state_dir / "run"
    match scene.part:
        case Part.DRIVER:
            # One whose call was lost with a worker made it again, and may have ended well since.
            running = [driver.pid for driver in scene.drivers if _runs(driver.pid)]
            assert running, "no driver is left that something could happen to"
            return running
        case Part.RAYLET:
            return _ray_processes(scene, f"ray-{scene.here}", "raylet")
        case Part.HEAD:
            return _ray_processes(scene, f"ray-{_HEAD}", "gcs_server")
        case Part.REDIS:
            return [json.loads((run / "redis.json").read_text())["pid"]]
        case Part.S3:
            return [process.pid for process in _swift(scene.s3).processes[:1] if process.pid is not None]
        case Part.REGISTRY:
            assert scene.source.registry.process is not None
            return [scene.source.registry.process.pid]
        case Part.TOKEN_SERVER:
            return []
        case part:
            found = [actor for actor in await scene.lab.actors() if actor.kind == _ACTORS[part]]
            on_nodes = part in (Part.FETCH_WORKER, Part.OP_WORKER)
            return [actor.pid for actor in found if not on_nodes or actor.node == scene.here]


def _ray_processes(scene: Scene, service: str, command: str) -> list[int]:
    mark = {SERVICE_MARK: service}
    pids = scene.lab.processes() & set(marked_pids(mark))
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == command]


def _cut_off(scene: Scene, pids: Collection[int]) -> contextlib.AbstractContextManager[None]:
    # Between the farm and the proxies, which are threads of this process, as the token server is.
    match scene.part:
        case Part.S3:
            return silenced(_port(scene.lab.s3_proxy.config.endpoint))
        case Part.REGISTRY:
            return silenced(_port(scene.source.proxy.url))
        case Part.TOKEN_SERVER:
            assert scene.source.tokens is not None
            return silenced(_port(scene.source.tokens.url))
        case _:
            return cut_off(*pids)


@contextlib.contextmanager
def _answering_errors(scene: Scene) -> Iterator[None]:
    with ExitStack() as stack:
        match scene.part:
            case Part.S3:
                for method in ("GET", "PUT", "POST", "HEAD"):
                    scene.lab.s3_proxy.plan(Answer(503, "SlowDown"), method=method, times=10_000)
                stack.callback(scene.lab.s3_back)
            case Part.REGISTRY:
                scene.source.proxy.script(Respond(503), of=lambda _seen: True, times=None)
                stack.callback(scene.source.proxy.unscript)
            case Part.TOKEN_SERVER:
                assert scene.source.tokens is not None
                scene.source.tokens.script += [(503, {})] * 1000
                stack.callback(scene.source.tokens.script.clear)
            case Part.REDIS:
                stack.enter_context(scene.lab.redis_refuses_writes())
            case part:
                raise AssertionError(f"nothing makes a {part} answer errors")
        yield


async def _slow(pids: Collection[int]) -> None:
    loop = asyncio.get_running_loop()
    until_s = loop.time() + SLOW_S
    while loop.time() < until_s:
        _send(pids, signal.SIGSTOP)
        await asyncio.sleep(0.1 - _SLOW_RUNS_S)
        _send(pids, signal.SIGCONT)
        await asyncio.sleep(_SLOW_RUNS_S)


def _send(pids: Collection[int], what: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _swift(s3: S3Config) -> SwiftService:
    return SwiftService(StateDir(Path(s3.credentials_file).parents[1]))


def _start_s3(s3: S3Config) -> None:
    state = StateDir(Path(s3.credentials_file).parents[1])
    with state.lock("s3", deadline_s=60.0):
        _swift(s3).start(replace(s3, endpoint=""))
