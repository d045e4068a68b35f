"""Caches in a real S3 bucket: copied there within S3, imported lazily, and fetched from there."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from cluster.cache_options import parse_cache_source, parse_cache_target
from cluster.digest import digest_of, hex_of
from cluster.errors import BlobNotFoundError, MalformedManifestError, NeedsRemoteProvidersError, UnsafeStoreError
from cluster.fetch.access import Wanted
from cluster.ref import BlobRecord
from cluster.remote_cache import ExportCandidate
from storage import blobs
from storage.blobs import S3ContentStore
from storage.bucket_caches import BucketCaches
from storage.fetching import _BucketSource
from storage.transfer import BlobTransfer, BufferPool, TransferLimits
from tests.doubles.fetch import FakeAuthorizer, FakeJournal, MemoryStaging, handle, layer_of
from tests.doubles.registry import random_image
from tests.doubles.remote_cache import CacheFarm, layers_of

pytestmark = pytest.mark.s3

K1, K2 = (digest_of(f"key {n}".encode()) for n in range(2))


@pytest.fixture
def store(s3_config):
    """A farm's content store."""
    s3 = S3ContentStore(s3_config)
    yield s3
    s3.close()


@pytest.fixture
def bucket(store):
    """Another bucket at the same endpoint, for caches."""
    other = store.in_bucket(f"caches-{uuid4().hex[:8]}")
    other.ensure_bucket()
    return other


@pytest.fixture(params=["another bucket", "the farm's own bucket"])
def place(request, store, bucket):
    """The part of an option that says which bucket."""
    name = bucket.bucket if request.param == "another bucket" else store.bucket
    return f"type=s3,bucket={name},prefix=team/a,name=main"


@pytest.fixture
async def farms(store):
    made = []

    def make():
        made.append(CacheFarm(store=store))
        return made[-1]

    yield make
    for farm in made:
        await farm.close()


def read(store, key, size):
    buffer = memoryview(bytearray(size + 1))
    filled = 0
    with store.open(key) as stream:
        while count := stream.readinto(buffer[filled:]):
            filled += count
    return bytes(buffer[:filled])


# -- copies ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_object_that_was_meant(store, bucket):
    """By its ETag: one that is gone, or another by now, is not copied."""
    info = store.put("blobs/a", b"bytes")
    bucket.copy_from(store.bucket, info, "p/a")
    assert read(bucket, "p/a", 5) == b"bytes"
    store.put("blobs/a", b"other bytes")
    for source in (info, replace(info, key="blobs/none")):
        with pytest.raises(BlobNotFoundError):
            bucket.copy_from(store.bucket, source, "p/b")
    assert bucket.head("p/b") is None


def test_an_object_too_large_for_one_copy_is_copied_in_parts(store, bucket, monkeypatch):
    """Whole, and nothing is left of an upload that fails."""
    monkeypatch.setattr(blobs, "_COPY_BYTES", 5 * 1024**2)
    monkeypatch.setattr(blobs, "_COPY_PART_BYTES", 5 * 1024**2)
    data = random_image(1, layers=1, layer_bytes=6 * 1024**2).layers[0].data
    info = store.put("blobs/a", data)
    bucket.copy_from(store.bucket, info, "p/a")
    assert read(bucket, "p/a", len(data)) == data
    store.put("blobs/a", b"other bytes")
    with pytest.raises(BlobNotFoundError):
        bucket.copy_from(store.bucket, info, "p/b")
    assert bucket.list_uploads("p/") == []


def test_a_bucket_that_isnt_there_is_said_to_be_missing(store):
    """And what to do; it isn't made, since anybody may name one."""
    info = store.put("blobs/a", b"bytes")
    with pytest.raises(UnsafeStoreError, match="no such bucket"):
        store.in_bucket(f"none-{uuid4().hex}").copy_from(store.bucket, info, "p/a")


async def test_a_document_is_read_up_to_a_size(store, bucket):
    """What is larger was not written by us, and would fill the memory."""
    caches, of = BucketCaches(store), handle(f"{bucket.bucket}/p", "s3")
    await caches.put_manifest(of, "main", b"x" * 600_000)
    assert await caches.read_manifest(of, "main", max_bytes=600_000) == b"x" * 600_000
    with pytest.raises(MalformedManifestError):
        await caches.read_manifest(of, "main", max_bytes=599_999)
    with pytest.raises(BlobNotFoundError):
        await caches.read_manifest(of, "other", max_bytes=10)
    await caches.put_blob(of, digest_of(b""), b"")
    assert await caches.read_blob(of, digest_of(b""), max_bytes=0) == b""


# -- export and import ----------------------------------------------------------------------------------------------


async def test_an_export_is_lazy_refs_in_another_farm(registry, farms, store, place):
    """Copied within S3, found again by manifest and config; a second export copies nothing."""
    image = random_image(201)
    registry.push("s3/app", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "s3/app", image)
    farm.keep(image, f"{registry.host}/s3/app")
    target = parse_cache_target(f"{place},mode=max")
    candidates = (
        ExportCandidate(keys=(K1,), ref=refs[0], config=b"{}"),
        ExportCandidate(keys=(K2,), ref=refs[2], is_target=True),
    )
    first = await farm.export(target, *candidates)
    assert [layer.how for layer in first.layers] == ["copied"] * 3
    second = await farm.export(target, *candidates)
    assert [layer.how for layer in second.layers] == ["exists"] * 3
    assert (second.digest, second.target) == (first.digest, target.bucket.url)

    there = store.in_bucket(target.bucket.bucket)
    for layer in image.layers:
        assert read(there, f"team/a/blobs/sha256/{hex_of(layer.digest)}", len(layer.data)) == layer.data
    registry.forget()
    found, warning = await farms().load(parse_cache_source(place))
    assert warning == ""
    assert [state.record.id for state in found[K2]] == refs
    assert all(state.is_lazy for states in found.values() for state in states)
    assert found[K1][0].providers == (target.bucket.handle,)
    assert registry.requests() == []


