"""Builds of one driver: what a job is submitted with, and what is made of what it came to."""

import asyncio
import json

import pytest

from cluster.cache_options import CacheKind, CacheSource, CacheTarget
from cluster.config import BuildConfig, Config
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import EMPTY_CHAIN, digest_of
from cluster.errors import (
    ActorLostError,
    InvalidArgumentError,
    JobNotFoundError,
    ManifestNotFoundError,
    RefReleasedError,
)
from cluster.graph import ImageOp, LocalOp, decode_definition
from cluster.job import JobId, JobRecord, JobSpec, JobState
from cluster.job_result import InlineEntry, TargetResult, encode_result
from cluster.lease import LeaseId
from cluster.messages import ResolveResult, SessionInfo
from cluster.provider import FARM
from cluster.ref import ImageRecord, RefRecord, RefState
from cluster.reference import parse_reference
from cluster.remote_cache import CacheEntry, extract
from lazyfarm.builds import BuildOptions
from lazyfarm.graph import image, scratch
from lazyfarm.jobs import RedisJobs
from lazyfarm.joined import builds as builds_module
from lazyfarm.joined.builds import JoinedBuilds
from storage.memory_solver import MemoryJobEvents, MemoryJobStore, SolverMemory
from tests.doubles.fetch import handle, layer_of
from tests.doubles.stores import FakeClock, eventually

A, B = layer_of(b"A"), layer_of(b"B")
K, OTHER = digest_of(b"key"), digest_of(b"other key")
LEASE = LeaseId("driver")
CONFIG = b'{"architecture":"amd64"}'


class Session:
    """A driver's session, as far as jobs need one."""

    def __init__(self):
        self.attended = {}

    def id_of_job(self, job):
        return f"session-{job}"

    def info(self, registries, *, progress, deadline_s, session_id=""):
        return SessionInfo(session_id=session_id, identities=dict.fromkeys(registries, "alice"))

    def attending_job(self, job, *, secrets):
        self.attended[job] = secrets
        return self


class Farm:
    """A driver's farm: images of a registry, chains of the farm, and what was held and asked."""

    def __init__(self):
        self.asked = []
        self.infos = []
        self.chains = {}
        self.held = []
        self.error = None

    async def info(self, registries):
        self.infos.append(set(registries))
        return SessionInfo(session_id="s")

    def lease_id(self):
        return LEASE

    async def on_worker(self, call):
        return await call(self)

    async def chain(self, ref_id):
        return self.chains[ref_id]

    async def hold(self, ref_ids):
        self.held += ref_ids

    async def resolve_image(self, request, *, timeout_s):
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        return ResolveResult(image=record_of(request.image), config=CONFIG, handlers=())

    async def assemble(self, request, *, timeout_s):
        self.asked.append(request)
        return record_of(request.name)

    def add(self, *layers, provider=FARM):
        """Record a chain; return the ID of its top."""
        states, top = [], None
        for layer in layers:
            top = RefRecord.over(layer, top)
            states.append(RefState(record=top, present=None, providers=(provider,)))
        self.chains[top.id] = states
        return top.id


def record_of(name):
    return ImageRecord(
        name=name,
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(f"now: {name}".encode()), size_bytes=1),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(CONFIG), size_bytes=1),
        platform="linux/amd64",
        layers=(),
        ref=None,
    )


class Schedulers:
    """Handles of schedulers; one may be lost."""

    def __init__(self):
        self.poked = []
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()

    def of_index(self, index, *, farm, version):
        self.poked.append(index)
        return self

    async def look_for_jobs(self, *, timeout_s):
        await self.gate.wait()
        if self.error is not None:
            raise self.error


class Bench:
    def __init__(self, schedulers):
        memory = SolverMemory(FakeClock())
        self.farm, self.session, self.schedulers = Farm(), Session(), schedulers
        self.builds = JoinedBuilds(self.farm, Config(build=BuildConfig(schedulers=3)), self.session, None)
        self.builds._store = self.jobs = MemoryJobStore(memory)
        self.builds._jobs = RedisJobs(self.jobs, MemoryJobEvents(memory))

    def solve(self, graph, *, secrets=None, **options):
        return self.builds.solve(graph, BuildOptions(**options), secrets=secrets or {}, on_event=None)

    async def submit(self, graph, **options):
        """Submit a graph; return its specification and definition as they are recorded."""
        job = await self.solve(graph, **options).submitted()
        record = await self.jobs.get(job.id)
        return record.spec, decode_definition(await self.jobs.definition(job.id))

    async def result(self, *results, **options):
        """Return what a job that came to *results* is to its driver."""
        job = self.solve(image("r.example/app"), **options)
        targets = tuple(digest_of(f"{n}".encode()) for n in range(len(results)))
        spec = JobSpec(id=job.id, definition=K, targets=targets, session=SessionInfo(session_id="s"))
        recorded = dict(zip(targets, map(encode_result, results), strict=True))
        return await self.builds.job_result(
            JobRecord(spec=spec, state=JobState.DONE, created_wall_s=0.0, results=recorded)
        )


