"""What every RefStore promises: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import pytest

from cluster import wire
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.errors import LeaseLostError, NonAddressableParentError, RefNotFoundError
from cluster.lease import LeaseId, blob_resource, image_resource, ref_resource
from cluster.origin import MAX_ORIGINS, OPEN
from cluster.provider import ProviderHandle
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord

L = LeaseId("build:1")
HERE = ProviderHandle(registry="registry.example", repository="team/app")
THERE = ProviderHandle(registry="127.0.0.1:5000", repository="mirror/app", plain_http=True)


def layer(name: str, **fields) -> Descriptor:
    """A gzip layer whose blob and diff ID follow from its name."""
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(f"blob {name}".encode()),
        size_bytes=len(name),
        diff_id=digest_of(f"diff {name}".encode()),
        **fields,
    )


def chain(*names: str, image_ref: str | None = None) -> list[RefRecord]:
    """The records of layers on top of each other, lowest first."""
    records: list[RefRecord] = []
    for name in names:
        records.append(RefRecord.over(layer(name), records[-1] if records else None, image_ref))
    return records


def image(name: str, *names: str) -> ImageRecord:
    """An image of the layers of that name."""
    records = chain(*names)
    return ImageRecord(
        name=name,
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(" ".join(names).encode()), size_bytes=5),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(b"config"), size_bytes=6),
        platform="linux/amd64",
        layers=tuple(record.blob for record in records),
        ref=records[-1].id if records else None,
    )


def present(name: str, nonce: str = "1") -> BlobRecord:
    """The record of that layer's blob as uploaded."""
    digest = layer(name).digest
    return BlobRecord(digest=digest, key=f"blobs/{digest}/{nonce}", size_bytes=len(name), etag='"e"', fence=1)


async def commit(stores, blob: BlobRecord) -> BlobRecord:
    """Make a blob present, in the only way there is; return it as committed."""
    owned = await stores.flights.join(f"blob:{blob.digest}", worker="w", token="t", ttl_s=60.0)
    blob = replace(blob, fence=owned.fence.number)
    await stores.flights.commit(owned.fence, blob)
    return blob


@pytest.fixture(autouse=True)
async def lease(stores):
    await stores.leases.create(L, ttl_s=60.0)


async def make(stores, records, providers=None):
    return await stores.refs.get_or_create(records, providers or {}, lease_id=L)


async def test_a_record_comes_back_as_it_was_made(stores):
    """All that a record says is kept; the store adds when it was created, by its own clock."""
    (record,) = chain("a", image_ref="docker.io/library/debian:12")
    record = replace(
        record, blob=replace(record.blob, annotations={"k": "ü"}, urls=("https://x.example/y",)), description="d"
    )

    (state,) = await make(stores, [record], {record.blob.digest: [HERE]})

    assert replace(state.record, created_wall_s=0.0) == record
    assert state.record.created_wall_s > 0
    assert state.is_lazy
    assert state.providers == (HERE,)
    assert await stores.refs.get([record.id]) == [state]


async def test_empty_fields_stay_what_they_are(stores):
    """No annotations, no URLs and no image refs come back as such, also after a merge."""
    (record,) = chain("a")
    await make(stores, [record])

    (state,) = await make(stores, [record])

    assert state.record.image_refs == ()
    assert state.record.blob == record.blob


async def test_image_refs_merge(stores):
    """Whoever makes the record again adds its image refs; none is lost, none doubled, the first creation stays."""
    (first,) = await make(stores, chain("a", image_ref="docker.io/library/b:1"))
    stores.pass_time(5)
    await make(stores, chain("a"))
    await make(stores, chain("a", image_ref="docker.io/library/a:1"))

    (state,) = await make(stores, chain("a", image_ref="docker.io/library/b:1"))

    assert state.record.image_refs == ("docker.io/library/a:1", "docker.io/library/b:1")
    assert state.record.created_wall_s == pytest.approx(first.record.created_wall_s)


