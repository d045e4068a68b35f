"""The solver's state under random graphs, completions, failures and cancellations, against a simple model.

The model is written against the design: which vertices each job needs, what was published, who has ended.
"""

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import UnavailableError
from cluster.job import VertexState
from cluster.solver.values import (
    Began,
    ComputeContentKey,
    Failed,
    JobCancelled,
    JobDone,
    JobFailed,
    Keep,
    Load,
    LookUp,
    NotLoadable,
    Run,
)
from tests.doubles.solver import Graph, World, name_of

CASUAL = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def graphs(draw):
    """Return a graph, its vertices (each after its inputs) and which of their inputs are slow."""
    graph, vertices, slow = Graph(), [], {}
    for i in range(draw(st.integers(1, 9))):
        most = min(3, len(vertices))
        below = draw(st.lists(st.sampled_from(vertices), max_size=most, unique=True)) if vertices else []
        vertices.append(graph.add(f"v{i}", *below))
        slow[f"v{i}"] = tuple(j for j in range(len(below)) if draw(st.integers(0, 3)) == 0)
    return graph, vertices, slow


def needed(graph, job_targets):
    return {graph.names[digest] for digest in graph.definition(*job_targets).vertices}


class Build:
    """Several jobs, in any order of events."""

    def __init__(self, drawn, data, *, by_hand, **limits):
        self.graph, self.vertices, slow = drawn
        self.data = data
        self.world = World(self.graph, by_hand=by_hand, **limits)
        self.world.slow = slow
        self.jobs = {}

    def submit(self, *, may_run_afresh=False, may_be_apart=False):
        job = f"job{len(self.jobs)}"
        targets = self.data.draw(st.lists(st.sampled_from(self.vertices), min_size=1, max_size=2, unique=True))
        inside = [v for v in self.vertices if self.graph.names[v.digest] in needed(self.graph, targets)]
        fresh = self.data.draw(st.lists(st.sampled_from(inside), max_size=2, unique=True)) if may_run_afresh else []
        self.jobs[job] = (targets, fresh)
        self.world.submit(job, *targets, no_cache=fresh, is_apart=may_be_apart and self.data.draw(st.booleans()))

    def pick(self):
        return self.world.pending[self.data.draw(st.sampled_from(sorted(self.world.pending)))]

    def fail(self, ask):
        del self.world.pending[ask.task]
        self.world.feed(Failed(ask.task, UnavailableError(str(ask.task), "broken")))

    def finish(self):
        """Let all that is under way succeed."""
        while self.world.pending:
            self.world.feed(self.world.answer(self.pick()))

    def check_ends(self):
        """Every job has ended, every vertex once for each of them, and nothing is left."""
        for job, (targets, _) in self.jobs.items():
            outcome = self.world.outcomes[job]
            for name in needed(self.graph, targets):
                told = self.world.reports[job, name]
                assert told[-1].is_end
                assert all(before is not after for before, after in itertools.pairwise(told))
                if isinstance(outcome, JobDone):
                    assert told[-1] in (VertexState.CACHED, VertexState.COMPLETED)
        self.world.assert_nothing_left()


@CASUAL
@given(graphs(), st.data())
def test_every_vertex_runs_at_most_once_where_nothing_fails(drawn, data):
    """Whatever the order and the jobs: one run a vertex, since each is published when it ends."""
    build = Build(drawn, data, by_hand=(LookUp, Load, ComputeContentKey, Run, Keep), max_running=2)
    for _ in range(data.draw(st.integers(1, 3))):
        build.submit()
        for _ in range(data.draw(st.integers(0, 6))):
            if build.world.pending:
                build.world.feed(build.world.answer(build.pick()))
    build.finish()
    ran = build.world.ran()
    assert len(set(ran)) == len(ran)
    assert all(isinstance(outcome, JobDone) for outcome in build.world.outcomes.values())
    build.check_ends()


