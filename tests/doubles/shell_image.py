"""An image that builds run commands in: this machine's shell and a few programs, one small layer of data on top."""

from __future__ import annotations

import functools
import gzip
import io
import tarfile
import tempfile
from pathlib import Path

from cluster.digest import digest_of
from tests.doubles.commands import make_root
from tests.doubles.registry import Image, Layer, build_image, build_layer


def shell_image(words: str) -> Image:
    """Make an image of three layers with a shell, ``/etc/passwd`` and *words* in ``/words``.

    With other words, every layer is another one: no farm has seen it.
    """
    return build_image(
        [build_layer({"first": words.encode()}), _commands(words), build_layer({"words": words.encode()})], label=words
    )


def _commands(words: str) -> Layer:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("commands-for")
        entry.size = len(words.encode())
        tar.addfile(entry, io.BytesIO(words.encode()))
        for name, data, mode, kind in _root():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.type = len(data), mode, kind
            tar.addfile(entry, io.BytesIO(data))
    data = gzip.compress(out.getvalue(), compresslevel=1, mtime=0)
    return Layer("application/vnd.oci.image.layer.v1.tar+gzip", data, digest_of(out.getvalue()))


@functools.lru_cache(maxsize=1)
def _root() -> list[tuple[str, bytes, int, bytes]]:
    """Return the files and directories of the root, each directory before what is in it."""
    with tempfile.TemporaryDirectory(prefix="lf-shell-image-") as work:
        root = make_root(Path(work))
        found = []
        for path in sorted(root.rglob("*")):
            name, mode = str(path.relative_to(root)), path.stat().st_mode & 0o7777
            if path.is_dir():
                found.append((name, b"", mode, tarfile.DIRTYPE))
            else:
                found.append((name, path.read_bytes(), mode, tarfile.REGTYPE))
        return found
