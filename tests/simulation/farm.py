"""A farm in virtual time: machines that go down and come back, a supervisor, fetch workers, what may happen to them.

What is decided is the real code's: :class:`cluster.fetch.runner.Unlazier`, :class:`cluster.flight.runner.Flights`,
:func:`cluster.topology.reconcile`. Only what they run on is modelled.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field

from cluster.errors import BlobNotFoundError
from cluster.fetch.runner import Unlazier
from cluster.fetch.together import Together
from cluster.flight.runner import Flights
from cluster.topology import ActorView, Kind, NodeView, Retire, Spawn, reconcile
from storage.memory import MemoryFlightStore
from tests.doubles.fetch import OpenDoors
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import WORLD, Network, Pipe, Weather
from tests.simulation.services import (
    Bucket,
    BucketModel,
    NoProgress,
    RedisModel,
    RegistryModel,
    Remote,
    RemoteFlights,
    RemoteLimiter,
    VirtualRenewer,
)
from tests.simulation.transfers import VirtualTransfers
from tests.simulation.watch import Watch, WatchedFlights, WatchedLeases, WatchedRefs

VERSION = "1"
#: As configured by default.
FLIGHT_TTL_S = 6.0
POLL_S = 2.0
LAYERS_PER_NODE = 4
#: Seconds between the supervisor's rounds, until Ray starts a process that died anew, and until Ray sees a node dead.
_ROUND_S = 1.0
_RESTART_S = 1.0
_NOTICED_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bytes a second of each link."""

    registry: float = 1.25e9
    bucket: float = 25e9
    node: float = 1.25e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is put in for the real thing: a broken variant differs from this in one."""

    flights: type = MemoryFlightStore
    unlazier: type = Unlazier
    renewer: type = VirtualRenewer
    transfers: type = VirtualTransfers


class Worker:
    """One fetch worker: a process on a machine."""

    def __init__(self, farm, machine, name):
        loop = farm.loop
        self.machine = machine
        self.process = process = loop.process(name)
        #: Done once the process is dead: whoever called it learns of that.
        self.died = loop.create_future()
        redis, parts = farm.redis, farm.parts
        self.flights = RemoteFlights(redis, process, farm.flights)
        self.refs = Remote(redis, process, redis.refs)
        self.bucket = Bucket(farm.bucket, process, machine.link)
        self.renewer = parts.renewer(redis, process)
        tokens = itertools.count()
        self.unlazier = parts.unlazier(
            worker=name,
            refs=self.refs,
            flights=self.flights,
            renewer=self.renewer,
            progress=NoProgress(),
            transfers=parts.transfers(
                process=process,
                link=machine.link,
                flights=self.flights,
                bucket=self.bucket,
                registry=farm.registry,
                limiter=RemoteLimiter(redis, process),
                rng=farm.network.rng,
            ),
            access=OpenDoors(),
            new_token=lambda: f"{name}/{next(tokens)}",
            ttl_s=FLIGHT_TTL_S,
            poll_s=POLL_S,
            deadline_s=farm.deadline_s,
            max_transfers=LAYERS_PER_NODE,
            clock=machine.clock,
        )
        self._snapshots = Flights("snapshots")
        self._looks = Together(lambda _all, digests: self.refs.blobs(digests))

    async def look(self, ref):
        """Look whether a blob is here to be unpacked, as :class:`storage.local_blobs.NodeBlobs` does at first."""
        await self._looks.ask(None, ref.blob.digest)

    async def bring(self, ref, blob):
        """Have the snapshot of *ref*, whose *blob* is present, on this machine: once, however many ask."""
        if ref.chain not in self.machine.disk:
            await self._snapshots.run(f"snapshot:{ref.chain}", lambda _context: self._download(ref, blob))

    async def _download(self, ref, blob):
        try:
            await self.bucket.read(blob.key, blob.size_bytes)
        except BlobNotFoundError as exc:
            raise BlobLostError(ref.blob.digest) from exc
        self.machine.publish(ref.chain)


class BlobLostError(Exception):
    """A blob that was present is not."""


class Machine:
    """One node: its link, its disk, its clock, and the worker that runs there."""

    def __init__(self, farm, index):
        self.farm = farm
        self.name = f"n{index}"
        self.ray_id = f"{self.name}.0"
        self.link = Pipe(farm.links.node)
        #: Snapshots by chain ID.
        self.disk = set()
        self.is_up = True
        self.worker = None
        #: When Ray sees it dead: some time after it is.
        self.seen_until_s = float("inf")
        self._boots = itertools.count(1)
        self._starts = itertools.count(1)
        # No two clocks agree.
        self._offset_s = farm.rng.uniform(-1e4, 1e4)

    def clock(self):
        return self.farm.loop.now_s + self._offset_s

    def publish(self, chain):
        """Publish a snapshot, unless it is there."""
        self.farm.watch.expect("I4", chain not in self.disk, f"{self.name} unpacks {chain} again")
        self.disk.add(chain)

    def start_worker(self):
        self.worker = Worker(self.farm, self, f"{self.name}/{next(self._starts)}")
        self.farm.wake()

    def kill_worker(self):
        """Kill the worker's process; return whether there was one."""
        worker, self.worker = self.worker, None
        if worker is None:
            return False
        self.farm.watch.gone_s.setdefault(worker.process.name, self.farm.loop.now_s)
        worker.process.kill()
        self.farm.redis.disconnect(worker.process)
        worker.died.set_result(None)
        return True

    def crash_worker(self):
        """Kill the process alone: Ray starts it anew."""
        if self.kill_worker():
            self.farm.loop.call_later(_RESTART_S, self._restart, self.ray_id)

    def _restart(self, ray_id):
        if self.is_up and self.worker is None and self.ray_id == ray_id:
            self.start_worker()

    def go_down(self):
        """Turn the machine off."""
        self.is_up = False
        self.seen_until_s = self.farm.loop.now_s + _NOTICED_S
        self.kill_worker()

    def come_back(self):
        """Turn it on: for Ray it is another node; the supervisor has to see to its worker."""
        self.is_up = True
        self.ray_id = f"{self.name}.{next(self._boots)}"
        self.seen_until_s = float("inf")