async def test_a_missing_cache_is_a_miss(farms, store, bucket):
    """No manifest, one whose config is gone, one that is none, no such bucket: a warning each."""
    text = f"type=s3,bucket={bucket.bucket},prefix=p,name=main"
    farm, source = farms(), parse_cache_source(text)
    assert (await farm.load(source))[1].startswith(f"nothing is cached in s3://{bucket.bucket}/p/manifests/main: ")
    await farm.export(parse_cache_target(text), ExportCandidate(keys=(K1,), ref=None, is_target=True))
    imported = await farm.importer.read(source, None, farm.authorizer)
    assert (len(imported.cache.entries), imported.warning) == (1, "")
    (config,) = bucket.objects("p/blobs/")
    bucket.delete(config.key)
    assert (await farm.load(source))[1]
    bucket.put("p/manifests/main", b"{")
    assert (await farm.load(source))[1]
    nowhere = parse_cache_source(f"type=s3,bucket=none-{uuid4().hex},prefix=p,name=main")
    assert "no such bucket" in (await farm.load(nowhere))[1]


async def test_an_object_lost_behind_our_back_is_fetched_again(registry, farms, store, bucket):
    """The blob is present, its object isn't: it turns lazy, and is fetched from its provider before it is copied."""
    image = random_image(202, layers=1)
    registry.push("s3/lost", "1", image)
    farm = farms()
    refs = await farm.pull(registry, "s3/lost", image)
    farm.keep(image, f"{registry.host}/s3/lost")
    store.delete(f"blobs/{image.layers[0].digest}")
    result = await farm.export(
        parse_cache_target(f"type=s3,bucket={bucket.bucket},prefix=p,name=main"),
        ExportCandidate(keys=(K1,), ref=refs[0], is_target=True),
    )
    assert len(farm.transfers.fetches) == 1
    # The double brings no bytes: lost a second time, it can't be had.
    assert (result.digest, result.left_out) == (None, 1)


# -- access, and bytes ----------------------------------------------------------------------------------------------


async def test_a_cache_in_a_bucket_is_open_to_who_names_it(farms, store, bucket):
    """The bucket is asked, as the farm: what is there is for everybody of the farm, what isn't for nobody."""
    there, elsewhere = layer_of(b"there"), layer_of(b"elsewhere")
    farm, of = farms(), handle(f"{bucket.bucket}/p", "s3")
    of = replace(of, kind="s3")
    await farm.buckets.put_blob(of, there.digest, b"there")
    usable = await farm.access.prove(FakeAuthorizer("bob"), [Wanted(blob=there, passed=(of,), came_from="elsewhere")])
    assert usable == {there.digest: (of,)}
    for wanted in (
        Wanted(blob=elsewhere, passed=(of,)),
        Wanted(blob=replace(there, size_bytes=9), passed=(replace(of, repository=f"{bucket.bucket}/q"),)),
    ):
        with pytest.raises(NeedsRemoteProvidersError):
            await farm.access.prove(FakeAuthorizer("eve"), [wanted])


async def test_a_forged_handle_never_reaches_the_farms_own_objects(farms, store):
    """Their keys have a nonce behind the digest, whatever bucket and prefix a caller makes up."""
    layer = layer_of(b"private")
    info = store.put(f"blobs/sha256/{hex_of(layer.digest)}/0123456789abcdef", b"private")
    blob = BlobRecord(
        digest=layer.digest, key=info.key, size_bytes=7, etag=info.etag, fence=1, source="private.example/app"
    )
    for prefix in ("", "/", "/blobs/sha256/..", "/."):
        forged = replace(handle(f"{store.bucket}{prefix}", "s3"), kind="s3")
        with pytest.raises(NeedsRemoteProvidersError):
            await farms().access.prove(
                FakeAuthorizer("eve"), [Wanted(blob=layer, passed=(forged,), came_from=blob.source)]
            )


def test_bytes_come_from_a_bucket_in_ranges(store, bucket):
    """Verified as a registry's are; the source is told as bucket and prefix."""
    image = random_image(203, layers=1, layer_bytes=7 * 1024**2)
    (layer,) = layers_of(image)
    data = image.layers[0].data
    of = replace(handle(f"{bucket.bucket}/p", "s3"), kind="s3")
    bucket.put(f"p/blobs/sha256/{hex_of(layer.digest)}", data)

    def transfer(layer):
        return BlobTransfer(
            layer,
            [_BucketSource(of, layer, BucketCaches(store))],
            store=store,
            pool=BufferPool(4, 5 * 1024**2),
            limits=TransferLimits(
                part_bytes=5 * 1024**2,
                whole_up_to_bytes=0,
                parallel_from_bytes=0,
                ranges=2,
                attempts=2,
                retry_budget_s=5.0,
            ),
            journal=FakeJournal(),
            new_key=lambda: f"blobs/{uuid4().hex}",
            new_staging=lambda: MemoryStaging(layer.size_bytes),
        )

    done = transfer(layer).run()
    assert (done.origin, done.bytes_fetched) == (f"s3/{bucket.bucket}/p", len(data))
    assert read(store, done.object.key, len(data)) == data
    with pytest.raises(BlobNotFoundError, match=f"s3/{bucket.bucket}/p"):
        transfer(layer_of(b"absent")).run()
