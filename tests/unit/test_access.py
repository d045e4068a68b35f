"""Access is proven by the caller, always: a cached private layer is never a way around its registry."""

import pytest

from cluster.errors import NeedsRemoteProvidersError, UnavailableError
from cluster.fetch.access import AccessControl, Wanted
from cluster.origin import Needed
from cluster.provider import FARM, ProviderHandle
from storage.memory import Memory, MemoryProofStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock

A, B, C = (layer_of(name.encode()) for name in "abc")
APP, MIRROR, EVIL = handle("app"), handle("app", "mirror.example"), handle("bait", "evil.example")
ALICE, MALLORY = FakeAuthorizer("alice"), FakeAuthorizer("mallory")
TTL_S = 100.0
#: Of what was made of nothing but what its chain shows.
NOTHING = ((),)


def made_of(*blobs, at=(APP,), came_from=APP.source):
    """Return the origin of what was made of *blobs*."""
    return tuple(
        Needed(digest=blob.digest, size_bytes=blob.size_bytes, providers=tuple(at), came_from=came_from)
        for blob in blobs
    )


class Bench:
    def __init__(self):
        self.clock = FakeClock()
        self.prober = FakeProber()
        self.access = AccessControl(MemoryProofStore(Memory(self.clock)), self.prober, proof_ttl_s=TTL_S)

    async def prove(self, who, blob, *passed, stored=(), came_from=None, origins=()):
        """Prove one blob; return the providers that may be used."""
        wanted = Wanted(blob=blob, passed=passed, stored=tuple(stored), came_from=came_from, origins=tuple(origins))
        return (await self.access.prove(who, [wanted]))[blob.digest]


@pytest.fixture
def bench():
    return Bench()


# -- what was seen -------------------------------------------------------------------------------------------


async def test_what_was_asked_once_is_not_asked_again(bench):
    """A HEAD proves a blob for the proof's lifetime, and no longer."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    await bench.prove(ALICE, A, APP)
    await bench.prove(ALICE, A, APP)
    assert len(bench.prober.asked) == 1
    bench.clock.advance(TTL_S + 1)
    await bench.prove(ALICE, A, APP)
    assert len(bench.prober.asked) == 2


async def test_one_callers_proof_is_not_anothers(bench):
    """Alice has seen it; Mallory is refused by the registry, and by us."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    await bench.access.record(ALICE, APP, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, A, APP)


