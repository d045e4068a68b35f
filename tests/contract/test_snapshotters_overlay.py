"""What only the overlay snapshotter has: kernel mounts, many layers, and processes killed in between."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.digest import chain_id
from cluster.errors import SnapshotError
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from storage.snapshots.kernel import mount_points
from storage.snapshots.store import short_name
from tests.doubles.layers import Bytes, apply, apply_all, directory, facts, file, layer, opaque, sketch, whiteout

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def snapshotter(tmp_path):
    made = OverlaySnapshotter(tmp_path / "node")
    yield made
    for name in list(made.mounts()):
        made.unmount(name)


def test_images_of_many_layers_fit_one_mount(snapshotter):
    """127 layers are Docker's limit; 140 fit the kernel's page of options here, and more is a typed error."""
    chains = []
    for index in range(160):
        what = layer(directory("d"), file(f"d/{index}"), file("top", b"%d" % index))
        chains.append(apply(snapshotter, chains[-1] if chains else None, what))

    path = snapshotter.mount(chains[139], "many")

    assert len(list((path / "d").iterdir())) == 140
    assert (path / "top").read_bytes() == b"139"
    with pytest.raises(SnapshotError, match="more than one overlay mount"):
        snapshotter.mount(chains[-1], "more")
    assert set(snapshotter.mounts()) == {"many"}


def test_mounts_are_read_only(snapshotter):
    """Of one layer and of many: a snapshot never changes."""
    one = apply_all(snapshotter, layer(file("f")))
    two = apply(snapshotter, one, layer(file("g")))

    for chain in (one, two):
        with pytest.raises(OSError, match="Read-only"):
            (snapshotter.mount(chain, chain[7:19]) / "new").touch()


def test_whiteouts_never_show(snapshotter):
    """Not in the lowest layer, not in a directory of one layer only, not of what was never there."""
    chain = apply_all(
        snapshotter,
        layer(directory("d"), whiteout("d/x"), opaque("d"), file("f")),
        layer(directory("e"), whiteout("e/x"), whiteout("nothing"), directory("d"), whiteout("d/y")),
        layer(directory("d"), opaque("d"), whiteout("d/z")),
    )
    lowest = apply_all(snapshotter, layer(directory("d"), whiteout("d/x"), opaque("d"), file("f")))

    assert sketch(snapshotter.mount(chain, "m")) == {"d": "directory", "e": "directory", "f": b""}
    found = facts(snapshotter.mount(lowest, "n"))
    assert sorted(found) == [".", "d", "f"]
    assert found["d"].xattrs == ()


def test_one_file_of_two_snapshots_takes_room_once(snapshotter):
    """A child has its own layer's files on disk and nothing else."""
    parent = apply_all(snapshotter, layer(file("big", os.urandom(1 << 20))))
    chain = apply(snapshotter, parent, layer(file("small")))

    assert [path.name for path in snapshotter._store.files(chain).iterdir()] == ["small"]


