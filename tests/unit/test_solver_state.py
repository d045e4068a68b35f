"""What the solver decides, rule by rule."""

import pytest

from cluster.errors import InvalidTransitionError, UnavailableError
from cluster.job import VertexState
from cluster.solver.values import (
    Began,
    ComputeContentKey,
    Failed,
    GetCacheMap,
    JobCancelled,
    JobDone,
    JobFailed,
    JobStopped,
    Keep,
    Load,
    LookUp,
    Ran,
    Run,
    Stop,
)
from tests.doubles.solver import Graph, World, digest_of, name_of

BROKEN = UnavailableError("op", "broken")


def chain(*names):
    """Return a graph of vertices over one another, and the vertices."""
    graph, vertices = Graph(), []
    for name in names:
        vertices.append(graph.add(name, *vertices[-1:]))
    return graph, vertices


def diamond():
    graph = Graph()
    base = graph.add("base")
    left, right = graph.add("left", base), graph.add("right", base)
    return graph, base, graph.add("top", left, right)


# -- laziness ---------------------------------------------------------------------------------------------------


def test_a_cached_target_costs_one_lookup_and_one_load():
    """Nothing below a cached target is looked up, loaded or run."""
    graph, vertices = chain("a", "b", "c")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.finish_all()
    world.forget_history()

    world.submit("two", vertices[-1])

    assert isinstance(world.outcomes["two"], JobDone)
    assert (world.count(LookUp), world.count(Load), world.count(Run)) == (1, 1, 0)
    assert all(world.reports["two", name] == [VertexState.CACHED] for name in "abc")
    world.assert_nothing_left()


def test_only_what_is_above_a_change_runs():
    """A new vertex on top of a cached one runs; the cached one is loaded, and nothing below it."""
    graph, vertices = chain("a", "b", "c")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.finish_all()
    world.forget_history()

    world.submit("two", graph.add("d", vertices[-1]))
    world.finish_all()

    assert world.ran() == ["d"]
    assert [name_of(i.vertex) for i in world.asked if isinstance(i, Load)] == ["c"]


def test_a_vertex_of_two_ways_runs_once():
    """Diamonds: what both sides need runs once, and both get its result."""
    graph, _, top = diamond()
    world = World(graph)
    world.submit("job", top)
    assert list(world.runs()) == ["base"]
    world.finish("base")
    assert set(world.runs()) == {"left", "right"}
    assert len({run.inputs for run in world.runs().values()}) == 1
    world.finish_all()
    assert sorted(world.ran()) == ["base", "left", "right", "top"]
    world.assert_nothing_left()


def test_vertices_wait_until_their_inputs_are_there_and_then_run():
    """Waiting and running are told apart: what is dispatched still waits until its inputs are where it runs."""
    graph, vertices = chain("a", "b")
    world = World(graph)
    world.submit("job", vertices[-1])
    assert world.reports["job", "a"] == world.reports["job", "b"] == [VertexState.WAITING]
    world.begin("a")
    assert world.reports["job", "a"] == [VertexState.WAITING, VertexState.RUNNING]
    world.finish("a")
    assert world.reports["job", "b"] == [VertexState.WAITING]
    world.begin("b")
    world.finish("b")
    assert world.reports["job", "b"] == [VertexState.WAITING, VertexState.RUNNING, VertexState.COMPLETED]


def test_a_run_that_never_began_may_end():
    """Another's result that is found instead of running needs no beginning."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("job", *vertices)
    world.finish("a")
    assert world.reports["job", "a"] == [VertexState.WAITING, VertexState.COMPLETED]


def test_who_comes_to_want_a_run_is_told_where_it_stands():
    """Waiting before the run has begun, running after."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.submit("two", *vertices)
    assert world.reports["two", "a"] == [VertexState.WAITING]
    world.begin("a")
    world.submit("three", *vertices)
    assert world.reports["two", "a"] == [VertexState.WAITING, VertexState.RUNNING]
    assert world.reports["three", "a"] == [VertexState.RUNNING]
    world.finish("a")


