"""The command line against a farm that is made up: documents, exit codes, error lines, interrupts.

The cluster's own tests run the same commands against a real farm.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from actors.launch import DownReport, UpReport
from cluster.audit import AuditEntry
from cluster.collect.values import Item, ItemKind
from cluster.collect.verify import BlobFault, FaultKind, Verified
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import DigestMismatchError, FarmNotRunningError, NodeNotFoundError, RefNotFoundError
from cluster.lease import Lease
from cluster.messages import (
    ActorRecord,
    ExtractResult,
    LayerFetch,
    LayerPush,
    NodePruneResult,
    NodeRecord,
    NodeUsageResult,
    PushResult,
    UnlazyResult,
)
from cluster.origin import OPEN, Needed, encode_origin
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, RefRecord, RefState, RefUsage
from cluster.settings import FarmSettings, Running
from lazyfarm.cli import down as down_command
from lazyfarm.cli import driving, parts, up
from lazyfarm.cli.audit_lines import audit_document, story_lines
from lazyfarm.cli.boundary import EXIT_ERROR, EXIT_INTERRUPTED
from lazyfarm.cli.documents import DOCUMENTS, EXIT_STATUSES, PROGRESS, schema
from lazyfarm.cli.human import duration, short, size
from lazyfarm.cli.layers import LiveLayers, PlainLayers
from lazyfarm.cli.main import app
from lazyfarm.cli.output import Output
from lazyfarm.cli.reach import url_address
from storage.farm_file import write_running
from tests.doubles.documents import check_document, commands, read_document

MIB = 1024**2
IMAGE = "docker.io/library/debian:12"
MANIFEST = digest_of(b"manifest")


def layer(name, parent=None, *, present=False):
    blob = Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(name.encode()),
        size_bytes=20 * MIB,
        diff_id=digest_of(name.encode() + b"-diff"),
    )
    record = RefRecord.over(blob, parent.record if parent else None, IMAGE)
    found = BlobRecord(digest=blob.digest, key="blobs/x", size_bytes=blob.size_bytes, etag="e", fence=1)
    handle = ProviderHandle(registry="registry-1.docker.io", repository="library/debian")
    return RefState(record=record, present=found if present else None, providers=(handle,))


BOTTOM = layer("bottom", present=True)
TOP = layer("top", BOTTOM)
LAYERS = (BOTTOM, TOP)
NODE = NodeRecord(id="n0", ray_id="f00", address="127.0.0.1", alive=True)
SUPERVISOR = ActorRecord(name="supervisor-0.1.0", kind="supervisor", node="n0", pid=42, state="ready")


class FakeRef:
    id = TOP.record.id
    image = IMAGE
    digest = MANIFEST
    layers = LAYERS
    is_lazy = True

    def __init__(self, farm):
        self._farm = farm

    async def unlazy(self, *, progress=None):
        await self._farm.step(progress)
        fetch = LayerFetch(
            digest=TOP.record.blob.digest,
            source="registry-1.docker.io/library/debian",
            bytes_fetched=20 * MIB,
            seconds=1.5,
            joined=False,
        )
        return UnlazyResult(ref_id=self.id, layers=(fetch,))

    async def extract(self, node=None, *, progress=None):
        await self._farm.step(progress)
        if node not in {None, "n0"}:
            raise NodeNotFoundError(node)
        return ExtractResult(ref_id=self.id, node="n0", path="/nodes/n0/mounts/x", seconds=2.0, layers=())

    async def extract_everywhere(self, *, progress=None):
        first = await self.extract(progress=progress)
        return [first, ExtractResult(ref_id=self.id, node="n1", path="/nodes/n1/mounts/x", seconds=3.0, layers=())]


_ON_DISK = (
    Item(
        id=f"snapshot {MANIFEST}",
        size_bytes=2 * MIB,
        created_wall_s=1.0,
        last_used_wall_s=2.0,
        is_held=True,
        held_by="lease driver-1",
        description=IMAGE,
    ),
    Item(
        id="cache abc/0",
        kind=ItemKind.CACHE_MOUNT,
        size_bytes=MIB,
        created_wall_s=1.0,
        last_used_wall_s=2.0,
        description="apt",
    ),
)


class FakeFarm:
    """Answers at once, or does what *step* says in the middle of a call."""

    def __init__(self):
        self.is_closed = False
        self.error = None
        self.blocks = None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.is_closed = True

    async def node_usage(self, node):
        return [
            NodeUsageResult(node=each, items=_ON_DISK, free_bytes=5 * MIB, disk_bytes=100 * MIB)
            for each in ("n0", "n1")
            if node in (None, each)
        ]

    async def prune_nodes(self, node, **asked):
        self.asked = (node, asked)
        return [NodePruneResult(node="n0", items=_ON_DISK[1:], freed_bytes=MIB, kept=1, is_dry_run=asked["dry_run"])]

    async def step(self, progress):
        if progress is not None:
            item = "fetch:" + TOP.record.blob.digest
            for phase, moved in ((LayerPhase.FETCHING, 0), (LayerPhase.FETCHING, 1), (LayerPhase.DONE, 20 * MIB)):
                progress(ProgressItem(item=item, phase=phase, current_bytes=moved, total_bytes=20 * MIB))
        if self.blocks is not None:
            await self.blocks()
        if self.error is not None:
            raise self.error

    async def pull(self, image, *, platform=None, plain_http=False, progress=None):
        await self.step(progress)
        return FakeRef(self)

    async def get(self, ref):
        if ref == "unknown":
            raise RefNotFoundError(ref)
        return FakeRef(self)

    async def push(self, ref, target, *, plain_http=False, progress=None):
        await self.step(progress)
        pushed = LayerPush(digest=TOP.record.blob.digest, how="mounted", bytes=0)
        return PushResult(target=target, digest=MANIFEST, layers=(pushed,))

    async def verify(self, *refs, repair, bytes_per_s, on_verified):
        self.verified = (refs, bytes_per_s)
        fault = BlobFault(
            digest=BOTTOM.record.blob.digest,
            key="blobs/x",
            size_bytes=20 * MIB,
            kind=FaultKind.DAMAGED,
            reason="other bytes",
            is_repaired=repair,
            quarantine="quarantine/blobs/x" if repair else "",
        )
        found = Verified(blobs=2, size_bytes=40 * MIB, faults=(fault,))
        on_verified(found)
        return found


class FakeRecords:
    def __init__(self):
        self.node_records = [NODE]
        self.actor_records = [SUPERVISOR]
        self.is_closed = False

    async def nodes(self):
        return self.node_records

    async def actors(self):
        return self.actor_records

    async def refs(self):
        return list(LAYERS)

    async def ref(self, name):
        if name == "unknown":
            raise RefNotFoundError(name)
        usage = RefUsage(last_used_wall_s=1.7e9, usage_count=3)
        return SimpleNamespace(
            state=TOP, chain=LAYERS, leases=("l1",), usage=usage, images=(SimpleNamespace(name=IMAGE),)
        )

    async def leases(self):
        return [
            Lease(id="l1", expires_wall_s=2.5e9, created_wall_s=1.7e9, labels={"a": "b"}, resources=("ref:x",)),
            Lease(id="l2", expires_wall_s=None, created_wall_s=1.7e9),
        ]


@pytest.fixture
def port():
    """A port that accepts connections: what status takes for S3, Ray and Redis."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@pytest.fixture
