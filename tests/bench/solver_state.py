"""What a decision of the solver costs: its state by itself, without a clock, an event loop or a store."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

from cluster.digest import digest_of
from cluster.graph import Definition, content_inputs, op_digest
from cluster.job import JobId
from cluster.solver.state import SolverState
from cluster.solver.values import (
    Began,
    CacheMap,
    CacheRecord,
    ComputeContentKey,
    ContentKeyed,
    EndJob,
    Event,
    Found,
    GetCacheMap,
    Instruction,
    JobSubmitted,
    Keep,
    Kept,
    Load,
    Loaded,
    LookUp,
    Mapped,
    Ran,
    Result,
    Run,
)
from tests.bench.graphs import stages
from tests.bench.ratio import Ratio

_SIZES = (1_000, 10_000)
_RUNS = 5
_MOST_US = 50.0


def measure() -> list[Ratio]:
    """Measure a build of which nothing is cached, and one of which all is, at several sizes."""
    found = []
    for size in _SIZES:
        definition = stages("", size).definition()
        cold: list[float] = []
        warm: list[float] = []
        worst_ms: list[float] = []
        for _ in range(_RUNS):
            run = _Run()
            for taken, cached in ((cold, False), (warm, True)):
                run.build(definition, is_cached=cached)
                taken.append(run.busy_s / run.events * 1e6)
                worst_ms.append(run.worst_s * 1e3)
        found.append(
            Ratio(
                name=f"solver_us_per_event_{size}_vertices",
                value=statistics.median(cold),
                target=_MOST_US,
                detail=f"nothing cached; all cached {statistics.median(warm):.1f} us; "
                f"the longest single event, which maps the whole graph, {statistics.median(worst_ms):.1f} ms; "
                f"median of {_RUNS}",
            )
        )
    return found


class _Run:
    """Answers at once whatever the state asks for; counts events, and the processor's time for each."""

    def __init__(self) -> None:
        self.events, self.busy_s, self.worst_s = 0, 0.0, 0.0

    def build(self, definition: Definition, *, is_cached: bool) -> None:
        """Build a definition to its end."""
        self.events, self.busy_s, self.worst_s = 0, 0.0, 0.0
        state, ended = SolverState(), False
        inbox: deque[Event] = deque([JobSubmitted(JobId("job"), definition, frozenset())])
        while inbox:
            event = inbox.popleft()
            began = time.thread_time()
            instructions = state.handle(event)
            took_s = time.thread_time() - began
            self.events += 1
            self.busy_s += took_s
            self.worst_s = max(self.worst_s, took_s)
            for instruction in instructions:
                ended |= isinstance(instruction, EndJob)
                inbox.extend(_answers(instruction, is_cached=is_cached))
        assert ended


def _answers(instruction: Instruction, *, is_cached: bool) -> Sequence[Event]:
    found: Sequence[Event] = ()
    match instruction:
        case GetCacheMap(task, _, vertex):
            found = [Mapped(task, CacheMap(key=op_digest(vertex.op), slow_inputs=content_inputs(vertex.op)))]
        case LookUp(task, keys):
            record = CacheRecord(id=keys[0], result=Result(ref=keys[0]), created_wall_s=0.0)
            found = [Found(task, (record,) if is_cached else ())]
        case Load(task):
            found = [Loaded(task, instruction.record.result)]
        case ComputeContentKey(task):
            found = [ContentKeyed(task, digest_of((instruction.input.ref or "").encode()))]
        case Run(task):
            found = [Began(task), Ran(task, Result(ref=instruction.vertex.digest))]
        case Keep(task):
            found = [Kept(task)]
        case _:
            pass
    return found
