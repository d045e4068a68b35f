"""A job as the page shows it, vertex by vertex, and what of it has changed since it was last shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.digest import Digest
from cluster.errors import ClusterError
from cluster.graph import Definition, Vertex
from cluster.job import JobEnded, JobEvent, JobState, JobWarning, VertexState
from cluster.progress import LayerPhase
from lazyfarm.cli.human import short
from lazyfarm.cli.job_view import JobView, LayerView, LogLine, VertexView, last_words, read_error
from lazyfarm.web.graph import Layout, Place, lay_out

#: Lines that are shown of what one vertex said; the command line has them all.
LOG_LINES = 5000
_ID_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownVertex:
    """A vertex as it is at one moment."""

    #: Of its elements on the page.
    id: str
    digest: Digest
    label: str
    #: ``image``, ``run`` …; "" where the definition can't be read.
    kind: str
    #: What is shown for its state: see :func:`_shown_state`.
    state: str
    #: Where it runs, or ran last; "" for what runs on no node.
    node: str
    #: Until now, and whether that goes on.
    busy_s: float
    is_busy: bool
    layers: tuple[LayerView, ...]
    #: What it said last: while it runs, and where it failed.
    lines: tuple[str, ...]
    error: ClusterError | None
    place: Place | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownJob:
    """A job as a whole, at one moment."""

    state: JobState
    done: int
    total: int
    elapsed_s: float
    fetched_bytes: int
    error: ClusterError | None
    warnings: tuple[str, ...]


@dataclass(slots=True)
class JobStory:
    """What a job's events have told.

    Args:
        definition: What is built; None where it can't be read: then there is no graph, and vertices have no kinds.
        watched: The vertex whose log is wanted; None: no log is kept.
    """

    definition: Definition | None
    watched: Digest | None = None
    #: Events that were taken.
    count: int = 0
    view: JobView = field(default_factory=JobView)
    layout: Layout = field(init=False)
    #: What the watched vertex said.
    log: deque[LogLine] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    log_lines: int = 0
    _dirty: dict[Digest, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vertices: Mapping[Digest, Vertex] = {} if self.definition is None else self.definition.vertices
        order = () if self.definition is None else self.definition.order
        self.layout = lay_out({digest: [one for one in vertices[digest].inputs if one] for digest in order})
        for digest in order:
            self.view.vertices[digest] = VertexView(digest=digest, name=self._name(digest))

    def take(self, events: Iterable[JobEvent]) -> list[LogLine]:
        """Take events; return the lines that the watched vertex said."""
        said: list[LogLine] = []
        for event in events:
            self.count += 1
            if isinstance(event, JobEnded):  # which ends what is open
                self._dirty |= dict.fromkeys(one.digest for one in self.view.vertices.values() if one.is_open())
            lines = self.view.handle(event)
            if isinstance(event, JobEnded | JobWarning):
                continue
            self._dirty[event.vertex] = None
            if event.vertex == self.watched:
                said += lines
        self.log.extend(said)
        self.log_lines += len(said)
        return said

    @property
    def is_over(self) -> bool:
        """Tell whether nothing more comes."""
        return self.view.end is not None

    def forget_changes(self) -> None:
        """Take everything as shown."""
        self._dirty.clear()

    def changed(self, now_wall_s: float) -> list[ShownVertex]:
        """Return the vertices of which events told since this was last asked."""
        wanted, self._dirty = self._dirty, {}
        return [self.shown(digest, now_wall_s) for digest in wanted]

    def vertices(self, now_wall_s: float) -> list[ShownVertex]:
        """Return every vertex: those of the definition in its order, then those that only events know."""
        return [self.shown(digest, now_wall_s) for digest in self.view.vertices]

    def shown(self, digest: Digest, now_wall_s: float) -> ShownVertex:
        """Return one vertex."""
        vertex = self.view.vertices[digest]
        state = _shown_state(vertex)
        is_told = state in ("running", "failed")
        return ShownVertex(
            id=digest.partition(":")[2][:_ID_DIGITS],
            digest=digest,
            label=vertex.label,
            kind="" if self.definition is None or digest not in self.definition.vertices else self._kind(digest),
            state=state,
            node=vertex.node,
            busy_s=vertex.busy_s(now_wall_s),
            is_busy=vertex.is_busy,
            layers=tuple(vertex.layers.values()),
            lines=tuple(last_words(vertex)) if is_told else (),
            error=read_error(vertex.error),
            place=self.layout.places.get(digest),
        )

    def job(self, now_wall_s: float) -> ShownJob:
        """Return the job as a whole."""
        end, view = self.view.end, self.view
        until_s = view.until_wall_s(now_wall_s)
        layers = [layer for vertex in view.vertices.values() for layer in vertex.layers.values()]
        return ShownJob(
            state=end.state if end is not None else JobState.RUNNING if view.began_wall_s else JobState.QUEUED,
            done=view.done,
            total=len(view.vertices),
            elapsed_s=0.0 if view.began_wall_s is None else max(until_s - view.began_wall_s, 0.0),
            fetched_bytes=sum(layer.item.current_bytes for layer in layers if _is_fetched(layer)),
            error=None if end is None else read_error(end.error),
            warnings=tuple(view.warnings),
        )

    def _name(self, digest: Digest) -> str:
        name = "" if self.definition is None else self.definition.name(digest)
        return name or f"{self._kind(digest)} {short(digest)}"

    def _kind(self, digest: Digest) -> str:
        return "" if self.definition is None else self.definition.vertices[digest].kind


def _is_fetched(layer: LayerView) -> bool:
    """Tell whether a layer came from its registry for this job's sake, or comes now."""
    return layer.work == "fetch" and layer.item.phase in (LayerPhase.FETCHING, LayerPhase.DONE)


def _shown_state(vertex: VertexView) -> str:
    """Return a vertex's state; one that has its result and for whose sake layers still move runs on."""
    return "running" if vertex.is_busy and vertex.state is not VertexState.FAILED else vertex.state.value
