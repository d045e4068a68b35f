"""Which part of a farm meets which fault in which situation, and what is promised of it.

Pure data: :mod:`tests.faults.scenes` brings a cell about, ``test_matrix`` runs them all, and ``make faults`` writes
them into ``docs/faults.md`` with what came of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a fault meets."""

    DRIVER = "driver"
    SCHEDULER = "scheduler"
    SHARD = "shard"
    FETCH_WORKER = "fetch worker"
    OP_WORKER = "op worker"
    SUPERVISOR = "supervisor"
    RAYLET = "raylet"
    HEAD = "GCS"
    REDIS = "Redis"
    S3 = "S3"
    REGISTRY = "registry"
    TOKEN_SERVER = "token server"


class Fault(StrEnum):
    """What happens to it."""

    KILLED = "killed"
    CUT_OFF = "cut off silently"
    RESTARTED = "restarted"
    PAUSED = "paused 30 s"
    SLOW = "slow"
    ERRORS = "answering errors"


class Situation(StrEnum):
    """What is under way meanwhile."""

    IDLE = "idle"
    PULLING = "pulling"
    TAKING_OVER = "taking over"
    EXTRACTING = "extracting"
    RUNNING = "running an op"
    PUSHING = "pushing"
    COLLECTING = "collecting"


#: What each fault is, to the letter.
FAULTS = {
    Fault.KILLED: "`kill -9`; an actor comes back by itself, a server stays away for 3 s, a node until `lazyfarm up`",
    Fault.CUT_OFF: "every packet to and from it is dropped for 3 s, longer than a lease; no connection is closed",
    Fault.RESTARTED: "SIGTERM, and started again at once",
    Fault.PAUSED: "SIGSTOP, and SIGCONT after 30 s",
    Fault.SLOW: "it gets a tenth of its time for 5 s: 90 ms stopped, 10 ms running",
    Fault.ERRORS: "every answer is an error for 3 s",
}

#: What each situation is, to the letter. "Here" is the node that runs the op.
SITUATIONS = {
    Situation.IDLE: "nothing; afterwards an image that nobody has seen is pulled and extracted",
    Situation.PULLING: "the worker here has fetched a part of a layer, a driver on another node waits for the same",
    Situation.TAKING_OVER: "an owner elsewhere fell silent, the worker here took its fence and fetches the rest",
    Situation.EXTRACTING: "a layer is unpacked here, and not published yet",
    Situation.RUNNING: "a command runs here",
    Situation.PUSHING: "every layer is at the target, the manifest is not",
    Situation.COLLECTING: "a driver prunes: the top of an image that nothing holds is gone, what it stood on is not",
}

_SERVED = "both callers get every byte"
_TAKEN_OVER = "another owner ends it with the parts that were uploaded; both callers get every byte"
_NODE_GONE = f"another owner ends it; who wanted it on a node that is gone may be told so, and {_SERVED} in the end"
_PUBLISHED = "one snapshot is published, with every byte"
_PUSHED = "the target has the very manifest"
_ONCE = "it ends well, once"
_WORKS = "the next pull and extract end well"
_COLLECTED = "what is pinned stays whole; pruned again, what nothing holds is gone, to the last object"
_OR_AGAIN = "each caller gets every byte, or a typed error soon and every byte when he asks again; no part comes twice"

#: Who asks a server that is away for longer than he tries is told so.
_OF_SERVER = {
    Situation.PULLING: _OR_AGAIN,
    Situation.TAKING_OVER: _OR_AGAIN,
    Situation.PUSHING: f"{_PUSHED}, at once or when it is pushed again",
}
#: What is promised of a part, whatever the fault.
_OF_PART: dict[Part, dict[Situation, str]] = {
    Part.DRIVER: {
        Situation.IDLE: _WORKS,
        Situation.PULLING: "the other driver, who waited for this one's fetch, gets every byte",
        Situation.TAKING_OVER: "the other driver, whose node takes over, gets every byte",
        Situation.EXTRACTING: "the other driver of the same extract gets every byte",
        Situation.RUNNING: "the other driver's job, which shares the vertex, ends well, and it runs once",
        Situation.PUSHING: "the other driver's push ends with the very manifest",
    },
    Part.FETCH_WORKER: {
        Situation.PULLING: _TAKEN_OVER,
        Situation.TAKING_OVER: _TAKEN_OVER,
        Situation.EXTRACTING: f"asked again, {_PUBLISHED}",
        Situation.PUSHING: f"made again, {_PUSHED}",
    },
    Part.SCHEDULER: {Situation.RUNNING: "whoever claims its job next ends it well"},
    Part.OP_WORKER: {Situation.RUNNING: "it is run again, and ends well"},
    Part.RAYLET: {
        Situation.PULLING: _NODE_GONE,
        Situation.TAKING_OVER: _NODE_GONE,
        Situation.EXTRACTING: f"once the node is back, {_PUBLISHED}",
        Situation.RUNNING: "it ends well, here or on another node",
    },
    Part.REDIS: {
        Situation.PULLING: _OR_AGAIN,
        Situation.TAKING_OVER: _OR_AGAIN,
        Situation.EXTRACTING: f"{_PUBLISHED}, at once or when it is asked for again",
        Situation.RUNNING: "it ends well; as nobody could say for a lease that it runs, it may be begun once more",
        Situation.PUSHING: f"{_PUSHED}, at once or when it is pushed again",
    },
    Part.S3: _OF_SERVER,
    Part.REGISTRY: _OF_SERVER,
    Part.TOKEN_SERVER: _OF_SERVER,
}
_ANYWAY: dict[Situation, str] = {
    Situation.IDLE: _WORKS,
    Situation.PULLING: _SERVED,
    Situation.TAKING_OVER: _SERVED,
    Situation.EXTRACTING: _PUBLISHED,
    Situation.RUNNING: _ONCE,
    Situation.PUSHING: _PUSHED,
    Situation.COLLECTING: _COLLECTED,
}
#: A dead head takes Ray's cluster along, and with it every process that was in it.
_AFTER_UP = "every caller ends in bounded time; after `lazyfarm up`"
_HEAD_GONE = {
    Situation.IDLE: f"after `lazyfarm up`, {_WORKS}",
    Situation.PULLING: f"{_AFTER_UP} who asks again gets every byte, and no uploaded part is fetched again",
    Situation.TAKING_OVER: f"{_AFTER_UP} who asks again gets every byte, and no uploaded part is fetched again",
    Situation.RUNNING: f"{_AFTER_UP} the detached job goes on, and ends well",
    Situation.COLLECTING: f"after `lazyfarm up`, {_COLLECTED}",
}

