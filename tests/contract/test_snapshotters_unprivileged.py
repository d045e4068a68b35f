"""The copying snapshotter without root, for real: each test's body runs in a process of another user.

The process starts as whoever runs the tests, imports what it needs and then gives all privileges up for
good, because that user may not be able to read the interpreter's own directory.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.digest import chain_id
from cluster.errors import LayerError, SnapshotError, UnprivilegedEntryError
from cluster.graph import CopyAction, FileOp, MakeDirectory, MakeFile
from storage.file_ops.actions import perform
from storage.snapshots import CopyingSnapshotter, choose
from tests.doubles.layers import (
    MTIME,
    Bytes,
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
    whiteout,
)

NOBODY = 65534
REPOSITORY = Path(__file__).parents[2]

BELOW = layer(
    directory("./", 0o755),
    directory("dev"),
    character("dev/null", 1, 3, mode=0o666),
    character("dev/zero", 1, 5, mode=0o666),
    hard_link("dev/nothing", "dev/null"),
    directory("etc", 0o755),
    file("etc/passwd", b"root", mode=0o644),
    file("etc/shadow", b"secret", mode=0o000, gid=42),
    file("su", b"#!", mode=0o4755),
    directory("home", 0o755),
    directory("home/user", 0o700, uid=1000, gid=1000),
    file("home/user/f", b"mine", uid=1000, gid=1000),
    hard_link("home/user/g", "home/user/f"),
    directory("locked", 0o000),
    file("locked/in", b"in"),
    file("capable", b"c", xattrs={"security.capability": bytes.fromhex("0100000200200000") + bytes(12)}),
    file("trusted", b"t", xattrs={"trusted.x": b"1", "user.y": b"2"}),
    symlink("link", "etc/passwd", uid=3),
    fifo("pipe"),
)
ABOVE = layer(
    directory("dev"),
    whiteout("dev/null"),
    character("dev/full", 1, 7, mode=0o666),
    file("etc/shadow", b"changed", mode=0o000, gid=42),
    file("locked/more", b"m"),
    hard_link("su2", "su"),
    hard_link("dev/zero2", "dev/zero"),
    directory("home"),
    whiteout("home/user"),
)


@pytest.fixture
def unprivileged():
    """Run the function ``body_NAME`` of this file with a directory of its own, as nobody."""
    scratch = Path(tempfile.mkdtemp(prefix="unprivileged-"))
    if os.geteuid() == 0:
        os.chown(scratch, NOBODY, NOBODY)

    def run(name: str) -> Path:
        done = subprocess.run(
            [sys.executable, __file__, name, str(scratch)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return scratch

    yield run
    shutil.rmtree(scratch)


def body_everything(scratch: Path) -> None:
    assert os.geteuid() != 0
    snapshotter = choose(scratch / "node", "auto")
    assert snapshotter.name == "copying"
    parent = apply_all(snapshotter, BELOW)
    tree = snapshotter.mount(parent, "m")
    found = facts(tree)
    assert "dev/null" not in found
    # Our rights are not lent to whoever runs a setuid program, and what we keep we can read.
    assert found["su"].mode == 0o755
    assert found["etc/shadow"].what == b"secret"
    assert found["locked/in"].what == b"in"
    assert found["home/user/f"].uid == os.geteuid()
    assert found["home/user/g"].first == "home/user/f"
    assert dict(found["trusted"].xattrs) == {"user.y": b"2"}
    assert stat.S_ISFIFO((tree / "pipe").lstat().st_mode)

    chain = apply(snapshotter, parent, ABOVE)

    assert sketch(snapshotter.mount(chain, "n"))["locked/more"] == b"m"
    for name, base in (("below.tar", None), ("above.tar", parent), ("whole.tar", None)):
        with (scratch / name).open("wb") as out:
            snapshotter.diff(parent if name == "below.tar" else chain, base, out)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="compares with what root makes")
def test_diffs_restore_what_could_not_be_made(unprivileged, tmp_path):
    """Devices, owners, setuid bits, closed modes and xattrs: root makes the same tree of them as of the layers."""
    scratch = unprivileged("everything")
    snapshotter = CopyingSnapshotter(tmp_path / "node")
    parent = apply_all(snapshotter, BELOW)
    chain = apply(snapshotter, parent, ABOVE)
    below, above, whole = (layer_of((scratch / name).read_bytes()) for name in ("below.tar", "above.tar", "whole.tar"))

    again = apply(snapshotter, None, below)
    assert _alone(facts(snapshotter.mount(again, "a"))) == _alone(facts(snapshotter.mount(parent, "b")))
    # A link to a device that could only be recorded is a device of its own.
    once_more = apply(snapshotter, again, above)
    assert _alone(facts(snapshotter.mount(once_more, "c"))) == _alone(facts(snapshotter.mount(chain, "d")))
    assert _alone(facts(snapshotter.mount(apply(snapshotter, None, whole), "e"))) == _alone(
        facts(snapshotter.mount(chain, "d"))
    )


def _alone(found):
    return {
        name: (fact if fact.kind != "character" else type(fact)(**{**vars(fact), "first": name}))
        for name, fact in found.items()
    }


def body_workspace(scratch: Path) -> None:
    snapshotter = CopyingSnapshotter(scratch / "node")
    parent = apply_all(snapshotter, BELOW)
    with snapshotter.workspace(parent, "looked-at") as workspace:
        assert workspace.is_unchanged()
    with snapshotter.workspace(parent, "build") as workspace:
        root = workspace.path
        (root / "new").write_bytes(b"#!new")
        (root / "new").chmod(0o755)
        (root / "new").rename(root / "su")
        (root / "capable").chmod(0o700)
        (root / "dev/zero").write_bytes(b"a file now")
        shutil.rmtree(root / "home")
        out = io.BytesIO()
        chain = chain_id(parent, workspace.commit(out, source_date_epoch=MTIME + 1))
        assert workspace.publish(chain)
    (scratch / "above.tar").write_bytes(out.getvalue())
    again = io.BytesIO()
    snapshotter.diff(chain, parent, again)
    assert again.getvalue() == out.getvalue()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="sees what the layer is to root")
def test_a_workspace_keeps_what_could_not_be_made_of_what_is_still_there(unprivileged, tmp_path):
    """Owners, xattrs and devices of the parent stay; what was replaced or removed has nothing of them."""
    scratch = unprivileged("workspace")
    snapshotter = CopyingSnapshotter(tmp_path / "node")
    parent = apply_all(snapshotter, BELOW)
    before = facts(snapshotter.mount(parent, "before"))

    chain = apply(snapshotter, parent, layer_of((scratch / "above.tar").read_bytes()))

    after = facts(snapshotter.mount(chain, "after"))
    assert (after["su"].mode, after["su"].uid, after["su"].what) == (0o755, 0, b"#!new")
    assert after["capable"].mode == 0o700
    assert after["capable"].xattrs == before["capable"].xattrs
    assert after["dev/zero"].what == b"a file now"
    assert not [name for name in after if name.startswith("home")]
    changed = {".", "su", "capable", "dev", "dev/zero"}
    kept = {name: fact for name, fact in before.items() if name not in changed and not name.startswith("home")}
    assert {name: after.get(name) for name in kept} == kept


SOURCE = layer(
    directory("./"),
    directory("d", 0o2750, uid=4),
    file("d/f", b"f", mode=0o4755, uid=7, gid=8, xattrs={"trusted.x": b"2"}),
    character("d/random", 1, 8),
)
FILE_OP = FileOp(
    actions=(
        CopyAction(input=1, sources=("d",), destination="/home/"),
        CopyAction(input=1, sources=("d/f",), destination="/etc/shadow"),
        CopyAction(input=1, sources=("d/f",), destination="/capable"),
        CopyAction(input=1, sources=("d/random",), destination="/dev/zero", owner="5"),
        MakeFile(path="/trusted", data=b"new"),
        MakeDirectory(path="/made", owner="9"),
    )
)


def file_op_tar(snapshotter) -> bytes:
    """Return the layer of a file op that is carried out in a workspace, published and read back."""
    parent, source = apply_all(snapshotter, BELOW), apply_all(snapshotter, SOURCE)
    with snapshotter.workspace(parent, "op") as workspace:
        perform(FILE_OP, workspace.path, {1: snapshotter.tree(source)}, ledger=workspace.ledger)
        out = io.BytesIO()
        chain = chain_id(parent, workspace.commit(out, source_date_epoch=None))
        workspace.publish(chain)
    again = io.BytesIO()
    snapshotter.diff(chain, parent, again)
    assert again.getvalue() == out.getvalue()
    return out.getvalue()


def body_file_op(scratch: Path) -> None:
    (scratch / "op.tar").write_bytes(file_op_tar(CopyingSnapshotter(scratch / "node")))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="compares with what root makes")
def test_a_file_op_makes_the_layer_that_root_makes(unprivileged, tmp_path):
    """Owners, setuid bits, xattrs and devices that can't be made are in the layer, and not those that are replaced."""
    made = (unprivileged("file_op") / "op.tar").read_bytes()

    assert made == file_op_tar(CopyingSnapshotter(tmp_path / "node"))