def running(port):
    return Running(
        farm_id="7d5a",
        farm_name="lazyfarm",
        redis_url=f"redis://127.0.0.1:{port}/0",
        s3_endpoint=f"http://127.0.0.1:{port}",
        s3_region="us-east-1",
        s3_bucket="lazyfarm",
        ray_address=f"127.0.0.1:{port}",
        ray_jobs_url=f"http://127.0.0.1:{port}",
    )


@pytest.fixture
def state_dir(tmp_path, running, monkeypatch):
    """A state directory in which a farm was brought up, named by the environment."""
    for name in [name for name in os.environ if name.startswith("LAZYFARM")]:
        monkeypatch.delenv(name)
    state = tmp_path / "state"
    (state / "logs").mkdir(parents=True)
    write_running(state, running)
    monkeypatch.setenv("LAZYFARM_STATE_DIR", str(state))
    return state


@pytest.fixture
def farm(state_dir, monkeypatch):
    fake = FakeFarm()

    async def connect(where):
        assert where == state_dir
        return fake

    monkeypatch.setattr(parts, "connect", connect)
    return fake


@pytest.fixture
def records(state_dir, monkeypatch):
    fake = FakeRecords()

    @asynccontextmanager
    async def open_records(settings):
        yield fake
        fake.is_closed = True

    monkeypatch.setattr(parts, "open_records", open_records)
    return fake


def run(*args):
    return CliRunner().invoke(app, list(args), prog_name="lazyfarm")


def document(*args):
    """Run with --json: stdout is one document, stderr has nothing of ours (Ray may talk there)."""
    result = run(*args, "--json")
    assert [line for line in result.stderr.splitlines() if not line.startswith("(raylet)")] == []
    assert result.stdout.count("\n") == 1
    return read_document(args, result.stdout), result.exit_code


def short_layer(state):
    return {
        "digest": state.record.blob.digest,
        "size": 20 * MIB,
        "lazy": state.is_lazy,
        "ref": state.record.id,
    }


# -- documents -----------------------------------------------------------------------------------


def test_pull_tells_the_ref_and_its_layers(farm):
    """Lowest layer first, each with what is known of it."""
    told, code = document("pull", "debian:12")
    assert code == 0
    assert told == {
        "ref": TOP.record.id,
        "image": IMAGE,
        "digest": MANIFEST,
        "layers": [short_layer(BOTTOM), short_layer(TOP)],
    }
    assert farm.is_closed


