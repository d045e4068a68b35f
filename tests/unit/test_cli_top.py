"""``lazyfarm top`` against a farm that is made up: once in a pipe, again and again on a terminal."""

from __future__ import annotations

import asyncio
import io
from functools import partial
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.digest import digest_of
from cluster.job import JobId, JobRecord, JobSpec, JobState
from cluster.messages import NodeRecord, SessionInfo
from lazyfarm.cli import parts
from lazyfarm.cli.main import app
from lazyfarm.cli.output import Output
from lazyfarm.cli.top import _watch
from lazyfarm.now import look
from lazyfarm.web import reading
from lazyfarm.web.flights import Flight
from tests.doubles.documents import read_document
from tests.doubles.stores import eventually

BLOB = digest_of(b"layer")


def flight(number=0, **changes):
    fields = {
        "key": f"blob:{BLOB}",
        "work": "blob",
        "subject": BLOB,
        "owner": "n1/fetch",
        "waiters": 3,
        "current_bytes": 1_000_000,
        "total_bytes": 3_000_000 + number,
        "rate": 1_000_000.0,
        "is_aborting": False,
    }
    return Flight(**{**fields, **changes})


def job(state):
    spec = JobSpec(id=JobId(f"j-{state.value}"), definition=BLOB, targets=(BLOB,), session=SessionInfo(session_id="s"))
    return JobRecord(spec=spec, state=state, created_wall_s=1000.0), ("app\n:1",)


class Reader:
    """What a farm does, as tests say."""

    flying = [flight()]  # noqa: RUF012 - replaced, never changed

    def __init__(self, settings):
        self.looks = 0
        self.is_closed = False
        Reader.last = self

    async def nodes(self):
        return [NodeRecord(id=f"n{n}", ray_id="f", address="127.0.0.1", alive=n < 2, draining=n == 1) for n in range(3)]

    async def ops(self, nodes):
        return {"n0": 2, "n1": 1, "n2": 0}

    async def flights(self):
        self.looks += 1
        return self.flying

    async def newest_jobs(self):
        return [job(JobState.RUNNING), job(JobState.QUEUED), job(JobState.DONE)]

    async def now_wall_s(self):
        return 1090.0

    async def aclose(self):
        self.is_closed = True


@pytest.fixture
def top(monkeypatch):
    monkeypatch.setattr(parts, "_running_settings", lambda state_dir: SimpleNamespace(gateway=""))
    monkeypatch.setattr(parts, "_raise_if_redis_is_gone", lambda settings: None)
    monkeypatch.setattr(reading, "FarmReader", Reader)

    def run(*arguments):
        result = CliRunner().invoke(app, ["top", "--every", "0.1", *arguments], prog_name="lazyfarm")
        assert result.exit_code == 0, result.output
        assert Reader.last.is_closed
        return result.stdout

    return run


def test_in_a_pipe_it_looks_long_enough_to_tell_a_rate_and_ends(top):
    """Nodes with what they do, flights with how long they take, and the jobs that go on."""
    lines = [line.split() for line in top().splitlines() if line]
    assert " ".join(lines[0]) == "1 flight, 976.6 KiB/s; 2 jobs going on"
    assert ["n0", "alive", "2", "0"] in lines
    assert ["n1", "draining", "1", "1"] in lines
    assert ["n2", "dead", "0", "0"] in lines
    (told,) = (line for line in lines if line[0] == "blob")
    assert told[2:] == ["n1/fetch", "976.6", "KiB", "2.9", "MiB", "976.6", "KiB", "2.00", "s", "3"]
    assert ["j-running", "running", "90", "s", "app", ":1"] in lines
    assert not any("j-done" in line for line in lines)
    assert Reader.last.looks == 2


def test_thousands_of_flights_are_some_lines_and_a_number(top, monkeypatch):
    """Those that the reader has first: they have most to come."""
    monkeypatch.setattr(Reader, "flying", [flight(number) for number in range(2000)])
    text = top()
    assert text.count("n1/fetch") == 15
    assert "and 1985 more" in text


def test_nothing_that_goes_on_is_no_table(top, monkeypatch):
    """Only the nodes."""
    monkeypatch.setattr(Reader, "flying", [])
    assert "FLIGHT" not in top()


def test_as_a_document_it_is_all_there_is(top, monkeypatch):
    """Every flight, in one object."""
    monkeypatch.setattr(Reader, "flying", [flight(number) for number in range(20)])
    document = read_document(("top",), top("--json"))
    assert len(document["flights"]) == 20
    assert document["nodes"][0] == {"id": "n0", "alive": True, "draining": False, "ops": 2}
    assert [each["job"] for each in document["jobs"]] == ["j-running", "j-queued"]


async def test_on_a_terminal_it_looks_again_and_again(monkeypatch):
    """In place of what was shown before, until it is interrupted; the terminal is left as it was."""
    out = Output(as_json=False)
    out.stdout = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    reader = Reader(None)
    watching = asyncio.ensure_future(_watch(out, partial(look, reader), 0.01))
    await eventually(lambda: reader.looks >= 3)
    watching.cancel()
    await asyncio.wait({watching})
    shown = out.stdout.getvalue()
    assert shown.count("n1/fetch") >= 2
    assert shown.rindex("\x1b[?1049l") > shown.index("\x1b[?1049h")
