"""Layers that are bombs: each is refused by type, soon, in bounded memory, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tracemalloc
from dataclasses import replace

import pytest
import zstandard

from cluster.config import NodeConfig
from cluster.descriptor import Compression
from cluster.digest import digest_of
from cluster.errors import LayerError, LayerLimitError
from storage.snapshots import CopyingSnapshotter, LayerLimits, OverlaySnapshotter
from storage.snapshots.inflate import BUFFER_BYTES, BUFFERS
from tests.doubles.layers import Bytes, apply, directory, file, layer, layer_of, layer_tar, sketch, whiteout

MIB = 1024**2
LIMITS = LayerLimits(tar_bytes=8 * MIB, entries=200, names_bytes=20_000)


@pytest.fixture(params=["copying", "overlay"])
def snapshotter(request, tmp_path):
    if request.param == "copying":
        return CopyingSnapshotter(tmp_path, LIMITS)
    if os.geteuid():
        pytest.skip("mounting needs root")
    return OverlaySnapshotter(tmp_path, LIMITS)


def refusal(snapshotter, bomb) -> LayerLimitError:
    """Return why *bomb* is refused, having seen that nothing of it stays and that what is whole still goes."""
    with pytest.raises(LayerLimitError) as caught:
        apply(snapshotter, None, bomb)
    staging = snapshotter._store.root
    assert not list(snapshotter.snapshots())
    assert not [path for path in staging.rglob("*") if path.name.startswith("bomb")]
    good = apply(snapshotter, None, layer(file("fine", b"1")))
    assert sketch(snapshotter.mount(good, "m")) == {"fine": b"1"}
    snapshotter.unmount("m")
    return caught.value


def zeros(size: int, compression: Compression):
    """Return a layer of one file of zeros: some thousandth of what it unpacks to, or less."""
    tar = layer_tar(file("bomb", bytes(size)))
    return layer_of(tar, compression)


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_a_bomb_by_ratio_is_refused_at_the_limit(snapshotter, compression):
    """What a few kilobytes unpack to is written up to the limit and no further; memory doesn't grow with it."""
    bomb = zeros(64 * MIB, compression)
    assert len(bomb.blob) < 128 * 1024
    tracemalloc.start()
    try:
        error = refusal(snapshotter, bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (error.digest, error.what, error.limit) == (bomb.descriptor.digest, "bytes", LIMITS.tar_bytes)
    assert "node.layer_bytes" in error.hint
    # The buffers of the bomb and of the good layer after it.
    assert peak_bytes < 2 * (BUFFERS + 2) * BUFFER_BYTES + 4 * MIB


@pytest.mark.parametrize(
    ("xattrs", "reason"),
    [
        ({"user.k\0x": b"v"}, "a zero byte in an xattr's name"),
        ({"user." + "k" * 300: b"v"}, "an xattr's name of 305 bytes"),
        ({"user.k": b"v" * 70_000}, "an xattr of 70000 bytes"),
        ({"user.k": b"v" * 3_000_000}, "an extended header of"),
        ({f"user.k{number}": b"v" * 60_000 for number in range(30)}, "an extended header of"),
    ],
)
def test_an_xattr_that_no_file_can_have_is_the_layers_fault(snapshotter, xattrs, reason):
    """Not the disk's: it says which entry, and the layer stays out."""
    with pytest.raises(LayerError, match=reason):
        apply(snapshotter, None, layer(file("f", b"1", xattrs=xattrs)))
    assert not list(snapshotter.snapshots())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_an_xattr_that_this_file_system_cant_keep_is_no_full_disk(tmp_path):
    """ext4 says ENOSPC of it, with all its room free."""
    disk, image = tmp_path / "disk", tmp_path / "image"
    disk.mkdir()
    with image.open("wb") as made:
        made.truncate(64 * MIB)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-O", "^ea_inode", str(image)], check=True)
    subprocess.run(["/usr/bin/mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        snapshotter = CopyingSnapshotter(disk / "node", LIMITS)
        with pytest.raises(LayerError, match=r"entry 'f': xattr user\.k of 60000 bytes is too big here"):
            apply(snapshotter, None, layer(file("f", b"1", xattrs={"user.k": b"v" * 60_000})))
        assert not list(snapshotter.snapshots())
    finally:
        subprocess.run(["/usr/bin/umount", str(disk)], check=True)


def test_zeros_after_the_archives_end_count_as_well(snapshotter):
    """What follows the last entry is read for the diff ID: that, too, has an end."""
    bomb = layer_of(layer_tar(file("bomb", b"1")) + bytes(32 * MIB))
    assert refusal(snapshotter, bomb).what == "bytes"


def test_a_bomb_by_count_is_refused(snapshotter):
    """Entries are counted before they are made."""
    bomb = layer(*[file(f"bomb{number}") for number in range(LIMITS.entries + 1)])
    assert refusal(snapshotter, bomb).what == "entries"


def test_directories_that_only_a_name_asks_for_count_as_entries(snapshotter):
    """An entry of a long name makes a thousand directories: it counts as a thousand."""
    bomb = layer(*[file(f"bomb{number}/" + "d/" * 9 + "f") for number in range(LIMITS.entries // 10)])
    assert refusal(snapshotter, bomb).what == "entries"


def test_the_same_directory_again_is_an_entry_again(snapshotter):
    """Replacing one thing over and over takes time without end, though little disk."""
    bomb = layer(*[directory("bomb", 0o700 + number % 8) for number in range(LIMITS.entries + 1)])
    assert refusal(snapshotter, bomb).what == "entries"


@pytest.mark.parametrize("make", [directory, whiteout], ids=["directories", "whiteouts"])
def test_a_bomb_by_the_length_of_names_is_refused(snapshotter, make):
    """Names that are kept in memory have a bound of their own, below what entries times their length would come to."""
    bomb = layer(*[make(f"bomb{number:03}" + "x" * 200) for number in range(LIMITS.entries - 1)])
    assert refusal(snapshotter, bomb).what == "bytes of names"


def test_what_is_just_within_the_limits_is_unpacked(tmp_path):
    """The limits are the last that goes."""
    good = layer(*[file(f"f{number}") for number in range(5)])
    exact = LayerLimits(tar_bytes=len(good.tar), entries=5)
    assert apply(CopyingSnapshotter(tmp_path / "exact", exact), None, good)
    for less in (replace(exact, tar_bytes=len(good.tar) - 1), replace(exact, entries=4)):
        with pytest.raises(LayerLimitError):
            apply(CopyingSnapshotter(tmp_path / "less", less), None, good)


def test_a_bomb_within_a_file_that_claims_to_be_small_is_read_as_its_header_says(snapshotter):
    """A size that is too small makes the rest of the data headers, whose checksums are wrong."""
    tar = bytearray(layer_tar(file("bomb", bytes(range(256)) * 4096)))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        info = archive.next()
    assert info is not None
    info.size = 512
    tar[:512] = info.tobuf()[:512]
    with pytest.raises(LayerError, match="checksum"):
        apply(snapshotter, None, layer_of(bytes(tar)))


def test_a_zstd_window_of_gigabytes_is_refused_before_it_is_taken(snapshotter):
    """A frame may ask for a window of terabytes: the decoder refuses what it would have to allocate."""
    whole = zstandard.ZstdCompressor(write_content_size=False).compress(layer_tar(file("bomb")))
    assert not whole[4] & 0b100000  # no single segment: the window's descriptor follows
    blob = whole[:5] + bytes([0xF8]) + whole[6:]
    bomb = layer_of(layer_tar(file("bomb")), Compression.ZSTD)
    bomb = replace(bomb, blob=blob, descriptor=replace(bomb.descriptor, digest=digest_of(blob), size_bytes=len(blob)))
    with pytest.raises(LayerError, match="damaged"):
        snapshotter.apply(
            chain=digest_of(b"c"), parent=None, layer=bomb.descriptor, stream=Bytes(blob), await_parent=lambda: None
        )


def test_the_limits_come_from_the_configuration():
    """A node's limits are those of its section."""
    limits = LayerLimits.of(NodeConfig(layer_bytes=7, layer_entries=8))
    assert (limits.tar_bytes, limits.entries) == (7, 8)