def test_unlazy_tells_where_each_layer_came_from(farm):
    """Source, bytes of this call, time, and whether another's flight was joined."""
    told, code = document("unlazy", "debian:12")
    assert code == 0
    assert told == {
        "ref": TOP.record.id,
        "layers": [
            {
                "digest": TOP.record.blob.digest,
                "source": "registry-1.docker.io/library/debian",
                "bytes": 20 * MIB,
                "seconds": 1.5,
                "joined": False,
            }
        ],
    }


@pytest.mark.parametrize(("args", "nodes"), [([], ["n0"]), (["--node", "n0"], ["n0"]), (["--all-nodes"], ["n0", "n1"])])
def test_extract_tells_the_path_on_each_node(args, nodes, farm):
    """One shape for one node and for all."""
    told, code = document("extract", "debian:12", *args)
    assert code == 0
    assert told["ref"] == TOP.record.id
    assert [node["node"] for node in told["nodes"]] == nodes
    assert all(node.keys() == {"node", "path", "seconds"} for node in told["nodes"])


def test_push_tells_how_each_layer_got_there(farm):
    """Exists, mounted or uploaded, with the bytes it took."""
    told, code = document("push", "debian:12", "127.0.0.1:5000/debian:12")
    assert code == 0
    assert told == {
        "target": "127.0.0.1:5000/debian:12",
        "digest": MANIFEST,
        "layers": [{"digest": TOP.record.blob.digest, "how": "mounted", "bytes": 0}],
    }


def test_verify_tells_faults_and_fails_while_they_are_there(farm):
    """Exit 1 where something is left as it was, 0 where all is repaired; the rate is in MiB."""
    told, code = document("verify", "debian:12", "--rate", "20")
    assert code == 1
    assert farm.verified == (("debian:12",), 20.0 * MIB)
    assert told == {
        "blobs": 2,
        "size": 40 * MIB,
        "faults": [
            {
                "digest": BOTTOM.record.blob.digest,
                "key": "blobs/x",
                "size": 20 * MIB,
                "kind": "damaged",
                "reason": "other bytes",
                "repaired": False,
                "quarantine": "",
                "node": "",
            }
        ],
        "unrepaired": 1,
    }
    assert document("verify", "--repair")[1] == 0
    said = CliRunner().invoke(app, ["verify", "--repair"]).stdout
    assert "damaged  bucket  lazy, quarantine/blobs/x" in said
    assert said.splitlines()[-1] == "2 blobs, 40.0 MiB read; 1 fault, 0 left"
    assert CliRunner().invoke(app, ["verify", "--quarantine", "--repair"]).exit_code == 2


def test_status_tells_nodes_services_and_actors(records, running):
    """Exactly these keys while all is well; exit 0."""
    told, code = document("status")
    assert code == 0
    assert told == {
        "nodes": [{"id": "n0", "address": "127.0.0.1", "alive": True, "draining": False}],
        "redis": running.redis_url,
        "s3": running.s3_endpoint,
        "ray": running.ray_address,
        "jobs": running.ray_jobs_url,
        "page": None,
        "gateway": None,
        "actors": [{"name": "supervisor-0.1.0", "kind": "supervisor", "node": "n0", "pid": 42, "state": "ready"}],
    }
    assert records.is_closed


def test_refs_ls_lists_every_ref(records):
    """One object a ref."""
    told, code = document("refs", "ls")
    assert code == 0
    assert [ref["ref"] for ref in told["refs"]] == [BOTTOM.record.id, TOP.record.id]
    assert [ref["lazy"] for ref in told["refs"]] == [False, True]


def test_refs_show_tells_record_providers_leases_and_state(records):
    """All that is recorded of one ref, and the layers below it."""
    told, code = document("refs", "show", "debian:12")
    assert code == 0
    assert told["ref"] == TOP.record.id
    assert told["state"] == "lazy"
    assert told["parent"] == BOTTOM.record.id
    assert told["leases"] == ["l1"]
    assert told["providers"][0]["repository"] == "library/debian"
    assert told["layers"] == [short_layer(BOTTOM), short_layer(TOP)]
    assert told["usage_count"] == 3
    assert told["made_of"] == []


def test_refs_show_tells_what_a_built_layer_was_made_of(records, monkeypatch):
    """Each way in, by where its blobs are: that is whose access is asked for."""
    blob = BOTTOM.record.blob
    need = Needed(digest=blob.digest, size_bytes=blob.size_bytes, providers=BOTTOM.providers, came_from="")
    built = replace(TOP, record=replace(TOP.record, origins=(encode_origin([need]), OPEN)))
    details = SimpleNamespace(**(vars(asyncio.run(records.ref("debian:12"))) | {"state": built}))
    monkeypatch.setattr(records, "ref", AsyncMock(return_value=details))
    told, _ = document("refs", "show", "debian:12")
    source = "registry-1.docker.io/library/debian"
    assert told["made_of"] == [[{"digest": blob.digest, "size": blob.size_bytes, "source": source}], []]
    said = run("refs", "show", "debian:12").output
    assert f"1 blob of {source}" in said
    assert "nothing that needs another's access" in said


