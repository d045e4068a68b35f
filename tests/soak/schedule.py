"""What a soak does, from a seed alone: the same rounds for the same seed, for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tests.faults.matrix import Fault, Part

MIB = 1024 * 1024
NODES = ("n0", "n1", "n2")
#: What may be done to whom: the head's end is the farm's, and a paused part takes half a minute.
_HARMS: dict[Part, tuple[Fault, ...]] = {
    Part.SCHEDULER: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW),
    Part.SHARD: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW),
    Part.FETCH_WORKER: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW),
    Part.OP_WORKER: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW),
    Part.SUPERVISOR: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW),
    Part.REDIS: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW, Fault.ERRORS),
    Part.S3: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW, Fault.ERRORS),
    Part.REGISTRY: (Fault.KILLED, Fault.CUT_OFF, Fault.RESTARTED, Fault.SLOW, Fault.ERRORS),
}


class Do(StrEnum):
    """Kinds of work."""

    EXTRACT = "extract"
    BUILD = "build"
    PUSH = "push"
    PRUNE = "prune"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of a driver."""

    after_s: float
    do: Do
    #: The round's image that it is about; callers of one image share its flights.
    image: int
    node: str

    def __str__(self) -> str:
        return f"{self.after_s:4.1f} s  {self.do} image {self.image} on {self.node}"


@dataclass(frozen=True, kw_only=True)
class Harm:
    """One fault."""

    after_s: float
    part: Part
    fault: Fault
    node: str

    def __str__(self) -> str:
        return f"{self.after_s:.1f} s later: {self.part} {self.fault} ({self.node})"


@dataclass(frozen=True, kw_only=True)
class Round:
    """Work and harm side by side; when all of it has ended, the farm is checked."""

    number: int
    #: Sizes of the layers of each image.
    images: tuple[tuple[int, ...], ...]
    works: tuple[Work, ...]
    #: One after another.
    harms: tuple[Harm, ...]


def rounds(seed: int) -> Iterator[Round]:
    """Yield the rounds of a seed."""
    dice = random.Random(seed)  # noqa: S311 -- what is broken when, not secrets
    number = 0
    while True:
        images = tuple(
            tuple(dice.choice((20_000, MIB, 6 * MIB, 17 * MIB)) for _ in range(dice.randint(1, 3)))
            for _ in range(dice.randint(1, 3))
        )
        works = tuple(
            Work(
                after_s=round(dice.uniform(0, 3), 1),
                do=dice.choice((Do.EXTRACT, Do.EXTRACT, Do.BUILD, Do.PUSH, Do.PRUNE)),
                image=dice.randrange(len(images)),
                node=dice.choice(NODES),
            )
            for _ in range(dice.randint(3, 8))
        )
        harms = []
        for _ in range(dice.randint(0, 3)):
            part = dice.choice(list(_HARMS))
            fault = dice.choice(_HARMS[part])
            harms.append(Harm(after_s=round(dice.uniform(0, 3), 1), part=part, fault=fault, node=dice.choice(NODES)))
        yield Round(number=number, images=images, works=works, harms=tuple(harms))
        number += 1
