"""The ledger of a disk: what its processes reserve adds up, the dead give back, and who asks first is served first."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, suppress

import pytest

from cluster.disk_room import Part
from cluster.errors import InternalError, NodeDiskError
from storage import disk_ledger
from storage.disk_ledger import DiskLedger, ledger_directory
from tests.doubles.disks import MIB, fill, free_bytes, small_disk
from tests.doubles.stores import eventually

DISK = 64 * MIB
HEADROOM = 8 * MIB

HOLDER = """
import asyncio, sys
from pathlib import Path
from cluster.disk_room import Part
from storage.disk_ledger import DiskLedger

async def hold(disk, directory, size):
    ledger = DiskLedger(disk, make_room=lambda _: 0, wait_s=0.0, headroom_bytes=0, directory=directory)
    async with ledger.reserved("a job of another process", [Part(key="x", likely_bytes=size, least_bytes=size)], print):
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", DISK) as path:
        yield path


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(disk_ledger, "_LOOK_EVERY_S", 0.01)


@pytest.fixture
def ledger_of(disk, tmp_path):
    """Make ledgers as so many processes: locks on files of their own keep them apart in one process as well."""
    made = []

    def make(*, wait_s=30.0, make_room=lambda _wanted: 0):
        ledger = DiskLedger(
            disk, make_room=make_room, wait_s=wait_s, headroom_bytes=HEADROOM, directory=tmp_path / "ledger" / "disk"
        )
        made.append(ledger)
        return ledger

    yield make
    for ledger in made:
        ledger.close()
    assert [path.name for path in (tmp_path / "ledger" / "disk").glob("*")] in ([], ["lock"])


def part(mib, *, key="part", least=None):
    return Part(key=key, likely_bytes=mib * MIB, least_bytes=(mib if least is None else least) * MIB)


async def nobody(said):
    """Waits in silence."""


class Waiting:
    """Somebody who reserves, as a task."""

    def __init__(self, ledger, *parts, what="a pull"):
        self.told = asyncio.Event()
        self.said = []
        self.held = asyncio.Event()
        self.done = asyncio.Event()
        self.task = asyncio.create_task(self._run(ledger, parts, what))

    async def _run(self, ledger, parts, what):
        async with ledger.reserved(what, parts, self._on_wait):
            self.held.set()
            await self.done.wait()

    async def _on_wait(self, said):
        self.said.append(said)
        self.told.set()

    async def end(self):
        self.done.set()
        await self.task


@asynccontextmanager
async def waiting(ledger, *parts, what="a pull"):
    """Somebody who reserves and is told to wait."""
    one = Waiting(ledger, *parts, what=what)
    try:
        await asyncio.wait_for(one.told.wait(), 10)
        yield one
    finally:
        one.task.cancel()
        await asyncio.wait([one.task])


async def fits(ledger, mib):
    """Tell whether somebody who doesn't wait is given so much."""
    try:
        with ledger.allocating("a look", part(mib, key=f"look-{mib}")):
            return True
    except NodeDiskError:
        return False


async def test_what_is_reserved_adds_up_over_processes(ledger_of):
    """56 MiB beyond the headroom: 30 of one and 26 of another, and not a byte more."""
    first, second, third = ledger_of(), ledger_of(), ledger_of()
    async with first.reserved("a", [part(30)], nobody):
        assert not await fits(second, 27)
        async with second.reserved("b", [part(26)], nobody):
            assert not await fits(third, 1)
        assert await fits(third, 26)
    assert await fits(third, 56)
    assert not await fits(third, 57)


async def test_a_killed_holder_gives_back(ledger_of, disk, tmp_path):
    """SIGKILL leaves its files in the ledger: the next to look removes them, and counts nothing of it."""
    ledger = ledger_of()
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, disk, tmp_path / "ledger" / "disk", str(50 * MIB), stdout=subprocess.PIPE
    )
    try:
        assert await holder.stdout.readline() == b"held\n"
        with pytest.raises(NodeDiskError, match=rf"for a job of another process \(process {holder.pid}\)"):
            ledger.allocating("a", part(10)).__enter__()
        async with waiting(ledger, part(40)) as waiter:
            holder.send_signal(signal.SIGSTOP)
            assert not waiter.held.is_set()
            holder.kill()
            await asyncio.wait_for(waiter.held.wait(), 10)
            await waiter.end()
    finally:
        with suppress(ProcessLookupError):
            holder.kill()
        await holder.wait()
    assert not list((tmp_path / "ledger" / "disk").glob(f"{holder.pid}-*"))


