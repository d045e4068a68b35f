"""What drivers do with a farm's stores, for tests of what is collected of it."""

from __future__ import annotations

from cluster.collect.runner import Collector
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.lease import LeaseId, blob_resource
from cluster.ref import BlobRecord, ImageRecord, RefRecord

#: A driver's lease.
L = LeaseId("driver-1")
#: Seconds between the end of a blob and that of its object.
GRACE_S = 60.0


def layer(name, size=100):
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(name.encode()),
        size_bytes=size,
        diff_id=digest_of(b"tar of " + name.encode()),
    )


def chain(*names):
    records: list[RefRecord] = []
    for name in names:
        records.append(RefRecord.over(layer(name), records[-1] if records else None, "example/app:1"))
    return records


def image_of(name, *layers):
    records = chain(*layers)
    return ImageRecord(
        name=name,
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(f"manifest {layers}".encode()), size_bytes=5),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(f"config {layers}".encode()), size_bytes=6),
        platform="linux/amd64",
        layers=tuple(record.blob for record in records),
        ref=records[-1].id if records else None,
    )


class Bench:
    """The stores of one farm, and what drivers do with them."""

    def __init__(self, stores):
        self.stores = stores
        self.collector = Collector(refs=stores.refs, leases=stores.leases, store=stores.collect, grace_s=GRACE_S)
        self.deleted = []

    async def pull(self, name, *layers, lease=L):
        """Resolve an image under a lease, as pullers do."""
        await self.stores.leases.create(lease, ttl_s=600.0, labels={"owner": "driver"})
        image = image_of(name, *layers)
        if layers:
            await self.stores.refs.get_or_create(chain(*layers), {}, lease_id=lease)
        held = [blob_resource(image.manifest.digest), blob_resource(image.config.digest)]
        await self.stores.leases.attach(lease, held)
        for digest, size in ((image.manifest.digest, 5), (image.config.digest, 6)):
            await self.fetch(digest, size)
        record = await self.stores.refs.put_image(image, lease_id=lease)
        documents = LeaseId(f"image:{image.manifest.digest}")
        await self.stores.leases.create(documents, ttl_s=None, labels={"kind": "image"})
        await self.stores.leases.attach(documents, held)
        return record

    async def fetch(self, digest, size=100):
        """Make a blob present; only its flight's lease holds it then."""
        owned = await self.stores.flights.join(f"blob:{digest}", worker="w", token=digest[-8:], ttl_s=60.0)
        if hasattr(owned, "fence"):
            key = f"blobs/{digest}/{owned.fence.number}"
            blob = BlobRecord(digest=digest, key=key, size_bytes=size, etag="e", fence=owned.fence.number)
            await self.stores.flights.commit(owned.fence, blob)

    async def leave(self, lease=L):
        """End a driver, and the leases of flights."""
        await self.stores.leases.delete(lease)
        self.stores.pass_time(200.0)

    async def is_present(self, *digests):
        return [blob is not None for blob in await self.stores.refs.blobs(digests)]

    async def delete_due(self):
        async def delete(key):
            self.deleted.append(key)

        return await self.collector.delete_due(delete)
