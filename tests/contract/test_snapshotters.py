"""The contract of the Snapshotter port, on overlay and copying."""

from __future__ import annotations

import io
import os
import subprocess
import threading

import pytest

from cluster.descriptor import Compression
from cluster.digest import EMPTY_CHAIN, Digest, chain_id, digest_of
from cluster.errors import (
    BlobNotFoundError,
    DiffIdMismatchError,
    LayerError,
    NeedsRemoteProvidersError,
    SnapshotError,
    UnsafeEntryError,
)
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter, choose
from tests.doubles.layers import (
    MTIME,
    Bytes,
    Fact,
    Layer,
    apply,
    apply_all,
    apply_as,
    character,
    directory,
    facts,
    fifo,
    file,
    hard_link,
    layer,
    layer_of,
    layer_tar,
    opaque,
    sketch,
    symlink,
    whiteout,
)

NS = 1_000_000_000
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(params=[pytest.param("overlay", marks=[pytest.mark.root, is_root]), "copying"])
def snapshotter(request, tmp_path):
    made = (
        OverlaySnapshotter(tmp_path / "node") if request.param == "overlay" else CopyingSnapshotter(tmp_path / "node")
    )
    yield made
    for name in list(made.mounts()):
        made.unmount(name)
    assert list((tmp_path / "node" / made.name / "staging").iterdir()) == []


def seen(snapshotter, chain) -> dict[str, object]:
    return sketch(snapshotter.mount(chain, f"look-{chain[7:19]}"))


def seen_facts(snapshotter, chain) -> dict[str, Fact]:
    return facts(snapshotter.mount(chain, f"look-{chain[7:19]}"))


# -- what a layer has -----------------------------------------------------------------------------


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("members", [1, 3])
def test_every_compression_unpacks_to_the_same(snapshotter, compression, members):
    """Gzip of any number of members, zstd of any number of frames, and no compression at all."""
    what = layer(directory("d"), file("d/f", b"x" * 70_000), compression=compression, members=members)

    applied = apply_as(snapshotter, what.diff_id, None, what)

    assert applied.diff_id == what.diff_id
    assert applied.tar_bytes == len(what.tar)
    assert applied.content_bytes == 70_000
    assert applied.entries == 2
    assert applied.was_published
    assert seen(snapshotter, what.diff_id) == {"d": "directory", "d/f": b"x" * 70_000}


@is_root
@pytest.mark.root
def test_everything_of_an_entry_is_kept(snapshotter):
    """Types, owners, modes with setuid, times to the nanosecond, xattrs, hard links, devices."""
    chain = apply_all(
        snapshotter,
        layer(
            directory("d", 0o2750, uid=10, gid=20, xattrs={"user.dir": b"\xff\0"}),
            file("d/su", b"#!", mode=0o6755, uid=7, gid=8, pax={"mtime": "1500000000.123456789"}),
            file("d/cap", b"c", xattrs={"security.capability": bytes.fromhex("0100000200200000") + bytes(12)}),
            hard_link("d/same", "d/su"),
            symlink("d/link", "/absolute/../target", uid=5),
            character("d/null", 1, 3, mode=0o666),
            fifo("d/pipe", mode=0o622),
            file("d/" + "long" * 60, b"long"),
            file("d/ünïcode", b"u"),
        ),
    )

    found = seen_facts(snapshotter, chain)

    assert found["d"].mode == 0o2750
    assert (found["d"].uid, found["d"].gid, found["d"].mtime_ns) == (10, 20, MTIME * NS)
    assert found["d"].xattrs == (("user.dir", b"\xff\0"),)
    assert found["d/su"] == Fact("file", 0o6755, 7, 8, 1500000000123456789, b"#!", (), "d/same")
    assert found["d/same"].first == "d/same"
    assert found["d/cap"].xattrs[0][0] == "security.capability"
    assert (found["d/link"].what, found["d/link"].uid) == ("/absolute/../target", 5)
    assert (found["d/null"].kind, found["d/null"].mode, found["d/null"].what) == (
        "character",
        0o666,
        os.makedev(1, 3),
    )
    assert (found["d/pipe"].kind, found["d/pipe"].mode) == ("fifo", 0o622)
    assert found["d/" + "long" * 60].what == b"long"
    assert found["d/ünïcode"].what == b"u"


