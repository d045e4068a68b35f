"""A push of lazy layers over real stores and registries: fetched once, forwarded as they come, in each host's turn."""

from __future__ import annotations

import asyncio
import random
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from cluster.config import Config, RegistryConfig
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import DigestMismatchError
from cluster.fetch.access import AccessControl
from cluster.fetch.keep import Keeper
from cluster.fetch.push import Pusher
from cluster.fetch.runner import Caller
from cluster.lease import LeaseId
from cluster.provider import ProviderHandle
from cluster.ref import ImageRecord
from cluster.reference import parse_reference
from storage.blobs import S3ContentStore
from storage.bucket_caches import BucketCaches
from storage.fetching import StoredBlobs, ThreadedTransfers
from storage.limits import RedisHostLimiter
from storage.local_blobs import NodeBlobs
from storage.node_cache import NodeCache
from storage.registry.auth import CredentialAuthorizer
from storage.registry.blob import BlobSource
from storage.registry.client import RegistryClient
from storage.registry.credentials import CredentialSource
from storage.transfer import TransferLimits
from tests.doubles.registry import docker_registry
from tests.doubles.registry_faults import Hang, Lie, registry_fault_proxy
from tests.doubles.stores import eventually
from tests.doubles.unlazier import unlazier_over

pytestmark = [pytest.mark.redis, pytest.mark.s3, pytest.mark.registry]

MIB = 1024**2
LEASE = LeaseId("l1")
#: One request at a time for each host, and no longer wait for a turn than a test may take.
ALONE = Config(registries={"default": RegistryConfig(max_concurrency=1, timeout_s=10, attempts=3, retry_budget_s=60)})


class CountingStore(S3ContentStore):
    """A content store that tells which objects were read."""

    def __init__(self, config):
        super().__init__(config)
        self.read_keys = []

    def open(self, key, offset=0, length=None):
        self.read_keys.append(key)
        return super().open(key, offset, length)


def layer_of(seed, size=20 * MIB):
    data = random.Random(seed).randbytes(size)  # noqa: S311 - test data
    return data, Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar",
        digest=digest_of(data),
        size_bytes=size,
        diff_id=digest_of(data),
    )


class Node:
    """A fetch worker's parts."""

    def __init__(self, stack, redis_farm, s3_config, root, *, ranges=1):
        stores = redis_farm.stores()
        self.stores, loop = stores, asyncio.get_running_loop()
        limiter = RedisHostLimiter(redis_farm.links[-1], redis_farm.keys, ALONE)
        self.store = CountingStore(s3_config)
        stack.callback(self.store.close)
        threads = ThreadPoolExecutor(16)
        stack.callback(threads.shutdown)
        sources = BlobSource(ALONE)
        stack.callback(sources.close)
        renewer = stores.new_renewer()
        stack.callback(renewer.close)
        self.client = RegistryClient(ALONE, limiter=limiter)
        self.authorizer = CredentialAuthorizer(CredentialSource(None), ALONE, identity_key=b"key")
        access = AccessControl(stores.proofs, self.client, proof_ttl_s=100.0)
        cache = NodeCache(root, 10**9, headroom_bytes=0)
        blobs = NodeBlobs(cache, self.store, stores.refs, loop=loop, threads=threads, downloads=4)
        self.background = set()

        def new_token():
            return secrets.token_hex(8)

        transfers = ThreadedTransfers(
            store=self.store,
            flights=stores.flights,
            sources=sources,
            limiter=limiter,
            buckets=BucketCaches(self.store),
            blobs=blobs,
            threads=threads,
            limits=TransferLimits(
                part_bytes=5 * MIB,
                parallel_from_bytes=10 * MIB if ranges > 1 else 10**9,
                ranges=ranges,
                attempts=3,
                retry_budget_s=60,
            ),
            buffers=12,
        )
        self.unlazier = unlazier_over(
            stores,
            renewer,
            transfers,
            worker=new_token(),
            access=access,
            new_token=new_token,
            ttl_s=6.0,
            poll_s=0.5,
            deadline_s=90.0,
            max_transfers=4,
        )
        small = StoredBlobs(self.store)
        self.keeper = Keeper(
            worker=new_token(),
            leases=stores.leases,
            flights=stores.flights,
            renewer=renewer,
            small=small,
            new_token=new_token,
            flight_ttl_s=6.0,
        )
        self.pusher = Pusher(
            target=self.client,
            unlazier=self.unlazier,
            refs=stores.refs,
            blobs=small,
            arriving=blobs,
            progress=stores.progress,
            access=access,
            spawn=lambda work: self.background.add(asyncio.ensure_future(work)),
        )

    async def push(self, target, source, *layers):
        """Push an image of *layers*, which are at *source*, where none of them can be mounted."""
        await self.stores.leases.create(LEASE, ttl_s=None)
        config, manifest = b"{}", self.manifest(layers)
        await self.keeper.keep({digest_of(config): config, digest_of(manifest): manifest}, LEASE)
        image = ImageRecord(
            name="r.example/app:1",
            manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(manifest), size_bytes=len(manifest)),
            config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(config), size_bytes=len(config)),
            platform="linux/amd64",
            layers=layers,
            ref=None,
        )
        caller = Caller(
            authorizer=self.authorizer, lease_id=LEASE, providers={layer.digest: (source,) for layer in layers}
        )
        return await self.pusher.push(image, parse_reference(target), caller, {}, plain_http=False)

    @staticmethod
    def manifest(layers):
        described = ",".join(
            f'{{"mediaType":"{layer.media_type}","digest":"{layer.digest}","size":{layer.size_bytes}}}'
            for layer in layers
        )
        config = f'{{"mediaType":"{CONFIG_OCI}","digest":"{digest_of(b"{}")}","size":2}}'
        head = f'"schemaVersion":2,"mediaType":"{MANIFEST_OCI}"'
        return f'{{{head},"config":{config},"layers":[{described}]}}'.encode()

    async def close(self):
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.unlazier.aclose()
        await self.client.aclose()
        await self.authorizer.aclose()


