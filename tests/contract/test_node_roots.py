"""The nodes' directories of one machine: a live one stays, whatever its worker's state; a dead one goes, in time."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage import node_roots
from storage.node_roots import DeadNodes, hold_node_root
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.doubles.another_process import READY, another_process
from tests.doubles.layers import apply_all, file, layer
from tests.doubles.stores import FakeClock

GRACE_S = 600.0
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def nodes(tmp_path):
    held = hold_node_root(tmp_path / "n0")
    yield tmp_path
    os.close(held)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def dead(nodes, clock):
    return DeadNodes(nodes / "n0", grace_s=GRACE_S, clock=clock)


@contextmanager
def worker(root: Path):
    """Have a process of its own hold a node's directory; it is killed in the end."""
    program = f"""
import time
from pathlib import Path
from storage.node_roots import hold_node_root
hold_node_root(Path({str(root)!r}))
print({READY!r}, flush=True)
time.sleep(600)
"""
    with another_process(program) as process:
        yield process


def leave(root: Path) -> None:
    """Make what a node leaves: a directory that was held, with a snapshot in it."""
    os.close(hold_node_root(root))
    apply_all(CopyingSnapshotter(root / "snapshots"), layer(file("f", b"1")))


def test_a_live_node_stays_and_goes_a_grace_after_its_worker(nodes, dead, clock):
    """Paused or idle, it is held; killed, it may be starting anew."""
    with worker(nodes / "n1") as process:
        assert dead.sweep() == []
        clock.advance(2 * GRACE_S)
        process.send_signal(signal.SIGSTOP)
        assert dead.sweep() == []
    assert dead.sweep() == []
    clock.advance(GRACE_S - 1)
    assert dead.sweep() == []
    clock.advance(1)
    assert dead.sweep() == ["n1"]
    assert [path.name for path in nodes.iterdir()] == ["n0"]


def test_who_comes_back_begins_the_grace_anew(nodes, dead, clock):
    """It was free twice, and each time not for long."""
    leave(nodes / "n1")
    assert dead.sweep() == []
    clock.advance(GRACE_S - 1)
    held = hold_node_root(nodes / "n1")
    assert dead.sweep() == []
    os.close(held)
    clock.advance(2)
    assert dead.sweep() == []
    assert (nodes / "n1" / "snapshots").is_dir()


def test_what_is_no_nodes_directory_stays(nodes, dead, clock):
    """Files, other people's directories, and those of releases that held none."""
    (nodes / "notes").write_text("mine")
    (nodes / "old" / "snapshots").mkdir(parents=True)
    dead.sweep()
    clock.advance(GRACE_S)
    assert dead.sweep() == []
    assert {path.name for path in nodes.iterdir()} == {"n0", "notes", "old"}


@pytest.mark.root
@is_root
def test_mounts_go_first(nodes, dead, clock):
    """Nothing is removed through a mount, behind which may be anything."""
    snapshotter = OverlaySnapshotter(nodes / "n1" / "snapshots")
    point = snapshotter.mount(apply_all(snapshotter, layer(file("f", b"1")), layer(file("g"))), "m")
    os.close(hold_node_root(nodes / "n1"))
    dead.sweep()
    clock.advance(GRACE_S)
    assert dead.sweep() == ["n1"]
    assert not point.exists()


def test_what_resists_is_tried_again(nodes, dead, clock, monkeypatch):
    """Cut off halfway it is found again, as the lock goes last."""
    leave(nodes / "n1")
    dead.sweep()
    clock.advance(GRACE_S)

    def refuse(path):
        raise PermissionError(13, "refused", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(node_roots, "remove_tree", refuse)
        assert dead.sweep() == []
    assert dead.sweep() == ["n1"]


def test_a_node_that_starts_waits_for_the_end_of_its_removal(nodes, dead, clock, monkeypatch):
    """And has a new directory then, not one that is going."""
    leave(nodes / "n1")
    dead.sweep()
    clock.advance(GRACE_S)
    held: list[int] = []
    starting = threading.Thread(target=lambda: held.append(hold_node_root(nodes / "n1")))
    removing = node_roots.remove_tree

    def slowly(path):
        starting.start()
        starting.join(timeout=0.05)
        assert starting.is_alive()
        removing(path)

    monkeypatch.setattr(node_roots, "remove_tree", slowly)
    assert dead.sweep() == ["n1"]
    starting.join(timeout=30)
    try:
        assert [path.name for path in (nodes / "n1").iterdir()] == ["lock"]
        clock.advance(GRACE_S)
        assert dead.sweep() == []
    finally:
        os.close(held[0])
