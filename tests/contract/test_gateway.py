"""The gateway over a real Redis and S3, without Ray: who gets in, what crosses, and what a dropped connection costs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

import aiohttp
import pytest
import structlog
from typer.testing import CliRunner

from cluster import gateway as calls
from cluster.audit import AuditEntry, Operation
from cluster.collect.sweep import QUARANTINE_PREFIX
from cluster.config import Config, FarmConfig, GatewayConfig, S3Config
from cluster.descriptor import Descriptor
from cluster.digest import digest_of, hex_of
from cluster.drain import UnderWay
from cluster.errors import (
    BlobDamagedError,
    CredentialHelperError,
    GatewayNotTrustedError,
    GatewayRefusedError,
    InvalidArgumentError,
    JobIdTakenError,
    LeaseLostError,
    LeaseNotFoundError,
    NeedsRemoteProvidersError,
    NodeNotFoundError,
    PageNotRunningError,
    RefNotFoundError,
    UnavailableError,
)
from cluster.gateway import PATH
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, JobState, LogStream, VertexEvent, VertexLog, VertexState
from cluster.lease import LeaseId, ref_resource
from cluster.messages import NodeRecord, SessionInfo, UnlazyResult
from cluster.metrics import OTHER
from cluster.progress import LayerPhase, ProgressItem
from cluster.ref import BlobRecord, ImageRecord, RefRecord
from lazyfarm import blocking
from lazyfarm.cli.main import app
from lazyfarm.context import scan
from lazyfarm.farm import Farm
from lazyfarm.gateway.hosted import Driver, Drivers
from lazyfarm.gateway.server import GatewayServer, tls
from lazyfarm.gateway.surface import Exports, Surface
from lazyfarm.gateway.views import view_of
from lazyfarm.graph import resolve, scratch
from lazyfarm.joined.builds import JoinedBuilds
from lazyfarm.joined.farm import JoinedFarm
from lazyfarm.leases import RedisLeases
from lazyfarm.ref import Ref
from lazyfarm.settings import load_settings
from storage.blobs import S3ContentStore
from storage.connect import connect
from storage.fetching import new_key
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.local_trees import LocalTrees
from storage.presence import Presence
from storage.registry.credentials import Credential, CredentialSource
from storage.services.page import PageService
from storage.services.state_dir import StateDir
from tests.doubles import at_rest
from tests.doubles.busy_farm import FLYING, NAME, busy_farm
from tests.doubles.layers import directory, file, layer, sketch, symlink, whiteout
from tests.doubles.redis import free_port, redis_binaries
from tests.doubles.registry import make_authority

pytestmark = pytest.mark.redis

TOKEN = "open-sesame"
CANARY = "c4n4ry-5ecret"


class Gateway:
    """A gateway that may be ended and started again, at one address."""

    def __init__(self, redis_farm, state_dir, s3=None, **options) -> None:
        self.farm = redis_farm
        self.config = Config(
            farm=FarmConfig(name=redis_farm.keys.farm),
            redis=redis_farm.config,
            s3=s3 or S3Config(),
            gateway=GatewayConfig(port=free_port(), **options),
        )
        self._state_dir = state_dir
        self._stack = contextlib.AsyncExitStack()
        self.drivers: Drivers | None = None
        self.server: GatewayServer | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.config.gateway.cert_file else 'http'}://127.0.0.1:{self.config.gateway.port}"

    async def start(self) -> None:
        self.drivers = Drivers(self.config, self._state_dir)
        self.server = GatewayServer(self.drivers, token=TOKEN)
        await self._stack.enter_async_context(self.server.listening(self.config.gateway, tls(self.config.gateway)))

    async def end(self) -> None:
        """End it as a process ends: its drivers' sessions are left as they are."""
        await self._stack.aclose()

    async def close(self) -> None:
        await self.end()

    async def connect(self, **options) -> Farm:
        return await Farm.connect(self.url, token=TOKEN, **{"credentials": {}, **options})


@pytest.fixture
async def open_gateway(redis_farm, tmp_path):
    """Starts gateways; each driver's session ends with the test."""
    made = []

    async def open_(**options) -> Gateway:
        made.append(Gateway(redis_farm, tmp_path / "state", **options))
        await made[-1].start()
        return made[-1]

    yield open_
    for gateway in made:
        await gateway.end()
        for driver in list(gateway.drivers._known.values()):
            await driver.close(True)


@pytest.fixture
async def gateway(open_gateway):
    return await open_gateway()


async def a_ref(redis_farm):
    """A ref that nobody holds."""
    stores = redis_farm.stores()
    layer = Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(b"layer"),
        size_bytes=10,
        diff_id=digest_of(b"tar"),
    )
    record, lease = RefRecord.over(layer, None, "docker.io/library/debian:12"), LeaseId("driver-1")
    await stores.leases.create(lease, ttl_s=60.0, labels={})
    await stores.refs.get_or_create([record], {}, lease_id=lease)
    await stores.leases.delete(lease)
    return record.id


async def until(fact):
    """Wait for a fact that comes about elsewhere."""
    async with asyncio.timeout(60):
        while not await fact():  # noqa: ASYNC110 - Redis rings no bell
            await asyncio.sleep(0.02)


# -- who gets in ---------------------------------------------------------------------------------------------


async def test_who_has_no_token_is_refused(gateway):
    """Neither with a wrong one nor with none, and the error says where the right one is named."""
    for token in ("wrong", ""):
        with pytest.raises(GatewayRefusedError) as refused:
            await Farm.connect(gateway.url, token=token, credentials={})
        assert "LAZYFARM_TOKEN_FILE" in refused.value.hint
    assert gateway.drivers._known == {}


