"""What every ProofStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

from cluster.digest import digest_of

A, B, C = (digest_of(name) for name in (b"a", b"b", b"c"))
SOURCE = "registry.example/team/app"
ME = ("me", SOURCE)
NONE = frozenset()


async def test_a_proof_is_for_one_identity_source_and_digest(stores):
    """Nothing is proven by another identity, in another source, or for another digest."""
    await stores.proofs.record("me", SOURCE, [A, B], ttl_s=60.0)

    assert await stores.proofs.proven([ME], [A, B, C]) == [{ME}, {ME}, NONE]
    assert await stores.proofs.proven([("you", SOURCE)], [A, B, C]) == [NONE] * 3
    assert await stores.proofs.proven([("me", "registry.example/team/other")], [A]) == [NONE]
    assert await stores.proofs.proven([], [A]) == [NONE]
    assert await stores.proofs.proven([("me", SOURCE)], []) == []


async def test_each_digest_is_told_with_the_pairs_that_prove_it(stores):
    """A digest is proven by some of the pairs, by all, or by none."""
    await stores.proofs.record("me", SOURCE, [A], ttl_s=60.0)
    await stores.proofs.record("anonymous", "docker.io/library/x", [B], ttl_s=60.0)

    await stores.proofs.record("anonymous", "docker.io/library/x", [A], ttl_s=60.0)

    other = ("anonymous", "docker.io/library/x")
    assert await stores.proofs.proven([ME, ("you", SOURCE), other], [A, B, C]) == [{ME, other}, {other}, NONE]


async def test_a_proof_expires(stores):
    """A proof holds for its time; a longer one is not shortened by a later, shorter one."""
    await stores.proofs.record("me", SOURCE, [A], ttl_s=60.0)
    await stores.proofs.record("me", SOURCE, [B], ttl_s=600.0)
    await stores.proofs.record("me", SOURCE, [B], ttl_s=60.0)

    stores.pass_time(61)
    assert await stores.proofs.proven([ME], [A, B]) == [NONE, {ME}]
    stores.pass_time(540)
    assert await stores.proofs.proven([ME], [A, B]) == [NONE, NONE]


async def test_no_two_pairs_are_spelled_alike(stores):
    """Colons in an identity or a source never make one pair look like another."""
    await stores.proofs.record("me:host", "5000/x", [A], ttl_s=60.0)

    pairs = [("me", "host:5000/x"), ("me:host:5000", "x"), ("", "me:host:5000/x")]
    assert await stores.proofs.proven(pairs, [A]) == [NONE]


async def test_many_digests_at_once(stores):
    """Thousands of digests are proven and asked for in one call."""
    digests = [digest_of(str(number).encode()) for number in range(2500)]
    await stores.proofs.record("me", SOURCE, digests[::2], ttl_s=60.0)

    assert await stores.proofs.proven([ME], digests) == [{ME}, NONE] * 1250
