"""``lazyfarm explain`` over a real Redis."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from cluster.audit import AuditEntry, Operation
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import RefNotFoundError
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, VertexLayers
from cluster.lease import LeaseId
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, RefRecord
from lazyfarm.cli.main import app
from lazyfarm.explain import LayerWait, Waiting, open_explain
from lazyfarm.graph import image
from lazyfarm.settings import load_settings
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

pytestmark = pytest.mark.redis

PRESENT, FLYING, LAZY = (
    Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(name),
        size_bytes=100,
        diff_id=digest_of(b"tar of " + name),
    )
    for name in (b"present", b"flying", b"lazy")
)
NAME = "docker.io/library/debian:12"
GONE = digest_of(b"gone")


@pytest.fixture
async def farm(redis_servers, tmp_path):
    """A farm with a chain of three layers: one present, one on its way for a job, one that nobody wants."""
    farm = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    stores = farm.stores()
    lease = LeaseId("driver-1")
    await stores.leases.create(lease, ttl_s=600.0)
    records: list[RefRecord] = []
    for layer in (PRESENT, FLYING, LAZY):
        records.append(RefRecord.over(layer, records[-1] if records else None, NAME))
    known = {LAZY.digest: [ProviderHandle(registry="r.example", repository="debian")]}
    await stores.refs.get_or_create(records, known, lease_id=lease)
    farm.top = records[-1].id
    own = {"worker": "n0/a", "token": "t", "ttl_s": 600.0}
    owned = await stores.flights.join(f"blob:{PRESENT.digest}", **own)
    blob = BlobRecord(
        digest=PRESENT.digest, key="k", size_bytes=100, etag="e", fence=owned.fence.number, source="r.example/debian"
    )
    await stores.flights.commit(owned.fence, blob)
    fetched = AuditEntry(
        operation=Operation.FETCH, outcome="committed", who="d1", credential="alice", by="n0/a", digest=PRESENT.digest,
        source="mirror.example/debian", size_bytes=100, moved_bytes=100, seconds=2.0, fence=owned.fence.number,
    )  # fmt: skip
    stores.audit.note(
        AuditEntry(operation=Operation.PULL, who="d1", image=NAME, ref=records[-1].id),
        AuditEntry(operation=Operation.PULL, image="docker.io/library/other:1", ref="sha256:other"),
        fetched,
        AuditEntry(operation=Operation.UNLAZY, outcome="fetched", who="d1", digest=PRESENT.digest),
        AuditEntry(operation=Operation.UNLAZY, outcome="joined", who="s-j1", job="j1", digest=PRESENT.digest),
        AuditEntry(operation=Operation.DELETE, digest=GONE, source="blobs/gone"),
    )
    farm.fence = (await stores.flights.join(f"blob:{FLYING.digest}", **own)).fence
    await stores.flights.join(f"blob:{FLYING.digest}", worker="n1/b", token="u", ttl_s=600.0)
    await stores.flights.report(farm.fence, 20, 100)
    definition = image(NAME).definition()
    (farm.vertex,) = definition.targets
    payload = encode_definition(definition)
    spec = JobSpec(
        id=JobId("j1"), definition=digest_of(payload), targets=(farm.vertex,), session=SessionInfo(session_id="s")
    )
    await RedisJobStore(farm.links[0], farm.keys).submit(spec, payload)
    item = ProgressItem(item=f"fetch:{FLYING.digest}", phase=LayerPhase.FETCHING, current_bytes=20, total_bytes=100)
    await RedisJobEvents(farm.links[0], farm.keys).publish(spec.id, [VertexLayers(vertex=farm.vertex, item=item)])
    yield farm
    await farm.close()


async def test_a_chain_is_explained_layer_by_layer(farm):
    """Who fetches a layer, how fast, who waits, for which job; what is present or lazy waits for nobody."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:

        async def goes_on():
            await asyncio.sleep(0.05)
            await farm.stores().flights.report(farm.fence, 60, 100)

        (present, flying, lazy), _ = await asyncio.gather(explain.wait(farm.top[:20], watch_s=0.5), goes_on())
    assert present == LayerWait(digest=PRESENT.digest, state="present", current_bytes=100, total_bytes=100)
    assert lazy == LayerWait(digest=LAZY.digest, state="lazy")
    assert (flying.state, flying.owner, flying.waiters) == ("fetching", "n0/a", 1)
    assert (flying.current_bytes, flying.total_bytes, flying.rate, flying.left_s) == (60, 100, 80.0, 0.5)
    assert 500 < flying.lease_left_s <= 600
    assert flying.asked_by == (Waiting(job=JobId("j1"), vertex=farm.vertex),)


