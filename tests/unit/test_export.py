"""Export: whole or not at all, every digest checked, and nothing written where it was not meant to be."""

import asyncio
import io
import json
import tarfile
import threading
from contextlib import contextmanager

import pytest

from cluster.assemble import assemble_image
from cluster.descriptor import Descriptor
from cluster.digest import digest_of, hex_of
from cluster.errors import BlobDamagedError, BlobNotFoundError, ExportError, UnavailableError
from cluster.progress import LayerPhase
from cluster.ref import BlobRecord, ImageRecord, RefRecord, RefState
from cluster.reference import Platform
from lazyfarm.export import Exporter
from lazyfarm.outputs import STDOUT, Output, OutputKind
from storage.memory import Memory, MemoryRefStore
from storage.memory_blobs import MemoryContentStore
from tests.doubles import layers
from tests.doubles.layers import directory, file, hard_link, opaque, sketch, symlink, whiteout
from tests.doubles.stores import FakeClock

NAME = "r.example/app:1"
LOWER = layers.layer(
    directory("bin", 0o755), file("bin/tool", b"tool"), file("etc/old", b"old"), file("etc/kept", b"kept")
)
UPPER = layers.layer(
    whiteout("etc/old"), file("etc/new", b"new"), symlink("link", "bin/tool"), hard_link("bin/same", "bin/tool")
)
FILES = {
    "bin": "directory",
    "bin/tool": b"tool",
    "bin/same": b"tool",
    "etc": "directory",
    "etc/kept": b"kept",
    "etc/new": b"new",
    "link": "-> bin/tool",
}


class SlowStore(MemoryContentStore):
    """A content store whose reads of one object wait."""

    def __init__(self):
        super().__init__()
        self.slow_key = None
        self.arrived, self.proceed = threading.Event(), threading.Event()

    @contextmanager
    def open(self, key, offset=0, length=None):
        if key == self.slow_key:
            self.arrived.set()
            self.proceed.wait(10)
        with super().open(key, offset, length) as stream:
            yield stream


class Bench:
    """A content store with images."""

    def __init__(self):
        self.memory, self.store = Memory(FakeClock()), SlowStore()
        self.refs = MemoryRefStore(self.memory)
        self.exporter = Exporter(self.store, self.refs)
        self.items = []

    def put(self, data):
        digest = digest_of(data)
        info = self.store.put(f"k/{digest}", data)
        self.memory.blobs[digest] = BlobRecord(
            digest=digest, key=info.key, size_bytes=len(data), etag=info.etag, fence=1
        )
        return digest

    def image(self, *made, name=NAME):
        states, top = [], None
        for layer in made:
            self.put(layer.blob)
            top = RefRecord.over(layer.descriptor, top)
            states.append(RefState(record=top, present=None, providers=()))
        image = assemble_image(name, states, b"", created_s=1, platform=Platform(os="linux", architecture="amd64"))
        self.put(image.manifest_bytes)
        self.put(image.config_bytes)
        return ImageRecord(
            name=name,
            manifest=image.manifest,
            config=image.config,
            platform=str(image.platform),
            layers=image.layers,
            ref=None,
        )

    def spoil(self, digest, data):
        self.store.put(f"k/{digest}", data)

    async def export(self, image, kind, dest="", **more):
        names = more.pop("names", ())
        await self.exporter.export(
            image, Output(kind=kind, dest=str(dest), names=names), progress=self.items.append, **more
        )

    def ends(self):
        """Return how each blob's item ended; none may move after its end."""
        ended = {}
        for item in self.items:
            assert item.item not in ended, "an item moved after its end"
            if item.phase.is_end:
                ended[item.item.removeprefix("export:")] = item.phase
        return ended


@pytest.fixture
def bench():
    return Bench()


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def names_of(root):
    index = json.loads((root / "index.json").read_bytes())
    return [
        (entry.get("annotations", {}).get("org.opencontainers.image.ref.name"), entry["digest"])
        for entry in index["manifests"]
    ]


# -- layouts -------------------------------------------------------------------------------------------------


async def test_a_layout_has_the_images_blobs_and_names_it(bench, tmp_path):
    """Each blob under its digest, the tag as image-spec says; nothing else is left there."""
    image = bench.image(LOWER, UPPER, LOWER)
    await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path / "new/layout")
    root = tmp_path / "new/layout"
    digests = {LOWER.descriptor.digest, UPPER.descriptor.digest, image.config.digest, image.manifest.digest}
    assert listing(root) == sorted(["index.json", "oci-layout", *(f"blobs/sha256/{hex_of(d)}" for d in digests)])
    assert all(digest_of((root / "blobs/sha256" / hex_of(d)).read_bytes()) == d for d in digests)
    assert names_of(root) == [("1", image.manifest.digest)]
    assert bench.ends() == dict.fromkeys(digests, LayerPhase.DONE)


