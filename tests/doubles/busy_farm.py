"""A farm in Redis in which something of everything goes on, for commands that look at it."""

from __future__ import annotations

from pathlib import Path

from cluster.audit import AuditEntry, Operation
from cluster.config import RedisConfig
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, VertexLayers
from cluster.lease import LeaseId
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, RefRecord
from lazyfarm.graph import image
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from tests.doubles.stores import FarmOfRedis

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


async def busy_farm(config: RedisConfig, state_dir: Path) -> FarmOfRedis:
    """Make one with a chain of three layers: one present, one on its way for a job, one that nobody wants.

    It has, besides, ``top``, the chain's uppermost ref, ``fence`` of the flight, and ``vertex`` of the job ``j1``.
    """
    farm = FarmOfRedis(config, state_dir)
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
    return farm