def test_leases_ls_tells_expiry_and_resources(records):
    """A pinned lease has no expiry."""
    told, code = document("leases", "ls")
    assert code == 0
    assert [(lease["id"], lease["expires"]) for lease in told["leases"]] == [("l1", 2.5e9), ("l2", None)]
    assert told["leases"][0]["resources"] == ["ref:x"]


@pytest.fixture
def launched(records, running, state_dir, monkeypatch):
    """Stands in for actors.launch; says what it was asked."""
    calls = SimpleNamespace(changed=True, nodes=None, retire=None, purge=None)

    def bring_up(settings, nodes, retire, report):
        calls.nodes, calls.retire = nodes, retire
        report("redis: started")
        up_settings = FarmSettings(state_dir=state_dir, wanted=settings.wanted, running=running)
        print("(raylet) The node with node id: f00 has been marked dead")  # as Ray does, whenever it likes
        others = () if retire else ("0.0.9",)
        return UpReport(started=("redis",) if calls.changed else (), others=others, settings=up_settings)

    def bring_down(settings, purge, report):
        calls.purge = purge
        report("redis: stopped")
        print("(raylet) The node with node id: f00 has been marked dead")
        return DownReport(was_farm=True, stopped=("redis",), left=("notes.txt",) if purge else ())

    monkeypatch.setattr(up, "bring_up", bring_up)
    monkeypatch.setattr(down_command, "bring_down", bring_down)
    return calls


def test_up_tells_what_status_tells(launched):
    """The same document, so that a script needs one reader, and what was done."""
    told, code = document("up", "--nodes", "3")
    assert code == 0
    assert launched.nodes == 3
    assert told == {**document("status")[0], "changed": True, "started": ["redis"], "stopped": []}


def test_up_tells_of_another_release_and_retires_it_when_it_is_told_to(launched):
    """An upgrade leaves the old one's actors to its drivers; who knows that they have left ends them."""
    assert "actors of 0.0.9 go on for drivers of it; `lazyfarm up --retire` ends them" in run("up").stdout
    assert launched.retire is False
    assert "0.0.9" not in run("up", "--retire").stdout
    assert launched.retire is True


def test_up_again_says_that_nothing_was_changed(launched):
    """Idempotent, and it says so."""
    assert "already up" not in run("up").stdout
    launched.changed = False
    result = run("up")
    assert result.exit_code == 0
    assert "already up: nothing was changed" in result.stdout
    told, _ = document("up")
    assert (told["changed"], told["started"]) == (False, [])


def test_down_tells_what_was_stopped(launched):
    """And purges only when it is told to; then it names what is left, which is not the farm's."""
    assert document("down") == ({"stopped": ["redis"]}, 0)
    assert launched.purge is False
    assert "`lazyfarm down --purge` removes it" in run("down").stdout
    assert "notes.txt" in run("down", "--purge").stdout
    assert launched.purge is True


@pytest.mark.parametrize("args", [(), ("--purge",)])
def test_down_where_no_farm_is_says_so_and_makes_nothing(args, tmp_path):
    """Exit 0: what was asked for is so."""
    mine = tmp_path / "mine"
    (mine / "logs").mkdir(parents=True)
    (mine / "logs" / "precious").write_text("not a farm's")
    for directory in (tmp_path / "nothing", mine):
        result = run("down", *args, "--state-dir", str(directory))
        assert result.exit_code == 0
        assert "nothing was running there" in result.stdout
        assert document("down", *args, "--state-dir", str(directory)) == ({"stopped": []}, 0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "mine", "precious"]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rediss://h", ("h", 6379)),
        ("https://h:1", ("h", 1)),
        ("unix:///run/redis.sock", None),
        ("redis+sentinel://a:1,b:2/farm", None),
        ("rediss+cluster://a:1,b:2", None),
    ],
)
def test_only_one_server_has_an_address_to_try(url, address):
    """A socket has none, and of several it is for the client to find the one."""
    assert url_address(url) == address


@pytest.mark.usefixtures("launched", "records")
@pytest.mark.parametrize("broken", ["[redis\n", None])
def test_only_up_cares_for_the_file_that_it_was_given(state_dir, running, tmp_path, broken):
    """Broken or removed since: other commands go by what `up` recorded, and so does `up` where it is gone."""
    file = tmp_path / "farm-config.toml"
    if broken is not None:
        file.write_text(broken)
    write_running(state_dir, Running(**{**_fields(running), "config_file": file}))
    assert run("status").exit_code == 0
    assert document("down")[1] == 0
    result = run("up")
    if broken is None:
        assert result.exit_code == 0
        assert f"{file} is gone: going on with what was recorded of it" in result.stdout
    else:
        assert result.exit_code == 1
        assert str(file) in result.stderr


def _fields(running):
    return {name: getattr(running, name) for name in running.__dataclass_fields__}


