"""Actions on files, on real trees: what BuildKit's copies come to, and that nothing leaves its root."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile

import pytest
import zstandard

from cluster.errors import FileActionError, InternalError, InvalidPatternError, UnknownUserError
from cluster.graph import CopyAction, FileOp, MakeDirectory, MakeFile
from cluster.patterns import PatternMatcher, name_pattern
from storage.containers.users import Owner, ProcessUser, find_owner, find_user
from storage.file_ops.actions import perform
from storage.file_ops.checksum import content_digest
from storage.file_ops.paths import MADE_NS, directory_tree, find
from storage.snapshots.attributes import Ledger
from storage.snapshots.tree import Tree
from tests.doubles.layers import facts, sketch

IS_ROOT = os.geteuid() == 0
needs_root = [pytest.mark.root, pytest.mark.skipif(not IS_ROOT, reason="needs root")]
OLD_NS = 1_000_000_000_123_456_789


def mark(*marks):
    def wrap(test):
        for each in marks:
            test = each(test)
        return test

    return wrap


as_root = mark(*needs_root)


@pytest.fixture
def root(tmp_path):
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.fixture
def source(tmp_path):
    made = tmp_path / "source"
    made.mkdir()
    return made


def write(root, files):
    """Make files (bytes), symlinks (``-> target``) and directories (None)."""
    for name, what in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            path.mkdir(exist_ok=True)
        elif isinstance(what, str):
            path.symlink_to(what.removeprefix("-> "))
        else:
            path.write_bytes(what)


def do(root, source, *actions, **options):
    ledger = None if IS_ROOT else Ledger(owner_is_root=True)
    perform(FileOp(actions=actions), root, {1: directory_tree(source)}, ledger=ledger, **options)


def copy(*sources, to, **options):
    return CopyAction(input=1, sources=sources, destination=to, **options)


#: What the source's ``d`` is, copied to ``e``.
E_IS_D = {"e": "directory", "e/x": b"x", "e/y": "directory", "e/y/z": b"z"}


# -- where copies go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "action", "expected"),
    [
        ({}, copy("f", to="/g"), {"g": b"f"}),
        ({}, copy("f", to="/g/"), {"g": "directory", "g/f": b"f"}),
        ({}, copy("f", to="/"), {"f": b"f"}),
        ({}, copy("f", to=""), {"f": b"f"}),
        ({}, copy("f", to="/x/."), {"x": "directory", "x/f": b"f"}),
        ({}, copy("f", to="/a/b/g"), {"a": "directory", "a/b": "directory", "a/b/g": b"f"}),
        ({"g": None}, copy("f", to="/g"), {"g": "directory", "g/f": b"f"}),
        ({"g": b"old"}, copy("f", to="/g"), {"g": b"f"}),
        ({"g": b"old"}, copy("f", to="/x/../../g"), {"g": b"f"}),
        ({}, copy("d", to="/e"), E_IS_D),
        ({}, copy("d", to="/"), {"x": b"x", "y": "directory", "y/z": b"z"}),
        ({}, copy("d/y", to="/e", contents_only=False), {"e": "directory", "e/z": b"z"}),
        ({}, copy("d/y", to="/e/", contents_only=False), {"e": "directory", "e/y": "directory", "e/y/z": b"z"}),
        ({"e": None}, copy("d/y", to="/e", contents_only=False), {"e": "directory", "e/y": "directory", "e/y/z": b"z"}),
        ({}, copy("f", "d/x", to="/e"), {"e": "directory", "e/f": b"f", "e/x": b"x"}),
        (
            {},
            copy("d*", to="/e", contents_only=False),
            E_IS_D,
        ),
        ({"e": "-> real", "real": None}, copy("f", to="/e"), {"e": "-> real", "real": "directory", "real/f": b"f"}),
        ({"e": "-> real"}, copy("f", to="/e"), {"e": "-> real", "real": b"f"}),
        ({"e": "-> /real", "real": None}, copy("f", to="/e/"), {"e": "-> /real", "real": "directory", "real/f": b"f"}),
        ({"e/x": "-> ../f", "f": b"1"}, copy("d/x", to="/e/"), {"e": "directory", "e/x": b"x", "f": b"1"}),
        ({}, copy("link", to="/g"), {"g": "-> f"}),
        ({}, copy("link", to="/g", follow_symlinks=True), {"g": b"f"}),
        ({}, copy("link", to="/g/", follow_symlinks=True), {"g": "directory", "g/link": b"f"}),
        ({}, copy("up/f", to="/g"), {"g": b"f"}),
        ({}, copy("nothing", to="/g", allow_missing=True), {}),
        ({}, copy("nothing*", "f", to="/g/", allow_missing=True), {"g": "directory", "g/f": b"f"}),
    ],
)
def test_copies_go_where_buildkit_puts_them(root, source, there, action, expected):
    """A slash, several sources or a directory that is there: into it; a directory brings its contents unless told."""
    write(source, {"f": b"f", "d/x": b"x", "d/y/z": b"z", "link": "-> f", "up": "-> d/.."})
    write(root, there)

    do(root, source, action)

    assert sketch(root) == expected


@pytest.mark.parametrize(
    ("there", "action", "reason"),
    [
        ({"g/f": None}, copy("f", to="/g/"), "a file can't replace a directory"),
        ({"g": b""}, copy("d", to="/g"), "not a directory"),
        ({"g": b""}, copy("f", to="/g/"), "not a directory"),
        ({"g": b""}, copy("f", to="/g/h"), "not a directory"),
        ({"g": b""}, copy("f", "d/x", to="/g"), "not a directory"),
        ({"g/y": b""}, copy("d", to="/g"), "a directory can't replace"),
        ({"g/y": "-> z", "g/z": None}, copy("d", to="/g"), "a directory can't replace"),
        ({}, copy("nothing", to="/g"), "no such file"),
        ({}, copy("nothing*", to="/g"), "no such file"),
        ({}, copy("f/x", to="/g"), "not a directory"),
        ({"a": "-> b", "b": "-> a"}, copy("f", to="/a"), "too many levels"),
        ({}, copy("[", to="/g"), "malformed pattern"),
        ({}, copy("f", to="/g", exclude=("[",)), "malformed pattern"),
        ({}, copy("f\0", to="/g"), "zero byte"),
        ({}, copy("f", to="/" + "x" * 300), "too long"),
        ({"g": b""}, MakeDirectory(path="/g/h"), "not a directory"),
        ({"g": b""}, MakeDirectory(path="/g"), "not a directory"),
        ({"g": None}, MakeFile(path="/g", data=b""), "a file can't replace a directory"),
        ({}, MakeFile(path="/g/h", data=b""), "(?i)no such file"),
        ({}, MakeFile(path="/g/", data=b""), "is a directory"),
    ],
)
def test_what_can_not_be_done_names_action_and_path(root, source, there, action, reason):
    """Errors are typed, and speak of paths within the root."""
    write(source, {"f": b"f", "d/x": b"x", "d/y/z": b"z"})
    write(root, there)

    with pytest.raises(FileActionError, match=reason) as caught:
        do(root, source, action)

    assert str(root) not in str(caught.value)
    assert caught.value.action in ("copy", "make file", "make directory")


def test_actions_run_in_order_on_one_root(root, source):
    """What an action makes, the next one finds."""
    write(source, {"f": b"new"})

    do(root, source, MakeDirectory(path="/a/b"), MakeFile(path="/a/b/f", data=b"old"), copy("f", to="/a/b"))

    assert sketch(root) == {"a": "directory", "a/b": "directory", "a/b/f": b"new"}


def test_an_input_that_is_not_given_is_our_bug(root, source):
    """Whoever carries out an op brings all its inputs."""
    with pytest.raises(InternalError, match="input 2"):
        do(root, source, CopyAction(input=2, sources=("f",), destination="/"))


def test_a_copy_can_be_stopped_between_files(root, source):
    """The checkpoint is asked before each file, and what it raises goes through."""
    write(source, {str(index): b"" for index in range(10)})
    asked = []

    class Stop(Exception):  # noqa: N818
        pass

    def checkpoint():
        asked.append(1)
        if len(asked) == 5:
            raise Stop

    with pytest.raises(Stop):
        do(root, source, copy("/", to="/"), checkpoint=checkpoint)
    assert len(list(root.iterdir())) < 5


# -- patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.c", {"a.c", "b.c", "[odd].c"}),
        ("?.c", {"a.c", "b.c"}),
        ("[b-z].c", {"b.c"}),
        ("[^b].c", {"a.c"}),
        ("src/*/x", {"x"}),
        ("s*/one/*", {"x", "y"}),
        ("via/one/*", {"x", "y"}),
        ("v*/one/x", set()),
        (r"\[odd\].c", {"[odd].c"}),
        (r"\[odd].?", {"[odd].c"}),
        ("*", {"a.c", "b.c", "[odd].c", ".hidden", "é"}),
        ("[^a-z]", {"é"}),
        ("??", set()),
    ],
)
def test_wildcards_match_within_one_component(root, source, pattern, expected):
    """As Go's ``filepath.Match``; symlinks are followed before the first wildcard only."""
    write(source, {"a.c": b"", "b.c": b"", "[odd].c": b"", ".hidden": b"", "é": b""})
    if pattern != "*":
        write(source, {"src/one/x": b"", "src/one/y": b"", "via": "-> src"})

    do(root, source, copy(pattern, to="/o/", allow_missing=True))

    assert {path.name for path in root.glob("o/*")} == expected


