"""Collection under every order of calls: a machine with a model, and mutants that it must catch.

The machine runs on the fake and on the Lua scripts in a real Redis. The model is written against the invariants of the
design, not against either's code:

- I2: what is present has its object, whatever was deleted meanwhile;
- I3: what a live lease holds, and all that it stands on, loses neither record nor blob;
- I9: once nobody holds anything, collection leaves nothing.

A broken variant is run with the invariant that must catch it checked alone: it has to be caught by that.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from cluster.collect.policy import KeepPolicy
from cluster.collect.ports import Outcome
from cluster.collect.runner import Collector
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI, Descriptor
from cluster.digest import digest_of
from cluster.flight.values import Owned
from cluster.lease import LeaseId, blob_resource
from cluster.ref import BlobRecord, ImageRecord, RefId, RefRecord
from storage.memory_collect import MemoryCollectStore
from tests.doubles.machines import MemoryWorld, RedisWorld, StoreMachine, assert_caught, break_scripts, run_machine
from tests.doubles.redis import redis_binaries

ALL = frozenset({"I2", "I3", "I9"})
LEASES = st.sampled_from((LeaseId("a"), LeaseId("b")))
NAMES = st.sampled_from(("example/one:1", "example/two:1"))
#: Two chains share their base, and a third one a blob with it.
CHAINS = (("base", "one"), ("base", "two"), ("two", "base"), ())
CHAIN = st.sampled_from(CHAINS)
LAYER = st.sampled_from(("base", "one", "two"))
GRACE_S = 500.0


def layer(name):
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(name.encode()),
        size_bytes=10,
        diff_id=digest_of(b"tar " + name.encode()),
    )


def records_of(chain):
    records: list[RefRecord] = []
    for name in chain:
        records.append(RefRecord.over(layer(name), records[-1] if records else None))
    return records


def image_of(name, chain):
    records = records_of(chain)
    return ImageRecord(
        name=name,
        manifest=Descriptor(media_type=MANIFEST_OCI, digest=digest_of(f"manifest {chain}".encode()), size_bytes=5),
        config=Descriptor(media_type=CONFIG_OCI, digest=digest_of(f"config {chain}".encode()), size_bytes=6),
        platform="linux/amd64",
        layers=tuple(record.blob for record in records),
        ref=records[-1].id if records else None,
    )


RECORDS = {record.id: record for chain in CHAINS for record in records_of(chain)}


class LoopedMemoryWorld(MemoryWorld):
    """The fakes, driven by an event loop: a collector's removals overlap."""

    def __init__(self, **fakes):
        super().__init__(**fakes)
        self.runner = asyncio.Runner()

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def close(self):
        self.runner.close()


