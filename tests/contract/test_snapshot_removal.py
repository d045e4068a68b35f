"""Removing snapshots that any process of the node may use: what is used stays, by whoever and however they end."""

from __future__ import annotations

import io
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.digest import EMPTY_CHAIN, chain_id, digest_of
from cluster.errors import SnapshotGoneError
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from storage.snapshots import store as store_module
from storage.snapshots.store import short_name
from tests.doubles.another_process import another_process
from tests.doubles.layers import apply, apply_all, file, layer, sketch

KINDS = {"overlay": OverlaySnapshotter, "copying": CopyingSnapshotter}
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
OVERLAY = pytest.param("overlay", marks=[pytest.mark.root, is_root])
ONE, TWO, OTHER = layer(file("f", b"1")), layer(file("g", b"2")), layer(file("h", b"3"))
_IN_USE = "a process uses it"


@pytest.fixture(params=[OVERLAY, "copying"])
def snapshotter(request, tmp_path):
    made = KINDS[request.param](tmp_path / "node")
    yield made
    clear(made)
    assert list((tmp_path / "node" / made.name / "staging").iterdir()) == []


def clear(made) -> None:
    for name in list(made.mounts()):
        made.unmount(name)


def over(parent, what):
    return chain_id(parent, what.diff_id)


@contextmanager
def another(snapshotter, body: str):
    """Run *body* in a process of its own, which has the snapshotter as ``made``, and kill it in the end.

    Yields once it has said so by ``ready()``.
    """
    node = snapshotter._store.root.parent
    program = f"""
import sys, time
from pathlib import Path
from cluster.digest import chain_id
from storage.snapshots import store
from tests.contract.test_snapshot_removal import KINDS, ONE, TWO, OTHER
from tests.doubles.layers import Bytes, apply, apply_all
made = KINDS[{snapshotter.name!r}](Path({str(node)!r}))
def ready():
    print("ready", flush=True)
    time.sleep(600)
{body}
"""
    with another_process(program) as process:
        yield process


# -- what is used stays --------------------------------------------------------------------------------


def test_what_nothing_uses_goes(snapshotter):
    """From sight and from the disk; what isn't there has gone already."""
    chain = apply_all(snapshotter, ONE)

    assert snapshotter.remove(chain) == ""
    assert snapshotter.remove(chain) == ""
    assert snapshotter.remove(digest_of(b"never")) == ""

    assert not snapshotter.has(chain)
    assert not snapshotter._store.path(chain).exists()


def test_what_is_mounted_stays(snapshotter):
    """Until it is unmounted; and all that it is made of."""
    one = apply_all(snapshotter, ONE)
    two = apply(snapshotter, one, TWO)
    point = snapshotter.mount(two, "m")

    assert snapshotter.remove(two).startswith("it is mounted at ")
    assert sketch(point) == {"f": b"1", "g": b"2"}

    snapshotter.unmount("m")
    assert snapshotter.remove(two) == ""
    assert snapshotter.remove(one) == ""


def test_children_go_before_parents(snapshotter):
    """Where a snapshot has its own layer's files only. A whole tree stands by itself."""
    one = apply_all(snapshotter, ONE)
    two = apply(snapshotter, one, TWO)

    if snapshotter.has_parts:
        assert snapshotter.remove(one) == f"snapshot {short_name(two)} stands on it"
        assert sketch(snapshotter.mount(two, "m")) == {"f": b"1", "g": b"2"}
        clear(snapshotter)
        assert snapshotter.remove(two) == ""
        assert snapshotter.remove(one) == ""
    else:
        assert snapshotter.remove(one) == ""
        assert sketch(snapshotter.mount(two, "m")) == {"f": b"1", "g": b"2"}


