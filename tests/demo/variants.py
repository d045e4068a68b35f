"""The same filesystem in other bytes: images of one content that share no blob and no chain.

Each step of the demo that needs an empty content store gets blobs that no earlier step has fetched. Two
zero blocks end a tar, so more of them change its diff ID, and the digest with it, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import zstandard
from isal import igzip

from tests.doubles.oci_layout import ImageLayer, LayoutImage, LayoutWriter

_CHUNK_BYTES = 1 << 20
_TAR_RECORD_BYTES = 10_240


def padded(image: LayoutImage, layout: Path, records: int) -> LayoutImage:
    """Write *image* with *records* zero records after the end of each layer's tar into a new layout, as gzip."""
    writer = LayoutWriter(layout)
    done: dict[str, ImageLayer] = {}
    for layer in image.layers:
        if layer.digest not in done:
            done[layer.digest] = _padded_layer(writer, image, layer, b"\0" * (records * _TAR_RECORD_BYTES))
    return writer.add_image(
        "padded",
        [done[layer.digest] for layer in image.layers],
        base={key: value for key, value in image.config.items() if key not in ("rootfs", "history")},
    )


def _padded_layer(writer: LayoutWriter, image: LayoutImage, layer: ImageLayer, padding: bytes) -> ImageLayer:
    diff = hashlib.sha256()
    with (
        _tar_of(image, layer) as tar,
        writer.new_blob("layer") as raw,
        _gzip(raw, "wb") as packed,
    ):
        while chunk := tar.read(_CHUNK_BYTES):
            diff.update(chunk)
            packed.write(chunk)
        diff.update(padding)
        packed.write(padding)
    digest, size_bytes = writer.keep("layer")
    return ImageLayer(
        digest=digest,
        size_bytes=size_bytes,
        diff_id=f"sha256:{diff.hexdigest()}",
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
    )


@contextmanager
def _tar_of(image: LayoutImage, layer: ImageLayer) -> Iterator[IO[bytes]]:
    with image.blob(layer.digest).open("rb") as raw:
        if layer.media_type.endswith("gzip"):
            with _gzip(raw, "rb") as tar:
                yield tar
        elif layer.media_type.endswith("zstd"):
            with zstandard.ZstdDecompressor().stream_reader(raw) as stream, io.BufferedReader(stream) as tar:
                yield tar
        else:
            yield raw


def _gzip(raw: IO[bytes], mode: str) -> IO[bytes]:
    # isal has no annotations, and is five times as fast as the standard library here.
    opened: IO[bytes] = igzip.open(raw, mode, compresslevel=1)  # type: ignore[no-untyped-call]
    return opened