def test_a_beginning_that_changes_nothing_is_no_error():
    """Of what has begun, is over, was stopped, or is no run."""
    graph, vertices = chain("a", "b")
    world = World(graph, by_hand=(Run, LookUp))
    world.submit("one", *vertices)
    (lookup, *_) = world.pending.values()
    assert world.state.handle(Began(lookup.task)) == []
    while not world.runs():
        world.feed(world.answer(next(iter(world.pending.values()))))
    first = world.runs()["a"].task
    world.begin("a")
    assert world.state.handle(Began(first)) == []
    world.finish("a")
    assert world.state.handle(Began(first)) == []
    second = world.runs()["b"].task
    assert any(i == Stop(second) for i in world.state.handle(JobCancelled("one")))
    assert world.state.handle(Began(second)) == []
    world.state.validate()


def test_a_run_that_is_begun_anew_waits_again():
    """Where its job has gone it may be done once more, elsewhere: its inputs must come there first."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.submit("two", *vertices)
    world.begin("a")
    world.feed(JobCancelled("one"))
    world.fail("a", BROKEN)
    world.begin("a")
    world.finish("a")
    waiting, running = VertexState.WAITING, VertexState.RUNNING
    assert world.reports["two", "a"] == [waiting, running, waiting, running, VertexState.COMPLETED]


# -- records that are of no use ---------------------------------------------------------------------------------


def test_a_vanished_record_is_a_miss():
    """A record that can't be loaded doesn't fail the build: the vertex runs."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.finish_all()
    world.gone |= {i.results[0].ref for i in (world.outcomes["one"],)}

    world.submit("two", *vertices)
    world.finish_all()

    assert world.ran() == ["a", "a"]
    assert isinstance(world.outcomes["two"], JobDone)


def test_an_error_of_a_load_is_a_miss():
    """Whatever a load fails with, the vertex runs."""
    graph, vertices = chain("a")
    world = World(graph, by_hand=(Run, Load))
    world.submit("one", *vertices)
    world.finish_all()
    world.submit("two", *vertices)
    (load,) = world.pending.values()
    del world.pending[load.task]
    world.feed(Failed(load.task, BROKEN))
    assert list(world.runs()) == ["a"]


def test_the_next_record_is_tried_newest_first():
    """Where one record is gone another will do."""
    graph, vertices = chain("a")
    world = World(graph)
    for job in ("one", "two"):
        world.submit(job, *vertices, no_cache=vertices)
        world.finish_all()
    older, newer = (world.outcomes[job].results[0] for job in ("one", "two"))
    world.submit("three", *vertices)
    assert world.outcomes["three"].results == (newer,)
    world.gone.add(newer.ref)
    world.submit("four", *vertices)
    assert world.outcomes["four"].results == (older,)


# -- several jobs -----------------------------------------------------------------------------------------------


def test_jobs_share_a_run():
    """Two jobs with one vertex: one run, both get its result."""
    graph, vertices = chain("a", "b")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.submit("two", vertices[-1])
    world.finish_all()
    assert world.ran() == ["a", "b"]
    assert world.outcomes["one"] == world.outcomes["two"]
    assert world.reports["two", "a"] == [VertexState.WAITING, VertexState.COMPLETED]


def test_a_job_apart_shares_no_vertex():
    """Neither with those that came before nor with those that come after; the others go on sharing theirs."""
    graph, vertices = chain("a", "b")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.submit("apart", vertices[-1], is_apart=True)
    world.submit("two", vertices[-1])
    assert world.state.statistics().edges == 4
    assert world.ran() == ["a", "a"]
    world.feed(JobCancelled("apart"))
    world.submit("apart too", vertices[-1], is_apart=True)
    world.finish_all()
    assert sorted(world.ran()) == ["a", "a", "a", "b", "b"]
    assert {type(world.outcomes[job]) for job in ("one", "two", "apart too")} == {JobDone}
    world.assert_nothing_left()


