"""Where a build graph's vertices are drawn: in columns, each to the right of all that it is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.digest import Digest

#: Of a vertex, and between two, in the picture's units (pixels).
WIDTH, HEIGHT = 190, 26
_GAP_X, _GAP_Y = 46, 8
_MARGIN = 6


class Place(NamedTuple):
    """The upper left corner of a vertex."""

    x: int
    y: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A drawn graph."""

    places: Mapping[Digest, Place]
    #: Every edge, as the path of an SVG.
    edges: str
    width: int
    height: int


def lay_out(inputs: Mapping[Digest, Sequence[Digest]]) -> Layout:
    """Place each vertex; *inputs* has each after those it is over.

    Columns by longest path, and in each the order of the mean of what a vertex is over: the first two steps of
    Sugiyama's method, in one sweep, which draws a thousand vertices in some milliseconds.
    """
    columns: dict[int, list[Digest]] = {}
    depth: dict[Digest, int] = {}
    for digest, below in inputs.items():
        depth[digest] = 1 + max((depth[one] for one in below), default=-1)
        columns.setdefault(depth[digest], []).append(digest)
    rows: dict[Digest, float] = {}
    for _, column in sorted(columns.items()):
        # sort() keeps the order of equals: what stands on nothing stays in the definition's.
        column.sort(key=lambda one: _mean([rows[below] for below in inputs[one]]))
        rows |= {digest: row for row, digest in enumerate(column)}
    places = {
        digest: Place(
            _MARGIN + depth[digest] * (WIDTH + _GAP_X),
            _MARGIN + round(rows[digest] * (HEIGHT + _GAP_Y)),
        )
        for digest in inputs
    }
    drawn = dict.fromkeys((below, digest) for digest, all_below in inputs.items() for below in all_below)
    tallest = max((len(column) for column in columns.values()), default=0)
    return Layout(
        places=places,
        edges=" ".join(_edge(places[below], places[above]) for below, above in drawn),
        width=2 * _MARGIN + len(columns) * (WIDTH + _GAP_X) - _GAP_X * bool(columns),
        height=2 * _MARGIN + tallest * (HEIGHT + _GAP_Y) - _GAP_Y * bool(columns),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _edge(below: Place, above: Place) -> str:
    x, y = below.x + WIDTH, below.y + HEIGHT // 2
    end_x, end_y = above.x, above.y + HEIGHT // 2
    bend = _GAP_X // 2
    return f"M{x} {y}C{x + bend} {y} {end_x - bend} {end_y} {end_x} {end_y}"