def test_without_wildcards_a_name_is_itself(root, source):
    """Stars and brackets may be in names."""
    write(source, {"*": b"star", "x": b"x"})

    do(root, source, copy("*", to="/o/", wildcards=False))

    assert sketch(root) == {"o": "directory", "o/*": b"star"}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ((), {"a", "a/b", "a/b/c.md", "a/x.o", "d", "d/e.md", "d/f.o"}),
        (("a",), {"d", "d/e.md", "d/f.o"}),
        (("/a/",), {"d", "d/e.md", "d/f.o"}),
        (("*.o",), {"a", "a/b", "a/b/c.md", "a/x.o", "d", "d/e.md", "d/f.o"}),
        (("**/*.o",), {"a", "a/b", "a/b/c.md", "d", "d/e.md"}),
        (("a", "!a/b"), {"a", "a/b", "a/b/c.md", "d", "d/e.md", "d/f.o"}),
        (("**", "!**/*.md"), {"a", "a/b", "a/b/c.md", "d", "d/e.md"}),
        (("*", "!d/e.md"), {"d", "d/e.md"}),
        (("*/*.o", "  ", "d/./e.md"), {"a", "a/b", "a/b/c.md", "d"}),
        (("**/b",), {"a", "a/x.o", "d", "d/e.md", "d/f.o"}),
        (("**/b/**",), {"a", "a/b", "a/x.o", "d", "d/e.md", "d/f.o"}),
    ],
)
def test_left_out_as_in_dockerignore(root, source, patterns, left):
    """The last pattern that matches decides; a directory comes back only for what comes back in it."""
    write(source, {"a/b/c.md": b"", "a/x.o": b"", "d/e.md": b"", "d/f.o": b""})

    do(root, source, copy("/", to="/", exclude=patterns))

    assert set(sketch(root)) == left