# -- errors --------------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_with_its_hint(farm):
    """Exit 1, nothing on stdout but the progress, no traceback."""
    farm.error = DigestMismatchError("sha256:a", "sha256:b", "mirror")
    result = run("unlazy", "debian:12")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: mirror served sha256:b for sha256:a (hint: ")
    assert "Traceback" not in result.output
    assert farm.is_closed


def test_an_error_with_json_is_the_document(farm):
    """Type, message and hint on stdout; stderr is empty."""
    assert document("unlazy", "unknown") == (
        {
            "error": {
                "type": "RefNotFoundError",
                "message": "no ref or image 'unknown' is known to this farm",
                "hint": RefNotFoundError("unknown").hint,
            }
        },
        1,
    )


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["refs", "ls"],
        ["refs", "show", "x"],
        ["leases", "ls"],
        ["leases", "show", "x"],
        ["leases", "pin", "x"],
        ["leases", "release", "x"],
        ["leases", "leaks"],
        ["explain", "wait", "x"],
        ["explain", "kept", "x"],
        ["explain", "pull", "x"],
        ["audit", "--follow"],
        ["du"],
        ["du", "--nodes"],
        ["prune", "--dry-run"],
        ["prune", "--nodes"],
        ["pull", "debian:12"],
        ["unlazy", "x"],
        ["extract", "x"],
        ["push", "x", "y"],
        ["jobs", "ls"],
        ["jobs", "show", "x"],
        ["jobs", "logs", "x"],
        ["jobs", "cancel", "x"],
        ["attach", "x"],
    ],
    ids=" ".join,
)
def test_without_a_farm_every_command_says_so(args, tmp_path):
    """Not a missing file, not a refused connection: FarmNotRunningError, with what to do."""
    told, code = document(*args, "--state-dir", str(tmp_path))
    assert code == 1
    assert told["error"]["type"] == "FarmNotRunningError"
    assert str(tmp_path) in told["error"]["message"]
    assert "lazyfarm up" in told["error"]["hint"]