def test_a_sparse_file_stays_sparse(snapshotter, tmp_path):
    """Holes take no room, in the parent's copy neither."""
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as out:
        out.seek(8 << 20)
        out.write(b"data")
        out.truncate(32 << 20)
    tar = subprocess.run(
        ["tar", "--sparse", "--format=posix", "-cf", "-", "sparse"], cwd=source, capture_output=True, check=True
    ).stdout
    chain = apply_all(snapshotter, layer_of(tar), layer(file("other")))

    copy = snapshotter.mount(chain, "m") / "sparse"

    assert copy.stat().st_size == 32 << 20
    assert copy.stat().st_blocks * 512 < 1 << 20
    assert copy.read_bytes() == (source / "sparse").read_bytes()


def test_the_root_entry_sets_the_root(snapshotter):
    """``./`` gives the root its mode and time; a layer without one leaves them."""
    chain = apply_all(snapshotter, layer(directory("./", 0o711)), layer(file("f")))

    root = seen_facts(snapshotter, chain)["."]

    assert (root.mode & 0o077, root.mtime_ns) == (0o011, MTIME * NS)


# -- layers on layers ------------------------------------------------------------------------------


def test_whiteouts_delete_from_below_only(snapshotter):
    """A whiteout hides what lower layers have, never what its own layer brings, before or after it."""
    chain = apply_all(
        snapshotter,
        layer(
            directory("d"),
            file("d/gone", b"1"),
            file("d/stays", b"1"),
            file("d/new", b"1"),
            directory("e"),
            file("e/x"),
        ),
        layer(directory("d"), file("d/new", b"2"), whiteout("d/new"), whiteout("d/gone"), whiteout("e")),
    )

    assert seen(snapshotter, chain) == {"d": "directory", "d/stays": b"1", "d/new": b"2"}


def test_an_opaque_directory_hides_all_below_it(snapshotter):
    """Whatever lower layers have in it is gone, what its layer brings is there, wherever the marker stands."""
    chain = apply_all(
        snapshotter,
        layer(directory("d"), file("d/a", b"1"), directory("d/s"), file("d/s/b", b"1")),
        layer(file("d/c", b"1")),
        layer(directory("d"), file("d/before", b"3"), directory("d/s"), opaque("d"), file("d/after", b"3")),
    )

    assert seen(snapshotter, chain) == {
        "d": "directory",
        "d/before": b"3",
        "d/s": "directory",
        "d/after": b"3",
    }


def test_an_opaque_root_hides_everything(snapshotter):
    """The marker at the root makes the layer the whole tree."""
    chain = apply_all(snapshotter, layer(file("a"), directory("d")), layer(opaque(""), file("b")))

    assert seen(snapshotter, chain) == {"b": b""}


def test_a_directory_merges_with_the_one_below(snapshotter):
    """A directory entry over a directory changes its attributes and leaves what is in it."""
    chain = apply_all(
        snapshotter, layer(directory("d", 0o755), file("d/a", b"1")), layer(directory("d", 0o700), file("d/b", b"2"))
    )

    assert seen(snapshotter, chain) == {"d": "directory", "d/a": b"1", "d/b": b"2"}
    assert seen_facts(snapshotter, chain)["d"].mode == 0o700


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(layer(file("d")), id="file"),
        pytest.param(layer(symlink("d", "elsewhere")), id="symlink"),
        pytest.param(layer(whiteout("d")), id="whiteout"),
    ],
)
def test_a_directory_over_something_else_starts_empty(snapshotter, between):
    """What a directory of that name had further below does not come back."""
    chain = apply_all(snapshotter, layer(directory("d"), file("d/old")), between, layer(directory("d"), file("d/new")))

    assert seen(snapshotter, chain) == {"d": "directory", "d/new": b""}


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([whiteout("d"), directory("d"), file("d/new")], id="whiteout-first"),
        pytest.param([directory("d"), file("d/new"), whiteout("d")], id="whiteout-last"),
        pytest.param([file("d"), directory("d"), file("d/new")], id="file-first"),
        pytest.param([whiteout("d"), file("d/new")], id="no-directory-entry"),
    ],
)
def test_a_directory_replaced_within_a_layer_starts_empty(snapshotter, items):
    """Deleted or replaced, and made again in the same layer: nothing of the lower one shows."""
    chain = apply_all(snapshotter, layer(directory("d", 0o700), file("d/old")), layer(*items))

    assert seen(snapshotter, chain) == {"d": "directory", "d/new": b""}


