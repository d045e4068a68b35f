"""Fault points: the named places where a test may kill, stall or fail a process of the farm.

Code says ``hit(FaultPoint.COMMIT_BEFORE)`` (or ``await ahit(…)``) between two steps. In production that
does nothing and costs tens of nanoseconds. A test arms a process with a plan, as text:

    fetch.part-uploaded@3=kill; commit.before=hang:/tmp/gate; *=count:/tmp/hits

An entry is ``POINT[@N[+]]=ACTION[:ARGUMENT][!CLAIM]``. ``*`` is every point; ``@3`` the third hit in this
process, ``@3+`` the third and all later ones, nothing every hit. Entries end at ``;`` or a line's end;
lines that start with ``#`` say nothing. The actions:

=============  =========================================================================================
kill           SIGKILL to this process itself
error:NAME     raise an error; NAME is one of :data:`ERRORS`
hang:GATE      write ``GATE.arrived``, then wait until the file GATE exists
count:FILE     append the point's name to FILE
=============  =========================================================================================

``!CLAIM`` lets one process of all those that share a plan act: the one that makes the file CLAIM. Without
it, a plan that kills a flight's owner kills the next owner too.

Pure: what an action does to the world is the business of an injected :class:`FaultPerformer`.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol, Self, assert_never

from cluster.errors import (
    BlobNotFoundError,
    ConfigError,
    DeadlineExceededError,
    InternalError,
    StaleFenceError,
    UnavailableError,
)


class FaultPoint(StrEnum):
    """Every fault point of the farm, with what has and has not happened there."""

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Self:  # noqa: D102 - the enum's own business
        point = str.__new__(cls, value)
        point._value_ = value
        point.meaning = meaning
        return point

    FLIGHT_JOINED = "flight.joined", "recorded as a waiter of a flight that another process owns"
    FLIGHT_OWNED = "flight.owned", "the fence is taken, nothing is begun"
    UPLOAD_BEGUN = "upload.begun", "S3 has begun a multi-part upload that Redis does not know of"
    UPLOAD_RECORDED = "upload.recorded", "Redis knows the upload, no part is fetched"
    FETCH_PART_RECEIVED = "fetch.part-received", "a part came from the registry, S3 does not have it"
    FETCH_PART_UPLOADED = "fetch.part-uploaded", "S3 has a part that Redis does not know of"
    FETCH_PART_RECORDED = "fetch.part-recorded", "Redis knows the part"
    UPLOAD_COMPLETE_BEFORE = "upload.complete.before", "S3 has every part, and no object yet"
    UPLOAD_COMPLETE_AFTER = "upload.complete.after", "S3 has the whole object, which is not present"
    READBACK_BEFORE = "readback.before", "a resumed upload is whole, its bytes are not hashed yet"
    COMMIT_BEFORE = "commit.before", "the object's bytes hash to the digest, Redis does not know of it"
    COMMIT_AFTER = "commit.after", "the blob is present, the flight's waiters are being told"
    PIN_BEFORE = "pin.before", "the blob is present, held by the flight's lease and not by the caller's"
    EXTRACT_BEFORE = "extract.before", "the blob is present, nothing is unpacked"
    EXTRACT_APPLIED = "extract.applied", "the layer is unpacked in staging, its diff ID is not checked"
    SNAPSHOT_PUBLISH_BEFORE = "snapshot.publish.before", "the snapshot is checked, and still in staging"
    SNAPSHOT_PUBLISH_AFTER = "snapshot.publish.after", "the snapshot is published on this node"
    MOUNT_BEFORE = "mount.before", "every snapshot of the chain is published, nothing is mounted"
    PULL_RESOLVED = "pull.resolved", "manifest and config are read, nothing is recorded"
    PULL_RECORDED = "pull.recorded", "refs are recorded and leased, the image is not"
    PUSH_MOUNT_BEFORE = "push.mount.before", "the target lacks the blob, no mount is asked for"
    PUSH_UPLOAD_BEFORE = "push.upload.before", "the target could not mount the blob, nothing is sent"
    PUSH_MANIFEST_BEFORE = "push.manifest.before", "the target has every blob, and no manifest"
    COLLECT_PLANNED = "collect.planned", "what may go is known, nothing has gone"
    COLLECT_REMOVED = "collect.removed", "some refs are gone, and others that are to go are not"
    COLLECT_OBJECT_DELETED = "collect.object-deleted", "objects are deleted that are still on record as to be deleted"
    SWEEP_JUDGED = "sweep.judged", "strays are to be deleted, none of these is, nor is noted how far the sweep has come"
    VERIFY_FOUND = "verify.found", "a blob is known to be damaged, nothing of it has changed"
    VERIFY_QUARANTINED = "verify.quarantined", "a damaged object is copied to the quarantine, its blob is still present"
    LEASE_RENEW_BEFORE = "lease.renew.before", "a lease or fence is about to be renewed"
    JOB_CLAIMED = "job.claimed", "a scheduler has a job, nothing of it is begun"
    JOB_END_BEFORE = "job.end.before", "all that a job wants is done, its end is not recorded"
    OP_BEGUN = "op.begun", "an op's inputs are known, nothing is made for it"
    OP_RAN = "op.ran", "an op's command has ended, no layer is made of what it changed"
    LAYER_UPLOADED = "layer.uploaded", "S3 has an op's layer, which is not present"
    LAYER_COMMITTED = "layer.committed", "an op's layer is present, held by its flight's lease and not by the job's"
    RESULT_RECORDED = "result.recorded", "an op's ref is recorded and held, no cache key leads to it"
    RESULT_PUBLISHED = "result.published", "cache keys lead to an op's result, who waits for it was not told"


def listing() -> str:
    """Return all points with their meanings, one a line, for people."""
    width = max(map(len, FaultPoint))
    return "\n".join(f"{point:<{width}}  {point.meaning}" for point in FaultPoint)


# -- plans ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill this process, so that it can't clean up."""