def test_a_farm_whose_redis_is_gone_is_not_running(state_dir, running):
    """After a restart of the machine, farm.toml is still there; nobody waits for a time-out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    write_running(state_dir, Running(**{**_fields(running), "redis_url": f"redis://127.0.0.1:{free}/0"}))
    told, code = document("status")
    assert code == 1
    assert told["error"]["type"] == "FarmNotRunningError"


def test_an_unexpected_exception_is_one_line_and_a_log(farm, state_dir):
    """Our bugs don't throw tracebacks at users: they are in the named file."""
    farm.error = RuntimeError("two\nlines")
    result = run("unlazy", "debian:12")
    log = state_dir / "logs" / "crashes.log"
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: RuntimeError: two lines (hint: ")
    assert str(log) in result.stderr
    assert "Traceback" in log.read_text()


def test_the_debug_variable_shows_the_traceback(farm, monkeypatch):
    """LAZYFARM_DEBUG=1, for us."""
    monkeypatch.setenv("LAZYFARM_DEBUG", "1")
    farm.error = RuntimeError("x")
    result = run("unlazy", "debian:12")
    assert "Traceback" in result.stderr
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["pull"],
        ["up", "--nodes", "0"],
        ["up", "--nodes", "many"],
        ["extract", "x", "--node", "n0", "--all-nodes"],
        ["status", "--nosuch"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(args, farm):
    """Before anything is done."""
    result = run(*args)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("args", [["pull", "Debian:12"], ["pull", "debian", "--platform", "x"], ["push", "x", "Y"]])
def test_what_does_not_parse_is_refused_before_the_cluster_is_joined(args, state_dir):
    """No second is spent on joining Ray for a typing error."""
    told, code = document(*args)
    assert code == 1
    assert told["error"]["type"] in {"InvalidReferenceError", "InvalidPlatformError"}


def test_faults_of_the_environment_are_errors_of_every_command(records, monkeypatch):
    """All of them, in one line."""
    monkeypatch.setenv("LAZYFARM__FETCH__ATTEMPTS", "0")
    monkeypatch.setenv("LAZYFARM__FETCH__PART_BYTES", "x")
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "LAZYFARM__FETCH__ATTEMPTS" in result.stderr
    assert "LAZYFARM__FETCH__PART_BYTES" in result.stderr


# -- health --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"node_records": []}, "no node is alive"),
        ({"node_records": [NODE, NodeRecord(id="n1", ray_id="", address="", alive=False)]}, "node n1 is dead"),
        (
            {"node_records": [NodeRecord(id="n0", ray_id="f00", address="127.0.0.1", alive=True, draining=True)]},
            "every live node drains",
        ),
        ({"actor_records": []}, "no supervisor runs"),
        (
            {"actor_records": [SUPERVISOR, ActorRecord(name="w", kind="fetch-worker", node="n0", pid=1, state="lost")]},
            "actor w is lost",
        ),
    ],
)
def test_status_exits_1_and_names_what_is_wrong(change, says, records):
    """The document is still there, with the problems in it."""
    for name, value in change.items():
        setattr(records, name, value)
    told, code = document("status")
    assert code == 1
    assert told["problems"] == [says]
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {says} (hint: ")


@pytest.mark.parametrize(("service", "recorded"), [("s3", "s3_endpoint"), ("jobs", "ray_jobs_url")])
def test_status_notices_a_service_that_accepts_no_connection(service, recorded, records, state_dir, running):
    """It is not read from, but it is asked whether it is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    write_running(state_dir, Running(**{**_fields(running), recorded: f"http://127.0.0.1:{free}"}))
    told, code = document("status")
    assert code == 1
    assert told["problems"] == [f"{service} at 127.0.0.1:{free} accepts no connection"]


def test_status_tells_where_jobs_go(records, state_dir, running):
    """What `ray job submit` takes as address; a farm that takes no jobs says nothing of it, and nothing is wrong."""
    assert f"jobs     {running.ray_jobs_url}" in run("status").stdout
    write_running(state_dir, Running(**{**_fields(running), "ray_jobs_url": ""}))
    told, code = document("status")
    assert (code, told["jobs"]) == (0, None)
    assert "jobs" not in run("status").stdout


# -- for people ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("lazyfarm jo", ["jobs"]), ("lazyfarm jobs l", ["logs", "ls"]), ("lazyfarm du --r", ["--refs"])],
)
def test_a_shell_completes_commands_and_options(typed, offered):
    """As `lazyfarm --install-completion` sets it up: a command's own are known without running it."""
    words = typed.split()
    asked = {"_LAZYFARM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "lazyfarm"], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert sorted(done.stdout.split()) == offered


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_with_an_example(name):
    """`lazyfarm X --help` is enough to use X; every one takes --state-dir and --json, and its document has a shape."""
    told = run(*name.split(), "--help").stdout
    assert f"Example:\n    lazyfarm {name}" in told
    options = {option for parameter in commands()[name].params for option in parameter.opts}
    assert {"--state-dir", "--json"} <= options
    assert name in DOCUMENTS


def test_exit_statuses_are_those_that_the_reference_tells():
    """Of what commands end with by themselves, and of the usage that click refuses."""
    assert set(EXIT_STATUSES) == {0, EXIT_ERROR, 2, EXIT_INTERRUPTED}
    assert "Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted." in run("--help").stdout


def test_no_shape_is_of_a_command_that_is_not_there():
    """The list of documents and the list of commands are the same."""
    assert set(DOCUMENTS) == set(commands())


def properties(part):
    """Yield every key that a schema names, with its own schema."""
    if isinstance(part, dict):
        yield from part.get("properties", {}).items()
        for below in part.values():
            yield from properties(below)
    elif isinstance(part, list):
        for below in part:
            yield from properties(below)


@pytest.mark.parametrize("name", [*DOCUMENTS, "progress"])
def test_keys_of_documents_are_named_alike(name):
    """No unit in a name: bytes and seconds are what all have; `error` is the command's own, `failure` all others'."""
    for key, _ in properties(schema({**DOCUMENTS, "progress": PROGRESS}[name])):
        assert not key.endswith(("_bytes", "_s", "_seconds")), key
        assert not key.startswith("bytes_"), key
        assert key != "error"


def test_an_audit_entry_is_told_with_every_field():
    """Which is how its shape lists them: it is made of the entry by name."""
    told = audit_document(AuditEntry(operation="pull"))
    check_document(("audit",), told)


def test_who_finds_a_layer_present_again_and_again_is_told_of_once():
    """Told where it was first so; another job's, or another's fetch, is another line."""
    found = AuditEntry(operation="unlazy", outcome="present", job="4f2a", by="w", source="snapshot")
    fetched = AuditEntry(operation="fetch", outcome="committed", job="4f2a", by="w", source="r", moved_bytes=5)
    lines = story_lines(
        [fetched, found, replace(found, wall_s=5.0), replace(found, job="77aa"), replace(fetched, fence=2), found]
    )
    assert [line.split("  ", 1)[1] for line in lines] == [
        "fetch committed 5 B from r for job 4f2a by w",
        "unlazy present from snapshot for job 4f2a by w, and 2 times more",
        "unlazy present from snapshot for job 77aa by w",
        "fetch committed 5 B from r for job 4f2a by w",
    ]


def test_a_document_with_a_key_that_is_said_nowhere_is_noticed():
    """Else the checks of all other tests would prove little."""
    check_document(("down",), {"stopped": []})
    for wrong in ({}, {"stopped": [], "more": 1}, {"stopped": [1]}):
        with pytest.raises(AssertionError, match="down"):
            check_document(("down",), wrong)


def test_a_token_file_that_is_not_there_is_told_before_anybody_is_asked(tmp_path):
    """Of a farm elsewhere, which needs no state directory here."""
    there = ("--address", "http://127.0.0.1:1", "--token-file", str(tmp_path / "none"))
    result = run("submit", "--json", "--state-dir", str(tmp_path / "state"), *there, "driver.py")
    told = read_document(("submit",), result.stdout)
    assert (told["error"]["type"], result.exit_code) == ("InvalidArgumentError", 1)
    assert "none" in told["error"]["message"]


def test_the_version_is_told():
    """From the installed package."""
    assert run("--version").stdout.startswith("lazyfarm 0.")


def test_people_see_sizes_states_and_progress(farm):
    """Off a terminal: plain lines, one for each step, then the table."""
    result = run("pull", "debian:12")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert f"fetch {short(TOP.record.blob.digest)}  fetching  0 B of 20.0 MiB" in result.stdout
    assert f"fetch {short(TOP.record.blob.digest)}  done  20.0 MiB" in result.stdout
    assert "20.0 MiB  present" in result.stdout
    assert "2 layers, 1 lazy, 40.0 MiB" in result.stdout


@pytest.mark.parametrize("args", [["status"], ["refs", "ls"], ["refs", "show", "x"], ["leases", "ls"]], ids=" ".join)
def test_reading_commands_have_words_too(args, records):
    """A table and exit 0."""
    result = run(*args)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout


def test_plain_progress_tells_steps_not_chunks(capsys):
    """A hundred chunks of a layer are a handful of lines."""
    watch = PlainLayers(Output(as_json=False))
    for moved in range(101):
        watch(ProgressItem(item="fetch:sha256:aa", phase=LayerPhase.FETCHING, current_bytes=moved, total_bytes=100))
    watch(ProgressItem(item="fetch:sha256:aa", phase=LayerPhase.FAILED, detail="it\nbroke", total_bytes=100))
    watch(ProgressItem(item="", phase=LayerPhase.DONE))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "fetch sha256:aa  failed  100 B  it broke"


def test_live_progress_shows_a_bar_for_each_layer():
    """A joined layer is whole, though this call moved nothing."""
    progress = Progress(disable=True)
    watch = LiveLayers(progress)
    watch(ProgressItem(item="fetch:sha256:aa", phase=LayerPhase.FETCHING, current_bytes=5, total_bytes=10))
    watch(ProgressItem(item="extract:n0:sha256:bb", phase=LayerPhase.WAITING))
    watch(ProgressItem(item="fetch:sha256:aa", phase=LayerPhase.JOINED, total_bytes=10))
    watch(ProgressItem(item="", phase=LayerPhase.DONE))
    assert [task.description for task in progress.tasks] == ["fetch sha256:aa", "extract n0 sha256:bb"]
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (10, 10)


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (20 * MIB, "20.0 MiB"), (5 * 1024**5, "5120.0 TiB")],
)
def test_sizes_are_in_binary_units(count, told):
    """As BuildKit and containerd show them."""
    assert size(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.42, "0.42 s"), (12, "12 s"), (180, "3 min"), (18000, "5 h"), (7 * 86400, "7 d")]
)
def test_durations_are_in_the_unit_that_fits(seconds, told):
    """Nobody reads 604800 s."""
    assert duration(seconds) == told


