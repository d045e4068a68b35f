"""Push: by mount or not at all where that will do; bytes move only where the target lacks them."""

import asyncio
from dataclasses import replace

import pytest

from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobDamagedError,
    BlobNotFoundError,
    NeedsRemoteProvidersError,
    OtherDigestError,
    UnavailableError,
)
from cluster.fetch.access import AccessControl, Wanted
from cluster.fetch.push import Pusher
from cluster.fetch.runner import Unlazier
from cluster.lease import LeaseId
from cluster.provider import FARM
from cluster.ref import BlobRecord, ImageRecord
from cluster.reference import parse_reference
from storage.memory import (
    Memory,
    MemoryFlightStore,
    MemoryLeaseStore,
    MemoryProgressStore,
    MemoryProofStore,
    MemoryRefStore,
)
from storage.memory_blobs import MemoryStream
from tests.doubles.fetch import (
    FakeArriving,
    FakeProber,
    FakeTransfers,
    ManualRenewer,
    OpenDoors,
    caller_of,
    handle,
    layer_of,
)
from tests.doubles.stores import FakeClock, eventually

SOURCE, TARGET, AFAR = handle("app"), handle("copy"), handle("app", "afar.example")
A, B = layer_of(b"A"), layer_of(b"B")
#: Large enough to be forwarded while it arrives.
BIG = replace(layer_of(b"big"), size_bytes=20 * 1024**2)
FOREIGN = layer_of(b"windows", media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
MANIFEST, CONFIG = b"{manifest}", b"{config}"


class FakeTarget(FakeProber):
    """A registry that is pushed to."""

    def __init__(self):
        super().__init__()
        self.mounts = []
        self.uploads = []
        self.manifests = {}
        #: What a mount from a repository comes to; True unless said otherwise.
        self.mount_answers = {}
        self.lost_uploads = 0
        self.gate = None
        self.forwards = []
        self.forward_gate = None
        self.forward_error = None

    async def mount_blob(self, target, digest, from_repository, authorizer):
        self.mounts.append((digest, from_repository))
        answer = self.mount_answers.get(from_repository, True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def upload_blob(self, target, descriptor, open_stream, authorizer, on_progress=None):
        if self.gate is not None:
            await self.gate.wait()
        if self.lost_uploads and descriptor.digest != digest_of(CONFIG):
            self.lost_uploads -= 1
            raise BlobNotFoundError(descriptor.digest, "the content store")
        on_progress(1)
        with open_stream():
            self.uploads.append(descriptor.digest)

    async def forward_blob(self, target, descriptor, open_stream, authorizer, on_progress=None, *, verified):
        with open_stream():
            on_progress(1)
        if self.forward_gate is not None:
            await self.forward_gate.wait()
        if self.forward_error is not None:
            raise self.forward_error
        await verified()
        self.forwards.append(descriptor.digest)

    async def push_manifest(self, target, reference, media_type, data, authorizer):
        self.manifests[target.source, reference] = data
        return digest_of(data)


class FakeStored:
    def stream(self, blob):
        return MemoryStream(b"")

    async def read(self, blob):
        return MANIFEST


class Bench:
    def __init__(self, doors=None):
        self.memory = Memory(FakeClock())
        self.refs, flights = MemoryRefStore(self.memory), MemoryFlightStore(self.memory)
        self.leases, progress = MemoryLeaseStore(self.memory), MemoryProgressStore(self.memory)
        self.target, self.transfers, self.arriving = FakeTarget(), FakeTransfers(), FakeArriving()
        self.transfers.holds = False
        self.access = AccessControl(MemoryProofStore(self.memory), FakeProber(), proof_ttl_s=100.0)
        self.spawned = set()
        tokens = iter(range(1000))
        unlazier = Unlazier(
            worker="w",
            refs=self.refs,
            flights=flights,
            renewer=ManualRenewer(flights),
            progress=progress,
            transfers=self.transfers,
            access=doors or OpenDoors(),
            new_token=lambda: f"t{next(tokens)}",
            ttl_s=6.0,
            poll_s=0.5,
            deadline_s=30.0,
            max_transfers=4,
            clock=self.memory.now_s,
        )
        self.pusher = Pusher(
            target=self.target,
            unlazier=unlazier,
            refs=self.refs,
            blobs=FakeStored(),
            arriving=self.arriving,
            progress=progress,
            access=self.access,
            spawn=lambda work: self.spawned.add(asyncio.ensure_future(work)),
        )
        for data in (MANIFEST, CONFIG):
            self.make_present(digest_of(data), len(data))

    def make_present(self, digest, size):
        self.memory.blobs[digest] = BlobRecord(digest=digest, key=f"k/{digest}", size_bytes=size, etag="e", fence=1)

    async def push(self, *layers, providers=(SOURCE,), target="r.example/copy:2", own_progress=None):
        await self.leases.create(LeaseId("l1"), ttl_s=None)
        image = ImageRecord(
            name="r.example/app:1",
            manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(MANIFEST), size_bytes=len(MANIFEST)),
            config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(CONFIG), size_bytes=len(CONFIG)),
            platform="linux/amd64",
            layers=layers,
            ref=None,
        )
        known = {layer.digest: providers for layer in layers}
        caller = caller_of("l1", providers=known, progress=("s",), own_progress=own_progress)
        return await self.pusher.push(image, parse_reference(target), caller, known, plain_http=False)

    def ends(self):
        items = {}
        for item in self.memory.streams.get("s", []):
            assert not (item.item in items and items[item.item].is_end), "an item moved after its end"
            items[item.item] = item.phase
        return {name: phase.value for name, phase in items.items() if name.startswith("push:")}