async def test_providers_merge(stores):
    """Providers are added to what is known for a digest, never overwritten, and each is kept once."""
    (record,) = chain("a")
    digest = record.blob.digest
    await make(stores, [record], {digest: [HERE]})
    await make(stores, [record], {digest: [THERE, HERE]})
    await stores.refs.add_providers(digest, [replace(HERE, repository="pushed/app")])
    await stores.refs.add_providers(digest, [])

    (providers, none) = await stores.refs.providers([digest, digest_of(b"other")])

    assert set(providers) == {HERE, THERE, replace(HERE, repository="pushed/app")}
    assert none == ()


async def test_origins_merge(stores):
    """The newest first, each once, no more than are kept; what is open to all once stays so; a pull changes none."""
    (record,) = chain("a", image_ref="docker.io/library/a:1")

    async def kept(*origins):
        (state,) = await make(stores, [replace(record, origins=origins)])
        assert await stores.refs.chain(record.id) == [state]
        return state.record.origins

    assert await kept() == ()
    assert await kept("x") == ("x",)
    assert await kept("y", "x") == ("y", "x")
    assert await kept() == ("y", "x")
    many = tuple(f"n{n}" for n in range(MAX_ORIGINS - 1))
    assert await kept(*many) == (*many, "y")
    assert await kept("z", OPEN) == (OPEN,)
    assert await kept("x") == (OPEN,)
    (state,) = await stores.refs.get([record.id])
    assert replace(state.record, created_wall_s=0.0) == replace(record, origins=(OPEN,))


@pytest.mark.redis
async def test_a_record_of_an_earlier_release_gets_its_origins(redis_farm):
    """It was written without any: what else it says stays, and so does what yet another release wrote into it."""
    stores, link = redis_farm.stores(), redis_farm.links[0]
    await stores.leases.create(L, ttl_s=60.0)
    (record,) = chain("a", image_ref="docker.io/library/a:1")
    fields = msgspec.to_builtins(replace(record, created_wall_s=5.0, description="d"))
    del fields["origins"]
    first = {name: fields.pop(name) for name in ("image_refs", "created_wall_s", "description")}
    written = wire.encode("ref", first | fields | {"later": 1})
    await link.execute("SET", redis_farm.keys.ref(record.id), written)

    (before,) = await make(stores, [record])
    assert (before.record.origins, await link.execute("GET", redis_farm.keys.ref(record.id))) == ((), written)
    (after,) = await make(stores, [replace(record, origins=("x",))])

    assert after.record == replace(before.record, origins=("x",))
    assert after.record == replace(record, created_wall_s=5.0, description="d", origins=("x",))
    assert b"later" in await link.execute("GET", redis_farm.keys.ref(record.id))


async def test_two_callers_get_one_record(stores):
    """I4: many callers, each with a client of its own, make one record per blob chain ID."""
    others = [stores.other() for _ in range(4)]

    made = await asyncio.gather(
        *(
            other.refs.get_or_create(chain("a", "b", image_ref=f"r.example/x:{n}"), {}, lease_id=L)
            for n, other in enumerate(others)
        )
    )

    assert len({tuple(state.record.id for state in states) for states in made}) == 1
    assert len(await stores.refs.list_refs()) == 2
    (top,) = await stores.refs.get([chain("a", "b")[-1].id])
    assert top.record.image_refs == tuple(f"r.example/x:{n}" for n in range(4))


async def test_other_compression_is_another_record_of_one_chain(stores):
    """Equal diff IDs under different blobs share the chain ID, and are found by it."""
    (gzip,) = chain("a")
    zstd = RefRecord.over(replace(layer("a"), digest=digest_of(b"zstd")), None)
    await make(stores, [gzip, zstd])

    assert gzip.chain == zstd.chain
    assert await stores.refs.refs_of_chain(gzip.chain) == sorted([gzip.id, zstd.id])
    assert await stores.refs.refs_of_chain(digest_of(b"other")) == []


