"""Ops carried out on nodes, with real Redis, S3, snapshotters and containers: what comes of them, and what is left."""

# What blocks here takes milliseconds, and nothing else runs in these loops.
# ruff: noqa: ASYNC240

from __future__ import annotations

import asyncio
import io
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.descriptor import Compression
from cluster.digest import EMPTY_CHAIN, digest_of
from cluster.errors import (
    DeadlineExceededError,
    FileActionError,
    InternalError,
    LeaseLostError,
    MissingSecretError,
    NodeDiskError,
    ProcessFailedError,
    RefNotFoundError,
    SourceDateError,
    TreeLostError,
)
from cluster.graph import (
    BindMount,
    CopyAction,
    DiffOp,
    FileOp,
    ImageOp,
    LocalOp,
    MakeDirectory,
    MakeFile,
    MergeOp,
    RunOp,
    SecretMount,
    Vertex,
)
from cluster.lease import LeaseId, blob_resource, ref_resource
from cluster.provider import FARM
from cluster.ref import RefRecord
from cluster.tree import MTIME_S
from lazyfarm.context import scan
from storage.blobs import S3ContentStore
from storage.containers.runc import Runc
from storage.layer_upload import KEY_PREFIX, LayerStore
from storage.local_trees import LocalTrees
from storage.op_performer import OpPerformer
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.doubles.commands import make_root
from tests.doubles.disks import CrowdedDisk
from tests.doubles.layers import (
    MTIME,
    Bytes,
    directory,
    facts,
    file,
    hard_link,
    layer_tar,
    sketch,
    symlink,
)
from tests.doubles.stores import hold_nothing

MIB = 1024**2
NS = 10**9
LEASE = LeaseId("of-the-test")
#: For ``sleep``: long, and no other test session's.
NAP = f"1001.{os.getpid()}"
#: Far more than anything here takes.
LONG_S = 90.0
EPOCH = (("SOURCE_DATE_EPOCH", "1000000000"),)
KINDS = {"overlay": OverlaySnapshotter, "copying": CopyingSnapshotter}

is_root = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
needs_runc = [
    *is_root,
    pytest.mark.skipif(
        shutil.which("runc") is None and not Path("/usr/sbin/runc").exists(), reason="runc is not installed"
    ),
]
pytestmark = [pytest.mark.redis, pytest.mark.s3]


def runs(test):
    """Mark a test that runs commands."""
    for each in needs_runc:
        test = each(test)
    return test


# -- nodes ----------------------------------------------------------------------------------------------------


class Gate:
    """A content store whose uploads of parts can be held up."""

    def __init__(self, store) -> None:
        self._store = store
        self.is_shut = False
        self.arrived = asyncio.Event()
        self.proceed = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def upload_part(self, *arguments):
        part = self._store.upload_part(*arguments)
        if self.is_shut:
            self._loop.call_soon_threadsafe(self.arrived.set)
            assert self.proceed.wait(LONG_S)
        return part