@dataclass(frozen=True, slots=True)
class Raise:
    """Raise what *make* makes for the point."""

    make: Callable[[FaultPoint], BaseException]


@dataclass(frozen=True, slots=True)
class Hang:
    """Tell ``GATE.arrived``, then wait until the file *gate* exists."""

    gate: str


@dataclass(frozen=True, slots=True)
class Count:
    """Append the point's name to *file*."""

    file: str


Action = Kill | Raise | Hang | Count


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """When to do what."""

    #: None: every point.
    point: FaultPoint | None
    action: Action
    #: The hits that count, from 1, both included; *last* None: all from *first* on. Each point is counted by itself.
    first: int = 1
    last: int | None = None
    #: The file that the one process which acts makes; "" lets every process act.
    claim: str = ""

    def is_due(self, point: FaultPoint, hit_number: int) -> bool:
        """Tell whether the *hit_number*-th hit of *point* in this process is meant."""
        if self.point is not None and self.point is not point:
            return False
        return self.first <= hit_number and (self.last is None or hit_number <= self.last)


#: The errors that a plan's text can name: two that a store's client raises, and ours.
ERRORS: Mapping[str, Callable[[FaultPoint], BaseException]] = MappingProxyType(
    {
        "UnavailableError": lambda point: UnavailableError(f"fault point {point}", "injected"),
        "DeadlineExceededError": lambda point: DeadlineExceededError(f"fault point {point}", "injected"),
        "InternalError": lambda point: InternalError(f"injected at fault point {point}"),
        "BlobNotFoundError": lambda point: BlobNotFoundError("injected", f"fault point {point}"),
        "StaleFenceError": lambda point: StaleFenceError(f"fault point {point}", 0),
        "ConnectionResetError": lambda point: ConnectionResetError(errno.ECONNRESET, f"injected at {point}"),
        "OSError": lambda point: OSError(errno.ENOSPC, f"injected at {point}: no space left on device"),
    }
)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What shall go wrong in a process."""

    rules: tuple[FaultRule, ...]

    @classmethod
    def parse(cls, text: str, *, source: str = "fault plan") -> FaultPlan:
        """Read a plan's text (see the module's docstring).

        Raises:
            ConfigError: lists every entry that can't be read.
        """
        rules: list[FaultRule] = []
        faults: list[str] = []
        lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        for entry in (entry.strip() for line in lines for entry in line.split(";")):
            if not entry:
                continue
            try:
                rules.append(_parse_rule(entry))
            except ValueError as exc:
                faults.append(f"{entry}: {exc}")
        if faults:
            raise ConfigError(source, tuple(faults))
        return cls(tuple(rules))


def _parse_rule(entry: str) -> FaultRule:
    where, found, what = entry.partition("=")
    if not found:
        raise ValueError("lacks an action (POINT=ACTION)")
    name, _, count = where.strip().partition("@")
    if name != "*" and name not in set(FaultPoint):
        raise ValueError(f"no fault point is called {name!r}")
    number = count.removesuffix("+")
    if count and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"{count!r} is not a number from 1, with or without a +")
    action, _, claim = what.strip().partition("!")
    return FaultRule(
        point=None if name == "*" else FaultPoint(name),
        action=_parse_action(action),
        first=int(number) if count else 1,
        last=int(number) if count and not count.endswith("+") else None,
        claim=claim,
    )


def _parse_action(text: str) -> Action:
    match text.partition(":"):
        case ("kill", "", ""):
            return Kill()
        case ("error", ":", name) if name in ERRORS:
            return Raise(ERRORS[name])
        case ("error", ":", name):
            raise ValueError(f"no error is called {name!r}; there are {', '.join(ERRORS)}")
        case ("hang", ":", gate) if gate:
            return Hang(gate)
        case ("count", ":", file) if file:
            return Count(file)
        case _:
            raise ValueError(f"{text!r} is none of kill, error:NAME, hang:GATE, count:FILE")


# -- hitting ----------------------------------------------------------------------------------------------


class FaultPerformer(Protocol):
    """Does to the world what a plan says. Implemented by :class:`storage.faults.ProcessFaults`."""

    def kill(self) -> None:
        """Kill this process."""
        ...

    def hang(self, gate: str) -> None:
        """Write ``gate.arrived``, then block this thread until *gate* exists."""
        ...

    async def ahang(self, gate: str) -> None:
        """Do the same without blocking the event loop."""
        ...

    def count(self, file: str, point: FaultPoint) -> None:
        """Append the point's name to *file*, in one atomic write."""
        ...

    def claim(self, file: str) -> bool:
        """Make *file*; tell whether this call made it."""
        ...