def test_what_a_workspace_stands_on_stays(snapshotter):
    """As long as it is open."""
    one = apply_all(snapshotter, ONE)
    with snapshotter.workspace(one, "build") as workspace:
        (workspace.path / "g").write_bytes(b"2")
        assert snapshotter.remove(one)
        workspace.commit(io.BytesIO(), source_date_epoch=None)
        assert snapshotter.remove(one) == _IN_USE
    assert snapshotter.remove(one) == ""


def test_what_is_unpacked_onto_stays(snapshotter, monkeypatch):
    """From when it is waited for until what stands on it is published."""
    one = apply_all(snapshotter, ONE)
    answers = []
    finish = snapshotter._finish

    def asked_to_go(*args):
        answers.append(snapshotter.remove(one))
        finish(*args)

    monkeypatch.setattr(snapshotter, "_finish", asked_to_go)
    apply(snapshotter, one, TWO)

    assert answers == [_IN_USE]


def test_what_is_read_stays(snapshotter):
    """As long as the reader holds it."""
    one = apply_all(snapshotter, ONE)
    with snapshotter.hold(one, "reading"), snapshotter.hold(EMPTY_CHAIN, "reading"):
        assert snapshotter.remove(one) == _IN_USE
        assert snapshotter.tree(one).root.child(b"f") is not None
    assert snapshotter.remove(one) == ""
    with pytest.raises(SnapshotGoneError, match=r"reading .* not on this node"), snapshotter.hold(one, "reading"):
        pass


def test_what_was_used_since_it_was_seen_stays(snapshotter):
    """Whoever asks elsewhere whether it is needed, and is answered no, does not remove what was needed since."""
    one = apply_all(snapshotter, ONE)
    seen_ns = snapshotter._store.last_used_ns(one)
    assert snapshotter.use(one)

    assert snapshotter.remove(one, last_used_ns=seen_ns) == "it was used meanwhile"

    assert snapshotter.has(one)
    assert snapshotter.remove(one, last_used_ns=snapshotter._store.last_used_ns(one)) == ""
    assert not snapshotter.use(one)


# -- unmounting what nobody wants -----------------------------------------------------------------------


def test_an_idle_mount_is_undone(snapshotter):
    """Of the chain that it was seen to be of; what isn't there is undone already."""
    one = apply_all(snapshotter, ONE)
    snapshotter.mount(one, "m")
    (seen,) = snapshotter.mounted()
    assert (seen.name, seen.chain) == ("m", one)

    assert snapshotter.unmount_idle("m", last_used_ns=seen.last_used_ns) == ""
    assert snapshotter.unmount_idle("m", last_used_ns=seen.last_used_ns) == ""

    assert snapshotter.mounts() == {}
    assert snapshotter.mounted() == []


def test_a_mount_that_was_asked_for_since_stays(snapshotter):
    """Who mounts what is mounted already counts on it."""
    one = apply_all(snapshotter, ONE)
    snapshotter.mount(one, "m")
    (seen,) = snapshotter.mounted()
    path = snapshotter.mount(one, "m")

    assert snapshotter.unmount_idle("m", last_used_ns=seen.last_used_ns) == "it was mounted again meanwhile"

    assert sketch(path) == {"f": b"1"}


@pytest.mark.root
@is_root
def test_a_mount_that_a_process_is_in_stays(tmp_path):
    """A program that runs from it goes on; whoever unmounts it for good still may."""
    made = OverlaySnapshotter(tmp_path / "node")
    one = apply_all(made, ONE)
    try:
        with (made.mount(one, "m") / "f").open("rb"):
            (seen,) = made.mounted()
            assert "busy" in made.unmount_idle("m", last_used_ns=seen.last_used_ns)
            assert made.remove(one).startswith("it is mounted at ")
        assert made.unmount_idle("m", last_used_ns=seen.last_used_ns) == ""
    finally:
        clear(made)


# -- other processes ------------------------------------------------------------------------------------


