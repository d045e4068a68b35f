"""Export: images, or their files, from the content store to this machine, every digest checked on the way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import stat
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, assert_never

from cluster.descriptor import INDEX_OCI, Descriptor
from cluster.digest import EMPTY_CHAIN, Digest, chain_id, hex_of
from cluster.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    ClusterError,
    ExportError,
    InternalError,
    InvalidDescriptorError,
    NodeDiskError,
    SnapshotError,
)
from cluster.ports import ByteStream, ObjectReader
from cluster.progress import LayerPhase, ProgressItem
from cluster.ref import BlobRecord, ImageRecord
from cluster.reference import parse_platform, parse_reference
from lazyfarm.operation import ProgressCallback
from lazyfarm.outputs import STDOUT, Output, OutputKind
from storage.fetching import checked
from storage.snapshots.copying import CopyingSnapshotter
from storage.snapshots.limits import LayerLimits
from storage.snapshots.store import remove_tree

#: Blobs that are written to a layout at once.
_BLOBS_AT_ONCE = 4
_CHUNK_BYTES = 1024 * 1024
_TELL_EVERY_BYTES = 4 * 1024 * 1024
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
#: Annotations of an index's entries: image-spec's, with the tag, and containerd's, with the whole name.
_REF_NAME = "org.opencontainers.image.ref.name"
_IMAGE_NAME = "io.containerd.image.name"
_OWNER_ALL = 0o700


class BlobRecords(Protocol):
    """Knows which blobs are present: of :class:`cluster.ports.RefStore`, what an export needs."""

    async def blobs(self, digests: Sequence[Digest]) -> list[BlobRecord | None]:
        """Tell which blobs are present."""
        ...

    async def mark_absent(self, blob: BlobRecord, reason: str) -> bool:
        """Turn a blob that was found damaged lazy again, if it is still that very upload."""
        ...


class Exporter:
    """Writes images whose blobs are all in the content store to this machine's disk."""

    def __init__(self, store: ObjectReader, refs: BlobRecords, limits: LayerLimits | None = None) -> None:
        """Make an exporter; *limits* as for the node's snapshotter."""
        self._store = store
        self._refs = refs
        self._limits = limits

    async def export(
        self,
        image: ImageRecord,
        output: Output,
        *,
        stdout: BinaryIO | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Write *image* as *output* says.

        A file is there whole or not at all; of a layout, the index comes last; a directory that is not there yet
        is made by one rename, and into one that is there file after file is moved, each whole, once all are
        unpacked. Foreign layers that the content store lacks are left out of layouts and archives, as pushes do.

        Args:
            image: What; the caller has made its layers present.
            output: Where to, and as what.
            stdout: Where :data:`lazyfarm.outputs.STDOUT` leads to; not closed.
            progress: Called on the event loop with an item a blob.

        Raises:
            BlobNotFoundError: a blob isn't in the content store.
            BlobDamagedError: its bytes there are others; it is lazy from now on.
            ExportError: the destination can't be written.
            LayerError, SnapshotError, NodeDiskError: a layer can't be unpacked, for its files.
        """
        needs_files = output.kind in (OutputKind.LOCAL, OutputKind.TAR)
        blobs = await self._blobs(image, needs_foreign=needs_files)
        loop = asyncio.get_running_loop()

        def tell(item: ProgressItem) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, item)

        work = _Work(
            image=image,
            output=output,
            store=self._store,
            blobs=blobs,
            stdout=stdout,
            tell=tell,
            limits=self._limits,
        )
        running = loop.run_in_executor(None, work.run)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            work.stop.set()
            with contextlib.suppress(ClusterError, _StoppedError):
                await running
            raise
        except BlobDamagedError as exc:
            damaged = blobs.get(Digest(exc.digest))
            if damaged is not None:
                await self._refs.mark_absent(damaged, exc.reason)
            raise

    async def _blobs(self, image: ImageRecord, *, needs_foreign: bool) -> Mapping[Digest, BlobRecord]:
        wanted = {blob.digest: blob for blob in (image.manifest, image.config, *image.layers)}
        found = dict(zip(wanted, await self._refs.blobs(list(wanted)), strict=True))
        for digest, blob in found.items():
            if blob is None and (needs_foreign or not wanted[digest].is_foreign):
                raise BlobNotFoundError(digest, "the content store")
        return {digest: blob for digest, blob in found.items() if blob is not None}


class _StoppedError(Exception):
    """The export was told to stop. Never leaves this module."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(kw_only=True, eq=False)
class _Work:
    """One export, in threads."""

    image: ImageRecord
    output: Output
    store: ObjectReader
    blobs: Mapping[Digest, BlobRecord]
    stdout: BinaryIO | None
    tell: Callable[[ProgressItem], None]
    limits: LayerLimits | None

    def __post_init__(self) -> None:
        self.stop = threading.Event()

    def run(self) -> None:
        dest = Path(self.output.dest)
        try:
            match self.output.kind:
                case OutputKind.OCI_LAYOUT:
                    self._write_layout(dest)
                case OutputKind.OCI_ARCHIVE:
                    with self._new_file() as out:
                        self._write_archive(out)
                case OutputKind.LOCAL:
                    self._write_files(dest)
                case OutputKind.TAR:
                    self._write_tar()
                case OutputKind.IMAGE:
                    raise InternalError("an image of the farm is no export to this machine")
                case _:
                    assert_never(self.output.kind)
        except OSError as exc:
            raise ExportError(self.output.dest, exc.strerror or str(exc)) from exc

    # -- blobs ---------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, descriptor: Descriptor) -> Iterator[_Counted]:
        """Open a blob; its item ends with the body, whose error is that of the blob."""
        blob = self.blobs[descriptor.digest]
        item = _Item(self.tell, descriptor)
        try:
            with checked(self.store, blob) as stream:
                yield _Counted(stream, item, descriptor.size_bytes, self.stop)
        except _StoppedError:
            item.end(LayerPhase.CANCELLED)
            raise
        except BlobNotFoundError as exc:
            item.end(LayerPhase.FAILED, str(exc))
            raise BlobDamagedError(descriptor.digest, f"object {blob.key} is gone") from exc
        except BaseException as exc:
            item.end(LayerPhase.FAILED, str(exc))
            raise
        item.end(LayerPhase.DONE)

    def _documents_last(self) -> Sequence[Descriptor]:
        """Return what an image layout has of the image, each blob once: layers, then what names them."""
        found = {d.digest: d for d in (*self.image.layers, self.image.config, self.image.manifest)}
        return [descriptor for descriptor in found.values() if descriptor.digest in self.blobs]

    # -- OCI layouts ---------------------------------------------------------------------------------------

    def _write_layout(self, root: Path) -> None:
        directory = root / "blobs" / "sha256"
        directory.mkdir(parents=True, exist_ok=True)
        _read_index(root / "index.json")  # before anything is written: it may be none
        with ThreadPoolExecutor(_BLOBS_AT_ONCE, thread_name_prefix="export") as pool:
            writing = [pool.submit(self._write_blob, directory, one) for one in self._documents_last()]
            try:
                for each in writing:
                    each.result()
            except BaseException:
                self.stop.set()  # the others need not go on
                raise
        _write_whole(root / "oci-layout", _LAYOUT)
        entries = self._entries()
        names = {_name_of(entry) for entry in entries}

        def is_replaced(entry: Mapping[str, Any]) -> bool:
            name = _name_of(entry)
            return entry.get("digest") == self.image.manifest.digest if name is None else name in names

        kept = [entry for entry in _read_index(root / "index.json") if not is_replaced(entry)]
        _write_whole(root / "index.json", _index([*kept, *entries]))

    def _write_blob(self, directory: Path, descriptor: Descriptor) -> None:
        path = directory / hex_of(descriptor.digest)
        if _has(path, descriptor):
            _Item(self.tell, descriptor).end(LayerPhase.PRESENT)
            return
        partial = directory / f".{path.name}.{secrets.token_hex(4)}"
        try:
            with partial.open("xb") as out, self._opened(descriptor) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    out.write(chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _write_archive(self, out: BinaryIO) -> None:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "oci-layout", len(_LAYOUT), _Bytes(_LAYOUT))
            for descriptor in self._documents_last():
                with self._opened(descriptor) as stream:
                    _add(tar, f"blobs/sha256/{hex_of(descriptor.digest)}", descriptor.size_bytes, stream)
                    stream.finish()
            index = _index(self._entries())
            _add(tar, "index.json", len(index), _Bytes(index))

    def _entries(self) -> list[dict[str, Any]]:
        """Return the index's entries for the image: one a name, or one without."""
        manifest = self.image.manifest
        platform = parse_platform(self.image.platform)
        described: dict[str, Any] = {
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": manifest.size_bytes,
            "platform": {
                "architecture": platform.architecture,
                "os": platform.os,
                **({"variant": platform.variant} if platform.variant else {}),
            },
        }
        names = self.output.names or ((self.image.name,) if self.image.name else ())
        if not names:
            return [described]
        entries = []
        for name in names:
            tag = parse_reference(name).tag
            annotations = {_IMAGE_NAME: name, **({_REF_NAME: tag} if tag else {})}
            entries.append({**described, "annotations": annotations})
        return entries

    # -- files ---------------------------------------------------------------------------------------------

    def _write_files(self, dest: Path) -> None:
        if dest.is_dir():
            # Within it: beside it we may have no right to write, and what is beside a mount is another disk.
            with _work_directory(dest, ".lazyfarm-export-") as work:
                tree = self._unpacked(CopyingSnapshotter(work, self.limits))
                for source, target in _moves(tree, dest):
                    _move(source, target)
            return
        if dest.is_symlink() or dest.exists():
            raise ExportError(str(dest), "it is there, and no directory")
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _work_directory(dest.absolute().parent, f".{dest.name}.") as work:
            _move(self._unpacked(CopyingSnapshotter(work, self.limits)), dest)

    def _write_tar(self) -> None:
        near = None if self.output.dest == STDOUT else Path(self.output.dest).absolute().parent
        with _work_directory(near, ".lazyfarm-export-") as work:
            snapshotter = CopyingSnapshotter(work, self.limits)
            chain = self._unpack(snapshotter)
            with self._new_file() as out:
                # What could not be made without root is in it as the layers say.
                snapshotter.diff(chain, None, _StoppableFile(out, self.stop))  # type: ignore[arg-type]  # only written to

    def _unpacked(self, snapshotter: CopyingSnapshotter) -> Path:
        """Return the tree of the image's files, which is the caller's to move."""
        return snapshotter.mount(self._unpack(snapshotter), "export")

    def _unpack(self, snapshotter: CopyingSnapshotter) -> Digest:
        """Unpack the layers, lowest first; return the chain ID of the whole."""
        below: Digest | None = None
        for layer in self.image.layers:
            if layer.diff_id is None:
                raise InvalidDescriptorError(layer.digest, "it has no diff ID, so it can't be unpacked")
            chain = chain_id(below, layer.diff_id)
            with self._opened(layer) as stream:
                snapshotter.apply(chain=chain, parent=below, layer=layer, stream=stream, await_parent=lambda: None)
                stream.finish()
            if below is not None:
                # The next has its own copy of it all. Without root some of it may resist: it goes in the end.
                with contextlib.suppress(SnapshotError, NodeDiskError):
                    snapshotter.remove(below)
            below = chain
        return below or EMPTY_CHAIN

    # -- destinations --------------------------------------------------------------------------------------

    @contextmanager
    def _new_file(self) -> Iterator[BinaryIO]:
        """Lend the file to write to: standard output, or one that gets its name once the body is done."""
        if self.output.dest == STDOUT:
            if self.stdout is None:
                raise ExportError(STDOUT, "there is no standard output here")
            yield self.stdout
            self.stdout.flush()
            return
        path = Path(self.output.dest)
        if path.is_dir():
            raise ExportError(str(path), "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as out:
                yield out
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# -- streams -----------------------------------------------------------------------------------------------


class _Item:
    """One blob's progress item; ends once."""

    def __init__(self, tell: Callable[[ProgressItem], None], descriptor: Descriptor) -> None:
        self._tell = tell
        self._descriptor = descriptor
        self._told_bytes = -_TELL_EVERY_BYTES

    def moved(self, current_bytes: int) -> None:
        if current_bytes - self._told_bytes >= _TELL_EVERY_BYTES:
            self._told_bytes = current_bytes
            self._say(LayerPhase.FETCHING, current_bytes, "")

    def end(self, phase: LayerPhase, detail: str = "") -> None:
        failed = phase in (LayerPhase.CANCELLED, LayerPhase.FAILED)
        self._say(phase, 0 if failed else self._descriptor.size_bytes, detail)

    def _say(self, phase: LayerPhase, current_bytes: int, detail: str) -> None:
        self._tell(
            ProgressItem(
                item=f"export:{self._descriptor.digest}",
                phase=phase,
                current_bytes=current_bytes,
                total_bytes=self._descriptor.size_bytes,
                detail=detail,
            )
        )


class _Counted:
    """A checked blob: tells how far it is, and stops when told to."""

    def __init__(self, stream: ByteStream, item: _Item, size_bytes: int, stop: threading.Event) -> None:
        self._stream = stream
        self._item = item
        self._size_bytes = size_bytes
        self._stop = stop
        self._read_bytes = 0
        self._is_over = False

    def readinto(self, buffer: memoryview) -> int:
        """Read on; never more than the descriptor says, whose last byte comes once all are right."""
        if self._stop.is_set():
            raise _StoppedError
        if self._is_over:
            return 0
        count = self._stream.readinto(buffer[: max(1, self._size_bytes - self._read_bytes)])
        self._read_bytes += count
        self._is_over = not count or self._read_bytes >= self._size_bytes
        self._item.moved(self._read_bytes)
        return count

    def read(self, size: int, /) -> bytes:
        buffer = bytearray(size)
        count = self.readinto(memoryview(buffer))
        return bytes(buffer[:count])

    def finish(self) -> None:
        """Read what is left, so that all of it has been checked."""
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while self.readinto(buffer):
            pass


class _Bytes:
    """Bytes in memory, as tarfile reads them."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def read(self, size: int, /) -> bytes:
        data, self._left = self._left[:size], self._left[size:]
        return data


class _Whole:
    """Gives tarfile as many bytes as it asks for, which it takes a short read for the end of."""

    def __init__(self, source: _Readable) -> None:
        self._source = source

    def read(self, size: int, /) -> bytes:
        pieces = []
        while size and (piece := self._source.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class _StoppableFile:
    """A file whose writer can be told to stop."""

    def __init__(self, out: BinaryIO, stop: threading.Event) -> None:
        self._out = out
        self._stop = stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise _StoppedError
        return self._out.write(data)


def _add(tar: tarfile.TarFile, name: str, size_bytes: int, source: _Readable) -> None:
    """Add a file as it would be on any machine at any time."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size_bytes, 0o644
    tar.addfile(entry, _Whole(source))  # type: ignore[arg-type]  # only read from


# -- layouts on disk ---------------------------------------------------------------------------------------


def _index(entries: Sequence[Mapping[str, Any]]) -> bytes:
    document = {"schemaVersion": 2, "mediaType": INDEX_OCI, "manifests": list(entries)}
    return json.dumps(document, separators=(",", ":")).encode()


def _read_index(path: Path) -> list[dict[str, Any]]:
    """Return the images that a layout has; none where there is no layout yet."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as exc:
        raise ExportError(str(path), "it is not JSON") from exc
    entries = document.get("manifests") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ExportError(str(path), "it is no index of images")
    return entries


def _name_of(entry: Mapping[str, Any]) -> str | None:
    """Return what readers call an entry; None for one without a name."""
    annotations = entry.get("annotations")
    name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


def _has(path: Path, descriptor: Descriptor) -> bool:
    """Tell whether a blob is there already, and is right."""
    try:
        if path.stat().st_size != descriptor.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == hex_of(descriptor.digest)
    except FileNotFoundError:
        return False


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# -- trees on disk -----------------------------------------------------------------------------------------


@contextmanager
def _work_directory(near: Path | None, prefix: str) -> Iterator[Path]:
    """Lend a directory of this export's own, on the same disk as *near*; nothing of it is left."""
    if near is not None:
        near.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=near))
    try:
        yield work
    finally:
        try:
            remove_tree(work)
        except PermissionError:
            for directory, directories, _files in os.walk(work):
                for name in directories:
                    _unlock(Path(directory, name))
            remove_tree(work)