class CollectMachine(StoreMachine):
    """Makes, fetches, holds, lets go of and collects what a few drivers have in common."""

    checked = ALL

    def __init__(self):
        super().__init__()
        self.stores = self.world
        #: Lease to when it ends; what it was given.
        self.expires: dict[LeaseId, float] = {}
        self.given: dict[LeaseId, set[RefId]] = {}
        #: Objects in the content store, by key; blobs that were present, by digest, to when their flight's lease ends.
        self.objects: set[str] = set()
        self.uploads = 0
        #: Blobs that were so when last looked at.
        self.present_and_held: set[str] = set()
        self.collector = Collector(
            refs=self.world.refs, leases=self.world.leases, store=self.world.collect, grace_s=GRACE_S
        )

    def is_live(self, lease_id):
        return self.expires.get(lease_id, 0.0) > self.now_s

    def held(self):
        """Return the refs that live leases hold, and those that these stand on, each with its blob."""
        held = {}
        for lease_id, given in self.given.items():
            for top in given if self.is_live(lease_id) else ():
                below = top
                while below is not None:
                    held[below] = RECORDS[below].blob.digest
                    below = RECORDS[below].parent
        return held

    # -- rules ----------------------------------------------------------------------------------------

    @initialize(chain=st.sampled_from(CHAINS[:3]), handed_on=st.booleans())
    def begin(self, chain, handed_on):
        """A farm in use: one driver pulled an image; or another one took it over, and holds its top alone."""
        self.pull(LeaseId("a"), chain, "example/one:1")
        if handed_on:
            self.use(LeaseId("b"), chain)
            self.leave(LeaseId("a"))

    @rule(lease_id=LEASES, chain=CHAIN, name=NAMES)
    def pull(self, lease_id, chain, name):
        """A driver resolves an image: refs, documents, and the image under its name."""
        self.hold(lease_id)
        records = records_of(chain)
        if records:
            self.world.run(self.stores.refs.get_or_create(records, {}, lease_id=lease_id))
            self.given[lease_id].update(record.id for record in records)
        image = image_of(name, chain)
        held = [blob_resource(image.manifest.digest), blob_resource(image.config.digest)]
        self.world.run(self.stores.leases.attach(lease_id, held))
        self.world.run(self.stores.refs.put_image(image, lease_id=lease_id))
        documents = LeaseId(f"image:{image.manifest.digest}")
        self.world.run(self.stores.leases.create(documents, ttl_s=None, labels={"kind": "image"}))
        self.world.run(self.stores.leases.attach(documents, held))

    @rule(lease_id=LEASES, chain=st.sampled_from(CHAINS[:3]))
    def use(self, lease_id, chain):
        """A driver looks the top of a chain up, if it is there: that alone is what its lease holds of the chain."""
        top = records_of(chain)[-1].id
        (state,) = self.world.run(self.stores.refs.get([top]))
        if state is not None:
            self.hold(lease_id)
            self.world.run(self.stores.refs.use([top], lease_id=lease_id))
            self.given[lease_id].add(top)

    def hold(self, lease_id):
        """Make a driver's lease, or renew it."""
        self.world.run(self.stores.leases.create(lease_id, ttl_s=1000.0))
        if not self.is_live(lease_id):
            self.given[lease_id] = set()
        self.expires[lease_id] = self.now_s + 1000.0

    @rule(name=LAYER)
    def fetch(self, name):
        """A layer's blob is fetched, under a key of this upload's own."""
        digest = layer(name).digest
        self.uploads += 1
        flights = self.stores.flights
        owned = self.world.run(flights.join(f"blob:{digest}", worker="w", token=f"t{self.uploads}", ttl_s=50.0))
        if isinstance(owned, Owned):
            key = f"blobs/{name}/{self.uploads}"
            self.objects.add(key)
            fence = owned.fence
            blob = BlobRecord(digest=digest, key=key, size_bytes=10, etag="e", fence=fence.number)
            self.world.run(flights.commit(fence, blob))

    @rule(lease_id=LEASES)
    def leave(self, lease_id):
        """A driver leaves."""
        self.world.run(self.stores.leases.delete(lease_id))
        self.expires.pop(lease_id, None)

    @rule(seconds=st.sampled_from([10.0, 130.0, 600.0, 1001.0]))
    def pass_time(self, seconds):
        """Time passes: leases lapse, objects become due."""
        self.world.pass_time(seconds)
        self.now_s += seconds

    @rule(chain=st.sampled_from(CHAINS[:3]), depth=st.sampled_from([0, 1]), knows=st.booleans())
    def remove(self, chain, depth, knows):
        """A collector whose plan is old, or wrong, ends any ref, whether or not it knows of its images."""
        record = records_of(chain)[depth]
        images = [image_of(name, chain) for name in ("example/one:1", "example/two:1")] if knows and depth else []
        removal = self.world.run(self.stores.collect.remove_ref(record.id, images, grace_s=GRACE_S))
        self.expect(
            "I3", removal.outcome is not Outcome.REMOVED or record.id not in self.held(), f"{record.id} is held"
        )

    @rule(name=LAYER)
    def condemn(self, name):
        """A collector ends any blob."""
        digest = layer(name).digest
        self.world.run(self.stores.collect.condemn([digest], grace_s=GRACE_S))

    @rule()
    def prune(self):
        """A collector takes all that it may."""
        self.world.run(self.collector.prune(KeepPolicy(includes_shared=True)))

    @rule()
    def delete_due(self):
        """A collector deletes the objects whose time has come."""

        async def delete(key):
            self.objects.discard(key)

        self.world.run(self.collector.delete_due(delete))

    # -- invariants -----------------------------------------------------------------------------------

    @invariant()
    def what_is_held_is_there(self):
        """Every record that a live lease holds, and all that it stands on; with its blob, if that has been there."""
        held = self.held()
        states = self.world.run(self.stores.refs.get(list(held)))
        for ref_id, state in zip(held, states, strict=True):
            self.expect("I3", state is not None, f"{ref_id} is held, and gone")
        blobs = self.world.run(self.stores.refs.blobs(list(held.values())))
        present = {blob.digest for blob in blobs if blob is not None}
        lost = self.present_and_held & set(held.values()) - present
        self.expect("I3", not lost, f"{lost} were present and held, and are gone")
        self.present_and_held = present

    @invariant()
    def what_is_present_has_its_object(self):
        """A record never names an object that is deleted."""
        digests = [layer(name).digest for name in ("base", "one", "two")]
        for blob in self.world.run(self.stores.refs.blobs(digests)):
            self.expect("I2", blob is None or blob.key in self.objects, f"{blob} is present, and its object gone")

    def teardown(self):
        try:
            if "I9" in self.checked:
                self.end()
        finally:
            super().teardown()

    def end(self):
        """Let everybody leave, and collect: nothing is left."""
        for lease_id in ("a", "b"):
            self.leave(LeaseId(lease_id))
        self.pass_time(200.0)
        self.prune()
        self.pass_time(GRACE_S + 1)
        self.delete_due()
        self.expect("I9", not self.world.run(self.stores.refs.list_refs()), "refs are left")
        self.expect("I9", not self.world.run(self.stores.refs.images()), "images are left")
        self.expect("I9", not self.world.run(self.stores.collect.resolved()), "manifests are left")
        self.expect("I9", not self.world.run(self.stores.collect.blobs()), "blobs are left")
        self.expect("I9", not self.world.run(self.stores.leases.leases()), "leases are left")
        self.expect("I9", not self.objects, f"objects are left: {self.objects}")


