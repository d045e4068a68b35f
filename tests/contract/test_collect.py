"""What every CollectStore promises, and the collector over it: memory, Redis 7 and Redis 6.2 alike."""

from __future__ import annotations

import asyncio

import pytest

from cluster.collect.filters import parse_filter
from cluster.collect.policy import KeepPolicy
from cluster.collect.ports import Doomed, Outcome, Removal
from cluster.digest import digest_of
from cluster.errors import InternalError, RefNotFoundError, UnavailableError
from cluster.faultpoints import FaultPlan, armed
from cluster.fetch.keep import Keeper
from cluster.lease import LeaseId, blob_resource, image_resource
from cluster.ref import RefId
from storage.faults import ProcessFaults
from tests.doubles.collect import GRACE_S, Bench, L, chain, layer

M = LeaseId("driver-2")
ALL = KeepPolicy(includes_shared=True)


@pytest.fixture
def bench(stores):
    return Bench(stores)


async def test_what_a_lease_holds_stays_with_all_that_it_stands_on(bench):
    """A ref that is held, the refs below it and their blobs: no prune takes them, whatever it may take."""
    await bench.pull("example/app:1", "a", "b")
    await bench.fetch(layer("a").digest)
    bench.stores.pass_time(200.0)
    assert (await bench.collector.prune(ALL)).items == ()
    top, bottom = chain("a", "b")[1].id, chain("a", "b")[0].id
    assert await bench.stores.collect.remove_ref(top, [], grace_s=1) == Removal(Outcome.HELD)
    await bench.stores.leases.create(M, ttl_s=600.0)
    await bench.stores.refs.use([top], lease_id=M)
    await bench.leave()
    assert await bench.stores.collect.remove_ref(bottom, [], grace_s=1) == Removal(Outcome.STOOD_ON)
    assert (await bench.collector.prune(ALL)).items == ()
    assert await bench.is_present(layer("a").digest) == [True]


async def test_what_nobody_holds_goes_to_zero(bench):
    """Refs, images, documents, blobs and, after the grace, objects: nothing is left, and nothing before the grace."""
    image = await bench.pull("example/app:1", "a", "b", "c")
    await bench.pull("example/empty:1")
    for name in ("a", "c"):
        await bench.fetch(layer(name).digest)
    await bench.leave()

    pruned = await bench.collector.prune(ALL)

    assert {item.id for item in pruned.items if item.size_bytes or item.parents} <= {r.id for r in chain("a", "b", "c")}
    assert pruned.freed_bytes == 200 + 2 * 11
    assert pruned.kept == 0
    refs = bench.stores.refs
    assert await refs.list_refs() == await refs.images() == await bench.stores.collect.resolved() == []
    assert await refs.image(image.manifest.digest) is None
    assert await refs.image_of_ref(image.ref) is None
    assert await bench.stores.leases.leases() == await bench.stores.collect.blobs() == []
    assert await bench.delete_due() == 0
    assert await bench.stores.collect.doomed() == 6
    bench.stores.pass_time(GRACE_S + 1)
    assert await bench.delete_due() == 6
    assert len(set(bench.deleted)) == 6
    assert await bench.stores.collect.doomed() == 0


async def test_a_dry_run_says_what_would_go_and_takes_nothing(bench):
    await bench.pull("example/app:1", "a", "b")
    await bench.fetch(layer("a").digest)
    await bench.fetch(digest_of(b"nobody's"), 7)
    await bench.leave()
    told = await bench.collector.prune(ALL, is_dry_run=True)
    assert (told.is_dry_run, told.freed_bytes) == (True, 118)
    assert len(await bench.stores.refs.list_refs()) == 2
    pruned = await bench.collector.prune(ALL)
    assert pruned.items == told.items
    assert pruned.freed_bytes == 118