@pytest.mark.parametrize("pattern", ["[", "[]", "[a", "[a-]", "a\\", "[-a]"])
def test_malformed_patterns_are_refused(pattern):
    """None is taken for something else than was meant."""
    with pytest.raises(InvalidPatternError):
        name_pattern(pattern)
    with pytest.raises(InvalidPatternError):
        PatternMatcher([pattern])


# -- what copies keep --------------------------------------------------------------------------------


@as_root
def test_copies_keep_what_files_are(root, source):
    """Mode, owner, times to the nanosecond, xattrs, hard links, symlinks, devices, FIFOs; sockets are left out."""
    write(source, {"d/f": b"f", "d/s": b"suid", "d/link": "-> ../nowhere", "d/empty": None})
    (source / "d/g").hardlink_to(source / "d/f")
    os.setxattr(source / "d/f", "user.key", b"value")
    os.setxattr(source / "d/empty", "trusted.key", b"value")
    os.mkfifo(source / "d/fifo", 0o640)
    os.mknod(source / "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(source / "d/s", 1000, 1001)
    (source / "d/s").chmod(0o6755)
    os.chown(source / "d/link", 5, 6, follow_symlinks=False)
    (source / "d/empty").chmod(0o1777)
    for path in sorted(source.rglob("*"), reverse=True):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    expected = facts(source / "d")

    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "d/socket"))
        os.utime(source / "d", ns=(OLD_NS, OLD_NS))
        do(root, source, copy("d", to="/e", contents_only=False))

    assert facts(root / "e") == expected