@pytest.mark.parametrize("cancelled", ["one", "two"])
def test_cancel_of_one_of_two_jobs_neither_fails_nor_repeats(cancelled):
    """BuildKit's TestSingleCancelParallel: what both share goes on, whoever began it."""
    graph, vertices = chain("a", "b")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.submit("two", vertices[-1])
    world.feed(JobCancelled(cancelled))
    assert world.outcomes == {cancelled: JobStopped()}
    assert world.reports[cancelled, "a"][-1] is VertexState.CANCELLED
    world.finish_all()
    assert world.ran() == ["a", "b"]
    assert isinstance(world.outcomes["two" if cancelled == "one" else "one"], JobDone)
    world.assert_nothing_left()


@pytest.mark.parametrize("kind", [GetCacheMap, LookUp, Run])
def test_cancel_of_the_only_job_stops_what_is_under_way(kind):
    """Cancelled while mapping, looking up or running: all is stopped, and nothing remembered."""
    graph, vertices = chain("a", "b")
    world = World(graph, by_hand=(kind,))
    world.submit("job", vertices[-1])
    assert world.pending
    world.feed(JobCancelled("job"))
    assert world.outcomes == {"job": JobStopped()}
    world.assert_nothing_left()


def test_what_both_jobs_have_goes_on_though_only_one_wanted_it_yet():
    """A job that is still mapping finds the vertex run, once, when it comes to want it."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.by_hand = (Run, GetCacheMap)
    world.submit("two", *vertices)
    world.feed(JobCancelled("one"))
    world.finish("a")
    (mapping,) = world.pending.values()
    world.feed(world.answer(mapping))
    assert isinstance(world.outcomes["two"], JobDone)
    assert world.ran() == ["a"]


# -- errors -----------------------------------------------------------------------------------------------------


def test_an_error_reaches_all_who_waited_and_no_later_job():
    """Both jobs fail with the vertex's error; the next job starts afresh."""
    graph, vertices = chain("a", "b")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.submit("two", vertices[-1])
    world.fail("a", BROKEN)
    failed = JobFailed(BROKEN, vertices[0].digest)
    assert world.outcomes == {"one": failed, "two": failed}
    assert world.reports["one", "a"][-1] is VertexState.FAILED
    assert world.reports["one", "b"][-1] is VertexState.CANCELLED
    world.assert_nothing_left()

    world.submit("three", vertices[-1])
    world.finish_all()
    assert isinstance(world.outcomes["three"], JobDone)


def test_an_error_stops_the_rest_of_the_job():
    """The first error ends the job; what it alone had running is stopped."""
    graph = Graph()
    top = graph.add("top", graph.add("a"), graph.add("b"))
    world = World(graph)
    world.submit("job", top)
    world.fail("a", BROKEN)
    assert world.reports["job", "b"][-1] is VertexState.CANCELLED
    world.assert_nothing_left()


def test_an_error_of_a_run_whose_job_has_gone_is_not_shared():
    """It may be the gone job's own (its session): the run is repeated once for a job that is there."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.submit("two", *vertices)
    world.feed(JobCancelled("one"))
    world.fail("a", BROKEN)
    assert world.runs()["a"].job == "two"
    world.fail("a", BROKEN)
    assert isinstance(world.outcomes["two"], JobFailed)


def test_a_cache_map_that_fails_is_its_jobs_own_failure():
    """Access is proven by each job: one without it fails, the other goes on."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("one", *vertices)
    world.by_hand = (Run, GetCacheMap)
    world.submit("two", *vertices)
    mapping = next(i for i in world.pending.values() if isinstance(i, GetCacheMap))
    del world.pending[mapping.task]
    world.feed(Failed(mapping.task, BROKEN))
    assert isinstance(world.outcomes["two"], JobFailed)
    world.finish("a")
    assert isinstance(world.outcomes["one"], JobDone)


