"""Doubles around the solver: graphs by name, a world for its state, and ports for its runner."""

import asyncio
from collections import defaultdict

from cluster.digest import digest_of
from cluster.graph import BindMount, Definition, RunOp, Vertex
from cluster.solver.ports import OpResult
from cluster.solver.state import SolverState
from cluster.solver.values import (
    Began,
    CacheMap,
    CacheRecord,
    ComputeContentKey,
    ContentKeyed,
    EndJob,
    Failed,
    Found,
    GetCacheMap,
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
    Stopped,
)


class Graph:
    """Vertices by name."""

    def __init__(self):
        self.vertices = {}
        self.names = {}

    def add(self, name, *inputs):
        """Add a vertex over other vertices (None: scratch) and return it."""
        binds = tuple(BindMount(target=f"/{i}", input=i) for i in range(1, len(inputs)))
        below = tuple(None if i is None else i.digest for i in inputs) or (None,)
        vertex = Vertex(RunOp(args=(name,), binds=binds), below)
        self.vertices[vertex.digest] = vertex
        self.names[vertex.digest] = name
        return vertex

    def definition(self, *targets):
        """Return the definition of what *targets* need."""
        needed, stack = {}, [target.digest for target in targets]
        while stack:
            digest = stack.pop()
            if digest is not None and digest not in needed:
                needed[digest] = self.vertices[digest]
                stack.extend(needed[digest].inputs)
        return Definition(needed, tuple(t.digest for t in targets), {d: self.names[d] for d in needed})


def name_of(vertex):
    """Return the name of a vertex of a :class:`Graph`."""
    return vertex.op.args[0]


class World:
    """Performs what a :class:`SolverState` instructs, when a test says so; its keys and records are real."""

    #: What a test decides on by hand, unless it is told otherwise.
    BY_HAND = (Run,)

    def __init__(self, graph, *, by_hand=BY_HAND, **limits):
        self.graph = graph
        self.state = SolverState(**limits)
        self.by_hand = by_hand
        self.cached = defaultdict(dict)  # key -> {record ID: record}
        self.gone = set()  # IDs of records that can't be loaded
        self.slow = {}  # name -> slow inputs
        self.contents = {}  # (name, index) -> digest, or the input's result
        self.map_keys = {}  # name -> key
        self.pending = {}  # task -> instruction
        self.asked = []  # all instructions with a task
        self.outcomes = {}
        self.reports = defaultdict(list)  # (job, name) -> states
        self.holds, self.released = set(), set()
        self.clock = 0.0

    def submit(self, job, *targets, no_cache=(), is_apart=False):
        self.feed(JobSubmitted(job, self.graph.definition(*targets), frozenset(v.digest for v in no_cache), is_apart))

    def feed(self, event):
        events = [event]
        while events:
            for instruction in self.state.handle(events.pop(0)):
                events += self.perform(instruction)
            self.state.validate()

    def perform(self, instruction):
        match instruction:
            case Report(job, _, name, state):
                assert job not in self.outcomes, "a report after the job's end"
                assert not any(s.is_end for s in self.reports[job, name]), "a report after the vertex's end"
                self.reports[job, name].append(state)
            case EndJob(job, outcome):
                assert job not in self.outcomes
                self.outcomes[job] = outcome
            case Stop(task):
                del self.pending[task]
                return [Stopped(task)]
            case Release(hold):
                assert hold not in self.released
                self.released.add(hold)
            case Publish(keys, result):
                self.publish(keys, result)
            case _:
                self.pending[instruction.task] = instruction
                self.asked.append(instruction)
                self.holds |= {instruction.hold} if hasattr(instruction, "hold") else set()
                if not isinstance(instruction, self.by_hand):
                    return [self.answer(instruction)]
        return []

    def answer(self, ask):
        """Return what comes of an instruction where nothing goes wrong."""
        del self.pending[ask.task]
        match ask:
            case GetCacheMap(task, _, vertex):
                name = name_of(vertex)
                key = self.map_keys.get(name, digest_of(f"op {name}".encode()))
                return Mapped(task, CacheMap(key=key, slow_inputs=self.slow.get(name, ())))
            case LookUp(task, keys):
                records = {}
                for key in keys:
                    records |= self.cached.get(key, {})
                return Found(task, tuple(records.values()))
            case Load(task, _, _, _, record):
                return NotLoadable(task) if record.id in self.gone else Loaded(task, record.result)
            case ComputeContentKey(task, _, vertex, _, index, source):
                return ContentKeyed(task, self.contents.get((name_of(vertex), index), digest_of(source.ref.encode())))
            case Run(task, _, vertex, _, inputs, keys, _):
                assert len(inputs) == len(vertex.inputs)
                result = Result(ref=f"{name_of(vertex)}#{task}")
                self.publish(keys, result)
                return Ran(task, result)
            case Keep(task):
                return Kept(task)
            case _:
                raise AssertionError(ask)

    def publish(self, keys, result):
        self.clock += 1
        record = CacheRecord(id=result.ref, result=result, created_wall_s=self.clock)
        for key in keys:
            self.cached[key][record.id] = record

    def runs(self):
        """Return the runs under way, by vertex name."""
        return {name_of(i.vertex): i for i in self.pending.values() if isinstance(i, Run)}

    def begin(self, *names):
        """Let runs have their inputs where they run."""
        for name in names:
            self.feed(Began(self.runs()[name].task))

    def finish(self, *names):
        """Let runs succeed, in this order."""
        for name in names:
            self.feed(self.answer(self.runs()[name]))

    def fail(self, name, error):
        """Let a run fail."""
        run = self.runs()[name]
        del self.pending[run.task]
        self.feed(Failed(run.task, error))

    def finish_all(self):
        """Let all runs succeed, and those that come of them."""
        while runs := self.runs():
            self.finish(next(iter(runs)))

    def ran(self):
        """Return the names of all that was ever run, in order."""
        return [name_of(i.vertex) for i in self.asked if isinstance(i, Run)]

    def count(self, kind):
        """Return how often something was asked."""
        return sum(isinstance(i, kind) for i in self.asked)

    def forget_history(self):
        """Begin counting anew."""
        self.asked.clear()

    def assert_nothing_left(self):
        """Check that nothing is remembered, and nothing held."""
        now = self.state.statistics()
        assert (now.jobs, now.edges, now.running, now.tasks) == (0, 0, 0, 0)
        assert not self.pending
        assert self.holds == self.released