async def test_tls_is_spoken_with_whom_the_driver_trusts(open_gateway, tmp_path, monkeypatch):
    """The authority of the certificate is named by file; address, token and file may come from the environment."""
    authority, other = make_authority(tmp_path), make_authority_in(tmp_path / "other")
    gateway = await open_gateway(cert_file=str(authority.certificate), key_file=str(authority.key))
    with pytest.raises(GatewayNotTrustedError):
        await Farm.connect(gateway.url, token=TOKEN, ca_file=other.ca_file, credentials={})
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("LAZYFARM_URL", gateway.url)
    monkeypatch.setenv("LAZYFARM_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("LAZYFARM_CA_FILE", str(authority.ca_file))

    async with await Farm.connect(credentials={}) as farm:
        assert await farm.refs() == []


def make_authority_in(directory):
    directory.mkdir()
    return make_authority(directory)


async def test_no_token_crosses_a_network_in_clear():
    """Plain HTTP is for loopback alone."""
    with pytest.raises(InvalidArgumentError, match="https"):
        await Farm.connect("http://farm.example.com:8443", token=TOKEN)


async def test_a_gateway_has_room_for_so_many_drivers(open_gateway):
    """One more is told so, and gets in when another has left."""
    gateway = await open_gateway(sessions=1)
    async with await gateway.connect():
        with pytest.raises(UnavailableError, match=r"gateway\.sessions"):
            await gateway.connect()
    async with await gateway.connect() as farm:
        assert await farm.leases() != []


async def test_what_is_no_driver_does_no_harm(gateway):
    """A frame that can't be read ends its own connection."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(gateway.url + PATH, headers={"authorization": f"Bearer {TOKEN}"}) as socket,
    ):
        await socket.send_bytes(b"\x93\x01\xa5hello")
        assert (await socket.receive()).type is aiohttp.WSMsgType.BINARY  # the error
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
    async with await gateway.connect() as farm:
        assert await farm.images() == []


# -- the same API, the same errors ---------------------------------------------------------------------------


async def test_refs_and_leases_are_the_same_from_outside(gateway, redis_farm):
    """They are found, held, pinned and told why they are kept, as from within."""
    ref_id = await a_ref(redis_farm)
    async with await gateway.connect() as farm:
        assert [state.record.id for state in await farm.refs()] == [ref_id]
        assert await farm.states([ref_id, digest_of(b"other")]) == [(await farm.refs())[0], None]
        async with farm.lease(labels={"for": "a test"}) as lease:
            await lease.attach([ref_resource(ref_id)])
            assert [hold.lease.labels for hold in (await farm.kept(ref_id)).holds] == [{"for": "a test"}]
        assert (await farm.kept(ref_id)).holds == ()
        usage = await farm.du()
        assert [use.id for use in usage.refs] == [ref_id]
        removed = []
        pruned = await farm.prune(on_removed=removed.append)
        assert [item.id for item in removed] == [item.id for item in pruned.items] == [ref_id]
    leases = redis_farm.stores().leases
    assert await leases.leases() == []


async def test_errors_cross_as_they_are(gateway):
    """With type, fields and hint."""
    async with await gateway.connect() as farm:
        with pytest.raises(RefNotFoundError) as unknown:
            await farm.get("debian:12")
        assert unknown.value.hint == RefNotFoundError(*unknown.value.args).hint != ""
        with pytest.raises(LeaseNotFoundError):
            await farm.unpin(LeaseId("pin-none"))


async def test_a_gateway_tells_of_its_drivers_and_their_calls(gateway, told):
    """How many there are, and how each call ended; a driver that makes names up makes no series."""

    def of_gateway(name):
        return {key[1:]: value for key, value in told.items() if key[0] == f"gateway_{name}"}

    async def is_missed():
        return told["gateway_drivers", "gone"] == 1

    async with await gateway.connect() as farm:
        assert await farm.images() == []
        with pytest.raises(RefNotFoundError):
            await farm.get("debian:12")
        for name in ("one", "another"):
            with pytest.raises(InvalidArgumentError):
                await farm.gateway.call(calls.Method(name, calls.Nothing, calls.Nothing), calls.Nothing())
        following = asyncio.create_task(anext(farm.follow(f"{farm.session_id}-1")))
        await asyncio.sleep(0)
        await farm.images()  # said after it, so that it is under way by now
        following.cancel()
        await asyncio.wait([following])
        assert of_gateway("drivers") == {("connected",): 1, ("gone",): 0}
        await gateway.server.drop()
        await until(is_missed)
        await farm.images()
        assert of_gateway("drivers") == {("connected",): 1, ("gone",): 0}
    assert of_gateway("drivers") == {("connected",): 0, ("gone",): 0}
    assert of_gateway("call_seconds") == {
        ("images", "ok"): 3,
        ("get", "failed"): 1,
        (OTHER, "failed"): 2,
        ("follow", "cancelled"): 1,
        ("close", "ok"): 1,
    }


async def test_the_audit_stream_is_read_from_outside(gateway, redis_farm):
    """Oldest first, and only what was asked for crosses."""
    stores = redis_farm.stores()
    for number in range(3):
        entry = AuditEntry(operation=Operation.UNLAZY, job=f"job-{number}", digest=digest_of(b"%d" % number))
        stores.audit.note(entry, replace(entry, operation=Operation.PULL))
    async with await gateway.connect() as farm:

        async def is_noted():
            return len(await farm.audit()) == 6

        await until(is_noted)
        assert await farm.audit() == [entry async for entry in stores.audit.entries()]
        unlazied = await farm.audit(operation="unlazy", last_s=600.0)
        assert [entry.job for entry in unlazied] == ["job-0", "job-1", "job-2"]
        (one,) = await farm.audit(job="job-1", digest=digest_of(b"1")[:20], operation="pull")
        assert (one.job, one.operation) == ("job-1", "pull")


async def test_nodes_are_drained_from_outside(gateway, redis_farm):
    """What is under way is told at each look and returned at last; one that isn't there is an error as from within."""
    presence = Presence(connect(redis_farm.config), redis_farm.keys)
    node = NodeRecord(id="n0", ray_id="n0", address="127.0.0.1", alive=True)
    await presence.announce_nodes([node])
    async with await gateway.connect() as farm:
        looks = []
        assert await farm.drain("n0", timeout_s=0.0, on_left=looks.append) == UnderWay()
        assert looks == [UnderWay()]
        assert [each.draining for each in await presence.nodes()] == [True]
        await farm.undrain("n0")
        assert [each.draining for each in await presence.nodes()] == [False]
        for call in (farm.drain("n9"), farm.undrain("n9")):
            with pytest.raises(NodeNotFoundError):
                await call
        with pytest.raises(InvalidArgumentError):
            await farm.drain("n0", timeout_s=-1.0)
    await presence._link.close()


async def test_commands_go_where_the_environment_says(gateway, redis_farm, tmp_path):
    """Those that look after a farm do as well."""
    ref_id = await a_ref(redis_farm)
    stores, presence = redis_farm.stores(), Presence(connect(redis_farm.config), redis_farm.keys)
    await presence.announce_nodes([NodeRecord(id="n0", ray_id="n0", address="127.0.0.1", alive=True)])
    stores.audit.note(AuditEntry(operation=Operation.PULL, job="a-job"), AuditEntry(operation=Operation.PUSH))
    (tmp_path / "token").write_text(TOKEN)
    environ = {**os.environ, "LAZYFARM_URL": gateway.url, "LAZYFARM_TOKEN_FILE": str(tmp_path / "token")}

    async def command(*arguments):
        piped = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lazyfarm", *arguments, "--json", env=environ, stdout=piped, stderr=piped
        )
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    audit, drain, kept, cancel = await asyncio.gather(
        command("audit", "--job", "a-j"),
        command("drain", "n0", "--timeout", "0"),
        command("explain", "kept", ref_id),
        command("jobs", "cancel", "none"),
    )
    assert (audit[0], json.loads(audit[1])["job"]) == (0, "a-job"), audit
    assert json.loads(drain[1])["drained"], drain
    assert [each.draining for each in await presence.nodes()] == [True]
    assert (kept[0], json.loads(kept[1])["holds"]) == (0, []), kept
    assert "JobNotFoundError" in "".join(cancel[1:]), cancel
    await presence._link.close()


