"""What a job's events have told so far, vertex by vertex: what renderers and ``lazyfarm jobs`` show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from cluster import wire
from cluster.digest import Digest
from cluster.errors import ClusterError, ProcessFailedError, WireError
from cluster.job import (
    JobEnded,
    JobEvent,
    JobState,
    JobWarning,
    LogStream,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    VertexState,
)
from cluster.progress import LayerPhase, ProgressItem
from lazyfarm.cli.human import short
from lazyfarm.cli.terminal import one_line, visible

#: Lines that are kept of what a vertex said, for its display and for when it fails.
TAIL_LINES = 10
#: A line that doesn't end is cut here, so that nothing grows without bound.
_MAX_LINE_CHARS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line of what a vertex's command said, without its end."""

    #: Since the vertex began to run.
    at_s: float
    text: str


@dataclass(slots=True, kw_only=True)
class LayerView:
    """A layer that moves, or is extracted on a node, for a vertex."""

    #: ``fetch``, ``extract``, ``push``.
    work: str
    #: A blob's digest; of an extract, the chain ID.
    subject: str
    #: Where it is extracted; "" elsewhere.
    node: str
    item: ProgressItem
    began_wall_s: float
    ended_wall_s: float | None = None

    @property
    def is_moving(self) -> bool:
        """Tell whether it has not ended."""
        return self.ended_wall_s is None


@dataclass(slots=True, kw_only=True)
class VertexView:
    """A vertex, as its last events left it."""

    digest: Digest
    name: str
    state: VertexState = VertexState.WAITING
    #: From 1, in the order in which vertices are first seen to do something; 0: it has only waited.
    number: int = 0
    #: Payload, empty where it has not failed.
    error: bytes = b""
    #: When it last began to run, and when it ended; None: not yet, or never.
    started_wall_s: float | None = None
    ended_wall_s: float | None = None
    #: Where it runs, or ran last; "" for what runs on no node.
    node: str = ""
    #: In the order in which they were first heard of.
    layers: dict[str, LayerView] = field(default_factory=dict)
    #: The last lines that its command said.
    tail: deque[LogLine] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    #: Some of what it said is missing.
    is_cut: bool = False
    _moving: int = 0
    _busy_s: float = 0.0
    _busy_since_wall_s: float | None = None
    _partial: dict[LogStream, tuple[float, str]] = field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        """Tell whether it runs, or some layer moves for its sake: an image may have been found long before that."""
        return self.state is VertexState.RUNNING or self._moving > 0

    def busy_s(self, now_wall_s: float) -> float:
        """Return for how long it was busy until *now_wall_s*, by the store's clock."""
        going = 0.0 if self._busy_since_wall_s is None else max(now_wall_s - self._busy_since_wall_s, 0.0)
        return self._busy_s + going

    @property
    def label(self) -> str:
        """Return what people call it, in one line."""
        return one_line(self.name) or short(self.digest)

    def settle(self, wall_s: float) -> None:
        """Take the time at which it became busy, or no longer is."""
        if self.is_busy and self._busy_since_wall_s is None:
            self._busy_since_wall_s = wall_s
        elif not self.is_busy and self._busy_since_wall_s is not None:
            self._busy_s = self.busy_s(wall_s)
            self._busy_since_wall_s = None

    def is_open(self) -> bool:
        """Tell whether more of it would be told, if its job went on."""
        return not self.state.is_end or self._moving > 0

    def leave(self, wall_s: float) -> None:
        """Take it that its job ended before it did: nothing more of it is told, whoever still stops what it began."""
        if not self.state.is_end:
            self.state = VertexState.CANCELLED
            self.ended_wall_s = wall_s
        for layer in [layer for layer in self.layers.values() if layer.is_moving]:
            self.add_layer(replace(layer.item, phase=LayerPhase.CANCELLED), wall_s)
        self.settle(wall_s)

    def add_layer(self, item: ProgressItem, wall_s: float) -> LayerView:
        """Take a layer's last state."""
        layer = self.layers.get(item.item)
        if layer is None:
            work, node, subject = split_item(item.item)
            layer = LayerView(work=work, subject=subject, node=node, item=item, began_wall_s=wall_s)
            self.layers[item.item] = layer
            self._moving += 1
        elif not layer.is_moving and not item.phase.is_end:
            layer.began_wall_s, layer.ended_wall_s = wall_s, None  # again: for another node's sake, say
            self._moving += 1
        layer.item = item
        if item.phase.is_end and layer.is_moving:
            layer.ended_wall_s = wall_s
            self._moving -= 1
        return layer

    def add_log(self, stream: LogStream, text: str, wall_s: float) -> list[LogLine]:
        """Take a chunk of what its command said; return the lines that it completes."""
        at_s = max(wall_s - (wall_s if self.started_wall_s is None else self.started_wall_s), 0.0)
        began_s, before = self._partial.pop(stream, (at_s, ""))
        *whole, rest = (before + text).split("\n")
        if len(rest) >= _MAX_LINE_CHARS:
            whole.append(rest)
            rest = ""
        lines = [
            LogLine(at_s=at_s if index else began_s, text=line.removesuffix("\r")) for index, line in enumerate(whole)
        ]
        if rest:
            self._partial[stream] = (at_s if whole else began_s, rest)
        self.tail.extend(lines)
        return lines

    def end_logs(self) -> list[LogLine]:
        """Return what was said and not ended with a newline: nothing more comes."""
        lines = [LogLine(at_s=at_s, text=text) for at_s, text in self._partial.values()]
        self._partial.clear()
        self.tail.extend(lines)
        return lines


