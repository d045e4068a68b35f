"""Who answers for jobs: their own drivers, or the farm; for a piece of work, any that is the same to that registry."""

import asyncio
import contextlib
import json
from dataclasses import replace

import pytest

from actors import attending
from actors.job_sessions import JobSessions
from actors.session_host import SessionHost
from cluster.config import BuildConfig, Config
from cluster.digest import digest_of
from cluster.errors import AccessDeniedError, CredentialFileError, InternalError, SessionGoneError, UnavailableError
from cluster.job import JobId, JobSpec
from cluster.messages import SessionAnswer, SessionInfo
from cluster.ports import AuthRequest
from cluster.wire import decode_error, encode_error
from tests.doubles.workers import FakeServer

REGISTRY = "r.example"
CHALLENGE = 'Bearer realm="https://auth.example/token"'
REQUEST = AuthRequest(registry=REGISTRY, scopes=("repository:app:pull",), challenge=CHALLENGE)
QUESTION = {"registry": REGISTRY, "scopes": REQUEST.scopes, "challenge": CHALLENGE}


def spec(job, who="alice", *, detached=False):
    session = SessionInfo(session_id=f"s-{job}", identities={REGISTRY: who}, progress="stream", trace="t")
    v = digest_of(b"v")
    return JobSpec(id=JobId(job), definition=v, targets=(v,), session=session, is_detached=detached)


class Driver:
    """Answers at a host for one job, until it goes."""

    def __init__(self, host, job, *, secrets=None, error=None):
        self.host = host
        self.session_id = f"s-{job}"
        self.header = f"Bearer of-{job}"
        self.secrets = secrets or {}
        self.error = error
        self.asked = []
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while True:
            for question in await self.host.next_questions(self.session_id, wait_s=60):
                self.asked.append(question.secret or question.registry)
                answer = SessionAnswer(question_id=question.question_id)
                if self.error is not None:
                    answer = replace(answer, error=encode_error(self.error))
                elif question.secret:
                    answer = replace(answer, secret=self.secrets.get(question.secret))
                else:
                    answer = replace(answer, header=self.header, expires_in_s=300.0)
                self.host.answer(self.session_id, answer)


class Bench:
    def __init__(self, config):
        self.host = SessionHost()
        self.sessions = JobSessions(self.host, config, prefix="sched")
        self.stack = contextlib.AsyncExitStack()
        self.drivers = {}
        self.server = FakeServer()

    async def begin(self, job, who="alice", *, is_there=True, detached=False, **driver):
        """Have a job go on, with its driver there or not."""
        self.stack.enter_context(self.sessions.of(spec(job, who, detached=detached), [REGISTRY]))
        if is_there and not detached:
            self.drivers[job] = Driver(self.host, job, **driver)
            await asyncio.sleep(0)
        else:
            for session in self.host._sessions.values():
                session.seen_s -= 0 if session.polls else 1000.0

    async def ask(self, jobs, **question):
        """Ask as a worker does for something that is done for *jobs*."""
        work = self.sessions.asking(lambda: jobs)
        async with work.at(self.server), asyncio.timeout(10):
            answer = await self.server.ask(work.info.session_id, **question)
        if answer.error is not None:
            raise decode_error(answer.error)
        return answer

    async def aclose(self):
        for driver in self.drivers.values():
            driver.task.cancel()
        if self.drivers:
            await asyncio.wait([driver.task for driver in self.drivers.values()])
        await self.stack.aclose()
        await self.sessions.aclose()
        assert self.host.statistics() == {"sessions": 0}