async def test_one_thing_is_reserved_once_however_many_want_it(ledger_of):
    """Two pulls of an image in one process share its parts; the last of them gives back."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(40)], nobody):
        second = Waiting(ledger, part(40), part(10, key="own"))
        await asyncio.wait_for(second.held.wait(), 10)
    assert not await fits(other, 10)
    await second.end()
    assert await fits(other, 56)


async def test_nothing_is_reserved_of_what_has_not_all_its_room(ledger_of):
    """All or none: two that wait for one another's half would wait for ever."""
    ledger, other = ledger_of(), ledger_of()
    async with (
        ledger.reserved("a", [part(20)], nobody),
        waiting(other, part(20, key="one"), part(20, key="two")) as waiter,
    ):
        assert "0 bytes of 0 parts, 1 wait" in repr(other)
        assert not waiter.held.is_set()


async def test_who_waits_is_served_when_somebody_ends_and_told_why_meanwhile(ledger_of):
    """It is told how much is needed and free, and who has reserved the rest."""
    first, second = ledger_of(), ledger_of()
    async with waiting_behind(first, second) as waiter:
        (said, *_) = waiter.said
        assert said == (
            f"no room for a pull: {30 * MIB:,} bytes are needed, and {56 * MIB:,} are free beyond the {HEADROOM:,} "
            f"kept in reserve, of which are reserved {40 * MIB:,} for the first (process {os.getpid()})"
        )
    await waiter.end()


@asynccontextmanager
async def waiting_behind(first, second):
    """Somebody with 40 MiB for the body, and one who waits for 30 behind him and is served in the end."""
    async with first.reserved("the first", [part(40)], nobody):
        waiter = Waiting(second, part(30))
        await asyncio.wait_for(waiter.told.wait(), 10)
        yield waiter
        assert not waiter.held.is_set()
    await asyncio.wait_for(waiter.held.wait(), 10)


async def test_a_big_one_is_not_starved_by_small_ones(ledger_of):
    """Small ones that come later would fit; they wait until the big one, which came first, is served."""
    holder, big, small = ledger_of(), ledger_of(), ledger_of()
    async with holder.reserved("the holder", [part(20)], nobody):
        big_one = Waiting(big, part(50))
        await asyncio.wait_for(big_one.told.wait(), 10)
        small_one = Waiting(small, part(10))
        await asyncio.wait_for(small_one.told.wait(), 10)
        assert not small_one.held.is_set()
    await asyncio.wait_for(big_one.held.wait(), 10)
    assert not small_one.held.is_set()
    await big_one.end()
    await asyncio.wait_for(small_one.held.wait(), 10)
    await small_one.end()


async def test_who_gives_up_holds_nobody_up(ledger_of):
    """A cancelled wait leaves no place in line and no reservation."""
    holder, big, small = ledger_of(), ledger_of(), ledger_of()
    async with holder.reserved("the holder", [part(20)], nobody):
        async with waiting(big, part(50)):
            assert not await fits(small, 10)
        assert await fits(small, 36)


async def test_a_wait_ends(ledger_of):
    """After node.disk_wait_s it is an error that says what is needed, free and reserved, and what to do."""
    holder, ledger = ledger_of(), ledger_of(wait_s=0.2)
    async with holder.reserved("the holder", [part(50)], nobody):
        with pytest.raises(
            NodeDiskError, match=r"no room for a pull: .* needed, and .* for the holder .*; waited 0 s"
        ) as e:
            async with ledger.reserved("a pull", [part(10)], nobody):
                pass
    assert "lazyfarm prune --nodes" in e.value.hint
    assert e.value.retryable