def test_a_file_replaces_a_directory(snapshotter):
    """With all that was in it, below and in the same layer."""
    chain = apply_all(
        snapshotter,
        layer(directory("d"), file("d/old")),
        layer(directory("d"), directory("d/e"), file("d/e/f"), file("d", b"now a file"), file("g")),
    )

    assert seen(snapshotter, chain) == {"d": b"now a file", "g": b""}


@is_root
@pytest.mark.root
def test_a_missing_directory_is_the_one_below(snapshotter):
    """Mode, owner, time and xattrs come from the layers below."""
    chain = apply_all(
        snapshotter,
        layer(directory("a", 0o751, uid=3, gid=4, xattrs={"user.x": b"1"}), directory("a/b", 0o700, uid=5)),
        layer(file("f")),
        layer(file("a/b/c/new", b"n")),
    )

    found = seen_facts(snapshotter, chain)

    assert found["a"] == Fact("directory", 0o751, 3, 4, MTIME * NS, 0, (("user.x", b"1"),), "a")
    assert (found["a/b"].mode, found["a/b"].uid) == (0o700, 5)
    assert (found["a/b/c"].mode, found["a/b/c"].mtime_ns) == (0o755, 0)
    assert found["a/b/c/new"].what == b"n"


def test_a_symlink_of_a_lower_layer_is_followed(snapshotter):
    """An entry below it lands in its target, within the root, and the link stays a link."""
    chain = apply_all(
        snapshotter,
        layer(directory("usr"), directory("usr/lib"), symlink("lib", "/usr/lib"), symlink("up", "../../../usr")),
        layer(file("lib/a", b"1"), file("up/lib/b", b"2")),
    )

    assert seen(snapshotter, chain) == {
        "lib": "-> /usr/lib",
        "up": "-> ../../../usr",
        "usr": "directory",
        "usr/lib": "directory",
        "usr/lib/a": b"1",
        "usr/lib/b": b"2",
    }


def test_a_hard_link_into_a_lower_layer_shares_the_file(snapshotter):
    """Both names are one file, with the content and attributes from below."""
    chain = apply_all(
        snapshotter,
        layer(directory("d", 0o750), file("d/target", b"shared", mode=0o640)),
        layer(file("x")),
        layer(hard_link("link", "/d/target")),
    )

    found = seen_facts(snapshotter, chain)

    assert found["link"].first == found["d/target"].first == "d/target"
    assert (found["link"].what, found["link"].mode, found["link"].mtime_ns) == (b"shared", 0o640, MTIME * NS)
    assert found["d"].mode == 0o750


def test_aufs_books_are_left_out(snapshotter):
    """``.wh..wh.*`` but for the opaque marker means nothing."""
    chain = apply_all(
        snapshotter,
        layer(directory(".wh..wh.plnk"), file(".wh..wh.plnk/12.34", b"x"), file(".wh..wh.aufs"), file("f")),
    )

    assert seen(snapshotter, chain) == {"f": b""}


