"""Access proofs: a cached private layer is never a way around its registry."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, ClusterError, NeedsRemoteProvidersError, RegistryError
from cluster.ports import Authorizer, ProofStore
from cluster.provider import ProviderHandle

_PROBES_AT_ONCE = 8


class BlobProber(Protocol):
    """Asks a registry whether a blob is there: a HEAD, never its bytes."""

    async def blob_exists(self, handle: ProviderHandle, digest: Digest, authorizer: Authorizer) -> int | None:
        """Return the blob's size in bytes, or None where the repository has no such blob.

        Raises:
            AccessDeniedError: this caller may not ask.
            UnavailableError: no answer.
        """
        ...


class AccessControl:
    """Says which providers a caller may use; asks the registry where no proof is kept."""

    def __init__(self, proofs: ProofStore, prober: BlobProber, *, proof_ttl_s: float) -> None:
        self._proofs = proofs
        self._prober = prober
        self._proof_ttl_s = proof_ttl_s

    async def record(self, authorizer: Authorizer, handle: ProviderHandle, digests: Sequence[Digest]) -> None:
        """Record that this caller has just read a manifest that names *digests* in *handle*'s repository."""
        await self._proofs.record(authorizer.identity(handle.registry), handle.source, digests, ttl_s=self._proof_ttl_s)

    async def prove(
        self, authorizer: Authorizer, candidates: Mapping[Digest, Sequence[ProviderHandle]]
    ) -> dict[Digest, tuple[ProviderHandle, ...]]:
        """Return the providers this caller may use, by digest; every digest of *candidates* has one.

        A digest is proven if the caller has read it, or a manifest that names it, in one of the
        repositories that hold it, within the proof's lifetime; else each repository is asked with the
        caller's own credentials.

        Raises:
            NeedsRemoteProvidersError: names every digest for which no repository lets this caller in.
            UnavailableError: a registry that might have said yes did not answer.
        """
        pairs = sorted(
            {(authorizer.identity(h.registry), h.source) for handles in candidates.values() for h in handles}
        )
        digests = list(candidates)
        proven = await self._proofs.proven(pairs, digests) if pairs else [False] * len(digests)
        usable = {d: tuple(candidates[d]) for d, ok in zip(digests, proven, strict=True) if ok}
        unproven = [d for d, ok in zip(digests, proven, strict=True) if not ok]
        gate = asyncio.Semaphore(_PROBES_AT_ONCE)

        async def probe(digest: Digest) -> ClusterError | None:
            async with gate:
                return await self._probe(authorizer, digest, candidates[digest], usable)

        errors = await asyncio.gather(*(probe(d) for d in unproven))
        for error in errors:
            if error is not None and error.retryable:
                raise error
        refused = tuple(d for d in digests if d not in usable)
        if refused:
            raise NeedsRemoteProvidersError(refused)
        return usable

    async def _probe(
        self,
        authorizer: Authorizer,
        digest: Digest,
        handles: Sequence[ProviderHandle],
        usable: dict[Digest, tuple[ProviderHandle, ...]],
    ) -> ClusterError | None:
        """Ask each repository until one says yes; return the error that left it open, if any did."""
        open_question: ClusterError | None = None
        for handle in handles:
            try:
                size = await self._prober.blob_exists(handle, digest, authorizer)
            except (RegistryError, BlobNotFoundError):
                continue
            except ClusterError as exc:
                open_question = exc
                continue
            if size is not None:
                await self.record(authorizer, handle, [digest])
                usable[digest] = (handle, *(h for h in handles if h != handle))
                return None
        return open_question