async def test_who_needs_a_chain_is_told_of_many_at_once(stores):
    """Every ref that has it, and every live lease that holds one of these, once; none where nothing is known."""
    (gzip,) = chain("a")
    zstd = RefRecord.over(replace(layer("a"), digest=digest_of(b"zstd")), None)
    below, top = chain("b", "c")
    await make(stores, [gzip, zstd])
    await make(stores, [below, top])
    other = LeaseId("build:2")
    await stores.leases.create(other, ttl_s=30.0)
    await stores.leases.attach(other, [ref_resource(zstd.id), ref_resource(top.id)])
    await stores.leases.delete(L)
    asked = [below.chain, gzip.chain, digest_of(b"other"), top.chain]

    uses = await stores.refs.uses_of_chains(asked)

    assert [use.refs for use in uses] == [(below.id,), tuple(sorted([gzip.id, zstd.id])), (), (top.id,)]
    assert [use.holders for use in uses] == [(), (other,), (), (other,)]
    stores.pass_time(31)
    assert [use.holders for use in await stores.refs.uses_of_chains(asked)] == [(), (), (), ()]
    assert await stores.refs.uses_of_chains([]) == []


async def test_two_chains_over_one_layer_are_two(stores):
    """A→B→C and A→D→C: C's layer is one blob, and two refs."""
    left, right = chain("a", "b", "c"), chain("a", "d", "c")
    await make(stores, left)
    await make(stores, right)

    assert left[2].blob == right[2].blob
    assert left[2].id != right[2].id
    assert [s.record.id for s in await stores.refs.chain(left[2].id)] == [r.id for r in left]
    assert [s.record.id for s in await stores.refs.chain(right[2].id)] == [r.id for r in right]


async def test_no_live_lease_no_ref(stores):
    """Without a live lease nothing is made, merged or marked."""
    (record,) = chain("a", image_ref="x.example/y:1")
    stores.pass_time(61)

    with pytest.raises(LeaseLostError):
        await make(stores, [record], {record.blob.digest: [HERE]})
    with pytest.raises(LeaseLostError):
        await stores.refs.use([], lease_id=L)

    assert await stores.refs.get([record.id]) == [None]
    assert await stores.refs.providers([record.blob.digest]) == [()]
    assert await stores.refs.list_refs() == []


async def test_an_unknown_parent_is_refused_whole(stores):
    """If any parent is neither stored nor earlier in the call, nothing of the call has happened."""
    a, b, c = chain("a", "b", "c")
    other = chain("other")[0]

    with pytest.raises(NonAddressableParentError, match=b.id):
        await make(stores, [other, a, c], {other.blob.digest: [HERE]})

    assert await stores.refs.list_refs() == []
    assert await stores.refs.providers([other.blob.digest]) == [()]
    assert (await stores.leases.get(L)).resources == ()


async def test_a_stored_parent_will_do(stores):
    """A child may come in a later call than its parent."""
    a, b = chain("a", "b")
    await make(stores, [a])

    (state,) = await make(stores, [b])

    assert state.record.parent == a.id


async def test_refs_are_attached_and_marked_used(stores):
    """Making, finding and using a ref holds it by the lease and counts, in the same step; looking doesn't."""
    a, b = chain("a", "b")
    await make(stores, [a, b])
    await stores.refs.use([a.id], lease_id=L)
    await stores.refs.get([a.id, b.id])

    assert (await stores.leases.get(L)).resources == tuple(sorted([ref_resource(a.id), ref_resource(b.id)]))
    assert (await stores.refs.usage(a.id)).usage_count == 2
    assert (await stores.refs.usage(b.id)).usage_count == 1
    assert (await stores.refs.usage(a.id)).last_used_wall_s >= (await stores.refs.usage(b.id)).last_used_wall_s