class Node:
    """One node of a farm."""

    def __init__(self, farm, name: str, kind: str) -> None:
        self.farm = farm
        self.root = farm.directory / name
        self.snapshotter = KINDS[kind](self.root)
        self.threads = ThreadPoolExecutor(8)
        self.renewer = farm.stores.new_renewer()
        tokens = iter(range(10**6))
        self.layers = LayerStore(
            worker=name,
            store=farm.objects,
            flights=farm.stores.flights,
            renewer=self.renewer,
            new_token=lambda: f"{name}-{next(tokens)}",
            flight_ttl_s=6.0,
            part_bytes=5 * MIB,
        )
        self.performer = OpPerformer(
            snapshotter=self.snapshotter,
            containers=Runc(self.root / "containers"),
            trees=farm.trees,
            layers=self.layers,
            refs=farm.stores.refs,
            leases=farm.stores.leases,
            threads=self.threads,
            compression=Compression.ZSTD,
            disk=farm.disk,
        )

    async def do(self, op, *inputs, vault=None, log=None, lease_id=LEASE, timeout_s=LONG_S, disk_wait_s=None):
        """Carry *op* out over refs."""
        return await self.performer.run(
            vertex_of(op, *inputs),
            inputs,
            lease_id=lease_id,
            secrets=vault or Vault(),
            log=log or Log(),
            timeout_s=timeout_s,
            disk_wait_s=disk_wait_s,
        )

    async def sh(self, script, *inputs, **options):
        """Run a shell script in its first input."""
        do = {key: options.pop(key) for key in ("vault", "log", "timeout_s") if key in options}
        return await self.do(RunOp(args=("/bin/sh", "-ec", script), **options), *inputs, **do)

    async def key(self, op, index, source, *others):
        """Return the content key of one input."""
        vertex = Vertex(op, tuple(digest_of(b"%d" % n) for n in range(index + 1 + len(others))))
        return await self.performer.content_key(vertex, index, source, timeout_s=LONG_S)

    async def fetch(self, ref):
        """Unpack a chain's layers from S3."""
        for state in await self.farm.stores.refs.chain(ref):
            record = state.record
            if not self.snapshotter.has(record.chain):
                self.snapshotter.apply(
                    chain=record.chain,
                    parent=record.parent_chain,
                    layer=record.blob,
                    stream=Bytes(self.farm.content(state.present.key)),
                    await_parent=lambda: None,
                )

    async def facts(self, ref):
        """Return what a ref's snapshot has in it."""
        (state,) = await self.farm.stores.refs.get([ref])
        with self.mounted(state.record.chain) as path:
            return facts(path)

    async def sketch(self, ref):
        """Return that in short."""
        (state,) = await self.farm.stores.refs.get([ref])
        with self.mounted(state.record.chain) as path:
            return sketch(path)

    @contextmanager
    def mounted(self, chain):
        path = self.snapshotter.mount(chain, "look")
        try:
            yield path
        finally:
            self.snapshotter.unmount("look")

    def assert_nothing_is_left(self) -> None:
        """No mount, workspace, container or process."""
        assert self.snapshotter.mounts() == {}
        assert str(self.root) not in Path("/proc/mounts").read_text()
        assert list((self.root / self.snapshotter.name / "staging").iterdir()) == []
        for left in ("bundles", "runc"):
            if (self.root / "containers" / left).exists():
                assert list((self.root / "containers" / left).iterdir()) == []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert NAP.encode() not in path.read_bytes()
            except OSError:
                continue

    def close(self) -> None:
        self.renewer.close()
        self.threads.shutdown()


class Farm:
    """Stores, and nodes over them."""

    def __init__(self, directory, redis_farm, objects) -> None:
        self.directory = directory
        self.stores = redis_farm.stores()
        self.objects = Gate(objects)
        self.threads = ThreadPoolExecutor(8)
        self.trees = LocalTrees(self.stores.refs._link, redis_farm.keys, self.objects, threads=self.threads)
        self.disk = CrowdedDisk()
        self.disk.room.set()
        self.nodes: list[Node] = []

    def node(self, kind="overlay") -> Node:
        """Add a node."""
        made = Node(self, f"node-{len(self.nodes)}", kind)
        self.nodes.append(made)
        return made

    async def base(self, *items, parent=None):
        """Make a ref of a layer with *items*."""
        tar = layer_tar(*items)

        def write(out):
            out.write(tar)
            return digest_of(tar)

        stored = await self.nodes[0].layers.put_layer(
            write, compression=Compression.GZIP, deadline_s=LONG_S, hold=hold_nothing
        )
        below = None if parent is None else (await self.stores.refs.get([parent]))[0].record
        record = RefRecord.over(stored.descriptor, below)
        await self.stores.refs.get_or_create([record], {}, lease_id=LEASE)
        for node in self.nodes:
            await node.fetch(record.id)
        return record.id

    async def send(self, path) -> LocalOp:
        """Send a directory, as a driver does."""
        scanned = scan(path)
        await self.trees.send(scanned.tree, scanned.paths)
        return LocalOp(tree=scanned.digest)

    async def record(self, ref) -> RefRecord:
        (state,) = await self.stores.refs.get([ref])
        return state.record

    def content(self, key) -> bytes:
        data, buffer = bytearray(), memoryview(bytearray(MIB))
        with self.objects.open(key) as stream:
            while count := stream.readinto(buffer):
                data += buffer[:count]
        return bytes(data)

    def built(self) -> list[str]:
        """Return the keys of all layers that were uploaded."""
        return sorted(info.key for info in self.objects.objects(KEY_PREFIX))


