"""Why a step missed the cache: what differs from the nearest build that had it, found in graphs alone."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.digest import digest_of
from cluster.errors import InvalidArgumentError, JobNotFoundError, TreeLostError
from cluster.graph import CopyAction, Definition, FileOp, LocalOp, Vertex, encode_definition
from cluster.graph_changes import changes, file_changes
from cluster.job import JobId, JobSpec, VertexEvent, VertexState
from cluster.messages import SessionInfo
from cluster.tree import EntryKind, Tree, TreeEntry
from lazyfarm.cli import parts
from lazyfarm.cli.main import app
from lazyfarm.explain import RedisExplain
from lazyfarm.graph import image, scratch
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, SolverMemory
from tests.doubles.stores import FakeClock


def entry(path, content):
    return TreeEntry(path, EntryKind.FILE, 0o644, len(content), digest_of(content))


OLD_TREE = Tree((entry("a", b"1"), entry("b", b"1"), entry("c", b"1")))
NEW_TREE = Tree((entry("b", b"2"), entry("c", b"1"), entry("d", b"1")))
TREES = {digest_of(b"old"): OLD_TREE, digest_of(b"new"): NEW_TREE}


def build(*, base="debian:12", command="make", env="1", more=False):
    """Return a graph of three steps, as a Dockerfile makes them."""
    start = image(base)
    first = start.run(["apt", "update"], env={"A": env}).named("[1] RUN apt")
    made = first.run([command, "all"] if more else [command]).named("[2] RUN make")
    return scratch().copy(made, "/out", "/").named("[3] COPY out").definition()


def top(definition):
    (target,) = definition.targets
    return target


def told(old, new):
    return [(one.name, one.what, one.before, one.now) for one in changes(old, top(old), new, top(new))]


def test_a_graph_differs_in_nothing_from_itself():
    """Nor from one that was made the same way."""
    assert told(build(), build()) == []


def test_what_differs_is_told_where_it_does_the_lowest_first():
    """Of what stands on it nothing: it differs by that alone."""
    assert told(build(), build(command="ninja", env="2")) == [
        ("[1] RUN apt", "env[0][1]", "1", "2"),
        ("[2] RUN make", "args[0]", "make", "ninja"),
    ]
    ((_, what, before, now),) = told(build(), build(base="debian:13"))
    assert (what, before[-9:], now[-9:]) == ("reference", "debian:12", "debian:13")


def test_a_part_that_grew_is_told_of_as_a_whole():
    """Which of its items are new can't be known."""
    assert told(build(), build(more=True)) == [("[2] RUN make", "args", "('make',)", "('make', 'all')")]


def test_an_op_of_another_kind_is_told_of_and_nothing_below_it():
    """What it stands on has nothing to do with what the other stood on."""
    old, new = build(), image("alpine:3").named("[3] COPY out").definition()
    assert told(old, new) == [("[3] COPY out", "op", "file", "image")]


def test_a_long_value_is_cut():
    """With how long it is."""
    ((_, _, before, now),) = told(build(), build(command="x" * 1000))
    assert before == "make"
    assert now.startswith("xxx")
    assert now.endswith("… (1000 characters)")


def test_a_shared_step_is_looked_at_once():
    """A graph with very many paths has few pairs of vertices."""

    def diamond(base):
        state = image(base)
        for number in range(60):
            state = state.copy(state, "/a", f"/{number}")
        return state.definition()

    assert len(told(diamond("a"), diamond("b"))) == 1


def test_paths_of_a_directory_are_told_by_what_became_of_them():
    """New, gone, changed; in their order."""
    assert file_changes(OLD_TREE, NEW_TREE) == ["- a", "~ b", "+ d"]


# -- a farm that knows jobs -----------------------------------------------------------------------


class Farm:
    def __init__(self):
        self.clock = FakeClock()
        memory = SolverMemory(self.clock)
        self.store, self.events = MemoryJobStore(memory), MemoryJobEvents(memory)
        self.trees = dict(TREES)
        self.explain = RedisExplain(None, None, self.store, self.events, audit=None, open_tree=self.open_tree)

    async def open_tree(self, digest):
        if digest not in self.trees:
            raise TreeLostError(digest, "it is gone")
        return self.trees[digest]

    async def submit(self, name, definition, state=VertexState.COMPLETED, **changes):
        self.clock.now_s += 10
        payload = encode_definition(definition)
        session = SessionInfo(session_id="s")
        spec = JobSpec(
            id=JobId(name), definition=digest_of(payload), targets=definition.targets, session=session, **changes
        )
        await self.store.submit(spec, payload)
        events = [VertexEvent(vertex=one, name=definition.name(one), state=state) for one in definition.order]
        await self.events.publish(JobId(name), events)


