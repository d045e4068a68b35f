"""Room on a disk under every order of events: a machine of writers on a model of a disk, and mutants it must catch.

Writers ask, give up, write, ask for more, end and are killed; the files that they leave come and go, and others fill
the disk. Told apart:

- *full*: what is reserved never exceeds what was free beyond the headroom when it was given, so that writers who keep
  to it never meet a full disk, whatever the order, unless somebody else fills it;
- *line*: nobody is given what one who came earlier waits for;
- *end*: when all others have ended and their files are gone, whoever waits first is served.
"""

from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster import disk_room
from cluster.disk_room import Admitted, Claim, Short
from tests.doubles.machines import BrokenInvariantError, assert_caught, run_machine

DISK = 1000
HEADROOM = 100
SIZES = st.integers(1, 500)


@dataclass(eq=False)
class Writer:
    """One reservation, asked for or given."""

    ticket: int
    held: int = 0
    #: What it waits for, and what would do.
    asked: int | None = None
    least: int = 0
    #: What it has on the disk.
    written: int = 0

    def claim(self):
        return Claim(ticket=self.ticket, what="w", held_bytes=self.held, asked_bytes=self.asked)


class DiskMachine(RuleBasedStateMachine):
    admit = staticmethod(disk_room.admit)
    checked = frozenset({"full", "line", "end"})

    def __init__(self):
        super().__init__()
        self.writers: list[Writer] = []
        #: What is on the disk and nobody's of these.
        self.foreign = 0
        self.next_ticket = 1

    @property
    def free(self):
        return DISK - self.foreign - sum(writer.written for writer in self.writers)

    def admission(self, writer, others, *, free, is_last=False):
        return self.admit(
            writer.ticket,
            [other.claim() for other in others],
            asked_bytes=writer.asked,
            least_bytes=writer.least,
            held_bytes=writer.held,
            free_bytes=free,
            headroom_bytes=HEADROOM,
            is_last=is_last,
        )

    def look(self, writer, *, is_last=False):
        """Let a writer look whether it is served."""
        others = [other for other in self.writers if other is not writer]
        admission = self.admission(writer, others, free=self.free, is_last=is_last)
        if isinstance(admission, Short):
            return False
        left = self.free - HEADROOM - sum(other.held for other in self.writers)
        ahead = sum(other.asked or 0 for other in others if other.ticket < writer.ticket)
        self.check("full", admission.size_bytes <= left, "more is given than there is")
        self.check("line", admission.size_bytes <= left - ahead, "what one waits for is given to another")
        self.check("full", admission.size_bytes >= writer.least, "less is given than is needed")
        writer.held += admission.size_bytes
        writer.asked = None
        return True

    def check(self, name, is_true, story):
        if name in self.checked and not is_true:
            raise BrokenInvariantError(name, story)

    def pick(self, data, *, waiting):
        found = [writer for writer in self.writers if (writer.asked is not None) is waiting]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(asked=SIZES, least=SIZES)
    def ask(self, asked, least):
        writer = Writer(self.next_ticket, asked=asked, least=min(asked, least))
        self.next_ticket += 1
        self.writers.append(writer)
        self.look(writer)

    @rule(data=st.data(), is_last=st.booleans())
    def look_again(self, data, is_last):
        if (writer := self.pick(data, waiting=True)) and not self.look(writer, is_last=is_last) and is_last:
            self.leave(writer)

    @rule(data=st.data(), size=SIZES)
    def write(self, data, size):
        """Bytes are on the disk before the ledger hears of them."""
        if writer := self.pick(data, waiting=False):
            size = min(size, writer.held)
            self.check("full", self.foreign or size <= self.free - HEADROOM, "a writer meets a full disk")
            writer.written += size
            writer.held -= size

    @rule(data=st.data(), more=SIZES, least=SIZES)
    def grow(self, data, more, least):
        if writer := self.pick(data, waiting=False):
            writer.asked, writer.least = more, min(more, least)
            self.look(writer)

    @rule(data=st.data(), keeps=st.booleans())
    def end(self, data, keeps):
        """A writer ends, or is killed; its files are there to stay, or removed."""
        if self.writers:
            writer = data.draw(st.sampled_from(self.writers))
            self.foreign += writer.written if keeps else 0
            self.leave(writer)

    @rule(size=SIZES)
    def squat(self, size):
        """Others fill the disk, and respect nothing."""
        self.foreign += min(size, self.free)

    @rule()
    def tidy(self):
        self.foreign = 0

    def leave(self, writer):
        self.writers.remove(writer)

    @invariant()
    def served_in_the_end(self):
        """Whoever waits first is served once there is nobody else, if the disk has the least that it needs."""
        waiting = [writer for writer in self.writers if writer.asked is not None]
        if waiting:
            first = min(waiting, key=lambda writer: writer.ticket)
            others = [replace(writer, held=0) for writer in waiting if writer is not first]
            free = DISK - first.written
            is_served = isinstance(self.admission(first, others, free=free), Admitted)
            needed = first.held + first.least
            self.check("end", is_served or needed > free - HEADROOM, "the first in line starves")


def test_a_disk_is_never_over_committed_and_nobody_starves():
    """In every order of events the machine finds none of its three promises broken."""
    run_machine(DiskMachine, examples=150, steps=25)


def forgets_what_is_reserved(ticket, others, **more):
    return disk_room.admit(ticket, [replace(other, held_bytes=0) for other in others], **more)


def serves_whoever_fits(ticket, others, **more):
    return disk_room.admit(ticket, [replace(other, asked_bytes=None) for other in others], **more)


def insists_on_estimates(ticket, others, **more):
    return disk_room.admit(ticket, others, **more | {"least_bytes": more["asked_bytes"]})


def forgets_the_headroom(ticket, others, **more):
    return disk_room.admit(ticket, others, **more | {"headroom_bytes": 0})


def promises_the_estimate(ticket, others, **more):
    admission = disk_room.admit(ticket, others, **more)
    return Admitted(more["asked_bytes"]) if isinstance(admission, Admitted) else admission


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (forgets_what_is_reserved, "full"),
        (forgets_the_headroom, "full"),
        (promises_the_estimate, "full"),
        (serves_whoever_fits, "line"),
        (insists_on_estimates, "end"),
    ],
)
def test_a_broken_variant_is_caught_by_the_promise_it_breaks(broken, promise):
    """The machine isn't blind: each mutant breaks the promise that it should, checked alone."""

    class Mutant(DiskMachine):
        admit = staticmethod(broken)

    assert_caught(Mutant, promise, examples=1500, steps=25)