def test_the_parent_is_awaited_only_where_it_must_be_seen(snapshotter):
    """A layer with all its directories is unpacked before its parent is there; it is published after."""
    below, above = layer(directory("d"), file("d/a")), layer(directory("d"), file("d/b"), whiteout("d/a"))
    chain = chain_id(below.diff_id, above.diff_id)
    arrived, proceed = threading.Event(), threading.Event()
    stream = Bytes(above.blob)

    def await_parent():
        arrived.set()
        assert stream.readinto(memoryview(bytearray(1))) == 0
        assert not snapshotter.has(chain)
        assert proceed.wait(30)

    def run():
        snapshotter.apply(
            chain=chain, parent=below.diff_id, layer=above.descriptor, stream=stream, await_parent=await_parent
        )

    thread = threading.Thread(target=run)
    thread.start()
    assert arrived.wait(30)
    apply(snapshotter, None, below)
    proceed.set()
    thread.join(30)

    assert seen(snapshotter, chain) == {"d": "directory", "d/b": b""}


def test_a_parent_that_never_comes_leaves_nothing(snapshotter):
    """What ``await_parent`` raises comes out unchanged."""
    above = layer(file("d/b"))

    def await_parent():
        raise NeedsRemoteProvidersError(("sha256:x",))

    with pytest.raises(NeedsRemoteProvidersError):
        snapshotter.apply(
            chain=EMPTY_CHAIN[:-1] + "0",
            parent=digest_of(b"p"),
            layer=above.descriptor,
            stream=Bytes(above.blob),
            await_parent=await_parent,
        )
    assert list(snapshotter.snapshots()) == []


# -- what must not be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([file("../out")], id="dots"),
        pytest.param([file("a/../../out")], id="dots-inside"),
        pytest.param([directory("a"), hard_link("a/l", "../../victim")], id="hard-link-dots"),
        pytest.param([file("f", xattrs={"trusted.overlay.opaque": b"y"})], id="overlay-xattr"),
        pytest.param([directory("d", xattrs={"trusted.overlay.redirect": b"/x"})], id="overlay-redirect"),
        pytest.param([character("whiteout", 0, 0)], id="forged-whiteout"),
    ],
)
def test_an_unsafe_entry_is_refused(snapshotter, tmp_path, items):
    """What would leave the root or speak to overlayfs; nothing is published or left."""
    (tmp_path / "victim").write_text("mine")

    with pytest.raises(UnsafeEntryError):
        apply_all(snapshotter, layer(*items))

    assert list(snapshotter.snapshots()) == []
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([symlink("s", "{victim}"), file("s/f", b"out")], id="absolute"),
        pytest.param([symlink("s", "../../../../../../../../../../../{victim}"), file("s/f", b"out")], id="dots"),
        pytest.param([directory("d"), symlink("d/s", "{victim}"), symlink("t", "d/s"), file("t/f")], id="twice"),
        pytest.param([symlink("s", "{victim}"), directory("s/sub"), file("s/sub/f")], id="directory"),
        pytest.param([symlink("s", "{victim}/f"), file("s", b"out")], id="last-component"),
        pytest.param([symlink("s", "{victim}"), whiteout("s/f")], id="whiteout"),
    ],
)
def test_a_symlink_never_leads_out(snapshotter, tmp_path, items):
    """Its target is looked up within the root, whatever it says."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "f").write_text("mine")
    before = facts(victim)
    named = [type(item)(**{**vars(item), "link": item.link.format(victim=victim)}) for item in items]

    apply_all(snapshotter, layer(file("below")), layer(*named))

    assert facts(victim) == before


def test_a_hard_link_never_reaches_out(snapshotter, tmp_path):
    """Through a symlink to a real file outside: there is no such file within the root."""
    (tmp_path / "victim").write_text("mine")

    with pytest.raises(LayerError, match="is missing"):
        apply_all(snapshotter, layer(symlink("s", str(tmp_path)), hard_link("l", "s/victim")))

    assert (tmp_path / "victim").stat().st_nlink == 1


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        pytest.param([file("f"), file("f/g")], "should be", id="file-as-directory"),
        pytest.param([hard_link("l", "nowhere")], "missing", id="no-target"),
        pytest.param([hard_link("l", "no/where")], "missing", id="no-target-directory"),
        pytest.param([directory("d"), hard_link("l", "d")], "directory", id="link-to-directory"),
        pytest.param([symlink("a", "b"), symlink("b", "a"), file("a/f")], "too many", id="loop"),
        pytest.param([whiteout("..")], "no name", id="whiteout-dots"),
        pytest.param([file("x" * 256)], "name too long", id="component"),
        pytest.param([file("/".join(["d" * 200] * 20))], "longer than", id="path"),
        pytest.param([file("./")], "root", id="root-as-file"),
        pytest.param([symlink("s", "")], "No such file", id="empty-link"),
        pytest.param([file(".wh.d/f")], "whiteout", id="whiteout-as-directory"),
    ],
)
def test_a_malformed_layer_is_refused(snapshotter, items, reason):
    """With the entry's name, and without anything left."""
    with pytest.raises(LayerError, match=reason) as caught:
        apply_all(snapshotter, layer(*items))

    assert caught.value.entry
    assert list(snapshotter.snapshots()) == []


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.97])
def test_a_truncated_layer_is_refused(snapshotter, compression, kept):
    """Wherever it ends, whatever its compression; nothing is published."""
    whole = layer(*(file(f"f{i}", os.urandom(5000)) for i in range(20)), compression=compression)
    cut = whole.blob[: int(len(whole.blob) * kept)]

    with pytest.raises((LayerError, DiffIdMismatchError)):
        apply(snapshotter, None, Layer(whole.tar, cut, whole.descriptor))

    assert not snapshotter.has(whole.diff_id)


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_garbage_is_refused(snapshotter, compression):
    """Bytes that are no such stream, from the beginning or after it."""
    whole = layer(file("f"), compression=compression)
    for blob in (b"garbage" * 100, whole.blob + b"garbage"):
        with pytest.raises(LayerError):
            apply(snapshotter, None, Layer(whole.tar, blob, whole.descriptor))