async def test_a_blob_goes_with_the_last_ref_that_uses_it(bench):
    """Two chains over one blob: the first one's end frees nothing."""
    await bench.pull("example/one:1", "a", lease=L)
    await bench.pull("example/two:1", "b", "a", lease=M)
    await bench.fetch(layer("a").digest)
    await bench.leave(L)
    usage = await bench.collector.usage()
    assert {use.id: use.is_shared for use in usage.refs}[chain("a")[0].id]
    assert (await bench.collector.prune(ALL)).freed_bytes == 11, "one's documents"
    assert await bench.is_present(layer("a").digest) == [True]
    await bench.leave(M)
    assert (await bench.collector.prune(ALL)).freed_bytes == 111
    assert await bench.is_present(layer("a").digest) == [False]


async def test_what_comes_back_while_its_object_is_to_be_deleted_is_another_object(bench):
    """A collected blob is fetched anew at once, and the late delete takes the old object only."""
    await bench.pull("example/app:1", "a")
    await bench.fetch(layer("a").digest)
    await bench.leave()
    await bench.collector.prune(ALL)
    await bench.pull("example/app:1", "a")
    assert await bench.is_present(layer("a").digest) == [False], "lazy again"
    await bench.fetch(layer("a").digest)
    (blob,) = await bench.stores.refs.blobs([layer("a").digest])
    bench.stores.pass_time(GRACE_S + 1)
    await bench.delete_due()
    assert blob.key not in bench.deleted
    assert any(layer("a").digest in key for key in bench.deleted)
    assert await bench.is_present(layer("a").digest) == [True]


async def test_an_object_that_a_record_names_again_is_not_deleted(bench):
    """As after a fail-over that lost the end of a blob, but not that its object was to be deleted."""
    digest = layer("a").digest
    await bench.fetch(digest)
    (blob,) = await bench.stores.refs.blobs([digest])
    bench.stores.pass_time(200.0)
    await bench.stores.collect.condemn([digest], grace_s=0)
    owned = await bench.stores.flights.join(f"blob:{digest}", worker="w", token="t", ttl_s=60.0)
    await bench.stores.flights.commit(owned.fence, blob)
    assert await bench.delete_due() == 0
    assert await bench.stores.collect.doomed() == 0


@pytest.mark.parametrize("what", ["lease on the ref", "child", "lease on the image"])
async def test_what_is_taken_up_between_look_and_removal_stays(bench, what):
    """The plan is old by then; the store decides."""
    image = await bench.pull("example/app:1", "a", "b")
    await bench.leave()
    stock = await bench.collector.stock()
    await bench.stores.leases.create(M, ttl_s=600.0)
    if what == "lease on the ref":
        await bench.stores.refs.use([image.ref], lease_id=M)
    elif what == "child":
        await bench.stores.refs.get_or_create(chain("a", "b", "c"), {}, lease_id=M)
        await bench.stores.leases.delete(M)
    else:
        await bench.stores.leases.attach(M, [image_resource(image.name)])
    removal = await bench.stores.collect.remove_ref(image.ref, stock.images_of(image.ref), grace_s=1)
    assert removal.outcome is (Outcome.STOOD_ON if what == "child" else Outcome.HELD)
    assert await bench.stores.refs.image("example/app:1") == image


async def test_a_just_committed_blob_stays_until_who_waited_has_it(bench):
    """Its flight's lease holds it; a lease that pins it holds it on."""
    digest = digest_of(b"built")
    await bench.fetch(digest)
    assert await bench.stores.collect.condemn([digest], grace_s=1) == [None]
    await bench.stores.leases.create(L, ttl_s=600.0)
    await bench.stores.leases.attach(L, [blob_resource(digest)])
    bench.stores.pass_time(200.0)
    assert (await bench.collector.prune(ALL)).freed_bytes == 0
    await bench.stores.leases.delete(L)
    assert (await bench.collector.prune(ALL)).freed_bytes == 100


async def test_a_tag_that_moved_on_leaves_its_old_image_to_the_old_ref(bench):
    """The name stands for the new image, and the end of the old one's ref takes the old one's documents only."""
    old = await bench.pull("example/app:1", "a")
    new = await bench.pull("example/app:1", "b", lease=M)
    await bench.leave(L)
    pruned = await bench.collector.prune(ALL)
    assert [item.id for item in pruned.items] == [old.ref]
    assert pruned.freed_bytes == 11
    assert await bench.stores.refs.image("example/app:1") == new
    assert await bench.is_present(new.manifest.digest, old.manifest.digest) == [True, False]


