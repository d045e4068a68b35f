"""Local directories: what is taken of them, and that one content has one digest."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.digest import digest_of
from cluster.errors import InvalidTreeError, MalformedPayloadError, ScanError
from cluster.tree import EntryKind, Tree, TreeEntry, decode_tree, encode_tree
from lazyfarm.context import scan


def fill(root: Path, *files: str) -> Path:
    """Write files, each with its own path as content, and directories for those that end in a slash."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(name)
    return root


def paths(scanned) -> list[str]:
    return [entry.path for entry in scanned.tree.entries]


# -- what is taken ------------------------------------------------------------------------------------


def test_everything_is_taken_as_it_is(tmp_path):
    """Files with content and mode, directories also empty ones, symlinks as they are written, hidden ones too."""
    fill(tmp_path, "b/run.sh", ".hidden", "empty/")
    (tmp_path / "b" / "run.sh").chmod(0o4755)
    (tmp_path / "empty").chmod(0o700)
    (tmp_path / "b").chmod(0o755)
    (tmp_path / ".hidden").chmod(0o644)
    (tmp_path / "a").symlink_to("../elsewhere/x")
    (tmp_path / "loop").symlink_to(".")

    assert scan(tmp_path).tree.entries == (
        TreeEntry(".hidden", EntryKind.FILE, 0o644, 7, digest_of(b".hidden")),
        TreeEntry("a", EntryKind.SYMLINK, 0o777, link_target="../elsewhere/x"),
        TreeEntry("b", EntryKind.DIRECTORY, 0o755),
        TreeEntry("b/run.sh", EntryKind.FILE, 0o4755, 8, digest_of(b"b/run.sh")),
        TreeEntry("empty", EntryKind.DIRECTORY, 0o700),
        TreeEntry("loop", EntryKind.SYMLINK, 0o777, link_target="."),
    )


def test_order_is_by_component(tmp_path):
    """What is in a directory follows it, before its neighbours whose names begin alike."""
    fill(tmp_path, "a/x", "a.b", "a-b", "ab")

    assert paths(scan(tmp_path)) == ["a", "a/x", "a-b", "a.b", "ab"]


def test_each_content_can_be_read_somewhere(tmp_path):
    """Of files with one content, one is where it is read from."""
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same")

    scanned = scan(tmp_path)

    assert {digest: path.read_bytes() for digest, path in scanned.paths.items()} == {digest_of(b"same"): b"same"}
    assert scanned.tree.files == {digest_of(b"same"): 4}


def test_what_is_no_file_is_left_out_and_told(tmp_path):
    """Sockets and pipes are left out, without being opened."""
    fill(tmp_path, "file")
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.close()

    scanned = scan(tmp_path)

    assert paths(scanned) == ["file"]
    assert scanned.left_out == ("pipe", "socket")


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ([], ["docs"], ["Makefile", "src", "src/a.c", "src/a.o", "src/sub", "src/sub/b.c", "src/sub/b.o"]),
        ([], ["**/*.o", "docs", "Makefile"], ["src", "src/a.c", "src/sub", "src/sub/b.c"]),
        ([], ["*", "!docs/*.md"], ["docs", "docs/README.md"]),
        ([], ["src", "docs", "!src/sub"], ["Makefile", "src", "src/sub", "src/sub/b.c", "src/sub/b.o"]),
        ([], ["*", "!src", "src/sub"], ["src", "src/a.c", "src/a.o"]),
        (["src/sub"], [], ["src", "src/sub", "src/sub/b.c", "src/sub/b.o"]),
        (["**/*.c"], ["src/sub"], ["src", "src/a.c"]),
        (["nothing"], [], []),
        (["src/s*"], ["**/*.o"], ["src", "src/sub", "src/sub/b.c"]),
    ],
)
def test_patterns_choose(tmp_path, include, exclude, taken):
    """What is matched by include, if given, and not by exclude is taken, with the directories it is in."""
    fill(tmp_path, "Makefile", "docs/README.md", "docs/x.txt", "src/a.c", "src/a.o", "src/sub/b.c", "src/sub/b.o")

    assert paths(scan(tmp_path, include, exclude)) == taken