async def test_the_page_s_address_is_that_under_the_gateway(gateway, tmp_path):
    """With the page's token, for who has the gateway's; where there is no page, what to do about it."""
    state = StateDir(tmp_path / "state")
    async with await gateway.connect() as farm:
        with pytest.raises(PageNotRunningError):
            await farm.page()
        page = PageService(state)
        waiting = (sys.executable, "-c", "import signal; signal.pause()")
        page.process.start((*waiting, "127.0.0.1", "8100"), ports={"http": 8100})
        try:
            token = page.token_file.read_text().strip()
            assert await farm.page() == f"{gateway.url}/?token={token}"
            (tmp_path / "token").write_text(TOKEN)
            environ = {"LAZYFARM_URL": gateway.url, "LAZYFARM_TOKEN_FILE": str(tmp_path / "token")}
            told = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "lazyfarm", "page"],
                env={**os.environ, **environ},
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            assert told.stdout == f"{gateway.url}/?token={token}\n"
        finally:
            page.stop()
    assert token not in repr(calls.PageLink(path=token))


async def test_leases_of_others_are_not_for_a_driver(gateway):
    """A driver renews and deletes what it made."""
    async with await gateway.connect() as one, await gateway.connect() as other:
        with pytest.raises(InvalidArgumentError):
            await one.lease_store.delete(other.lease_id())
        with pytest.raises(InvalidArgumentError):
            await anext(one.follow(f"{other.session_id}-1"))


def test_the_blocking_twin_is_the_same(redis_farm, tmp_path):
    """Its methods are those of the farm that it has."""
    loop = asyncio.new_event_loop()
    gateway = Gateway(redis_farm, tmp_path / "state")

    async def serve():
        await gateway.start()
        await asyncio.to_thread(use)
        await gateway.end()

    def use():
        with blocking.Farm.connect(gateway.url, token=TOKEN, credentials={}) as farm:
            assert farm.refs() == []
            assert [lease.id for lease in farm.leases()] == [f"driver-{farm.session_id}"]

    loop.run_until_complete(serve())
    loop.close()


# -- credentials ---------------------------------------------------------------------------------------------


class Helper(CredentialSource):
    """Credentials of one driver, and who was asked for."""

    def __init__(self, found) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._found = found

    def lookup(self, registry):
        self.asked.append(registry)
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


async def test_credentials_are_asked_for_and_rest_nowhere(gateway, redis_farm, tmp_path):
    """Down the connection goes the question, up the answer; neither Redis, a file nor a log has it afterwards."""
    logs = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(logs))
    helper = Helper(Credential(username="alice", secret=CANARY))
    try:
        async with await gateway.connect(credentials=helper) as farm:
            # The farm has no node, which is found out once the caller's identity is known.
            with pytest.raises(NodeNotFoundError):
                await farm.pull("registry.example.com/app:1")
            assert helper.asked == ["registry.example.com"]
            link = connect(redis_farm.config)
            search = partial(at_rest.in_redis, partial(link.execute, may_repeat=True))
            found = await search({b"driver-"}), await search({CANARY.encode()})
            await link.close()
    finally:
        structlog.reset_defaults()
    assert found[0]  # what is there is found
    assert found[1] == []
    assert at_rest.in_files(tmp_path, {CANARY.encode()}) == []
    assert "gateway.joined" in logs.getvalue()
    assert CANARY not in logs.getvalue()