def test_another_processs_workspace_keeps_its_parent(snapshotter):
    """And where that process was killed, what the kernel still shows of it does, until that is cleared away."""
    one = apply_all(snapshotter, ONE)
    with another(snapshotter, 'workspace = made.workspace(ONE.diff_id, "build"); ready()'):
        assert snapshotter.remove(one)
    if snapshotter.has_parts:
        assert snapshotter.remove(one).startswith("it is mounted at ")
    snapshotter.recover()
    assert snapshotter.remove(one) == ""


def test_another_process_that_unpacks_keeps_the_parent(snapshotter):
    """Killed, it holds nothing any more."""
    one = apply_all(snapshotter, ONE)
    body = """
made.apply(
    chain=chain_id(ONE.diff_id, OTHER.diff_id), parent=ONE.diff_id, layer=OTHER.descriptor,
    stream=Bytes(OTHER.blob), await_parent=lambda: setattr(store.Store, "publish", lambda *_, **__: ready()),
)
"""
    with another(snapshotter, body):
        assert snapshotter.remove(one) == _IN_USE
    assert snapshotter.remove(one) == ""
    snapshotter.recover()


def test_a_killed_remover_leaves_it_gone(snapshotter):
    """Once out of sight it is removed by whoever recovers, and can be unpacked anew at once."""
    one = apply_all(snapshotter, ONE)
    with another(snapshotter, "store.remove_tree = lambda path: ready(); made.remove(ONE.diff_id)"):
        assert not snapshotter.has(one)
        assert apply(snapshotter, None, ONE) == one
        assert snapshotter.recover() == []
    assert len(snapshotter.recover()) == 1
    assert list(snapshotter.snapshots()) == [one]


def test_a_killed_remover_that_had_only_locked_it_leaves_it_whole(snapshotter):
    """Users wait for it no longer than it lives."""
    one = apply_all(snapshotter, ONE)
    used = threading.Thread(target=snapshotter.use, args=(one,))
    with another(snapshotter, "store.Store._user_of = lambda *_: ready(); made.remove(ONE.diff_id)"):
        assert snapshotter.remove(one) == _IN_USE
        used.start()
    used.join(timeout=30)
    assert not used.is_alive()
    assert len(snapshotter.recover()) == 1
    assert snapshotter.remove(one) == ""


# -- publishing against removing --------------------------------------------------------------------------


def test_a_child_is_not_published_on_what_is_removed_at_that_moment(snapshotter, monkeypatch):
    """The last step before the rename looks again, under the parent's lock."""
    one = apply_all(snapshotter, ONE)
    workspace = snapshotter.workspace(one, "build")
    (workspace.path / "g").write_bytes(b"2")
    diff_id = workspace.commit(io.BytesIO(), source_date_epoch=None)
    path = snapshotter._store.path(one)
    path.rename(path.with_name("elsewhere"))  # as if the lock were not heeded
    try:
        if snapshotter.has_parts:
            with pytest.raises(SnapshotGoneError, match="publishing onto"):
                workspace.publish(chain_id(one, diff_id))
            assert not snapshotter.has(chain_id(one, diff_id))
        else:
            assert workspace.publish(chain_id(one, diff_id))
    finally:
        workspace.discard()


def test_what_is_damaged_is_replaced_and_what_replaced_it_stays(snapshotter, monkeypatch):
    """Two who find a damaged one in the way remove that one, and not what the first of them has published."""
    one = apply_all(snapshotter, ONE)
    note = snapshotter._store.path(one) / "snapshot.json"
    whole = note.read_bytes()
    note.write_bytes(b"{")
    locking = store_module.lock_in_place

    def late(path, how):
        if path == note.parent:
            note.write_bytes(whole)  # the other one has published it
        return locking(path, how)

    monkeypatch.setattr(store_module, "lock_in_place", late)

    assert not snapshotter._store._drop(note.parent)
    assert snapshotter.has(one)
    note.write_bytes(b"{")
    monkeypatch.undo()
    assert not snapshotter.has(one)
    assert apply(snapshotter, None, ONE) == one
    assert snapshotter.has(one)