def test_what_is_excluded_is_not_read(tmp_path):
    """A directory that is left out isn't entered: nothing in it can be in the way."""
    fill(tmp_path, "a", "closed/x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/closed/\xff")).touch()

    assert paths(scan(tmp_path, exclude=["closed", "!other/*"])) == ["a"]
    assert paths(scan(tmp_path, include=["a"])) == ["a"]
    with pytest.raises(ScanError, match="closed"):
        scan(tmp_path)


def test_what_cant_be_scanned_is_named(tmp_path):
    """A missing directory, a file in place of one, and names that are not text are told with their path."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ScanError, match=path.name):
            scan(path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    with pytest.raises(ScanError, match="UTF-8"):
        scan(tmp_path)


def test_depth_is_no_limit(tmp_path):
    """A directory as deep as paths can be is scanned."""
    made = [tmp_path]
    for _ in range(1500):
        made.append(made[-1] / "d")
        made[-1].mkdir()

    assert len(scan(tmp_path, exclude=["x"]).tree.entries) == 1500

    for path in reversed(made[1:]):  # what removes tmp_path recurses
        path.rmdir()


# -- digests ------------------------------------------------------------------------------------------


def test_one_content_has_one_digest(tmp_path):
    """Times, owners and places don't matter; names, content and modes do."""
    first, second = fill(tmp_path / "1", "a/b", "c"), fill(tmp_path / "2", "c", "a/b")
    os.utime(second / "c", (1, 1))

    assert scan(first).digest == scan(second).digest
    (second / "c").chmod(0o600)
    changed = scan(second).digest
    assert changed != scan(first).digest
    (second / "c").write_text("d")
    assert scan(second).digest not in (changed, scan(first).digest)


# -- trees --------------------------------------------------------------------------------------------

DIGEST = digest_of(b"")


def a_file(path: str) -> TreeEntry:
    return TreeEntry(path, EntryKind.FILE, 0o644, 0, DIGEST)


def a_directory(path: str) -> TreeEntry:
    return TreeEntry(path, EntryKind.DIRECTORY, 0o755)


@pytest.mark.parametrize(
    "entries",
    [
        [a_file("b"), a_file("a")],
        [a_file("a"), a_file("a")],
        [a_file("a/b")],
        [a_file("a"), a_file("a/b")],
        [TreeEntry("a", EntryKind.SYMLINK, 0o777, link_target="/etc"), a_file("a/b")],
        [a_directory("a-b"), a_directory("a"), a_file("a/x")],
        [a_directory(".."), a_file("../x")],
        [a_file("/x")],
        [a_file(".")],
        [a_file("")],
        [a_file("x\0")],
        [TreeEntry("a", EntryKind.FILE, 0o644)],
        [TreeEntry("a", EntryKind.FILE, 0o644, 0, "sha256:no")],
        [TreeEntry("a", EntryKind.FILE, 0o100644, 0, DIGEST)],
        [TreeEntry("a", EntryKind.FILE, 0o644, -1, DIGEST)],
        [TreeEntry("a", EntryKind.FILE, 0o644, 0, DIGEST, "x")],
        [TreeEntry("a", EntryKind.DIRECTORY, 0o755, 0, DIGEST)],
        [TreeEntry("a", EntryKind.DIRECTORY, 0o755, 1)],
        [TreeEntry("a", EntryKind.SYMLINK, 0o777)],
    ],
)
def test_a_tree_that_would_reach_out_or_contradicts_itself_is_refused(entries):
    """A manifest from elsewhere can't name paths outside, under symlinks, twice, or in another order."""
    with pytest.raises(InvalidTreeError):
        Tree(tuple(entries))


@given(st.data())
def test_a_tree_comes_back_and_a_cut_one_doesnt(data):
    """A manifest has one payload, whose every proper start is malformed."""
    names = data.draw(st.lists(st.sampled_from(["a", "b", "ü", "a.b"]), unique=True))
    tree = Tree(tuple(a_file(name) for name in sorted(names)))
    payload = encode_tree(tree)

    assert decode_tree(payload) == tree
    with pytest.raises(MalformedPayloadError):
        decode_tree(payload[: data.draw(st.integers(0, len(payload) - 1))])
