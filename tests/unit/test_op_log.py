"""What one run of an op says: to each of its jobs from its start, in order, whoever else can't be told."""

import asyncio
from collections import defaultdict

import pytest

from actors import op_log
from actors.op_log import OpLog
from cluster.digest import digest_of
from cluster.errors import StaleFenceError, UnavailableError
from cluster.job import LogStream, VertexLog, VertexLogDropped
from storage.containers.logs import LogLine

V = digest_of(b"vertex")
OUT, ERR = LogStream.STDOUT, LogStream.STDERR


class Events:
    """Streams of jobs, each of which can be held up or out of reach."""

    def __init__(self):
        self.told = defaultdict(list)
        self.most = 0
        self.errors = {}
        self.gates = {}
        self.arrived = asyncio.Event()

    async def publish(self, job, events, *, fence=None):
        self.arrived.set()
        if job in self.gates:
            await self.gates[job].wait()
        if job in self.errors:
            raise self.errors[job]
        self.most = max(self.most, len(events))
        self.told[job] += events

    def text(self, job):
        return "".join(event.text for event in self.told[job] if isinstance(event, VertexLog))

    def gaps(self, job):
        return [number for number, event in enumerate(self.told[job]) if event == VertexLogDropped(vertex=V)]


@pytest.fixture
def events():
    return Events()


def line(text, stream=OUT, **more):
    return LogLine(stream, text, **more)


def said(text, stream=OUT):
    return VertexLog(vertex=V, stream=stream, text=text)


async def test_neighbours_of_one_stream_are_one_event(events):
    """Few events; lines end, their pieces don't, and the order of both streams is kept."""
    log = OpLog(V, events, ["j1"])
    await log.tell([line("a"), line("b", is_partial=True), line("c"), line("d", ERR), line("e", is_partial=True)])
    assert events.told["j1"] == [said("a\nbc\n"), said("d\n", ERR), said("e")]


async def test_nothing_said_is_nothing_told(events):
    """An empty reading is no event, and who comes before the first word is told of nothing."""
    log = OpLog(V, events, ["j1"])
    await log.tell([])
    await log.add("j2")
    assert not events.arrived.is_set()


async def test_late_jobs_get_all_from_the_start_and_in_order(events):
    """What was said before, then what comes; who is there already gets nothing twice."""
    log = OpLog(V, events, ["j1"])
    await log.tell([line("one")])
    await log.tell([line("two", ERR)])
    for job in ("j2", "j2", "j1"):
        await log.add(job)
    await log.tell([line("three")])
    assert events.told["j1"] == events.told["j2"] == [said("one\n"), said("two\n", ERR), said("three\n")]


async def test_what_comes_waits_for_what_was_said_before(events):
    """A line that is said while a late job is being told of the start comes after it."""
    log = OpLog(V, events, ["j1"])
    await log.tell([line("one")])
    events.gates["j2"] = asyncio.Event()
    events.arrived.clear()
    adding = asyncio.create_task(log.add("j2"))
    await events.arrived.wait()
    held_up = events.gates.pop("j2")
    telling = asyncio.create_task(log.tell([line("two")]))
    for _ in range(5):
        await asyncio.sleep(0)
    held_up.set()
    await asyncio.gather(adding, telling)
    assert events.told["j2"] == [said("one\n"), said("two\n")]


@pytest.mark.parametrize("error", [UnavailableError("redis", "gone"), StaleFenceError("job:j1", 1)])
async def test_who_cant_be_told_disturbs_nobody(events, error):
    """Neither the op nor another job; and what can be told later is."""
    events.errors["j1"] = error
    log = OpLog(V, events, ["j1", "j2"])
    await log.tell([line("one")])
    await log.add("j3")
    del events.errors["j1"]
    await log.tell([line("two")])
    assert [events.text(job) for job in ("j1", "j2", "j3")] == ["two\n", "one\ntwo\n", "one\ntwo\n"]


async def test_what_is_not_kept_is_marked_for_late_jobs(events, monkeypatch):
    """The start is kept, then there is a gap; those who were there have no gap, and what comes is for all."""
    monkeypatch.setattr(op_log, "_KEPT", 8)
    log = OpLog(V, events, ["j1"])
    for text in ("one", "two", "three", "four"):
        await log.tell([line(text)])
    await log.add("j2")
    await log.tell([line("five")])
    assert (events.text("j1"), events.gaps("j1")) == ("one\ntwo\nthree\nfour\nfive\n", [])
    assert events.text("j2") == "one\ntwo\nfive\n"
    assert len(events.gaps("j2")) == 1
    assert events.told["j2"][-1] == said("five\n")


async def test_there_is_no_gap_where_all_is_kept(events, monkeypatch):
    """To the last character: nothing is missing, so nothing is said to be."""
    monkeypatch.setattr(op_log, "_KEPT", 8)
    log = OpLog(V, events, ["j1"])
    await log.tell([line("one"), line("two")])
    await log.add("j2")
    assert (events.text("j2"), events.gaps("j2")) == ("one\ntwo\n", [])


async def test_much_that_was_said_is_told_in_parts(events):
    """A script of the store gets some hundreds of events, however chatty a command was."""
    log = OpLog(V, events, ["j1"])
    for number in range(2000):
        await log.tell([line(str(number), ERR if number % 2 else OUT)])
    await log.add("j2")
    assert events.text("j2") == events.text("j1")
    assert events.most < 1000
