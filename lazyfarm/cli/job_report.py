"""A job as one page: when what was done where, what it waited for, and where its bytes came from.

Made of the job's events and its graph alone, so that it is the same whoever makes it, and whenever. The page needs
nothing but itself: no script, no style, no picture from elsewhere.
"""

from __future__ import annotations

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
    job would have been.
    """
    ends = {digest: _ended_s(vertex) for digest, vertex in view.vertices.items()}
    found: list[VertexView] = []
    wanted: Sequence[Digest | None] = definition.targets
    while True:
        below = [digest for digest in wanted if digest is not None and ends.get(digest) is not None]
        if not below:
            return found[::-1]
        latest = max(below, key=lambda digest: ends[digest] or 0.0)
        found.append(view.vertices[latest])
        wanted = definition.vertices[latest].inputs


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
        critical=critical,
        lanes=timeline(view, critical),
        sources=bytes_by_source(view),
        slowest=_slowest(view, end_s),
        duration=duration,
        short=short,
        size=size,
    )


def _ended_s(vertex: VertexView) -> float | None:
    moved = [layer.ended_wall_s for layer in _moved(vertex) if layer.ended_wall_s is not None]
    known = [*moved, *([vertex.ended_wall_s] if vertex.ended_wall_s is not None else [])]
    return max(known, default=None)


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