class JobView:
    """A job's vertices, by its events in the order of its stream."""

    def __init__(self) -> None:
        #: In the order in which they were first heard of.
        self.vertices: dict[Digest, VertexView] = {}
        self.end: JobEnded | None = None
        #: What is not as it was asked for, of the job as a whole.
        self.warnings: list[str] = []
        self.began_wall_s: float | None = None
        #: When the last event was told.
        self.last_wall_s = 0.0
        self._numbered = 0

    @property
    def listed(self) -> list[VertexView]:
        """The vertices that did something, in the order of their numbers."""
        return sorted((vertex for vertex in self.vertices.values() if vertex.number), key=lambda vertex: vertex.number)

    @property
    def failed(self) -> VertexView | None:
        """The vertex that failed the job."""
        return next((vertex for vertex in self.vertices.values() if vertex.state is VertexState.FAILED), None)

    def until_wall_s(self, now_wall_s: float = 0.0) -> float:
        """Return until when the job is told of: its end, or else *now_wall_s* or its last event, whichever is later."""
        return self.end.wall_s if self.end is not None else max(now_wall_s, self.last_wall_s)

    @property
    def done(self) -> int:
        """How many vertices have their result."""
        return sum(vertex.state in _WITH_RESULT for vertex in self.vertices.values())

    def handle(self, event: JobEvent) -> list[LogLine]:
        """Take an event; return the lines that it completes of what its vertex said."""
        self.last_wall_s = max(self.last_wall_s, event.wall_s)
        if self.began_wall_s is None:
            self.began_wall_s = event.wall_s
        if isinstance(event, JobEnded):
            self._end(event)
            return []
        if isinstance(event, JobWarning):
            self.warnings.append(event.text)
            return []
        vertex = self.vertices.get(event.vertex)
        if vertex is None:
            vertex = self.vertices[event.vertex] = VertexView(digest=event.vertex, name="")
        lines: list[LogLine] = []
        match event:
            case VertexEvent():
                lines = self._change(vertex, event)
            case VertexLog():
                lines = vertex.add_log(event.stream, event.text, event.wall_s)
                self._number(vertex)
            case VertexLogDropped():
                vertex.is_cut = True
                lines = vertex.end_logs()
            case VertexLayers():
                layer = vertex.add_layer(event.item, event.wall_s)
                # A layer that was there all along is nothing to be seen.
                if layer.item.phase not in (LayerPhase.WAITING, LayerPhase.PRESENT):
                    self._number(vertex)
        vertex.settle(event.wall_s)
        return lines

    def _end(self, event: JobEnded) -> None:
        self.end = event
        if event.state is not JobState.DONE:
            for vertex in self.vertices.values():
                vertex.leave(event.wall_s)

    def _change(self, vertex: VertexView, event: VertexEvent) -> list[LogLine]:
        vertex.name = event.name or vertex.name
        if vertex.state.is_end and event.state is not VertexState.RUNNING:
            # A scheduler that takes a job over goes through it again, and finds what is done in the cache.
            return []
        vertex.state, vertex.error = event.state, event.error
        if event.state is VertexState.RUNNING:
            vertex.started_wall_s, vertex.ended_wall_s = event.wall_s, None
            vertex.node = event.node
        elif event.state.is_end:
            vertex.ended_wall_s = event.wall_s
        if event.state not in (VertexState.WAITING, VertexState.CANCELLED):
            self._number(vertex)
        return vertex.end_logs() if event.state.is_end else []

    def _number(self, vertex: VertexView) -> None:
        if not vertex.number:
            self._numbered += 1
            vertex.number = self._numbered


_WITH_RESULT = frozenset({VertexState.CACHED, VertexState.COMPLETED})


def split_item(item: str) -> tuple[str, str, str]:
    """Return a progress item's work, node and subject."""
    work, _, subject = item.partition(":")
    if work != "extract":
        return work, "", subject
    node, _, chain = subject.partition(":")
    return work, node, chain


def read_error(payload: bytes) -> ClusterError | None:
    """Return the error in a payload, None where it is empty; the error of reading it, where it can't be read."""
    if not payload:
        return None
    try:
        return wire.decode_error(payload)
    except WireError as exc:
        return exc


def last_words(vertex: VertexView) -> list[str]:
    """Return what a vertex that failed said last, each line with its time, as far as that is known."""
    if vertex.tail:
        return [f"{at(line.at_s)} {visible(line.text)}" for line in vertex.tail]
    error = read_error(vertex.error)
    return [visible(line) for line in error.last_lines] if isinstance(error, ProcessFailedError) else []


def at(seconds: float) -> str:
    """Return a moment of a vertex's run, in four digits: ``0.350``, ``12.35``."""
    whole = len(str(int(seconds)))
    return f"{seconds:.{max(4 - whole, 1)}f}"


def repeat(vertex: VertexView) -> list[str]:
    """Return the last that a vertex said before it failed, to stand where people look first: at the end."""
    said = last_words(vertex)
    return ["------", f" > {vertex.label}:", *(line.expandtabs() for line in said), "------"] if said else []
