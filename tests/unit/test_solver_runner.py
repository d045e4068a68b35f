"""The solver on a real event loop, over ports in memory."""

import asyncio

import pytest

from cluster import tracing
from cluster.errors import NeedsRemoteProvidersError, UnavailableError
from cluster.job import VertexState
from cluster.solver.runner import Solver
from cluster.solver.values import JobDone, JobFailed, JobStopped
from tests.doubles.solver import FakeEvents, FakeKeys, FakeOps, Graph
from tests.doubles.tracing import RecordingTracer

NEEDS = NeedsRemoteProvidersError(("sha256:aa", "sha256:bb"))


@pytest.fixture
def ops():
    return FakeOps(FakeKeys())


@pytest.fixture
def events():
    return FakeEvents()


@pytest.fixture
async def solver(ops, events):
    solver = Solver(ops, ops.keys, events)
    yield solver
    await solver.aclose(5)
    assert ops.held == ops.released
    assert solver.statistics().tasks == 0


def names(ops, call):
    return [name for what, name, _ in ops.calls if what == call]


async def test_a_graph_is_run_and_then_found(solver, ops, events):
    """The second build of a graph runs nothing; its events are all there when it ends."""
    graph = Graph()
    top = graph.add("b", graph.add("a"))
    assert isinstance(await solver.solve("one", graph.definition(top)), JobDone)
    assert isinstance(await solver.solve("two", graph.definition(top)), JobDone)
    assert names(ops, "run") == ["a", "b"]
    assert set(events.told["two"]) == {("a", VertexState.CACHED), ("b", VertexState.CACHED)}
    assert ops.kept == [("one", "b"), ("two", "b")]


async def test_cache_maps_that_follow_from_ops_alone_take_no_task(solver, ops):
    """Whether all cache maps of a graph are known at once, or one has to be waited for: it is built all the same."""
    graph = Graph()
    top = graph.add("c", graph.add("b", graph.add("a")))
    ops.slowly_mapped.add("b")
    assert isinstance(await solver.solve("one", graph.definition(top)), JobDone)
    assert set(names(ops, "try_cache_map")) == {"a", "c"}
    assert names(ops, "cache_map") == ["b"]


async def test_no_turn_of_the_loop_is_kept_by_a_large_graph(ops, events):
    """Others have their turns while cache maps come in, however many these are; no more at once than may be asked."""
    graph = Graph()
    top = graph.add("top", *(graph.add(f"v{number}") for number in range(100)))
    solver = Solver(ops, ops.keys, events, max_asking=10)
    solver.submit("one", graph.definition(top))
    turns = []
    while len(names(ops, "try_cache_map")) < 101:
        turns.append(len(names(ops, "try_cache_map")))
        await asyncio.sleep(0)
    assert turns == list(range(10, 101, 10))
    assert isinstance(await solver.wait("one"), JobDone)
    await solver.aclose(5)


async def test_a_job_may_be_cancelled_while_its_cache_maps_are_on_their_way(solver, ops):
    """Answers that come to nothing any more are taken, and the job has ended."""
    graph = Graph()
    solver.submit("one", graph.definition(graph.add("b", graph.add("a"))))
    solver.cancel("one")
    assert isinstance(await solver.wait("one"), JobStopped)
    assert not names(ops, "run")


async def test_a_bug_in_a_cache_map_fails_its_job(solver, ops, monkeypatch):
    """What goes wrong where nothing is waited for is told as well."""

    def broken(vertex):
        raise RuntimeError("broken")

    monkeypatch.setattr(ops, "try_cache_map", broken)
    ops.errors["cache_map", "a"] = RuntimeError("broken")
    graph = Graph()
    outcome = await solver.solve("one", graph.definition(graph.add("a")))
    assert isinstance(outcome, JobFailed)
    assert "broken" in str(outcome.error)


async def test_a_large_graph_is_told_in_parts(ops, monkeypatch):
    """A publication is of some hundreds of events at most; all of them are told, in order, before the job ends."""
    events = FakeEvents()
    sizes = []
    publish = events.publish

    async def counted(job, told):
        sizes.append(len(told))
        await publish(job, told)

    monkeypatch.setattr(events, "publish", counted)
    solver = Solver(ops, ops.keys, events)
    graph = Graph()
    tops = [graph.add(str(index)) for index in range(1200)]
    await solver.solve("one", graph.definition(*tops))
    sizes.clear()
    assert isinstance(await solver.solve("two", graph.definition(*tops)), JobDone)
    assert sum(sizes) == len(events.told["two"]) == 1200
    assert max(sizes) <= 500
    await solver.aclose(5)


