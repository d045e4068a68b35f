"""What the solver decides: which vertices are looked up, loaded or run, when, and on whose behalf.

After BuildKit's scheduler by its meaning, not by its form: there each edge asks its inputs through pipes,
here one state knows them all. An *edge* is the use that live jobs make of a vertex: jobs with the same vertex
share its edge, and so its run.

A job goes through its definition once for cache maps; from then on every key that follows from the
definition alone is known, and the targets are looked up. Only where that misses are results of inputs wanted:
a cached target costs one lookup, whatever is below it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import assert_never

from cluster.digest import Digest, digest_of
from cluster.errors import ClusterError, InternalError, InvalidTransitionError
from cluster.graph import Definition, Vertex
from cluster.job import JobId, VertexState
from cluster.solver.cache_opts import collect_opts
from cluster.solver.keys import fast_keys, slow_keys
from cluster.solver.values import (
    SCRATCH_KEY,
    Answer,
    Began,
    CacheMap,
    CacheRecord,
    ComputeContentKey,
    ContentKeyed,
    EndJob,
    Event,
    Exportable,
    Failed,
    Found,
    GetCacheMap,
    HoldId,
    Instruction,
    JobCancelled,
    JobDone,
    JobFailed,
    JobOutcome,
    JobStopped,
    JobSubmitted,
    Keep,
    Kept,
    Load,
    Loaded,
    LookUp,
    Mapped,
    NotLoadable,
    Publish,
    Ran,
    Release,
    Report,
    Result,
    Run,
    Stop,
    TaskId,
)


class JobPhase(Enum):
    """The lifecycle of a job: in this order, to its end from any of them; then it is not remembered."""

    #: Its vertices are asked for their cache maps, for this job: that proves its access, and gives its cache opts.
    MAPPING = "mapping"
    #: Its targets are wanted.
    SOLVING = "solving"
    #: Its targets are there, and are being held for it.
    KEEPING = "keeping"
    #: Never stored.
    ENDED = "ended"


class EdgePhase(Enum):
    """The lifecycle of a vertex that live jobs have."""

    #: Nobody has wanted its result, or nobody wants it any more.
    KNOWN = "known"
    #: Its keys are looked up.
    LOOKING = "looking"
    #: A record that was found is tried.
    LOADING = "loading"
    #: Results are awaited of those inputs whose content may be part of a key.
    AWAITING_CONTENT = "awaiting-content"
    #: The content that is used of these inputs is being digested.
    DIGESTING = "digesting"
    #: Results of all inputs are awaited.
    AWAITING_INPUTS = "awaiting-inputs"
    #: To be run as soon as it is its turn.
    READY = "ready"
    #: It is being run, but its inputs are not yet where that is.
    STARTING = "starting"
    RUNNING = "running"
    #: Its result is there, and stays for as long as the edge does.
    DONE = "done"


_ONWARD = frozenset(
    {
        EdgePhase.LOOKING,
        EdgePhase.AWAITING_CONTENT,
        EdgePhase.DIGESTING,
        EdgePhase.AWAITING_INPUTS,
        EdgePhase.READY,
        EdgePhase.KNOWN,
    }
)

_AFTER_RUN = frozenset({EdgePhase.DONE, EdgePhase.READY, EdgePhase.LOOKING, EdgePhase.KNOWN})

#: Every legal move. What is not listed can't happen; an edge without jobs is forgotten in any phase.
MOVES: Mapping[EdgePhase, frozenset[EdgePhase]] = MappingProxyType(
    {
        EdgePhase.KNOWN: _ONWARD,
        EdgePhase.LOOKING: _ONWARD | {EdgePhase.LOADING},
        EdgePhase.LOADING: _ONWARD | {EdgePhase.LOADING, EdgePhase.DONE},
        EdgePhase.AWAITING_CONTENT: frozenset({EdgePhase.LOOKING, EdgePhase.DIGESTING, EdgePhase.KNOWN}),
        EdgePhase.DIGESTING: _ONWARD - {EdgePhase.AWAITING_CONTENT},
        EdgePhase.AWAITING_INPUTS: frozenset({EdgePhase.LOOKING, EdgePhase.READY, EdgePhase.KNOWN}),
        EdgePhase.READY: frozenset({EdgePhase.STARTING}),
        EdgePhase.STARTING: _AFTER_RUN | {EdgePhase.RUNNING},
        EdgePhase.RUNNING: _AFTER_RUN,
        EdgePhase.DONE: frozenset(),
    }
)


@dataclass(slots=True, eq=False)
class _Job:
    """One job that has not ended."""

    id: JobId
    definition: Definition
    #: It shares no edge with other jobs.
    is_apart: bool = False
    phase: JobPhase = JobPhase.MAPPING
    #: All its vertices' edges, by the vertices' digests.
    edges: dict[Digest, _Edge] = field(default_factory=dict)
    #: Vertices that have no cache map of this job yet.
    unmapped: int = 0
    #: Cache opts that its vertices published, where there are any.
    opts: dict[Digest, Mapping[str, bytes]] = field(default_factory=dict)
    #: Targets without a result.
    missing: set[_Edge] = field(default_factory=set)
    #: Edges that have not ended for this job, and what was last told of each.
    open: dict[_Edge, VertexState | None] = field(default_factory=dict)
    #: Vertices on the longest path from each up to a target.
    heights: dict[_Edge, int] = field(default_factory=dict)
    #: A heap of (-height, number, edge). An edge may have left READY since.
    ready: list[tuple[int, int, _Edge]] = field(default_factory=list)
    #: Runs that were begun on its behalf and go on.
    running: int = 0
    #: What is under way for the job itself.
    tasks: set[TaskId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Edge:
    """A vertex, as all jobs that have it use it."""

    id: Digest
    vertex: Vertex
    #: The only job that may have it; None: any may.
    owner: JobId | None
    #: None: an empty filesystem. What has this edge has these, so they stay as long as it does.
    inputs: tuple[_Edge | None, ...]
    #: It is to run, whatever is cached.
    is_fresh: bool
    #: What is cached under its keys is not its result, since it or something below it runs afresh.
    supersedes: bool
    phase: EdgePhase = EdgePhase.KNOWN
    jobs: dict[JobId, _Job] = field(default_factory=dict)
    #: Those of the jobs that want its result, not only its keys; in the order in which they came to.
    wanted: dict[JobId, _Job] = field(default_factory=dict)
    #: The first that came, of whichever job.
    cache_map: CacheMap | None = None
    #: From that of the pure definition to that which rests on content most. Not empty once a job of it is SOLVING.
    keys: tuple[Digest, ...] = ()
    #: Those of the keys that rest on its own inputs' content.
    slow_keys: tuple[Digest, ...] = ()
    #: How many keys its inputs had when its own were made.
    keys_below: int = -1
    #: Keys that were looked up.
    tried: set[Digest] = field(default_factory=set)
    #: Records that are still to be tried, the next one last.
    records: list[CacheRecord] = field(default_factory=list)
    #: Content digests of slow inputs by index, as they come; complete once its phase is past DIGESTING.
    contents: dict[int, Digest] = field(default_factory=dict)
    has_contents: bool = False
    #: What it awaits while AWAITING_*, and what of that is still to come.
    awaited: tuple[_Edge, ...] = ()
    pending: int = 0
    #: Edges that await this one.
    waiters: dict[_Edge, None] = field(default_factory=dict)
    #: What is under way; several only while DIGESTING.
    tasks: set[TaskId] = field(default_factory=set)
    #: None until something may be held for it.
    hold: HoldId | None = None
    #: Where it runs, or ran last.
    node: str = ""
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class _Task:
    """Something that is under way, and its answer awaited."""

    #: On whose behalf.
    job: _Job
    #: None: for the job itself.
    edge: _Edge | None
    #: Which input, of a task that digests content.
    index: int
    is_run: bool
    #: Its failure is the job's own, whoever else has the edge.
    is_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverStatistics:
    """A snapshot of what is there now."""

    jobs: int
    #: Vertices of all jobs, each once.
    edges: int
    ready: int
    #: With those that were told to stop and have not ended.
    running: int
    #: All that is under way, stopping or not.
    tasks: int


class SolverState:
    """All jobs of one scheduler. Changed through :meth:`handle` only.

    The rules:

    - a vertex runs once for all jobs that have it, and only where no job's lookup finds it; but for a job that is
      built apart;
    - results of inputs are wanted only after a miss, keys of inputs never cost a lookup;
    - what is under way goes on for as long as any live job has the vertex: neither the end of the job that
      began it nor that of any other stops or repeats it;
    - an error ends the jobs that wanted the vertex; jobs that come later, or that had not come to want it,
      start afresh. Where the job that it was done for has gone meanwhile it may be that job's own error (a
      session that ended): it is done once more for one that is there;
    - a record that can't be loaded is a miss, and the next one is tried;
    - what depends on a vertex that runs afresh is not looked up under keys that it had before, unless
      the content that is used of it is what it was;
    - a vertex is told of as running only once its inputs are where it runs; until then it is waiting;
    - jobs take turns at running, the vertex with the longest way to a target first;
    - nothing is remembered of a job that has ended.

    Args:
        max_running: Most runs at once, > 0; those that were told to stop count until they have ended.
        max_running_per_job: Most runs at once on one job's behalf, > 0.
    """

    def __init__(self, *, max_running: int = 64, max_running_per_job: int = 32) -> None:
        self._max_running = max_running
        self._max_running_per_job = max_running_per_job
        self._jobs: dict[JobId, _Job] = {}
        #: By owner and ID.
        self._edges: dict[tuple[JobId | None, Digest], _Edge] = {}
        self._tasks: dict[TaskId, _Task] = {}
        #: Tasks that were told to stop; whatever they answer is their end.
        self._stopping: dict[TaskId, _Task] = {}
        self._running = 0
        #: Jobs that have something ready and may run it, in turn (a dict as an ordered set).
        self._turns: dict[JobId, _Job] = {}
        self._numbers = itertools.count(1)
        #: Work of the current event. Lists, not recursion: a graph may be as deep as it likes.
        self._wants: list[tuple[_Edge, _Job]] = []
        self._moving: deque[_Edge] = deque()
        self._instructions: list[Instruction] = []

    def handle(self, event: Event) -> list[Instruction]:
        """Apply *event* and return what must be done, in order.

        Raises:
            InvalidTransitionError: a job under the ID of one that goes on, an answer to nothing that is under
                way, or one of another kind.
        """
        match event:
            case JobSubmitted():
                self._submit(event)
            case JobCancelled():
                if (job := self._jobs.get(event.job)) is not None:
                    self._end(job, JobStopped())
            case Began(task, node):
                self._began(task, node)
            case _:
                self._answer(event)
        self._settle()
        instructions, self._instructions = self._instructions, []
        return instructions

    # -- questions ------------------------------------------------------------------------------------------------

    def has_job(self, job: JobId) -> bool:
        """Tell whether a job is there and has not ended."""
        return job in self._jobs

    def jobs(self) -> tuple[JobId, ...]:
        """Return the jobs that have not ended, in order of submission."""
        return tuple(self._jobs)

    def beneficiaries(self, task: TaskId) -> tuple[JobId, ...]:
        """Return the jobs that have the vertex of a task now, those that want its result first.

        Empty once the task is over, or was told to stop.
        """
        known = self._tasks.get(task)
        if known is None:
            return ()
        if known.edge is None:
            return (known.job.id,)
        return tuple(dict.fromkeys((*known.edge.wanted, *known.edge.jobs)))

    def vertex_of(self, task: TaskId) -> Digest | None:
        """Return the vertex that a task is done for; None for a job's own, and once it is over."""
        known = self._tasks.get(task)
        return None if known is None or known.edge is None else known.edge.vertex.digest

    def cache_opts(self, job: JobId, vertex: Digest, wanted: Sequence[str]) -> dict[str, bytes]:
        """Return what the job's vertices published of *wanted*, from *vertex* down; see :func:`collect_opts`."""
        known = self._jobs.get(job)
        return {} if known is None else collect_opts(known.definition.vertices, vertex, wanted, known.opts.get)

    def exportable(self, job: JobId) -> tuple[Exportable, ...]:
        """Return the vertices of a job that is KEEPING, each after its inputs; nothing in any other phase."""
        known = self._jobs.get(job)
        if known is None or known.phase is not JobPhase.KEEPING:
            return ()
        return tuple(
            Exportable(vertex=digest, keys=edge.keys, result=edge.result) for digest, edge in known.edges.items()
        )

    def phase(self, job: JobId, vertex: Digest) -> EdgePhase:
        """Return where a vertex of a live job stands."""
        return self._jobs[job].edges[vertex].phase

    def statistics(self) -> SolverStatistics:
        """Return a snapshot."""
        return SolverStatistics(
            jobs=len(self._jobs),
            edges=len(self._edges),
            ready=sum(edge.phase is EdgePhase.READY for edge in self._edges.values()),
            running=self._running,
            tasks=len(self._tasks) + len(self._stopping),
        )

    # -- events ---------------------------------------------------------------------------------------------------

    def _submit(self, event: JobSubmitted) -> None:
        if event.job in self._jobs:
            raise InvalidTransitionError(f"job {event.job}", self._jobs[event.job].phase.value, "JobSubmitted")
        definition = event.definition
        job = _Job(event.job, definition, event.is_apart)
        self._jobs[job.id] = job
        for digest in definition.order:
            edge = self._edge(definition.vertices[digest], job, digest in event.no_cache)
            job.edges[digest] = edge
            edge.jobs[job.id] = job
            job.open[edge] = None
        for edge in reversed(job.edges.values()):
            height = job.heights.setdefault(edge, 1)
            for below in edge.inputs:
                if below is not None:
                    job.heights[below] = max(job.heights.get(below, 1), height + 1)
        job.missing = {job.edges[target] for target in definition.targets}
        job.unmapped = len(job.edges)
        for edge in job.edges.values():
            self._instructions.append(GetCacheMap(self._begin(job, edge, is_own=True), job.id, edge.vertex))

    def _edge(self, vertex: Vertex, job: _Job, is_fresh: bool) -> _Edge:  # noqa: FBT001 - a field of the edge
        inputs = tuple(None if digest is None else job.edges[digest] for digest in vertex.inputs)
        edge_id = vertex.digest
        supersedes = is_fresh or any(edge is not None and edge.id != edge.vertex.digest for edge in inputs)
        if supersedes:
            # Not the edge of jobs that take what is cached; that of jobs which run the same vertices afresh.
            below = ("scratch" if edge is None else edge.id for edge in inputs)
            edge_id = digest_of("\n".join(("fresh" if is_fresh else "above", vertex.digest, *below)).encode())
        owner = job.id if job.is_apart else None
        edge = self._edges.get((owner, edge_id))
        if edge is None:
            edge = self._edges[owner, edge_id] = _Edge(edge_id, vertex, owner, inputs, is_fresh, supersedes)
        return edge

    def _answer(self, answer: Answer) -> None:
        if (stopped := self._stopping.pop(answer.task, None)) is not None:
            self._running -= stopped.is_run
            return
        task = self._tasks.pop(answer.task, None)
        if task is None:
            raise InvalidTransitionError(f"task {answer.task}", "over", type(answer).__name__)
        if task.is_run:
            self._running -= 1
            task.job.running -= 1
            self._take_turns(task.job)
        task.job.tasks.discard(answer.task)
        if task.edge is not None:
            task.edge.tasks.discard(answer.task)
        match answer, task.edge:
            case Failed(), _:
                self._failed(task, answer.error)
            case Kept(), None:
                self._end(task.job, JobDone(tuple(_result(edge) for edge in self._targets(task.job))))
            case Mapped(), _Edge() as edge:
                self._mapped(task.job, edge, answer.cache_map)
            case _, _Edge() as edge:
                self._step(edge, task, answer)
            case _:
                raise InvalidTransitionError(f"task {answer.task}", "a job's", type(answer).__name__)

    def _began(self, task_id: TaskId, node: str) -> None:
        task = self._tasks.get(task_id)
        if task is None or task.edge is None or not task.is_run or task.edge.phase is not EdgePhase.STARTING:
            return
        self._move(task.edge, EdgePhase.RUNNING)
        task.edge.node = node
        for job in task.edge.wanted.values():
            self._tell(job, task.edge, VertexState.RUNNING)

    def _step(self, edge: _Edge, task: _Task, answer: Answer) -> None:
        """Apply what a task has come to that was done for an edge."""
        match answer:
            case Found():
                edge.records = sorted(answer.records, key=lambda record: record.created_wall_s)
                self._load_next(edge)
            case Loaded():
                self._loaded(edge, answer.result)
            case NotLoadable():
                self._load_next(edge)
            case ContentKeyed():
                edge.contents[task.index] = answer.content
                if not edge.tasks:
                    edge.has_contents = True
                    edge.keys_below = -1  # there are more keys now
                    self._moving.append(edge)
            case Ran():
                self._done(edge, answer.result, VertexState.CACHED if answer.was_cached else VertexState.COMPLETED)
            case _:
                raise InvalidTransitionError(f"task {answer.task}", edge.phase.value, type(answer).__name__)

    def _mapped(self, job: _Job, edge: _Edge, cache_map: CacheMap) -> None:
        if edge.cache_map is None:
            edge.cache_map = cache_map
        if cache_map.opts:
            job.opts[edge.vertex.digest] = cache_map.opts
        job.unmapped -= 1
        if job.unmapped:
            return
        job.phase = JobPhase.SOLVING
        for known in job.edges.values():  # each after its inputs
            if not known.keys:
                self._make_keys(known)
        self._wants += [(target, job) for target in self._targets(job)]

    def _loaded(self, edge: _Edge, result: Result) -> None:
        edge.supersedes = False
        edge.records.clear()
        if len(edge.keys) > 1:
            # Whichever it was found under: the next build finds it under any at once.
            self._instructions.append(Publish(edge.keys, result))
        self._done(edge, result, VertexState.CACHED)

    def _failed(self, task: _Task, error: ClusterError) -> None:
        edge = task.edge
        if edge is None or task.is_own:
            self._end(task.job, JobFailed(error, None if edge is None else edge.vertex.digest))
            return
        if edge.phase is EdgePhase.LOADING:
            self._load_next(edge)
            return
        self._stop(edge.tasks)
        if not edge.has_contents:
            edge.contents.clear()
        if edge.wanted and edge.jobs.get(task.job.id) is not task.job:
            if edge.phase is EdgePhase.LOOKING:
                edge.tried.clear()
            self._moving.append(edge)
            return
        wanted = list(edge.wanted.values())
        self._park(edge)
        for job in wanted:
            self._end(job, JobFailed(error, edge.vertex.digest))

    # -- what an event leads to -----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Work off all that the event has set going, and use what room there is for runs."""
        while self._wants or self._moving:
            if self._wants:
                self._want(*self._wants.pop())
            else:
                self._advance(self._moving.popleft())
        while self._turns and self._running < self._max_running:
            self._run_next(self._turns.pop(next(iter(self._turns))))

    def _want(self, edge: _Edge, job: _Job) -> None:
        """Let *job* want the result of one of its edges, and of those that this one awaits."""
        if job.phase is JobPhase.ENDED or job.id in edge.wanted:
            return
        edge.wanted[job.id] = job
        match edge.phase:
            case EdgePhase.KNOWN:
                self._moving.append(edge)
            case EdgePhase.AWAITING_CONTENT | EdgePhase.AWAITING_INPUTS:
                self._tell(job, edge, VertexState.WAITING)
                self._wants += [(below, job) for below in edge.awaited]
            case EdgePhase.READY:
                self._offer(job, edge)
            case EdgePhase.STARTING:
                self._tell(job, edge, VertexState.WAITING)
            case EdgePhase.RUNNING:
                self._tell(job, edge, VertexState.RUNNING)
            case EdgePhase.DONE:
                self._reach(job, edge, VertexState.CACHED)
            case EdgePhase.LOOKING | EdgePhase.LOADING | EdgePhase.DIGESTING:
                pass
            case _:
                assert_never(edge.phase)

    def _advance(self, edge: _Edge) -> None:
        """Find the next step of an edge that has no result yet and for which nothing is under way."""
        if not edge.jobs or edge.tasks or edge.pending or edge.phase in (EdgePhase.READY, EdgePhase.DONE):
            return  # forgotten, or set going twice by one event
        if not edge.wanted:
            self._park(edge)
            return
        self._make_keys(edge)
        if keys := tuple(key for key in self._usable_keys(edge) if key not in edge.tried):
            edge.tried.update(keys)
            self._move(edge, EdgePhase.LOOKING)
            self._instructions.append(LookUp(self._begin(_first(edge.wanted), edge), keys))
            return
        slow = [] if edge.has_contents else self._slow_inputs(edge)
        if slow:
            if not self._await(edge, [below for _, below in slow], EdgePhase.AWAITING_CONTENT):
                self._digest(edge, slow)
            return
        if not self._await(edge, [below for below in edge.inputs if below is not None], EdgePhase.AWAITING_INPUTS):
            self._move(edge, EdgePhase.READY)
            for job in edge.wanted.values():
                self._offer(job, edge)

    def _make_keys(self, edge: _Edge) -> None:
        """Bring an edge's keys up to date with its inputs' keys and contents."""
        keys_below = sum(len(below.keys) for below in edge.inputs if below is not None)
        if keys_below == edge.keys_below:
            return  # keys are only ever added
        edge.keys_below = keys_below
        cache_map = _cache_map(edge)
        inputs = [(SCRATCH_KEY,) if below is None else below.keys for below in edge.inputs]
        edge.slow_keys = slow_keys(cache_map, inputs, edge.contents) if edge.has_contents and edge.contents else ()
        edge.keys = tuple(dict.fromkeys((*fast_keys(cache_map, inputs), *edge.slow_keys)))

    def _usable_keys(self, edge: _Edge) -> tuple[Digest, ...]:
        """Return the keys under which what is cached may be taken as the edge's result."""
        if not edge.supersedes:
            return edge.keys
        if edge.is_fresh:
            return ()
        superseding = {i for i, below in enumerate(edge.inputs) if below is not None and below.supersedes}
        if not superseding:
            return edge.keys  # what ran afresh below came to the same
        return edge.slow_keys if superseding <= edge.contents.keys() else ()

    def _slow_inputs(self, edge: _Edge) -> list[tuple[int, _Edge]]:
        found = ((i, edge.inputs[i]) for i in _cache_map(edge).slow_inputs)
        return [(i, below) for i, below in found if below is not None]

    def _await(self, edge: _Edge, inputs: Iterable[_Edge], phase: EdgePhase) -> bool:
        """Let the edge wait for results; return False where they are all there."""
        awaited = tuple(dict.fromkeys(below for below in inputs if below.phase is not EdgePhase.DONE))
        if not awaited:
            return False
        self._move(edge, phase)
        edge.awaited = awaited
        edge.pending = len(awaited)
        for below in awaited:
            below.waiters[edge] = None
        for job in edge.wanted.values():
            self._tell(job, edge, VertexState.WAITING)
            self._wants += [(below, job) for below in awaited]
        return True

    def _digest(self, edge: _Edge, slow: Sequence[tuple[int, _Edge]]) -> None:
        self._move(edge, EdgePhase.DIGESTING)
        job = _first(edge.wanted)
        for index, below in slow:
            task = self._begin(job, edge, index=index)
            hold = self._hold(edge)
            self._instructions.append(ComputeContentKey(task, job.id, edge.vertex, hold, index, _result(below)))

    def _load_next(self, edge: _Edge) -> None:
        """Try the newest record that is left; without one it is a miss."""
        if not edge.records or not edge.wanted:
            edge.records.clear()
            self._moving.append(edge)
            return
        self._move(edge, EdgePhase.LOADING)
        job = _first(edge.wanted)
        task = self._begin(job, edge)
        self._instructions.append(Load(task, job.id, edge.vertex, self._hold(edge), edge.records.pop()))

    def _done(self, edge: _Edge, result: Result, state: VertexState) -> None:
        self._move(edge, EdgePhase.DONE)
        edge.result = result
        for job in edge.wanted.values():
            self._reach(job, edge, state)
        for waiter in edge.waiters:
            waiter.pending -= 1
            if not waiter.pending:
                waiter.awaited = ()
                self._moving.append(waiter)
        edge.waiters.clear()

    def _reach(self, job: _Job, edge: _Edge, state: VertexState) -> None:
        """Give *job* the result of an edge that it wants."""
        self._tell(job, edge, state)
        if edge not in job.missing:
            return
        job.missing.remove(edge)
        if not job.missing:
            job.phase = JobPhase.KEEPING
            results = tuple((target.vertex, _result(target)) for target in self._targets(job))
            self._instructions.append(Keep(self._begin(job, None, is_own=True), job.id, results))

    def _park(self, edge: _Edge) -> None:
        """Let go of an edge that nobody wants for now; who comes to want it looks it up again."""
        if edge.phase is not EdgePhase.KNOWN:
            self._move(edge, EdgePhase.KNOWN)
        edge.tried.clear()

    # -- taking turns ---------------------------------------------------------------------------------------------

    def _offer(self, job: _Job, edge: _Edge) -> None:
        heapq.heappush(job.ready, (-job.heights[edge], next(self._numbers), edge))
        self._take_turns(job)

    def _take_turns(self, job: _Job) -> None:
        """Put a job last in the row if there is something that it may run."""
        if job.ready and job.running < self._max_running_per_job and job.phase is not JobPhase.ENDED:
            self._turns.setdefault(job.id, job)

    def _run_next(self, job: _Job) -> None:
        """Run the first of what a job has ready, if another has not run it meanwhile."""
        while job.ready:
            edge = heapq.heappop(job.ready)[2]
            if edge.phase is EdgePhase.READY and edge.wanted.get(job.id) is job:
                self._run(job, edge)
                break
        self._take_turns(job)

    def _run(self, job: _Job, edge: _Edge) -> None:
        self._move(edge, EdgePhase.STARTING)
        edge.supersedes = edge.is_fresh or any(below is not None and below.supersedes for below in edge.inputs)
        self._running += 1
        job.running += 1
        for other in edge.wanted.values():
            self._tell(other, edge, VertexState.WAITING)
        inputs = tuple(None if below is None else _result(below) for below in edge.inputs)
        task = self._begin(job, edge, is_run=True)
        hold = self._hold(edge)
        self._instructions.append(Run(task, job.id, edge.vertex, hold, inputs, edge.keys, edge.supersedes))

    # -- ends -----------------------------------------------------------------------------------------------------

    def _end(self, job: _Job, outcome: JobOutcome) -> None:
        """End a job, and forget all that no other job has."""
        if job.phase is JobPhase.ENDED:
            return
        job.phase = JobPhase.ENDED
        del self._jobs[job.id]
        self._turns.pop(job.id, None)
        if isinstance(outcome, JobFailed) and outcome.vertex is not None:
            self._tell(job, job.edges[outcome.vertex], VertexState.FAILED, outcome.error)
        rest = VertexState.CACHED if isinstance(outcome, JobDone) else VertexState.CANCELLED
        for edge in list(job.open):
            self._tell(job, edge, rest)
        self._instructions.append(EndJob(job.id, outcome))
        self._stop(job.tasks)
        for edge in job.edges.values():
            del edge.jobs[job.id]
            edge.wanted.pop(job.id, None)
            if not edge.jobs:
                self._forget(edge)

    def _forget(self, edge: _Edge) -> None:
        self._stop(edge.tasks)
        for below in edge.awaited:
            below.waiters.pop(edge, None)
        if edge.hold is not None:
            self._instructions.append(Release(edge.hold))
        del self._edges[edge.owner, edge.id]

    def _stop(self, tasks: set[TaskId]) -> None:
        for task in sorted(tasks):
            self._stopping[task] = self._tasks.pop(task)
            self._instructions.append(Stop(task))
        tasks.clear()

    # -- small steps ----------------------------------------------------------------------------------------------

    def _begin(
        self, job: _Job, edge: _Edge | None, *, index: int = -1, is_run: bool = False, is_own: bool = False
    ) -> TaskId:
        task = TaskId(next(self._numbers))
        self._tasks[task] = _Task(job, edge, index, is_run, is_own)
        if edge is None or is_own:
            job.tasks.add(task)
        else:
            edge.tasks.add(task)
        return task

    def _hold(self, edge: _Edge) -> HoldId:
        if edge.hold is None:
            edge.hold = HoldId(next(self._numbers))
        return edge.hold

    def _move(self, edge: _Edge, phase: EdgePhase) -> None:
        if phase not in MOVES[edge.phase]:
            raise InvalidTransitionError(f"vertex {edge.vertex.digest}", edge.phase.value, f"move to {phase.value}")
        edge.phase = phase

    def _tell(self, job: _Job, edge: _Edge, state: VertexState, error: ClusterError | None = None) -> None:
        """Report once what has changed; nothing after a vertex's end."""
        if job.open.get(edge, state) is state:
            return
        if state.is_end:
            del job.open[edge]
        else:
            job.open[edge] = state
        digest = edge.vertex.digest
        node = edge.node if state is VertexState.RUNNING else ""
        self._instructions.append(Report(job.id, digest, job.definition.name(digest), state, error, node))

    def _targets(self, job: _Job) -> list[_Edge]:
        return [job.edges[target] for target in job.definition.targets]

    # -- checks ---------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant; for tests and for those who debug.

        Raises:
            InternalError: one is broken; says which.
        """
        under_way: set[TaskId] = set()
        for job in self._jobs.values():
            _require(job.phase is not JobPhase.ENDED, f"job {job.id} is remembered after its end")
            _require(len(job.edges) == len(job.definition.order), f"job {job.id} lacks edges")
            _require(bool(job.missing) != (job.phase is JobPhase.KEEPING), f"job {job.id} keeps too early or too late")
            _require(job.open.keys() <= set(job.edges.values()), f"job {job.id} tells of what it has not")
            _require(
                (job.phase is JobPhase.MAPPING) == bool(job.unmapped), f"job {job.id} maps, or not, without a reason"
            )
            under_way |= job.tasks
        for key, edge in self._edges.items():
            name = f"vertex {edge.vertex.digest} ({edge.phase.value})"
            _require(key == (edge.owner, edge.id), f"{name} is under another's ID")
            _require(bool(edge.jobs), f"{name} is remembered for no job")
            is_its_own = edge.owner is None or edge.jobs.keys() == {edge.owner}
            _require(is_its_own, f"{name} is shared by one who shares none")
            _require(edge.wanted.keys() <= edge.jobs.keys(), f"{name} is wanted by a job that has it not")
            for job_id, job in edge.jobs.items():
                _require(self._jobs.get(job_id) is job, f"{name} has a job that has ended")
            for below in edge.inputs:
                is_there = below is None or self._edges.get((below.owner, below.id)) is below
                _require(is_there, f"{name} has a forgotten input")
            is_working = edge.phase in _WORKING
            _require(bool(edge.tasks) == is_working, f"{name} has {len(edge.tasks)} task(s) under way")
            is_awaiting = edge.phase in (EdgePhase.AWAITING_CONTENT, EdgePhase.AWAITING_INPUTS)
            pending = sum(below.phase is not EdgePhase.DONE for below in edge.awaited)
            _require(edge.pending == pending, f"{name} miscounts what it awaits")
            _require(bool(pending) == is_awaiting, f"{name} awaits {pending} result(s)")
            for below in edge.awaited:
                _require(below.phase is EdgePhase.DONE or edge in below.waiters, f"{name} is not among the waiters")
                _require(edge.wanted.keys() <= below.wanted.keys(), f"what {name} awaits is not wanted")
            _require((edge.result is not None) == (edge.phase is EdgePhase.DONE), f"{name} has a result, or none")
            told = _TOLD.get(edge.phase)
            is_told = told is None or all(job.open.get(edge) is told for job in edge.wanted.values())
            _require(is_told, f"{name} is told of as something else")
            if edge.phase is EdgePhase.READY:
                for job in edge.wanted.values():
                    _require(any(entry[2] is edge for entry in job.ready), f"{name} is offered to no turn")
            under_way |= edge.tasks
        _require(under_way == self._tasks.keys(), "a task belongs to nobody")
        tasks = (*self._tasks.values(), *self._stopping.values())
        _require(self._running == sum(task.is_run for task in tasks), "runs are miscounted")
        _require(self._running <= self._max_running, "too many runs")
        for job in self._jobs.values():
            runs = sum(task.is_run and task.job is job for task in tasks)
            _require(job.running == runs, f"runs of job {job.id} are miscounted")
            _require(runs <= self._max_running_per_job, f"too many runs of job {job.id}")
            may_run = runs < self._max_running_per_job and any(
                entry[2].phase is EdgePhase.READY and job.id in entry[2].wanted for entry in job.ready
            )
            _require(not may_run or self._running == self._max_running, f"job {job.id} could run more")
        _require(not self._wants and not self._moving and not self._instructions, "an event was not worked off")


#: Phases in which something is under way for the edge.
_WORKING = frozenset({EdgePhase.LOOKING, EdgePhase.LOADING, EdgePhase.DIGESTING, EdgePhase.STARTING, EdgePhase.RUNNING})

#: What those that want an edge were told last, where that follows from its phase.
_TOLD = {EdgePhase.STARTING: VertexState.WAITING, EdgePhase.RUNNING: VertexState.RUNNING}


def _first(jobs: Mapping[JobId, _Job]) -> _Job:
    return next(iter(jobs.values()))


def _cache_map(edge: _Edge) -> CacheMap:
    if edge.cache_map is None:
        raise InternalError(f"vertex {edge.vertex.digest} is wanted before its cache map is known")
    return edge.cache_map


def _result(edge: _Edge) -> Result:
    if edge.result is None:
        raise InternalError(f"the result of vertex {edge.vertex.digest} is used before it is there")
    return edge.result


def _require(holds: bool, story: str) -> None:  # noqa: FBT001 - an assertion reads best this way
    if not holds:
        raise InternalError(story)