@pytest.fixture
def bench():
    return Bench()


def how(result):
    return [layer.how for layer in result.layers]


async def test_a_push_to_another_images_digest_moves_nothing(bench):
    """The digest is compared before a layer is looked for, mounted or sent."""
    with pytest.raises(OtherDigestError) as caught:
        await bench.push(A, target=f"r.example/copy@{digest_of(b'other')}")
    assert (caught.value.target, caught.value.digest) == (f"r.example/copy@{digest_of(b'other')}", digest_of(MANIFEST))
    assert (bench.target.asked, bench.target.mounts, bench.target.uploads) == ([], [], [])


async def test_a_push_to_the_images_own_digest_is_one(bench):
    """Without a tag: the manifest is put under its digest."""
    await bench.push(A, target=f"r.example/copy@{digest_of(MANIFEST)}")
    assert list(bench.target.manifests) == [(TARGET.source, digest_of(MANIFEST))]


async def test_what_the_target_has_is_not_sent(bench):
    """A re-tag: HEAD for each, no mount, no byte, only the manifest."""
    bench.target.add(TARGET, A.digest, B.digest, digest_of(CONFIG))
    result = await bench.push(A, B)
    assert how(result) == ["exists", "exists"]
    assert (bench.target.mounts, bench.target.uploads, bench.transfers.fetches) == ([], [], [])
    assert bench.target.manifests == {("r.example/copy", "2"): MANIFEST}
    assert result.digest == digest_of(MANIFEST)


async def test_a_layer_shows_where_its_own_handlers_say(bench):
    """The others show in the call's stream."""
    await bench.push(A, B, own_progress={A.digest: ("own",)})
    assert {item.item for item in bench.memory.streams["own"]} == {f"push:{A.digest}"}
    assert f"push:{A.digest}" not in bench.ends()
    assert f"push:{B.digest}" in bench.ends()


async def test_what_the_registry_has_elsewhere_is_mounted(bench):
    """I7: across repositories of one registry, zero layer bytes."""
    assert how(await bench.push(A, B)) == ["mounted", "mounted"]
    assert bench.transfers.fetches == []
    assert bench.target.uploads == [digest_of(CONFIG)]


@pytest.mark.parametrize(
    "answer",
    [False, AccessDeniedError("app", "r.example", "403"), UnavailableError("r.example", "no answer")],
    ids=["refused", "denied", "no answer"],
)
async def test_a_mount_that_fails_becomes_an_upload(bench, answer):
    """BuildKit #2530, #3509: whatever is wrong with the mount, the push goes on; only now bytes are fetched."""
    bench.target.mount_answers["app"] = answer
    assert how(await bench.push(A)) == ["uploaded"]
    assert len(bench.transfers.fetches) == 1
    assert A.digest in bench.target.uploads


async def test_every_repository_is_tried_before_bytes_move(bench):
    """The first refuses, the second mounts."""
    bench.target.mount_answers["app"] = False
    assert how(await bench.push(A, providers=(SOURCE, handle("third")))) == ["mounted"]
    assert [repository for _digest, repository in bench.target.mounts] == ["app", "third"]