class PinMachine(CollectMachine):
    """Pins blobs besides. The mutants' machine does not: with more to choose from it finds them later."""

    def __init__(self):
        super().__init__()
        #: Lease to the blobs that it was told to hold.
        self.pinned: dict[LeaseId, set[str]] = {}

    def hold(self, lease_id):
        if not self.is_live(lease_id):
            self.pinned[lease_id] = set()
        super().hold(lease_id)

    @rule(lease_id=LEASES, names=st.sets(LAYER, min_size=1))
    def pin(self, lease_id, names):
        """A driver holds those of some blobs that are present, whatever refs there are."""
        self.hold(lease_id)
        digests = [layer(name).digest for name in sorted(names)]
        found = self.world.run(self.stores.refs.hold_blobs(digests, lease_id=lease_id))
        self.pinned[lease_id].update(blob.digest for blob in found if blob is not None)

    @invariant()
    def what_is_pinned_is_present(self):
        """Whether or not there is a ref of it."""
        pinned = [digest for lease_id, pinned in self.pinned.items() if self.is_live(lease_id) for digest in pinned]
        for digest, blob in zip(pinned, self.world.run(self.stores.refs.blobs(pinned)), strict=True):
            self.expect("I3", blob is not None, f"{digest} is pinned, and gone")


def test_the_fake_keeps_the_invariants():
    """No order of calls on the fake breaks an invariant."""
    run_machine(PinMachine.on(LoopedMemoryWorld), examples=100, steps=20)