async def test_a_vertex_runs_from_when_its_op_says_so(solver, ops, events):
    """A run is told of as waiting until the op has begun."""
    graph = Graph()
    await solver.solve("one", graph.definition(graph.add("a")))
    told = [("a", state) for state in (VertexState.WAITING, VertexState.RUNNING, VertexState.COMPLETED)]
    assert events.told["one"] == told


@pytest.mark.parametrize("call", ["run", "load", "keep"])
async def test_missing_opts_are_collected_and_the_call_repeated_once(solver, ops, call):
    """Any call that needs providers gets those that the vertex's ancestors published."""
    graph = Graph()
    definition = graph.definition(graph.add("top", graph.add("image")))
    ops.opts["image"] = dict.fromkeys(NEEDS.needed_opts, b"handler")
    if call == "load":
        await solver.solve("first", definition)
    ops.needs[call, "top"] = NEEDS
    ops.calls.clear()
    assert isinstance(await solver.solve("job", definition), JobDone)
    assert [opts for what, name, opts in ops.calls if (what, name) == (call, "top")] == [{}, ops.opts["image"]]


async def test_a_job_is_finished_once_its_results_are_kept(solver, ops):
    """All its vertices are there to be exported then, with their results and keys."""
    graph = Graph()
    a = graph.add("a")
    b = graph.add("b", a)
    await solver.solve("job", graph.definition(b))
    assert [call for call, *_ in ops.calls][-2:] == ["keep", "finish"]
    assert [(e.vertex, e.result.ref) for e in ops.finished["job"]] == [(a.digest, "a"), (b.digest, "b")]
    for exportable in ops.finished["job"]:
        assert [record.result for record in await ops.keys.lookup(exportable.keys)] == [exportable.result]
    assert solver.exportable("job") == ()


async def test_a_job_whose_finish_fails_has_failed(solver, ops):
    """What was to be done for it was not."""
    ops.errors["finish", "job"] = UnavailableError("export", "gone")
    graph = Graph()
    outcome = await solver.solve("job", graph.definition(graph.add("a")))
    assert outcome == JobFailed(ops.errors["finish", "job"], None)


async def test_opts_that_are_still_missing_are_a_miss_in_a_load(solver, ops):
    """A lazy record without handlers in this build is run anew."""
    graph = Graph()
    definition = graph.definition(graph.add("a"))
    await solver.solve("one", definition)
    ops.needs["load", "a"] = NEEDS
    assert isinstance(await solver.solve("two", definition), JobDone)
    assert names(ops, "run") == ["a", "a"]


async def test_opts_that_are_still_missing_are_the_error_of_a_run(solver, ops):
    """Nobody published them: the error names them."""
    graph = Graph()
    ops.needs["run", "a"] = NEEDS
    outcome = await solver.solve("job", graph.definition(graph.add("a")))
    assert isinstance(outcome, JobFailed)
    assert outcome.error is NEEDS


async def test_what_an_op_breaks_with_is_an_error_of_its_job(solver, ops):
    """A bug in an op ends its jobs, and nothing else."""
    graph = Graph()
    ops.errors["run", "a"] = ValueError("bug")
    outcome = await solver.solve("job", graph.definition(graph.add("a")))
    assert isinstance(outcome, JobFailed)
    assert "ValueError: bug" in str(outcome.error)


async def test_cancel_of_one_job_leaves_the_other_its_run(solver, ops):
    """The run that the first began goes on for the second."""
    graph = Graph()
    definition = graph.definition(graph.add("a"))
    ops.gates["a"] = asyncio.Event()
    solver.submit("one", definition)
    solver.submit("two", definition)
    one, two = asyncio.create_task(solver.wait("one")), asyncio.create_task(solver.wait("two"))
    await ops.arrived["a"].wait()
    solver.cancel("one")
    assert await one == JobStopped()
    ops.gates["a"].set()
    assert isinstance(await two, JobDone)
    assert names(ops, "run") == ["a"]