@as_root
def test_holes_stay_holes(root, source):
    """A sparse file takes no more room than it did."""
    with (source / "sparse").open("wb") as file:
        file.seek(1 << 26)
        file.write(b"end")

    do(root, source, copy("sparse", to="/"))

    copied = (root / "sparse").stat()
    assert copied.st_size == (1 << 26) + 3
    assert copied.st_blocks * 512 < 1 << 20


@as_root
def test_hard_links_of_different_sources_are_not_linked(root, source):
    """Another source's file may since have replaced the first link's target."""
    write(source, {"a/f": b"same", "b/f": b"other"})
    (source / "b/g").hardlink_to(source / "a/f")

    do(root, source, copy("a", "b", to="/"))

    assert sketch(root) == {"f": b"other", "g": b"same"}


@as_root
def test_owner_and_mode_are_those_asked_for(root, source):
    """Of what is copied, links too (no mode), and of directories made on the way, whose mode is 755."""
    write(source, {"d/f": b"", "d/link": "-> f", "d/sub/g": b""})
    write(root, {"etc/passwd": b"root:x:0:0::/:\nbob:x:12:34::/home/bob:/bin/sh\n", "etc/group": b"staff:x:56:\n"})

    do(root, source, copy("d", to="/x/y", owner="bob:staff", mode=0o2750))

    found = facts(root)
    assert {(found[name].uid, found[name].gid) for name in found if name.startswith("x")} == {(12, 56)}
    assert found["x"].mode == found["x/y"].mode == 0o755
    assert found["x/y/f"].mode == found["x/y/sub"].mode == 0o2750


@as_root
def test_directories_that_are_there(root, source):
    """The destination itself keeps its attributes; those below it take the source's."""
    write(source, {"d/sub/f": b""})
    write(root, {"e/sub": None})
    os.chown(source / "d", 1, 1)
    os.chown(source / "d/sub", 2, 2)
    (source / "d/sub").chmod(0o700)
    (root / "e").chmod(0o711)

    do(root, source, copy("d", to="/e"))

    found = facts(root)
    assert (found["e"].uid, found["e"].mode) == (0, 0o711)
    assert (found["e/sub"].uid, found["e/sub"].mode) == (2, 0o700)


@as_root
def test_a_directory_made_for_contents_is_a_new_one(root, source):
    """Contents bring nothing of the directory they were in; the directory itself does."""
    write(source, {"d/f": b""})
    (source / "d").chmod(0o700)

    do(root, source, copy("d", to="/contents"), copy("d", to="/itself", contents_only=False))

    assert stat.S_IMODE((root / "contents").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "itself").stat().st_mode) == 0o700


@as_root
def test_make_directory_and_file(root, source):
    """New ones have the mode asked for whatever the umask; a directory that is there keeps everything."""
    (root / "there").mkdir(mode=0o700)
    old = os.umask(0o077)
    try:
        do(
            root,
            source,
            MakeDirectory(path="/there", mode=0o777, owner="5"),
            MakeDirectory(path="/a/b", mode=0o1777, owner="7:8"),
            MakeFile(path="/a/f", data=b"\0data", mode=0o4755, owner="9"),
        )
    finally:
        os.umask(old)

    found = facts(root)
    assert (found["there"].mode, found["there"].uid) == (0o700, 0)
    for name in ("a", "a/b"):
        assert (found[name].mode, found[name].uid, found[name].gid) == (0o1777, 7, 8)
    assert (found["a/f"].mode, found["a/f"].uid, found["a/f"].gid, found["a/f"].what) == (0o4755, 9, 9, b"\0data")