#: (part, fault, situation; None: all) → why such cells are left out. The first that applies counts.
LEFT_OUT: dict[tuple[Part | None, Fault | None, Situation | None], str] = {
    (Part.DRIVER, Fault.ERRORS, None): "nobody asks a driver anything but for credentials: see `test_sessions`",
    (Part.SCHEDULER, Fault.ERRORS, None): "an actor's errors are those of the step that fails: see the fault points",
    (Part.SHARD, Fault.ERRORS, None): "an actor's errors are those of the step that fails: see the fault points",
    (Part.FETCH_WORKER, Fault.ERRORS, None): "an actor's errors are those of the step that fails: see the fault points",
    (Part.OP_WORKER, Fault.ERRORS, None): "an actor's errors are those of the step that fails: see the fault points",
    (Part.SUPERVISOR, Fault.ERRORS, None): "nobody asks the supervisor anything but `up`",
    (Part.RAYLET, Fault.ERRORS, None): "Ray's own: it has no way to make a raylet answer errors",
    (Part.HEAD, Fault.ERRORS, None): "Ray's own: it has no way to make a GCS answer errors",
    (Part.TOKEN_SERVER, Fault.PAUSED, None): "a thread of the test's process; cut off is the same to its clients",
    (Part.TOKEN_SERVER, Fault.SLOW, None): "a thread of the test's process, which can't be slowed by itself",
    (Part.HEAD, Fault.PAUSED, None): "Ray gives a node up after 15 s without its GCS: then it is as killed",
    (Part.RAYLET, Fault.PAUSED, None): "Ray gives a node up after 15 s without its raylet: then it is as killed",
    (Part.HEAD, Fault.KILLED, Situation.EXTRACTING): "what dies is the node, as where the raylet here is killed",
    (Part.HEAD, Fault.KILLED, Situation.PUSHING): "its driver ends with the cluster, as where it is killed itself",
    (Part.HEAD, Fault.RESTARTED, Situation.EXTRACTING): "what dies is the node, as where the raylet here is killed",
    (Part.HEAD, Fault.RESTARTED, Situation.PUSHING): "its driver ends with the cluster, as where it is killed itself",
}


@dataclass(frozen=True)
class Cell:
    """One part, one fault, one situation."""

    part: Part
    fault: Fault
    situation: Situation

    def __str__(self) -> str:
        return f"{self.part}-{self.fault}-{self.situation}".replace(" ", "_")

    @property
    def promise(self) -> str:
        """Return what must come of it, beside the invariants."""
        if self.part is Part.HEAD and self.fault in (Fault.KILLED, Fault.RESTARTED):
            return _HEAD_GONE[self.situation]
        return _OF_PART.get(self.part, {}).get(self.situation, _ANYWAY[self.situation])

    @property
    def is_long(self) -> bool:
        """Tell whether ``make faults`` alone runs it."""
        return self.fault not in (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED)

    @property
    def why_left_out(self) -> str:
        """Return the reason; "" where it is run."""
        for (part, fault, situation), reason in LEFT_OUT.items():
            if part in (None, self.part) and fault in (None, self.fault) and situation in (None, self.situation):
                return reason
        return ""


def every_cell() -> Iterator[Cell]:
    """Return all of them, those that are left out too; the situations of one part and fault in a row."""
    for part, fault, situation in itertools.product(Part, Fault, Situation):
        yield Cell(part, fault, situation)


def cells() -> list[Cell]:
    """Return those that are run."""
    return [cell for cell in every_cell() if not cell.why_left_out]
