"""The contract of the Workspace port, on overlay and copying."""

from __future__ import annotations

import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cluster.descriptor import Compression
from cluster.digest import EMPTY_CHAIN, chain_id, digest_of
from cluster.errors import InternalError, SnapshotError, SnapshotGoneError, UnavailableError
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from storage.snapshots.kernel import mount_points
from tests.doubles.layers import (
    MTIME,
    Fact,
    apply,
    apply_all,
    character,
    directory,
    facts,
    fifo,
    file,
    hard_link,
    layer,
    layer_of,
    opaque,
    sketch,
    symlink,
)

NS = 1_000_000_000
EPOCH = MTIME + 1000
EMPTY_TAR = bytes(1024)
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
KINDS = {"overlay": OverlaySnapshotter, "copying": CopyingSnapshotter}

BASE = layer(
    directory("./", 0o755),
    directory("d", 0o750, xattrs={"user.dir": b"1"}),
    file("d/keep", b"k"),
    file("d/change", b"1"),
    file("d/gone", b"g"),
    directory("e"),
    file("e/f", b"e"),
    directory("replaced"),
    file("replaced/old", b"old"),
    directory("deep"),
    directory("deep/er"),
    file("deep/er/f", b"deep"),
    file("one", b"shared"),
    hard_link("two", "one"),
    symlink("s", "d"),
    file("su", b"#!", mode=0o4755),
    directory("tmp", 0o1777),
)


@pytest.fixture(params=[pytest.param("overlay", marks=[pytest.mark.root, is_root]), "copying"])
def snapshotter(request, tmp_path):
    made = KINDS[request.param](tmp_path / "node")
    yield made
    unmount_all(made)
    assert list((tmp_path / "node" / made.name / "staging").iterdir()) == []
    assert not [point for point in mount_points() if point.is_relative_to(tmp_path)]


def unmount_all(snapshotter) -> None:
    for name in list(snapshotter.mounts()):
        snapshotter.unmount(name)