async def test_who_asks_says_how_long_it_waits(ledger_of):
    """Whatever is configured: not at all, for who has waited elsewhere; then it gets what there is."""
    holder, ledger = ledger_of(), ledger_of(wait_s=3600.0)
    async with holder.reserved("the holder", [part(50)], nobody):
        with pytest.raises(NodeDiskError, match="waited 0 s"):
            async with ledger.reserved("a pull", [part(10)], nobody, wait_s=0.0):
                pass
        async with ledger.reserved("a pull", [part(1)], nobody, wait_s=0.0):
            pass


async def test_what_is_more_than_the_disk_fails_at_once(ledger_of):
    """Nothing that anybody could free would do: waiting, or emptying the cache, is in vain."""
    made_room = []
    ledger = ledger_of(make_room=lambda wanted: made_room.append(wanted) or 0)
    with pytest.raises(NodeDiskError, match="can never fit: it takes 59,768,832 bytes or more, and the whole disk has"):
        async with ledger.reserved("a pull", [part(200, least=57)], nobody):
            pass
    assert not made_room


async def test_an_estimate_gives_way_on_a_disk_of_ones_own(ledger_of):
    """What likely doesn't fit, but may, is tried where nobody is there who could give room back."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(200, least=30)], nobody):
        assert not await fits(other, 1)


async def test_who_is_first_in_line_makes_room(ledger_of, disk):
    """Room is made for what is missing, by the one whose turn it is."""
    squatter = fill(disk, leaving_bytes=HEADROOM)
    asked = []

    def make_room(wanted):
        asked.append(wanted)
        squatter.unlink()
        return 56 * MIB

    async with ledger_of(make_room=make_room).reserved("a", [part(30)], nobody):
        assert asked == [30 * MIB]


async def test_room_that_can_t_be_made_is_waited_for(ledger_of, disk):
    """A fault of whoever makes room is not the pull's: somebody else may free it."""

    def make_room(wanted):
        raise InternalError("broken")

    squatter = fill(disk, leaving_bytes=HEADROOM)
    async with waiting(ledger_of(make_room=make_room), part(30)) as waiter:
        squatter.unlink()
        await asyncio.wait_for(waiter.held.wait(), 10)
        await waiter.end()


# -- writing ------------------------------------------------------------------------------------------------


def go_on():
    """Nobody stops it."""


def write(path, spend, mib):
    """Write MiB by MiB, as it is reserved."""
    with path.open("wb") as file:
        for _ in range(mib):
            spend(MIB)
            file.write(bytes(MIB))


async def test_what_is_written_is_not_counted_twice(ledger_of, disk):
    """30 of 40 MiB are on the disk: all that is left beyond them and the rest of them is another's to reserve."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(40)], nobody):
        with ledger.spending("part", go_on) as spend:
            await asyncio.to_thread(write, disk / "a", spend, 30)
            # The ledger hears of it some MiB later: until then a byte counts twice.
            assert await fits(other, 16 - 8)
            assert not await fits(other, 17)
        # It is whole: the rest was not needed.
        assert await fits(other, 56 - 30)


async def test_what_turns_out_bigger_asks_for_more(ledger_of, disk):
    """Three times the estimate is written, and at no time more than is reserved."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(10)], nobody):
        with ledger.spending("part", go_on) as spend:
            await asyncio.to_thread(write, disk / "a", spend, 30)
            assert free_bytes(disk) >= DISK - 30 * MIB
        assert await fits(other, 26)
        assert not await fits(other, 27)