def test_a_content_key_that_fails_fails_the_vertex():
    """What can't be digested can't be copied either."""
    graph, vertices = chain("src", "copy")
    world = World(graph, by_hand=(Run, ComputeContentKey))
    world.slow["copy"] = (0,)
    world.submit("job", vertices[-1])
    world.finish("src")
    (ask,) = world.pending.values()
    del world.pending[ask.task]
    world.feed(Failed(ask.task, BROKEN))
    assert world.outcomes["job"] == JobFailed(BROKEN, vertices[1].digest)
    world.assert_nothing_left()


# -- slow keys --------------------------------------------------------------------------------------------------


def test_equal_content_is_a_hit_for_all_that_is_above():
    """Another definition of the same content: the copy is cached, and so are those over it; the next time at once."""
    graph = Graph()
    same = digest_of(b"same")
    tops = []
    for name in ("src1", "src2"):
        copy = graph.add("copy", graph.add(name))
        tops.append(graph.add("top", graph.add("mid", copy)))
    world = World(graph)
    world.slow["copy"] = (0,)
    world.contents["copy", 0] = same
    world.submit("one", tops[0])
    world.finish_all()
    assert world.ran() == ["src1", "copy", "mid", "top"]
    world.forget_history()

    world.submit("two", tops[1])
    world.finish_all()
    assert world.ran() == ["src2"]
    assert world.outcomes["two"] == world.outcomes["one"]
    world.forget_history()

    world.submit("three", tops[1])
    assert (world.count(LookUp), world.count(Run)) == (1, 0)
    assert isinstance(world.outcomes["three"], JobDone)


def test_content_is_digested_only_after_a_miss_of_the_fast_keys():
    """A fast hit needs no content."""
    graph, vertices = chain("src", "copy")
    world = World(graph)
    world.slow["copy"] = (0,)
    world.submit("one", vertices[-1])
    world.finish_all()
    assert world.count(ComputeContentKey) == 1
    world.submit("two", vertices[-1])
    assert world.count(ComputeContentKey) == 1


# -- running afresh ---------------------------------------------------------------------------------------------


def test_a_fresh_vertex_runs_and_so_does_what_is_over_it():
    """What was cached over its former result is not taken."""
    graph, vertices = chain("a", "b", "c")
    world = World(graph)
    world.submit("one", vertices[-1])
    world.finish_all()
    world.forget_history()
    world.submit("two", vertices[-1], no_cache=[vertices[1]])
    world.finish_all()
    assert world.ran() == ["b", "c"]
    assert [i.ignores_cache for i in world.asked if isinstance(i, Run)] == [True, True]


def test_what_is_over_a_fresh_vertex_is_cached_if_the_content_is_what_it_was():
    """A copy of the same files from a vertex that ran afresh is a hit, and what is over it too."""
    graph, vertices = chain("src", "copy", "top")
    world = World(graph)
    world.slow["copy"] = (0,)
    world.contents["copy", 0] = digest_of(b"same")
    world.submit("one", vertices[-1])
    world.finish_all()
    world.forget_history()
    world.submit("two", vertices[-1], no_cache=[vertices[0]])
    world.finish_all()
    assert world.ran() == ["src"]
    assert world.outcomes["two"] == world.outcomes["one"]


