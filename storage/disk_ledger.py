"""What is reserved on a disk: by all processes of this machine's user that write layers to it, of whatever farm.

::

    DIRECTORY/lock            held while somebody is given bytes
    DIRECTORY/PID-NONCE.lock  one a process, locked as long as that lives
    DIRECTORY/PID-NONCE.json  its claims; replaced whole

The directory is in memory, so that a full disk doesn't keep anybody from saying so, and nothing outlives the machine's
boot. The kernel drops a lock with its process, so a killed one's claims count no more: the next to look removes them.

What is free is asked of the disk each time, after the claims were read. What is written counts as reserved until its
writer has said so, a few MiB later: sometimes a byte counts twice, never not at all.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cluster.disk_room import Admitted, Claim, OnWait, Part, Spend, admit, free_beyond
from cluster.errors import ClusterError, NodeDiskError
from storage.node_cache import HEADROOM_BYTES
from storage.services.file_lock import locked_file
from storage.to_the_end import to_the_end

#: Seconds between looks whether there is room by now.
_LOOK_EVERY_S: Final = 0.25
#: Seconds between tries to make room, and between telling whoever waits.
_MAKE_EVERY_S: Final = 5.0
#: Seconds that the ledger's lock may be held by somebody else: a look at a directory of memory takes a millisecond.
_LOCK_S: Final = 30.0
#: Bytes that are written before the ledger hears of it.
_CHUNK_BYTES: Final = 4 * 1024**2
#: Reservations of others that an error names.
_NAMED: Final = 4
_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # a directory of our own in it, checked


def ledger_directory(disk: Path) -> Path:
    """Return where the ledger of the disk that *disk* lies on is kept, for processes of this user."""
    device = disk.stat().st_dev
    return _MEMORY / f"lazyfarm-{os.geteuid()}" / f"disk-{os.major(device)}.{os.minor(device)}"


@dataclass(slots=True, eq=False)
class _Item:
    """A part that is reserved here."""

    what: str
    ticket: int
    #: Bytes that it was given in all.
    given_bytes: int = 0
    #: Bytes of these that are not known to be written.
    left_bytes: int = 0
    #: Bytes of those that a writer has taken, and is writing.
    taken_bytes: int = 0
    users: int = 0

    @property
    def ready_bytes(self) -> int:
        """Return what a writer may take."""
        return self.left_bytes - self.taken_bytes


@dataclass(slots=True, eq=False)
class _Ask:
    """A place in line: for parts that are not here, or for more of one that turned out bigger."""

    what: str
    parts: tuple[Part, ...] = ()
    grown: _Item | None = None
    #: What it needs, of that which isn't reserved here by now.
    likely_bytes: int = 0
    least_bytes: int = 0
    ticket: int = 0
    #: What it was given, to be let go of.
    items: tuple[_Item, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shortage:
    """There is not enough."""

    missing_bytes: int
    #: Whose turn it is.
    is_first: bool
    #: How things stand, for people.
    said: str


class _Patience:
    """How long somebody waits, and when it does what meanwhile.

    Args:
        wait_s: Seconds until it gives up.
        first_s: Seconds that it waits longer if it is first in line by then.
    """

    def __init__(self, wait_s: float, *, first_s: float = 0.0) -> None:
        self._began_s = time.monotonic()
        self._wait_s = wait_s
        self._first_s = first_s
        self._made_s = self._told_s = -_MAKE_EVERY_S

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began_s

    def is_over(self) -> bool:
        return self.waited_s >= self._wait_s

    def is_prolonged(self) -> bool:
        """Tell whether it waits longer, being first in line, and prolong it."""
        more_s, self._first_s = self._first_s, 0.0
        self._wait_s += more_s
        return more_s > 0.0

    def is_time_to_make_room(self) -> bool:
        """Tell whether to try; the first time at once, and once more at the end."""
        if not self.is_over() and self.waited_s - self._made_s < _MAKE_EVERY_S:
            return False
        self._made_s = self.waited_s
        return True

    def is_time_to_tell(self) -> bool:
        if self.waited_s - self._told_s < _MAKE_EVERY_S:
            return False
        self._told_s = self.waited_s
        return True


class DiskLedger:
    """One process's part of a disk's ledger: a :class:`cluster.disk_room.NodeDisk`. Thread-safe.

    Args:
        disk: A directory on the disk.
        make_room: Frees about as many bytes of what may go from the disk, where it can; returns how many. Blocks.
        wait_s: Seconds that who doesn't find enough room waits for it.
        headroom_bytes: Bytes of the disk that are left free.
        directory: Where the ledger is; None: :func:`ledger_directory`.

    Raises:
        NodeDiskError: the disk can't be read.
    """

    def __init__(
        self,
        disk: Path,
        *,
        make_room: Callable[[int], int],
        wait_s: float,
        headroom_bytes: int = HEADROOM_BYTES,
        directory: Path | None = None,
    ) -> None:
        self._disk = disk
        self._make_room = make_room
        self._wait_s = wait_s
        self._headroom_bytes = headroom_bytes
        with self._reporting():
            self._directory = directory or ledger_directory(disk)
        #: Open and locked; None until there is something to be kept.
        self._file: _ClaimsFile | None = None
        self._items: dict[str, _Item] = {}
        self._line: list[_Ask] = []
        #: Held for what is above. Taken after the ledger's own lock, never before.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        with self._lock:
            left = sum(item.left_bytes for item in self._items.values())
            return f"<DiskLedger {self._disk}: {left:,} bytes of {len(self._items)} parts, {len(self._line)} wait>"

    # -- the port ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reserved(
        self, what: str, parts: Sequence[Part], on_wait: OnWait, *, wait_s: float | None = None
    ) -> AsyncIterator[None]:
        """Reserve *parts*; see :class:`cluster.disk_room.NodeDisk`."""
        if not parts:
            yield
            return
        ask = _Ask(what=what, parts=tuple({part.key: part for part in parts}.values()))
        patience = _Patience(self._wait_s if wait_s is None else wait_s)
        try:
            # To its end: what a thread is given after its caller has gone would be nobody's to let go of.
            while (shortage := await to_the_end(asyncio.to_thread(self._try, ask, patience))) is not None:
                if patience.is_time_to_tell():
                    await on_wait(shortage.said)
                await asyncio.sleep(_LOOK_EVERY_S)
            yield
        finally:
            self._leave(ask)

    @contextmanager
    def spending(self, key: str, checkpoint: Callable[[], None]) -> Iterator[Spend]:
        """Write what was reserved under *key*; see :class:`cluster.disk_room.NodeDisk`."""
        with self._lock:
            # First in line where there is none: whoever reserved it has left just now.
            item = self._items.setdefault(key, _Item(key, ticket=0))
            item.users += 1
        spender = _Spender(self, item, checkpoint)
        try:
            yield spender.spend
            spender.end(is_all=True)
        finally:
            spender.end()
            self._leave(_Ask(item.what, items=(item,)))

    @contextmanager
    def allocating(self, what: str, part: Part) -> Iterator[None]:
        """Reserve *part* for a body that takes all of it; see :class:`cluster.disk_room.NodeDisk`."""
        ask = _Ask(what=what, parts=(part,))
        try:
            self._try(ask, _Patience(0.0))
            (item,) = ask.items
            self.take(item, part.least_bytes, _go_on)
            written_bytes = 0
            try:
                yield
                written_bytes = part.least_bytes
            finally:
                self.put_back(item, taken_bytes=part.least_bytes, written_bytes=written_bytes)
        finally:
            self._leave(ask)

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._items.clear()
            self._line.clear()
            file, self._file = self._file, None
        if file is not None:
            file.remove()

    # -- what writers take -------------------------------------------------------------------------------------

    def take(self, item: _Item, size_bytes: int, checkpoint: Callable[[], None]) -> int:
        """Give a writer *size_bytes* of *item* or, to be asked less often, some more; waits where it must grow.

        Raises:
            NodeDiskError: there is no room for it.
        """
        # Of two that have written much and wait for one another's room, the later gives way, the other goes on.
        patience = _Patience(self._wait_s, first_s=self._wait_s)
        ask = _Ask(item.what, grown=item, ticket=item.ticket)
        try:
            while True:
                with self._lock:
                    if item.ready_bytes >= size_bytes:
                        taken_bytes = min(item.ready_bytes, max(size_bytes, _CHUNK_BYTES))
                        item.taken_bytes += taken_bytes
                        return taken_bytes
                    ask.least_bytes = size_bytes - item.ready_bytes
                    # By quarters: it must not come to this for every few bytes, nor ask for what it won't need.
                    ask.likely_bytes = max(ask.least_bytes, item.given_bytes // 4)
                if self._try(ask, patience) is not None:
                    checkpoint()
                    time.sleep(_LOOK_EVERY_S)
        finally:
            self._leave(ask)

    def put_back(self, item: _Item, *, taken_bytes: int, written_bytes: int, is_all: bool = False) -> None:
        """Note that of *taken_bytes* so many are written; *is_all*: no more will be."""
        with self._lock:
            item.taken_bytes -= taken_bytes
            item.left_bytes -= written_bytes
            if is_all:
                item.left_bytes = item.taken_bytes
            self._keep()

    # -- the line ----------------------------------------------------------------------------------------------

    def _try(self, ask: _Ask, patience: _Patience) -> _Shortage | None:
        """Look whether there is room for *ask*, and make some if it is its turn; None: it has got what it asked for.

        Raises:
            NodeDiskError: there never will be, or it has waited for as long as it may.
        """
        is_last = patience.is_over()
        shortage = self._look(ask, is_last=is_last)
        if shortage is not None and shortage.is_first and patience.is_time_to_make_room():
            with suppress(ClusterError):  # then it is waited for, or said to lack
                self._make_room(shortage.missing_bytes)
            shortage = self._look(ask, is_last=is_last)
        if shortage is not None and is_last and not (shortage.is_first and patience.is_prolonged()):
            raise NodeDiskError(str(self._disk), f"{shortage.said}; waited {patience.waited_s:.0f} s")
        return shortage

    def _look(self, ask: _Ask, *, is_last: bool) -> _Shortage | None:
        """Take what is asked, if it is there; else keep a place in line."""
        with self._lock:
            if ask.grown is None and not self._missing(ask):
                self._give(ask, 0)
                self._keep()
                return None
        with self._reporting(), self._locked():
            theirs = self._others()
            with self._lock:
                missing = self._missing(ask)
                if ask.grown is None:
                    ask.likely_bytes = sum(part.likely_bytes for part in missing)
                    ask.least_bytes = sum(part.least_bytes for part in missing)
                others = [*theirs, *self._claims(without=ask)]
                if not ask.ticket:
                    ask.ticket = 1 + max((claim.ticket for claim in others), default=0)
                disk = os.statvfs(self._disk)
                self._refuse_what_never_fits(ask, disk)
                admission = admit(
                    ask.ticket,
                    others,
                    asked_bytes=ask.likely_bytes,
                    least_bytes=ask.least_bytes,
                    held_bytes=0 if ask.grown is None else ask.grown.left_bytes,
                    free_bytes=disk.f_bavail * disk.f_frsize,
                    headroom_bytes=self._headroom_bytes,
                    is_last=is_last,
                )
                if isinstance(admission, Admitted):
                    self._give(ask, admission.size_bytes)
                elif ask not in self._line:
                    self._line.append(ask)
                self._file = self._opened_file()
                self._file.write(self._claims())
                if isinstance(admission, Admitted):
                    return None
                said = self._said(ask, others, disk)
                return _Shortage(admission.missing_bytes, admission.is_first, said)

    def _missing(self, ask: _Ask) -> list[Part]:
        """Return the parts that nobody has reserved here."""
        return [part for part in ask.parts if part.key not in self._items]

    def _give(self, ask: _Ask, size_bytes: int) -> None:
        """Reserve so many bytes; where that is less than is likely needed, all parts have the least they need."""
        if ask in self._line:
            self._line.remove(ask)
        if ask.grown is not None:
            ask.grown.given_bytes += size_bytes
            ask.grown.left_bytes += size_bytes
            return
        spare = size_bytes - ask.least_bytes
        for part in self._missing(ask):
            more = min(spare, part.likely_bytes - part.least_bytes)
            spare -= more
            given = part.least_bytes + more
            self._items[part.key] = _Item(ask.what, ask.ticket, given_bytes=given, left_bytes=given)
        ask.items = tuple(self._items[part.key] for part in ask.parts)
        for item in ask.items:
            item.users += 1

    def _leave(self, ask: _Ask) -> None:
        """Let go of what was given, and of the place in line."""
        with self._lock:
            if ask in self._line:
                self._line.remove(ask)
            elif not ask.items:
                return
            for item in ask.items:
                item.users -= 1
            ask.items = ()
            self._items = {key: item for key, item in self._items.items() if item.users > 0}
            self._keep()

    def _claims(self, without: _Ask | None = None) -> list[Claim]:
        """Return what this process holds and waits for, but for one that asks."""
        pid = os.getpid()
        items = [item for item in self._items.values() if without is None or item is not without.grown]
        return [
            Claim(ticket=item.ticket, what=item.what, pid=pid, held_bytes=item.left_bytes)
            for item in items
            if item.left_bytes
        ] + [
            Claim(ticket=ask.ticket, what=ask.what, pid=pid, asked_bytes=ask.likely_bytes)
            for ask in self._line
            if ask is not without
        ]

    def _keep(self) -> None:
        """Write down what has become less. Where that fails, others go on counting it."""
        if self._file is not None:
            with suppress(OSError):
                self._file.write(self._claims())

    # -- what is said ------------------------------------------------------------------------------------------

    def _refuse_what_never_fits(self, ask: _Ask, disk: os.statvfs_result) -> None:
        needed = ask.least_bytes + (0 if ask.grown is None else ask.grown.given_bytes)
        whole = disk.f_blocks * disk.f_frsize - self._headroom_bytes
        if needed > whole:
            raise NodeDiskError(
                str(self._disk),
                f"{ask.what} can never fit: it takes {needed:,} bytes or more, and the whole disk has "
                f"{max(0, whole):,} beyond the {self._headroom_bytes:,} kept in reserve",
            )

    def _said(self, ask: _Ask, others: Sequence[Claim], disk: os.statvfs_result) -> str:
        free = free_beyond((), free_bytes=disk.f_bavail * disk.f_frsize, headroom_bytes=self._headroom_bytes)
        more = "" if ask.grown is None else " more"
        said = (
            f"no room for {ask.what}: {ask.likely_bytes:,} bytes{more} are needed, and {max(0, free):,} are free "
            f"beyond the {self._headroom_bytes:,} kept in reserve"
        )
        reserved: dict[str, int] = {}
        for claim in others:
            if claim.held_bytes:
                who = f"{claim.what} (process {claim.pid})"
                reserved[who] = reserved.get(who, 0) + claim.held_bytes
        if not reserved:
            return said
        named = sorted(reserved.items(), key=lambda each: -each[1])
        names = ", ".join(f"{size:,} for {who}" for who, size in named[:_NAMED])
        rest = f", and for {len(named) - _NAMED} others" if len(named) > _NAMED else ""
        return f"{said}, of which are reserved {names}{rest}"

    # -- the ledger's directory --------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        _make_private(self._directory)
        held = NodeDiskError(f"disk ledger {self._directory}", f"another process has held its lock for {_LOCK_S:.0f} s")
        with locked_file(self._directory / "lock", deadline_s=_LOCK_S, too_late=held):
            yield

    def _others(self) -> list[Claim]:
        """Return the claims of other processes; remove those of dead ones."""
        own = None if self._file is None else self._file.path
        return [claim for path in self._directory.glob("*.lock") if path != own for claim in _claims_of(path)]

    def _opened_file(self) -> _ClaimsFile:
        """Return this process's file; a new one where others can't find it any more. The ledger is locked."""
        if self._file is not None:
            if self._file.is_there():
                return self._file
            self._file.remove()
        return _ClaimsFile(self._directory / f"{os.getpid()}-{secrets.token_hex(8)}.lock")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise NodeDiskError(f"disk ledger of {self._disk}", str(exc)) from exc


class _Spender:
    """Counts what one writer writes, and asks the ledger for some MiB at a time."""

    def __init__(self, ledger: DiskLedger, item: _Item, checkpoint: Callable[[], None]) -> None:
        self._ledger = ledger
        self._item = item
        self._checkpoint = checkpoint
        self._taken_bytes = 0
        #: Of these, what was written, the last announced still to come.
        self._spent_bytes = 0

    def spend(self, count_bytes: int) -> None:
        """Return when *count_bytes* may be written; what was announced before is written by now."""
        if self._spent_bytes + count_bytes > self._taken_bytes:
            self.end()
            self._taken_bytes = self._ledger.take(self._item, count_bytes, self._checkpoint)
        self._spent_bytes += count_bytes

    def end(self, *, is_all: bool = False) -> None:
        """Tell the ledger what was written."""
        taken, self._taken_bytes = self._taken_bytes, 0
        spent, self._spent_bytes = self._spent_bytes, 0
        self._ledger.put_back(self._item, taken_bytes=taken, written_bytes=spent, is_all=is_all)


class _ClaimsFile:
    """Where a process keeps its claims. The file with the lock stays what it is, so that the lock is on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def is_there(self) -> bool:
        """Tell whether others can find it: systemd clears the memory of users that log out."""
        return self.path.exists()

    def write(self, claims: Sequence[Claim]) -> None:
        """Replace what is kept."""
        new = self.path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(claims))
        new.replace(self.path.with_suffix(".json"))

    def remove(self) -> None:
        """Remove it, and let go of the lock."""
        _remove(self.path)
        os.close(self._fd)


def _claims_of(path: Path) -> list[Claim]:
    """Return the claims of a process by its file; remove it if the process is gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        with suppress(FileNotFoundError):
            return msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=list[Claim])
    finally:
        os.close(fd)
    return []


def _remove(path: Path) -> None:
    for suffix in (".new", ".json", ".lock"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _make_private(directory: Path) -> None:
    """Make *directory* and the one it is in; OSError where another user has made one of these before."""
    for each in (directory.parent, directory):
        with suppress(FileExistsError):
            each.mkdir(mode=0o700)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{each} is not this user's")


def _go_on() -> None:
    """Check nothing: nobody stops it."""