async def test_a_helper_that_fails_is_told_as_on_a_node(gateway):
    """The driver's own error comes back to it."""
    helper = Helper(CredentialHelperError("pass", "registry.example.com", "exit status 1"))
    async with await gateway.connect(credentials=helper) as farm:
        with pytest.raises(CredentialHelperError, match="exit status 1"):
            await farm.pull("registry.example.com/app:1")


# -- connections that drop -----------------------------------------------------------------------------------


def item(number):
    return ProgressItem(item=f"fetch:{number}", phase=LayerPhase.DONE)


async def test_a_stream_goes_on_where_the_connection_dropped(gateway, redis_farm):
    """Every item comes once, in order, whether it was told before, meanwhile or after."""
    progress = redis_farm.stores().progress
    async with await gateway.connect() as farm:
        stream = f"{farm.session_id}-1"
        await progress.publish([stream], item(0))
        told = farm.follow(stream)
        assert await anext(told) == item(0)
        await gateway.server.drop()
        await progress.publish([stream], item(1))
        assert await anext(told) == item(1)
        farm.end_stream(stream)
        assert [each async for each in told] == []
        session_id = farm.session_id
        assert list(gateway.drivers._known) == [session_id]


async def test_who_does_not_look_is_told_no_more(gateway, redis_farm, monkeypatch):
    """What waits for a slow driver is bounded; once it looks, it gets all of it, also over a new connection."""
    monkeypatch.setattr("lazyfarm.gateway.hosted.WINDOW", 8)
    monkeypatch.setattr("lazyfarm.gateway.link.SEEN_EVERY", 2)
    progress = redis_farm.stores().progress
    async with await gateway.connect() as farm:
        stream = f"{farm.session_id}-1"
        for number in range(30):
            await progress.publish([stream], item(number))
        told = farm.follow(stream)
        first = await anext(told)
        (driver,) = gateway.drivers._known.values()

        async def is_full():
            return any(len(call.items) == 8 for call in driver._calls.values())

        await until(is_full)
        await gateway.server.drop()
        farm.end_stream(stream)
        assert [first, *[each async for each in told]] == [item(number) for number in range(30)]
        assert all(len(call.items) <= 8 for call in driver._calls.values())


async def test_a_driver_comes_back_to_a_gateway_that_was_started_anew(gateway, redis_farm):
    """As the same one, with its lease; what it follows goes on without a word twice."""
    progress = redis_farm.stores().progress
    async with await gateway.connect() as farm:
        stream = f"{farm.session_id}-1"
        await progress.publish([stream], item(0))
        told = farm.follow(stream)
        assert await anext(told) == item(0)
        before = gateway.drivers
        await gateway.end()
        await progress.publish([stream], item(1))
        await gateway.start()
        assert await anext(told) == item(1)
        assert list(gateway.drivers._known) == list(before._known) == [farm.session_id]
        assert [lease.id for lease in await farm.leases()] == [f"driver-{farm.session_id}"]
        farm.end_stream(stream)
        assert [each async for each in told] == []
    for driver in list(before._known.values()):
        await driver.close(True)


async def test_who_was_away_for_too_long_has_lost_its_lease(open_gateway, redis_farm):
    """What it held may be collected, and the next call says so; reading goes on."""
    gateway = await open_gateway(grace_s=1.0)
    farm = await gateway.connect()
    before = gateway.drivers
    await gateway.end()

    async def is_given_up():
        return not before._known  # and its lease is given back

    await until(is_given_up)
    await gateway.start()
    with pytest.raises(LeaseLostError):
        await farm.pull("registry.example.com/app:1")
    assert await farm.refs() == []
    await farm.close()


async def test_a_driver_that_does_not_come_back_holds_nothing(open_gateway, redis_farm):
    """After its grace its calls are ended, and its lease is given back."""
    gateway = await open_gateway(grace_s=1.0)
    farm = await gateway.connect()
    leases = redis_farm.stores().leases
    assert len(await leases.leases()) == 1
    await farm._gateway.close()  # the process is gone

    async def is_released():
        return await leases.leases() == []

    await until(is_released)


async def test_calls_end_when_the_gateway_has_gone_for_good(gateway, monkeypatch):
    """Nobody waits for ever: also who follows something."""
    monkeypatch.setattr("lazyfarm.gateway.link._AWAY_S", 0.5)
    farm = await gateway.connect()
    following = asyncio.ensure_future(anext(farm.follow(f"{farm.session_id}-1")))
    await gateway.end()
    with pytest.raises(UnavailableError, match="gateway"):
        await following
    with pytest.raises(UnavailableError):
        await farm.refs()
    await farm.close()


async def test_a_job_is_submitted_once_however_often_its_driver_says_so(gateway, redis_farm, monkeypatch):
    """It may not have heard of the first time; another driver's job of that ID is another job."""
    monkeypatch.setattr(JoinedBuilds, "_poke", _no_scheduler)
    definition = encode_definition(resolve([scratch().mkdir("/made")]).definition)
    call = calls.SubmitCall(
        job=JobId("a-job"), definition=definition, no_cache=False, detached=True, labels={}, cache_from=(), cache_to=()
    )
    async with await gateway.connect() as one, await gateway.connect() as other:
        await one._gateway.call(calls.SUBMIT, call)
        await one._gateway.call(calls.SUBMIT, call)
        assert (await one.job("a-jo")).id == (await one.builds.get_job(call.job)).id == "a-job"
        with pytest.raises(JobIdTakenError):
            await other._gateway.call(calls.SUBMIT, call)