def test_what_is_made_or_changed_has_one_time(root, source):
    """Directories that something is put into or taken out of too; what is copied or unpacked has its own."""
    write(source, {"d/f": b"f", "d/sub/g": b"g", "d/there/h": b"h", "f": b"f"})
    write(root, {"into/old": b"o", "kept/there/x": b"x", "untouched/y": b"y", "untouched/sub": None})
    (source / "a.tar").write_bytes(
        archive(
            ("implied/f", tarfile.REGTYPE, b"f"), ("into", tarfile.DIRTYPE, None), ("into/new", tarfile.REGTYPE, b"n")
        )
    )
    for tree in (root, source):
        for path in [*tree.rglob("*"), tree]:
            os.utime(path, ns=(OLD_NS, OLD_NS))

    do(
        root,
        source,
        copy("d", to="/kept/"),
        copy("d", to="/untouched", exclude=("f", "there", "sub/g")),
        copy("d", to="/made/way/", contents_only=False),
        copy("a.tar", to="/", unpack=True),
        MakeFile(path="/kept/made", data=b""),
        MakeDirectory(path="/untouched/y/..", mode=0o700),
    )

    found = {name: fact.mtime_ns for name, fact in facts(root).items()}
    fixed = {name for name, mtime_ns in found.items() if mtime_ns == MADE_NS}
    assert fixed == {".", "kept", "made", "made/way", "implied", "kept/made"}
    assert {found[name] for name in ("into", "into/new", "implied/f")} == {1_000_000_000 * 10**9}
    rest = found.keys() - fixed - {"into", "into/new", "implied/f"}
    assert {name: found[name] for name in rest} == dict.fromkeys(rest, OLD_NS)


def test_a_file_that_is_made_replaces_but_never_writes_through(root, source):
    """Another name of the old file keeps the old content, and a FIFO is not waited for."""
    write(root, {"f": b"old"})
    (root / "g").hardlink_to(root / "f")
    os.mkfifo(root / "fifo")

    do(root, source, MakeFile(path="/f", data=b"new"), MakeFile(path="/fifo", data=b"file"))

    assert sketch(root) == {"f": b"new", "g": b"old", "fifo": b"file"}


# -- hostile trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["-> {outside}", "-> ../../../../../../..{outside}", "-> ../outside"])
def test_no_symlink_leads_out_of_a_root(root, source, tmp_path, link):
    """Neither a destination's, nor a source's: both resolve as if the root were the whole file system."""
    outside = tmp_path / "outside"
    write(outside, {"secret": b"secret", "etc/passwd": b"eve:x:66:66::/:\n"})
    before = sketch(outside)
    link = link.format(outside=outside)
    write(source, {"f": b"f", "d/out/f": b"f", "link": link})
    write(root, {"out": link, "dir/out": link, "etc": link + "/etc"})

    do(root, source, copy("f", to="/out/g"), MakeDirectory(path="/out/h"), MakeFile(path="/out/i", data=b""))
    with pytest.raises(FileActionError):
        do(root, source, copy("d", to="/dir/"))
    with pytest.raises(FileActionError):
        do(root, source, copy("link/secret", to="/"))
    with pytest.raises(FileActionError):
        do(root, source, copy("l*/secret", to="/"))
    with pytest.raises(UnknownUserError):
        do(root, source, copy("f", to="/", owner="eve"))

    assert sketch(outside) == before
    assert not any(b"secret" in what for what in sketch(root).values() if isinstance(what, bytes))


def test_paths_resolve_as_in_a_root(root):
    """Dots in links go up from where they are, never above the root; what is missing stays as written."""
    write(root, {"a/b/f": b"f", "x": "-> a/b/../../../..", "abs": "-> /a", "self": "-> .", "a/up": "-> ../y/z"})
    tree = directory_tree(root)

    assert find(tree, "../../a/b/f").relative == b"a/b/f"
    assert find(tree, "x/abs/b").relative == b"a/b"
    assert find(tree, "self/self/abs", follow_last=False).relative == b"abs"
    assert find(tree, "abs/up/w").relative == b"y/z/w"
    assert find(tree, "abs/up/w").node is None


