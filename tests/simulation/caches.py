"""The cache: drivers make and look up the same refs through several shards, under leases that lapse.

The shards run the real :class:`cluster.cache.runner.CacheManager` and :class:`cluster.fetch.access.AccessControl`,
their stores and the registry are across the network. Shards are killed and stopped, drivers stop for longer than their
leases live, and go on as if nothing had been.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.cache.runner import CacheManager
from cluster.errors import ClusterError, LeaseLostError
from cluster.fetch.access import AccessControl
from cluster.lease import LeaseId, ref_resource
from cluster.provider import DescHandler
from storage.memory import MemoryRefStore
from tests.doubles.fetch import HANDLE, FakeAuthorizer, layer_of
from tests.simulation.farm import Farm
from tests.simulation.network import Weather
from tests.simulation.services import Remote

_LEASE_TTL_S = 6.0
_SPAN_S = 20.0
_CALLS = 8
_ENDS_WITHIN_S = 200.0
_A, _B, _C, _D = (layer_of(name.encode()) for name in "ABCD")
#: C is there twice, on top of B and of D; each chain's beginnings are asked for, too.
_CHAINS = ((_A,), (_A, _B), (_A, _B, _C), (_A, _D), (_A, _D, _C), (_D, _C))


class _Heads:
    """A registry as far as HEAD goes, as one process sees it; :class:`cluster.fetch.access.BlobProber`."""

    def __init__(self, farm, process):
        self._farm = farm
        self._process = process

    async def blob_exists(self, handle, digest, authorizer):
        registry = self._farm.registry
        return await self._farm.network.call(
            self._process, registry.service, (digest,), lambda: (len(registry.blobs[digest]), 0.0)
        )


class Shard:
    """One cache shard: a process."""

    def __init__(self, farm, name):
        self.process = process = farm.loop.process(name)
        self.died = farm.loop.create_future()
        access = AccessControl(Remote(farm.redis, process, farm.redis.proofs), _Heads(farm, process), proof_ttl_s=3.0)
        self.manager = CacheManager(Remote(farm.redis, process, farm.redis.refs), access)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChaos:
    """How often what goes wrong."""

    crashes: int = 0
    pauses: int = 0
    #: Drivers that stop for longer than their lease lives.
    stops: int = 0
    cuts: int = 0


@dataclass(kw_only=True)
class CacheRun:
    """Some drivers and shards."""

    seed: int
    weather: Weather = field(default_factory=Weather)
    shards: int = 2
    drivers: int = 4
    chaos: CacheChaos = field(default_factory=CacheChaos)
    refs: type = MemoryRefStore

    def __post_init__(self):
        self.farm = Farm(seed=self.seed, machines=0, weather=self.weather)
        redis = self.farm.redis
        redis.refs = self.refs(redis.memory)
        #: The one record of each layer on each parent.
        self._records = {}
        self.answers = 0

    def run(self):
        """Run it, and check all invariants; violations are the watch's."""
        return self.farm.run(self._run())

    async def _run(self):
        farm, rng = self.farm, self.farm.rng
        for layer, name in zip((_A, _B, _C, _D), "ABCD", strict=True):
            farm.registry.blobs[layer.digest] = name.encode()
        self._shards = [Shard(farm, f"shard-{index}/0") for index in range(self.shards)]
        processes = [farm.loop.process(f"driver-{index}") for index in range(self.drivers)]
        tasks = {process.spawn(self._drive(process)) for process in processes}
        self._plan(rng, processes)
        _, late = await asyncio.wait(tasks, timeout=_ENDS_WITHIN_S)
        farm.watch.expect("I5", not late, f"{len(late)} drivers have not ended after {_ENDS_WITHIN_S:.0f} s")
        for task in tasks - late:
            task.result()
        farm.watch.expect("I7", not farm.registry.served.total(), "layer bytes moved")
        farm.watch.check_at_end()

    async def _drive(self, process):
        farm, rng = self.farm, self.farm.network.rng
        leases = Remote(farm.redis, process, farm.redis.leases)
        number = 0
        lease = None
        keeping = process.spawn(self._keep(leases, lambda: lease))
        try:
            for _ in range(_CALLS):
                await asyncio.sleep(rng.uniform(0.0, 2 * _SPAN_S / _CALLS))
                try:
                    if lease is None:
                        number += 1
                        lease = LeaseId(f"{process.name}/{number}")
                        await leases.create(lease, ttl_s=_LEASE_TTL_S)
                    await self._ask(process, lease)
                except LeaseLostError:
                    lease = None
                except ClusterError as exc:
                    farm.watch.expect("I6", exc.retryable and not self._is_clear, f"{process.name} gets {exc!r}")
        finally:
            keeping.cancel()

    async def _keep(self, leases, current):
        while True:
            await asyncio.sleep(_LEASE_TTL_S / 3)
            if (lease := current()) is not None:
                try:
                    await leases.renew(lease, ttl_s=_LEASE_TTL_S)
                except ClusterError:
                    continue

    async def _ask(self, process, lease):
        """Make a chain, or look it up, through any shard; where that dies, through another."""
        farm, rng = self.farm, self.farm.network.rng
        chain = rng.choice(_CHAINS)
        handlers = [DescHandler(digest=layer.digest, provider=HANDLE) for layer in chain]
        who = FakeAuthorizer(process.name)
        was_live = farm.watch.is_live(lease)
        while True:
            shard = rng.choice(self._shards)
            if rng.random() < 0.5 and (known := self._known(chain)) is not None:
                asking = shard.manager.get(known, handlers=handlers, authorizer=who, lease_id=lease)
            else:
                asking = shard.manager.get_by_blob(
                    chain, parent=None, handlers=handlers, authorizer=who, lease_id=lease, image_ref=process.name
                )
            call = shard.process.spawn(asking)
            await asyncio.wait({call, shard.died}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                break
        states = call.result()
        self.answers += 1
        farm.watch.expect("I10", was_live, f"{lease} had lapsed, and was given refs")
        farm.watch.expect("I4", len(states) == len(chain), f"{len(states)} refs of {len(chain)} layers")
        for state in states:
            record = state.record
            known = self._records.setdefault((record.parent, record.blob.digest), record.id)
            farm.watch.expect("I4", known == record.id, f"{record.blob.digest} on {record.parent} has two records")
            farm.watch.promise(lease, ref_resource(record.id))

    def _known(self, chain):
        """Return the ref of a chain, if anyone was told of it."""
        below = None
        for layer in chain:
            below = self._records.get((below, layer.digest))
            if below is None:
                return None
        return below

    @property
    def _is_clear(self):
        return not (self.chaos.pauses or self.chaos.cuts or self.weather.loss or self.weather.late)

    # -- what goes wrong ---------------------------------------------------------------------------------------

    def _plan(self, rng, processes):
        chaos, loop = self.chaos, self.farm.loop

        def at(step, *args):
            loop.call_later(rng.uniform(0.5, _SPAN_S), step, *args)

        for _ in range(chaos.crashes):
            at(self._crash, rng.randrange(self.shards))
        for _ in range(chaos.pauses):
            at(self._pause, rng.randrange(self.shards), rng.uniform(0.5, 2 * _LEASE_TTL_S))
        for _ in range(chaos.stops):
            at(self.farm.pause, rng.choice(processes), rng.uniform(_LEASE_TTL_S, 2 * _LEASE_TTL_S))
        for _ in range(chaos.cuts):
            at(self._cut_off, rng.randrange(self.shards), rng.uniform(0.5, _LEASE_TTL_S), rng.random() < 0.5)

    def _crash(self, index):
        shard, self._shards[index] = self._shards[index], Shard(self.farm, f"shard-{index}/{self.farm.loop.now_s:.3f}")
        shard.process.kill()
        shard.died.set_result(None)

    def _pause(self, index, seconds):
        self.farm.pause(self._shards[index].process, seconds)

    def _cut_off(self, index, seconds, back_only):
        service = self.farm.redis.service
        self.farm.cut_off(self._shards[index].process, service, seconds, back_only=back_only)


# -- a broken variant ------------------------------------------------------------------------------------------


class LeaseNotChecked(MemoryRefStore):
    """Refs are given to whoever names a lease, live or not."""

    def __init__(self, memory):
        super().__init__(memory)
        memory.is_live = lambda lease_id: lease_id in memory.leases