async def _no_scheduler(builds, job):
    """Tell nobody: there is none."""


async def test_what_may_not_be_done_twice_is_not(gateway, redis_farm, monkeypatch):
    """A gateway that died with a pin under way may have made it: the driver is told that it isn't known."""
    begun = asyncio.Event()

    async def pin(leases, ref_ids, **_):
        begun.set()
        await asyncio.Event().wait()

    ref_id = await a_ref(redis_farm)
    async with await gateway.connect() as farm:
        (state,) = await farm.states([ref_id])
        monkeypatch.setattr(RedisLeases, "pin", pin)
        pinning = asyncio.ensure_future(farm.pin(Ref(farm, [state], None)))
        await begun.wait()
        before = gateway.drivers
        await gateway.end()
        await gateway.start()
        with pytest.raises(UnavailableError, match="started anew"):
            await pinning
        for driver in list(before._known.values()):
            await driver.close(True)


@pytest.fixture
def bodies_of(monkeypatch):
    """Count what crosses at the gateway: the bytes of each frame that a method of its drivers is given."""

    def counting(method):
        crossed, original = [], getattr(Driver, method)

        def counted(driver, frame):
            crossed.append(len(frame.body))
            return original(driver, frame)

        monkeypatch.setattr(Driver, method, counted)
        return crossed

    return counting


# -- local directories ---------------------------------------------------------------------------------------


@pytest.mark.s3
async def test_a_directory_goes_straight_to_s3(open_gateway, bodies_of, redis_farm, s3_config, tmp_path):
    """Small files in one object, a big one in parts; the gateway is told of them, and sees none of their bytes."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "empty").touch()
    (source / "big").write_bytes(bytes(range(256)) * (17 * 1024**2 // 256 + 1))
    gateway = await open_gateway(s3=s3_config)
    crossed = bodies_of("take")
    async with await gateway.connect() as farm:
        scanned = scan(source)
        await farm.builds._send([scanned])
        sent = len(crossed)
        await farm.builds._send([scanned])  # all of it is there
        assert len(crossed) - sent <= 4  # two calls, and that they were heard
        store = S3ContentStore(s3_config)
        with ThreadPoolExecutor(4) as threads:
            trees = LocalTrees(redis_farm.stores().refs._link, redis_farm.keys, store, threads=threads)
            out = tmp_path / "out"
            out.mkdir()
            await trees.materialise(await trees.open_tree(scanned.digest), out)
        store.close()
    assert scan(out).digest == scanned.digest
    assert sum(crossed) < 10_000


@pytest.mark.s3
async def test_only_what_was_begun_here_can_be_ended(open_gateway, s3_config):
    """A driver can't say of an object that isn't its own, or isn't there, what it holds."""
    gateway = await open_gateway(s3=s3_config)
    async with await gateway.connect() as farm:
        link = farm._gateway
        content = calls.PlacedContent(digest=digest_of(b"a"), offset=0, size_bytes=1)
        other = calls.UploadedCall(key="local/packs/other", etags=(), contents=(content,))
        with pytest.raises(UnavailableError, match="another gateway"):
            await link.call(calls.TREE_UPLOADED, other)
        way = await link.call(calls.TREE_UPLOAD, calls.UploadCall(size_bytes=1, parts=1))
        with pytest.raises(UnavailableError, match="all of it"):
            await link.call(calls.TREE_UPLOADED, replace(other, key=way.key))
        beyond = replace(other, key=way.key, contents=(replace(content, size_bytes=2),))
        with pytest.raises(InvalidArgumentError):
            await link.call(calls.TREE_UPLOADED, beyond)


# -- exports -------------------------------------------------------------------------------------------------

LAYERS = [
    layer(directory("bin", 0o755), file("bin/tool", b"#!/bin/sh\n", mode=0o755), file("gone", b"")),
    layer(whiteout("gone"), symlink("link", "bin/tool"), file("data", bytes(range(256)) * 20_000)),
]
FILES = {"bin": "directory", "bin/tool": b"#!/bin/sh\n", "link": "-> bin/tool", "data": bytes(range(256)) * 20_000}


@pytest.fixture
async def image(redis_farm, s3_config):
    """An image all of whose blobs are present, and the keys of their objects."""
    stores, store = redis_farm.stores(), S3ContentStore(s3_config)
    documents = [b'{"config": {}}', b'{"schemaVersion": 2}']
    descriptors = [
        Descriptor(media_type="application/json", digest=digest_of(each), size_bytes=len(each)) for each in documents
    ]
    keys = {}
    blobs = [*zip(descriptors, documents, strict=True), *((made.descriptor, made.blob) for made in LAYERS)]
    for descriptor, data in blobs:
        info = store.put(new_key(descriptor.digest), data)
        owned = await stores.flights.join(f"blob:{descriptor.digest}", worker="w", token=info.key[-16:], ttl_s=6.0)
        blob = BlobRecord(
            digest=descriptor.digest, key=info.key, size_bytes=len(data), etag=info.etag, fence=owned.fence.number
        )
        await stores.flights.commit(owned.fence, blob)
        keys[descriptor.digest] = info.key
    lease = LeaseId("driver-1")
    await stores.leases.create(lease, ttl_s=600.0)
    records = [RefRecord.over(LAYERS[0].descriptor, None)]
    records.append(RefRecord.over(LAYERS[1].descriptor, records[0]))
    await stores.refs.get_or_create(records, {}, lease_id=lease)
    made = ImageRecord(
        name="r.example/app:v1",
        manifest=descriptors[1],
        config=descriptors[0],
        platform="linux/amd64",
        layers=tuple(each.descriptor for each in LAYERS),
        ref=records[-1].id,
    )
    await stores.refs.put_image(made, lease_id=lease)
    yield made, keys
    store.close()