def test_threads_that_unpack_and_remove_leave_whole_chains(snapshotter):
    """Whatever the order: a published child's parts are there, and who lost its parent is told so."""
    one = over(None, ONE)
    two = over(one, TWO)
    parts: list[bool] = []
    stop = threading.Event()

    def unpack():
        try:
            for _ in range(12):
                with suppress(SnapshotGoneError):
                    apply(snapshotter, None, ONE)
                    apply(snapshotter, one, TWO)
                    with snapshotter.hold(two, "looking"):
                        parts.append(snapshotter.has(one))
        finally:
            stop.set()

    def remove():
        while not stop.is_set():
            for chain in (one, two):
                snapshotter.remove(chain)

    threads = [threading.Thread(target=unpack), threading.Thread(target=remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert all(parts) or not snapshotter.has_parts


# -- any order ----------------------------------------------------------------------------------------------


class Removal(RuleBasedStateMachine):
    """Chains of one fork, A, A-B, A-B-C and A-D, published, mounted, held and removed in any order."""

    kind = "copying"
    root: Path

    def __init__(self):
        super().__init__()
        self.made = KINDS[self.kind](self.root / os.urandom(6).hex())
        self.layers = dict(zip("ABCD", (layer(file(name, name.encode())) for name in "ABCD"), strict=True))
        self.below = {"A": None, "B": "A", "C": "B", "D": "A"}
        self.chains = {}
        for name, below in self.below.items():
            self.chains[name] = over(self.chains.get(below), self.layers[name])
        self.there: set[str] = set()
        self.mounted: set[str] = set()
        self.holds: dict[str, list] = {}

    names = st.sampled_from("ABCD")

    @initialize()
    def first(self):
        self.publish("A")

    @rule(name=names)
    def publish(self, name):
        below = self.below[name]
        if below is not None and below not in self.there:
            with pytest.raises(SnapshotGoneError):
                apply(self.made, self.chains[below], self.layers[name])
            # What is there is whole already, and stays; what isn't does not come.
            return
        apply(self.made, self.chains.get(below), self.layers[name])
        self.there.add(name)

    @rule(name=names)
    def mount(self, name):
        if name in self.there:
            self.made.mount(self.chains[name], name)
            self.mounted.add(name)
        else:
            with pytest.raises(SnapshotGoneError):
                self.made.mount(self.chains[name], name)

    @rule(name=names)
    def unmount(self, name):
        self.made.unmount(name)
        self.mounted.discard(name)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def hold(self, data):
        name = data.draw(st.sampled_from(sorted(self.there)))
        held = self.made.hold(self.chains[name], "testing")
        held.__enter__()
        self.holds.setdefault(name, []).append(held)

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(sorted(name for name, held in self.holds.items() if held)))
        self.holds[name].pop().__exit__(None, None, None)

    @rule(name=names)
    def remove(self, name):
        is_used = name in self.mounted or bool(self.holds.get(name))
        if self.made.has_parts:
            is_used |= any(self.below[each] == name for each in self.there)
        said = self.made.remove(self.chains[name])
        if name in self.there and is_used:
            assert said
        else:
            assert said == ""
            self.there.discard(name)

    @invariant()
    def what_is_there_is_there(self):
        assert {name for name, chain in self.chains.items() if self.made.has(chain)} == self.there
        for name in self.mounted:
            path = self.made.mounts()[name]
            assert (path / name).read_bytes() == name.encode()
            assert (path / "A").read_bytes() == b"A"

    def teardown(self):
        for held in [each for holds in self.holds.values() for each in holds]:
            held.__exit__(None, None, None)
        clear(self.made)


@pytest.mark.parametrize("kind", [OVERLAY, "copying"])
def test_whatever_the_order_what_is_used_stays(kind, tmp_path):
    """Against a model of who uses what."""
    machine = type("Machine", (Removal,), {"kind": kind, "root": tmp_path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
