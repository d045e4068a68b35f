"""What a farm holds, as it is at one moment: refs with who needs them, and what they take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cluster.collect.ports import Locals, LocalTree
from cluster.collect.values import Item, ItemKind
from cluster.digest import Digest
from cluster.lease import Lease, image_resource, object_resource, ref_resource, tree_resource
from cluster.ref import BlobRecord, ImageRecord, RefId, RefState, RefUsage

_IMAGE = "image "
_TREE = "local "


@dataclass(frozen=True, slots=True, kw_only=True)
class RefUse:
    """One ref, what it takes, and what keeps it."""

    id: RefId
    digest: Digest
    #: Bytes that its blob takes in the content store; 0: it is lazy.
    size_bytes: int
    #: Bytes that it does not take because it is lazy.
    avoided_bytes: int
    #: Another ref has the same blob, or several images the ref.
    is_shared: bool
    #: A live lease holds it, or something that stands on it.
    is_in_use: bool
    created_wall_s: float
    last_used_wall_s: float
    usage_count: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageUse:
    """One image, and what its layers take."""

    name: str
    ref: RefId | None
    #: Bytes of its layers in the content store, and how much of that no other image has.
    size_bytes: int
    exclusive_bytes: int
    #: Bytes of its lazy layers.
    avoided_bytes: int
    is_in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the content store is used for."""

    refs: tuple[RefUse, ...]
    images: tuple[ImageUse, ...]
    #: Bytes in all, each blob once, manifests and configs among them; and of that what nothing in use needs.
    total_bytes: int
    reclaimable_bytes: int
    #: Bytes of lazy blobs, each once.
    avoided_bytes: int
    #: Bytes of the directories that drivers sent, beside the total.
    local_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Something that keeps a ref: a lease on it, or on what stands on it."""

    lease: Lease
    #: What the lease holds: the ref itself, or one above it.
    ref: RefId
    #: The image, where it is held by that.
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Why a ref is kept."""

    ref: RefId
    holds: tuple[Hold, ...]
    #: Refs that stand on it directly.
    children: tuple[RefId, ...]


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Everything that collection looks at. Read piece by piece: what is removed is decided anew, by the store."""

    states: Mapping[RefId, RefState]
    usages: Mapping[RefId, RefUsage]
    #: By name; and by manifest, where a name stands for another one by now.
    images: Sequence[ImageRecord]
    resolved: Sequence[ImageRecord]
    leases: Sequence[Lease]
    blobs: Sequence[BlobRecord]
    local: Locals = field(default_factory=Locals)

    def images_of(self, ref_id: RefId) -> list[ImageRecord]:
        """Return the images whose top a ref is, also under manifests that no name stands for any more."""
        return self._tops.get(ref_id, [])

    def items(self) -> list[Item]:
        """Return what can be collected: refs, and images that stand on none."""
        held, shared = self._held(), self._shared()
        refs = [
            Item(
                id=ref_id,
                parents=() if state.record.parent is None else (state.record.parent,),
                size_bytes=0 if state.present is None else state.present.size_bytes,
                space=state.record.blob.digest,
                created_wall_s=state.record.created_wall_s,
                last_used_wall_s=self._used(ref_id).last_used_wall_s,
                usage_count=self._used(ref_id).usage_count,
                is_held=ref_id in held,
                is_shared=ref_id in shared,
                description=state.record.description,
            )
            for ref_id, state in self.states.items()
        ]
        return (
            refs
            + [
                Item(
                    id=_IMAGE + manifest,
                    size_bytes=0,
                    created_wall_s=min(image.created_wall_s for image in images),
                    last_used_wall_s=max(image.created_wall_s for image in images),
                    is_held=any(self._holders.get(image_resource(image.name)) for image in images),
                    description=", ".join(sorted({image.name for image in images})),
                )
                for manifest, images in self._without_ref.items()
            ]
            + self._local_items()
        )

    def _local_items(self) -> list[Item]:
        """Return drivers' directories, which take nothing themselves, and the objects that they stand on."""
        used: dict[str, float] = {}
        for tree in self.local.trees:
            for key in tree.objects:
                used[key] = max(tree.last_used_wall_s, used.get(key, 0.0))
        trees = [
            Item(
                id=_TREE + tree.digest,
                kind=ItemKind.LOCAL,
                parents=tuple(sorted(tree.objects)),
                size_bytes=0,
                created_wall_s=tree.last_used_wall_s,
                last_used_wall_s=tree.last_used_wall_s,
                is_held=tree.is_in_job or bool(self._holders.get(tree_resource(tree.digest))),
                description="a directory that a driver sent",
            )
            for tree in self.local.trees
        ]
        return trees + [
            Item(
                id=key,
                kind=ItemKind.LOCAL,
                size_bytes=size_bytes,
                created_wall_s=used.get(key, 0.0),
                last_used_wall_s=used.get(key, 0.0),
                is_held=bool(self._holders.get(object_resource(key))),
                description="files of directories that drivers sent",
            )
            for key, size_bytes in self.local.objects.items()
        ]

    def tree_of_item(self, item: Item) -> LocalTree | None:
        """Return the driver's directory that an item is; None where it is something else."""
        return self._trees.get(item.id)

    @cached_property
    def _trees(self) -> Mapping[str, LocalTree]:
        return {_TREE + tree.digest: tree for tree in self.local.trees}

    def images_of_item(self, item: Item) -> list[ImageRecord]:
        """Return the images, of one manifest, that an item is; none where it is a ref."""
        return self._without_ref.get(item.id.removeprefix(_IMAGE), []) if item.id.startswith(_IMAGE) else []

    @cached_property
    def _without_ref(self) -> dict[str, list[ImageRecord]]:
        """Return the images that stand on no ref, by manifest: they have no layers, or their top is gone."""
        found: dict[str, list[ImageRecord]] = defaultdict(list)
        for image in (*self.images, *self.resolved):
            if image.ref is None or image.ref not in self.states:
                found[image.manifest.digest].append(image)
        return found

    def orphans(self) -> list[Digest]:
        """Return the present blobs that no ref and no image has: they stay as long as a lease holds them."""
        needed = {state.record.blob.digest for state in self.states.values()}
        for image in (*self.images, *self.resolved):
            needed |= {image.manifest.digest, image.config.digest}
        return [blob.digest for blob in self.blobs if blob.digest not in needed]

    def documents_of(self, going: Sequence[Item]) -> list[Digest]:
        """Return the manifests and configs that go with items: of the images that are these, or whose top is one."""
        gone = {item.id for item in going}
        ending = [image for item in going for image in self.images_of_item(item)]
        ending += [image for ref_id, images in self._tops.items() if ref_id in gone for image in images]
        manifests = {image.manifest.digest for image in ending}
        staying = [image for image in (*self.images, *self.resolved) if image.manifest.digest not in manifests]
        needed = {image.config.digest for image in staying} | self._held_blobs()
        return sorted({d for image in ending for d in (image.manifest.digest, image.config.digest)} - needed)

    def size_of(self, digests: Iterable[Digest]) -> int:
        """Return the bytes that the present ones of some blobs take."""
        sizes = {blob.digest: blob.size_bytes for blob in self.blobs}
        return sum(sizes.get(digest, 0) for digest in digests)

    def usage(self) -> Usage:
        """Return what takes how much."""
        held, shared = self._held(), self._shared()
        refs = tuple(
            RefUse(
                id=ref_id,
                digest=state.record.blob.digest,
                size_bytes=0 if state.present is None else state.present.size_bytes,
                avoided_bytes=state.record.blob.size_bytes if state.present is None else 0,
                is_shared=ref_id in shared,
                is_in_use=ref_id in held,
                created_wall_s=state.record.created_wall_s,
                last_used_wall_s=self._used(ref_id).last_used_wall_s,
                usage_count=self._used(ref_id).usage_count,
                description=state.record.description,
            )
            for ref_id, state in self.states.items()
        )
        sizes = {blob.digest: blob.size_bytes for blob in self.blobs}
        needed = {use.digest for use in refs if use.is_in_use} | self._held_blobs()
        for image in (*self.images, *self.resolved):
            if image.ref in held or self._holders.get(image_resource(image.name)):
                needed |= {image.manifest.digest, image.config.digest}
        total = sum(sizes.values())
        return Usage(
            refs=refs,
            images=tuple(self._image_uses(held)),
            total_bytes=total,
            reclaimable_bytes=total - sum(size for digest, size in sizes.items() if digest in needed),
            avoided_bytes=sum({use.digest: use.avoided_bytes for use in refs}.values()),
            local_bytes=sum(self.local.objects.values()),
        )

    def kept(self, ref_id: RefId) -> Kept:
        """Return why a ref, which must be in the stock, is kept: leases on it and on all that stands on it."""
        holds: list[Hold] = []
        pending, seen = [ref_id], {ref_id}
        while pending:
            at = pending.pop(0)
            holds += [Hold(lease=lease, ref=at) for lease in self._holders.get(ref_resource(at), ())]
            for name in sorted({image.name for image in self.images_of(at)}):
                holds += [
                    Hold(lease=lease, ref=at, image=name) for lease in self._holders.get(image_resource(name), ())
                ]
            above = [child for child in self._children.get(at, ()) if child not in seen]
            seen.update(above)
            pending += above
        return Kept(ref=ref_id, holds=tuple(holds), children=tuple(sorted(self._children.get(ref_id, ()))))

    # -- what follows from it, worked out once --

    @cached_property
    def _holders(self) -> Mapping[str, list[Lease]]:
        """Leases by what they hold."""
        holders: dict[str, list[Lease]] = {}
        for lease in self.leases:
            for resource in lease.resources:
                holders.setdefault(resource, []).append(lease)
        return holders

    @cached_property
    def _children(self) -> Mapping[RefId, list[RefId]]:
        """Refs by what they stand on."""
        children: dict[RefId, list[RefId]] = {}
        for ref_id, state in self.states.items():
            if state.record.parent is not None:
                children.setdefault(state.record.parent, []).append(ref_id)
        return children

    @cached_property
    def _tops(self) -> Mapping[RefId, list[ImageRecord]]:
        """Images by their top, also under manifests that no name stands for any more."""
        tops: dict[RefId, list[ImageRecord]] = {}
        for image in (*self.images, *self.resolved):
            if image.ref is not None:
                tops.setdefault(image.ref, []).append(image)
        return tops

    def _used(self, ref_id: RefId) -> RefUsage:
        return self.usages.get(ref_id) or RefUsage(last_used_wall_s=0.0, usage_count=0)

    def _held(self) -> frozenset[RefId]:
        """Return the refs that leases hold, and all that these stand on."""
        direct = [ref_id for ref_id in self.states if self._holders.get(ref_resource(ref_id))]
        direct += [image.ref for image in self.images if image.ref and self._holders.get(image_resource(image.name))]
        held: set[RefId] = set()
        for top in direct:
            for below in self._chain(top):
                if below in held:
                    break
                held.add(below)
        return frozenset(held)

    def _held_blobs(self) -> set[Digest]:
        """Return the blobs that leases hold; those of images' documents don't count, as they go with the image."""
        return {
            Digest(resource.removeprefix("blob:"))
            for resource, leases in self._holders.items()
            if resource.startswith("blob:") and any(lease.labels.get("kind") != "image" for lease in leases)
        }

    def _shared(self) -> frozenset[RefId]:
        """Return the refs whose blob another ref has, and those that several images have."""
        blobs = Counter(state.record.blob.digest for state in self.states.values())
        images = Counter(
            below for top in {image.ref for image in self.images if image.ref} for below in self._chain(top)
        )
        return frozenset(
            ref_id for ref_id, state in self.states.items() if blobs[state.record.blob.digest] > 1 or images[ref_id] > 1
        )

    def _chain(self, top: RefId | None) -> Iterable[RefId]:
        while top is not None and (state := self.states.get(top)) is not None:
            yield top
            top = state.record.parent

    def _image_uses(self, held: frozenset[RefId]) -> Iterable[ImageUse]:
        chains = {image.name: list(self._chain(image.ref)) for image in self.images}
        digests = {
            name: {self.states[ref_id].record.blob.digest: self.states[ref_id] for ref_id in chain}
            for name, chain in chains.items()
        }
        # Names of one manifest are one image under several names.
        by_content: dict[Digest, set[Digest]] = defaultdict(set)
        for image in self.images:
            for digest in digests[image.name]:
                by_content[digest].add(image.manifest.digest)
        for image in self.images:
            layers = digests[image.name]
            sizes = {d: state.present.size_bytes for d, state in layers.items() if state.present is not None}
            yield ImageUse(
                name=image.name,
                ref=image.ref,
                size_bytes=sum(sizes.values()),
                exclusive_bytes=sum(size for digest, size in sizes.items() if len(by_content[digest]) == 1),
                avoided_bytes=sum(s.record.blob.size_bytes for s in layers.values() if s.present is None),
                is_in_use=image.ref in held or bool(self._holders.get(image_resource(image.name))),
            )
