"""What every ProofStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

from cluster.digest import digest_of

A, B, C = (digest_of(name) for name in (b"a", b"b", b"c"))
SOURCE = "registry.example/team/app"


async def test_a_proof_is_for_one_identity_source_and_digest(stores):
    """Nothing is proven by another identity, in another source, or for another digest."""
    await stores.proofs.record("me", SOURCE, [A, B], ttl_s=60.0)

    assert await stores.proofs.proven([("me", SOURCE)], [A, B, C]) == [True, True, False]
    assert await stores.proofs.proven([("you", SOURCE)], [A, B, C]) == [False] * 3
    assert await stores.proofs.proven([("me", "registry.example/team/other")], [A]) == [False]
    assert await stores.proofs.proven([], [A]) == [False]
    assert await stores.proofs.proven([("me", SOURCE)], []) == []


async def test_any_pair_will_do(stores):
    """A digest is proven if any of the pairs proves it."""
    await stores.proofs.record("me", SOURCE, [A], ttl_s=60.0)
    await stores.proofs.record("anonymous", "docker.io/library/x", [B], ttl_s=60.0)

    pairs = [("me", SOURCE), ("anonymous", "docker.io/library/x")]
    assert await stores.proofs.proven(pairs, [A, B, C]) == [True, True, False]


async def test_a_proof_expires(stores):
    """A proof holds for its time; a longer one is not shortened by a later, shorter one."""
    await stores.proofs.record("me", SOURCE, [A], ttl_s=60.0)
    await stores.proofs.record("me", SOURCE, [B], ttl_s=600.0)
    await stores.proofs.record("me", SOURCE, [B], ttl_s=60.0)

    stores.pass_time(61)
    assert await stores.proofs.proven([("me", SOURCE)], [A, B]) == [False, True]
    stores.pass_time(540)
    assert await stores.proofs.proven([("me", SOURCE)], [A, B]) == [False, False]


async def test_no_two_pairs_are_spelled_alike(stores):
    """Colons in an identity or a source never make one pair look like another."""
    await stores.proofs.record("me:host", "5000/x", [A], ttl_s=60.0)

    assert await stores.proofs.proven([("me", "host:5000/x"), ("me:host:5000", "x"), ("", "me:host:5000/x")], [A]) == [
        False
    ]


async def test_many_digests_at_once(stores):
    """Thousands of digests are proven and asked for in one call."""
    digests = [digest_of(str(number).encode()) for number in range(2500)]
    await stores.proofs.record("me", SOURCE, digests[::2], ttl_s=60.0)

    assert await stores.proofs.proven([("me", SOURCE)], digests) == [True, False] * 1250