@pytest.fixture
async def make_node(redis_farm, s3_config, tmp_path):
    nodes = []
    with ExitStack() as stack:

        def make(**more):
            nodes.append(Node(stack, redis_farm, s3_config, tmp_path / f"n{len(nodes)}", **more))
            return nodes[-1]

        yield make
        for node in nodes:
            await node.close()


async def test_each_byte_is_fetched_once_and_forwarded_as_it_comes(make_node, registry, registry_proxy):
    """The target has the first piece while the source still owes the rest; nothing is read back from S3."""
    node = make_node()
    data, layer = layer_of(secrets.randbits(64))
    registry.push_blob("forward/source", data)
    registry.forget()
    hang = Hang(after_bytes=12 * MIB)
    registry_proxy.script(hang)
    source = ProviderHandle(registry=registry_proxy.host, repository="forward/source")
    pushing = asyncio.create_task(node.push(f"{registry.host}/forward/once:1", source, layer))
    assert await asyncio.to_thread(hang.arrived.wait, 30)
    await eventually(lambda: registry.count("PATCH", "upload", 202) == 1)
    assert registry.call("HEAD", f"/v2/forward/once/blobs/{layer.digest}")[0] == 404
    hang.proceed.set()
    result = await pushing
    assert [(one.how, one.bytes) for one in result.layers] == [("uploaded", layer.size_bytes)]
    assert registry_proxy.blob_bytes == {layer.digest: layer.size_bytes}
    assert registry.call("GET", f"/v2/forward/once/blobs/{layer.digest}")[2] == data
    (blob,) = await node.stores.refs.blobs([layer.digest])
    assert blob.size_bytes == layer.size_bytes
    assert blob.key not in node.store.read_keys


@pytest.mark.parametrize("ranges", [1, 3])
async def test_within_one_host_with_one_request_at_a_time_a_push_ends(make_node, registry, ranges):
    """BuildKit's deadlock of push and fetch slots: the target's one slot is the source's too."""
    node = make_node(ranges=ranges)
    layers = []
    for _ in range(2):
        data, layer = layer_of(secrets.randbits(64))
        registry.push_blob("forward/here", data)
        layers.append(layer)
    source = ProviderHandle(registry=registry.host, repository="forward/here")
    async with asyncio.timeout(60):
        result = await node.push(f"{registry.host}/forward/there-{ranges}:1", source, *layers)
    assert [one.how for one in result.layers] == ["uploaded", "uploaded"]
    assert registry.count("PATCH", "upload", 202) >= len(layers)


async def test_two_pushes_that_cross_end(make_node, registry):
    """From A to B and from B to A, each host serving one request at a time: neither holds what the other waits for."""
    nodes = [make_node(), make_node()]
    with docker_registry() as other:
        hosts = [registry, other]
        pushes = []
        for number, node in enumerate(nodes):
            here, there = hosts[number], hosts[1 - number]
            layers = []
            for _ in range(2):
                data, layer = layer_of(secrets.randbits(64))
                here.push_blob("cross/source", data)
                layers.append(layer)
            source = ProviderHandle(registry=here.host, repository="cross/source")
            pushes.append(node.push(f"{there.host}/cross/target:1", source, *layers))
        async with asyncio.timeout(60):
            results = await asyncio.gather(*pushes)
    assert [[one.how for one in result.layers] for result in results] == [["uploaded"] * 2] * 2


async def test_wrong_bytes_never_become_a_blob_at_the_target(make_node, registry, registry_proxy):
    """The source lies: the push fails with that, and the target has dropped what it was sent."""
    node = make_node()
    data, layer = layer_of(secrets.randbits(64))
    registry.push_blob("forward/lies", data)
    source = ProviderHandle(registry=registry_proxy.host, repository="forward/lies")
    registry_proxy.script(Lie(), times=None)
    with registry_fault_proxy(registry.url) as target:
        with pytest.raises(DigestMismatchError):
            await node.push(f"{target.host}/forward/unspoilt:1", source, layer)
        asked = [seen.method for seen in target.seen]
    assert "PATCH" in asked
    assert "PUT" not in asked
    assert asked[-1] == "DELETE"
    assert registry.call("HEAD", f"/v2/forward/unspoilt/blobs/{layer.digest}")[0] == 404