class FakeKeys:
    """A :class:`cluster.solver.ports.KeyStore` in memory."""

    def __init__(self):
        self.records = defaultdict(dict)
        self.clock = 0.0

    async def lookup(self, keys):
        return list({r.id: r for key in keys for r in self.records.get(key, {}).values()}.values())

    async def publish(self, keys, result):
        self.clock += 1
        record = CacheRecord(id=str(result.ref), result=result, created_wall_s=self.clock)
        for key in keys:
            self.records[key][record.id] = record
        return record


class FakeEvents:
    """A :class:`cluster.solver.ports.JobEvents` in memory."""

    def __init__(self):
        self.told = defaultdict(list)

    async def publish(self, job, events):
        self.told[job] += [(event.name, event.state) for event in events]


class FakeOps:
    """A :class:`cluster.solver.ports.OpRunner` in memory; runs of vertices with a gate wait for it."""

    def __init__(self, keys):
        self.keys = keys
        self.opts = {}  # name -> cache opts
        self.needs = {}  # (call, name) -> error unless opts are given
        self.errors = {}  # (call, name) -> error
        self.slowly_mapped = set()  # names
        self.gates = {}
        self.arrived = defaultdict(asyncio.Event)
        self.calls = []
        self.held, self.released, self.kept = set(), set(), []
        self.finished = {}  # job -> exportables

    def _check(self, call, name, opts):
        self.calls.append((call, name, dict(opts)))
        if (call, name) in self.errors:
            raise self.errors[call, name]
        needed = self.needs.get((call, name))
        if needed is not None and not set(needed.needed_opts) <= opts.keys():
            raise needed

    def try_cache_map(self, vertex):
        name = name_of(vertex)
        if name in self.opts or name in self.slowly_mapped or ("cache_map", name) in self.errors:
            return None
        self.calls.append(("try_cache_map", name, {}))
        return CacheMap(key=digest_of(name.encode()))

    async def cache_map(self, job, vertex):
        name = name_of(vertex)
        self._check("cache_map", name, {})
        return CacheMap(key=digest_of(name.encode()), opts=self.opts.get(name, {}))

    async def load(self, use, record, opts):
        self.held.add(use.hold)
        self._check("load", name_of(use.vertex), opts)
        return record.result

    async def content_key(self, use, index, source, opts):
        self._check("content_key", name_of(use.vertex), opts)
        return digest_of(source.ref.encode())

    async def run(self, use, inputs, keys, opts, *, ignores_cache):
        name = name_of(use.vertex)
        self.held.add(use.hold)
        self._check("run", name, opts)
        use.began()
        self.arrived[name].set()
        if name in self.gates:
            await self.gates[name].wait()
        result = Result(ref=name)
        await self.keys.publish(keys, result)
        return OpResult(result=result)

    async def keep(self, job, vertex, result, opts):
        self._check("keep", name_of(vertex), opts)
        self.kept.append((job, result.ref))

    async def finish(self, job, exportables):
        assert job not in self.finished
        self._check("finish", job, {})
        self.finished[job] = exportables

    async def release(self, hold):
        self.released.add(hold)
