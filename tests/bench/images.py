"""Images that are made for measuring: random bytes, which neither compress nor repeat."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import IO

from isal import igzip

from tests.doubles.oci_layout import ImageLayer, LayoutImage, LayoutWriter

_CHUNK_BYTES = 1 << 20


def random_image(layout: Path, *, layers: int, layer_bytes: int, seed: int) -> LayoutImage:
    """Write an image of gzip layers, each one file of random bytes, the same for the same arguments."""
    writer = LayoutWriter(layout)
    dice = random.Random(seed)  # noqa: S311 - bytes that don't compress, no secret
    made = [_random_layer(writer, f"data-{number}", layer_bytes, dice) for number in range(layers)]
    return writer.add_image("random", made, base={"architecture": "amd64", "os": "linux", "config": {}})


def _random_layer(writer: LayoutWriter, name: str, size_bytes: int, dice: random.Random) -> ImageLayer:
    diff = hashlib.sha256()
    with writer.new_blob("layer") as raw, _gzip(raw) as packed:

        def write(data: bytes) -> None:
            diff.update(data)
            packed.write(data)

        entry = tarfile.TarInfo(name)
        entry.size = size_bytes
        write(entry.tobuf(tarfile.PAX_FORMAT))
        left = size_bytes
        while left:
            count = min(left, _CHUNK_BYTES)
            write(dice.randbytes(count))
            left -= count
        end = io.BytesIO()
        end.write(b"\0" * (-size_bytes % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE))
        write(end.getvalue())
    digest, stored_bytes = writer.keep("layer")
    return ImageLayer(
        digest=digest,
        size_bytes=stored_bytes,
        diff_id=f"sha256:{diff.hexdigest()}",
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
    )


def _gzip(raw: IO[bytes]) -> IO[bytes]:
    # isal has no annotations. At its level 0 random bytes grow by a fifth.
    opened: IO[bytes] = igzip.open(raw, "wb", compresslevel=1)  # type: ignore[no-untyped-call]
    return opened