@pytest.fixture
def bench(monkeypatch):
    schedulers = Schedulers()
    monkeypatch.setattr(builds_module, "SchedulerHandle", schedulers)
    return Bench(schedulers)


# -- submitting --------------------------------------------------------------------------------------------------------


async def test_a_job_means_its_images_as_they_are_now(bench):
    """By digest, whatever becomes of their tags; one that is named by it is not asked for, and each other once."""
    pinned = "r.example/app@" + digest_of(b"fixed")
    one = image("r.example/app:1", plain_http=True)
    _, definition = await bench.submit([one.run("a"), one.run("b"), image(pinned).run("c")])
    references = {v.op.reference for v in definition.vertices.values() if isinstance(v.op, ImageOp)}
    now = digest_of(b"now: r.example/app:1")
    assert references == {f"r.example/app:1@{now}", parse_reference(pinned).name}
    (request,) = bench.farm.asked
    assert (request.image, request.platform, request.plain_http) == ("r.example/app:1", None, True)
    assert request.lease_id == LEASE


async def test_a_job_says_all_that_was_asked_for(bench):
    """Of the graph as it was pinned; with a session of its own that knows who to be where it may ask."""
    source = CacheSource(kind=CacheKind.REGISTRY, ref="from.example/cache:1")
    target = CacheTarget(kind=CacheKind.REGISTRY, ref="to.example/cache:1")
    spec, definition = await bench.submit(
        image("r.example/app:1").run("a"), cache_from=[source], cache_to=[target], labels={"who": "ci"}, detached=True
    )
    assert spec.targets == definition.targets
    assert spec.definition == digest_of(await bench.jobs.definition(spec.id))
    assert (spec.cache_from, spec.cache_to, spec.labels, spec.is_detached) == (
        (source,),
        (target,),
        {"who": "ci"},
        True,
    )
    assert spec.session.session_id == f"session-{spec.id}"
    assert spec.session.identities == dict.fromkeys(("r.example", "from.example", "to.example"), "alice")


async def test_what_only_says_where_something_comes_from_is_never_run_afresh(bench):
    """An image or a directory would come to the same; all else is."""
    graph = image("r.example/app:1").run("a").run("b")
    spec, definition = await bench.submit(graph, no_cache=True)
    assert set(spec.no_cache) == {
        digest for digest, v in definition.vertices.items() if not isinstance(v.op, ImageOp | LocalOp)
    }
    assert len(spec.no_cache) == 2
    assert (await bench.submit(graph))[0].no_cache == ()


async def test_a_definition_is_taken_as_it_is(bench):
    """What another process made of a graph, but for its images."""
    _, definition = await bench.submit(scratch().mkdir("/a"))
    _, again = await bench.submit(definition)
    assert again == definition
    assert bench.farm.asked == []


async def test_an_image_that_is_not_there_fails_the_submission(bench):
    """Nothing is recorded."""
    bench.farm.error = ManifestNotFoundError("r.example/app:1")
    with pytest.raises(ManifestNotFoundError):
        await bench.solve(image("r.example/app:1").run("a")).submitted()
    assert await bench.jobs.jobs() == []


async def test_a_scheduler_is_told_of_a_job_and_need_not_hear_it(bench):
    """One of those there are, always the same for a job; they look by themselves."""
    bench.schedulers.error = ActorLostError("scheduler", "killed")
    for _ in range(20):
        await bench.submit(scratch().mkdir("/a"))
    await eventually(lambda: len(bench.schedulers.poked) == 20)
    assert set(bench.schedulers.poked) == {0, 1, 2}


async def test_a_scheduler_that_is_told_holds_nobody_up(bench):
    """One that takes the job at once answers when it has time."""
    bench.schedulers.gate.clear()
    await bench.submit(scratch().mkdir("/a"))
    bench.schedulers.gate.set()


async def test_nothing_is_submitted_before_it_is_asked_for(bench):
    """A job that nobody awaits is none; each has an ID of its own."""
    jobs = [bench.solve(image("r.example/app:1")) for _ in range(2)]
    await asyncio.sleep(0)
    assert jobs[0].id != jobs[1].id
    assert (await bench.jobs.jobs(), bench.farm.asked) == ([], [])


async def test_a_job_is_found_by_its_id(bench):
    """Whoever submitted it, and by the start of that; an unknown one says so."""
    spec, _ = await bench.submit(scratch().mkdir("/a"), detached=True)
    for name in (spec.id, spec.id[:6]):
        found = await bench.builds.find(name)
        assert (found.id, (await found.record()).spec) == (spec.id, spec)
    with pytest.raises(JobNotFoundError):
        await bench.builds.find("unknown")


