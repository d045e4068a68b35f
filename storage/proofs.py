"""Proofs of access in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.digest import Digest
from storage.keys import Keys
from storage.link import RedisLink

#: Digests passed to one script call at most.
_BATCH = 1000


class RedisProofStore:
    """Implements :class:`cluster.ports.ProofStore`: one sorted set of expiries per identity and source."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._prefix = keys.prefix

    async def record(self, identity: str, source: str, digests: Sequence[Digest], *, ttl_s: float) -> None:
        """Record what *identity* has read in *source*; a proof that holds longer stays."""
        for batch in _batches(digests):
            ttl_ms = int(ttl_s * 1000)
            await self._link.run(
                "proof_record", self._prefix, _whose(identity, source), ttl_ms, *batch, may_repeat=True
            )

    async def proven(
        self, pairs: Sequence[tuple[str, str]], digests: Sequence[Digest]
    ) -> list[frozenset[tuple[str, str]]]:
        """Return, for each digest, which of *pairs* have a live proof of it."""
        whose = [_whose(identity, source) for identity, source in pairs]
        proven: list[frozenset[tuple[str, str]]] = []
        for batch in _batches(digests):
            found = await self._link.run("proof_check", self._prefix, len(whose), *whose, *batch, may_repeat=True)
            proven.extend(frozenset(pairs[index] for index in indexes) for indexes in found)
        return proven


def _whose(identity: str, source: str) -> str:
    # With its length, so that no identity and source can be spelled as another identity and source.
    return f"{len(identity)}:{identity}:{source}"


def _batches(digests: Sequence[Digest]) -> list[Sequence[Digest]]:
    return [digests[start : start + _BATCH] for start in range(0, len(digests), _BATCH)]