class Log:
    """Keeps what a command said."""

    def __init__(self) -> None:
        self.text = ""
        self._changed = asyncio.Event()

    async def __call__(self, lines):
        self.text += "".join(f"{line.text}\n" for line in lines)
        self._changed.set()

    async def until(self, text):
        async with asyncio.timeout(LONG_S):
            while text not in self.text:
                self._changed.clear()
                await self._changed.wait()


class Vault:
    """A driver's secrets."""

    def __init__(self, **values) -> None:
        self.values = values
        self.asked: list[str] = []

    async def __call__(self, secret_id):
        self.asked.append(secret_id)
        return self.values.get(secret_id)


def vertex_of(op, *inputs) -> Vertex:
    """Return the vertex of *op*; which vertices it is over makes no difference here."""
    return Vertex(op, tuple(None if ref is None else digest_of(ref.encode()) for ref in inputs))


def copy(*sources, to, index=1, **options):
    return CopyAction(input=index, sources=sources, destination=to, **options)


def bind(source="/", *, target="/in", index=1, is_read_only=True):
    return BindMount(target=target, input=index, source=source, is_read_only=is_read_only)


@pytest.fixture
async def farm(tmp_path, redis_farm, s3_config):
    objects = S3ContentStore(s3_config)
    made = Farm(tmp_path, redis_farm, objects)
    await made.stores.leases.create(LEASE, ttl_s=600)
    yield made
    for node in made.nodes:
        node.assert_nothing_is_left()
        node.close()
    assert objects.list_uploads("") == []
    made.threads.shutdown()
    objects.close()


@pytest.fixture
def node(farm):
    """A node with overlays."""
    return farm.node()