@pytest.fixture
def credentials(tmp_path):
    """Credentials that the farm is configured with."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {REGISTRY: {"username": "farm", "password": "farm-password"}}}))
    return path


@pytest.fixture
async def bench(credentials):
    bench = Bench(Config(build=BuildConfig(credentials_file=str(credentials))))
    yield bench
    await bench.aclose()


# -- attached jobs ----------------------------------------------------------------------------------------------------


async def test_a_jobs_driver_answers_for_it(bench):
    """What a worker asks goes to the driver that attends this scheduler, and its answer back."""
    await bench.begin("j1")
    answer = await bench.ask(["j1"], **QUESTION)
    assert (answer.header, answer.expires_in_s) == ("Bearer of-j1", 300.0)
    assert (await bench.sessions.authorizer(["j1"]).authorize(REQUEST)).header == "Bearer of-j1"


async def test_work_has_a_session_of_its_own_that_is_as_its_first_job(bench):
    """Two pieces of work are told apart at their workers; neither tells of its layers where the driver looks itself."""
    await bench.begin("j2", "bob")
    await bench.begin("j1")
    first, second = (bench.sessions.asking(lambda: ["gone", "j1", "j2"]).info for _ in range(2))
    assert first.session_id != second.session_id
    assert first.session_id.startswith("sched.")
    assert first.tenant == second.tenant == "s-j1"
    assert (first.identities, first.progress, first.trace) == ({REGISTRY: "alice"}, None, "t")


async def test_another_job_of_the_same_identity_answers_when_one_is_gone(bench):
    """The job that began it may have lost its driver: the next one that is the same there will do."""
    await bench.begin("j1", is_there=False)
    await bench.begin("j2")
    assert (await bench.ask(["j1", "j2"], **QUESTION)).header == "Bearer of-j2"


async def test_who_comes_later_answers_too(bench):
    """Asked are those for whom it is done at the time of the question."""
    await bench.begin("j1", is_there=False)
    jobs = ["j1"]
    work = bench.sessions.asking(lambda: jobs)
    async with work.at(bench.server):
        await bench.begin("j2")
        jobs[:] = ["j2"]
        assert (await bench.server.ask(work.info.session_id, **QUESTION)).header == "Bearer of-j2"


async def test_no_other_identity_ever_answers(bench):
    """What the worker records as this caller's access must be this caller's: better no answer."""
    await bench.begin("j1", "alice", is_there=False)
    await bench.begin("j2", "mallory")
    with pytest.raises(SessionGoneError):
        await bench.ask(["j1", "j2"], **QUESTION)
    assert bench.drivers["j2"].asked == []


async def test_who_names_no_identity_is_anonymous(bench):
    """At a registry that neither has credentials for, both are the same: nobody."""
    await bench.begin("j1", "alice", is_there=False)
    await bench.begin("j2", "mallory")
    assert (await bench.ask(["j1", "j2"], **(QUESTION | {"registry": "other.example"}))).header == "Bearer of-j2"


async def test_a_refusal_is_the_answer(bench):
    """A driver whose token server refuses is there: nobody else is asked in its place."""
    await bench.begin("j1", error=AccessDeniedError("app", REGISTRY, "wrong password"))
    await bench.begin("j2")
    with pytest.raises(AccessDeniedError, match="wrong password"):
        await bench.ask(["j1", "j2"], **QUESTION)


async def test_where_nobody_is_left_that_is_said(bench):
    """To who asks, to who wants to ask, and to who wants an authorizer; an ended job is nobody."""
    await bench.begin("j1", is_there=False)
    work = bench.sessions.asking(lambda: ["j1"])
    with pytest.raises(SessionGoneError) as caught:
        await bench.ask(["j1"], **QUESTION)
    assert caught.value.session_id.startswith("sched.")
    await bench.stack.aclose()
    async with work.at(bench.server):
        answer = await bench.server.ask(work.info.session_id, **QUESTION)
    assert isinstance(decode_error(answer.error), SessionGoneError)
    for ask in (bench.sessions.asking, lambda jobs: bench.sessions.authorizer(jobs())):
        with pytest.raises(SessionGoneError, match="j1, j2"):
            ask(lambda: ["j1", "j2"])


# -- secrets ---------------------------------------------------------------------------------------------------------


async def test_secrets_come_from_whoever_gives_them(bench):
    """One that is gone and one that has none are passed over, whatever their identities."""
    await bench.begin("j1", is_there=False)
    await bench.begin("j2", "bob", secrets={"other": b"x"})
    await bench.begin("j3", "carol", secrets={"token": b"secret"})
    assert (await bench.ask(["j1", "j2", "j3"], secret="token")).secret == b"secret"


async def test_a_secret_that_nobody_gives_is_none(bench):
    """Somebody was there to say so; where nobody is, that is an error."""
    await bench.begin("j1", is_there=False)
    with pytest.raises(SessionGoneError):
        await bench.ask(["j1"], secret="token")
    await bench.begin("j2")
    assert (await bench.ask(["j1", "j2"], secret="token")).secret is None


# -- detached jobs ---------------------------------------------------------------------------------------------------


async def test_a_detached_job_has_what_the_farm_is_configured_with(bench):
    """Its driver's identity is not the farm's, and its driver is not asked, there or not."""
    await bench.begin("d1", "alice", detached=True)
    driver = bench.drivers["d1"] = Driver(bench.host, "d1")
    answer = await bench.ask(["d1"], **(QUESTION | {"challenge": "Basic realm=x"}))
    assert answer.header.startswith("Basic ")
    info = bench.sessions.asking(lambda: ["d1"]).info
    assert info.identities[REGISTRY] == bench.sessions.authorizer(["d1"]).identity(REGISTRY) != "alice"
    assert driver.asked == []


async def test_a_detached_job_has_no_secrets(bench):
    """None of the farm's, and nobody is asked."""
    await bench.begin("d1", detached=True)
    assert (await bench.ask(["d1"], secret="token")).secret is None