@pytest.fixture
def unlazied(monkeypatch):
    """All is present, and everybody may have it: what a node's worker says."""

    async def unlazy_chain(farm, ref, stream):
        return UnlazyResult(ref_id=ref.id, layers=())

    monkeypatch.setattr(JoinedFarm, "unlazy_chain", unlazy_chain)


async def outside(farm, image):
    return Ref(farm, await farm.chain(image.ref), image)


@pytest.mark.s3
@pytest.mark.usefixtures("unlazied")
async def test_an_image_comes_straight_from_s3(open_gateway, bodies_of, image, s3_config, tmp_path):
    """As a layout and as files; the gateway names the blobs, and sees none of their bytes."""
    record, _ = image
    gateway = await open_gateway(s3=s3_config)
    told = bodies_of("_tell")
    async with await gateway.connect() as farm:
        ref = await outside(farm, record)
        items = []
        await farm.export(ref, f"oci:{tmp_path}/layout", progress=items.append)
        await farm.export(ref, f"{tmp_path}/files")
    written = {path.name: path.read_bytes() for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()}
    wanted = [record.manifest, record.config, *record.layers]
    assert written.keys() == {hex_of(each.digest) for each in wanted}
    assert all(digest_of(data) == f"sha256:{name}" for name, data in written.items())
    assert sketch(tmp_path / "files") == FILES
    assert {each.item for each in items if each.phase is LayerPhase.DONE} == {f"export:{one.digest}" for one in wanted}
    assert sum(told) < 20_000 < sum(each.size_bytes for each in wanted)


@pytest.mark.s3
@pytest.mark.usefixtures("unlazied")
async def test_an_export_outlives_its_urls_and_broken_connections(
    open_gateway, image, s3_config, tmp_path, monkeypatch
):
    """A URL whose time is over is asked for anew; a blob goes on where its connection broke."""
    record, _ = image
    gateway = await open_gateway(s3=s3_config)
    monkeypatch.setattr("lazyfarm.gateway.downloads._PAUSE_S", 0.0)
    ways, read = Exports._signed, aiohttp.StreamReader.read
    signed, breaks = [], []

    def expired_at_first(exports, blobs):
        signed.append(ways(exports, blobs))
        if len(signed) > 1:
            return signed[-1]
        urls = [replace(way, url=re.sub("Signature=[0-9a-f]", "Signature=x", way.url)) for way in signed[0].ways]
        return calls.ExportWays(ways=tuple(urls))

    async def breaking(reader, size=-1):
        if len(breaks) < 3:
            breaks.append(size)
            if len(breaks) == 2:
                raise aiohttp.ClientPayloadError("broken")
            size = 1000
        return await read(reader, size)

    monkeypatch.setattr(Exports, "_signed", expired_at_first)
    async with await gateway.connect() as farm:
        ref = await outside(farm, record)
        monkeypatch.setattr(aiohttp.StreamReader, "read", breaking)
        await farm.export(ref, f"{tmp_path}/files")
    assert sketch(tmp_path / "files") == FILES
    assert (len(signed), len(breaks)) == (2, 3)


@pytest.mark.s3
@pytest.mark.usefixtures("unlazied")
async def test_damage_that_an_export_finds_makes_the_blob_lazy(open_gateway, image, s3_config, tmp_path):
    """Nothing is left here; the gateway looks for itself, and no driver's word takes a blob away."""
    record, keys = image
    gateway = await open_gateway(s3=s3_config)
    refs, top = gateway.farm.stores().refs, record.layers[1]
    async with await gateway.connect() as farm:
        ref = await outside(farm, record)
        assert not await farm._gateway.call(calls.DAMAGED, calls.Named(name=top.digest))
        assert await refs.blobs([top.digest]) != [None]
        store = S3ContentStore(s3_config)
        store.put(keys[top.digest], LAYERS[1].blob[:-1] + bytes([LAYERS[1].blob[-1] ^ 1]))
        store.close()
        with pytest.raises(BlobDamagedError, match="other bytes"):
            await farm.export(ref, f"oci-archive:{tmp_path}/image.tar")
    assert list(tmp_path.glob("*image.tar*")) == []
    assert await refs.blobs([top.digest]) == [None]


@pytest.mark.s3
async def test_what_was_put_aside_is_listed_from_outside(open_gateway, s3_config):
    """With its size and time, as beside S3."""
    gateway = await open_gateway(s3=s3_config)
    store = S3ContentStore(s3_config)
    try:
        store.put(f"{QUARANTINE_PREFIX}damaged", b"other bytes")
        async with await gateway.connect() as farm:
            found = await farm.quarantined()
        assert found == list(store.objects(QUARANTINE_PREFIX))
        assert ("quarantine/damaged", 11) in [(each.key, each.size_bytes) for each in found]
        store.delete(f"{QUARANTINE_PREFIX}damaged")
    finally:
        store.close()


