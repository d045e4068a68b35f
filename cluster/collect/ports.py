"""What collection needs of the store of records, as a Protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cluster.collect.rounds import Round
from cluster.collect.sweep import Suspect
from cluster.digest import Digest
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord, RefUsage


class Outcome(Enum):
    """What came of removing something."""

    REMOVED = "removed"
    #: A live lease holds it.
    HELD = "held"
    #: A ref is on top of it.
    STOOD_ON = "stood-on"
    #: It was gone already.
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Removal:
    """How a removal ended; unless it was removed, nothing has changed."""

    outcome: Outcome
    #: Bytes of objects that are to be deleted because of it.
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Doomed:
    """An object of the content store that no record names any more."""

    digest: Digest
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTree:
    """A directory that a driver sent."""

    digest: Digest
    last_used_wall_s: float
    #: Keys of what it stands on: the objects of its files, and of its manifest.
    objects: frozenset[str]
    #: A job that goes on has it.
    is_in_job: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Locals:
    """Drivers' directories, and the objects that they lie in."""

    trees: tuple[LocalTree, ...] = ()
    #: Lengths in bytes, by key.
    objects: Mapping[str, int] = field(default_factory=dict)


class CollectStore(Protocol):
    """Ends refs, images and blobs, each by one atomic step that looks for holders; see DESIGN §6.

    A blob that nothing needs turns absent at once: whoever asks finds a lazy ref, and fetches to a key of its own.
    Its object is deleted after a grace, for who reads it at the time. Every method may raise UnavailableError: no
    answer, the removal may or may not have happened; all are safe to repeat.
    """

    async def now_wall_s(self) -> float:
        """Return the time by the store's clock, which last uses and leases are told by."""
        ...

    async def usages(self) -> Mapping[RefId, RefUsage]:
        """Return when and how often each ref was used."""
        ...

    async def resolved(self) -> list[ImageRecord]:
        """Return every image by the digest of its manifest, those too whose name stands for another one now."""
        ...

    async def blobs(self) -> list[BlobRecord]:
        """Return every blob that is present; one that comes or goes meanwhile may be missing or there."""
        ...

    async def locals(self) -> Locals:
        """Return drivers' directories.

        Which jobs go on is read last: who submits one holds its directories until then.
        """
        ...

    async def remove_tree(self, tree: LocalTree, *, grace_s: float) -> Removal:
        """Remove a driver's directory, and the objects that no other one stands on.

        Held is one that a live lease holds, or that was used later than *tree* says.
        """
        ...

    async def remove_local_object(self, key: str, *, grace_s: float) -> Removal:
        """Remove an object of drivers' files that no directory stands on."""
        ...

    async def tidy_locals(self) -> None:
        """Forget contents of drivers' files whose objects are gone."""
        ...

    async def index(self, records: Sequence[RefRecord]) -> None:
        """Note which refs stand on which, and use which blobs, for records of releases that didn't."""
        ...

    async def remove_ref(self, ref_id: RefId, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove a ref, and its blob if nothing else needs that, unless it is held or stood on.

        Args:
            ref_id: Which.
            images: Those whose top it is, as last seen: they go with it, and their documents.
            grace_s: Seconds until objects may be deleted.
        """
        ...

    async def remove_image(self, images: Sequence[ImageRecord], *, grace_s: float) -> Removal:
        """Remove an image that has no ref, or whose ref is gone, and its documents, unless one of its names is held.

        Args:
            images: It under each of its names, as last seen: all of one manifest, and at least one.
            grace_s: Seconds until objects may be deleted.
        """
        ...

    async def condemn(self, digests: Sequence[Digest], *, grace_s: float) -> list[int | None]:
        """Turn blobs absent that no ref uses and no lease holds; return the bytes of each, None where it stays."""
        ...

    async def due(self, most: int) -> list[Doomed]:
        """Return up to *most* objects that may be deleted now.

        None of them if it isn't certain yet that a fail-over would not bring their records back.
        """
        ...

    async def deleted(self, doomed: Sequence[Doomed]) -> None:
        """Forget objects that are deleted."""
        ...

    async def strays(self, suspects: Sequence[Suspect], *, stray_s: float) -> list[Suspect]:
        """Return those that nothing has named for *stray_s* seconds, by the store's clock, since they were first seen.

        Objects among them are to be deleted from then on. What a record names, or a live flight or a recorded upload
        may yet come to name, is no stray.
        """
        ...

    async def put_off(self, doomed: Sequence[Doomed], *, by_s: float) -> None:
        """Have objects that could not be deleted come again, *by_s* seconds from now."""
        ...

    async def doomed(self) -> int:
        """Return how many objects are to be deleted, due or not."""
        ...

    async def round(self, work: str) -> Round | None:
        """Return how far the last round of *work* has come; None where there was none, or none for long."""
        ...

    async def keep_round(self, work: str, round_: Round) -> None:
        """Remember how far a round has come. Nothing may rest on it: a round may look at some things twice."""
        ...

    def turn(self, work: str) -> AbstractAsyncContextManager[bool]:
        """Take the turn for *work*, which one process at a time is enough for; tell whether it was free.

        Saves work and no more: nothing may rest on there being one.
        """
        ...