def test_bytes_after_the_archive_count(snapshotter):
    """The diff ID is of all that the stream has, padding and whatever follows the archive included."""
    tar = layer_tar(file("f")) + b"trailing" * 1000

    chain = apply_all(snapshotter, layer_of(tar))

    assert chain == digest_of(tar)


def test_another_diff_id_publishes_nothing(snapshotter):
    """A layer that unpacks well, but isn't the one that the image names."""
    one, other = layer(file("f", b"1")), layer(file("f", b"2"))

    with pytest.raises(DiffIdMismatchError) as caught:
        apply(snapshotter, None, Layer(one.tar, other.blob, one.descriptor))

    assert (caught.value.expected, caught.value.actual) == (one.diff_id, other.diff_id)
    assert list(snapshotter.snapshots()) == []


def test_an_error_of_the_stream_comes_out_unchanged(snapshotter):
    """It may be retryable, or the caller's own."""
    what = layer(file("f", os.urandom(100_000)))
    stream = Bytes(what.blob[:5000], error=BlobNotFoundError(what.descriptor.digest, "there"))

    with pytest.raises(BlobNotFoundError):
        snapshotter.apply(
            chain=what.diff_id, parent=None, layer=what.descriptor, stream=stream, await_parent=lambda: None
        )


# -- publishing, listing, mounting -----------------------------------------------------------------------


def test_one_snapshot_a_chain_whoever_comes_first(snapshotter):
    """I4: concurrent appliers of one chain publish it once, and all succeed."""
    what = layer(file("f", os.urandom(300_000)))
    outcomes = []

    def run():
        outcomes.append(apply_as(snapshotter, what.diff_id, None, what).was_published)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(outcomes) == [False, False, False, True]
    assert list(snapshotter.snapshots()) == [what.diff_id]


def test_snapshots_are_found_by_another_process(snapshotter, tmp_path):
    """What is published is on the disk, not in the object."""
    chain = apply_all(snapshotter, layer(file("f")))

    other = type(snapshotter)(tmp_path / "node")

    assert other.has(chain)
    assert list(other.snapshots()) == [chain]
    assert not other.has(digest_of(b"another"))


