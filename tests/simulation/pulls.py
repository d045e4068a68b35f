"""Pulls: every node wants an image, at about the same time, whatever happens to nodes, network and registry.

Each driver has a lease of its own, asks its node's worker for all layers at once, as an extract does, and has each
brought to the node. A driver whose worker dies asks the next one; one that meets an error that may pass tries again.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from cluster.digest import digest_of
from cluster.errors import ClusterError, DigestMismatchError, LeaseLostError, UnavailableError
from cluster.fetch.runner import Caller
from cluster.lease import LeaseId, blob_resource
from cluster.provider import ProviderHandle
from cluster.ref import RefRecord
from tests.doubles.fetch import FakeAuthorizer, layer_of
from tests.simulation.collection import CollectedRefs, Collector
from tests.simulation.farm import FLIGHT_TTL_S, POLL_S, BlobLostError, Farm
from tests.simulation.loop import all_or_nothing
from tests.simulation.network import Pipe, Weather
from tests.simulation.services import PART_BYTES, Remote
from tests.simulation.transfers import RANGES
from tests.simulation.watch import refusal_in

_LEASE_TTL_S = 60.0
_PAUSE_S = 0.5
#: Tries of one driver. Faults end; what goes wrong more often than this goes wrong for ever.
_TRIES = 40
#: Errors that say no, after which it takes that for an answer: by then it has come late to a failure, twice.
_DEFINITE = 3
#: Messages, one after another, from a flight's end to a caller's: its event, the pin, a last look.
_MESSAGES = 6
#: Repositories that have the image: which is asked first varies.
_REPOSITORIES = ("mirror", "app")
#: Seconds within which everything is to have ended, counted from the last fault's end.
_ENDS_WITHIN_S = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image's layers, lowest first."""

    blobs: tuple[bytes, ...]
    refs: tuple[RefRecord, ...]
    #: Digests that are refused by their first repository, and those that it has wrong.
    refused: frozenset[str] = frozenset()
    wrong: frozenset[str] = frozenset()

    @property
    def size_bytes(self):
        return sum(map(len, self.blobs))


def image_of(seed, sizes):
    """Return an image with layers of these modelled sizes; like layers of real ones, no two are the same."""
    blobs, refs, top = [], [], None
    for index, size in enumerate(sizes):
        blob = random.Random(f"{seed} {index}").randbytes(size)
        top = RefRecord.over(layer_of(blob), top)
        blobs.append(blob)
        refs.append(top)
    return Image(blobs=tuple(blobs), refs=tuple(refs))