async def test_a_proof_in_one_repository_is_none_in_another(bench):
    """What was seen in the mirror says nothing of a digest that only the private repository is known to hold."""
    await bench.access.record(ALICE, MIRROR, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(ALICE, A, APP)


async def test_a_proof_counts_where_the_repository_holds_that_very_digest(bench):
    """A repository that is asked about for another blob proves nothing for this one."""
    await bench.access.record(ALICE, MIRROR, [A.digest, B.digest])
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.access.prove(ALICE, [Wanted(blob=A, passed=(APP,)), Wanted(blob=B, passed=(MIRROR,))])
    assert caught.value.digests == (A.digest,)


async def test_the_error_names_every_digest(bench):
    """A caller can come back once with handlers for all of them."""
    bench.prober.add(APP, B.digest)
    wanted = [Wanted(blob=A, passed=(APP,)), Wanted(blob=B, passed=(APP,)), Wanted(blob=C)]
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.access.prove(ALICE, wanted)
    assert caught.value.digests == (A.digest, C.digest)


async def test_any_repository_that_lets_the_caller_in_will_do(bench):
    """Refused here, seen there: it is proven, and that repository is read first."""
    bench.prober.add(APP, A.digest, readers={"bob"})
    bench.prober.add(MIRROR, A.digest)
    assert await bench.prove(ALICE, A, APP, MIRROR) == (MIRROR, APP)


async def test_a_blob_of_another_size_is_another_blob(bench):
    """The registry has something under that digest: not what the descriptor means."""
    bench.prober.add(APP, A.digest)
    bench.prober.sizes[A.digest] = 2
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(ALICE, A, APP)


async def test_no_answer_is_no_refusal(bench):
    """A registry that might have said yes was silent: the call may be made again."""
    bench.prober.silent = {APP.source}
    with pytest.raises(UnavailableError):
        await bench.prove(ALICE, A, APP)


async def test_a_silent_registry_does_not_matter_where_another_says_yes(bench):
    """One yes is enough."""
    bench.prober.silent = {APP.source}
    bench.prober.add(MIRROR, A.digest)
    assert (await bench.prove(ALICE, A, APP, MIRROR))[0] == MIRROR


async def test_nothing_to_prove_asks_nobody(bench):
    """No blobs, no questions."""
    assert await bench.access.prove(ALICE, []) == {}


async def test_anonymous_callers_prove_like_others(bench):
    """A public blob is proven for who has no credentials, for that registry alone."""
    anonymous = FakeAuthorizer("anonymous")
    bench.prober.add(APP, A.digest)
    await bench.prove(anonymous, A, APP)
    await bench.prove(anonymous, A, APP)
    assert len(bench.prober.asked) == 1


# -- what was named ------------------------------------------------------------------------------------------


async def test_a_manifest_opens_what_nobody_has(bench):
    """The common path: the blob can only come from where it is named. No registry is asked."""
    await bench.access.record_named(ALICE, APP, [A.digest, B.digest])
    usable = await bench.access.prove(ALICE, [Wanted(blob=A, passed=(APP,)), Wanted(blob=B, stored=(APP,))])
    assert usable == {A.digest: (APP,), B.digest: (APP,)}
    assert bench.prober.asked == []


async def test_a_manifest_opens_what_came_from_its_repository(bench):
    """The bytes show that the repository has the blob, so that its manifests may be believed."""
    await bench.access.record_named(ALICE, APP, [A.digest])
    assert await bench.prove(ALICE, A, stored=[APP, EVIL], came_from=APP.source) == (APP,)
    assert bench.prober.asked == []


@pytest.mark.parametrize("came_from", [APP.source, "", None])
async def test_a_manifest_elsewhere_opens_nothing_that_the_farm_has_or_knows(bench, came_from):
    """Mallory's registry names a private blob that is present, or lazy and known to be elsewhere: it is asked."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    await bench.access.record_named(MALLORY, EVIL, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, A, EVIL, stored=[APP], came_from=came_from)
    assert (EVIL.source, A.digest) in bench.prober.asked


async def test_a_repository_that_has_the_blob_too_proves_it_by_one_question(bench):
    """A copy of a public image elsewhere: one HEAD a layer, none for as long as the proof holds."""
    copy = handle("copy", "mirror.example")
    bench.prober.add(copy, A.digest)
    await bench.access.record_named(ALICE, copy, [A.digest])
    for _ in range(2):
        assert (await bench.prove(ALICE, A, copy, stored=[APP], came_from=APP.source))[0] == copy
    assert bench.prober.asked == [(copy.source, A.digest)]


async def test_who_named_a_lazy_blob_first_may_use_that_repository_alone(bench):
    """The others' providers stay shut, whatever credentials could be had for them."""
    await bench.access.record_named(MALLORY, EVIL, [A.digest])
    assert await bench.prove(MALLORY, A, stored=[APP, EVIL]) == (EVIL,)
    assert bench.prober.asked == []


async def test_naming_is_for_one_caller_and_a_time(bench):
    """Bob has read no manifest; Alice's reading ages."""
    await bench.access.record_named(ALICE, APP, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(FakeAuthorizer("bob"), A, APP)
    bench.clock.advance(TTL_S + 1)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(ALICE, A, APP)


# -- what is handed out --------------------------------------------------------------------------------------


async def test_bytes_from_a_callers_own_repository_are_handed_out_unasked(bench):
    """The blob came from where this caller may read it."""
    await bench.access.admit(ALICE, A, [APP], APP.source)
    assert bench.prober.asked == []


@pytest.mark.parametrize("came_from", [APP.source, ""])
async def test_bytes_from_elsewhere_are_not_handed_out_for_a_name(bench, came_from):
    """Mallory named the blob before anybody had it, and joined Alice's flight: she gets an error, not the bytes."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    await bench.access.record_named(MALLORY, EVIL, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.admit(MALLORY, A, [EVIL], came_from)


async def test_bytes_from_elsewhere_are_handed_out_to_who_has_seen_the_blob(bench):
    """A proof is a proof wherever the bytes came from."""
    await bench.access.record(ALICE, MIRROR, [A.digest])
    await bench.access.admit(ALICE, A, [MIRROR], APP.source)
    assert bench.prober.asked == []


# -- what builds made ----------------------------------------------------------------------------------------


async def test_what_a_build_made_is_open_to_who_may_use_the_rest_of_the_chain(bench):
    """The base is proven as ever; for the layer on top nobody is asked, whoever the caller is."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    chain = [
        Wanted(blob=A, stored=(APP,), came_from=APP.source),
        Wanted(blob=B, stored=(FARM,), came_from="", origins=NOTHING),
    ]
    assert await bench.access.prove(ALICE, chain) == {A.digest: (APP,), B.digest: (FARM,)}
    assert bench.prober.asked == [(APP.source, A.digest)]
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.access.prove(MALLORY, chain)
    assert caught.value.digests == (A.digest,)


async def test_of_a_built_layers_repositories_a_caller_gets_those_that_are_proven(bench):
    """It was pushed: only who has seen it there is told that it could be mounted from there. Nobody is asked."""
    await bench.access.record(ALICE, APP, [A.digest])
    for who, known in ((ALICE, (FARM, APP)), (MALLORY, (FARM,))):
        assert await bench.prove(who, A, stored=[APP, FARM], came_from="", origins=NOTHING) == known
    assert bench.prober.asked == []


@pytest.mark.parametrize(
    "claim",
    [
        FARM,
        ProviderHandle(registry="farm", repository="built"),
        ProviderHandle(kind="farm", registry="r", repository="x"),
    ],
)
async def test_to_say_that_a_build_made_it_opens_nothing(bench, claim):
    """What is passed is a claim: else any blob that is present could be had by it. Nobody of that name is asked."""
    bench.prober.add(claim, A.digest)
    await bench.access.record(MALLORY, claim, [A.digest])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, A, claim, stored=[APP], came_from=APP.source)
    assert bench.prober.asked == [(APP.source, A.digest)]


