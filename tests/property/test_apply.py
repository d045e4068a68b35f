"""Random layers, nasty ones too: nothing outside is touched, and both snapshotters come to the model's tree."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.descriptor import Compression
from cluster.errors import LayerError
from storage.snapshots import CopyingSnapshotter, OverlaySnapshotter
from tests.doubles.layers import (
    Item,
    apply,
    directory,
    facts,
    file,
    hard_link,
    layer,
    layer_of,
    opaque,
    symlink,
    whiteout,
)

Path_ = tuple[str, ...]


# -- the model: what layers mean, said with dictionaries -------------------------------------------------


class RefusedError(Exception):
    """The model says that the layer must be refused."""


@dataclass(eq=False)
class Thing:
    """A file of the model; hard links are one thing under several paths."""

    kind: str
    what: object = None
    mode: int = 0o755
    mtime: int = 0
    implied: bool = False


@dataclass
class LayerModel:
    """One layer unpacked on the tree *lower*: the rules of ``storage/snapshots/unpack.py``, naively."""

    lower: dict[Path_, Thing]
    upper: dict[Path_, Thing] = field(default_factory=dict)
    whiteouts: set[Path_] = field(default_factory=set)
    opaque: set[Path_] = field(default_factory=set)
    #: Directories that are others than those below, not just emptied.
    fresh: set[Path_] = field(default_factory=set)

    def copy(self) -> LayerModel:
        return LayerModel(self.lower, dict(self.upper), set(self.whiteouts), set(self.opaque), set(self.fresh))

    def below(self, path: Path_) -> Thing | None:
        for length in range(len(path) + 1):
            prefix = path[:length]
            if prefix in self.whiteouts:
                return None
            if length < len(path) and (
                prefix in self.opaque or self.upper.get(prefix, Thing("directory")).kind != "directory"
            ):
                return None
            if length < len(path) and length and self.lower.get(prefix, Thing("")).kind != "directory":
                return None
        return self.lower.get(path)

    def at(self, path: Path_) -> Thing | None:
        return self.upper.get(path) or self.below(path)

    def resolve(self, steps: list[str], *, make: bool) -> Path_ | None:
        path: Path_ = ()
        pending, links = list(steps), 0
        while pending:
            step = pending.pop(0)
            if step in ("", "."):
                continue
            if step == "..":
                path = path[:-1]
                continue
            child = (*path, step)
            thing = self.at(child)
            if thing is not None and thing.kind == "symlink":
                links += 1
                if links > 40:
                    raise RefusedError
                target = str(thing.what)
                path = () if target.startswith("/") else path
                pending = target.split("/") + pending
                continue
            if thing is None and not make:
                return None
            if thing is not None and thing.kind != "directory":
                raise RefusedError
            if make and child not in self.upper:
                self.mkdir(child, Thing("directory", implied=True))
            path = child
        return path

    def mkdir(self, path: Path_, thing: Thing) -> None:
        if path in self.whiteouts:
            self.whiteouts.discard(path)
            self.opaque.add(path)
            self.fresh.add(path)
        self.upper[path] = thing

    def clear(self, path: Path_) -> None:
        for inner in [p for p in self.upper if p[: len(path)] == path]:
            del self.upper[inner]
        self.whiteouts = {p for p in self.whiteouts if p == path or p[: len(path)] != path}
        self.opaque = {p for p in self.opaque if p[: len(path)] != path}
        self.fresh = {p for p in self.fresh if p[: len(path)] != path}

    def split(self, name: str) -> list[str]:
        steps: list[str] = []
        for step in name.split("/"):
            if step == "..":
                if steps:
                    steps.pop()
                elif not name.startswith("/"):
                    raise RefusedError
            elif step not in ("", "."):
                steps.append(step)
        return steps

    def add(self, item: Item) -> None:
        steps = self.split(item.name)
        if not steps:
            if item.kind != b"5":
                raise RefusedError
            return
        *parents, base = steps
        if base == ".wh..wh..opq":
            self.opaque.add(self.resolve(parents, make=True))
            return
        if base.startswith(".wh."):
            path = (*self.resolve(parents, make=True), base[4:])
            own = self.upper.get(path)
            if own is None:
                self.whiteouts.add(path)
            elif own.kind == "directory":
                self.opaque.add(path)
                self.fresh.add(path)
            return
        path = (*self.resolve(parents, make=True), base)
        kind = {b"0": "file", b"5": "directory", b"2": "symlink", b"1": "link"}[item.kind]
        if kind == "directory":
            thing = Thing("directory", None, item.mode, int(item.mtime))
            own = self.upper.get(path)
            if own is None:
                self.mkdir(path, thing)
            elif own.kind == "directory":
                self.upper[path] = thing
            else:
                self.clear(path)
                self.whiteouts.discard(path)
                self.upper[path] = thing
                self.opaque.add(path)
            return
        thing = self.target(item, path) if kind == "link" else None
        if kind == "link" and thing is None:
            return
        self.clear(path)
        what = item.data if kind == "file" else item.link
        self.upper[path] = thing or Thing(kind, what, item.mode, int(item.mtime))
        # The name is taken in this layer: what is below stays hidden by it, whiteout or not.
        self.whiteouts.add(path)

    def target(self, item: Item, path: Path_) -> Thing | None:
        steps = self.split(item.link)
        if not steps:
            raise RefusedError
        parent = self.resolve(steps[:-1], make=False)
        if parent is None:
            raise RefusedError
        self.resolve(steps[:-1], make=True)
        target = (*parent, steps[-1])
        thing = self.upper.get(target)
        if target == path and thing is not None:
            if thing.kind == "directory":
                return None
            return None
        if thing is None:
            below = self.below(target)
            if below is None:
                raise RefusedError
            if below.kind == "directory":
                raise RefusedError
            thing = replace(below)
            self.upper[target] = thing
            if target == path:
                return None
        if thing.kind == "directory" or target[: len(path)] == path:
            raise RefusedError
        return thing

    def visible(self) -> dict[Path_, Thing]:
        found = {path: self.below(path) for path in self.lower}
        tree = {path: thing for path, thing in found.items() if thing is not None}
        for path, thing in self.upper.items():
            if thing.implied:
                below = None if path in self.fresh else self.below(path)
                tree[path] = below if below is not None and below.kind == "directory" else Thing("directory")
            else:
                tree[path] = thing
        return tree


def told(tree: dict[Path_, Thing]) -> dict[str, tuple]:
    firsts: dict[int, str] = {}
    return {
        name: (
            thing.kind,
            thing.what,
            thing.mode if thing.kind != "symlink" else 0,
            thing.mtime,
            firsts.setdefault(id(thing), name) if thing.kind != "directory" else name,
        )
        for name, thing in sorted(("/".join(path), thing) for path, thing in tree.items())
    }


def told_by_disk(root: Path) -> dict[str, tuple]:
    found = {}
    firsts: dict[str, str] = {}
    for name, fact in sorted(facts(root).items()):
        if name == ".":
            continue
        found[name] = (
            fact.kind,
            None if fact.kind == "directory" else fact.what,
            0 if fact.kind == "symlink" else fact.mode,
            fact.mtime_ns // 1_000_000_000,
            firsts.setdefault(fact.first, name) if fact.kind != "directory" else name,
        )
    return found


# -- random layers -------------------------------------------------------------------------------------

# Few names, so that entries meet; the victim lies beside the roots, where `..` and absolute links would lead.
STEP = st.sampled_from(["a", "b"])
PLAIN = st.one_of(STEP, STEP, st.lists(STEP, min_size=2, max_size=3).map("/".join))
NASTY = st.lists(st.sampled_from(["a", "b", "..", ".", "", "victim"]), min_size=1, max_size=5).map("/".join)
NAME = st.one_of(PLAIN, PLAIN, PLAIN, PLAIN, PLAIN, NASTY.filter(lambda name: name.strip("/.") != ""))
TARGET = st.one_of(
    PLAIN,
    PLAIN,
    PLAIN.map("/{}".format),
    PLAIN.map("../{}".format),
    NASTY,
    st.sampled_from(["..", "/", "../../../../../../../../..", "{victim}", "../victim", "/../{victim}/secret"]),
).filter(bool)
MTIME = st.integers(1, 9)
ITEM = st.one_of(
    st.builds(lambda n, d, t: file(n, d, mtime=t), NAME, st.binary(max_size=3), MTIME),
    st.builds(lambda n, m, t: directory(n, m, mtime=t), NAME, st.sampled_from([0o755, 0o700, 0o555]), MTIME),
    st.builds(lambda n, to, t: symlink(n, to, mtime=t), NAME, TARGET, MTIME),
    st.builds(hard_link, NAME, TARGET),
    st.builds(whiteout, PLAIN),
    st.builds(opaque, st.one_of(PLAIN, st.just(""))),
)
LAYERS = st.lists(st.lists(ITEM, max_size=8), min_size=1, max_size=4)

# Found by breaking the code on purpose: each of these is what tells one such break from the truth.
TELLING = [
    [[directory("b"), symlink("a", "b")], [file("a/x"), directory("a"), file("a/y")]],
    [[directory("b"), directory("a"), symlink("a/l", "/b"), file("a/l/x")]],
    [[file("a", b"1")], [file("a", b"2"), whiteout("a")]],
    [[file("a", b"1")], [whiteout("a"), file("a", b"2")]],
    [[directory("a"), file("a/x")], [whiteout("a"), file("a"), directory("a"), file("a/y")]],
    [[directory("a"), file("a/x")], [file("a"), directory("a"), file("a/y")]],
    [[directory("a"), directory("a/b"), symlink("s", "a/b/../.."), file("s/x")]],
    [[directory("a"), file("a/x"), directory("b"), symlink("a", "b"), file("a/y")]],
    [[directory("a"), file("a/x")], [whiteout("a"), file("a/y")]],
    [[directory("a", 0o700), file("a/x")], [file("a/y"), opaque("a")]],
    [[directory("a"), file("a/x"), file("b")], [hard_link("b", "a/x"), whiteout("a/x"), hard_link("c", "b")]],
]


def snapshotters(root: Path):
    yield CopyingSnapshotter(root / "node")
    if os.geteuid() == 0:
        yield OverlaySnapshotter(root / "node")


def outside(root: Path) -> dict:
    return {name: fact for name, fact in facts(root).items() if not name.startswith("node") and name != "."}


def telling(test):
    for layers in TELLING:
        test = example(layers, False)(test)
    return test


@pytest.mark.root
@pytest.mark.timeout(600)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYERS, st.booleans())
@telling
def test_layers_mean_what_the_model_says_and_nothing_outside_is_touched(layers, keep_refused):
    """Accepted and refused alike; a refused layer is left out, and the next goes on its parent."""
    with tempfile.TemporaryDirectory(prefix="apply-") as scratch:
        root = Path(scratch)
        victim = root / "victim"
        victim.mkdir()
        (victim / "secret").write_text("mine")
        before = outside(root)
        for snapshotter in snapshotters(root):
            tree: dict[Path_, Thing] = {}
            chain = None
            for items in layers:
                model = LayerModel(tree)
                real: list[Item] = []
                is_refused = False
                for item in items:
                    real.append(replace(item, link=item.link.replace("{victim}", str(victim))))
                    before_item = model.copy()
                    try:
                        model.add(real[-1])
                    except RefusedError:
                        # One bad entry spoils its layer: mostly left out, so that the others get their turn.
                        if keep_refused:
                            is_refused = True
                            break
                        real.pop()
                        model = before_item
                # One more entry, so that equal layers are no equal chains.
                stamp = file("stamp", b"%d" % id(items))
                try:
                    made = apply(snapshotter, chain, layer(*real, stamp, compression=Compression.NONE))
                except LayerError:
                    made = None
                assert (made is None) == is_refused
                if made is not None:
                    model.add(stamp)
                    chain, tree = made, model.visible()
            if chain is not None:
                path = snapshotter.mount(chain, "look")
                try:
                    assert told_by_disk(path) == told(tree)
                finally:
                    snapshotter.unmount("look")
            assert outside(root) == before
            assert list((root / "node" / snapshotter.name / "staging").iterdir()) == []


@pytest.mark.root
@pytest.mark.timeout(600)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYERS)
def test_a_diff_of_any_tree_makes_it_again(layers):
    """Of each layer to its parent and to the lowest, on both snapshotters."""
    with tempfile.TemporaryDirectory(prefix="diff-") as scratch:
        for snapshotter in snapshotters(Path(scratch)):
            chains = []
            for items in layers:
                parent = chains[-1] if chains else None
                try:
                    chains.append(apply(snapshotter, parent, layer(*items, file("stamp", b"%d" % len(chains)))))
                except LayerError:
                    continue
            for below, chain in [*itertools.pairwise(chains), (None, chains[-1] if chains else None)]:
                if chain is None:
                    continue
                for base in {below, chains[0] if chain != chains[0] else None}:
                    out = io.BytesIO()
                    snapshotter.diff(chain, base, out)
                    again = apply(snapshotter, base, layer_of(out.getvalue(), Compression.NONE))
                    try:
                        assert facts(snapshotter.mount(again, "again")) == facts(snapshotter.mount(chain, "chain"))
                    finally:
                        snapshotter.unmount("again")
                        snapshotter.unmount("chain")