async def test_another_registrys_layers_are_uploaded(bench):
    """A mount is within one registry only."""
    assert how(await bench.push(A, providers=(AFAR,))) == ["uploaded"]
    assert bench.target.mounts == []


async def test_what_a_build_made_is_mounted_from_nowhere(bench):
    """The farm is no repository: its layer is uploaded."""
    bench.make_present(A.digest, A.size_bytes)
    assert how(await bench.push(A, providers=(FARM,))) == ["uploaded"]
    assert (bench.target.mounts, bench.transfers.fetches) == ([], [])


async def test_foreign_layers_stay_where_they_are(bench):
    """Non-distributable: neither asked for nor sent nor claimed."""
    assert how(await bench.push(A, FOREIGN)) == ["mounted", "foreign"]
    assert FOREIGN.digest not in bench.target.uploads
    assert FOREIGN.digest not in bench.memory.providers


async def test_a_layer_that_occurs_twice_is_pushed_once(bench):
    """Deduplicated by digest."""
    assert how(await bench.push(A, A)) == ["mounted"]


async def test_an_object_lost_behind_our_back_is_fetched_again(bench):
    """The blob is present, its object isn't: it turns lazy, comes from its provider, and is uploaded."""
    bench.make_present(A.digest, A.size_bytes)
    bench.target.lost_uploads = 1
    assert how(await bench.push(A, providers=(AFAR,))) == ["uploaded"]
    assert len(bench.transfers.fetches) == 1


async def test_an_object_lost_twice_is_an_error(bench):
    """Not an endless loop."""
    bench.target.lost_uploads = 9
    with pytest.raises(BlobDamagedError):
        await bench.push(A, providers=(AFAR,))
    assert bench.target.manifests == {}


async def test_a_layer_that_fails_stops_the_others_and_the_manifest(bench):
    """One typed error; nothing goes on behind it, and every item ends."""
    bench.target.gate = asyncio.Event()
    bench.make_present(B.digest, B.size_bytes)
    bench.transfers.plan = [BlobNotFoundError(A.digest, "afar.example/app")]
    with pytest.raises(BlobNotFoundError):
        await bench.push(B, A, providers=(AFAR,))
    bench.target.gate.set()
    await eventually(lambda: bench.ends() == {f"push:{A.digest}": "failed", f"push:{B.digest}": "cancelled"})
    assert bench.target.uploads == []
    assert bench.target.manifests == {}


async def test_a_push_makes_the_target_a_source(bench):
    """What was pushed can be fetched from there, by who pushed it, without asking again."""
    await bench.push(A)
    assert TARGET in bench.memory.providers[A.digest]
    assert TARGET in bench.memory.providers[digest_of(MANIFEST)]
    await bench.access.prove(caller_of("l1").authorizer, [Wanted(blob=A, passed=(TARGET,))])


async def test_items_never_move_after_their_end(bench):
    """Progress of an upload that is told late is not told."""
    await bench.push(A, providers=(AFAR,))
    await asyncio.gather(*bench.spawned)
    assert bench.ends()[f"push:{A.digest}"] == "done"


async def test_a_config_that_is_not_there_is_named(bench):
    """The image can't be pushed: which blob, and that it is lost."""
    del bench.memory.blobs[digest_of(CONFIG)]
    with pytest.raises(BlobDamagedError) as caught:
        await bench.push(A)
    assert caught.value.digest == digest_of(CONFIG)


# -- forwarding ------------------------------------------------------------------------------------------------


async def test_a_lazy_layer_is_forwarded_while_it_arrives(bench):
    """Once: what the target has of it is not uploaded again from the content store."""
    bench.transfers.holds = True
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    fetch = await bench.transfers.arrival()
    coming = bench.arriving.come(BIG.digest, AFAR.source)
    await eventually(lambda: coming.opened)
    assert bench.target.forwards == []
    coming.verdict.set_result(None)
    fetch.proceed.set()
    assert how(await pushing) == ["uploaded"]
    assert bench.target.forwards == [BIG.digest]
    assert bench.target.uploads == [digest_of(CONFIG)]
    assert len(bench.transfers.fetches) == 1
    await asyncio.gather(*bench.spawned)
    assert bench.ends()[f"push:{BIG.digest}"] == "done"