def test_deep_trees_are_errors_not_crashes(root, source):
    """A tree deeper than any path can name is refused."""
    here = os.open(source, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("dddd", dir_fd=here)
        inner = os.open("dddd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)

    try:
        with pytest.raises(FileActionError, match="too long"):
            do(root, source, copy("/", to="/"))
    finally:
        # Deeper than Python's own removal can go.
        subprocess.run(["rm", "-rf", root, source], check=True)


# -- archives ---------------------------------------------------------------------------------------------


def archive(*members, compress=lambda data: data):
    """Return a tar of (name, kind, content or target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, what in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.mode, info.uid, info.gid = kind, 1_000_000_000, 0o755, 3, 4
            if kind == tarfile.REGTYPE:
                info.size = len(what)
            elif what:
                info.linkname = what
            tar.addfile(info, io.BytesIO(what) if kind == tarfile.REGTYPE else None)
    return compress(out.getvalue())


MEMBERS = (
    ("./", tarfile.DIRTYPE, None),
    ("d", tarfile.DIRTYPE, None),
    ("d/f", tarfile.REGTYPE, b"f"),
    ("g", tarfile.LNKTYPE, "d/f"),
    ("h", tarfile.SYMTYPE, "d/f"),
    ("new/dir/i", tarfile.REGTYPE, b"i" * 5000),
)


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress, lambda data: zstandard.ZstdCompressor().compress(data)],
    ids=["plain", "gzip", "bzip2", "xz", "zstd"],
)
def test_archives_are_unpacked(root, source, compress):
    """Told by their content, into a directory whether or not the destination ends in a slash."""
    write(source, {"a": archive(*MEMBERS, compress=compress)})
    write(root, {"o/d/f": b"old", "o/d/kept": b"kept", "o/h/x": b"replaced"})

    do(root, source, copy("a", to="/o", unpack=True))

    found = facts(root)
    assert sketch(root / "o") == {
        "d": "directory",
        "d/f": b"f",
        "d/kept": b"kept",
        "g": b"f",
        "h": "-> d/f",
        "new": "directory",
        "new/dir": "directory",
        "new/dir/i": b"i" * 5000,
    }
    assert found["o/d"].mtime_ns == 1_000_000_000 * 10**9
    assert (root / "o/g").samefile(root / "o/d/f")
    if IS_ROOT:
        assert (found["o/d/f"].uid, found["o/d/f"].gid) == (3, 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"#!/bin/sh\n",
        bytes(2048),
        gzip.compress(b"text"),
        b"BZh9nonsense",
        b"\xfd7zXZ\0nonsense",
        os.urandom(6000),
    ],
    ids=["empty", "script", "zeros", "gzip", "bzip2", "xz", "random"],
)
def test_what_is_no_archive_is_copied(root, source, content):
    """An empty archive, too; a broken one as well where not even its first entry can be read."""
    write(source, {"a": content, "d/b": content})

    do(root, source, copy("a", "d", to="/o/", unpack=True))

    assert sketch(root) == {"o": "directory", "o/a": content, "o/b": content}


@pytest.mark.parametrize(
    "members",
    [
        [("../x", tarfile.REGTYPE, b"")],
        [("d/../../x", tarfile.REGTYPE, b"")],
        [("x", tarfile.LNKTYPE, "../../secret")],
        [("x", tarfile.LNKTYPE, "nothing")],
        [("s", tarfile.SYMTYPE, "{outside}"), ("x", tarfile.LNKTYPE, "s/secret")],
        [("f", tarfile.REGTYPE, b""), ("f/x", tarfile.REGTYPE, b"")],
    ],
)
def test_entries_that_must_not_be_made(root, source, tmp_path, members):
    """Are typed errors, and nothing outside is touched."""
    write(tmp_path / "outside", {"secret": b"secret"})
    members = [
        (name, kind, what.format(outside=tmp_path / "outside") if isinstance(what, str) else what)
        for name, kind, what in members
    ]
    write(source, {"a": archive(*members)})

    with pytest.raises(FileActionError):
        do(root, source, copy("a", to="/o", unpack=True))

    assert sketch(tmp_path / "outside") == {"secret": b"secret"}


def test_archives_write_through_links_within_the_root_only(root, source, tmp_path):
    """An absolute link leads to the root's own directory of that path."""
    outside = tmp_path / "outside"
    outside.mkdir()
    write(source, {"a": archive(("s", tarfile.SYMTYPE, str(outside)), ("s/x", tarfile.REGTYPE, b"x"))})

    do(root, source, copy("a", to="/o", unpack=True))

    assert list(outside.iterdir()) == []
    assert (root / str(outside).lstrip("/") / "x").read_bytes() == b"x"


def test_a_damaged_archive_is_an_error(root, source):
    """Cut in its midst, it is no file to be copied any more."""
    data = archive(("f", tarfile.REGTYPE, os.urandom(100_000)), compress=gzip.compress)
    write(source, {"a": data[:-5000]})

    with pytest.raises(FileActionError, match="copy a to /o"):
        do(root, source, copy("a", to="/o", unpack=True))


# -- digests of selections ------------------------------------------------------------------------------------


def digest(source, *actions, index=1):
    return content_digest(FileOp(actions=actions), index, directory_tree(source))


@pytest.fixture
def selected(source):
    write(source, {"d/f": b"f", "d/g": b"g", "d/link": "-> f", "d/sub/x": b"x", "other": b"o"})
    return source


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "f").write_bytes(b"F"),
        lambda d: (d / "f").chmod(0o600),
        lambda d: (d / "f").rename(d / "h"),
        lambda d: (d / "new").touch(),
        lambda d: (d / "empty").mkdir(),
        lambda d: (d / "sub/x").unlink(),
        lambda d: (d / "sub").chmod(0o700),
        lambda d: ((d / "link").unlink(), (d / "link").symlink_to("g")),
        lambda d: ((d / "g").unlink(), (d / "g").symlink_to("f")),
        lambda d: os.setxattr(d / "f", "user.key", b"1"),
        lambda d: (d / "g").write_bytes(b"f"),
        lambda d: (d / "sub/x").rename(d / "x"),
        pytest.param(lambda d: os.chown(d / "f", 1, 0), marks=needs_root),
        pytest.param(lambda d: os.chown(d / "link", 1, 0, follow_symlinks=False), marks=needs_root),
    ],
)
def test_a_digest_changes_with_what_is_copied(selected, change):
    """Names, kinds, modes, owners, targets, bytes and xattrs are in it."""
    before = digest(selected, copy("d", to="/"))

    change(selected / "d")

    assert digest(selected, copy("d", to="/")) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: os.utime(s / "d/f", ns=(1, 1)),
        lambda s: os.utime(s / "d/link", ns=(1, 1), follow_symlinks=False),
        lambda s: (s / "other").write_bytes(b"changed"),
        lambda s: (s / "d/sub/y.o").touch(),
        lambda s: (s / "d").chmod(0o700),
        lambda s: (s / "d/hard").hardlink_to(s / "d/f") or (s / "d/hard").rename(s / "hard"),
    ],
)
def test_a_digest_keeps_to_what_is_copied(selected, change):
    """Times, what is not selected, what is left out and a directory whose contents alone are copied are not in it."""
    action = copy("d", to="/", exclude=("**/*.o",))
    before = digest(selected, action)

    change(selected)

    assert digest(selected, action) == before


