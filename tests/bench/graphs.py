"""Build graphs that are made for measuring, and their shape, for a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lazyfarm.graph import State, merge, scratch

T = TypeVar("T")

#: Chains that a stage merges, files that each adds one by one, and files that are added to the merged ones.
_CHAINS, _FILES, _ON_TOP = 4, 11, 4
#: Vertices of a stage, with the one that copies it into the image.
_STAGE = _CHAINS * _FILES + 1 + _ON_TOP + 1


def stages(seed: str, vertices: int) -> State:
    """Return a graph as builds of many stages have them; for another seed, one with which it shares no vertex.

    No stage is more than sixteen steps deep; the image takes something from each, one after the other.

    Args:
        seed: Is written into every file.
        vertices: A multiple of 50.
    """
    return shape(
        scratch(),
        lambda below, name: below.mkfile(f"/{name}", f"{seed} {name}"),
        merge,
        lambda below, stage, name: below.copy(stage, "/*", f"/{name}/"),
        vertices=vertices,
    )


def shape(
    start: T,
    add: Callable[[T, str], T],
    merged: Callable[[Sequence[T]], T],
    copied: Callable[[T, T, str], T],
    *,
    vertices: int,
) -> T:
    """Put a graph of that shape together from steps of any kind, *start* under each of its chains; return its top."""

    def extended(below: T, name: str, files: int) -> T:
        for number in range(files):
            below = add(below, f"{name}-{number}")
        return below

    top = start
    for number in range(vertices // _STAGE):
        chains = [extended(start, f"{number}-{chain}", _FILES) for chain in range(_CHAINS)]
        stage = extended(merged(chains), f"{number}-top", _ON_TOP)
        top = copied(top, stage, f"stage-{number}")
    return top