async def test_a_farm_without_credentials_is_nobody(bench):
    """Detached jobs then read what anybody may."""
    bare = JobSessions(bench.host, Config(), prefix="sched")
    with bare.of(spec("d1", detached=True), [REGISTRY]):
        assert bare.asking(lambda: ["d1"]).info.identities == {REGISTRY: "anonymous"}
    await bare.aclose()


async def test_credentials_that_cant_be_read_fail_the_job_and_leave_nothing(bench, credentials):
    """The error names the file; the job is not known here then."""
    credentials.write_text("{")
    with pytest.raises(CredentialFileError), bench.sessions.of(spec("d1", detached=True), [REGISTRY]):
        pytest.fail("it began")
    with pytest.raises(SessionGoneError):
        bench.sessions.authorizer(["d1"])


async def test_no_repr_shows_a_secret(bench):
    """Sessions, work and authorizers may be logged; also after they have answered."""
    await bench.begin("j1", secrets={"token": b"secret-value"})
    await bench.begin("d1", detached=True)
    bench.drivers["j1"].header = "Bearer secret-token"
    shown = []
    for job in ("j1", "d1"):
        answers = [await bench.ask([job], **(QUESTION | {"challenge": "Basic realm=x"}))]
        answers.append(await bench.ask([job], secret="token"))
        work = bench.sessions.asking(lambda job=job: [job])
        shown += [*answers, work, work.info, bench.sessions.authorizer([job]), bench.sessions._jobs[job]]
    text = repr([*shown, bench.sessions, bench.host])
    for secret in ("secret-value", "secret-token", "farm-password", answers[0].header):
        assert secret not in text


# -- being there -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    return FakeServer()


async def test_a_call_ends_and_so_does_being_there(server):
    """Its questions are answered as long as it goes on, and no poll is left open after it."""

    async def answers(question):
        return SessionAnswer(question_id=question.question_id, header="h")

    async with attending.attending(server, "s", answers):
        assert (await server.ask("s", registry=REGISTRY)).header == "h"
    assert len(asyncio.all_tasks()) == 1


async def test_an_actor_that_is_being_restarted_is_polled_again(server, monkeypatch):
    """A poll that fails is followed by another."""
    monkeypatch.setattr(attending, "_REOPEN_PAUSE_S", 0)
    server.poll_errors = [UnavailableError("actor", "lost"), UnavailableError("actor", "lost")]

    async def answers(question):
        return SessionAnswer(question_id=question.question_id, header="h")

    async with attending.attending(server, "s", answers), asyncio.timeout(10):
        assert (await server.ask("s", registry=REGISTRY)).header == "h"


async def test_a_slow_answer_holds_up_no_other(server):
    """A question that comes while another is being answered is answered first."""
    slow, asked = asyncio.Event(), asyncio.Event()

    async def answers(question):
        if not asked.is_set():
            asked.set()
            await slow.wait()
            return SessionAnswer(question_id=question.question_id, header="slow")
        return SessionAnswer(question_id=question.question_id, header="quick")

    async with attending.attending(server, "s", answers), asyncio.timeout(10):
        waiting = asyncio.create_task(server.ask("s", registry=REGISTRY))
        await asked.wait()
        server.put("s", registry=REGISTRY)
        assert (await waiting).header == "quick"
        slow.set()
        assert (await server.answers.get())[1].header == "slow"


async def test_a_bug_in_one_answer_silences_no_session(server):
    """It is an answer, too, and shows nothing of what it was about; the next question is answered."""
    broken = [ValueError("secret-value")]

    async def answers(question):
        if broken:
            raise broken.pop()
        return SessionAnswer(question_id=question.question_id, header="h")

    async with attending.attending(server, "s", answers), asyncio.timeout(10):
        error = decode_error((await server.ask("s", registry=REGISTRY)).error)
        assert isinstance(error, InternalError)
        assert "secret-value" not in str(error)
        assert (await server.ask("s", registry=REGISTRY)).header == "h"