def test_hard_links_are_told_from_copies(selected):
    """A copy keeps them, so they make a difference."""
    write(selected, {"d/h": b"f"})
    before = digest(selected, copy("d", to="/"))

    (selected / "d/h").unlink()
    (selected / "d/h").hardlink_to(selected / "d/f")

    assert digest(selected, copy("d", to="/")) != before


def test_digests_follow_wildcards_and_links_as_copies_do(selected):
    """A match that comes or goes changes it; a link counts as itself or as its target."""
    wild, literal = copy("d/?", to="/"), copy("d/f", to="/")
    link, followed = copy("d/link", to="/"), copy("d/link", to="/", follow_symlinks=True)
    before = [digest(selected, each) for each in (wild, literal, link, followed)]

    write(selected, {"d/h": b"new"})
    (selected / "d/f").write_bytes(b"changed")
    after = [digest(selected, each) for each in (wild, literal, link, followed)]

    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True, False]
    with pytest.raises(FileActionError, match="no such file"):
        digest(selected, copy("nothing", to="/"))
    assert digest(selected, copy("nothing", to="/", allow_missing=True))


def test_digests_are_of_one_input(selected):
    """Copies from others, and actions that copy nothing, are left to those inputs' digests and to the definition."""
    first = copy("d", to="/")

    assert digest(selected, first) == digest(selected, first, MakeFile(path="/x", data=b""))
    assert digest(selected, first) != digest(selected, first, index=2)


