"""``lazyfarm jobs`` and ``attach`` against jobs that are made up: documents, words, exit codes, interrupts."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster import wire
from cluster.digest import digest_of
from cluster.errors import AmbiguousJobError, JobNotFoundError, ManifestNotFoundError, ProcessFailedError
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, JobState, LogStream, VertexEvent, VertexLog, VertexState
from cluster.messages import SessionInfo
from lazyfarm.cli import parts
from lazyfarm.cli.jobs import JobLogs
from lazyfarm.cli.main import app
from lazyfarm.cli.output import Output
from lazyfarm.graph import image
from lazyfarm.jobs import RedisJobs
from lazyfarm.records import RedisRecords
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, SolverMemory
from tests.doubles.documents import read_document, read_progress
from tests.doubles.stores import FakeClock

GRAPH = image("debian:12").run("make").named("[build] RUN make")
DEFINITION = encode_definition(GRAPH.definition())
(MAKE,) = GRAPH.definition().targets
IMAGE = next(digest for digest in GRAPH.definition().vertices if digest != MAKE)
ERROR = ProcessFailedError(("make",), 2, ())


def spec(job, **changes):
    fields = {"labels": {"who": "ü"}, "session": SessionInfo(session_id="driver-1"), **changes}
    return JobSpec(id=JobId(job), definition=digest_of(DEFINITION), targets=(MAKE,), **fields)


class Farm:
    """Jobs in memory, and commands that find them."""

    def __init__(self):
        self.clock = FakeClock()
        self.memory = SolverMemory(self.clock)
        self.store = MemoryJobStore(self.memory)
        self.stream = MemoryJobEvents(self.memory)
        self.jobs = RedisJobs(self.store, self.stream)
        self.attended = []
        self.attend = self.store.attend
        self.store.attend = self._attend

    async def _attend(self, job):
        self.attended.append(job)
        return await self.attend(job)

    def submit(self, job, **changes):
        asyncio.run(self.store.submit(spec(job, **changes), DEFINITION))

    def tell(self, job, *events):
        asyncio.run(self.stream.publish(JobId(job), events))

    def end(self, job, state, error=None):
        async def end():
            (claimed,) = [c for c in await self.store.claim("scheduler-1", ttl_s=0.001, most=9) if c.claim.job == job]
            payload = b"" if error is None else wire.encode_error(error)
            await self.store.end(claimed.claim, state, error=payload)

        asyncio.run(end())

    def run_and_fail(self, job):
        """A job that fails at its second step."""
        self.submit(job)
        self.tell(
            job,
            VertexEvent(vertex=MAKE, name="[build] RUN make", state=VertexState.WAITING),
            VertexEvent(vertex=IMAGE, name="image debian:12", state=VertexState.CACHED),
            VertexEvent(vertex=MAKE, name="[build] RUN make", state=VertexState.RUNNING),
            VertexLog(vertex=MAKE, stream=LogStream.STDOUT, text="gcc -c main.c\nmain.c: "),
            VertexLog(vertex=MAKE, stream=LogStream.STDERR, text="warning\n"),
            VertexEvent(vertex=MAKE, name="", state=VertexState.FAILED, error=wire.encode_error(ERROR)),
        )
        self.end(job, JobState.FAILED, ERROR)


@pytest.fixture
def farm(monkeypatch):
    made = Farm()

    @asynccontextmanager
    async def open_jobs(settings):
        yield made.jobs

    @asynccontextmanager
    async def open_records(settings):
        yield RedisRecords(None, None, None, None, made.jobs)

    monkeypatch.setattr(parts, "_running_settings", lambda state_dir: SimpleNamespace(gateway=""))
    monkeypatch.setattr(parts, "_raise_if_redis_is_gone", lambda settings: None)
    monkeypatch.setattr(parts, "open_records", open_records)
    monkeypatch.setattr(parts, "open_jobs", open_jobs)
    return made


def run(*args):
    return CliRunner().invoke(app, list(args), prog_name="lazyfarm")


def document(*args):
    result = run(*args, "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    return read_document(args, result.stdout), result.exit_code


# -- ls, show -------------------------------------------------------------------------------------


def test_ls_lists_jobs_newest_first(farm):
    """With what each is to build, and whose it is."""
    farm.run_and_fail("aa1")
    farm.submit("bb2", is_detached=True)
    told, code = document("jobs", "ls")
    assert code == 0
    assert [job["job"] for job in told["jobs"]] == ["bb2", "aa1"]
    assert told["jobs"][0] == {
        "job": "bb2",
        "state": "queued",
        "created": told["jobs"][0]["created"],
        "ended": None,
        "targets": ["[build] RUN make"],
        "detached": True,
        "cancel_requested": False,
        "abandoned": False,
        "driver": "driver-1",
        "scheduler": "",
        "labels": {"who": "ü"},
    }
    result = run("jobs", "ls")
    assert result.exit_code == 0
    assert "2 jobs, 1 going on" in result.stdout
    assert "[build] RUN make  who=ü" in result.stdout


def test_show_tells_steps_times_and_what_went_wrong(farm):
    """By the start of its ID; in words with the hint."""
    farm.run_and_fail("aa1")
    told, code = document("jobs", "show", "a")
    assert code == 0
    assert (told["job"], told["state"]) == ("aa1", "failed")
    assert told["failure"] == {"type": "ProcessFailedError", "message": str(ERROR), "hint": ERROR.hint}
    assert [(vertex["number"], vertex["name"], vertex["state"]) for vertex in told["vertices"]] == [
        (1, "image debian:12", "cached"),
        (2, "[build] RUN make", "failed"),
    ]
    assert told["vertices"][0]["started"] is None
    assert told["vertices"][1]["started"] is not None
    words = run("jobs", "show", "aa1").stdout
    assert "'make' ended with exit code 2" in words
    assert "driver-1" in words


def test_show_has_a_hint_where_the_error_has_one(farm):
    """What to do next is half of an error."""
    farm.submit("aa1")
    farm.end("aa1", JobState.FAILED, ManifestNotFoundError("debian:nosuch"))
    assert "check the repository and the tag" in run("jobs", "show", "aa1").stdout


def test_what_is_asked_of_a_job_shows(farm):
    """It is being cancelled, or nobody waits for it any more; its scheduler has not said so yet."""
    farm.submit("aa1")
    asyncio.run(farm.store.claim("scheduler-1", ttl_s=10.0, most=1))
    farm.clock.advance(60.0)
    assert "abandoned" in run("jobs", "ls").stdout
    farm.submit("bb2", is_detached=True)
    asyncio.run(farm.store.claim("scheduler-1", ttl_s=10.0, most=2))
    assert run("jobs", "cancel", "bb2").stdout == "job bb2: its scheduler was asked to cancel it\n"
    assert "cancelling" in run("jobs", "ls").stdout


@pytest.mark.parametrize("command", [["jobs", "show"], ["jobs", "logs"], ["jobs", "cancel"], ["attach"]], ids=" ".join)
def test_a_job_is_named_by_the_start_of_its_id(command, farm):
    """If that is one job's; else the error says what is wrong, and a whole ID is never ambiguous."""
    farm.submit("aa")
    farm.submit("aab")
    assert document(*command, "a") == (error(AmbiguousJobError("a", 2)), 1)
    assert document(*command, "x") == (error(JobNotFoundError("x")), 1)
    assert document(*command, "") == (error(JobNotFoundError("")), 1)
    farm.end("aa", JobState.CANCELLED)
    told, _ = document(*command, "aa")
    assert told.get("job", "aa") == "aa"
    assert "JobNotFound" not in str(told)