async def test_two_names_of_one_image_go_together(bench):
    await bench.pull("example/app:1", "a")
    await bench.pull("example/app:2", "a")
    await bench.leave()
    assert (await bench.collector.prune(ALL)).freed_bytes == 11
    assert await bench.stores.refs.images() == []


async def test_an_image_whose_ref_is_gone_goes_too(bench):
    """As a crash leaves it, or a name that came between look and removal."""
    image = await bench.pull("example/app:1", "a")
    await bench.leave()
    assert (await bench.stores.collect.remove_ref(image.ref, [], grace_s=1)).outcome is Outcome.REMOVED
    assert await bench.stores.refs.images() == [image]
    assert (await bench.collector.prune(ALL)).freed_bytes == 11
    assert await bench.stores.refs.images() == await bench.stores.collect.resolved() == []


async def test_policies_choose_by_use_size_and_filter(bench):
    """Least recently used first, until the limit is kept; what a filter doesn't name stays."""
    for name in ("a", "b", "c"):
        await bench.pull(f"example/{name}:1", name)
        await bench.fetch(layer(name).digest)
        await asyncio.sleep(0.002)  # Redis tells last uses in milliseconds
        bench.stores.pass_time(0.1)
    await bench.leave()
    only = KeepPolicy(includes_shared=True, filters=(parse_filter(f"id=={chain('b')[0].id}"),))
    assert [item.id for item in (await bench.collector.prune(only, is_dry_run=True)).items] == [chain("b")[0].id]
    capped = KeepPolicy(includes_shared=True, max_used_bytes=100)
    assert [i.id for i in (await bench.collector.prune(capped)).items] == [chain("a")[0].id, chain("b")[0].id]
    assert (await bench.collector.prune(capped)).items == ()
    lately = KeepPolicy(includes_shared=True, keep_duration_s=1e6)
    assert (await bench.collector.prune(lately)).items == ()


async def test_usage_tells_lazy_shared_and_reclaimable(bench):
    """Lazy layers take nothing and are told as avoided; what two images have is exclusive to neither."""
    await bench.pull("example/one:1", "base", "one", lease=L)
    await bench.pull("example/two:1", "base", "two", lease=M)
    for name in ("base", "two"):
        await bench.fetch(layer(name).digest)
    await bench.leave(M)
    usage = await bench.collector.usage()
    images = {use.name: (use.size_bytes, use.exclusive_bytes, use.avoided_bytes, use.is_in_use) for use in usage.images}
    assert images == {"example/one:1": (100, 0, 100, True), "example/two:1": (200, 100, 0, False)}
    assert (usage.total_bytes, usage.avoided_bytes) == (200 + 22, 100)
    assert usage.reclaimable_bytes == 100 + 11
    in_use = {use.id for use in usage.refs if use.is_in_use}
    assert in_use == {record.id for record in chain("base", "one")}


async def test_why_a_ref_is_kept_is_told(bench):
    """The leases on it, on what stands on it, and on its image; nothing where it is not."""
    image = await bench.pull("example/app:1", "a", "b")
    bottom = chain("a")[0].id
    kept = await bench.collector.kept(bottom)
    assert kept.children == (image.ref,)
    assert {(hold.lease.id, hold.ref, hold.image) for hold in kept.holds} == {
        (L, bottom, ""),
        (L, image.ref, ""),
        (L, image.ref, "example/app:1"),
    }
    await bench.leave()
    assert (await bench.collector.kept(image.ref)).holds == ()
    with pytest.raises(RefNotFoundError):
        await bench.collector.kept(RefId(digest_of(b"nothing")))


@pytest.mark.parametrize("point", ["collect.planned", "collect.removed", "collect.object-deleted"])
async def test_a_collection_that_is_cut_short_is_finished_by_the_next(bench, point):
    """Nothing is half gone: the next collection, and the next deletion, take the rest."""
    await bench.pull("example/app:1", "a", "b", "c")
    for name in ("a", "b", "c"):
        await bench.fetch(layer(name).digest)
    await bench.leave()

    async def collect():
        await bench.collector.prune(ALL)
        bench.stores.pass_time(GRACE_S + 1)
        await bench.delete_due()

    with (
        armed(FaultPlan.parse(f"{point}@1=error:InternalError"), ProcessFaults()),
        pytest.raises(InternalError, match=point),
    ):
        await collect()
    await collect()
    assert await bench.stores.collect.doomed() == 0
    assert len(set(bench.deleted)) == 5
    assert await bench.stores.refs.list_refs() == await bench.stores.leases.leases() == []


