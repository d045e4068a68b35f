"""Where a node's snapshots lie, and how they come and go: what both snapshotters have in common.

::

    ROOT/KIND/s/NAME/            a published snapshot; NAME is short, so that many fit one mount
                     fs/           its files: the layer's alone (overlay) or the whole tree (copying)
                     snapshot.json which chain it is, on top of which, published in which boot
                     ledger        what could not be made without root
                     opaque-root   there if the layer hides all that is below it
                     settled       there once all of it is known to be on the disk
    ROOT/KIND/staging/NONCE/     being unpacked, written to as a workspace, or being removed; locked by who does
    ROOT/KIND/mnt/NAME/          a mount, and beside it ROOT/KIND/mounted/NAME: of which chain

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
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from cluster.digest import EMPTY_CHAIN, Digest, hex_of
from cluster.errors import SnapshotError
from cluster.faultpoints import FaultPoint, hit
from storage.snapshots.kernel import unmount_below
from storage.snapshots.locks import locked

#: 120 bits of the chain ID: two chains that share them can't be found, and 140 names fit a mount's option page.
_NAME_LENGTH: Final = 24
#: Files beside a snapshot's own.
LEDGER: Final = "ledger"
OPAQUE_ROOT: Final = "opaque-root"

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


def short_name(chain: Digest) -> str:
    """Return the directory name of a chain's snapshot."""
    return base64.b32encode(bytes.fromhex(hex_of(chain))).decode().lower()[:_NAME_LENGTH]


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; does nothing where there is none."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except RecursionError:
        # Python 3.11's walks by recursion; a layer may be a thousand directories deep.
        subprocess.run(["rm", "-rf", "--", str(path)], check=True, timeout=600)  # noqa: S603, S607


class Store:
    """The published snapshots under one directory, shared by any number of processes."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
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
        try:
            info = msgspec.json.decode((path / "snapshot.json").read_bytes(), type=SnapshotInfo)
        except (OSError, msgspec.DecodeError):
            return None
        return info if info.boot == self._boot or (path / "settled").exists() else None

    def require(self, chain: Digest, doing: str) -> SnapshotInfo:
        """Return what is kept of a snapshot.

        Raises:
            SnapshotError: it is not published here.
        """
        info = self.info(chain)
        if info is None:
            raise SnapshotError(chain, doing, "it is not on this node")
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
        """
        info = SnapshotInfo(chain=chain, parent=parent, diff_id=diff_id, boot=self._boot)
        inner = staged / "snapshot"
        inner.mkdir(mode=0o700)
        (staged / "fs").rename(inner / "fs")
        for kept in (LEDGER, OPAQUE_ROOT):
            with suppress(FileNotFoundError):
                (staged / kept).rename(inner / kept)
        (inner / "snapshot.json").write_bytes(msgspec.json.encode(info))
        target = self.path(chain)
        hit(FaultPoint.SNAPSHOT_PUBLISH_BEFORE)
        while True:
            try:
                inner.rename(target)
            except OSError as exc:
                if exc.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                if self.info(chain) is not None:
                    return False
                # One of an earlier boot that was never settled, or damaged: in the way.
                self.remove(chain)
            else:
                hit(FaultPoint.SNAPSHOT_PUBLISH_AFTER)
                return True

    def remove(self, chain: Digest) -> None:
        """Remove a snapshot: out of sight by a rename, then from the disk."""
        with self.stage() as staged, suppress(FileNotFoundError):
            self.path(chain).rename(staged / "removed")

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
        for path in sorted(self.published.iterdir()):
            if self._read(path) is None:
                with self.stage() as staged, suppress(FileNotFoundError):
                    path.rename(staged / "removed")
                    removed.append(f"s/{path.name}")
        return removed


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
