"""A job as one page: when what was done where, what it waited for, and where its bytes came from.

Made of the job's events and its graph alone, so that it is the same whoever makes it, and whenever. The page needs
nothing but itself: no script, no style, no picture from elsewhere.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from cluster.digest import Digest
from cluster.job import VertexState
from cluster.progress import LayerPhase
from lazyfarm.cli.human import duration, short, size
from lazyfarm.cli.job_progress import error_document
from lazyfarm.cli.job_view import JobView, LayerView, VertexView, last_words

if TYPE_CHECKING:
    from cluster.graph import Definition
    from cluster.job import JobRecord

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Layers that the page lists.
_SLOWEST = 20
#: Where layers move that no node has: between registries and the content store.
_FARM = "farm"
#: What a moved layer came from nowhere: it was there, or another's work was waited for.
_AVOIDED = {LayerPhase.PRESENT: "already in the farm", LayerPhase.JOINED: "fetched for somebody else at the time"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something that took time, on a lane of the timeline."""

    #: ``run``, ``fetch``, ``extract``, ``push``.
    work: str
    label: str
    began_s: float
    ended_s: float
    is_critical: bool = False

    @property
    def seconds(self) -> float:
        """Return how long it took."""
        return self.ended_s - self.began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A node, or the farm as a whole: rows of bars that don't overlap."""

    name: str
    rows: tuple[tuple[Bar, ...], ...]


def critical_path(view: JobView, definition: Definition) -> list[VertexView]:
    """Return the vertices that the job's end waited for, the first one first.

    From the target that ended last down, each time to the input that ended last: had any of them been quicker, the
    job would have been. What an image's layers did after a step had begun, for another one, that step waited for not.
    """
    found: list[VertexView] = []
    wanted: Sequence[Digest | None] = definition.targets
    until_s = math.inf
    while True:
        ends = {
            digest: end_s
            for digest in wanted
            if digest in view.vertices and (end_s := _ended_s(view.vertices[digest], until_s)) is not None
        }
        if not ends:
            return found[::-1]
        latest = view.vertices[max(ends, key=ends.__getitem__)]
        found.append(latest)
        wanted = definition.vertices[latest.digest].inputs
        if latest.started_wall_s is not None:
            until_s = min(until_s, latest.started_wall_s)


def timeline(view: JobView, critical: Iterable[VertexView]) -> list[Lane]:
    """Return the lanes of a job: the farm's own first, then each node's."""
    marked = {vertex.digest for vertex in critical}
    began_s = view.began_wall_s or 0.0
    end_s = view.until_wall_s()
    bars: dict[str, list[Bar]] = {}
    for vertex in view.vertices.values():
        if vertex.started_wall_s is not None and vertex.state is not VertexState.CACHED:
            ran = Bar(
                work="run",
                label=vertex.label,
                began_s=vertex.started_wall_s - began_s,
                ended_s=(end_s if vertex.ended_wall_s is None else vertex.ended_wall_s) - began_s,
                is_critical=vertex.digest in marked,
            )
            bars.setdefault(vertex.node or _FARM, []).append(ran)
        for layer in _moved(vertex):
            moved = Bar(
                work=layer.work,
                label=f"{layer.work} {short(layer.subject)} ({size(layer.item.total_bytes)}) for {vertex.label}",
                began_s=layer.began_wall_s - began_s,
                ended_s=(end_s if layer.ended_wall_s is None else layer.ended_wall_s) - began_s,
                is_critical=vertex.digest in marked,
            )
            bars.setdefault(layer.node or _FARM, []).append(moved)
    names = sorted(bars, key=lambda name: (name != _FARM, name))
    return [Lane(name=name, rows=_rows(bars[name])) for name in names]


def bytes_by_source(view: JobView) -> dict[str, int]:
    """Return how many bytes of layers were fetched from where, and how many were not, and why."""
    found: Counter[str] = Counter()
    for vertex in view.vertices.values():
        for layer in vertex.layers.values():
            if layer.work == "fetch" and layer.item.phase.is_end:
                source = _AVOIDED.get(layer.item.phase) or layer.item.detail or layer.item.phase.value
                found[source] += layer.item.total_bytes
    return dict(found.most_common())