async def test_cancel_of_the_last_job_cancels_the_run(solver, ops):
    """Nobody wants it: it is cancelled, and the job ends at once."""
    graph = Graph()
    ops.gates["a"] = asyncio.Event()
    solver.submit("job", graph.definition(graph.add("a")))
    waiting = asyncio.create_task(solver.wait("job"))
    await ops.arrived["a"].wait()
    solver.cancel("job")
    assert await waiting == JobStopped()


async def test_closing_ends_every_wait(ops, events):
    """Who waits for a job gets an error; the job is not told of as ended."""
    solver = Solver(ops, ops.keys, events)
    graph = Graph()
    ops.gates["a"] = asyncio.Event()
    solver.submit("job", graph.definition(graph.add("a")))
    waiting = asyncio.create_task(solver.wait("job"))
    await ops.arrived["a"].wait()
    await solver.aclose(5)
    with pytest.raises(UnavailableError):
        await waiting
    assert ("a", VertexState.CANCELLED) not in events.told["job"]


async def test_events_that_cannot_be_told_do_not_fail_the_job(solver, ops, events):
    """The job is worth more than what is seen of it."""

    async def refuse(job, told):
        raise UnavailableError("redis", "gone")

    events.publish = refuse
    graph = Graph()
    assert isinstance(await solver.solve("job", graph.definition(graph.add("a"))), JobDone)


async def test_vertices_are_spans_of_the_job_s_trace(solver, ops, monkeypatch):
    """What is asked for a vertex is told under it, and it under what submitted the job; every span ends."""
    tracer = RecordingTracer(monkeypatch)
    graph = Graph()
    top = graph.add("b", graph.add("a"))
    with tracing.beginning("job"):
        assert isinstance(await solver.solve("one", graph.definition(top)), JobDone)

    paths = [span.path for span in tracer.spans]
    assert paths.count(("job", "vertex", "run")) == paths.count(("job", "vertex", "cache lookup")) == 2
    assert ("job", "keep") in paths
    vertices = {span.attributes["lazyfarm.vertex.name"]: span for span in tracer.spans if span.name == "vertex"}
    assert {name: span.attributes["lazyfarm.vertex.state"] for name, span in vertices.items()} == {
        "a": "completed",
        "b": "completed",
    }
    assert all(span.ends == 1 for span in tracer.spans)


async def test_a_job_that_shares_a_run_links_to_it(solver, ops, events, monkeypatch):
    """One run for two jobs is told in the trace of the first; the second's vertex links to it."""
    tracer = RecordingTracer(monkeypatch)
    graph = Graph()
    top = graph.add("a")
    ops.gates["a"] = asyncio.Event()
    with tracing.beginning("one"):
        one = asyncio.create_task(solver.solve("one", graph.definition(top)))
        await ops.arrived["a"].wait()
    with tracing.beginning("two"):
        two = asyncio.create_task(solver.solve("two", graph.definition(top)))
    while ("a", VertexState.RUNNING) not in events.told["two"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    ops.gates["a"].set()
    assert isinstance(await one, JobDone)
    assert isinstance(await two, JobDone)

    (run,) = [span for span in tracer.spans if span.name == "run"]
    (shared,) = [span for span in tracer.spans if span.path == ("two", "vertex")]
    assert run.path == ("one", "vertex", "run")
    assert shared.links == [run.traceparent]


async def test_a_vertex_that_fails_or_is_cancelled_ends_its_span_so(solver, ops, monkeypatch):
    """A failed vertex has its error, those of a cancelled job their cancellation."""
    tracer = RecordingTracer(monkeypatch)
    graph = Graph()
    failing, waiting = graph.add("a"), graph.add("b")
    ops.errors["run", "a"] = UnavailableError("x", "gone")
    ops.gates["b"] = asyncio.Event()
    with tracing.beginning("failed"):
        await solver.solve("one", graph.definition(failing))
    with tracing.beginning("cancelled"):
        two = asyncio.create_task(solver.solve("two", graph.definition(waiting)))
        await ops.arrived["b"].wait()
        solver.cancel("two")
        assert isinstance(await two, JobStopped)

    errors = {span.path[0]: type(span.error) for span in tracer.spans if span.name == "vertex"}
    assert errors == {"failed": UnavailableError, "cancelled": asyncio.CancelledError}