@pytest.fixture
def farm():
    return Farm()


async def test_the_nearest_build_is_the_one_that_differs_least(farm):
    """Not the last one; a later one never."""
    await farm.submit("aa", build(command="ninja"))
    await farm.submit("bb", build(base="debian:13", command="cc", env="2"))
    await farm.submit("cc", build())
    await farm.submit("dd", build())
    found = await farm.explain.miss("COPY out", job="cc")
    assert (found.job, found.nearest, found.name) == ("cc", "aa", "[3] COPY out")
    assert [(one.change.what, one.change.before, one.change.now) for one in found.differs] == [
        ("args[0]", "ninja", "make")
    ]
    assert found.images == ("docker.io/library/debian:12",)
    asked = await farm.explain.miss("COPY out", job="cc", against="bb")
    assert (asked.nearest, len(asked.differs)) == ("bb", 3)


async def test_the_newest_job_is_meant_where_none_is_named(farm):
    """And a step by its digest, where it has no such name."""
    await farm.submit("aa", build())
    definition = build(env="2")
    await farm.submit("bb", definition, no_cache=definition.targets)
    found = await farm.explain.miss(top(definition).removeprefix("sha256:")[:8])
    assert (found.job, found.vertex, found.is_fresh) == ("bb", top(definition), True)


async def test_files_of_a_directory_are_named_while_they_are_known(farm):
    """Once they are collected, that it differs is all there is."""
    old, new = (Vertex(LocalOp(tree=tree)) for tree in TREES)
    for name, vertex in (("aa", old), ("bb", new)):
        await farm.submit(name, local_graph(vertex))
    found = await farm.explain.miss("COPY src")
    assert found.differs[0].files == ("- a", "~ b", "+ d")
    farm.trees.clear()
    assert (await farm.explain.miss("COPY src")).differs[0].files == ()


def local_graph(vertex):
    """Return a graph that copies from a directory."""
    copied = Vertex(FileOp(actions=(CopyAction(input=1, sources=("/",), destination="/"),)), (None, vertex.digest))
    names = {copied.digest: "COPY src", vertex.digest: "the context"}
    return Definition({vertex.digest: vertex, copied.digest: copied}, (copied.digest,), names)


async def test_a_step_that_is_none_or_several_is_refused(farm):
    """As is a farm without a job, by one clear error."""
    with pytest.raises(JobNotFoundError):
        await farm.explain.miss("RUN")
    await farm.submit("aa", build())
    with pytest.raises(InvalidArgumentError, match="no step of the job"):
        await farm.explain.miss("RUN nothing")
    with pytest.raises(InvalidArgumentError, match="2 steps have that"):
        await farm.explain.miss("RUN")


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture
def command(farm, monkeypatch):
    @asynccontextmanager
    async def open_explain(settings):
        yield farm.explain

    monkeypatch.setattr(parts, "_running_settings", lambda state_dir: SimpleNamespace(gateway=""))
    monkeypatch.setattr(parts, "_raise_if_redis_is_gone", lambda settings: None)
    monkeypatch.setattr(parts, "open_explain", open_explain)

    def run(*arguments):
        result = CliRunner().invoke(app, ["explain", "miss", *arguments], prog_name="lazyfarm")
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_command_says_what_differs(farm, command):
    """In words, and as a document."""
    asyncio.run(farm.submit("aa", build()))
    asyncio.run(farm.submit("bb", build(command="ninja")))
    assert command("COPY out") == (
        "[3] COPY out of job bb: completed\nagainst job aa:\n  [2] RUN make\n    args[0]: make -> ninja\n"
    )
    document = json.loads(command("COPY out", "--json"))
    assert (document["job"], document["against"], document["state"]) == ("bb", "aa", "completed")
    assert [each["what"] for each in document["differs"]] == ["args[0]"]


@pytest.mark.parametrize(
    ("state", "fresh", "words"),
    [
        (VertexState.CACHED, False, "it was found in the cache"),
        (VertexState.COMPLETED, True, "told to run it afresh"),
        (VertexState.COMPLETED, False, "an image has moved: docker.io/library/debian:12"),
    ],
)
def test_the_command_says_so_where_nothing_differs(farm, command, state, fresh, words):
    """It was no miss, it was asked for, or the graph can't tell."""
    definition = build()
    asyncio.run(farm.submit("aa", definition))
    asyncio.run(farm.submit("bb", definition, state, no_cache=definition.targets if fresh else ()))
    assert words in command("COPY out")


def test_the_command_says_so_where_there_is_nothing_to_compare_with(farm, command):
    """The first build of its kind."""
    asyncio.run(farm.submit("aa", build()))
    assert "nothing to compare with" in command("COPY out")