def change(root: Path) -> None:
    """Do to a tree of BASE all that a command may do to it."""
    (root / "d/change").write_bytes(b"22")
    (root / "d/gone").unlink()
    shutil.rmtree(root / "e")
    shutil.rmtree(root / "replaced")
    (root / "replaced").mkdir()
    (root / "replaced/new").write_bytes(b"new")
    os.utime(root / "replaced/new", ns=(5, EPOCH * NS + 123_456_789))
    shutil.rmtree(root / "deep/er")
    (root / "deep/er").write_bytes(b"a file now")
    (root / "new").mkdir(mode=0o2750)
    (root / "new/inner").mkdir()
    (root / "new/inner/f").write_bytes(b"f" * 3000)
    os.link(root / "new/inner/f", root / "new/link")
    os.setxattr(root / "new/link", "user.x", b"\xff\0")
    os.utime(root / "new/link", ns=(1, 1_400_000_000 * NS))
    (root / "s").unlink()
    (root / "s").symlink_to("new/inner")
    os.mkfifo(root / "pipe", 0o640)
    with (root / "sparse").open("wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"end")
    (root / "set").write_bytes(b"#!")
    (root / "set").chmod(0o6755)
    (root / "tmp" / ("long-" * 30)).write_bytes(b"a name that ustar can't hold")


def change_as_root(root: Path) -> None:
    """Do what only root may."""
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(root / "set", 7, 8)
    (root / "set").chmod(0o6755)
    os.setxattr(root / "set", "trusted.t", b"1")


def committed(workspace, epoch: int | None = None) -> bytes:
    """Commit *workspace*; return the tar."""
    out = io.BytesIO()
    diff_id = workspace.commit(out, source_date_epoch=epoch)
    assert diff_id == digest_of(out.getvalue())
    return out.getvalue()


def unpacked(kind: str, root: Path, *layers) -> dict[str, Fact]:
    """Return what *layers* unpack to in a fresh snapshotter."""
    fresh = KINDS[kind](root)
    chain = apply_all(fresh, *layers)
    try:
        return facts(fresh.mount(chain, "look"))
    finally:
        unmount_all(fresh)


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getnames()


# -- what is changed comes to be a layer ---------------------------------------------------------------


@pytest.mark.parametrize("epoch", [None, EPOCH])
def test_what_was_changed_is_what_the_layer_unpacks_to(snapshotter, tmp_path, epoch):
    """Seen in the workspace, published here and unpacked by either snapshotter: one tree, but for clamped times."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        change(workspace.path)
        if os.geteuid() == 0:
            change_as_root(workspace.path)
        made = facts(workspace.path)
        assert not workspace.is_unchanged()
        tar = committed(workspace, epoch)
        chain = chain_id(parent, digest_of(tar))

        assert workspace.publish(chain)

    published = facts(snapshotter.mount(chain, "published"))
    above = layer_of(tar, Compression.NONE)
    kinds = KINDS if os.geteuid() == 0 else ("copying",)
    for kind in kinds:
        assert unpacked(kind, tmp_path / f"fresh-{kind}", BASE, above) == published
    if epoch is None:
        assert published == made
    else:
        newest = max(fact.mtime_ns for fact in published.values())
        assert newest == epoch * NS
        assert published["new/link"].mtime_ns == 1_400_000_000 * NS
        assert published["d/keep"].mtime_ns == MTIME * NS


def test_one_tree_gives_one_tar(snapshotter):
    """The same changes made twice, at other times and after other work, give the same bytes; so does asking twice."""
    parent = apply_all(snapshotter, BASE)
    tars = []
    for run in range(2):
        with snapshotter.workspace(parent, "build") as workspace:
            if run:
                (workspace.path / "first").write_bytes(b"")
                (workspace.path / "first").unlink()
            change(workspace.path)
            tars += [committed(workspace, EPOCH), committed(workspace, EPOCH)]

    assert len(set(tars)) == 1
    assert names(tars[0]) == sorted(names(tars[0]), key=lambda name: [] if name == "." else name.split("/"))


@pytest.mark.root
@is_root
def test_both_snapshotters_give_the_same_layer(tmp_path):
    """But for how a replaced directory is emptied: overlayfs marks it opaque, a comparison names what is gone."""
    tars = {}
    for kind, make in KINDS.items():
        made = make(tmp_path / kind)
        parent = apply_all(made, BASE)
        with made.workspace(parent, "build") as workspace:
            change(workspace.path)
            tars[kind] = committed(workspace, EPOCH)

    overlay, copying = (set(names(tar)) for tar in tars.values())
    assert overlay - copying == {"replaced/.wh..wh..opq"}
    assert copying - overlay == {"replaced/.wh.old"}


def test_on_top_of_nothing(snapshotter, tmp_path):
    """No parent, or the empty chain: an empty root of mode 755, and a layer that needs nothing below."""
    for parent in (None, EMPTY_CHAIN):
        with snapshotter.workspace(parent, "scratch") as workspace:
            assert sketch(workspace.path) == {}
            assert stat.S_IMODE(workspace.path.stat().st_mode) == 0o755
            (workspace.path / "d").mkdir()
            (workspace.path / "d/f").write_bytes(b"1")
            (workspace.path / "x").mkdir()
            (workspace.path / "x").rmdir()
            tar = committed(workspace, EPOCH)
            chain = chain_id(parent, digest_of(tar))
            assert workspace.publish(chain)

        assert names(tar) == [".", "d", "d/f"]
        published = facts(snapshotter.mount(chain, f"look-{chain[7:19]}"))
        assert published == unpacked(snapshotter.name, tmp_path / f"fresh-{parent}", layer_of(tar, Compression.NONE))


def test_workspaces_stand_on_what_workspaces_published(snapshotter):
    """A published workspace is a snapshot as any other: built upon, compared, mounted together."""
    parent = None
    for index in range(3):
        with snapshotter.workspace(parent, "build") as workspace:
            (workspace.path / f"f{index}").write_bytes(b"%d" % index)
            if index == 2:
                (workspace.path / "f0").unlink()
            tar = committed(workspace)
            chain = chain_id(parent, digest_of(tar))
            workspace.publish(chain)
        out = io.BytesIO()
        snapshotter.diff(chain, parent, out)
        assert names(out.getvalue()) == names(tar)
        parent = chain

    assert sketch(snapshotter.mount(parent, "top")) == {"f1": b"1", "f2": b"2"}


def test_linked_files_of_the_parent_that_are_written_to(snapshotter, tmp_path):
    """A file written through one of its names comes out as the workspace shows it, and as it is published."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        with (workspace.path / "one").open("ab") as one:
            one.write(b"!")
        os.link(workspace.path / "d/keep", workspace.path / "kept")
        made = facts(workspace.path)
        tar = committed(workspace)
        chain = chain_id(parent, digest_of(tar))
        workspace.publish(chain)

    published = facts(snapshotter.mount(chain, "published"))
    assert published == made
    assert unpacked(snapshotter.name, tmp_path / "fresh", BASE, layer_of(tar, Compression.NONE)) == published


def test_umoci_unpacks_the_layer_to_the_same_tree(snapshotter, tmp_path):
    """Another implementation reads the tar as we do."""
    if shutil.which("umoci") is None or os.geteuid() != 0:
        pytest.skip("needs umoci and root")
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        change(workspace.path)
        change_as_root(workspace.path)
        tar = committed(workspace, EPOCH)
        chain = chain_id(parent, digest_of(tar))
        workspace.publish(chain)
    for name, content in (("base.tar", BASE.tar), ("above.tar", tar)):
        (tmp_path / name).write_bytes(content)

    layout = tmp_path / "layout"
    for command in (
        ["init", "--layout", layout],
        ["new", "--image", f"{layout}:i"],
        ["raw", "add-layer", "--image", f"{layout}:i", tmp_path / "base.tar"],
        ["raw", "add-layer", "--image", f"{layout}:i", tmp_path / "above.tar"],
        ["raw", "unpack", "--image", f"{layout}:i", tmp_path / "umoci"],
    ):
        subprocess.run(["umoci", *command], check=True, capture_output=True, timeout=60)

    theirs, ours = facts(tmp_path / "umoci"), facts(snapshotter.mount(chain, "published"))
    # umoci gives the directories that an entry falls into a new time.
    for name, fact in ours.items():
        if fact.kind != "directory":
            assert theirs[name] == fact
    assert theirs.keys() == ours.keys()


# -- nothing changed -----------------------------------------------------------------------------------


def test_a_tree_that_was_only_looked_at_is_unchanged(snapshotter):
    """Reading, opening to write without writing, and setting what was set already are no changes."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        sketch(workspace.path)
        (workspace.path / "d/keep").open("r+b").close()
        (workspace.path / "d").chmod(0o750)
        (workspace.path / "deep/er/f").chmod(0o644)

        assert workspace.is_unchanged()
        assert committed(workspace, EPOCH) == EMPTY_TAR
    for empty in (None, EMPTY_CHAIN):
        with snapshotter.workspace(empty, "scratch") as workspace:
            assert workspace.is_unchanged()


@pytest.mark.parametrize(
    "act",
    [
        lambda root: (root / "tmp").chmod(0o1770),
        lambda root: os.utime(root, ns=(1, 1)),
        lambda root: (root / "d/keep").unlink(),
        lambda root: (root / "d/keep").write_bytes(b"K"),
        lambda root: os.utime(root / "s", ns=(1, 1), follow_symlinks=False),
        lambda root: os.setxattr(root / "one", "user.x", b""),
    ],
    ids=["mode", "root", "deleted", "content", "symlink", "xattr"],
)
def test_the_least_change_is_one(snapshotter, tmp_path, act):
    """A mode, a time, an xattr, a deletion: each makes a layer, and the layer makes it again."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        act(workspace.path)
        assert not workspace.is_unchanged()
        tar = committed(workspace)
        chain = chain_id(parent, digest_of(tar))
        workspace.publish(chain)

    published = facts(snapshotter.mount(chain, "published"))
    assert unpacked(snapshotter.name, tmp_path / "fresh", BASE, layer_of(tar, Compression.NONE)) == published


def test_sockets_are_left_out(snapshotter):
    """A tar can't hold them; one in a file's place deletes that file."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        for name in ("d/keep", "socket"):
            (workspace.path / name).unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listening:
                here = os.open(workspace.path, os.O_PATH)
                listening.bind(f"/proc/self/fd/{here}/{name}")  # a socket's path has 108 bytes at most
                os.close(here)
        tar = committed(workspace)
        chain = chain_id(parent, digest_of(tar))
        workspace.publish(chain)

    assert {"d/.wh.keep", "d"} <= set(names(tar))
    seen = sketch(snapshotter.mount(chain, "look"))
    assert not {"d/keep", "socket"} & seen.keys()


def test_a_name_that_means_a_deleted_file_is_refused(snapshotter):
    """It would be lost, or delete another file, wherever the layer is unpacked."""
    with snapshotter.workspace(None, "build") as workspace:
        (workspace.path / ".wh.x").write_bytes(b"")

        with pytest.raises(SnapshotError, match=r"'\.wh\.x' can't be in a layer"):
            workspace.commit(io.BytesIO(), source_date_epoch=None)


# -- publishing ----------------------------------------------------------------------------------------


def test_a_snapshot_that_is_there_already_stays(snapshotter):
    """Of two that make one chain the first counts; the second is dropped and says so."""
    parent = apply_all(snapshotter, BASE)
    was_published = []
    for _ in range(2):
        with snapshotter.workspace(parent, "build") as workspace:
            (workspace.path / "f").write_bytes(b"1")
            chain = chain_id(parent, digest_of(committed(workspace, EPOCH)))
            was_published.append(workspace.publish(chain))

    assert was_published == [True, False]
    assert sorted(snapshotter.snapshots()) == sorted([parent, chain])


def test_only_what_was_committed_is_published_and_only_once(snapshotter):
    """Under the chain ID of its parent and its layer, and no other."""
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        (workspace.path / "f").write_bytes(b"1")
        with pytest.raises(InternalError):
            workspace.publish(parent)
        chain = chain_id(parent, digest_of(committed(workspace)))
        with pytest.raises(InternalError):
            workspace.publish(digest_of(b"another"))
        workspace.publish(chain)
        for ask in (lambda: workspace.publish(chain), workspace.is_unchanged, lambda: committed(workspace)):
            with pytest.raises(SnapshotError, match="already"):
                ask()

    assert snapshotter.has(chain)


def test_a_discarded_workspace_leaves_nothing(snapshotter, tmp_path):
    """By name, by leaving its context, by an error within; and the parent is what it was."""
    parent = apply_all(snapshotter, BASE)
    before = facts(snapshotter.mount(parent, "parent"))
    with snapshotter.workspace(parent, "build") as workspace:
        change(workspace.path)
        workspace.discard()
        workspace.discard()

    def fail_within():
        with snapshotter.workspace(parent, "build") as workspace:
            change(workspace.path)
            raise UnavailableError("the content store", "of the test")

    with pytest.raises(UnavailableError):
        fail_within()

    assert list((tmp_path / "node" / snapshotter.name / "staging").iterdir()) == []
    assert facts(snapshotter.mount(parent, "parent")) == before
    assert list(snapshotter.snapshots()) == [parent]


def test_what_the_reader_of_the_tar_raises_is_raised(snapshotter):
    """An upload that fails is its own error, and the workspace can be committed again."""

    class Failing(io.BytesIO):
        def write(self, data):
            raise UnavailableError("the content store", "of the test")

    with snapshotter.workspace(None, "build") as workspace:
        (workspace.path / "f").write_bytes(b"1")
        with pytest.raises(UnavailableError):
            workspace.commit(Failing(), source_date_epoch=None)
        assert names(committed(workspace)) == [".", "f"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "-o", "a,b"])
def test_a_bad_name_is_refused(snapshotter, name):
    """As of mounts: it may stand in the mount table."""
    with pytest.raises(SnapshotError):
        snapshotter.workspace(None, name)


def test_a_parent_that_is_not_here_is_refused(snapshotter):
    """When opened, and when it was lost before publishing, where the tree is no tree without it."""
    with pytest.raises(SnapshotError, match="not on this node"):
        snapshotter.workspace(digest_of(b"never"), "build")
    parent = apply_all(snapshotter, BASE)
    with snapshotter.workspace(parent, "build") as workspace:
        (workspace.path / "f").write_bytes(b"1")
        chain = chain_id(parent, digest_of(committed(workspace)))
        (snapshotter._store.path(parent) / "snapshot.json").unlink()
        if snapshotter.has_parts:
            with pytest.raises(SnapshotGoneError, match="not on this node"):
                workspace.publish(chain)
        else:
            assert workspace.publish(chain)


# -- crashes -------------------------------------------------------------------------------------------


def killed_with_a_workspace(kind: str, node: Path) -> None:
    """Let a process open a workspace on BASE, change something in it, and be killed."""
    program = f"""
import os, signal
from pathlib import Path
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.contract.test_workspaces import BASE, KINDS
from tests.doubles.layers import apply_all
made = KINDS[{kind!r}](Path({str(node)!r}))
workspace = made.workspace(apply_all(made, BASE), "build")
(workspace.path / "f").write_bytes(b"1")
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == -9


def test_kill_9_leaves_staging_that_recover_removes(snapshotter, tmp_path):
    """I9: its mount too, through which nothing is removed; a workspace in use stays."""
    killed_with_a_workspace(snapshotter.name, tmp_path / "node")
    staging = tmp_path / "node" / snapshotter.name / "staging"
    (left,) = staging.iterdir()
    (parent,) = snapshotter.snapshots()
    with snapshotter.workspace(parent, "mine") as workspace:
        (workspace.path / "f").write_bytes(b"2")

        assert snapshotter.recover() == [f"staging/{left.name}"]

        assert [path.name for path in staging.iterdir()] != [left.name]
        assert (workspace.path / "f").read_bytes() == b"2"
    assert list(staging.iterdir()) == []
    assert snapshotter.recover() == []
    assert list(snapshotter.snapshots()) == [parent]


# -- overlay alone -------------------------------------------------------------------------------------


@pytest.fixture
def overlay(tmp_path):
    made = OverlaySnapshotter(tmp_path / "node")
    yield made
    unmount_all(made)


@pytest.mark.root
@is_root
def test_a_published_upper_directory_has_no_marks_but_those_that_count(overlay):
    """Whiteouts and opaque directories that hide something; no copies of what is unchanged."""
    parent = apply_all(overlay, BASE)
    with overlay.workspace(parent, "build") as workspace:
        change(workspace.path)
        os.chown(workspace.path / "su", 0, 0, follow_symlinks=False)
        (workspace.path / "d/keep").open("r+b").close()
        chain = chain_id(parent, digest_of(committed(workspace)))
        workspace.publish(chain)
    upper = overlay._store.files(chain)
    found = {str(path.relative_to(upper)): path for path in upper.rglob("*")}

    marks = {
        (name, mark)
        for name, path in found.items()
        for mark in os.listxattr(path, follow_symlinks=False)
        if mark.startswith("trusted.overlay.")
    }
    assert marks == {("replaced", "trusted.overlay.opaque")}
    assert os.listxattr(upper) == []
    whiteouts = {name for name, path in found.items() if stat.S_ISCHR(path.lstat().st_mode)}
    assert whiteouts == {"d/gone", "e"}
    assert "d/keep" not in found


@pytest.mark.root
@is_root
def test_who_still_writes_holds_the_commit_up(overlay, monkeypatch):
    """A layer of a tree that changes meanwhile would be of no tree: refused, and done once the writer is gone."""
    monkeypatch.setattr("storage.snapshots.kernel._QUIESCE_S", 0.1)
    with overlay.workspace(None, "build") as workspace:
        with (workspace.path / "f").open("wb") as writing:
            writing.write(b"1")
            with pytest.raises(SnapshotError, match="open for writing"):
                workspace.is_unchanged()
        assert names(committed(workspace)) == [".", "f"]


@pytest.mark.root
@is_root
def test_programs_of_the_tree_run_with_their_rights(overlay):
    """As a container's root must be: setuid counts, devices work."""
    with overlay.workspace(None, "build") as workspace:
        line = next(
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split(" ")[4] == str(workspace.path)
        )
        os.mknod(workspace.path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        with (workspace.path / "zero").open("rb") as zero:
            assert zero.read(3) == bytes(3)

    assert " build " in line
    options = set(line.split(" ")[5].split(","))
    assert "rw" in options
    assert not options & {"nosuid", "nodev", "noexec"}


@pytest.mark.root
@is_root
def test_a_workspace_stands_on_as_many_layers_as_a_mount(overlay):
    """More than Docker's 127, in one mount; and beyond that a typed error that leaves nothing."""
    chains = []
    for index in range(150):
        chains.append(apply(overlay, chains[-1] if chains else None, layer(file(f"{index}"))))

    with overlay.workspace(chains[135], "many") as workspace:
        assert len(list(workspace.path.iterdir())) == 136
        (workspace.path / "new").write_bytes(b"")
        assert names(committed(workspace)) == [".", "new"]
    with pytest.raises(SnapshotError, match="more than one overlay mount"):
        overlay.workspace(chains[-1], "more")
    assert list(overlay._store.staging.iterdir()) == []


@pytest.mark.root
@is_root
def test_an_opaque_root_below_hides_what_is_under_it(overlay):
    """A workspace shows what a mount of its parent shows."""
    parent = apply_all(overlay, layer(file("old")), layer(opaque(""), file("new"), directory("d"), fifo("p")))
    parent = apply(overlay, parent, layer(character("null", 1, 3)))

    with overlay.workspace(parent, "build") as workspace:
        assert facts(workspace.path) == facts(overlay.mount(parent, "look"))
        assert workspace.is_unchanged()