async def test_a_blob_is_named_by_its_digest(farm):
    """Present or on its way; a digest that nobody knows is no ref either."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:
        (flying,) = await explain.wait(FLYING.digest, watch_s=0.01)
        assert (flying.state, flying.rate, flying.left_s) == ("fetching", 0.0, None)
        assert [layer.state for layer in await explain.wait(PRESENT.digest)] == ["present"]
        with pytest.raises(RefNotFoundError):
            await explain.wait(digest_of(b"nothing"))


def test_the_command_tells_it(farm):
    """One line a layer, and who asked below; the same as JSON."""
    words = ["explain", "wait", farm.top, "--state-dir", str(farm.state_dir)]
    said = CliRunner().invoke(app, words).stdout.splitlines()
    assert "present, 100 B: waits for nothing" in said[0]
    assert "fetching by n0/a, 20 B of 100 B, nothing came while this looked, 1 worker waiting" in said[1]
    assert said[2].endswith("of job j1")
    assert "nobody fetches it" in said[3]
    layers = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["layers"]
    assert [(layer["state"], layer["owner"]) for layer in layers] == [
        ("present", None),
        ("fetching", "n0/a"),
        ("lazy", None),
    ]


async def test_how_a_chain_was_pulled_is_told_layer_by_layer(farm):
    """Who pulled it; who needed each layer, who brought it and from where; where a lazy one would come from."""
    async with open_explain(load_settings(farm.state_dir, None, {})) as explain:
        story = await explain.pull(farm.top, watch_s=0.01)
        (lazy,) = (await explain.pull(LAZY.digest, watch_s=0.01)).layers
        (gone,) = (await explain.pull(GONE, watch_s=0.01)).layers
        with pytest.raises(RefNotFoundError):
            await explain.pull(digest_of(b"nothing"))
    assert [(entry.who, entry.image) for entry in story.pulls] == [("d1", NAME)]
    present, flying, last = story.layers
    assert (present.wait.state, present.came_from) == ("present", "r.example/debian")
    assert [(entry.outcome, entry.who) for entry in present.asked] == [("fetched", "d1"), ("joined", "s-j1")]
    assert [(e.source, e.rate, e.fence) for e in present.attempts] == [("mirror.example/debian", 50.0, present.fence)]
    assert (flying.wait.owner, flying.entries) == ("n0/a", ())
    assert last == lazy
    assert (lazy.wait.state, lazy.providers, lazy.entries) == ("lazy", ("r.example/debian",), ())
    assert (gone.wait.state, [entry.operation for entry in gone.others]) == ("gone", ["delete"])


def test_the_command_tells_how_it_was_pulled(farm):
    """A line a layer, and below it what was noted; the same as JSON; an unknown digest is a typed error."""
    words = ["explain", "pull", farm.top, "--state-dir", str(farm.state_dir)]
    said = CliRunner().invoke(app, words).stdout.splitlines()
    assert f"pull ok ref {farm.top[:19]} {NAME} for driver d1" in said[0]
    assert "present, 100 B, from r.example/debian, in 2.00 s (50 B/s), 1 of 2 callers joined" in said[1]
    assert (
        "fetch committed 100 B from mirror.example/debian in 2.00 s (50 B/s) for driver d1 as alice by n0/a" in said[2]
    )
    assert "unlazy joined for job j1" in said[4]
    assert "fetching by n0/a" in said[5]
    assert said[6].endswith("lazy: nobody has needed its bytes; it would come from r.example/debian")
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [layer["state"] for layer in document["layers"]] == ["present", "fetching", "lazy"]
    assert document["layers"][0]["attempts"][0]["credential"] == "alice"
    unknown = CliRunner().invoke(app, ["explain", "pull", digest_of(b"no"), "--json", *words[-2:]])
    assert (unknown.exit_code, json.loads(unknown.stdout)["error"]["type"]) == (1, "RefNotFoundError")


def test_the_audit_stream_is_exported_as_json_lines(farm):
    """One object an entry, oldest first; of one job or digest alone, or one operation; in words without --json."""
    words = ["audit", "--state-dir", str(farm.state_dir)]

    def lines(*more):
        return [json.loads(line) for line in CliRunner().invoke(app, [*words, "--json", *more]).stdout.splitlines()]

    everything = lines("--since", "1h")
    assert [entry["operation"] for entry in everything] == ["pull", "pull", "fetch", "unlazy", "unlazy", "delete"]
    assert [entry["time"] for entry in everything] == sorted(entry["time"] for entry in everything)
    assert [entry["outcome"] for entry in lines("--job", "j1")] == ["joined"]
    assert lines("--digest", GONE[:20]) == everything[-1:]
    assert lines("--operation", "fetch") == everything[2:3]
    assert CliRunner().invoke(app, [*words, "--digest", GONE]).stdout.strip().endswith("from blobs/gone by tests")
    wrong = CliRunner().invoke(app, [*words, "--operation", "fly"])
    assert (wrong.exit_code, wrong.stdout) == (1, "")
