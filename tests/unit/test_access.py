"""Access is proven by the caller, always: a cached private layer is never a way around its registry."""

import pytest

from cluster.errors import NeedsRemoteProvidersError, UnavailableError
from cluster.fetch.access import AccessControl
from storage.memory import Memory, MemoryProofStore
from tests.doubles.fetch import FakeAuthorizer, FakeProber, handle, layer_of
from tests.doubles.stores import FakeClock

A, B, C = (layer_of(name.encode()).digest for name in "abc")
APP, MIRROR = handle("app"), handle("app", "mirror.example")
ALICE, MALLORY = FakeAuthorizer("alice"), FakeAuthorizer("mallory")
TTL_S = 100.0


class Bench:
    def __init__(self):
        self.clock = FakeClock()
        self.prober = FakeProber()
        self.access = AccessControl(MemoryProofStore(Memory(self.clock)), self.prober, proof_ttl_s=TTL_S)


@pytest.fixture
def bench():
    return Bench()


async def test_a_manifest_that_was_read_proves_its_layers(bench):
    """The common path: no registry is asked."""
    await bench.access.record(ALICE, APP, [A, B])
    usable = await bench.access.prove(ALICE, {A: [APP], B: [APP]})
    assert usable == {A: (APP,), B: (APP,)}
    assert bench.prober.asked == []


async def test_what_was_asked_once_is_not_asked_again(bench):
    """A HEAD proves a blob for the proof's lifetime, and no longer."""
    bench.prober.add(APP, A, readers={"alice"})
    await bench.access.prove(ALICE, {A: [APP]})
    await bench.access.prove(ALICE, {A: [APP]})
    assert len(bench.prober.asked) == 1
    bench.clock.advance(TTL_S + 1)
    await bench.access.prove(ALICE, {A: [APP]})
    assert len(bench.prober.asked) == 2


async def test_one_callers_proof_is_not_anothers(bench):
    """Alice has read it; Mallory is refused by the registry, and by us."""
    bench.prober.add(APP, A, readers={"alice"})
    await bench.access.record(ALICE, APP, [A])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.prove(MALLORY, {A: [APP]})


async def test_a_proof_in_one_repository_is_none_in_another(bench):
    """What was read in the mirror says nothing of a digest that only the private repository is known to hold."""
    await bench.access.record(ALICE, MIRROR, [A])
    with pytest.raises(NeedsRemoteProvidersError):
        await bench.access.prove(ALICE, {A: [APP]})


async def test_the_error_names_every_digest(bench):
    """A caller can come back once with handlers for all of them."""
    bench.prober.add(APP, B)
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        await bench.access.prove(ALICE, {A: [APP], B: [APP], C: []})
    assert caught.value.digests == (A, C)


async def test_any_repository_that_lets_the_caller_in_will_do(bench):
    """Refused here, read there: it is proven, and that repository is read first."""
    bench.prober.add(APP, A, readers={"bob"})
    bench.prober.add(MIRROR, A)
    assert await bench.access.prove(ALICE, {A: [APP, MIRROR]}) == {A: (MIRROR, APP)}


async def test_no_answer_is_no_refusal(bench):
    """A registry that might have said yes was silent: the call may be made again."""
    bench.prober.silent = {APP.source}
    with pytest.raises(UnavailableError):
        await bench.access.prove(ALICE, {A: [APP]})


async def test_a_silent_registry_does_not_matter_where_another_says_yes(bench):
    """One yes is enough."""
    bench.prober.silent = {APP.source}
    bench.prober.add(MIRROR, A)
    assert (await bench.access.prove(ALICE, {A: [APP, MIRROR]}))[A][0] == MIRROR


async def test_nothing_to_prove_asks_nobody(bench):
    """No candidates, no questions."""
    assert await bench.access.prove(ALICE, {}) == {}


async def test_anonymous_callers_prove_like_others(bench):
    """A public blob is proven for who has no credentials, for that registry alone."""
    anonymous = FakeAuthorizer("anonymous")
    bench.prober.add(APP, A)
    await bench.access.prove(anonymous, {A: [APP]})
    await bench.access.prove(anonymous, {A: [APP]})
    assert len(bench.prober.asked) == 1