class Driver:
    """One caller: a process with a lease, and what it wants of a node."""

    def __init__(self, farm, machine, name, image, *, start_s, hold_s=None):
        self.farm = farm
        self.machine = machine
        self.name = name
        self.image = image
        self.start_s = start_s
        #: Seconds for which it holds what it has pulled; None: for as long as it lives.
        self.hold_s = hold_s
        self.process = farm.loop.process(name)
        self.leases = Remote(farm.redis, self.process, farm.redis.leases)
        #: Set by whoever cancels it, or lets it die.
        self.is_cancelled = False
        self.call = None
        self.done_s = None
        #: Errors that it met, and the one that ended it.
        self.errors = []
        self.error = None
        self._leases = 0
        self.lease = None

    async def run(self):
        """Pull, and end: with the image, a typed error, or its own cancellation."""
        await asyncio.sleep(self.start_s)
        keeping = self.process.spawn(self._keep_lease())
        try:
            for _ in range(_TRIES):
                if self.is_cancelled:
                    return
                try:
                    await self._new_lease_if_lost()
                    if not await self._try():
                        continue
                except BlobLostError:
                    continue
                except ClusterError as exc:
                    if self.is_cancelled:
                        return
                    self.errors.append(exc)
                    if sum(not error.retryable for error in self.errors) >= _DEFINITE:
                        self.error = exc
                        return
                    await asyncio.sleep(_PAUSE_S * (1 + self.farm.network.rng.random()))
                else:
                    self.done_s = self.farm.loop.now_s
                    await self._hold()
                    return
            self.error = self.errors[-1] if self.errors else UnavailableError(self.machine.name, "it keeps dying")
        finally:
            keeping.cancel()

    async def _hold(self):
        """Hold what was pulled for a while, and let go; a lease that can't be deleted lapses."""
        if self.hold_s is not None:
            await asyncio.sleep(self.hold_s)
            lease, self.lease = self.lease, None
            try:
                await self.leases.delete(lease)
            except ClusterError:
                return

    def cancel(self):
        """Give up, as a driver does that is interrupted."""
        self.is_cancelled = True
        if self.call is not None:
            self.call.cancel()

    async def _new_lease_if_lost(self):
        if self.lease is None or not self.farm.redis.memory.is_live(self.lease):
            self._leases += 1
            lease = LeaseId(f"{self.name}/{self._leases}")
            await self.leases.create(lease, ttl_s=_LEASE_TTL_S)
            self.lease = lease

    async def _keep_lease(self):
        while True:
            await asyncio.sleep(_LEASE_TTL_S / 3)
            if self.lease is not None:
                try:
                    await self.leases.renew(self.lease, ttl_s=_LEASE_TTL_S)
                except ClusterError:
                    continue

    async def _try(self):
        """Ask the node's worker; False: it died."""
        worker = await self.farm.worker_of(self.machine)
        self.call = worker.process.spawn(self._pull(worker, self.lease))
        await asyncio.wait({self.call, worker.died}, return_when=asyncio.FIRST_COMPLETED)
        if not self.call.done():
            return False
        if self.call.cancelled():
            self.farm.watch.expect("I6", self.is_cancelled, f"{self.name} is cancelled by another's going")
            return False
        self.call.result()
        return True

    async def _pull(self, worker, lease):
        await all_or_nothing(self._layer(worker, lease, ref) for ref in self.image.refs)

    async def _layer(self, worker, lease, ref):
        farm, digest = self.farm, ref.blob.digest
        started_s = farm.loop.now_s
        caller = Caller(
            authorizer=FakeAuthorizer(self.name),
            lease_id=lease,
            providers={digest: [ProviderHandle(registry=farm.registry.host, repository=r) for r in _REPOSITORIES]},
            is_live=lambda: not self.is_cancelled,
        )
        try:
            await worker.look(ref)
            fetch, blob = await worker.unlazier.bring(ref.blob, caller)
        except ClusterError as exc:
            self._check_error(exc, started_s)
            raise
        farm.watch.promise_blob(lease, digest)
        self._check_release(fetch, digest)
        await worker.bring(ref, blob)

    def _check_error(self, error, started_s):
        """Whoever comes late inherits nothing; whoever can't have met a fault gets no error."""
        farm, number = self.farm, refusal_in(error)
        if number is not None:
            told_s = farm.watch.refused_s.get(number, started_s)
            farm.watch.expect(
                "I6", told_s >= started_s, f"{self.name}, who came at {started_s:.3f} s, inherits an error: {error}"
            )
        if self.is_cancelled:
            return
        is_excused = isinstance(error, LeaseLostError | UnavailableError) and not farm.watch.is_clear
        is_refused = number is not None and bool(self.image.refused)
        # Another source has it right; where that one can't be reached, the one that is wrong is the cause.
        is_excused |= isinstance(error, DigestMismatchError) and bool(self.image.wrong) and not farm.watch.is_clear
        farm.watch.expect("I6", is_excused or is_refused, f"{self.name} gets an error that nothing excuses: {error!r}")

    def _check_release(self, fetch, digest):
        """Who waited is released at the flight's end, not when something lapses."""
        farm = self.farm
        if not farm.watch.is_clear or not fetch.joined:
            return
        late_s = farm.loop.now_s - farm.watch.ended_s.get(blob_resource(digest), farm.loop.now_s)
        farm.watch.expect("I5", late_s <= farm.watch.soon_s, f"{self.name} is released {late_s:.3f} s after the end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """How much goes wrong, each as a number of times in a run."""

    crashes: int = 0
    machines_down: int = 0
    pauses: int = 0
    cuts: int = 0
    cancels: int = 0
    outages: int = 0
    #: Layers that the first repository doesn't have, and those that it has wrong.
    refused: int = 0
    wrong: int = 0
    #: Seconds within which it all begins, and the longest that a pause or a cut lasts.
    span_s: float = 12.0
    longest_s: float = 12.0


@dataclass(kw_only=True)
class PullRun:
    """One simulated pull: what is made of it, and what came of it."""

    farm: Farm
    image: Image
    chaos: Chaos = field(default_factory=Chaos)
    drivers_per_node: int = 1
    #: Seconds over which drivers begin.
    stagger_s: float = 3.0
    drivers: list[Driver] = field(default_factory=list)
    #: Collects what nobody holds; drivers then let go of what they have pulled, after this many seconds at most.
    collects: type[CollectedRefs] | None = None
    longest_hold_s: float = 30.0

    def run(self):
        """Run it, and check all invariants; violations are the watch's."""
        return self.farm.run(self._run())

    async def _run(self):
        farm, rng = self.farm, self.farm.rng
        chaos, weather = self.chaos, farm.weather
        farm.watch.soon_s += _MESSAGES * weather.delay_s[1]
        farm.watch.is_clear = not (chaos.pauses or chaos.cuts or chaos.outages or weather.loss or weather.late)
        for blob, ref in zip(self.image.blobs, self.image.refs, strict=True):
            farm.registry.blobs[ref.blob.digest] = blob
        for machine in farm.nodes:
            for number in range(self.drivers_per_node):
                name = f"driver-{machine.name}.{number}"
                start_s = rng.uniform(0.0, self.stagger_s)
                hold_s = None if self.collects is None else rng.uniform(0.0, self.longest_hold_s)
                self.drivers.append(Driver(farm, machine, name, self.image, start_s=start_s, hold_s=hold_s))
        if self.collects is not None:
            self._collected = self.collects(farm.watch, farm.redis)
            collector = Collector(farm, self._collected, Pipe(farm.links.node))
            collector.process.spawn(collector.run())
        self._spoil(rng)
        self._plan(rng)
        tasks = {driver: driver.process.spawn(driver.run()) for driver in self.drivers}
        begun_s = self.stagger_s + self.longest_hold_s + self.chaos.span_s + self.chaos.longest_s
        ends_s = begun_s + _ENDS_WITHIN_S + farm.deadline_s
        _, late = await asyncio.wait(tasks.values(), timeout=ends_s)
        names = [driver.name for driver, task in tasks.items() if task in late]
        farm.watch.expect("I5", not late, f"{names} have not ended after {ends_s:.0f} s")
        for task in set(tasks.values()) - late:
            task.result()
        self.ended_s = max((d.done_s for d in self.drivers if d.done_s is not None), default=0.0)
        self._check_bytes()
        await self._start_anew()
        farm.watch.check_at_end()

    @property
    def is_calm(self):
        """Tell whether nothing goes wrong at all."""
        return self.chaos == Chaos() and self.farm.watch.is_clear

    # -- what goes wrong ---------------------------------------------------------------------------------------

    def _spoil(self, rng):
        """Let the first repository lack some layers, and have some wrong."""
        registry, digests = self.farm.registry, [ref.blob.digest for ref in self.image.refs]
        wrong = rng.sample(digests, self.chaos.wrong)
        refused = rng.sample([d for d in digests if d not in wrong], self.chaos.refused)
        for digest in wrong:
            registry.faults[_REPOSITORIES[0], digest] = lambda data: bytes([data[0] ^ 1]) + data[1:]
        for digest in refused:
            for repository in _REPOSITORIES:
                registry.faults[repository, digest] = registry.refuse(repository)
        self.image = Image(
            blobs=self.image.blobs, refs=self.image.refs, refused=frozenset(refused), wrong=frozenset(wrong)
        )
        for driver in self.drivers:
            driver.image = self.image
        if refused:
            # It is there after a while, for whoever comes then.
            self.farm.loop.call_later(rng.uniform(0.5, 3.0), self._restore, refused)

    def _restore(self, digests):
        for digest in digests:
            for repository in _REPOSITORIES:
                del self.farm.registry.faults[repository, digest]

    def _plan(self, rng):
        """Set the times of all that goes wrong."""
        chaos, loop = self.chaos, self.farm.loop

        def at(step, *args):
            loop.call_later(rng.uniform(0.2, chaos.span_s), step, *args)

        for _ in range(chaos.crashes):
            at(self._with_owner, rng.random(), lambda machine: machine.crash_worker())
        for _ in range(chaos.machines_down):
            at(self._with_owner, rng.random(), self._power_cycle)
        for _ in range(chaos.pauses):
            at(self._with_owner, rng.random(), self._pause, rng.uniform(0.5, chaos.longest_s))
        for _ in range(chaos.cuts):
            service = rng.choice([self.farm.redis.service, self.farm.bucket.service, self.farm.registry.service])
            seconds, back_only = rng.uniform(0.5, chaos.longest_s), rng.random() < 0.5
            at(self._with_owner, rng.random(), self._cut_off, service, seconds, back_only)
        for _ in range(chaos.cancels):
            at(rng.choice(self.drivers).cancel)
        for _ in range(chaos.outages):
            at(self._outage, rng.choice([self.farm.redis.service, self.farm.bucket.service]), rng.uniform(0.5, 5.0))

    def _with_owner(self, draw, step, *args):
        """Do something to a machine, more often than not to one that owns a flight."""
        owners = sorted({owner.worker for owner in self.farm.watch.owners()})
        if owners and draw < 0.8:
            name = owners[int(draw / 0.8 * len(owners))].partition("/")[0]
            machine = self.farm.nodes[int(name[1:])]
        else:
            machine = self.farm.nodes[int(draw * len(self.farm.nodes))]
        step(machine, *args)

    def _power_cycle(self, machine):
        if machine.is_up:
            machine.go_down()
            self.farm.loop.call_later(self.farm.rng.uniform(1.0, 10.0), machine.come_back)

    def _pause(self, machine, seconds):
        if machine.worker is not None:
            self.farm.pause(machine.worker.process, seconds)

    def _cut_off(self, machine, service, seconds, back_only):
        if machine.worker is not None:
            self.farm.cut_off(machine.worker.process, service, seconds, back_only=back_only)

    def _outage(self, service, seconds):
        for machine in self.farm.nodes:
            if machine.worker is not None:
                self.farm.cut_off(machine.worker.process, service, seconds)

    # -- what must hold at the end -----------------------------------------------------------------------------

    def _check_bytes(self):
        """I1: each byte once, and one part more for each range that an owner had open when it was lost."""
        farm = self.farm
        for blob, ref in zip(self.image.blobs, self.image.refs, strict=True):
            digest = ref.blob.digest
            if digest in self.image.wrong:
                continue
            served = farm.registry.served[digest] - farm.registry.wasted[digest]
            lost = max(0, farm.watch.owned.get(blob_resource(digest), 0) - 1)
            collected = 0 if self.collects is None else self._collected.times.get(digest, 0)
            if self.is_calm and not collected:
                farm.watch.expect(
                    "I1", served == len(blob), f"{served} bytes are served of {len(blob)}, and all is well"
                )
            allowed = (1 + collected) * len(blob) + lost * max(RANGES * PART_BYTES, min(len(blob), 3 * PART_BYTES))
            farm.watch.expect("I1", served <= allowed, f"{served} bytes are served of {len(blob)}, {lost} owners lost")

    async def _start_anew(self):
        """I9: what is left is finished by the next start, or swept, and no flight goes on for nobody."""
        farm = self.farm
        farm.network.cut.clear()
        farm.network.weather = Weather()
        await asyncio.sleep(self.chaos.longest_s + FLIGHT_TTL_S + POLL_S)
        flying = [key for key, flight in farm.redis.memory.flights.items() if farm.redis.flights._is_live(flight)]
        farm.watch.expect("I9", not flying, f"{flying} go on for nobody")
        idle = [machine.name for machine in farm.nodes if machine.is_up and machine.worker is None]
        farm.watch.expect("I9", not idle, f"{idle} have no worker")
        late = Driver(farm, farm.nodes[0], "late", self.image, start_s=0.0)
        await asyncio.wait({task := late.process.spawn(late.run())}, timeout=_ENDS_WITHIN_S)
        story = f"a caller after it all has {late.error or 'not ended'}"
        farm.watch.expect("I9", task.done() and late.done_s is not None, story)
        present = {blob.key for blob in farm.redis.memory.blobs.values()}
        store = farm.bucket.store
        for info in list(store.objects("blobs/")):
            if info.key not in present:
                store.delete(info.key)
                farm.watch.object_changed(info.key)
        for key, upload_id in store.list_uploads("blobs/"):
            store.abort_upload(key, upload_id)


def digest_of_trace(run):
    """Return what two runs of one seed have in common: every message and its time."""
    return digest_of(f"{run.farm.network.trace} {run.farm.loop.now_s}".encode())