def body_handover(scratch: Path) -> None:
    apply_all(CopyingSnapshotter(scratch / "node"), BELOW)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to take over")
def test_root_builds_on_what_was_made_without(unprivileged, tmp_path):
    """A parent with a ledger becomes real in the child that root makes of it."""
    scratch = unprivileged("handover")
    snapshotter, reference = CopyingSnapshotter(scratch / "node"), CopyingSnapshotter(tmp_path / "node")
    assert snapshotter.has(BELOW.diff_id)

    chain = apply(snapshotter, BELOW.diff_id, ABOVE)
    expected = apply_all(reference, BELOW, ABOVE)

    assert _alone(facts(snapshotter.mount(chain, "m"))) == _alone(facts(reference.mount(expected, "m")))
    assert not (snapshotter._store.path(chain) / "ledger").exists()


def body_replaced(scratch: Path) -> None:
    snapshotter = CopyingSnapshotter(scratch / "node")
    device = [directory("d"), character("d/c", 1, 3), character("e", 1, 3), character("f", 1, 3), character("g", 1, 3)]
    chain = apply_all(
        snapshotter,
        layer(*device, file("h", uid=5)),
        layer(file("e", b"now a file"), directory("f"), whiteout("g"), directory("d"), opaque("d"), whiteout("h")),
    )
    assert sketch(snapshotter.mount(chain, "m")) == {"d": "directory", "e": b"now a file", "f": "directory"}
    out = io.BytesIO()
    snapshotter.diff(chain, None, out)
    assert out.getvalue() == layer_free(snapshotter, chain)
    within = apply_all(
        snapshotter,
        layer(*device, file("d/c", b"1"), directory("e"), file("e/x"), file("e"), hard_link("f", "e")),
    )
    assert sketch(snapshotter.mount(within, "n")) == {"d": "directory", "d/c": b"1", "e": b"", "f": b""}
    with pytest.raises(LayerError, match="should be"):
        apply_all(snapshotter, layer(*device, file("e/x")))
    with pytest.raises(LayerError, match="missing"):
        apply_all(snapshotter, layer(*device, hard_link("x", "y")))