def child(root: Path, body: str) -> subprocess.Popen:
    """Start a process that runs *body* with a snapshotter ``s``, prints a line and waits."""
    lines = [
        "import sys, time",
        "from pathlib import Path",
        "from storage.snapshots import OverlaySnapshotter, CopyingSnapshotter",
        "from tests.doubles.layers import *",
        "from cluster.digest import chain_id, digest_of",
        f"s = OverlaySnapshotter(Path({str(root)!r}))",
        body,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def killed(process: subprocess.Popen) -> None:
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()


WAIT = "print('ready', flush=True); time.sleep(600)"


def test_kill_9_while_unpacking_leaves_staging_that_recover_removes(snapshotter, tmp_path):
    """I9: nothing is published, and the lock of its staging directory went with the process."""
    killed(
        child(
            tmp_path / "node",
            f"""
what = layer(file("a"), file("d/f"))
def wait():
    {WAIT}
s.apply(chain=what.diff_id, parent=chain_id(None, digest_of(b"p")), layer=what.descriptor,
        stream=Bytes(what.blob), await_parent=wait)
""",
        )
    )
    staging = tmp_path / "node" / "overlay" / "staging"
    (left,) = staging.iterdir()
    assert (left / "fs" / "a").exists()

    assert snapshotter.recover() == [f"staging/{left.name}"]
    assert list(staging.iterdir()) == []
    assert list(snapshotter.snapshots()) == []


def test_mounts_outlive_their_process_and_are_found(snapshotter, tmp_path):
    """Programs may run from them: recover keeps what shows a published snapshot, unmount undoes it."""
    killed(
        child(
            tmp_path / "node",
            f"""
chain = apply_all(s, layer(file("f", b"1")), layer(file("g", b"2")))
s.mount(chain, "kept")
{WAIT}
""",
        )
    )

    assert snapshotter.recover() == []
    assert {name: sketch(path) for name, path in snapshotter.mounts().items()} == {"kept": {"f": b"1", "g": b"2"}}
    snapshotter.unmount("kept")
    assert snapshotter.mounts() == {}


def test_stale_mounts_are_removed(snapshotter, tmp_path):
    """Of a snapshot that is gone, of no known chain, or noted and never mounted."""
    one = apply_all(snapshotter, layer(file("f", b"1")))
    two = apply(snapshotter, one, layer(file("g")))
    point = snapshotter.mount(two, "of-a-gone-one")
    unknown = snapshotter.mount(one, "of-no-chain")
    kept = snapshotter.mount(one, "kept")
    node = tmp_path / "node" / "overlay"
    (node / "mounted" / "of-no-chain").unlink()
    (node / "mounted" / "never").write_text(one)
    (node / "mnt" / "never-either").mkdir()
    shutil.rmtree(node / "s" / short_name(two))

    removed = snapshotter.recover()

    assert sorted(removed) == ["mnt/never", "mnt/never-either", "mnt/of-a-gone-one", "mnt/of-no-chain"]
    assert snapshotter.mounts() == {"kept": kept}
    assert not {point, unknown} & mount_points()
    assert snapshotter.recover() == []


def test_a_mount_in_use_is_still_unmounted(snapshotter):
    """It disappears from sight; who has a file of it open may finish."""
    chain = apply_all(snapshotter, layer(file("f", b"1")), layer(file("g")))
    with (snapshotter.mount(chain, "busy") / "f").open("rb") as held:
        snapshotter.unmount("busy")
        assert snapshotter.mounts() == {}
        assert held.read() == b"1"


def test_both_snapshotters_share_a_directory(snapshotter, tmp_path):
    """Each keeps its own: neither sees the other's snapshots."""
    copying = CopyingSnapshotter(tmp_path / "node")
    chain = apply_all(snapshotter, layer(file("f")))

    assert not copying.has(chain)
    assert copying.recover() == []
    assert snapshotter.has(chain)


def test_the_upper_directory_is_what_overlayfs_wants(snapshotter):
    """Whiteouts are character devices 0:0, opaque directories have the mark, and nothing else does."""
    below = layer(directory("d"), file("d/f"), file("gone"), directory("p"), file("p/x"))
    parent = apply_all(snapshotter, below)
    above = layer(directory("d"), opaque("d"), whiteout("gone"), directory("p"), whiteout("p/x"), directory("q"))
    chain = chain_id(parent, above.diff_id)
    snapshotter.apply(
        chain=chain,
        parent=parent,
        layer=above.descriptor,
        stream=Bytes(above.blob),
        await_parent=lambda: None,
    )
    upper = snapshotter._store.files(chain)

    for name in ("gone", "p/x"):
        status = (upper / name).lstat()
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == 0
    marks = {path.name: os.listxattr(path) for path in (upper / "d", upper / "p", upper / "q")}
    assert marks == {"d": ["trusted.overlay.opaque"], "p": [], "q": []}
