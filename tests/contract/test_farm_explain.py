"""``lazyfarm explain`` over a real Redis."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import RefNotFoundError
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, VertexLayers
from cluster.lease import LeaseId
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
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
    await stores.refs.get_or_create(records, {}, lease_id=lease)
    farm.top = records[-1].id
    own = {"worker": "n0/a", "token": "t", "ttl_s": 600.0}
    owned = await stores.flights.join(f"blob:{PRESENT.digest}", **own)
    blob = BlobRecord(digest=PRESENT.digest, key="k", size_bytes=100, etag="e", fence=owned.fence.number)
    await stores.flights.commit(owned.fence, blob)
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