@dataclass(slots=True, eq=False)
class _Armed:
    """A plan under way in this process."""

    plan: FaultPlan
    performer: FaultPerformer
    #: The plan that was armed before, which goes on.
    outer: _Armed | None
    hits: dict[FaultPoint, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, point: FaultPoint) -> list[tuple[FaultPerformer, Action]]:
        """Count one hit and return what is to be done, the counting of hits first."""
        with self.lock:
            number = self.hits[point] = self.hits.get(point, 0) + 1
        rules = [rule for rule in self.plan.rules if rule.is_due(point, number)]
        rules.sort(key=lambda rule: not isinstance(rule.action, Count))
        own = [(self.performer, rule.action) for rule in rules if not rule.claim or self.performer.claim(rule.claim)]
        return own if self.outer is None else self.outer.due(point) + own


_armed: _Armed | None = None


def hit(point: FaultPoint) -> None:
    """Pass a fault point: nothing happens, unless this process is armed. Any thread; a hang blocks it.

    On an event loop's thread, a hang stalls the whole loop, as a long garbage collection would; where
    only the task shall hang, use :func:`ahit`.
    """
    if _armed is not None:
        _hit(_armed, point)


async def ahit(point: FaultPoint) -> None:
    """Pass a fault point in a coroutine; a hang lets the event loop go on, and ends by cancellation too."""
    if _armed is not None:
        await _ahit(_armed, point)


def arm(plan: FaultPlan, performer: FaultPerformer) -> None:
    """Let *plan* happen in this process from now on, beside what is armed already."""
    global _armed  # noqa: PLW0603 - a process has one set of fault points; that is what they are about
    _armed = _Armed(plan, performer, _armed)


def disarm() -> None:
    """Take back the last :func:`arm`; does nothing where nothing is armed."""
    global _armed  # noqa: PLW0603 - as above
    if _armed is not None:
        _armed = _armed.outer


def is_armed() -> bool:
    """Tell whether any plan is armed in this process."""
    return _armed is not None


@contextmanager
def armed(plan: FaultPlan, performer: FaultPerformer) -> Iterator[None]:
    """Arm *plan* for the time of a ``with`` block; for tests within one process."""
    arm(plan, performer)
    try:
        yield
    finally:
        disarm()


def _hit(armed_now: _Armed, point: FaultPoint) -> None:
    for performer, action in armed_now.due(point):
        if isinstance(action, Hang):
            performer.hang(action.gate)
        else:
            _do(performer, action, point)


async def _ahit(armed_now: _Armed, point: FaultPoint) -> None:
    for performer, action in armed_now.due(point):
        if isinstance(action, Hang):
            await performer.ahang(action.gate)
        else:
            _do(performer, action, point)


def _do(performer: FaultPerformer, action: Kill | Raise | Count, point: FaultPoint) -> None:
    match action:
        case Kill():
            performer.kill()
        case Raise(make):
            raise make(point)
        case Count(file):
            performer.count(file, point)
        case _:
            assert_never(action)
