"""Where a node's snapshots lie, and how they come and go: what both snapshotters have in common.

::

    ROOT/KIND/s/NAME/            a published snapshot; NAME is short, so that many fit one mount
                     fs/           its files: the layer's alone (overlay) or the whole tree (copying)
                     snapshot.json which chain it is, on top of which, published in which boot
                     ledger        what could not be made without root
                     opaque-root   there if the layer hides all that is below it
                     settled       there once all of it is known to be on the disk
                     size          bytes that it takes on the disk, once somebody has asked
    ROOT/KIND/staging/NONCE/     being unpacked, written to as a workspace, or being removed; locked by who does
    ROOT/KIND/mnt/NAME/          a mount, and beside it ROOT/KIND/mounted/NAME: of which chain

**Users and removers.** Any process of the node may use a snapshot, and any may remove it. Who uses one holds its
directory's lock, shared, by :meth:`Store.hold`: while it is mounted, as long as a workspace stands on it, while a
layer is unpacked onto it, and for the rename that publishes what stands on it. :meth:`Store.remove` takes the lock
alone, if it is free at once, and looks under it for what doesn't need a process: mounts, and published snapshots that
stand on it. So the chain below a published or mounted snapshot needs no lock; the kernel drops that of who is killed.
The modification time of ``snapshot.json`` is the last use.

**Crashes.** A killed process leaves staging directories whose lock is free: :meth:`Store.recover` removes them;
a rename publishes, so a snapshot is whole or not there. A crash of the *machine* may lose what was not
flushed yet, file contents as well. Flushing before the rename (``syncfs``) measured as long as the unpacking
itself, so it isn't done then: a snapshot notes the boot that it was published in and counts as long as that
boot lasts; :meth:`Store.settle`, called at leisure, flushes once for all and marks them good for ever. After a
crash the unsettled ones are dropped and unpacked anew from their blobs.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from cluster.collect.node_stock import SnapshotState
from cluster.digest import EMPTY_CHAIN, Digest, hex_of
from cluster.errors import SnapshotGoneError
from cluster.faultpoints import FaultPoint, hit
from storage.disk_usage import kept_disk_bytes
from storage.snapshots.kernel import unmount_below
from storage.snapshots.locks import is_locked, lock_in_place, locked, mark_used

#: 120 bits of the chain ID: two chains that share them can't be found, and 140 names fit a mount's option page.
_NAME_LENGTH: Final = 24
#: Files beside a snapshot's own.
_NOTE: Final = "snapshot.json"
_SIZE: Final = "size"
LEDGER: Final = "ledger"
OPAQUE_ROOT: Final = "opaque-root"

#: Finds a snapshot's name in what the mount table says of a mount: a part of an overlay, or the whole of a bind.
LAYER: Final = re.compile(rf"(?<![a-z2-7])([a-z2-7]{{{_NAME_LENGTH}}})/fs\b")

_IN_USE: Final = "a process uses it"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a snapshot beside its files."""

    version: int = 1
    chain: str
    parent: str | None
    diff_id: str
    #: The boot that it was published in.
    boot: str
    created_wall_s: float = 0.0


def short_name(chain: Digest) -> str:
    """Return the directory name of a chain's snapshot."""
    return base64.b32encode(bytes.fromhex(hex_of(chain))).decode().lower()[:_NAME_LENGTH]


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; does nothing where there is none."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        # Without root: a layer may have directories that their owner may not write to.
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(path)], check=False, timeout=600)  # noqa: S603, S607
        shutil.rmtree(path)
    except RecursionError:
        # Python 3.11's walks by recursion; a layer may be a thousand directories deep.
        subprocess.run(["rm", "-rf", "--", str(path)], check=True, timeout=600)  # noqa: S603, S607


