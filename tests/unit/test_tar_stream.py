"""Decompression and hashing of a layer's stream."""

from __future__ import annotations

import os

import pytest
import zstandard

from cluster.descriptor import Compression
from cluster.digest import digest_of
from storage.snapshots.inflate import BUFFER_BYTES, DamagedStreamError, LayerStream, ZstdFrames
from tests.doubles.layers import Bytes, compress

DATA = os.urandom(BUFFER_BYTES) + b"\0" * BUFFER_BYTES + os.urandom(12345)
SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"skipped"


def read(blob: bytes, compression: Compression, piece: int = 1 << 16) -> bytes:
    with LayerStream(Bytes(blob, piece=piece), compression) as source:
        out = b""
        while (view := source.next()) is not None:
            assert len(out) % BUFFER_BYTES == 0  # all but the last are full
            out += view
        assert (source.digest, source.length) == (digest_of(out), len(out))
        assert source.next() is None
        return out


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("members", [1, 2, 7])
@pytest.mark.parametrize("piece", [777, 1 << 20])
def test_whatever_the_pieces_the_bytes_are_the_same(compression, members, piece):
    """Buffers are full but for the last one; the digest is of the uncompressed bytes."""
    assert read(compress(DATA, compression, members=members), compression, piece) == DATA


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_every_truncation_is_noticed(compression):
    """Also one that cuts nothing but the checksum."""
    blob = compress(DATA, compression, members=2)
    for kept in (1, 5, 17, len(blob) // 2 - 3, len(blob) - 9, len(blob) - 4, len(blob) - 1):
        with pytest.raises(DamagedStreamError):
            read(blob[:kept], compression)


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_a_flipped_bit_is_noticed(compression):
    """Both formats have a checksum."""
    blob = bytearray(compress(b"data" * 1000, compression))
    blob[-1] ^= 1

    with pytest.raises(DamagedStreamError):
        read(bytes(blob), compression)


def test_skippable_frames_are_skipped():
    """As ``zstd:chunked`` and seekable zstd write them, before, between and after."""
    half = len(DATA) // 2
    frames = [zstandard.compress(DATA[:half]), zstandard.compress(DATA[half:])]

    assert read(SKIPPABLE + frames[0] + SKIPPABLE + frames[1] + SKIPPABLE, Compression.ZSTD) == DATA


@pytest.mark.parametrize(
    "options",
    [{}, {"write_checksum": True}, {"write_content_size": False}, {"level": 19}, {"threads": 2}],
)
@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_frames_are_followed_to_their_end(options, size):
    """The walker is at a boundary after whole frames and nowhere else, of every kind of frame."""
    frame = zstandard.ZstdCompressor(**options).compress(os.urandom(size // 2) + bytes(size - size // 2))
    frames = ZstdFrames()
    at_boundary = []
    for byte in frame:
        frames.feed(memoryview(bytes([byte])))
        at_boundary.append(frames.at_boundary)

    assert at_boundary == [False] * (len(frame) - 1) + [True]


def test_leaving_early_ends_the_thread():
    """A reader that fails half-way leaves no thread that waits for it."""
    with LayerStream(Bytes(bytes(50 * BUFFER_BYTES)), Compression.NONE) as source:
        source.next()

    source._thread.join(30)
    assert not source._thread.is_alive()