def _moves(tree: Path, dest: Path) -> list[tuple[Path, Path]]:
    """Return what has to be moved where, so that *tree* is in *dest* beside what else is there.

    Raises:
        ExportError: a directory would have to take the place of something else, or something else that of a
            directory. Links are not followed: they may lead out of *dest*.
    """
    moves: list[tuple[Path, Path]] = []
    pending = [(tree, dest)]
    while pending:
        source, target = pending.pop()
        for entry in sorted(source.iterdir()):
            there = target / entry.name
            is_directory = stat.S_ISDIR(entry.lstat().st_mode)
            found = there.lstat().st_mode if there.is_symlink() or there.exists() else None
            if found is None or not (is_directory or stat.S_ISDIR(found)):
                moves.append((entry, there))
            elif is_directory and stat.S_ISDIR(found):
                pending.append((entry, there))
            else:
                raise ExportError(str(there), f"it is {'no' if is_directory else 'a'} directory, unlike the image's")
    return moves


def _move(source: Path, target: Path) -> None:
    """Move a file or a whole tree, in place of a file that is there."""
    try:
        os.replace(source, target)  # noqa: PTH105
    except PermissionError:
        # Without root a directory can be moved only by who may write to it, and out of one likewise.
        _unlock(source.parent)
        mode = source.lstat().st_mode
        if not stat.S_ISDIR(mode):
            os.replace(source, target)  # noqa: PTH105
            return
        _unlock(source)
        os.replace(source, target)  # noqa: PTH105
        target.chmod(stat.S_IMODE(mode))


def _unlock(directory: Path) -> None:
    """Let its owner write to a directory; not to what a link to one leads to."""
    mode = directory.lstat().st_mode
    if stat.S_ISDIR(mode):
        directory.chmod(stat.S_IMODE(mode) | _OWNER_ALL)