def test_a_mount_is_idempotent_and_listed(snapshotter):
    """The same name twice gives the same path; another chain under a taken name is refused."""
    one = apply_all(snapshotter, layer(file("f", b"1")))
    two = apply_all(snapshotter, layer(file("f", b"1")), layer(file("g", b"2")))

    path = snapshotter.mount(two, "name")

    assert snapshotter.mount(two, "name") == path
    assert snapshotter.mounts() == {"name": path}
    with pytest.raises(SnapshotError, match="another snapshot"):
        snapshotter.mount(one, "name")
    snapshotter.unmount("name")
    snapshotter.unmount("name")
    assert snapshotter.mounts() == {}
    assert sketch(snapshotter.mount(one, "name")) == {"f": b"1"}


def test_the_empty_chain_mounts_empty(snapshotter):
    """An image of no layers has an empty root, and any layer may stand on it."""
    assert snapshotter.has(EMPTY_CHAIN)
    assert sketch(snapshotter.mount(EMPTY_CHAIN, "empty")) == {}

    what = layer(file("f"))
    chain = chain_id(EMPTY_CHAIN, what.diff_id)
    apply_as(snapshotter, chain, EMPTY_CHAIN, what)

    assert seen(snapshotter, chain) == {"f": b""}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-o", "a" * 300, "x\n"])
def test_a_bad_mount_name_is_refused(snapshotter, name):
    """A name is one plain path component."""
    with pytest.raises(SnapshotError):
        snapshotter.mount(EMPTY_CHAIN, name)


def test_what_is_not_published_is_not_mounted(snapshotter):
    """Neither a chain that was never here, nor one that was removed."""
    chain = apply_all(snapshotter, layer(file("f")))
    snapshotter.remove(chain)
    snapshotter.remove(chain)

    for gone in (chain, digest_of(b"never")):
        assert not snapshotter.has(gone)
        with pytest.raises(SnapshotError, match="not on this node"):
            snapshotter.mount(gone, "m")
    assert snapshotter.mounts() == {}


def test_recover_removes_what_was_left_and_nothing_else(snapshotter, tmp_path):
    """I9: abandoned staging goes, staging in use stays, published snapshots and mounts stay; twice is once."""
    chain = apply_all(snapshotter, layer(file("f", b"1")))
    path = snapshotter.mount(chain, "kept")
    node = tmp_path / "node" / snapshotter.name
    abandoned = node / "staging" / "dead"
    (abandoned / "fs").mkdir(parents=True)
    (abandoned / "fs" / "half").write_text("half")
    what = layer(file("d/g", b"2"))
    removed = []

    def await_parent():
        removed.extend(snapshotter.recover())

    snapshotter.apply(
        chain=chain_id(chain, what.diff_id),
        parent=chain,
        layer=what.descriptor,
        stream=Bytes(what.blob),
        await_parent=await_parent,
    )

    assert removed == ["staging/dead"]
    assert snapshotter.recover() == []
    assert sketch(path) == {"f": b"1"}
    assert seen(snapshotter, chain_id(chain, what.diff_id)) == {"f": b"1", "d": "directory", "d/g": b"2"}


def test_a_crash_of_the_machine_costs_the_unsettled_only(snapshotter, tmp_path):
    """What was not known to be on the disk when the machine went is not there afterwards, and can be made again."""
    settled, unsettled = layer(file("f", b"1")), layer(file("f", b"2"))
    apply(snapshotter, None, settled)
    assert snapshotter.settle() == 1
    apply(snapshotter, None, unsettled)
    after = type(snapshotter)(tmp_path / "node")
    after._store._boot = "the next boot"

    assert after.has(settled.diff_id)
    assert not after.has(unsettled.diff_id)
    assert apply_as(after, unsettled.diff_id, None, unsettled).was_published
    after.remove(unsettled.diff_id)
    apply(snapshotter, None, unsettled)
    assert len(after.recover()) == 1
    assert list(after.snapshots()) == [settled.diff_id]


# -- diff ----------------------------------------------------------------------------------------------


