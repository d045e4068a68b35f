"""An image with a shell that runs from the image's own root: the machine's, with what it links to."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cluster.digest import digest_of
from tests.doubles.layers import Item, directory, file, layer_tar
from tests.doubles.registry import Image, Layer, build_image

_SHELL = Path("/bin/sh")
_LIBRARY = re.compile(r"(/\S+) \(0x")


def program_image(words: str) -> Image:
    """Make an image of three layers whose ``/srv/hello`` is a shell script that says *words*.

    With other words, every layer is another one.
    """
    libraries = [Path(found) for found in _LIBRARY.findall(_ldd())]
    script = file("srv/hello", f"#!/bin/sh\necho {words}\n".encode(), mode=0o755)
    return build_image(
        [
            _layer(file("libraries-for", words.encode()), *_files(libraries)),
            _layer(file("shell-for", words.encode()), *_files([_SHELL])),
            _layer(directory("srv"), script),
        ]
    )


def _ldd() -> str:
    return subprocess.run(["ldd", str(_SHELL)], capture_output=True, text=True, check=True).stdout


def _files(paths: list[Path]) -> Iterator[Item]:
    """Yield each file under the name the loader looks for, whatever it is linked to here, and its directories."""
    made: set[Path] = set()
    for path in paths:
        for parent in reversed(path.parents):
            if parent != Path("/") and parent not in made:
                made.add(parent)
                yield directory(str(parent)[1:])
        yield file(str(path)[1:], path.read_bytes(), mode=0o755)


def _layer(*items: Item) -> Layer:
    tar = layer_tar(*items)
    data = gzip.compress(tar, compresslevel=1, mtime=0)
    return Layer("application/vnd.oci.image.layer.v1.tar+gzip", data, digest_of(tar))