async def test_a_forwarding_goes_on_when_its_blob_is_present(bench):
    """The target is slower than the content store: the rest is sent from this node's disk."""
    bench.target.forward_gate = asyncio.Event()
    bench.transfers.holds = True
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    fetch = await bench.transfers.arrival()
    coming = bench.arriving.come(BIG.digest, AFAR.source)
    await eventually(lambda: coming.opened)
    coming.verdict.set_result(None)
    fetch.proceed.set()
    await eventually(lambda: BIG.digest in bench.memory.blobs)
    assert not pushing.done()
    bench.target.forward_gate.set()
    await pushing
    assert bench.target.forwards == [BIG.digest]


async def test_what_fails_while_it_is_forwarded_is_uploaded_from_the_content_store(bench):
    """Whatever it was: a registry that takes no pieces, or bytes that were wrong and came again."""
    bench.transfers.holds = True
    bench.target.forward_error = UnavailableError("r.example", "it takes no pieces")
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    fetch = await bench.transfers.arrival()
    coming = bench.arriving.come(BIG.digest, AFAR.source)
    await eventually(lambda: coming.opened)
    fetch.proceed.set()
    assert how(await pushing) == ["uploaded"]
    assert (bench.target.forwards, bench.target.uploads) == ([], [BIG.digest, digest_of(CONFIG)])
    assert len(bench.transfers.fetches) == 1


async def test_what_comes_by_way_of_another_node_is_uploaded_from_the_content_store(bench):
    """It never arrives here: nobody waits for that any longer than until it is present."""
    assert how(await bench.push(BIG, providers=(AFAR,))) == ["uploaded"]
    assert (bench.target.forwards, bench.target.uploads) == ([], [BIG.digest, digest_of(CONFIG)])


async def test_a_present_layer_and_a_small_one_are_not_forwarded(bench):
    """The one is in the content store, the other would be here before there is a piece of it."""
    bench.make_present(BIG.digest, BIG.size_bytes)
    await bench.push(BIG, A, providers=(AFAR,))
    assert not bench.arriving.asked.is_set()


async def test_a_fetch_that_fails_fails_the_push_and_ends_the_forwarding(bench):
    """The error is the fetch's, which names the provider; nothing goes on behind it."""
    bench.transfers.holds = True
    bench.transfers.plan = [BlobNotFoundError(BIG.digest, "afar.example/app")]
    bench.target.forward_gate = asyncio.Event()
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    fetch = await bench.transfers.arrival()
    coming = bench.arriving.come(BIG.digest, AFAR.source)
    await eventually(lambda: coming.opened)
    fetch.proceed.set()
    with pytest.raises(BlobNotFoundError):
        await pushing
    bench.target.forward_gate.set()
    assert (bench.target.forwards, bench.target.manifests) == ([], {})


async def test_a_cancelled_push_ends_its_forwarding(bench):
    """Nothing is sent on for nobody."""
    bench.transfers.holds = True
    bench.target.forward_gate = asyncio.Event()
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    await bench.transfers.arrival()
    coming = bench.arriving.come(BIG.digest, AFAR.source)
    await eventually(lambda: coming.opened)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    bench.target.forward_gate.set()
    coming.verdict.set_result(None)
    await eventually(lambda: bench.ends() == {f"push:{BIG.digest}": "cancelled"})
    assert bench.target.forwards == []


class Doors:
    """Lets callers have what came from open sources only."""

    def __init__(self, *open_sources):
        self.open_sources = open_sources
        self.asked = []

    async def admit(self, authorizer, blob, providers, came_from):
        self.asked.append(came_from)
        if came_from not in self.open_sources:
            raise NeedsRemoteProvidersError((blob.digest,))


@pytest.mark.parametrize("origins", [("private.example/app",), ("afar.example/app", "private.example/app"), ("",)])
async def test_not_a_byte_is_handed_on_that_may_be_from_where_the_caller_may_not_read(origins):
    """Another's flight brings it: who only named the blob gets it when it is whole and known to be from his own."""
    bench = Bench(Doors(AFAR.source))
    bench.transfers.holds = True
    pushing = asyncio.ensure_future(bench.push(BIG, providers=(AFAR,)))
    fetch = await bench.transfers.arrival()
    fetch.came_from = AFAR.source
    coming = bench.arriving.come(BIG.digest, *origins)
    await asyncio.sleep(0)
    fetch.proceed.set()
    assert how(await pushing) == ["uploaded"]
    assert coming.opened == 0
    assert (bench.target.forwards, bench.target.uploads) == ([], [BIG.digest, digest_of(CONFIG)])