@pytest.mark.redis
@pytest.mark.parametrize("version", ["redis7", "redis6.2"])
def test_the_scripts_keep_the_invariants(redis_servers, version):
    """No order of calls on the Lua scripts breaks an invariant."""
    run_machine(PinMachine.on(partial(RedisWorld, redis_servers(version).config)), examples=30, steps=20)


# -- mutants of the fake ----------------------------------------------------------------------------------


class IgnoresHolders(MemoryCollectStore):
    def _is_held(self, resource):
        return False


class IgnoresChildren(MemoryCollectStore):
    def _is_stood_on(self, ref_id):
        return False


class IgnoresUsers(MemoryCollectStore):
    def _is_used(self, digest):
        return False


class DeletesWhatIsPresent(MemoryCollectStore):
    def _condemn(self, digest, grace_s):
        blob = self._memory.blobs.get(digest)
        freed = super()._condemn(digest, grace_s)
        if freed is not None:
            self._memory.blobs[digest] = blob
        return freed

    async def due(self, most):
        return [doomed for doomed, at_s in self._memory.deleting.items() if at_s <= self._memory.now_s()][:most]


class ForgetsObjects(MemoryCollectStore):
    def _condemn(self, digest, grace_s):
        freed = super()._condemn(digest, grace_s)
        self._memory.deleting.clear()
        return freed


class KeepsDocuments(MemoryCollectStore):
    def _release(self, image, grace_s):
        return 0


MUTANTS = {
    IgnoresHolders: "I3",
    IgnoresChildren: "I3",
    IgnoresUsers: "I3",
    DeletesWhatIsPresent: "I2",
    ForgetsObjects: "I9",
    KeepsDocuments: "I9",
}


@pytest.mark.parametrize(("mutant", "name"), MUTANTS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_fake_is_caught(mutant, name):
    """Each broken variant of the fake breaks the invariant that it is named for, and the machine sees it."""
    machine = CollectMachine.on(partial(LoopedMemoryWorld, collect=mutant))

    assert_caught(machine, name, examples=1000, steps=25)


# -- mutants of the scripts ------------------------------------------------------------------------------

#: (script or all, what is replaced, by what, the invariant that must catch it).
SCRIPT_MUTANTS = [
    ("ref_remove", "if held then", "if false then", "I3"),
    ("ref_remove", "if names_a_ref(prefix, children_key(prefix, id)) then", "if false then", "I3"),
    ("*", " or names_a_ref(prefix, users_key(prefix, digest))", "", "I3"),
    ("*", "redis.call('ZADD', prefix .. ':deleting',", "redis.call('ZADD', prefix .. ':else',", "I9"),
    ("*", "redis.call('DEL', blob, prefix .. ':holders:blob:' .. digest)", "", "I9"),
    ("*", "lease_drop(prefix, 'image:' .. manifest)", "", "I9"),
]


@pytest.mark.redis
@pytest.mark.parametrize("mutant", SCRIPT_MUTANTS, ids=lambda mutant: f"{mutant[0]}-{mutant[3]}-{mutant[1][:20]}")
def test_a_broken_script_is_caught(monkeypatch, redis_servers, mutant):
    """Each broken variant of the scripts breaks the invariant that it is named for, and the machine sees it."""
    where, sound, broken, name = mutant
    broken_scripts = break_scripts(monkeypatch, where, sound, broken)
    machine = CollectMachine.on(partial(RedisWorld, redis_servers(next(iter(redis_binaries()))).config))

    assert_caught(machine, name, examples=1000, steps=25)
    assert broken_scripts


@pytest.mark.redis
def test_a_hold_that_holds_nothing_is_caught(monkeypatch, redis_servers):
    """What is told to be present, and isn't pinned, is collected under who counts on it."""
    broken_scripts = break_scripts(monkeypatch, "blobs_hold", "lease_hold(prefix, id, 'blob:' .. ARGV[i])", "")
    machine = PinMachine.on(partial(RedisWorld, redis_servers(next(iter(redis_binaries()))).config))

    assert_caught(machine, "I3", examples=1000, steps=25)
    assert broken_scripts