def error(exc):
    return {"error": {"type": type(exc).__name__, "message": str(exc), "hint": exc.hint}}


# -- logs, cancel ---------------------------------------------------------------------------------


def test_logs_are_what_the_commands_said(farm):
    """Each line with the number of its step and its time, the last one though it has no end."""
    farm.run_and_fail("aa1")
    result = run("jobs", "logs", "aa1")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "#2 [build] RUN make",
        "#2 0.000 gcc -c main.c",
        "#2 0.000 warning",
        "#2 0.000 main.c: ",
    ]


@pytest.mark.parametrize("wanted", ["run MAKE", "2", "#2", MAKE, MAKE[7:20]])
def test_logs_of_one_step_are_as_it_said_them(wanted, farm):
    """Nothing is put before its lines."""
    farm.run_and_fail("aa1")
    assert run("jobs", "logs", "--vertex", wanted, "aa1").stdout == "gcc -c main.c\nwarning\nmain.c: \n"


@pytest.mark.parametrize(
    ("is_terminal", "variable", "shown"),
    [
        (True, "", "\x1b[32m100%\x1b[0m"),
        (True, "NO_COLOR", "100%"),
        (False, "FORCE_COLOR", "100%"),
    ],
)
def test_logs_do_not_steer_who_reads_them(is_terminal, variable, shown, monkeypatch):
    """Of a progress bar the last state, after its time; colours on a terminal that wants them, else nothing."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: is_terminal)
    out = Output(as_json=False)
    out.stdout = stdout
    text = "\x1b]0;mine\x07 50%\r\x1b[32m100%\n"
    JobLogs(out, None)(VertexLog(vertex=MAKE, stream=LogStream.STDOUT, text=text, wall_s=1.0))
    assert stdout.getvalue().splitlines()[-1].endswith(f" {shown}")
    assert stdout.getvalue().count("\x1b") == shown.count("\x1b")


def test_logs_of_no_step_are_an_error(farm):
    """Silence would look like a command that said nothing."""
    farm.run_and_fail("aa1")
    result = run("jobs", "logs", "--vertex", "nosuch", "aa1")
    assert result.exit_code == 1
    assert "no step of the job is called that" in result.stderr
    assert run("jobs", "logs", "--vertex", "debian", "aa1").exit_code == 0


def test_logs_as_a_document_are_all_chunks(farm):
    """With stream and time."""
    farm.run_and_fail("aa1")
    told, code = document("jobs", "logs", "--follow", "aa1")
    assert code == 0
    assert told["job"] == "aa1"
    assert [(chunk["stream"], chunk["text"]) for chunk in told["logs"]] == [
        ("stdout", "gcc -c main.c\nmain.c: "),
        ("stderr", "warning\n"),
    ]
    assert all(chunk["vertex"] == MAKE and chunk["name"] == "[build] RUN make" for chunk in told["logs"])


def test_logs_do_not_wait_unless_they_are_to(farm):
    """The job goes on; what it said so far is printed, and that's that."""
    farm.submit("aa1")
    farm.tell("aa1", VertexLog(vertex=MAKE, stream=LogStream.STDOUT, text="so far\n"))
    assert "so far" in run("jobs", "logs", "aa1").stdout