# -- interrupts ----------------------------------------------------------------------------------


def test_ctrl_c_cancels_the_call_and_leaves_the_farm(farm):
    """The call is cancelled and awaited, the farm is left, exit 130, one line."""
    ended = []

    async def blocks():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    farm.blocks = blocks
    result = run("unlazy", "debian:12")
    assert result.exit_code == 130
    assert ended == [True]
    assert farm.is_closed
    assert result.stderr == "interrupted; this call's part was cancelled\n"


def test_ctrl_c_with_json_is_a_document(farm):
    """One document on stdout, whatever happens."""

    async def blocks():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    farm.blocks = blocks
    told, code = document("unlazy", "debian:12")
    assert code == 130
    assert told["error"]["type"] == "Interrupted"


def test_a_call_that_does_not_end_is_left_after_the_grace():
    """A hang must not outlive the user's patience: the process ends, the leases lapse."""
    left = asyncio.Event()
    codes = []

    def leave(code):
        codes.append(code)
        left.set()

    async def stubborn():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await left.wait()

    with pytest.raises(KeyboardInterrupt):
        driving.run_to_end(stubborn, grace_s=0.01, leave=leave)
    assert codes == [130]


def test_a_second_ctrl_c_ends_at_once():
    """Who presses twice means it."""
    left = asyncio.Event()
    codes = []

    def leave(code):
        codes.append(code)
        left.set()

    async def stubborn():
        loop = asyncio.get_running_loop()
        loop.call_soon(os.kill, os.getpid(), signal.SIGINT)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        loop.call_soon(os.kill, os.getpid(), signal.SIGINT)
        await left.wait()

    with pytest.raises(KeyboardInterrupt):
        driving.run_to_end(stubborn, grace_s=60.0, leave=leave)
    assert codes == [130]


def test_the_result_of_a_call_that_was_not_interrupted_is_returned():
    """And its error raised."""

    async def good():
        return 7

    async def bad():
        raise FarmNotRunningError("x", "y")

    assert driving.run_to_end(good) == 7
    with pytest.raises(FarmNotRunningError):
        driving.run_to_end(bad)


# -- what is imported ----------------------------------------------------------------------------

