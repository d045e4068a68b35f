"""Access proofs: a cached private layer is never a way around its registry. Told in docs/decisions/0006 and 0010."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, ClusterError, NeedsRemoteProvidersError, RegistryError
from cluster.ports import Authorizer, ProofStore
from cluster.provider import FARM, ProviderHandle

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


class Admission(Protocol):
    """Lets a caller have bytes, or not."""

    async def admit(
        self, authorizer: Authorizer, blob: Descriptor, providers: Sequence[ProviderHandle], came_from: str
    ) -> None:
        """Return if the caller may have *blob*, whose bytes *came_from* a repository that may be another's.

        Args:
            authorizer: Who the caller is.
            blob: Which blob.
            providers: What :meth:`AccessControl.prove` said that this caller may use for it.
            came_from: ``registry/repository`` of the bytes that are here; empty where it isn't known.

        Raises:
            NeedsRemoteProvidersError: none of the caller's repositories has it for this caller.
            UnavailableError: a registry that might have said yes did not answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A blob that a caller asks for, with what is known of it."""

    blob: Descriptor
    #: Where the caller says that it is.
    passed: tuple[ProviderHandle, ...] = ()
    #: Where the farm knows that it is, or was told by others. :data:`cluster.provider.FARM`: a build made it.
    stored: tuple[ProviderHandle, ...] = ()
    #: ``registry/repository`` of the bytes that are here, empty where it isn't known; None: there are none.
    came_from: str | None = None

    @property
    def handles(self) -> tuple[ProviderHandle, ...]:
        """Return all that can be asked, once each: what the caller passed is tried before what is stored."""
        return tuple(dict.fromkeys(h for h in (*self.passed, *self.stored) if not h.is_farm))

    @property
    def is_built(self) -> bool:
        """Tell whether a build of this farm made it, and its bytes are here.

        Only what is stored says so: by passing that handle, a caller would open whatever is present.
        """
        return self.came_from is not None and FARM in self.stored


class AccessControl:
    """Says which providers a caller may use; asks the registry where no proof is kept.

    Two grades. A blob is *proven* for who saw it in a repository itself: by HEAD, or by a push. It is *named*
    for who read a manifest there that names it; and anybody who runs a registry can name anything. So a
    name is good for a fetch from that very repository, and for bytes that did come from there, which shows
    that it has them. For all else the repository is asked for the blob.
    """

    def __init__(self, proofs: ProofStore, prober: BlobProber, *, proof_ttl_s: float) -> None:
        self._proofs = proofs
        self._prober = prober
        self._proof_ttl_s = proof_ttl_s

    async def record(self, authorizer: Authorizer, handle: ProviderHandle, digests: Sequence[Digest]) -> None:
        """Record that this caller has just seen the blobs *digests* in *handle*'s repository."""
        await self._proofs.record(authorizer.identity(handle.registry), handle.source, digests, ttl_s=self._proof_ttl_s)

    async def record_named(self, authorizer: Authorizer, handle: ProviderHandle, digests: Sequence[Digest]) -> None:
        """Record that this caller has just read a manifest that names *digests* in *handle*'s repository."""
        identity, source = _named(authorizer, handle)
        await self._proofs.record(identity, source, digests, ttl_s=self._proof_ttl_s)

    async def prove(
        self, authorizer: Authorizer, wanted: Sequence[Wanted]
    ) -> Mapping[Digest, tuple[ProviderHandle, ...]]:
        """Return the providers this caller may use, by digest; every digest of *wanted* has one.

        All of them where the blob is proven. Where it is only named, those of the repositories that name it,
        if it is lazy and they are where it is known to be, or if its bytes came from one of them. One that is
        present and was built here is open to who may use the rest of *wanted*: ``FARM`` is what they use, before
        what else they have proven or named. For all others each repository is asked with the caller's own
        credentials, and must say the right size.

        Raises:
            NeedsRemoteProvidersError: names every digest for which no repository lets this caller in.
            UnavailableError: a registry that might have said yes did not answer.
        """
        held = await self._held(authorizer, wanted)
        usable: dict[Digest, tuple[ProviderHandle, ...]] = {}
        open_questions: list[Wanted] = []
        for one in wanted:
            known = self._known(authorizer, one, held[one.blob.digest])
            if one.is_built:
                usable[one.blob.digest] = (FARM, *known)
            elif known:
                usable[one.blob.digest] = known
            else:
                open_questions.append(one)
        gate = asyncio.Semaphore(_PROBES_AT_ONCE)

        async def probe(one: Wanted) -> ClusterError | None:
            async with gate:
                return await self._probe(authorizer, one, usable)

        errors = await asyncio.gather(*(probe(one) for one in open_questions))
        for error in errors:
            if error is not None and error.retryable:
                raise error
        refused = tuple(dict.fromkeys(w.blob.digest for w in wanted if w.blob.digest not in usable))
        if refused:
            raise NeedsRemoteProvidersError(refused)
        return usable

    async def admit(
        self, authorizer: Authorizer, blob: Descriptor, providers: Sequence[ProviderHandle], came_from: str
    ) -> None:
        """See :class:`Admission`. Asks nobody where the bytes came from one of *providers*, or from the farm."""
        if FARM in providers or any(handle.source == came_from for handle in providers):
            return
        await self.prove(authorizer, [Wanted(blob=blob, passed=tuple(providers), came_from=came_from)])

    def _known(
        self, authorizer: Authorizer, wanted: Wanted, proofs: frozenset[tuple[str, str]]
    ) -> tuple[ProviderHandle, ...]:
        """Return what the caller may use by the proofs that are kept: all, what names the blob, or nothing."""
        if any(_proven(authorizer, h) in proofs for h in wanted.handles):
            return wanted.handles
        naming = tuple(h for h in wanted.handles if _named(authorizer, h) in proofs)
        return naming if _is_vouched_for(wanted, naming) else ()

    async def _held(
        self, authorizer: Authorizer, wanted: Sequence[Wanted]
    ) -> Mapping[Digest, frozenset[tuple[str, str]]]:
        """Return the live proofs of this caller, of both grades, by digest."""
        handles = {handle for one in wanted for handle in one.handles}
        pairs = sorted({pair for h in handles for pair in (_proven(authorizer, h), _named(authorizer, h))})
        digests = list(dict.fromkeys(one.blob.digest for one in wanted))
        if not pairs:
            return dict.fromkeys(digests, frozenset())
        return dict(zip(digests, await self._proofs.proven(pairs, digests), strict=True))

    async def _probe(
        self, authorizer: Authorizer, wanted: Wanted, usable: dict[Digest, tuple[ProviderHandle, ...]]
    ) -> ClusterError | None:
        """Ask each repository until one says yes; return the error that left it open, if any did."""
        open_question: ClusterError | None = None
        handles, digest = wanted.handles, wanted.blob.digest
        for handle in handles:
            try:
                size = await self._prober.blob_exists(handle, digest, authorizer)
            except (RegistryError, BlobNotFoundError):
                continue
            except ClusterError as exc:
                open_question = exc
                continue
            if size == wanted.blob.size_bytes:
                await self.record(authorizer, handle, [digest])
                usable[digest] = (handle, *(h for h in handles if h != handle))
                return None
        return open_question


def _is_vouched_for(wanted: Wanted, naming: Sequence[ProviderHandle]) -> bool:
    """Tell whether the repositories that name a blob are as good as seen to have it, or will have to show it."""
    sources = {handle.source for handle in naming}
    if wanted.came_from is not None:
        return wanted.came_from in sources
    known = {handle.source for handle in wanted.stored if not handle.is_farm}
    # A blob that nobody has can only come from where it is named, and is hashed when it does.
    return bool(sources) and (not known or not known.isdisjoint(sources))


def _proven(authorizer: Authorizer, handle: ProviderHandle) -> tuple[str, str]:
    return authorizer.identity(handle.registry), handle.source


def _named(authorizer: Authorizer, handle: ProviderHandle) -> tuple[str, str]:
    # No registry's name has a space in it, so that neither grade can be spelled as the other.
    return authorizer.identity(handle.registry), f"named in {handle.source}"