@pytest.fixture(params=[pytest.param("overlay", marks=is_root), "copying"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("template") / "root")


@pytest.fixture
async def shell(farm, node, template):
    """A ref with a shell and a few programs, whose snapshot *node* has."""
    return await node.do(await farm.send(template))


# -- what comes of a command ----------------------------------------------------------------------------------


@runs
async def test_what_a_command_changes_is_the_same_on_another_node(farm, node, shell):
    """Deleted and replaced files, hard links, xattrs, devices, owners: published here, unpacked there, one tree."""
    base = await farm.base(
        directory("d"),
        file("d/gone", b"g"),
        file("d/kept", b"k", xattrs={"user.x": b"\xff\0", "trusted.t": b"1"}),
        directory("replaced"),
        file("replaced/old", b"o"),
        file("one", b"shared"),
        hard_link("two", "one"),
        parent=shell,
    )
    log = Log()

    made = await node.sh(
        "echo building; rm d/gone; rm -r replaced; mkdir replaced; echo n > replaced/new; chmod 600 d/kept;"
        " mkdir -m 2750 new; echo f > new/f; ln new/f new/g; ln -s f new/s; mknod null c 1 3; echo more >> one",
        base,
        log=log,
    )

    assert log.text == "building\n"
    here = await node.facts(made)
    assert "d/gone" not in here
    assert "replaced/old" not in here
    assert here["d/kept"].xattrs == (("trusted.t", b"1"), ("user.x", b"\xff\0"))
    assert here["new/g"].first == "new/f"
    assert (here["new"].mode, here["null"].kind) == (0o2750, "character")
    there = farm.node()
    await there.fetch(made)
    assert await there.facts(made) == here
    other = farm.node("copying")
    await other.fetch(made)
    assert await other.facts(made) == here


@runs
async def test_a_result_is_recorded_held_and_said_to_be_built(farm, node, shell):
    """One layer on its parent: of the farm's own making, described, its ref and its blob held by the lease."""
    made = await node.sh("echo 1 > f", shell)

    (state,) = await farm.stores.refs.get([made])
    record, below = state.record, await farm.record(shell)
    assert (record.parent, record.parent_chain, record.depth) == (shell, below.chain, below.depth + 1)
    assert record.description == "run /bin/sh -ec echo 1 > f"
    assert record.blob.compression is Compression.ZSTD
    assert state.providers == (FARM,)
    assert state.present.source == FARM.source
    held = (await farm.stores.leases.get(LEASE)).resources
    assert {ref_resource(made), blob_resource(record.blob.digest)} <= set(held)
    assert node.snapshotter.has(record.chain)


@runs
async def test_a_command_that_fails_is_told_with_its_exit_code(farm, node, shell):
    """And with what it said last; nothing is made of what it had done."""
    before = farm.built()

    with pytest.raises(ProcessFailedError) as raised:
        await node.sh("echo 1 > f; echo no such thing >&2; exit 7", shell)

    assert (raised.value.exit_code, raised.value.last_lines) == (7, ("no such thing",))
    assert farm.built() == before
    assert list(node.snapshotter.snapshots()) == [(await farm.record(shell)).chain]


@runs
async def test_a_command_that_changes_nothing_gives_its_root_back(farm, node, shell):
    """No layer, no ref."""
    before = farm.built()

    assert await node.sh("cat /etc/passwd", shell) == shell

    assert farm.built() == before


async def test_nothing_made_of_nothing_is_nothing(farm, kind):
    """An op that leaves an empty filesystem empty has no ref."""
    node = farm.node(kind)

    assert await node.do(FileOp(actions=(MakeDirectory(path="/"),)), None) is None


# -- mounts and secrets -----------------------------------------------------------------------------------------


@runs
async def test_binds_show_inputs_and_change_none(farm, node, shell):
    """Read-only ones can't be written to; what is written to others is dropped; scratch is an empty directory."""
    data = await farm.base(directory("sub"), file("sub/f", b"data\n"))
    log = Log()

    made = await node.sh(
        "cat /in/f /rw/f; echo changed > /rw/f; cat /rw/f; ls /nothing; touch /in/f 2>/dev/null || echo refused",
        shell,
        data,
        data,
        None,
        binds=(
            bind("/sub"),
            bind("/sub", target="/rw", index=2, is_read_only=False),
            bind(target="/nothing", index=3),
        ),
        log=log,
    )

    assert log.text == "data\ndata\nchanged\nrefused\n"
    assert made == shell
    assert (await node.sketch(data))["sub/f"] == b"data\n"


@runs
async def test_a_bind_of_what_is_not_there_is_told(farm, node, shell):
    """By its path; what was mounted until then is not left."""
    data = await farm.base(file("f"))

    with pytest.raises(FileActionError, match="bind /absent"):
        await node.sh("ls", shell, data, binds=(bind("/absent"),))


@runs
async def test_secrets_are_seen_by_the_command_and_by_nobody_else(farm, node, shell):
    """Asked for once each, in the op's order; in no layer, no record and no log."""
    vault, log = Vault(key=b"hunter2-hunter2", token=b"tok-1234-tok", other=b"-"), Log()

    made = await node.sh(
        'cat /run/key; echo " $TOKEN"; test "$(cat /run/again)" = "$(cat /run/key)"; echo ${#TOKEN} > f',
        shell,
        secrets=(
            SecretMount(id="token", env="TOKEN"),
            SecretMount(id="key", target="/run/key"),
            SecretMount(id="key", target="/run/again"),
            SecretMount(id="absent", target="/run/absent"),
        ),
        vault=vault,
        log=log,
    )

    assert vault.asked == ["token", "key", "absent"]
    assert (await node.sketch(made)).items() - (await node.sketch(shell)).items() == {("f", b"12\n")}
    layer = io.BytesIO()
    record = await farm.record(made)
    node.snapshotter.diff(record.chain, record.parent_chain, layer)
    for shown in (log.text.encode(), layer.getvalue(), repr(record).encode()):
        assert b"hunter2-hunter2" not in shown
        assert b"tok-1234-tok" not in shown


@runs
async def test_a_secret_that_is_required_and_not_given(farm, node, shell):
    """The op can't be carried out, wherever."""
    with pytest.raises(MissingSecretError):
        await node.sh("ls", shell, secrets=(SecretMount(id="key", target="/run/key", is_required=True),))


# -- files, trees, differences ----------------------------------------------------------------------------------


SOURCES = (
    directory("d"),
    directory("d/sub"),
    file("d/sub/f", b"f", mode=0o4755, uid=7, gid=8, xattrs={"user.x": b"1"}),
    hard_link("d/sub/g", "d/sub/f"),
    symlink("d/s", "sub/f"),
    file("late", b"l", mtime=MTIME + 10**9),
)
UNDER = (directory("./"), directory("etc"), file("etc/f", b"old"), directory("lib"), directory("lib/sub"))
FILE_OP = FileOp(
    actions=(
        MakeDirectory(path="/made/here", mode=0o700, owner="5"),
        copy("d", to="/lib/"),
        copy("late", "d/sub", to="/new/place/"),
        copy("d/sub/f", to="/etc/f"),
        MakeFile(path="/made/f", data=b"made"),
        MakeFile(path="/lib/sub/f", data=b"replaced"),
    )
)


async def test_a_file_op_comes_to_one_layer_on_every_node(farm, kind):
    """What it makes, and directories that it puts something into, have one time; what it copies keeps its own."""
    one, other = farm.node(kind), farm.node(kind)
    sources, under = await farm.base(*SOURCES), await farm.base(*UNDER)

    made = await one.do(FILE_OP, under, sources)
    again = await other.do(FILE_OP, under, sources)

    assert again == made
    found = await one.facts(made)
    assert found == await other.facts(made)
    fixed = {".", "made", "made/here", "made/f", "new", "new/place", "etc", "lib", "lib/sub", "lib/sub/f"}
    assert {name for name, fact in found.items() if fact.mtime_ns == MTIME_S * NS} == fixed
    assert found["new/place/late"].mtime_ns == (MTIME + 10**9) * NS
    assert found["new/place/f"].mtime_ns == found["lib/s"].mtime_ns == MTIME * NS
    if os.geteuid() == 0:
        assert (found["etc/f"].mode, found["etc/f"].uid, found["etc/f"].xattrs) == (0o4755, 7, (("user.x", b"1"),))
    third = farm.node("copying")
    await third.fetch(made)
    assert await third.facts(made) == found


async def test_an_op_waits_for_the_disk_and_says_so(farm, kind):
    """Nothing is made while the node's disk has no room; if none comes, another node may have it."""
    node, log = farm.node(kind), Log()
    farm.disk.room.clear()
    running = asyncio.create_task(node.do(FileOp(actions=(MakeFile(path="/made", data=b""),)), None, log=log))
    await log.until("waiting for disk: no room for make file /made")
    node.assert_nothing_is_left()
    farm.disk.room.set()
    made = await asyncio.wait_for(running, LONG_S)
    assert "made" in await node.sketch(made)
    farm.disk.error = NodeDiskError("/n1", "no room for it")
    with pytest.raises(NodeDiskError):
        await node.do(FileOp(actions=(MakeFile(path="/more", data=b""),)), None, disk_wait_s=5.0)
    assert farm.disk.waits_s == [None, 5.0]
    node.assert_nothing_is_left()


async def test_a_file_op_that_can_not_be_done_leaves_nothing(farm, kind):
    """It names its action; what it did until then is dropped."""
    node = farm.node(kind)
    sources, under = await farm.base(*SOURCES), await farm.base(*UNDER)
    before = farm.built()

    with pytest.raises(FileActionError, match="copy nothing"):
        await node.do(FileOp(actions=(MakeFile(path="/f", data=b""), copy("nothing", to="/"))), under, sources)

    assert farm.built() == before


async def test_a_copy_from_scratch_finds_nothing_and_its_root(farm, kind):
    """An empty filesystem is an input as any other."""
    node = farm.node(kind)
    under = await farm.base(*UNDER)

    made = await node.do(FileOp(actions=(copy("/", to="/copied", contents_only=False),)), under, None)
    with pytest.raises(FileActionError):
        await node.do(FileOp(actions=(copy("f", to="/"),)), under, None)

    copied = (await node.facts(made))["copied"]
    assert (copied.mode, copied.mtime_ns) == (0o755, 0)


async def test_a_driver_s_directory_is_one_layer_on_every_node(farm, kind, tmp_path):
    """Of the manifest's content and one time, the root's too; an empty one is nothing at all."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "f").write_bytes(b"f")
    (source / "sub/run.sh").write_bytes(b"#!/bin/sh")
    (source / "sub/run.sh").chmod(0o755)
    (source / "s").symlink_to("f")
    (tmp_path / "empty").mkdir()
    op = await farm.send(source)

    made = {await farm.node(kind).do(op) for _ in range(2)}

    assert len(made) == 1
    found = await farm.nodes[0].facts(*made)
    assert {fact.mtime_ns for fact in found.values()} == {MTIME_S * NS}
    assert (found["sub/run.sh"].mode, found["s"].what) == (0o755, "f")
    assert (await farm.record(*made)).parent is None
    assert await farm.nodes[0].do(await farm.send(tmp_path / "empty")) is None
    with pytest.raises(TreeLostError):
        await farm.nodes[0].do(LocalOp(tree=digest_of(b"never sent")))


async def test_a_difference_makes_the_upper_of_the_lower(farm, kind):
    """Also where neither was built upon the other; it stands on nothing itself."""
    node = farm.node(kind)
    lower = await farm.base(directory("./"), directory("d"), file("d/gone"), file("d/kept", b"k"), file("f", b"1"))
    upper = await farm.base(directory("./"), directory("d"), file("d/kept", b"k"), file("f", b"2"), file("n", b"n"))

    made = await node.do(DiffOp(), lower, upper)

    record, below = await farm.record(made), await farm.record(lower)
    assert (record.parent, record.depth, record.description) == (None, 1, "diff")
    merged = RefRecord.over(record.blob, below)
    await farm.stores.refs.get_or_create([merged], {}, lease_id=LEASE)
    await node.fetch(merged.id)
    assert await node.sketch(merged.id) == await node.sketch(upper)


async def test_differences_with_nothing(farm, kind):
    """From nothing it is all of the upper; where there is no difference it is nothing."""
    node = farm.node(kind)
    some = await farm.base(directory("./"), file("f", b"1"))

    everything = await node.do(DiffOp(), None, some)
    await node.fetch(everything)

    assert await node.facts(everything) == await node.facts(some)
    assert await node.do(DiffOp(), some, some) is None
    assert await node.do(DiffOp(), None, None) is None
    assert await node.do(DiffOp(), some, None) is not None


# -- one time ---------------------------------------------------------------------------------------------------


@runs
async def test_a_command_with_a_source_date_comes_to_one_layer_on_every_node(farm, node, shell):
    """Nothing in it is later than that; what it leaves alone keeps its time."""
    other = farm.node()
    await other.fetch(shell)
    script = "mkdir made; echo 1 > made/f; ln made/f made/g; rm /etc/group; touch -d @5 old"

    made = await node.sh(script, shell, env=EPOCH, cwd="/work/dir")

    assert await other.sh(script, shell, env=EPOCH, cwd="/work/dir") == made
    found = await node.facts(made)
    assert max(fact.mtime_ns for fact in found.values()) == 10**9 * NS
    assert found["work/dir/old"].mtime_ns == 5 * NS
    assert found["bin/sh"].mtime_ns == MTIME_S * NS


@pytest.mark.parametrize("value", ["", "now", "1.5", "-1", "1e9", "1 ", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000])
async def test_a_source_date_that_is_none_is_told_before_anything_runs(farm, value):
    """As what the op says, not as a fault of the node."""
    with pytest.raises(SourceDateError):
        await farm.node("copying").sh("ls", None, env=(("SOURCE_DATE_EPOCH", value),))


# -- content keys -----------------------------------------------------------------------------------------------


CONTENT_OPS = {
    "copy": FileOp(actions=(copy("d", to="/x"),)),
    "bind": RunOp(args=("ls",), binds=(bind("/d"), bind("/link", target="/again"))),
}


@pytest.mark.parametrize("op", CONTENT_OPS.values(), ids=CONTENT_OPS)
async def test_content_keys_are_of_content(farm, kind, op):
    """Equal where only times, layers and what is not shown differ; another for one byte."""
    node = farm.node(kind)

    async def key(content=b"f", mtime=MTIME, *more):
        top = await farm.base(
            directory("./", mtime=mtime),
            directory("d", mtime=mtime),
            file("d/f", content, mtime=mtime),
            symlink("link", "d"),
            *more,
        )
        return await node.key(op, 1, top)

    first = await key()
    assert await key(b"f", MTIME + 1, file("other", b"o")) == first
    assert await key(b"F") != first
    lower = await farm.base(directory("d"), file("d/f", b"f"), symlink("link", "d"), file("d/gone"))
    upper = await node.do(FileOp(actions=(MakeFile(path="/elsewhere", data=b""),)), lower)
    assert await node.key(op, 1, upper) == await node.key(op, 1, lower) != first


async def test_snapshotters_give_one_content_key(farm):
    """A key that was published from one node is found from all."""
    nodes = [farm.node(kind) for kind in (KINDS if os.geteuid() == 0 else ["copying"])]
    top = await farm.base(*SOURCES)

    for op in CONTENT_OPS.values():
        whole = replace(op, binds=(bind("/"),)) if isinstance(op, RunOp) else op
        assert len({await node.key(whole, 1, top) for node in nodes}) == 1
        scratch = replace(op, binds=(bind("/"),)) if isinstance(op, RunOp) else FileOp(actions=(copy("/", to="/"),))
        assert len({await node.key(scratch, 1, None) for node in nodes}) == 1


async def test_content_keys_of_what_is_missing_are_errors_of_the_op(farm, kind):
    """As carrying it out would be; of an input that has none, ours."""
    node = farm.node(kind)

    for op in CONTENT_OPS.values():
        with pytest.raises(FileActionError):
            await node.key(op, 1, None)
        with pytest.raises(InternalError, match="has no content key"):
            await node.key(op, 0, None)


# -- calls that end early -----------------------------------------------------------------------------------------


@runs
async def test_a_command_that_is_cancelled_leaves_nothing(farm, node, shell):
    """Neither the container and its mounts nor anything in S3, when the cancellation is through."""
    data, before, log = await farm.base(file("f")), farm.built(), Log()
    running = asyncio.create_task(
        node.sh(
            f"echo 1 > f; echo started; sleep {NAP}",
            shell,
            data,
            data,
            binds=(bind(), bind(target="/rw", index=2, is_read_only=False)),
            log=log,
        )
    )
    await log.until("started")

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    node.assert_nothing_is_left()
    assert farm.built() == before


@runs
async def test_a_command_that_takes_too_long_leaves_nothing(farm, node, shell):
    """A typed error says so."""
    with pytest.raises(DeadlineExceededError, match="sleep"):
        await node.sh(f"sleep {NAP}", shell, timeout_s=2.0)

    node.assert_nothing_is_left()


@runs
async def test_an_upload_that_is_cancelled_leaves_nothing(farm, node, shell):
    """Its writer has ended before the workspace goes; S3 keeps no part."""
    before = farm.built()
    farm.objects.is_shut = True
    running = asyncio.create_task(node.sh("head -c 30000000 /dev/urandom > f", shell))
    async with asyncio.timeout(LONG_S):
        await farm.objects.arrived.wait()

    running.cancel()
    farm.objects.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running

    node.assert_nothing_is_left()
    assert farm.built() == before
    assert farm.objects.list_uploads("") == []


async def test_a_file_op_that_is_cancelled_stops_at_the_next_file(farm, kind, monkeypatch):
    """And the call ends when it has."""
    node = farm.node(kind)
    loop, started, stopped = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def copy_for_ever(op, root, trees, *, ledger, checkpoint):
        loop.call_soon_threadsafe(started.set)
        try:
            while True:
                checkpoint()
        finally:
            stopped.set()

    monkeypatch.setattr("storage.op_performer.perform", copy_for_ever)
    running = asyncio.create_task(node.do(FILE_OP, None, None))
    async with asyncio.timeout(LONG_S):
        await started.wait()

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert stopped.is_set()


async def test_a_call_that_is_cancelled_while_it_opens_its_workspace_drops_it(farm, kind, monkeypatch):
    """Though nobody was given it."""
    node = farm.node(kind)
    loop, arrived, proceed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    open_workspace = node.snapshotter.workspace

    def opened_late(*arguments):
        workspace = open_workspace(*arguments)
        loop.call_soon_threadsafe(arrived.set)
        assert proceed.wait(LONG_S)
        return workspace

    monkeypatch.setattr(node.snapshotter, "workspace", opened_late)
    running = asyncio.create_task(node.do(FileOp(actions=(MakeDirectory(path="/d"),)), None))
    async with asyncio.timeout(LONG_S):
        await arrived.wait()

    running.cancel()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running

    node.assert_nothing_is_left()


async def test_a_lost_lease_ends_the_call(farm, kind):
    """What can't be held is not recorded."""
    node = farm.node(kind)

    with pytest.raises(LeaseLostError):
        await node.do(FileOp(actions=(MakeDirectory(path="/d"),)), None, lease_id=LeaseId("gone"))

    assert await farm.stores.refs.list_refs() == []


async def test_what_is_not_for_a_node_to_do_is_our_bug(farm, kind):
    """Images are pulled, and merges are made of records alone. Inputs that nobody knows are the caller's."""
    node = farm.node(kind)

    for op, inputs in ((ImageOp(reference="docker.io/library/debian:12"), ()), (MergeOp(), (None, None))):
        with pytest.raises(InternalError, match="not carried out on a node"):
            await node.do(op, *inputs)
    with pytest.raises(RefNotFoundError):
        await node.do(DiffOp(), None, digest_of(b"unknown"))


async def test_mounts_of_killed_processes_are_undone(farm, kind):
    """Those of live ones, and those that others asked for, stay."""
    node = farm.node(kind)
    mine = f"op-{os.getpid()}-{Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19]}-abc-1"
    names = {mine, f"op-{os.getpid()}-1-abc-1", "op-4194305-1-abc-1", "look"}
    for name in names:
        node.snapshotter.mount(EMPTY_CHAIN, name)

    undone = node.performer.recover()

    assert set(undone) == names - {mine, "look"}
    assert set(node.snapshotter.mounts()) == {mine, "look"}
    for name in (mine, "look"):
        node.snapshotter.unmount(name)
