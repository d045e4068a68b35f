"""Whatever builds copy, merge and take apart: who may have what comes of it could have made it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.cache.origins import origin_of, origins_of
from cluster.cache.runner import CacheManager
from cluster.digest import Digest
from cluster.errors import NeedsRemoteProvidersError
from cluster.fetch.access import AccessControl
from cluster.lease import LeaseId
from cluster.origin import merge_origins
from cluster.provider import FARM
from cluster.ref import BlobRecord, RefId, RefRecord, RefState
from storage.memory import Memory, MemoryLeaseStore, MemoryProofStore, MemoryRefStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock

L = LeaseId("l")
USERS = ("alice", "bob", "mallory")


@dataclass(frozen=True)
class Step:
    """One op of somebody's: over earlier results, by number."""

    kind: str
    who: str
    inputs: tuple[int, ...]
    #: Which bytes come of it: two steps may come to the same.
    content: int


steps = st.builds(
    Step,
    kind=st.sampled_from(["copy", "merge", "diff", "take off"]),
    who=st.sampled_from(USERS),
    inputs=st.lists(st.integers(0, 30), min_size=2, max_size=3).map(tuple),
    content=st.integers(0, 4),
)
readers = st.lists(st.sets(st.sampled_from(USERS), min_size=1), min_size=2, max_size=3)


class Farm:
    """Records as schedulers and op workers make them, and how each came about."""

    def __init__(self, images: Sequence[set[str]]) -> None:
        self.memory = Memory(FakeClock())
        self.refs, self.prober = MemoryRefStore(self.memory), FakeProber()
        self.access = AccessControl(MemoryProofStore(self.memory), self.prober, proof_ttl_s=100.0)
        self.cache = CacheManager(self.refs, self.access)
        self.images = images
        self.results: list[RefId] = []
        #: Who may read it at its registry, by digest of a pulled layer.
        self.readers: dict[Digest, set[str]] = {}
        #: How each ref was made, in order: of which layers.
        self.made: list[tuple[RefId, tuple[RefState, ...]]] = []

    async def pull(self) -> None:
        await MemoryLeaseStore(self.memory).create(L, ttl_s=None)
        for n, users in enumerate(self.images):
            provider, records = handle(f"image{n}"), []
            for layer in (layer_of(b"image %d, layer %d" % (n, each)) for each in range(2)):
                self.prober.add(provider, layer.digest, readers=users)
                self.prober.sizes[layer.digest] = layer.size_bytes
                self.readers[layer.digest] = users
                self._put(layer, provider.source)
                records.append(RefRecord.over(layer, records[-1] if records else None))
            providers = {record.blob.digest: (provider,) for record in records}
            states = await self.refs.get_or_create(records, providers, lease_id=L)
            self.results.append(states[-1].record.id)

    async def opens(self, who: str, ref_id: RefId) -> bool:
        try:
            await self.cache.get(ref_id, handlers=(), authorizer=FakeAuthorizer(who), lease_id=L)
        except NeedsRemoteProvidersError:
            return False
        return True

    def could_make(self, who: str, layer: RefState, before: int) -> bool:
        """Tell whether *who* may read all that a layer was made of, in one of the ways in which it was made."""
        if who in self.readers.get(layer.record.blob.digest, ()):
            return True
        return any(
            ref_id == layer.record.id and all(self.could_make(who, each, number) for each in of)
            for number, (ref_id, of) in enumerate(self.made[:before])
        )

    async def take(self, step: Step) -> None:
        """Do a step, if who wants it done may use its inputs; what comes of it is open to whoever may use these."""
        names = [self.results[n % len(self.results)] for n in step.inputs]
        may = [who for who in USERS if all([await self.opens(who, name) for name in names])]
        if step.who not in may:
            return
        known = len(self.results)
        await self._do(step, names)
        for made in self.results[known:]:
            for who in may:
                assert await self.opens(who, made), f"{who}, who could make {made}, may not have it"

    async def _do(self, step: Step, names: Sequence[RefId]) -> None:
        chains = [await self.refs.chain(name) for name in names]
        lower, upper = chains[:2]
        match step.kind:
            case "merge":
                await self._stack(step.who, [state for chain in chains for state in chain], ())
            case "take off" if len(upper) > len(lower) and upper[: len(lower)] == lower:
                await self._stack(step.who, upper[len(lower) :], lower)
            case "diff" | "take off":
                await self._make(step, [], [*lower, *upper])
            case _:
                await self._make(step, lower, [state for chain in chains[1:] for state in chain])

    async def _make(self, step: Step, below: Sequence[RefState], of: Sequence[RefState]) -> None:
        layer = layer_of(b"content %d" % step.content)
        self._put(layer, FARM.source)
        await self._record(step.who, RefRecord.over(layer, below[-1].record if below else None), below, of)

    async def _record(
        self, who: str, record: RefRecord, below: Sequence[RefState], of: Sequence[RefState]
    ) -> RefRecord:
        record = replace(record, origins=await self._origins(who, of, below))
        await self.refs.get_or_create([record], {record.blob.digest: (FARM,)}, lease_id=L)
        self.made.append((record.id, (*below, *of)))
        self.results.append(record.id)
        return record

    async def _stack(self, who: str, layers: Sequence[RefState], below: Sequence[RefState]) -> None:
        top: RefRecord | None = None
        for number, layer in enumerate(layers):
            record = replace(RefRecord.over(layer.record.blob, top), origins=layer.record.origins)
            if layer.record.origins and below:
                record = replace(record, origins=await self._origins(who, [*below, layer], layers))
            await self.refs.get_or_create([record], {}, lease_id=L)
            if record.origins:
                self.made.append((record.id, (*below, *layers[: number + 1])))
            top = record
        if top is not None:
            self.results.append(top.id)

    async def _origins(self, who: str, of: Sequence[RefState], chain: Sequence[RefState]) -> tuple[str, ...]:
        beside = {state.record.blob.digest for state in chain}
        own = await origin_of(self.access, FakeAuthorizer(who), of, beside=beside)
        return merge_origins((), (own, *origins_of(of, beside=beside)))

    def _put(self, layer, source: str) -> None:
        self.memory.blobs[layer.digest] = BlobRecord(
            digest=layer.digest, key="k", size_bytes=layer.size_bytes, etag="e", fence=1, source=source
        )


@given(images=readers, todo=st.lists(steps, min_size=1, max_size=10))
def test_who_may_have_what_builds_made_could_have_made_it(images, todo):
    """By no chain of copies, merges and diffs does somebody get what is in none of the images that they may read.

    And who made something has it, or could have: whichever of several ways to the same bytes is theirs.
    """

    async def run():
        farm = Farm(images)
        await farm.pull()
        for step in todo:
            await farm.take(step)
        for ref_id in dict.fromkeys(farm.results):
            chain = await farm.refs.chain(ref_id)
            for who in USERS:
                if await farm.opens(who, ref_id):
                    assert all(farm.could_make(who, layer, len(farm.made)) for layer in chain), f"{who} has {ref_id}"

    asyncio.run(run())