async def test_a_layout_keeps_its_other_images(bench, tmp_path):
    """One of the same name is replaced; blobs that are there and right are not read again, others are made right."""
    first, second = bench.image(LOWER), bench.image(UPPER)
    await bench.export(first, OutputKind.OCI_LAYOUT, tmp_path, names=("r.example/a:1", "r.example/b:2"))
    (tmp_path / "blobs/sha256" / hex_of(first.config.digest)).write_bytes(b"x" * first.config.size_bytes)
    bench.items.clear()
    await bench.export(first, OutputKind.OCI_LAYOUT, tmp_path, names=("r.example/a:1",))
    assert bench.ends()[LOWER.descriptor.digest] is LayerPhase.PRESENT
    assert bench.ends()[first.config.digest] is LayerPhase.DONE
    await bench.export(second, OutputKind.OCI_LAYOUT, tmp_path, names=("r.example/a:1",))
    assert names_of(tmp_path) == [("2", first.manifest.digest), ("1", second.manifest.digest)]


async def test_a_damaged_blob_leaves_the_layout_as_it_was(bench, tmp_path):
    """The index comes last, no partial blob is left, and the blob is lazy from now on."""
    image = bench.image(LOWER, UPPER)
    bench.spoil(UPPER.descriptor.digest, b"x" * len(UPPER.blob))
    with pytest.raises(BlobDamagedError):
        await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path)
    assert not (tmp_path / "index.json").exists()
    assert not (tmp_path / "blobs/sha256" / hex_of(UPPER.descriptor.digest)).exists()
    assert not list(tmp_path.rglob(".*"))
    assert await bench.refs.blobs([UPPER.descriptor.digest]) == [None]
    assert bench.ends()[UPPER.descriptor.digest] is LayerPhase.FAILED


async def test_an_object_that_is_gone_turns_its_blob_lazy(bench, tmp_path):
    """The record was wrong; the next unlazy fetches it."""
    image = bench.image(LOWER)
    bench.store.delete(f"k/{LOWER.descriptor.digest}")
    with pytest.raises(BlobDamagedError):
        await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path)
    assert await bench.refs.blobs([LOWER.descriptor.digest]) == [None]


async def test_what_is_lazy_is_named_before_anything_is_written(bench, tmp_path):
    """The caller makes layers present first."""
    image = bench.image(LOWER)
    del bench.memory.blobs[LOWER.descriptor.digest]
    with pytest.raises(BlobNotFoundError) as caught:
        await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path / "out")
    assert caught.value.digest == LOWER.descriptor.digest
    assert not (tmp_path / "out").exists()


async def test_a_foreign_layer_is_left_out_where_the_farm_lacks_it(bench, tmp_path):
    """Non-distributable: the manifest says where to get it. Its files can't be had without it."""
    foreign = Descriptor(
        media_type="application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        digest=digest_of(b"windows"),
        size_bytes=7,
        diff_id=digest_of(b"diff"),
        urls=("https://x.example/windows",),
    )
    image = bench.image(LOWER)
    image = ImageRecord(
        name=NAME,
        manifest=image.manifest,
        config=image.config,
        platform=image.platform,
        layers=(*image.layers, foreign),
        ref=None,
    )
    await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path / "layout")
    with pytest.raises(BlobNotFoundError):
        await bench.export(image, OutputKind.LOCAL, tmp_path / "files")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"manifests": 5}'])
async def test_what_is_no_index_is_not_overwritten(bench, tmp_path, content):
    """Whatever it is, somebody wrote it."""
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ExportError):
        await bench.export(bench.image(LOWER), OutputKind.OCI_LAYOUT, tmp_path)
    assert (tmp_path / "index.json").read_bytes() == content


# -- archives ------------------------------------------------------------------------------------------------


async def test_an_archive_is_a_layout_in_a_tar(bench, tmp_path):
    """The same image gives the same file, or stream; the index is its last entry."""
    image = bench.image(LOWER, UPPER)
    out = io.BytesIO()
    await bench.export(image, OutputKind.OCI_ARCHIVE, tmp_path / "new/a.tar")
    bench.items.clear()
    await bench.export(image, OutputKind.OCI_ARCHIVE, STDOUT, stdout=out)
    assert (tmp_path / "new/a.tar").read_bytes() == out.getvalue()
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        entries = tar.getnames()
        assert (entries[0], entries[-1]) == ("oci-layout", "index.json")
        blob = tar.extractfile(f"blobs/sha256/{hex_of(UPPER.descriptor.digest)}").read()
    assert blob == UPPER.blob
    assert listing(tmp_path / "new") == ["a.tar"]