def layer_free(snapshotter, chain) -> bytes:
    """Return the diff of a tree made afresh of what is seen: without a trace of what was recorded before."""
    fresh = CopyingSnapshotter(snapshotter._store.root.parent / "fresh")
    made = apply_all(fresh, layer(directory("d"), file("e", b"now a file"), directory("f")))
    out = io.BytesIO()
    fresh.diff(made, None, out)
    return out.getvalue()


def test_what_was_recorded_goes_with_what_replaces_it(unprivileged):
    """Deleted, hidden or replaced, below or in the same layer: the record goes too."""
    unprivileged("replaced")


def body_refused(scratch: Path) -> None:
    snapshotter = CopyingSnapshotter(scratch / "node")
    staging = scratch / "node" / "copying" / "staging"
    what = layer(file("f"))

    def close() -> None:
        for staged in staging.iterdir():
            (staged / "fs").chmod(0o500)

    with pytest.raises(UnprivilegedEntryError) as caught:
        snapshotter.apply(
            chain=what.diff_id,
            parent=None,
            layer=what.descriptor,
            stream=_After(what.blob, close),
            await_parent=lambda: None,
        )
    assert (caught.value.entry, bool(caught.value.hint)) == ("f", True)
    assert list(staging.iterdir()) == []


def test_what_can_neither_be_made_nor_recorded_is_refused(unprivileged):
    """A file that the node forbids: its absence would show."""
    unprivileged("refused")


class _After(Bytes):
    """Calls *then* before the first byte."""

    def __init__(self, data: bytes, then) -> None:
        super().__init__(data)
        self._then = then

    def readinto(self, buffer: memoryview) -> int:
        self._then()
        return super().readinto(buffer)


def body_recovered(scratch: Path) -> None:
    closed = scratch / "closed"
    closed.mkdir()
    closed.chmod(0)
    with pytest.raises(SnapshotError):
        CopyingSnapshotter(closed / "node")
    closed.chmod(0o700)


def test_a_directory_that_is_closed_to_us_is_a_typed_error(unprivileged):
    """SnapshotError, not PermissionError."""
    unprivileged("recovered")


if __name__ == "__main__":
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    globals()[f"body_{sys.argv[1]}"](Path(sys.argv[2]))