@dataclass
class Farm:
    """Everything that runs."""

    seed: int
    machines: int
    links: Links = field(default_factory=Links)
    weather: Weather = field(default_factory=Weather)
    parts: Parts = field(default_factory=Parts)
    deadline_s: float = 600.0
    max_concurrency: int = 12

    def __post_init__(self):
        self.loop = VirtualLoop()
        #: What happens, and what the network does: apart, so that a variant meets the same events.
        self.rng = random.Random(self.seed)
        self.network = Network(self.loop, random.Random(self.seed ^ 0x5EED), self.weather)
        self.redis = RedisModel(self.loop, self.network, flights=self.parts.flights, limit=self.max_concurrency)
        self.bucket = BucketModel(self.loop, self.network, bytes_per_s=self.links.bucket)
        self.registry = RegistryModel(self.loop, self.network, bytes_per_s=self.links.registry)
        self.watch = Watch(self.loop)
        self.watch.see(self.redis, self.bucket)
        self.flights = WatchedFlights(self.watch, self.redis)
        self.redis.flights = self.flights
        self.redis.leases = WatchedLeases(self.watch, self.redis)
        self.redis.refs = WatchedRefs(self.watch, self.redis)
        self._changed = None

    def run(self, main):
        """Run *main* in this farm's time; return what it returns."""
        return self.loop.run(self._run(main))

    async def _run(self, main):
        self._changed = asyncio.Event()
        self.nodes = [Machine(self, index) for index in range(self.machines)]
        self.supervisor = self.loop.process("supervisor")
        self.supervisor.spawn(self._supervise())
        try:
            return await main
        finally:
            self.network.is_closed = True
            self.redis.service.close()

    # -- the supervisor ----------------------------------------------------------------------------------------

    async def _supervise(self):
        """Keep a worker on each node, as :class:`actors.supervisor.Supervisor` does."""
        known = {}  # name -> Ray ID
        while True:
            now_s = self.loop.now_s
            nodes = [NodeView(name=n.name, ray_id=n.ray_id) for n in self.nodes if n.is_up or n.seen_until_s > now_s]
            actors = [ActorView(name=name, ray_id=ray_id) for name, ray_id in known.items()]
            for step in reconcile(nodes, actors, numbers={}, version=VERSION):
                match step:
                    case Retire(name=name):
                        del known[name]
                    case Spawn(kind=kind, name=name, node=node):
                        known[name] = node.ray_id
                        if kind is Kind.FETCH_WORKER:
                            self._start_on(node)
            await asyncio.sleep(_ROUND_S)

    def _start_on(self, view):
        machine = self.nodes[int(view.name[1:])]
        if machine.is_up and machine.ray_id == view.ray_id and machine.worker is None:
            # Not the supervisor's own: what starts an actor is its node's raylet.
            self.loop.call_soon(machine.start_worker, context=WORLD)

    def wake(self):
        self._changed.set()
        self._changed = asyncio.Event()

    async def worker_of(self, machine):
        """Return a machine's worker, as soon as there is one."""
        while machine.worker is None:
            await self._changed.wait()
        return machine.worker

    # -- what may happen ---------------------------------------------------------------------------------------

    def pause(self, process, seconds):
        """Stop a process for a while."""
        self.watch.gone_s.setdefault(process.name, self.loop.now_s)
        process.pause()
        self.loop.call_later(seconds, self._resume, process)

    def _resume(self, process):
        process.resume()
        self.watch.gone_s.pop(process.name, None)

    def cut_off(self, process, service, seconds, *, back_only=False):
        """Cut a process off from a service for a while."""
        if service is self.redis.service:
            self.watch.gone_s.setdefault(process.name, self.loop.now_s)
        self.network.partition(process.name, service.name, back_only=back_only)
        self.loop.call_later(seconds, self._heal, process, service)

    def _heal(self, process, service):
        self.network.heal(process.name, service.name)
        if process.is_alive:
            self.watch.gone_s.pop(process.name, None)