class Store:
    """The published snapshots under one directory, shared by any number of processes.

    Args:
        root: The directory.
        shown: Returns where snapshots are mounted, by their names.
        has_parts: A snapshot is a part of those that stand on it: it is not removed before them.
    """

    def __init__(self, root: Path, *, shown: Callable[[], Mapping[str, Path]], has_parts: bool) -> None:
        self.root = root.absolute()
        self._shown = shown
        self._has_parts = has_parts
        #: What each snapshot stands on, by their names: a chain ID says that of a snapshot for ever.
        self._below: dict[str, str] = {}
        self.published = self.root / "s"
        self.staging = self.root / "staging"
        for directory in (self.published, self.staging):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whoever may enter could run a setuid program out of an image.
        self.root.chmod(0o700)
        # Inherited by all that is made within: a layer's files have what the layer says and nothing else.
        with suppress(OSError):
            os.removexattr(self.staging, "system.posix_acl_default")
        self.staging.chmod(0o700)
        self._boot = _BOOT_ID.read_text().strip()

    # -- reading --

    def path(self, chain: Digest) -> Path:
        """Return the directory of a snapshot, published or not."""
        return self.published / short_name(chain)

    def files(self, chain: Digest) -> Path:
        """Return the directory of its files."""
        return self.path(chain) / "fs"

    def info(self, chain: Digest) -> SnapshotInfo | None:
        """Return what is kept of a snapshot; None where it isn't published, or not known to be whole."""
        info = self._read(self.path(chain))
        return info if info is not None and info.chain == chain else None

    def _read(self, path: Path) -> SnapshotInfo | None:
        info = _parse(path)
        return info if info is not None and (info.boot == self._boot or (path / "settled").exists()) else None

    def require(self, chain: Digest, doing: str) -> SnapshotInfo:
        """Return what is kept of a snapshot.

        Raises:
            SnapshotGoneError: it is not published here.
        """
        info = self.info(chain)
        if info is None:
            raise SnapshotGoneError(chain, doing)
        return info

    def chain(self, chain: Digest, doing: str) -> list[Digest]:
        """Return *chain* and all that it stands on, uppermost first; raises as :meth:`require`."""
        found: list[Digest] = []
        current: str | None = chain if chain != EMPTY_CHAIN else None
        while current is not None:
            found.append(Digest(current))
            current = self.require(Digest(current), doing).parent
        return found

    def has_parent(self, chain: Digest, parent: Digest | None) -> bool:
        """Tell whether *chain* is published and stands right on *parent*."""
        info = self.info(chain)
        return info is not None and info.parent == parent

    def snapshots(self) -> list[Digest]:
        """Return the published snapshots."""
        infos = (self._read(path) for path in sorted(self.published.iterdir()))
        return [Digest(info.chain) for info in infos if info is not None]

    # -- using --

    @contextmanager
    def hold(self, chain: Digest, doing: str) -> Iterator[None]:
        """Keep a snapshot, with all that it is made of, from being removed; it counts as used now.

        Raises:
            SnapshotGoneError: it is not published here.
        """
        # A remover has it for the time of a look at the mounts and of a rename.
        lock = lock_in_place(self.path(chain), fcntl.LOCK_SH)
        try:
            if lock is None or self.info(chain) is None:
                raise SnapshotGoneError(chain, doing)
            mark_used(self._note(chain))
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def last_used_ns(self, chain: Digest) -> int | None:
        """Return when a snapshot was used last, wall-clock nanoseconds; None where it isn't published."""
        try:
            return self._note(chain).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _note(self, chain: Digest) -> Path:
        return self.path(chain) / _NOTE

    def states(self) -> list[SnapshotState]:
        """Return the published snapshots, with what each takes and whether a process uses it."""
        found: list[SnapshotState] = []
        for path in sorted(self.published.iterdir()):
            info = self._read(path)
            if info is None:
                continue
            with suppress(FileNotFoundError):  # removed just now
                found.append(
                    SnapshotState(
                        chain=Digest(info.chain),
                        parent=Digest(info.parent) if info.parent and self._has_parts else None,
                        # Its files never change.
                        size_bytes=kept_disk_bytes(path, path / _SIZE, info.boot),
                        created_wall_s=info.created_wall_s,
                        last_used_ns=(path / _NOTE).stat().st_mtime_ns,
                        is_locked=is_locked(path),
                    )
                )
        return found

    def _user_of(self, name: str) -> str:
        """Say what uses a snapshot whose lock this process has alone."""
        point = self._shown().get(name)
        if point is not None:
            return f"it is mounted at {point}"
        if self._has_parts and (above := self._standing_on(name)):
            return f"snapshot {above} stands on it"
        return ""

    def _standing_on(self, name: str) -> str | None:
        """Return the name of a published snapshot that stands on the one of *name*."""
        for path in self.published.iterdir():
            below = self._below.get(path.name)
            if below is None and (info := _parse(path)) is not None:
                below = self._below[path.name] = short_name(Digest(info.parent)) if info.parent else ""
            if below == name:
                return path.name
        return None

    # -- writing --

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Lend a new staging directory; what is left of it in the end is unmounted and removed."""
        path = self.staging / secrets.token_hex(8)
        # Shared: recover() takes this lock alone, so it never sees a directory between its making and its locking.
        with locked(self.staging, fcntl.LOCK_SH):
            path.mkdir(mode=0o700)
            own = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(own, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            try:
                _clear(path)
            finally:
                os.close(own)

    def publish(self, staged: Path, *, chain: Digest, parent: Digest | None, diff_id: Digest) -> bool:
        """Publish the snapshot in *staged*, which has its ``fs``; tell whether it was not there before.

        The rename is the one step that counts. Who comes second finds the name taken.

        Raises:
            SnapshotGoneError: what it would stand on is not published.
        """
        info = SnapshotInfo(chain=chain, parent=parent, diff_id=diff_id, boot=self._boot, created_wall_s=time.time())
        inner = staged / "snapshot"
        inner.mkdir(mode=0o700)
        (staged / "fs").rename(inner / "fs")
        for kept in (LEDGER, OPAQUE_ROOT):
            with suppress(FileNotFoundError):
                (staged / kept).rename(inner / kept)
        (inner / _NOTE).write_bytes(msgspec.json.encode(info))
        target = self.path(chain)
        hit(FaultPoint.SNAPSHOT_PUBLISH_BEFORE)
        with ExitStack() as stack:
            if parent is not None and self._has_parts:
                # t=0  a remover locks the parent, and sees nothing that stands on it
                # t=1  this would be published, and the remover takes the parent from under it
                stack.enter_context(self.hold(parent, "publishing onto"))
            while True:
                try:
                    inner.rename(target)
                except OSError as exc:
                    if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                        raise
                    if self.info(chain) is not None:
                        return False
                    # One of an earlier boot that was never settled, or damaged: in the way.
                    self._drop(target)
                else:
                    break
        hit(FaultPoint.SNAPSHOT_PUBLISH_AFTER)
        return True

    def remove(self, chain: Digest, *, last_used_ns: int | None = None) -> str:
        """Remove a snapshot that nothing uses: out of sight by a rename, then from the disk.

        Args:
            chain: Which; one that isn't there is removed already.
            last_used_ns: Its last use as far as the caller knows: it stays if that was not the last one. None: whenever
                that was.

        Returns:
            "" if it is gone, else why it stays.
        """
        path = self.path(chain)
        with self.stage() as staged:
            try:
                lock = lock_in_place(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _IN_USE
            if lock is None:
                return ""
            try:
                if last_used_ns is not None and self.last_used_ns(chain) != last_used_ns:
                    return "it was used meanwhile"
                if user := self._user_of(path.name):
                    return user
                path.rename(staged / "removed")
            finally:
                os.close(lock)
        return ""

    def _drop(self, path: Path) -> bool:
        """Remove a snapshot unless it is known to be whole, which it may be by now; tell whether it went."""
        with self.stage() as staged:
            # Nobody holds what isn't whole for longer than it takes to see that.
            lock = lock_in_place(path, fcntl.LOCK_EX)
            try:
                if lock is None or self._read(path) is not None:
                    return False
                path.rename(staged / "removed")
            finally:
                if lock is not None:
                    os.close(lock)
        return True

    def settle(self) -> int:
        """Flush the file system and mark as good the snapshots of this boot that aren't yet; return how many.

        May take as long as writing them takes. Once a minute is plenty.
        """
        pending = [
            path
            for path in self.published.iterdir()
            if not (path / "settled").exists() and (info := self._read(path)) is not None and info.boot == self._boot
        ]
        if pending:
            self._flush()
            for path in pending:
                # Removed meanwhile: nothing to mark.
                with suppress(FileNotFoundError):
                    (path / "settled").touch()
        return len(pending)

    def _flush(self) -> None:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _LIBC.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        finally:
            os.close(fd)

    def recover(self) -> list[str]:
        """Remove staging directories that nobody holds, with their mounts, and snapshots that a crash left unsure."""
        removed: list[str] = []
        with locked(self.staging, fcntl.LOCK_EX):
            for path in sorted(self.staging.iterdir()):
                if _is_abandoned(path):
                    _clear(path)
                    removed.append(f"staging/{path.name}")
        unsure = [path for path in sorted(self.published.iterdir()) if self._read(path) is None]
        return removed + [f"s/{path.name}" for path in unsure if self._drop(path)]


def _parse(path: Path) -> SnapshotInfo | None:
    """Return what is kept of the snapshot in *path*, whole or not; None where that can't be read."""
    try:
        return msgspec.json.decode((path / _NOTE).read_bytes(), type=SnapshotInfo)
    except (OSError, msgspec.DecodeError):
        return None


def _clear(staged: Path) -> None:
    """Remove a staging directory: never through a mount, behind which may be anything."""
    unmount_below(staged)
    remove_tree(staged)


def _is_abandoned(path: Path) -> bool:
    """Tell whether nobody holds the lock of a staging directory: the kernel drops it with its process."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