async def test_using_an_unknown_ref_changes_nothing(stores):
    """use() is all or nothing."""
    (a,) = chain("a")
    await make(stores, [a])

    with pytest.raises(RefNotFoundError, match="unknown"):
        await stores.refs.use([a.id, RefId("unknown")], lease_id=L)

    assert (await stores.refs.usage(a.id)).usage_count == 1
    with pytest.raises(RefNotFoundError):
        await stores.refs.usage(RefId("unknown"))


async def test_bulk_lookups_keep_the_order(stores):
    """get() answers in the order asked, None where there is none, for thousands at once."""
    records = [chain(str(number))[0] for number in range(1200)]
    await make(stores, records)
    asked = [record.id for record in reversed(records)]
    asked.insert(7, RefId("unknown"))

    states = await stores.refs.get(asked)

    assert states[7] is None
    assert [state.record.id for state in states if state] == [record.id for record in reversed(records)]
    assert await stores.refs.get([]) == []


async def test_a_chain_with_a_gap_is_not_found(stores):
    """chain() of an unknown ref names it."""
    with pytest.raises(RefNotFoundError, match="unknown"):
        await stores.refs.chain(RefId("unknown"))


async def test_refs_are_found_by_prefix(stores):
    """find() takes the start of an ID, with or without the algorithm, and returns 20 at most."""
    records = [chain(str(number))[0] for number in range(40)]
    await make(stores, records)
    wanted = records[0].id

    assert wanted in await stores.refs.find(wanted[:12])
    assert await stores.refs.find(wanted) == [wanted]
    assert await stores.refs.find(wanted.removeprefix("sha256:")) == [wanted]
    assert await stores.refs.find("not hex") == []
    assert len(await stores.refs.find("")) == 20


async def test_refs_are_listed_by_last_use(stores):
    """list_refs() starts with the most recently used."""
    a, b = chain("a")[0], chain("b")[0]
    await make(stores, [a])
    first = (await stores.refs.usage(a.id)).last_used_wall_s
    while True:  # the store's clock has a resolution of a millisecond
        await make(stores, [b])
        stores.pass_time(0.001)
        if (await stores.refs.usage(b.id)).last_used_wall_s > first:
            break

    assert await stores.refs.list_refs() == [b.id, a.id]


async def test_a_description_is_set_once(stores):
    """A ref says which image it was first pulled from; a later pull overwrites nothing, and its image ref is added."""
    (unnamed,), (first,), (second,) = (
        chain("a"),
        chain("a", image_ref="x.example/y:1"),
        chain("a", image_ref="x.example/y:2"),
    )
    await make(stores, [unnamed])
    await make(stores, [first])
    (state,) = await make(stores, [second])

    assert state.record.description == "pulled from x.example/y:1"
    assert state.record.image_refs == ("x.example/y:1", "x.example/y:2")
    assert state.record.blob == first.blob


async def test_a_present_blob_makes_every_ref_over_it_present(stores):
    """That a blob is present is one fact for all refs that have it, and shows at once."""
    left, right = chain("a", "c"), chain("b", "c")
    await make(stores, [*left, *right])
    blob = await commit(stores, present("c"))

    tops = await stores.refs.get([left[1].id, right[1].id])

    assert [state.present for state in tops] == [blob, blob]
    assert await stores.refs.blobs([blob.digest, layer("a").digest]) == [blob, None]
    assert await stores.refs.blobs([]) == []


async def test_blobs_that_are_present_are_held(stores):
    """In one step for each: what is returned is held, what isn't there is not; again is as good as once."""
    blob = await commit(stores, present("a"))
    absent = layer("b").digest

    assert await stores.refs.hold_blobs([absent, blob.digest], lease_id=L) == [None, blob]
    assert await stores.refs.hold_blobs([blob.digest], lease_id=L) == [blob]

    assert (await stores.leases.get(L)).resources == (blob_resource(blob.digest),)
    assert L in await stores.leases.holders(blob_resource(blob.digest))
    assert await stores.leases.holders(blob_resource(absent)) == []
    assert await stores.refs.hold_blobs([], lease_id=L) == []