@pytest.mark.parametrize("kind", [OutputKind.OCI_ARCHIVE, OutputKind.TAR])
async def test_a_file_is_there_whole_or_as_it_was(bench, tmp_path, kind):
    """Damaged on the way: no partial file, and the one of before is untouched."""
    (tmp_path / "a.tar").write_bytes(b"before")
    image = bench.image(LOWER, UPPER)
    bench.spoil(UPPER.descriptor.digest, b"x" * len(UPPER.blob))
    with pytest.raises(BlobDamagedError if kind is OutputKind.OCI_ARCHIVE else Exception):
        await bench.export(image, kind, tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"before"


async def test_a_destination_that_refuses_is_named(bench, tmp_path):
    """A directory where a file should be, a file on the way to one, and no standard output."""
    image = bench.image(LOWER)
    (tmp_path / "file").write_bytes(b"")
    for kind, dest in (
        (OutputKind.OCI_ARCHIVE, tmp_path),
        (OutputKind.OCI_ARCHIVE, tmp_path / "file/x"),
        (OutputKind.OCI_LAYOUT, tmp_path / "file"),
        (OutputKind.LOCAL, tmp_path / "file"),
        (OutputKind.TAR, STDOUT),
    ):
        with pytest.raises(ExportError):
            await bench.export(image, kind, dest)
        bench.items.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- files ---------------------------------------------------------------------------------------------------


async def test_files_are_those_of_the_top(bench, tmp_path):
    """Whiteouts carried out, links kept; made by one rename, with nothing left beside it."""
    await bench.export(bench.image(LOWER, UPPER), OutputKind.LOCAL, tmp_path / "new/out")
    assert sketch(tmp_path / "new/out") == FILES
    assert (tmp_path / "new/out/bin/same").samefile(tmp_path / "new/out/bin/tool")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


async def test_files_go_into_a_directory_that_is_there(bench, tmp_path):
    """As ``--output .`` is meant: files are replaced, all else stays."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/kept").write_bytes(b"before")
    (tmp_path / "etc/mine").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("/nowhere")
    await bench.export(bench.image(LOWER, UPPER), OutputKind.LOCAL, tmp_path)
    assert sketch(tmp_path) == {**FILES, "etc/mine": b"mine"}


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
async def test_nothing_is_moved_where_something_else_is_in_the_way(bench, tmp_path, kind):
    """A link is not followed: it may lead out of the destination."""
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    if kind == "file":
        (out / "etc").write_bytes(b"")
    elif kind == "link":
        (out / "etc").symlink_to(outside)
    else:
        (out / "etc/kept").mkdir(parents=True)
    before = sketch(out)
    with pytest.raises(ExportError, match="etc"):
        await bench.export(bench.image(LOWER, UPPER), OutputKind.LOCAL, out)
    assert sketch(out) == before
    assert list(outside.iterdir()) == []


async def test_an_image_without_layers_has_no_files(bench, tmp_path):
    """An empty directory, and an empty tar."""
    await bench.export(bench.image(), OutputKind.LOCAL, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    bench.items.clear()
    await bench.export(bench.image(), OutputKind.TAR, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert [name for name in tar.getnames() if name not in ("", ".")] == []


async def test_a_tar_has_the_files(bench, tmp_path):
    """Of the top, in one tar, owners as the layers say also without root."""
    owned = layers.layer(file("owned", b"x", uid=12, gid=34), opaque("etc"), file("etc/only", b"only"))
    await bench.export(bench.image(LOWER, owned), OutputKind.TAR, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        found = {entry.name: (entry.uid, entry.gid) for entry in tar if entry.isfile()}
    assert found == {"bin/tool": (0, 0), "etc/only": (0, 0), "owned": (12, 34)}
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]


# -- going away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OutputKind.OCI_LAYOUT, OutputKind.OCI_ARCHIVE, OutputKind.LOCAL, OutputKind.TAR])
async def test_a_cancelled_export_stops_and_leaves_nothing_that_looks_whole(bench, tmp_path, kind):
    """Its threads have ended when the cancellation is raised."""
    image = bench.image(LOWER, UPPER)
    bench.store.slow_key = f"k/{UPPER.descriptor.digest}"
    running = asyncio.ensure_future(bench.export(image, kind, tmp_path / "out"))
    assert await asyncio.to_thread(bench.store.arrived.wait, 10)
    running.cancel()
    await asyncio.sleep(0)
    bench.store.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not (tmp_path / "out/index.json").exists()
    assert not (tmp_path / "out").is_file()
    assert not list(tmp_path.rglob(".*"))
    assert kind is OutputKind.OCI_LAYOUT or not (tmp_path / "out").exists()
    await asyncio.sleep(0)
    assert bench.ends()[UPPER.descriptor.digest] is LayerPhase.CANCELLED


async def test_a_store_that_is_away_is_an_error_of_its_own(bench, tmp_path, monkeypatch):
    """The blob is not taken for lost: it can be tried again."""
    image = bench.image(LOWER)

    def away(*_args, **_kwargs):
        raise UnavailableError("the content store", "no answer")

    monkeypatch.setattr(bench.store, "open", away)
    with pytest.raises(UnavailableError):
        await bench.export(image, OutputKind.OCI_LAYOUT, tmp_path)
    assert (await bench.refs.blobs([LOWER.descriptor.digest]))[0] is not None