async def test_one_object_that_can_not_be_deleted_stops_no_other(bench):
    """It is told, and comes again in a while; where none can be deleted nobody tries them all."""
    for name in ("a", "b", "c"):
        await bench.fetch(layer(name).digest)
    bench.stores.pass_time(200.0)
    await bench.collector.prune(ALL)
    bench.stores.pass_time(GRACE_S + 1)
    asked = []

    async def delete(key):
        asked.append(key)
        if key == asked[0]:
            raise UnavailableError("s3", "not that one")

    with pytest.raises(UnavailableError, match="not that one"):
        await bench.collector.delete_due(delete)
    assert (len(asked), await bench.stores.collect.doomed()) == (3, 1)
    assert await bench.delete_due() == 0, "not at once"
    bench.stores.pass_time(61)
    assert await bench.delete_due() == 1


async def test_a_filter_is_about_items_and_takes_no_loose_blob(bench):
    await bench.fetch(digest_of(b"nobody's"))
    bench.stores.pass_time(200.0)
    chosen = KeepPolicy(includes_shared=True, filters=(parse_filter("type==regular"),))
    assert (await bench.collector.prune(chosen)).freed_bytes == 0
    assert (await bench.collector.prune(ALL)).freed_bytes == 100


async def test_no_collection_comes_between_an_images_record_and_what_holds_its_documents(bench):
    """The keeper holds them when the image is recorded and held, so nothing ends that hold under it."""
    image = await bench.pull("example/app:1", "a")
    real = bench.stores.leases

    class Between:
        """Prunes after each step."""

        async def create(self, *args, **options):
            made = await real.create(*args, **options)
            await bench.collector.prune(ALL)
            return made

        async def attach(self, *args):
            await real.attach(*args)
            await bench.collector.prune(ALL)

    keeper = Keeper(
        worker="w",
        leases=Between(),
        flights=bench.stores.flights,
        renewer=None,
        small=None,
        new_token=None,
        flight_ttl_s=6,
    )
    await keeper.hold_for_image(image.manifest.digest, image.config.digest, name=image.name)
    bench.stores.pass_time(200.0)
    await bench.collector.prune(ALL)
    assert await bench.is_present(image.manifest.digest, image.config.digest) == [True, True]


async def test_a_turn_is_one_processs_at_a_time(bench):
    async with bench.stores.collect.turn("collect") as mine, bench.stores.other().collect.turn("collect") as theirs:
        assert (mine, theirs) == (True, False)
        async with bench.stores.collect.turn("sweep") as other_work:
            assert other_work

    async with bench.stores.collect.turn("collect") as mine:
        assert mine, "it was given back"


async def test_doomed_objects_are_told_by_digest_and_key(bench):
    await bench.fetch(layer("a").digest)
    bench.stores.pass_time(200.0)
    assert await bench.stores.collect.condemn([layer("a").digest, layer("b").digest], grace_s=0) == [100, None]
    (doomed,) = await bench.stores.collect.due(10)
    assert doomed == Doomed(layer("a").digest, doomed.key)
    assert doomed.key.startswith(f"blobs/{layer('a').digest}/")


async def test_thousands_of_refs_are_looked_at_and_pruned(bench):
    """In bulk: the look is a handful of commands, and the removals overlap."""
    await bench.stores.leases.create(L, ttl_s=600.0)
    for start in range(0, 2000, 500):
        records = [chain(f"{start + n}")[0] for n in range(500)]
        await bench.stores.refs.get_or_create(records, {}, lease_id=L)
    await bench.leave()
    pruned = await bench.collector.prune(ALL)
    assert len(pruned.items) == 2000
    assert await bench.stores.refs.list_refs() == []
