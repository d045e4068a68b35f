"""Why a step of a build was not found in the cache: what differs from the nearest build that had it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cluster.digest import Digest
from cluster.errors import ClusterError, InvalidArgumentError, JobNotFoundError
from cluster.graph import Definition, ImageOp
from cluster.graph_changes import Change, changes, file_changes
from cluster.job import JobId, JobRecord, VertexEvent, VertexState
from cluster.tree import Tree
from lazyfarm.jobs import FarmJobs

#: Files of a directory that are named.
_MAX_FILES = 20
#: Digits that name a vertex by its digest.
_FEWEST_DIGITS = 4

OpenTree = Callable[[Digest], Awaitable[Tree]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differs:
    """Something that made a cache key another one."""

    change: Change
    #: Of a driver's directory: ``+ new``, ``- gone``, ``~ changed``; the first ones.
    files: tuple[str, ...] = ()
    #: How many more there are.
    more_files: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A step, and why it had to be run."""

    job: JobId
    vertex: Digest
    name: str
    #: Where it stands; only one that runs, or has run, was a miss.
    state: VertexState | None
    #: The earlier job whose step of that name is nearest; None where none is known.
    nearest: JobId | None = None
    differs: tuple[Differs, ...] = ()
    #: The job was told to run it afresh.
    is_fresh: bool = False
    #: Images below it: what they name may be another image by now.
    images: tuple[str, ...] = ()


async def explain_miss(
    jobs: FarmJobs, open_tree: OpenTree, step: str, *, job: JobRecord, against: JobRecord | None
) -> Miss:
    """Tell why a step of *job* was not found in the cache.

    Args:
        jobs: Where jobs, their graphs and what they told are known from, for a week.
        open_tree: Reads what a driver's directory held.
        step: A part of its name, or of its digest from the start.
        job: Whose.
        against: The earlier job that it is compared with; None: the nearest that had a step of this name.

    Raises:
        JobNotFoundError: the job's graph is not known any more.
        InvalidArgumentError: *step* names none, or several.
    """
    definition = await jobs.definition(job.id)
    if definition is None:
        raise JobNotFoundError(job.id)
    told = [event for event in await jobs.told(job.id) if isinstance(event, VertexEvent)]
    states = {event.vertex: event.state for event in told}
    vertex = _find(definition, step)
    found = Miss(
        job=job.id,
        vertex=vertex,
        name=definition.name(vertex),
        state=states.get(vertex),
        is_fresh=vertex in job.spec.no_cache,
        images=_images(definition, vertex),
    )
    earlier = [against] if against is not None else await jobs.newest()
    best: tuple[int, JobId, list[Change]] | None = None
    for record in earlier:  # the newest first
        if record.id == job.id or record.created_wall_s > job.created_wall_s:
            continue
        old = await jobs.definition(record.id)
        was = None if old is None else _alike(old, definition, vertex)
        if old is None or was is None:
            continue
        differing = changes(old, was, definition, vertex)
        if best is None or len(differing) < best[0]:
            best = len(differing), record.id, differing
        if not differing:
            break
    if best is None:
        return found
    _, nearest, differing = best
    differs = tuple([await _told(change, open_tree) for change in differing])
    return replace(found, nearest=nearest, differs=differs)


def _find(definition: Definition, step: str) -> Digest:
    hexadecimal = step.removeprefix("sha256:")
    found = [digest for digest in definition.order if step and step in definition.name(digest)]
    if not found and len(hexadecimal) >= _FEWEST_DIGITS:
        found = [digest for digest in definition.order if digest.startswith(f"sha256:{hexadecimal}")]
    exact = [digest for digest in found if definition.name(digest) == step]
    if len(exact or found) != 1:
        reason = "no step of the job has that in its name or digest" if not found else f"{len(found)} steps have that"
        raise InvalidArgumentError("step", step, reason)
    return (exact or found)[0]


def _alike(old: Definition, new: Definition, vertex: Digest) -> Digest | None:
    """Return the vertex of an older graph that is that one, or was; None where there is none of its name."""
    if vertex in old.vertices:
        return vertex
    name = new.name(vertex)
    named = [digest for digest in old.order if name and old.name(digest) == name]
    return named[-1] if named else None


def _images(definition: Definition, vertex: Digest) -> tuple[str, ...]:
    seen: set[Digest] = set()
    below = [vertex]
    found: dict[str, None] = {}
    while below:
        digest = below.pop()
        if digest in seen:
            continue
        seen.add(digest)
        op = definition.vertices[digest].op
        if isinstance(op, ImageOp):
            found[op.reference] = None
        below += [each for each in definition.vertices[digest].inputs if each is not None]
    return tuple(found)


async def _told(change: Change, open_tree: OpenTree) -> Differs:
    if change.trees is None:
        return Differs(change=change)
    try:
        old, new = [await open_tree(digest) for digest in change.trees]
    except ClusterError:
        return Differs(change=change)  # collected, or S3 is away: that it differs is known all the same
    files = file_changes(old, new)
    return Differs(change=change, files=tuple(files[:_MAX_FILES]), more_files=max(len(files) - _MAX_FILES, 0))