# -- report ---------------------------------------------------------------------------------------


def test_a_report_is_written_where_it_is_asked_for(farm, tmp_path, monkeypatch):
    """Here under the job's ID, into a file, or to standard output and then nothing else."""
    farm.run_and_fail("4f2a")
    monkeypatch.chdir(tmp_path)
    told, code = document("report", "4f")
    assert (told, code) == ({"job": "4f2a", "file": str(tmp_path / "job-4f2a.html")}, 0)
    text = (tmp_path / "job-4f2a.html").read_text()
    assert "[build] RUN make" in text
    assert "main.c: " in text  # the last words of what failed
    assert run("report", "4f2a", "--output", str(tmp_path / "other.html")).exit_code == 0
    assert (tmp_path / "other.html").read_text() == text
    assert run("report", "4f2a", "-o", "-").stdout == text


def test_a_report_that_cannot_be_written_says_so(farm, tmp_path):
    """One line, and what the job is stays what it is."""
    farm.run_and_fail("4f2a")
    result = run("report", "4f2a", "--output", str(tmp_path / "none" / "f.html"))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "No such file" in result.stderr
    assert run("report", "4f2a", "--output", "-", "--json").exit_code == 1


def test_a_queued_job_is_cancelled_at_once(farm):
    """And cancelling it again is no error; one that has ended otherwise can't be cancelled."""
    farm.submit("aa1")
    assert document("jobs", "cancel", "aa1") == ({"job": "aa1", "state": "cancelled"}, 0)
    assert run("jobs", "cancel", "aa1").stdout == "job aa1: cancelled\n"
    farm.run_and_fail("bb2")
    told, code = document("jobs", "cancel", "bb2")
    assert (told["error"]["type"], code) == ("JobEndedError", 1)