@CASUAL
@given(graphs(), st.data())
def test_every_job_ends_whatever_fails_and_is_cancelled(drawn, data):
    """Random answers, failures, misses and cancellations: all end, nobody fails for another's cancellation."""
    build = Build(drawn, data, by_hand=tuple(_kinds()), max_running=3, max_running_per_job=2)
    cancelled = set()
    failed = False
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["submit", "answer", "answer", "answer", "begin", "fail", "miss", "cancel"]))
        if move == "submit" and len(build.jobs) < 4:
            build.submit(may_run_afresh=True, may_be_apart=True)
        elif move == "cancel" and build.jobs:
            job = data.draw(st.sampled_from(sorted(build.jobs)))
            if job not in build.world.outcomes:
                cancelled.add(job)
            build.world.feed(JobCancelled(job))
        elif build.world.pending and move in ("answer", "begin", "fail", "miss"):
            ask = build.pick()
            if move == "begin":
                build.world.feed(Began(ask.task))
            elif move == "fail" and not isinstance(ask, Load):
                failed = True
                build.fail(ask)
            elif move == "miss" and isinstance(ask, Load):
                del build.world.pending[ask.task]
                build.world.feed(NotLoadable(ask.task))
            else:
                build.world.feed(build.world.answer(ask))
    build.finish()
    for job in build.jobs:
        outcome = build.world.outcomes[job]
        assert isinstance(outcome, JobFailed) <= failed
        assert (job in cancelled) == (not isinstance(outcome, (JobDone, JobFailed)))
    build.check_ends()


@CASUAL
@given(graphs(), st.data())
def test_cancelling_some_jobs_changes_nothing_for_the_others(drawn, data):
    """No vertex that a job has from beginning to end runs twice, whoever else is cancelled."""
    build = Build(drawn, data, by_hand=(LookUp, Run), max_running=2)
    for _ in range(3):
        build.submit()
    gone = data.draw(st.sampled_from([{"job0"}, {"job1"}, {"job0", "job2"}]))
    for job in sorted(gone):
        for _ in range(data.draw(st.integers(0, 5))):
            if build.world.pending:
                build.world.feed(build.world.answer(build.pick()))
        build.world.feed(JobCancelled(job))
    build.finish()
    for job, (targets, _) in build.jobs.items():
        if job not in gone:
            assert isinstance(build.world.outcomes[job], JobDone)
            ran = [name for name in build.world.ran() if name in needed(build.graph, targets)]
            assert len(set(ran)) == len(ran)
    build.check_ends()


@CASUAL
@given(graphs(), st.data())
def test_a_result_rests_on_results_of_the_same_build(drawn, data):
    """A vertex runs over results of its inputs, and a fresh one's dependents never over what it was before."""
    build = Build(drawn, data, by_hand=(Run,))
    build.world.slow = {}
    build.submit()
    build.finish()
    build.world.forget_history()
    build.submit(may_run_afresh=True)
    build.finish()
    targets, fresh = build.jobs["job1"]
    fresh_names = {build.graph.names[v.digest] for v in fresh}
    above = set()
    for vertex in build.vertices:
        names = {build.graph.names[d] for d in vertex.inputs if d is not None}
        if name_of(vertex) in fresh_names or names & above:
            above.add(name_of(vertex))
    wanted = needed(build.graph, targets)
    first = needed(build.graph, build.jobs["job0"][0])
    ran = build.world.ran()
    assert set(ran) >= {name_of(t) for t in targets} & above
    assert set(ran) <= wanted
    assert not {name for name in ran if name in first} - above
    build.check_ends()


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_vertices_in_any_order(seed):
    """A big random graph, several jobs, random answers: each vertex runs once, and nothing is left."""
    rng = random.Random(seed)  # noqa: S311 - a test's order, no secret
    graph, vertices = Graph(), []
    for i in range(1000):
        below = rng.sample(vertices[-30:], min(len(vertices[-30:]), rng.randrange(4)))
        vertices.append(graph.add(f"v{i}", *below))
    world = World(graph, by_hand=(LookUp, Run), max_running=8)
    world.state.validate = lambda: None  # it looks at everything after each event
    for job in range(3):
        world.submit(job, *rng.sample(vertices[-100:], 3))
    while world.pending:
        world.feed(world.answer(world.pending[rng.choice(list(world.pending))]))
    ran = world.ran()
    assert len(set(ran)) == len(ran)
    assert all(isinstance(outcome, JobDone) for outcome in world.outcomes.values())
    world.assert_nothing_left()


def _kinds():
    return (LookUp, Load, ComputeContentKey, Run, Keep)