async def test_no_blob_is_held_by_a_lease_that_is_not_live(stores):
    """Neither one that never was, nor one that has lapsed: whether the blob is there or not."""
    blob = await commit(stores, present("a"))
    await stores.leases.create(LeaseId("short"), ttl_s=5.0)
    stores.pass_time(6.0)

    for lease_id in (LeaseId("unknown"), LeaseId("short")):
        for digest in (blob.digest, layer("b").digest):
            with pytest.raises(LeaseLostError):
                await stores.refs.hold_blobs([digest], lease_id=lease_id)
        assert lease_id not in await stores.leases.holders(blob_resource(blob.digest))


async def test_a_lost_blob_turns_lazy(stores):
    """mark_absent() makes the blob lazy again; its record and its providers stay."""
    (a,) = await make(stores, chain("a"), {layer("a").digest: [HERE]})
    blob = await commit(stores, present("a"))

    assert await stores.refs.mark_absent(blob, "S3 has no such object")
    assert not await stores.refs.mark_absent(blob, "S3 has no such object")

    (state,) = await stores.refs.get([a.record.id])
    assert state.is_lazy
    assert state.providers == (HERE,)


async def test_only_the_upload_that_was_lost_is_absent(stores):
    """Who finds an old upload gone doesn't touch the one that has replaced it."""
    old = await commit(stores, present("a", "1"))
    await stores.refs.mark_absent(old, "gone")
    new = await commit(stores, present("a", "2"))

    assert not await stores.refs.mark_absent(old, "gone")
    assert await stores.refs.blobs([new.digest]) == [new]


async def test_an_image_is_found_by_name_digest_and_ref(stores):
    """put_image() records under all three and attaches to the lease."""
    debian = image("docker.io/library/debian:12", "a", "b")

    stored = await stores.refs.put_image(debian, lease_id=L)

    assert replace(stored, created_wall_s=0.0) == debian
    assert stored.created_wall_s > 0
    assert await stores.refs.image(debian.name) == stored
    assert await stores.refs.image(debian.manifest.digest) == stored
    assert await stores.refs.image_of_ref(debian.ref) == stored
    assert await stores.refs.image("docker.io/library/none:1") is None
    assert await stores.refs.image(digest_of(b"none")) is None
    assert await stores.refs.image_of_ref(RefId("none")) is None
    assert image_resource(debian.name) in (await stores.leases.get(L)).resources


async def test_a_moved_tag_names_the_new_image(stores):
    """A name resolved again names what it resolved to last; the earlier one is still there by digest."""
    old = await stores.refs.put_image(image("docker.io/library/debian:12", "a"), lease_id=L)
    new = await stores.refs.put_image(image("docker.io/library/debian:12", "b"), lease_id=L)
    alias = await stores.refs.put_image(image("docker.io/library/alias:1", "b"), lease_id=L)

    assert await stores.refs.image("docker.io/library/debian:12") == new
    assert await stores.refs.image(old.manifest.digest) == old
    assert await stores.refs.image_of_ref(new.ref) == alias
    assert await stores.refs.images() == [alias, new]


async def test_an_image_without_layers_has_no_ref(stores):
    """An image of no layers is recorded like any other."""
    stored = await stores.refs.put_image(image("docker.io/library/empty:1"), lease_id=L)

    assert stored.ref is None
    assert await stores.refs.image("docker.io/library/empty:1") == stored


async def test_no_live_lease_no_image(stores):
    """Without a live lease no image is recorded."""
    stores.pass_time(61)

    with pytest.raises(LeaseLostError):
        await stores.refs.put_image(image("docker.io/library/debian:12", "a"), lease_id=L)
    assert await stores.refs.images() == []