def round_trip(snapshotter, tmp_path, chain: Digest, parent: Digest | None, below: list[Layer]) -> None:
    """Assert that the diff of *chain* to *parent*, applied on a fresh parent, gives the same tree, and itself."""
    out, again = io.BytesIO(), io.BytesIO()
    diff_id = snapshotter.diff(chain, parent, out)
    assert diff_id == digest_of(out.getvalue()) == snapshotter.diff(chain, parent, again)
    fresh = type(snapshotter)(tmp_path / "fresh")
    base = apply_all(fresh, *below) if below else None
    made = apply(fresh, base, layer_of(out.getvalue(), Compression.NONE))
    try:
        assert seen_facts(fresh, made) == seen_facts(snapshotter, chain)
    finally:
        for name in list(fresh.mounts()):
            fresh.unmount(name)


BASE = [
    directory("d", 0o750),
    file("d/keep", b"k"),
    file("d/change", b"1"),
    file("d/gone", b"g"),
    directory("e"),
    file("e/f", b"e"),
    file("same-size", b"one"),
    symlink("s", "d"),
    file("one", b"shared"),
    hard_link("two", "one"),
    directory("o"),
    file("o/old", b"old"),
]
CHANGE = [
    directory("d", 0o700),
    file("d/change", b"22"),
    whiteout("d/gone"),
    whiteout("e"),
    file("same-size", b"two"),
    symlink("s", "e"),
    hard_link("d/link", "d/keep"),
    directory("o"),
    opaque("o"),
    file("o/new", b"new"),
    file("n", b"n", mode=0o600, xattrs={"user.a": b"\xfe"}),
    hard_link("m", "n"),
    fifo("p"),
]


def test_a_diff_applied_again_gives_the_same_tree(snapshotter, tmp_path):
    """Against its parent, against nothing, and the other way round."""
    below = [layer(*BASE)]
    parent = apply_all(snapshotter, *below)
    chain = apply(snapshotter, parent, layer(*CHANGE))

    round_trip(snapshotter, tmp_path / "1", chain, parent, below)
    round_trip(snapshotter, tmp_path / "2", chain, None, [])
    round_trip(snapshotter, tmp_path / "3", parent, chain, [*below, layer(*CHANGE)])
    round_trip(snapshotter, tmp_path / "4", parent, None, [])


def test_links_that_changed_come_out_right(snapshotter, tmp_path):
    """Parted, joined and added hard links survive a diff."""
    below = [layer(file("a", b"x"), hard_link("b", "a"), file("c", b"y"), file("d", b"y"), file("e", b"z"))]
    parent = apply_all(snapshotter, *below)
    chain = apply(
        snapshotter, parent, layer(file("b", b"x"), hard_link("d", "c"), hard_link("f", "e"), hard_link("0", "e"))
    )

    round_trip(snapshotter, tmp_path / "1", chain, parent, below)
    if snapshotter.name == "overlay":
        snapshotter = CopyingSnapshotter(tmp_path / "copying")
        parent = apply_all(snapshotter, *below)
        chain = apply(snapshotter, parent, layer(file("b", b"x"), hard_link("d", "c"), hard_link("f", "e")))
        round_trip(snapshotter, tmp_path / "2", chain, parent, below)


def test_a_diff_of_nothing_is_the_empty_layer(snapshotter):
    """Entries: none. The tar: two blocks of zeros."""
    chain = apply_all(snapshotter, layer(file("f")))
    out = io.BytesIO()

    snapshotter.diff(EMPTY_CHAIN, None, out)

    assert out.getvalue() == bytes(1024)
    assert snapshotter.diff(chain, chain, io.BytesIO()) == digest_of(bytes(1024))


def test_choose_takes_what_works(tmp_path):
    """Overlay where mounting works, copying otherwise, and what was asked for by name."""
    expected = "overlay" if os.geteuid() == 0 else "copying"

    assert choose(tmp_path / "auto", "auto").name in (expected, "copying")
    assert choose(tmp_path / "copying", "copying").name == "copying"
    assert [path.name for path in (tmp_path / "auto").iterdir()] == [choose(tmp_path / "auto", "auto").name]