# -- secrets -----------------------------------------------------------------------------------------------------------


async def test_a_job_may_ask_for_its_own_secrets_only(bench):
    """Not for another job's, and nothing for one that was found; they are not in what is recorded."""
    one = bench.solve(scratch().mkdir("/a"), secrets={"token": "secret-value"})
    two = bench.solve(scratch().mkdir("/a"), secrets={"other": b"x"})
    for job in (one.id, two.id, JobId("found")):
        bench.builds.attending_job(job)
    assert bench.session.attended == {one.id: {"token": b"secret-value"}, two.id: {"other": b"x"}, "found": {}}
    await one.submitted()
    assert "secret-value" not in repr(await one.record()) + repr(await bench.jobs.definition(one.id))


async def test_secrets_are_read_at_once(bench, tmp_path):
    """A file that is missing is said before anything is sent."""
    with pytest.raises(InvalidArgumentError, match="token"):
        bench.solve(scratch().mkdir("/a"), secrets={"token": tmp_path / "missing"})


async def test_a_detached_job_takes_no_secrets(bench):
    """Nobody would be there to give them."""
    with pytest.raises(InvalidArgumentError, match="detached"):
        bench.solve(scratch().mkdir("/a"), secrets={"token": b"x"}, detached=True)


# -- results -----------------------------------------------------------------------------------------------------------


async def test_a_result_is_held_by_its_driver(bench):
    """All of each target's chain, in the order in which they were asked for; an empty filesystem is a ref, too."""
    ab, a = bench.farm.add(A, B), bench.farm.add(A)
    entries = (InlineEntry(keys=(K,), layers=1),)
    result = await bench.result(
        TargetResult(ref=ab, inline=entries), TargetResult(ref=None), TargetResult(ref=a, config=CONFIG)
    )
    assert [ref.id for ref in result.refs] == [ab, EMPTY_CHAIN, a]
    assert bench.farm.held == [a, ab, a]
    assert (result.config, result.inline) == (CONFIG, (entries, (), ()))


async def test_a_config_that_was_given_counts(bench):
    """Before what the image it was built upon came with."""
    result = await bench.result(TargetResult(ref=bench.farm.add(A), config=CONFIG), config=b"given")
    assert result.config == b"given"


async def test_a_result_becomes_an_image_under_a_name(bench):
    """Assembled of its records: with its config, by the access that its layers need, held by the driver."""
    top = bench.farm.add(A, B, provider=handle("app"))
    result = await bench.result(TargetResult(ref=top, config=CONFIG))
    tagged = await bench.builds.tag(result, "debian:12", created_s=7)
    (request,) = bench.farm.asked
    assert request.name == parse_reference("debian:12").name == tagged.image
    assert (request.ref_id, request.config, request.lease_id, request.created_s) == (top, CONFIG, LEASE, 7)
    assert bench.farm.infos == [{"r.example"}]
    assert tagged.layers == result.ref.layers


async def test_what_was_made_of_nothing_is_an_image_too(bench):
    """Without layers and config; no registry is asked for it."""
    result = await bench.result(TargetResult(ref=None))
    await bench.builds.tag(result, "r.example/app:1", created_s=None)
    (request,) = bench.farm.asked
    assert (request.ref_id, request.config, bench.farm.infos) == (None, b"", [set()])


@pytest.mark.parametrize("config", [CONFIG, None])
async def test_an_inline_cache_goes_into_the_images_config(bench, config):
    """With the layers that each result is, lowest first; all else in the config stays."""
    top = bench.farm.add(A, B)
    entries = (InlineEntry(keys=(K,), layers=1), InlineEntry(keys=(OTHER,), layers=2, config=b"{}"))
    result = await bench.result(TargetResult(ref=top, config=config, inline=entries))
    await bench.builds.tag(result, "r.example/app:1", created_s=None)
    (request,) = bench.farm.asked
    found = extract(request.config, (A, B), "image")
    assert sorted((found.entry(number) for number in range(2)), key=lambda entry: len(entry.layers)) == [
        CacheEntry(keys=(K,), layers=(A,)),
        CacheEntry(keys=(OTHER,), layers=(A, B), config=b"{}"),
    ]
    assert json.loads(config or b"{}").items() <= json.loads(request.config).items()


async def test_only_what_is_held_becomes_an_image(bench):
    """A ref that was released, or several targets, are none."""
    result = await bench.result(TargetResult(ref=bench.farm.add(A)))
    result.ref.release()
    with pytest.raises(RefReleasedError):
        await bench.builds.tag(result, "r.example/app:1", created_s=None)
    with pytest.raises(InvalidArgumentError, match="2 targets"):
        await bench.builds.tag(await bench.result(*[TargetResult(ref=None)] * 2), "r.example/app:1", created_s=None)
    assert bench.farm.asked == []
