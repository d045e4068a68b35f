"""What was moved and what was avoided over time, as bars."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.traffic import Traffic
from storage.traffic import SLOT_S

WIDTH, HEIGHT = 960, 180
#: Height of the plot of joined requests, which are no bytes and have a scale of their own.
JOINED_HEIGHT = 60
_GAP = 1.0
#: Most bars that can be told apart.
_MOST_BARS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a bar, drawn from *y* down."""

    name: str
    y: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Some slots of time."""

    began_wall_s: int
    x: float
    width: float
    traffic: Traffic
    parts: tuple[Part, ...]
    #: The requests that joined another's, in the plot below; None where there were none.
    joined: Part | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Bars, with what the highest stands for."""

    bars: tuple[Bar, ...]
    #: Bytes at the top.
    top: int
    #: Requests at the top of the plot below.
    top_joined: int
    seconds_a_bar: int
    #: Where on the time axis something is written, and what.
    marks: tuple[tuple[float, str], ...]


def draw(slots: Sequence[tuple[int, Traffic]]) -> Plot:
    """Draw slots of time that follow one another."""
    each = -(-len(slots) // _MOST_BARS) or 1
    groups = [slots[start : start + each] for start in range(0, len(slots), each)]
    sums = [(group[0][0], sum((traffic for _, traffic in group), Traffic())) for group in groups]
    top = max((_moved(traffic) + traffic.avoided_bytes for _, traffic in sums), default=0) or 1
    top_joined = max((traffic.joined for _, traffic in sums), default=0) or 1
    step = WIDTH / max(len(sums), 1)
    bars = tuple(
        Bar(
            began_wall_s=began,
            x=round(index * step, 2),
            width=round(max(step - _GAP, 1.0), 2),
            traffic=traffic,
            parts=_stacked(_figures(traffic), top, HEIGHT),
            joined=next(iter(_stacked((("joined", traffic.joined),), top_joined, JOINED_HEIGHT)), None),
        )
        for index, (began, traffic) in enumerate(sums)
    )
    marked = range(0, len(sums) - len(sums) // 12, max(len(sums) // 6, 1))  # what is written at the very end is cut off
    form = "%H:%M" if len(slots) * SLOT_S <= 2 * 86400 else "%b %d"
    return Plot(
        bars=bars,
        top=top,
        top_joined=top_joined,
        seconds_a_bar=each * SLOT_S,
        marks=tuple((round(index * step, 2), time.strftime(form, time.gmtime(sums[index][0]))) for index in marked),
    )


def _moved(traffic: Traffic) -> int:
    return traffic.fetched_bytes + traffic.pushed_bytes


def _figures(traffic: Traffic) -> tuple[tuple[str, int], ...]:
    return (
        ("moved", _moved(traffic)),
        ("not-fetched", traffic.not_fetched_bytes),
        ("not-pushed", traffic.not_pushed_bytes),
    )


def _stacked(figures: Sequence[tuple[str, int]], top: int, of_height: int) -> tuple[Part, ...]:
    found: list[Part] = []
    y = float(of_height)
    for name, figure in figures:
        if figure:
            height = max(of_height * figure / top, 1.0)  # seen, however little it is
            y -= height
            found.append(Part(name=name, y=round(max(y, 0.0), 2), height=round(height, 2)))
    return tuple(found)