# -- attach ---------------------------------------------------------------------------------------


def test_attach_shows_a_job_to_its_end(farm):
    """From its start, though it has ended long ago; its error is one line, exit 1."""
    farm.run_and_fail("aa1")
    result = run("attach", "aa")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:4] == ["#1 image debian:12", "#1 CACHED", "", "#2 [build] RUN make"]
    assert result.stderr == "error: 'make' ended with exit code 2\n"


def test_attach_exits_0_when_the_job_is_done(farm):
    """The document tells the state."""
    farm.submit("aa1")
    farm.end("aa1", JobState.DONE)
    assert document("attach", "aa1") == ({"job": "aa1", "state": "done"}, 0)


def test_attach_to_a_cancelled_job_says_so(farm):
    """It did not come to its end."""
    farm.submit("aa1")
    asyncio.run(farm.store.request_cancel(JobId("aa1")))
    told, code = document("attach", "aa1")
    assert (told["error"]["type"], code) == ("JobCancelledError", 1)


def test_attach_with_events_has_nothing_else_on_stdout(farm):
    """One object a line; the error is on stderr."""
    farm.run_and_fail("aa1")
    result = run("attach", "--progress", "json", "aa1")
    assert result.exit_code == 1
    kinds = [line["event"] for line in read_progress(result.stdout)]
    assert kinds == ["vertex", "vertex", "vertex", "log", "log", "vertex", "end"]
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("args", [["--progress", "fancy"], ["--progress", "json", "--json"]], ids=" ".join)
def test_attach_with_a_mode_that_cannot_be_is_wrong_usage(args, farm):
    """Exit 2."""
    assert run("attach", *args, "aa1").exit_code == 2


@pytest.mark.parametrize(
    ("is_detached", "says"), [(True, "goes on;"), (False, "goes on for as long as its driver does;")]
)
def test_ctrl_c_detaches(is_detached, says, farm):
    """The job goes on, and how to come back is said; exit 130."""
    farm.submit("aa1", is_detached=is_detached)
    follow = farm.stream.follow

    async def interrupted(job, *, deadline_s):
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        async for event in follow(job, deadline_s=deadline_s):
            yield event

    farm.stream.follow = interrupted
    result = run("attach", "aa1")
    assert result.exit_code == 130
    assert result.stderr == f"detached: job aa1 {says} `lazyfarm attach aa1` follows it again\n"
    assert asyncio.run(farm.store.get(JobId("aa1"))).state is JobState.QUEUED
    told, code = document("attach", "aa1")
    assert (told["error"]["type"], code) == ("Interrupted", 130)


async def test_who_attends_says_so_again_and_again(farm):
    """Until the job has ended: its driver may be dead. That Redis doesn't answer for a moment is borne."""
    await farm.store.submit(spec("aa1"), DEFINITION)
    (claimed,) = await farm.store.claim("scheduler-1", ttl_s=1000.0, most=1)
    enough = asyncio.Event()

    async def attend(job):
        farm.attended.append(job)
        if len(farm.attended) == 1:
            raise wire.decode_error(wire.encode_error(ManifestNotFoundError("any error of ours")))
        if len(farm.attended) == 5:
            enough.set()

    farm.store.attend = attend
    attending = asyncio.create_task(farm.jobs.attend(JobId("aa1"), lambda event: None, every_s=0.0))
    await enough.wait()
    await farm.store.end(claimed.claim, JobState.DONE)
    assert (await attending).state is JobState.DONE
    said = len(farm.attended)
    await asyncio.sleep(0)
    assert len(farm.attended) == said
