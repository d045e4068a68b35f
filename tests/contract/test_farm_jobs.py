"""``lazyfarm jobs`` and ``attach`` over a real Redis, as processes and in this one; Ray is nowhere."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cluster import wire
from cluster.digest import digest_of
from cluster.errors import JobNotFoundError, ProcessFailedError
from cluster.graph import encode_definition
from cluster.job import JobEnded, JobId, JobSpec, JobState, LogStream, VertexEvent, VertexLog, VertexState
from cluster.messages import SessionInfo
from lazyfarm.cli.main import app
from lazyfarm.graph import image
from lazyfarm.jobs import FarmJobs, open_jobs
from lazyfarm.records import open_records
from lazyfarm.settings import load_settings
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

pytestmark = pytest.mark.redis

GRAPH = image("debian:12").run("make").named("[build] RUN make")
DEFINITION = encode_definition(GRAPH.definition())
(MAKE,) = GRAPH.definition().targets
ERROR = ProcessFailedError(("make",), 2, ())


class JobFarm(FarmOfRedis):
    """A farm in Redis whose jobs tests end."""

    @property
    def settings(self):
        return load_settings(self.state_dir, None, {})

    def act(self, act):
        """Run ``act(store, events)`` over a client of its own."""

        async def run():
            self.links = []
            self.stores()
            try:
                return await act(RedisJobStore(self.links[0], self.keys), RedisJobEvents(self.links[0], self.keys))
            finally:
                await self.close()

        return asyncio.run(run())

    def submit(self, job, **changes):
        fields = {"session": SessionInfo(session_id="driver-1"), **changes}
        spec = JobSpec(id=JobId(job), definition=digest_of(DEFINITION), targets=(MAKE,), **fields)
        return self.act(lambda store, events: store.submit(spec, DEFINITION))

    def claim(self):
        (claimed,) = self.act(lambda store, events: store.claim("scheduler-1", ttl_s=1000.0, most=1))
        return claimed.claim

    def tell(self, job, *events):
        self.act(lambda store, stream: stream.publish(JobId(job), events))

    def end(self, claim, state, error=b""):
        self.act(lambda store, events: store.end(claim, state, error=error))

    def get(self, job):
        return self.act(lambda store, events: store.get(JobId(job)))


@pytest.fixture(params=sorted(redis_binaries()))
def farm(request, redis_servers, tmp_path):
    return JobFarm(redis_servers(request.param).config, tmp_path / "state")


def step(state, error=b""):
    return VertexEvent(vertex=MAKE, name="[build] RUN make", state=state, error=error)


def run(farm, *args):
    return CliRunner().invoke(app, [*args, "--state-dir", str(farm.state_dir)], prog_name="lazyfarm")


def test_what_is_recorded_of_jobs_is_read(farm):
    """Jobs with their targets by name, and what was told so far; unknown ones are told apart."""
    farm.submit("aa1")
    farm.submit("ab2", is_detached=True)
    farm.tell("aa1", step(VertexState.RUNNING))
    asyncio.run(_read_records(farm.settings))


async def _read_records(settings):
    async with open_records(settings) as records:
        assert [(job.record.id, job.targets) for job in await records.jobs()] == [
            ("ab2", ("[build] RUN make",)),
            ("aa1", ("[build] RUN make",)),
        ]
        assert (await records.job("aa")).record.id == "aa1"
        assert [event.state for event in await records.events(JobId("aa1"))] == [VertexState.RUNNING]
        with pytest.raises(JobNotFoundError):
            await records.job("x")
        with pytest.raises(JobNotFoundError):
            await records.events(JobId("x"))


def test_commands_read_and_cancel(farm):
    """The same words as with jobs that are made up."""
    farm.submit("aa1")
    told = json.loads(run(farm, "jobs", "ls", "--json").stdout)
    assert [job["job"] for job in told["jobs"]] == ["aa1"]
    assert run(farm, "jobs", "cancel", "aa").stdout == "job aa1: cancelled\n"
    assert json.loads(run(farm, "jobs", "show", "aa1", "--json").stdout)["state"] == "cancelled"
    assert run(farm, "jobs", "logs", "aa1").exit_code == 0
    assert run(farm, "attach", "aa1").exit_code == 1


def start(farm, *args):
    """Run a command as a process of its own; its lines are read as they come."""
    command = [sys.executable, "-m", "lazyfarm", *args, "--state-dir", str(farm.state_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_attach_keeps_a_job_whose_driver_is_gone(farm):
    """It is abandoned until somebody attends to it; then its events come live, and its error is one line."""
    farm.submit("aa1")
    claim = farm.claim()
    farm.pass_time(60.0)
    assert farm.get("aa1").is_abandoned
    farm.tell("aa1", step(VertexState.RUNNING))
    with start(farm, "attach", "aa1") as attached:
        assert attached.stdout.readline() == "#1 [build] RUN make\n"
        assert not farm.get("aa1").is_abandoned
        farm.tell("aa1", VertexLog(vertex=MAKE, stream=LogStream.STDOUT, text="gcc\n"))
        assert attached.stdout.readline().endswith(" gcc\n")
        payload = wire.encode_error(ERROR)
        farm.tell("aa1", step(VertexState.FAILED, payload))
        farm.end(claim, JobState.FAILED, payload)
        said, error = attached.communicate(timeout=20)
    assert said.startswith("#1 ERROR: 'make' ended with exit code 2\n")
    assert error == "error: 'make' ended with exit code 2\n"
    assert attached.returncode == 1


def test_ctrl_c_leaves_the_job_alone(farm):
    """Exit 130; the job goes on."""
    farm.submit("aa1", is_detached=True)
    farm.claim()
    farm.tell("aa1", step(VertexState.RUNNING))
    with start(farm, "attach", "aa1") as attached:
        attached.stdout.readline()
        attached.send_signal(signal.SIGINT)
        _, error = attached.communicate(timeout=20)
    assert attached.returncode == 130
    assert error == "detached: job aa1 goes on; `lazyfarm attach aa1` follows it again\n"
    assert farm.get("aa1").state is JobState.RUNNING
    assert not farm.get("aa1").is_cancel_requested


def test_logs_are_followed(farm):
    """Line by line, until the job has ended."""
    farm.submit("aa1", is_detached=True)
    claim = farm.claim()
    farm.tell("aa1", step(VertexState.RUNNING), VertexLog(vertex=MAKE, stream=LogStream.STDOUT, text="one\n"))
    with start(farm, "jobs", "logs", "--follow", "--vertex", "make", "aa1") as following:
        assert following.stdout.readline() == "one\n"
        farm.tell("aa1", VertexLog(vertex=MAKE, stream=LogStream.STDERR, text="two"))
        farm.end(claim, JobState.DONE)
        assert following.communicate(timeout=20) == ("two\n", "")
    assert following.returncode == 0


def test_a_job_is_followed_to_its_end(farm):
    """By whoever has the farm's settings, asynchronously."""
    farm.submit("aa1")
    farm.end(farm.claim(), JobState.DONE)

    async def follow():
        got = []
        async with open_jobs(farm.settings) as jobs:
            assert isinstance(jobs, FarmJobs)
            end = await jobs.attend((await jobs.find("a")).id, got.append)
        return end, got

    end, got = asyncio.run(follow())
    assert got == [end]
    assert isinstance(end, JobEnded)
    assert end.state is JobState.DONE