@pytest.mark.s3
async def test_only_who_may_have_an_image_is_told_where_its_blobs_are(
    open_gateway, image, s3_config, monkeypatch, tmp_path
):
    """Its chain is unlazied for the driver first; and a driver's own idea of what an image has counts for nothing."""
    record, _ = image
    gateway = await open_gateway(s3=s3_config)

    async def denied(farm, ref, stream):
        if ref.id == record.ref:
            raise NeedsRemoteProvidersError((record.layers[1].digest,))
        return UnlazyResult(ref_id=ref.id, layers=())

    monkeypatch.setattr(JoinedFarm, "unlazy_chain", denied)
    async with await gateway.connect() as farm:
        whole = await outside(farm, record)
        lower = Ref(farm, whole.layers[:1], record)  # one that it may have
        none = Ref(farm, (), record)
        for ref, error in ((whole, NeedsRemoteProvidersError), (lower, RefNotFoundError), (none, RefNotFoundError)):
            with pytest.raises(error):
                await farm._gateway.call(calls.EXPORT, calls.RefCall(ref=view_of(ref), stream=None))


# -- without the rest ----------------------------------------------------------------------------------------


def test_a_driver_outside_needs_neither_ray_nor_redis_nor_s3():
    """What `pip install lazyfarm` brings is enough for drivers and commands; a farm of its own is told to need more."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    absent = [re.match(r"[\w-]+", each)[0] for each in project["optional-dependencies"]["farm"]]
    assert {"ray", "boto3", "redis"} < set(absent)
    script = """
        import sys
        from importlib import import_module

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in (*sys.argv[1:], "botocore"):
                    raise ModuleNotFoundError(f"no {name}", name=name)

        sys.meta_path.insert(0, Absent())
        from cluster.errors import NotInstalledError, UnavailableError
        from lazyfarm import Farm, Ref, blocking

        for name in ("attach", "build", "du", "extract", "prune", "pull", "push", "unlazy", "verify"):
            import_module(f"lazyfarm.cli.{name}")
        for name in ("doctor", "explain", "jobs", "leases", "refs", "report", "status", "top"):
            import_module(f"lazyfarm.cli.{name}")
        for name in ("doctor", "downloads", "explain", "jobs", "pins", "records"):
            import_module(f"lazyfarm.gateway.{name}")
        import_module("lazyfarm.export")
        for where in ("https://127.0.0.1:1", None):
            try:
                blocking.Farm.connect(where, token="x", credentials={}, config=None)
            except (NotInstalledError, UnavailableError) as exc:
                print("told:", exc)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *absent],
        env={**os.environ, "LAZYFARM__REDIS__URL": "redis://127.0.0.1:1", "LAZYFARM__RAY__ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("told: the gateway at https://127.0.0.1:1 is unavailable: Connect"), done.stderr
    assert second == "told: this needs ray, which is not installed"


# -- commands --------------------------------------------------------------------------------------------------


class Place:
    """A farm in which something of everything goes on, and its gateway, on a thread: commands want the main one."""

    def __init__(self, redis_config, state_dir) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()
        self.farm = self.run(self._make(redis_config, state_dir))
        self.gateway = Gateway(self.farm, state_dir)
        self.gateway.config = replace(
            load_settings(state_dir, None, {}).config, gateway=self.gateway.config.gateway, redis=redis_config
        )
        self.run(self.gateway.start())
        (state_dir / "token").write_text(TOKEN)
        self.environ = {"LAZYFARM_URL": self.gateway.url, "LAZYFARM_TOKEN_FILE": str(state_dir / "token")}

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def close(self):
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        structlog.reset_defaults()

    async def _make(self, redis_config, state_dir):
        farm = await busy_farm(redis_config, state_dir)
        presence = Presence(farm.links[0], farm.keys)
        await presence.announce_nodes([NodeRecord(id="n0", ray_id="n0", address="127.0.0.1", alive=True)])
        events = RedisJobEvents(farm.links[0], farm.keys)
        log = VertexLog(vertex=farm.vertex, stream=LogStream.STDOUT, text="looks around\n")
        await events.publish(JobId("j1"), [VertexEvent(vertex=farm.vertex, state=VertexState.RUNNING, name=NAME), log])
        return farm

    async def _end(self):
        await self.gateway.end()
        for driver in list(self.gateway.drivers._known.values()):
            await driver.close(True)
        await self.farm.close()

    def over(self, *words, code=0, **environ):
        """What a command tells over the gateway, whose log is not to be in between."""
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
        told = CliRunner().invoke(app, [*words, "--json"], env={**self.environ, **environ}, prog_name="lazyfarm")
        assert told.exit_code == code, told.output
        return json.loads(told.stdout)

    def beside(self, *words, code=0):
        """What it tells beside Redis."""
        told = CliRunner().invoke(app, [*words, "--json", "--state-dir", str(self.farm.state_dir)])
        assert told.exit_code == code, told.output
        return json.loads(told.stdout)


@pytest.fixture(scope="module")
def place(redis_servers, tmp_path_factory):
    made = Place(redis_servers(next(iter(redis_binaries()))).config, tmp_path_factory.mktemp("outside"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("refs ls", 0),
        ("refs show TOP", 0),
        ("refs show none", 1),
        ("jobs ls", 0),
        ("jobs show j1", 0),
        ("jobs show none", 1),
        ("jobs logs j1", 0),
        ("jobs logs j1 --vertex none", 1),
        ("leases ls", 0),
        ("leases show driver-1", 0),
        ("leases show none", 1),
        ("explain pull TOP", 0),
        ("explain wait TOP", 0),
        ("explain wait FLYING", 0),
        ("explain miss debian --job j1", 0),
        ("explain miss none --job j1", 1),
        ("explain kept TOP", 0),
        ("status", 1),
        ("top --every 0.1", 0),
    ],
)
def test_a_command_tells_the_same_over_the_gateway(place, words, code):
    """As it does beside Redis, errors too; and it leaves nothing behind."""
    words = words.replace("TOP", place.farm.top).replace("FLYING", FLYING.digest).split()
    beside = place.beside(*words, code=code)
    assert still(place.over(*words, code=code)) == still(beside)
    assert beside  # it tells something
    assert {lease["id"].partition(":")[0] for lease in place.beside("leases", "ls")["leases"]} == {
        "driver-1",
        "flight",
    }


def still(told):
    """A document without how long a fetch may still take, which is another at each look."""
    if isinstance(told, dict):
        return {key: still(value) for key, value in told.items() if key != "lease_left"}
    return [still(each) for each in told] if isinstance(told, list) else told


def test_a_report_is_the_same_over_the_gateway(place, tmp_path):
    """To the last byte."""
    pages = []
    for tell in (place.over, place.beside):
        assert tell("report", "j1", "--output", str(tmp_path / "page"))["job"] == "j1"
        pages.append((tmp_path / "page").read_bytes())
        (tmp_path / "page").unlink()
    assert pages[0] == pages[1]
    assert NAME.encode() in pages[0]


def test_leases_are_looked_after_over_the_gateway(place, monkeypatch):
    """Pinned by name, found to leak, released: whatever one side did, the other sees."""
    made = place.over("leases", "pin", place.farm.top[:20], "--ttl", "1h", "--label", "why=release")
    assert made["labels"]["why"] == "release"
    assert made["expires"] - made["created"] == pytest.approx(3600)
    assert place.beside("leases", "show", made["id"]) == place.over("leases", "show", made["id"]) == made
    assert place.over("leases", "release", made["id"]) == {"released": [made["id"]]}
    assert place.over("leases", "release", made["id"], code=1)["error"]["type"] == "LeaseNotFoundError"
    monkeypatch.setattr("cluster.collect.leaks._NEW_S", -1.0)  # also one that was made just now is looked at
    leaked = place.run(_leak(place.farm))
    beside = place.beside("leases", "leaks", code=1)
    assert [leak["id"] for leak in beside["leaks"]] == [leaked]
    assert place.over("leases", "leaks", code=1) == beside
    place.over("leases", "leaks", "--release")
    assert place.beside("leases", "leaks")["leaks"] == []


async def _leak(farm):
    """A lease of a job that nobody knows any more."""
    lease = LeaseId("job-gone")
    await farm.stores().leases.create(lease, ttl_s=None, labels={"job": "gone"})
    return lease


def test_commands_of_the_head_say_where_they_belong(place):
    """Nothing is started or ended here, where a gateway is meant."""
    for words in (["up"], ["down", "--purge"], ["gateway"]):
        error = place.over(*words, code=1)["error"]
        assert error["type"] == "NotThroughGatewayError"
        assert "LAZYFARM_URL" in error["hint"]


def test_the_doctor_looks_at_the_way_to_the_gateway(place):
    """Address, token and releases; then what the farm says of itself."""
    found = {finding["check"]: finding for finding in place.over("doctor", code=1)["findings"]}
    assert (found["gateway"]["ok"], place.gateway.url in found["gateway"]["detail"]) == ("ok", True)
    assert (found["packages"]["ok"], found["nodes"]["ok"], found["actors"]["ok"]) == ("ok", "ok", "fail")
    refused = place.over("doctor", code=1, LAZYFARM_TOKEN_FILE="")["findings"]
    assert (refused[-1]["check"], refused[-1]["ok"]) == ("gateway", "fail")
    assert "LAZYFARM_TOKEN_FILE" in refused[-1]["advice"]


def test_a_gateway_of_an_earlier_release_says_what_it_does_not_know(place, monkeypatch):
    """A call that is new to it fails with a clear error; those that it knows work, and doctor tells the releases."""
    monkeypatch.setattr(Surface, "_on_lookups", lambda surface, lookups: None)
    monkeypatch.setattr("lazyfarm.gateway.hosted.VERSION", "")
    error = place.over("refs", "show", place.farm.top, code=1)["error"]
    assert "this gateway's release doesn't know it" in error["message"]
    assert place.over("refs", "ls") == place.beside("refs", "ls")
    findings = place.over("doctor", code=1)["findings"]
    assert ["its release is unknown" in finding["detail"] for finding in findings if finding["check"] == "gateway"] == [
        True,
        False,
    ]


def test_logs_are_followed_over_a_connection_that_drops(place):
    """Each line comes once, whether it was said before, meanwhile or after; the job's end ends it."""
    jobs = RedisJobStore(place.farm.links[0], place.farm.keys)
    events = RedisJobEvents(place.farm.links[0], place.farm.keys)
    definition = scratch().mkdir("/made").definition()
    (vertex,) = definition.targets
    payload, job = encode_definition(definition), JobId("followed")
    session = SessionInfo(session_id="driver-1")
    spec = JobSpec(id=job, definition=digest_of(payload), targets=(vertex,), session=session, is_detached=True)

    def say(text):
        place.run(events.publish(job, [VertexLog(vertex=vertex, stream=LogStream.STDOUT, text=text)]))

    place.run(jobs.submit(spec, payload))
    claims = {claimed.claim.job: claimed.claim for claimed in place.run(jobs.claim("s", ttl_s=1000.0, most=9))}
    say("one\n")
    with subprocess.Popen(
        [sys.executable, "-m", "lazyfarm", "jobs", "logs", "--follow", job],
        env={**os.environ, **place.environ},
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        name, *lines = [following.stdout.readline(), following.stdout.readline()]
        place.run(place.gateway.server.drop())
        say("two\n")
        lines.append(following.stdout.readline())
        place.run(jobs.end(claims[job], JobState.DONE))
        lines += following.communicate(timeout=60)[0].splitlines(keepends=True)
    assert [line.split()[-1] for line in (name, *lines)] == [name.split()[-1], "one", "two"]
    assert following.returncode == 0