async def test_what_is_written_and_comes_to_nothing_is_not_given_back_twice(ledger_of, disk):
    """A writer fails: what it wrote is on the disk until it is removed, and the rest stays reserved for another try."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(40)], nobody):
        with suppress(InternalError), ledger.spending("part", go_on) as spend:
            write(disk / "a", spend, 20)
            raise InternalError("damaged")
        (disk / "a").unlink()
        assert await fits(other, 36)
        assert not await fits(other, 37)
    assert await fits(other, 56)


async def test_growing_waits_for_room_and_can_be_stopped(ledger_of, disk):
    """More than the disk has just now: the writer waits, until somebody ends or it is stopped."""
    ledger, other = ledger_of(), ledger_of()
    stop = threading.Event()

    def checkpoint():
        if stop.is_set():
            raise InternalError("stopped")

    async def grow(mib):
        with ledger.spending("part", checkpoint) as spend:
            await asyncio.to_thread(write, disk / "a", spend, mib)

    async with ledger.reserved("a", [part(10)], nobody):
        async with other.reserved("b", [part(40)], nobody):
            growing = asyncio.create_task(grow(20))
            await eventually(lambda: "1 wait" in repr(ledger))
        await asyncio.wait_for(growing, 10)
        async with other.reserved("b", [part(36)], nobody):
            growing = asyncio.create_task(grow(20))
            await eventually(lambda: "1 wait" in repr(ledger))
            stop.set()
            with pytest.raises(InternalError, match="stopped"):
                await asyncio.wait_for(growing, 10)


async def test_growing_ends_with_an_error_too(ledger_of, disk):
    """Nobody frees anything: the writer is told, and the disk is as full as it was to be, no fuller."""
    ledger, other = ledger_of(wait_s=0.1), ledger_of()
    async with ledger.reserved("a", [part(10)], nobody), other.reserved("b", [part(40)], nobody):
        with (
            pytest.raises(NodeDiskError, match=r"no room for a: .* bytes more are needed"),
            ledger.spending("part", go_on) as spend,
        ):
            await asyncio.to_thread(write, disk / "a", spend, 30)
        assert free_bytes(disk) >= HEADROOM + 40 * MIB


async def test_of_two_that_wait_for_one_another_the_later_gives_way(ledger_of, disk):
    """Both turn out bigger than what is left: one fails, and with what it gives back the other comes to its end."""
    earlier, later = ledger_of(wait_s=3.0), ledger_of(wait_s=3.0)

    async def pull(ledger, name):
        try:
            with ledger.spending("part", go_on) as spend:
                await asyncio.to_thread(write, disk / name, spend, 40)
        finally:
            (disk / name).unlink()

    async with earlier.reserved("the earlier", [part(28)], nobody):
        async with later.reserved("the later", [part(28)], nobody):
            first = asyncio.create_task(pull(earlier, "earlier"))
            # By the time alone it would be this one that gives up, as it has begun to wait before the other does.
            await eventually(lambda: "1 wait" in repr(earlier))
            with pytest.raises(NodeDiskError):
                await asyncio.wait_for(pull(later, "later"), 30)
        await asyncio.wait_for(first, 30)


async def test_allocating_takes_of_what_is_reserved(ledger_of, disk):
    """A blob's file is allocated whole: of a pull's reservation where there is one, else of what is free just now."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(50)], nobody):
        with ledger.allocating("a blob", part(50)):
            fill(disk, leaving_bytes=DISK - 50 * MIB)
        assert await fits(other, 6)
        assert not await fits(other, 7)
        with pytest.raises(NodeDiskError, match="no room for a blob"):
            other.allocating("a blob", part(50)).__enter__()


async def test_a_ledger_that_was_cleared_away_is_begun_anew(ledger_of, tmp_path):
    """Systemd removes the memory files of users that log out: from the next look on all count again."""
    ledger, other = ledger_of(), ledger_of()
    async with ledger.reserved("a", [part(30)], nobody):
        for path in (tmp_path / "ledger" / "disk").glob("*"):
            path.unlink()
        async with ledger.reserved("b", [part(1, key="more")], nobody):
            assert await fits(other, 25)
            assert not await fits(other, 26)


async def test_another_users_directory_is_not_used(ledger_of, monkeypatch):
    """Who made it first could say that all of the disk is taken, or remove what we say."""
    ledger = ledger_of()
    assert await fits(ledger, 1)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(NodeDiskError, match="is not this user's"):
        ledger.allocating("a", part(1)).__enter__()
    monkeypatch.undo()


def test_one_disk_has_one_ledger(disk, tmp_path):
    """Directories of one disk share it, whatever farm they are of; those of two disks don't."""
    (disk / "a").mkdir()
    assert ledger_directory(disk / "a") == ledger_directory(disk)
    assert ledger_directory(tmp_path) != ledger_directory(disk)