def test_parallel_builds_may_differ_in_what_they_run_afresh():
    """BuildKit's TestParallelBuildsIgnoreCache: who runs afresh shares with those who do, not with others."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("zero", *vertices)
    world.finish_all()
    world.submit("one", *vertices, no_cache=vertices)
    world.submit("two", *vertices, no_cache=vertices)
    world.submit("three", *vertices)
    assert world.outcomes["three"] == world.outcomes["zero"]
    assert len(world.runs()) == 1
    world.finish_all()
    assert world.outcomes["one"] == world.outcomes["two"] != world.outcomes["zero"]


# -- turns ------------------------------------------------------------------------------------------------------


def test_a_job_may_be_exported_while_it_is_kept():
    """All vertices in order, with keys, and with results as far as they were needed; nothing before or after."""
    graph, vertices = chain("a", "b", "c")
    world = World(graph, by_hand=(Run, Keep))
    world.submit("one", *vertices[:2])
    world.finish("a")
    assert world.state.exportable("one") == ()
    world.finish("b")
    one = world.state.exportable("one")
    assert [e.vertex for e in one] == [v.digest for v in vertices[:2]]
    assert [e.result.ref.partition("#")[0] for e in one] == ["a", "b"]
    (keep,) = world.pending.values()
    world.feed(world.answer(keep))
    assert world.state.exportable("one") == ()

    world.submit("two", vertices[-1])
    world.finish("c")
    two = world.state.exportable("two")
    assert [e.vertex for e in two] == [v.digest for v in vertices]
    assert [e.result is None for e in two] == [True, False, False]
    assert [e.keys for e in two[:2]] == [e.keys for e in one]
    assert all(e.keys for e in two)


def test_jobs_take_turns():
    """A job with many vertices doesn't keep one with few from running."""
    graph = Graph()
    big = graph.add("big", *(graph.add(f"big{i}") for i in range(10)))
    small = graph.add("small", *(graph.add(f"small{i}") for i in range(2)))
    world = World(graph, max_running=2)
    world.submit("big", big)
    world.submit("small", small)
    assert len(world.runs()) == 2
    world.finish_all()
    assert all(name in world.ran()[:7] for name in ("small0", "small1"))


def test_the_longest_way_to_a_target_goes_first():
    """Critical path first."""
    graph = Graph()
    short = graph.add("short")
    long = graph.add("l3", graph.add("l2", graph.add("l1")))
    world = World(graph, max_running=1)
    world.submit("other", graph.add("other"))
    world.submit("job", graph.add("top", short, long))  # both are ready by the time that there is room
    world.finish_all()
    assert world.ran().index("l1") < world.ran().index("short")


def test_runs_are_bounded_with_those_that_stop():
    """No more run at once than may, one job's share no less."""
    graph = Graph()
    tops = [graph.add(f"top{j}", *(graph.add(f"{j}-{i}") for i in range(5))) for j in range(2)]
    world = World(graph, max_running=3, max_running_per_job=2)
    world.submit("one", tops[0])
    assert len(world.runs()) == 2
    world.submit("two", tops[1])
    assert len(world.runs()) == 3
    world.finish_all()
    assert set(world.outcomes) == {"one", "two"}


# -- what can't be ----------------------------------------------------------------------------------------------


def test_a_job_is_submitted_once():
    """The ID of a job that goes on is refused."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("job", *vertices)
    with pytest.raises(InvalidTransitionError):
        world.submit("job", *vertices)


def test_an_answer_to_nothing_is_refused():
    """Each task is answered once."""
    graph, vertices = chain("a")
    world = World(graph)
    world.submit("job", *vertices)
    run = world.runs()["a"]
    world.finish("a")
    with pytest.raises(InvalidTransitionError):
        world.state.handle(Failed(run.task, BROKEN))


def test_a_late_answer_of_a_stopped_task_changes_nothing():
    """A run that ends well after it was stopped is only its end; its place is free then, and not before."""
    graph, vertices = chain("a")
    world = World(graph, max_running=1)
    world.submit("one", *vertices)
    run = world.runs()["a"]
    world.state.handle(JobCancelled("one"))  # the world is not told
    world.pending.clear()
    world.submit("two", *vertices)
    assert not world.runs()
    world.feed(Ran(run.task, None))
    assert list(world.runs()) == ["a"]
    world.finish_all()
    assert isinstance(world.outcomes["two"], JobDone)


@pytest.mark.parametrize("names", [3000])
def test_depth_is_no_limit(names):
    """A chain that is deeper than Python's stack is built."""
    graph, vertices = chain(*(f"v{i}" for i in range(names)))
    world = World(graph, by_hand=())
    world.state.validate = lambda: None  # it looks at everything after each event
    world.submit("job", vertices[-1])
    assert isinstance(world.outcomes["job"], JobDone)
    world.assert_nothing_left()