def test_layers_and_their_merged_tree_have_one_digest(tmp_path):
    """A snapshot needn't be mounted to be read."""
    lower, upper, merged = tmp_path / "lower", tmp_path / "upper", tmp_path / "merged"
    write(lower, {"d/f": b"old", "d/kept": b"kept"})
    write(upper, {"d/f": b"new"})
    write(merged, {"d/f": b"new", "d/kept": b"kept"})
    op = FileOp(actions=(copy("d/*", to="/"),))

    layered = content_digest(op, 1, Tree([os.fsencode(upper), os.fsencode(lower)]))

    assert layered == content_digest(op, 1, directory_tree(merged))


# -- users -------------------------------------------------------------------------------------------------------


PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# comment:x:1:1::/:
bob:x:1000:1001:Bob:/home/bob:/bin/sh
short
12:x:13:14::/:
bad:x:one:1::/:
"""
GROUP = b"root:x:0:\nbob:x:1001:\nwheel:x:10:root,bob\nvideo:x:44:bob\n"


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups"),
    [
        ("", 0, 0, (0, 10)),
        ("root", 0, 0, (0, 10)),
        ("bob", 1000, 1001, (1001, 10, 44)),
        ("1000", 1000, 1001, (1001, 10, 44)),
        ("bob:video", 1000, 44, (44,)),
        ("bob:7", 1000, 7, (7,)),
        ("2000", 2000, 0, (0,)),
        ("2000:2001", 2000, 2001, (2001,)),
        (":video", 0, 44, (44,)),
        ("12", 12, 0, (0,)),
    ],
)
def test_who_a_command_runs_as(root, user, uid, gid, groups):
    """By the root's own files, a number never by name; the user's groups only where no group is given."""
    write(root, {"etc/passwd": PASSWD, "etc/group": GROUP})

    assert find_user(directory_tree(root), user) == ProcessUser(uid=uid, gid=gid, groups=groups)


@pytest.mark.parametrize("user", ["eve", "bob:staff", "bob:", "4294967295", "99999999999999", "bad", "1:x"])
def test_users_that_are_not_there(root, user):
    """Names that aren't listed and numbers that can't be are errors; this machine's users don't count."""
    write(root, {"etc/passwd": PASSWD, "etc/group": GROUP})

    with pytest.raises(UnknownUserError):
        find_user(directory_tree(root), user)


def test_owners_of_files(root):
    """A lone number is user and group alike, a lone name brings its group."""
    write(root, {"etc/passwd": PASSWD, "etc/group": GROUP})
    tree = directory_tree(root)

    assert find_owner(tree, "") is None
    assert find_owner(tree, "5") == Owner(uid=5, gid=5)
    assert find_owner(tree, "bob") == Owner(uid=1000, gid=1001)
    assert find_owner(tree, "bob:wheel") == Owner(uid=1000, gid=10)
    assert find_owner(tree, "5:video") == Owner(uid=5, gid=44)
    with pytest.raises(UnknownUserError, match="eve"):
        find_owner(tree, "eve")


def test_users_without_files(root):
    """Root and numbers need none."""
    assert find_user(directory_tree(root), "") == ProcessUser()
    assert find_user(directory_tree(root), "5:6") == ProcessUser(uid=5, gid=6, groups=(6,))
    with pytest.raises(UnknownUserError):
        find_user(directory_tree(root), "bob")