def page(record: JobRecord, targets: Sequence[str], view: JobView, definition: Definition | None) -> str:
    """Return the page of a job; *definition* is None where it is not known any more, and then no path is told."""
    # A tenth of a second that other commands are spared.
    from jinja2 import Environment  # noqa: PLC0415

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("lazyfarm.cli").joinpath("job_report.html").read_text()
    )
    critical = critical_path(view, definition) if definition is not None else []
    end_s = view.until_wall_s()
    took_s = max(end_s - (view.began_wall_s or end_s), 0.0)
    failed = view.failed
    sources = bytes_by_source(view)
    began_s = view.began_wall_s or end_s
    return template.render(
        record=record,
        targets=targets,
        view=view,
        error=error_document(record.error),
        last_words=last_words(failed) if failed is not None else [],
        failed=failed,
        took_s=took_s,
        end_s=end_s,
        states=Counter(vertex.state.value for vertex in view.vertices.values()),
        critical=[(vertex, *(at_s - began_s for at_s in _span_s(vertex, end_s))) for vertex in critical],
        submitted=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.created_wall_s)),
        moved_bytes=sum(count for source, count in sources.items() if source not in _AVOIDED.values()),
        avoided_bytes=sum(sources.get(source, 0) for source in _AVOIDED.values()),
        lanes=timeline(view, critical),
        sources=sources,
        slowest=_slowest(view, end_s),
        duration=duration,
        named=_named,
        short=short,
        size=size,
    )


def _ended_s(vertex: VertexView, until_s: float) -> float | None:
    """Return when a vertex and its layers had ended, as far as that was by *until_s*; None: it has not ended."""
    if vertex.ended_wall_s is None:
        return None
    moved = [layer.ended_wall_s for layer in _moved(vertex) if layer.ended_wall_s is not None]
    return max([vertex.ended_wall_s, *(end_s for end_s in moved if end_s <= until_s)])


def _span_s(vertex: VertexView, end_s: float) -> tuple[float, float]:
    """Return when a vertex or its first layer began, and when the last one ended."""
    layers = [*_moved(vertex)]
    began = [layer.began_wall_s for layer in layers]
    began += [vertex.started_wall_s] if vertex.started_wall_s is not None else []
    ended = [end_s if layer.ended_wall_s is None else layer.ended_wall_s for layer in layers]
    ended.append(end_s if vertex.ended_wall_s is None else vertex.ended_wall_s)
    return min(began, default=ended[-1]), max(ended)


def _named(label: str) -> str:
    """Return what a step is called, its digests cut: a line that is mostly one can't be read."""
    return _DIGEST.sub(lambda found: short(found[0]), label)


def _moved(vertex: VertexView) -> Iterable[LayerView]:
    """Yield the layers that took time."""
    return (layer for layer in vertex.layers.values() if layer.item.phase is not LayerPhase.PRESENT)


def _rows(bars: Iterable[Bar]) -> tuple[tuple[Bar, ...], ...]:
    """Lay bars out in as few rows as there are at once: each goes to the first row that is free when it begins."""
    rows: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.began_s, bar.ended_s)):
        free = next((row for row in rows if row[-1].ended_s <= bar.began_s), None)
        if free is None:
            rows.append([bar])
        else:
            free.append(bar)
    return tuple(map(tuple, rows))


def _slowest(view: JobView, end_s: float) -> list[tuple[LayerView, VertexView, float]]:
    """Return the layers that took longest, with whose they are and the seconds they took."""
    found = [
        (layer, vertex, (end_s if layer.ended_wall_s is None else layer.ended_wall_s) - layer.began_wall_s)
        for vertex in view.vertices.values()
        for layer in _moved(vertex)
    ]
    return sorted(found, key=lambda each: -each[2])[:_SLOWEST]