_HEAVY = {"ray", "boto3", "botocore", "aiohttp", "rich", "structlog", "redis", "pydantic", "click"}


def python(*args, cwd=None, **environ):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environ},
        timeout=60,
    )


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["refs", "ls"],
        ["refs", "show", "x"],
        ["leases", "ls"],
        *(["jobs", "ls"], ["jobs", "show", "x"], ["jobs", "logs", "x"], ["jobs", "cancel", "x"], ["attach", "x"]),
    ],
    ids=" ".join,
)
def test_reading_commands_import_nothing_heavy(args, state_dir):
    """0.6 s from start to exit leaves no room for Ray, boto3, redis-py, structlog, pydantic or rich."""
    code = (
        "import atexit, sys\n"
        "import lazyfarm.records, lazyfarm.jobs\n"
        "from lazyfarm.cli.main import run\n"
        "atexit.register(lambda: print(*sorted({name.partition('.')[0] for name in sys.modules})))\n"
        "run()\n"
    )
    told = python("-c", code, *args, "--state-dir", str(state_dir / "none"))
    assert told.stderr.startswith("error: no farm is running")
    assert _HEAVY & set(told.stdout.split()) == set()


def test_a_driver_imports_ray_and_little_else():
    """What the actors are made of is imported where they run: a driver only looks them up and calls them."""
    code = (
        "import sys\n"
        "import lazyfarm.blocking, lazyfarm.joined.farm, actors.remote\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    told = python("-c", code)
    assert told.returncode == 0, told.stderr
    assert {"aiohttp", "boto3", "botocore", "structlog", "redis"} & set(told.stdout.split()) == set()


def test_a_folder_that_hides_a_package_of_ours_is_named(tmp_path):
    """A driver's own `cluster/` would break an import somewhere deep inside: say it at once, in one line."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").touch()
    told = python("-c", "import lazyfarm", cwd=tmp_path)
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith(f"ImportError: {tmp_path / 'cluster'} hides lazyfarm's own package")

    told = python("-m", "lazyfarm", "--version", cwd=tmp_path)
    assert told.returncode == 1
    assert told.stderr.startswith(f"error: {tmp_path / 'cluster'} hides")
    assert told.stderr.count("\n") == 1


def test_a_folder_that_hides_nothing_is_left_alone(tmp_path):
    """Without an __init__.py it is a namespace, and ours is found all the same."""
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "notes.txt").touch()
    assert python("-c", "import lazyfarm, storage.farm_file", cwd=tmp_path).returncode == 0


# -- nodes' disks ---------------------------------------------------------------------------------------


def test_du_of_nodes_says_what_holds_what(farm, state_dir):
    """An item a line, what is free a node; the document has whole IDs and bytes."""
    told, code = document("du", "--nodes", "--state-dir", str(state_dir))
    assert code == 0
    assert [(node["node"], node["free"], len(node["items"])) for node in told["nodes"]] == [
        ("n0", 5 * MIB, 2),
        ("n1", 5 * MIB, 2),
    ]
    assert told["nodes"][0]["items"][0] == {
        "id": f"snapshot {MANIFEST}",
        "type": "regular",
        "parents": [],
        "size": 2 * MIB,
        "created": 1.0,
        "last_used": 2.0,
        "held_by": "lease driver-1",
        "description": IMAGE,
    }
    lines = run("du", "--node", "n1", "--state-dir", str(state_dir)).stdout.splitlines()
    assert "lease driver-1" in lines[1]
    assert lines[1].startswith(f"n1    snapshot {short(MANIFEST)}")
    assert lines[-1].split() == ["n1", "3.0", "MiB", "2.0", "MiB", "100.0", "MiB", "5.0", "MiB"]


def test_prune_of_nodes_asks_as_the_bucket_is_asked(farm, state_dir):
    """For each node; what was taken up meanwhile is told."""
    words = ("prune", "--nodes", "--keep-bytes", "1GB", "--keep-duration", "2h", "--filter", "id~=^cache", "--dry-run")
    told, code = document(*words, "--state-dir", str(state_dir))
    assert code == 0
    asked = {"keep_bytes": 10**9, "keep_duration_s": 7200.0, "filters": ["id~=^cache"], "dry_run": True}
    assert farm.asked == (None, asked)
    assert [(node["freed"], node["kept"], node["dry_run"]) for node in told["nodes"]] == [(MIB, 1, True)]
    lines = run("prune", "--node", "n0", "--state-dir", str(state_dir)).stdout.splitlines()
    assert lines == ["n0  cache abc/0  1.0 MiB  apt", "n0: 1 item, freed 1.0 MiB; 1 item taken up meanwhile"]


@pytest.mark.parametrize("words", [("du", "--nodes", "--refs"), ("prune", "--node", "n0", "--all")], ids=" ".join)
def test_what_is_of_the_bucket_is_not_asked_of_nodes(farm, state_dir, words):
    """Rather than ignored."""
    assert run(*words, "--state-dir", str(state_dir)).exit_code == 2
