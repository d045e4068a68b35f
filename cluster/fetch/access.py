"""Access proofs: a cached private layer is never a way around its registry. Told in docs/decisions/0006 and 0014."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.descriptor import Descriptor
from cluster.digest import Digest
from cluster.errors import BlobNotFoundError, ClusterError, NeedsRemoteProvidersError, RegistryError
from cluster.origin import Needed, Origin, decode_origin
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
    #: Where the farm knows that it is, or was told by others.
    stored: tuple[ProviderHandle, ...] = ()
    #: ``registry/repository`` of the bytes that are here, empty where it isn't known; None: there are none.
    came_from: str | None = None
    #: What a build of this farm made it of, as its record says; any of these will do. Empty: none is known to have.
    origins: tuple[Origin, ...] = ()

    @property
    def handles(self) -> tuple[ProviderHandle, ...]:
        """Return all that can be asked, once each: what the caller passed is tried before what is stored."""
        return tuple(dict.fromkeys(h for h in (*self.passed, *self.stored) if not h.is_farm))

    @property
    def ways_in(self) -> tuple[Origin, ...]:
        """Return the origins by which it may be opened: a build of this farm made it, and its bytes are here.

        Only its record says so: by passing :data:`cluster.provider.FARM`, a caller would open whatever is present.
        """
        return () if self.came_from is None else self.origins


def origins_of(texts: Iterable[str], passed: Mapping[Digest, tuple[ProviderHandle, ...]]) -> tuple[Origin, ...]:
    """Return a record's origins, each blob of which may be asked for where a caller *passed* that it is, too."""
    return tuple(
        tuple(
            replace(need, providers=tuple(dict.fromkeys((*passed[need.digest], *need.providers))))
            if need.digest in passed
            else need
            for need in decode_origin(text)
        )
        for text in texts
    )


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
        present and was built here is open to who may use the rest of *wanted* and is shown each blob of one of its
        origins: ``FARM`` is what they use, before what else they have proven or named. For all others each
        repository is asked with the caller's own credentials, and must say the right size.

        Raises:
            NeedsRemoteProvidersError: names every digest for which no repository lets this caller in, and for one
                that was built, what it was made of.
            UnavailableError: a registry that might have said yes did not answer.
        """
        held = await self._held(authorizer, wanted)
        usable: dict[Digest, tuple[ProviderHandle, ...]] = {}
        shut: list[Wanted] = []
        for one in wanted:
            known = self._known(authorizer, one, held[one.blob.digest])
            if any(_is_shown(authorizer, origin, held) for origin in one.ways_in):
                usable[one.blob.digest] = (FARM, *known)
            elif known:
                usable[one.blob.digest] = known
            else:
                shut.append(one)
        if not shut:
            return usable
        open_questions: dict[Digest, ClusterError] = {}
        shut = await self._ask(authorizer, shut, usable, open_questions)
        shut = await self._ask_for_origins(authorizer, shut, held, usable, open_questions)
        if shut:
            for digest in (digest for one in shut for digest in _asked_for(one)):
                error = open_questions.get(digest)
                if error is not None and error.retryable:
                    raise error
            raise NeedsRemoteProvidersError(tuple(dict.fromkeys(d for one in shut for d in _lacking(one))))
        return usable

    async def first_shown(self, authorizer: Authorizer, origins: Sequence[Origin]) -> Origin:
        """Return the first of *origins*, at least one, of which this caller is shown all by the proofs that are kept.

        The first of all where there is none such.
        """
        held = await self._held(authorizer, [], origins)
        return next((origin for origin in origins if _is_shown(authorizer, origin, held)), origins[0])

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

    async def _held(self, authorizer: Authorizer, wanted: Sequence[Wanted], origins: Sequence[Origin] = ()) -> _Held:
        """Return this caller's live proofs, of both grades, by digest: of *wanted*, and of what they were made of."""
        needs = {need for one in wanted for origin in one.ways_in for need in origin}
        needs.update(need for origin in origins for need in origin)
        handles = {handle for one in wanted for handle in one.handles}
        handles.update(handle for need in needs for handle in need.providers)
        pairs = sorted({pair for h in handles for pair in (_proven(authorizer, h), _named(authorizer, h))})
        digests = list(dict.fromkeys([*(one.blob.digest for one in wanted), *(need.digest for need in needs)]))
        if not pairs:
            return dict.fromkeys(digests, frozenset())
        return dict(zip(digests, await self._proofs.proven(pairs, digests), strict=True))

    async def _ask(
        self,
        authorizer: Authorizer,
        wanted: Sequence[Wanted],
        usable: dict[Digest, tuple[ProviderHandle, ...]],
        open_questions: dict[Digest, ClusterError],
    ) -> list[Wanted]:
        """Ask the repositories of each blob for it; return those that stay shut."""
        asked = {(one.blob.digest, one.blob.size_bytes, one.handles): one for one in wanted}
        seen = dict(zip(asked, await self._probe_all(authorizer, list(asked), open_questions), strict=True))
        shut: list[Wanted] = []
        for one in wanted:
            handle = seen[one.blob.digest, one.blob.size_bytes, one.handles]
            if handle is None:
                shut.append(one)
            else:
                usable[one.blob.digest] = (handle, *(h for h in one.handles if h != handle))
        return shut

    async def _ask_for_origins(
        self,
        authorizer: Authorizer,
        wanted: Sequence[Wanted],
        held: _Held,
        usable: dict[Digest, tuple[ProviderHandle, ...]],
        open_questions: dict[Digest, ClusterError],
    ) -> list[Wanted]:
        """Ask for what each was made of, one of its ways after the other, each blob once; return what stays shut."""
        shut = list(wanted)
        answered: dict[_Question, ProviderHandle | None] = {}
        for turn in range(max((len(one.ways_in) for one in wanted), default=0)):
            trying = [one for one in shut if turn < len(one.ways_in)]
            lacking = {
                _question(need)
                for one in trying
                for need in one.ways_in[turn]
                if not _is_shown(authorizer, (need,), held)
            }
            new = sorted(lacking - answered.keys())
            answered.update(zip(new, await self._probe_all(authorizer, new, open_questions), strict=True))
            for one in trying:
                if all(
                    _is_shown(authorizer, (need,), held) or answered[_question(need)] is not None
                    for need in one.ways_in[turn]
                ):
                    usable[one.blob.digest] = (FARM,)
                    shut.remove(one)
        return shut

    async def _probe_all(
        self, authorizer: Authorizer, questions: Sequence[_Question], open_questions: dict[Digest, ClusterError]
    ) -> list[ProviderHandle | None]:
        """Ask all, some at a time; return for each who said yes."""
        gate = asyncio.Semaphore(_PROBES_AT_ONCE)

        async def probe(question: _Question) -> ProviderHandle | None:
            async with gate:
                return await self._probe(authorizer, question, open_questions)

        return list(await asyncio.gather(*map(probe, questions)))

    async def _probe(
        self, authorizer: Authorizer, question: _Question, open_questions: dict[Digest, ClusterError]
    ) -> ProviderHandle | None:
        """Ask each repository until one says yes, and return that; note the error that left it open, if any did."""
        digest, size_bytes, handles = question
        error: ClusterError | None = None
        for handle in handles:
            try:
                size = await self._prober.blob_exists(handle, digest, authorizer)
            except (RegistryError, BlobNotFoundError):
                continue
            except ClusterError as exc:
                error = exc
                continue
            if size == size_bytes:
                await self.record(authorizer, handle, [digest])
                return handle
        if error is not None:
            open_questions[digest] = error
        return None


#: Live proofs of one caller, by digest: by which (identity, source).
_Held = Mapping[Digest, frozenset[tuple[str, str]]]
#: A blob, its size in bytes, and who is asked for it, in order.
_Question = tuple[Digest, int, tuple[ProviderHandle, ...]]


def _question(need: Needed) -> _Question:
    return need.digest, need.size_bytes, need.providers


def _is_shown(authorizer: Authorizer, origin: Origin, held: _Held) -> bool:
    """Tell whether proofs are kept that this caller may read all that something was made of.

    A name counts only where the bytes came from: nothing will be fetched now that would show whether it has them.
    """
    return all(
        any(
            _proven(authorizer, handle) in held[need.digest]
            or (handle.source == need.came_from and _named(authorizer, handle) in held[need.digest])
            for handle in need.providers
        )
        for need in origin
    )


def _asked_for(wanted: Wanted) -> Sequence[Digest]:
    return [wanted.blob.digest, *(need.digest for origin in wanted.ways_in for need in origin)]


def _lacking(wanted: Wanted) -> Sequence[Digest]:
    """Return what would open a blob: providers of it, or of what it was made of."""
    return [need.digest for need in wanted.ways_in[0]] if wanted.ways_in else [wanted.blob.digest]


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