async def test_a_built_layer_that_is_lost_is_had_from_where_it_was_pushed_or_not_at_all(bench):
    """Lazy: the farm has no bytes of it, and where nobody else has any, it is named."""
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.prove(ALICE, A, stored=[FARM], origins=NOTHING)
    assert caught.value.digests == (A.digest,)
    bench.prober.add(APP, A.digest, readers={"alice"})
    assert await bench.prove(ALICE, A, stored=[APP, FARM], origins=NOTHING) == (APP,)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, A, stored=[APP, FARM], origins=NOTHING)


@pytest.mark.parametrize("came_from", ["", APP.source])
async def test_a_built_layers_bytes_are_handed_out_unasked(bench, came_from):
    """To who has been let into its chain: wherever the copy that is present came from."""
    await bench.access.admit(ALICE, A, (FARM,), came_from)
    assert bench.prober.asked == []


# -- what builds made it of ----------------------------------------------------------------------------------


async def test_what_was_copied_out_of_a_private_image_is_open_to_who_may_read_that_image(bench):
    """Nothing of the image is in the chain: its registry decides all the same, and the error says for which blob."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    built = {"stored": [FARM], "came_from": FARM.source, "origins": [made_of(A)]}
    assert await bench.prove(ALICE, B, **built) == (FARM,)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.prove(MALLORY, B, **built)
    assert caught.value.digests == (A.digest,)
    assert set(bench.prober.asked) == {(APP.source, A.digest)}


async def test_who_read_the_manifest_of_what_it_was_made_of_is_asked_nothing(bench):
    """The common path: the caller's own build has just resolved that image, and the bytes came from there."""
    await bench.access.record_named(ALICE, APP, [A.digest, C.digest])
    assert await bench.prove(ALICE, B, stored=[FARM], came_from="", origins=[made_of(A, C)]) == (FARM,)
    assert bench.prober.asked == []


@pytest.mark.parametrize("came_from", [APP.source, ""])
async def test_what_it_was_made_of_is_not_shown_by_a_name_elsewhere(bench, came_from):
    """Mallory named the blob before anybody had it, and is a known provider: nothing is fetched that would tell."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    await bench.access.record_named(MALLORY, EVIL, [A.digest])
    origin = made_of(A, at=(APP, EVIL), came_from=came_from)
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, B, stored=[FARM], came_from="", origins=[origin])


async def test_all_that_it_was_made_of_must_be_shown(bench):
    """One of two images is public: that is not enough."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    bench.prober.add(APP, C.digest)
    built = {"stored": [FARM], "came_from": "", "origins": [made_of(A, C)]}
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, B, **built)
    assert await bench.prove(ALICE, B, **built) == (FARM,)


async def test_what_was_made_in_two_ways_is_open_by_either(bench):
    """The same bytes came of a private image and of a public one: who may read the public one has them from that."""
    bench.prober.add(APP, A.digest, readers={"alice"})
    bench.prober.add(MIRROR, C.digest)
    both = [made_of(A), made_of(C, at=(MIRROR,), came_from=MIRROR.source)]
    for who in (ALICE, MALLORY):
        assert await bench.prove(who, B, stored=[FARM], came_from="", origins=both) == (FARM,)
    bench.clock.advance(TTL_S + 1)
    bench.prober.blobs.pop((MIRROR.source, C.digest))
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.prove(MALLORY, B, stored=[FARM], came_from="", origins=both)


async def test_each_blob_that_something_was_made_of_is_asked_for_once(bench):
    """Twenty layers were copied out of one image: its registry hears one question a blob."""
    bench.prober.add(APP, A.digest, C.digest)
    copies = [
        Wanted(blob=layer_of(f"copy {n}".encode()), came_from=FARM.source, origins=(made_of(A, C),)) for n in range(20)
    ]
    usable = await bench.access.prove(ALICE, copies)
    assert all(usable[copy.blob.digest] == (FARM,) for copy in copies)
    assert sorted(bench.prober.asked) == sorted((APP.source, blob.digest) for blob in (A, C))


async def test_a_built_layer_that_was_pushed_is_open_there_too(bench):
    """Who may not read what it was made of may read where its maker put it."""
    bench.prober.add(MIRROR, B.digest)
    built = {"stored": [FARM, MIRROR], "came_from": FARM.source, "origins": [made_of(A)]}
    assert await bench.prove(MALLORY, B, **built) == (MIRROR,)


async def test_what_nobody_knows_the_origin_of_is_shut(bench):
    """An earlier release built it and kept no origin: it is made again, not given away."""
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.prove(ALICE, B, stored=[FARM], came_from=FARM.source)
    assert caught.value.digests == (B.digest,)


async def test_a_registry_that_is_silent_about_what_it_was_made_of_refuses_nobody(bench):
    """The call may be made again, and then say otherwise."""
    bench.prober.silent = {APP.source}
    with pytest.raises(UnavailableError):
        await bench.prove(ALICE, B, stored=[FARM], came_from="", origins=[made_of(A)])
