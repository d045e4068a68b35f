"""The tar reader, against archives that GNU tar and Python's tarfile write, and against broken ones."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile

import pytest

from storage.snapshots import tar
from storage.snapshots.tar import Entry, TarError, TarReader
from tests.doubles.layers import character, directory, fifo, file, hard_link, layer_tar, symlink

NS = 1_000_000_000


def buffers(data: bytes, size: int = 1 << 20):
    """Return what a reader asks for buffers of *size*."""
    pieces = [memoryview(data)[at : at + size] for at in range(0, len(data), size)]
    return lambda: pieces.pop(0) if pieces else None


def read(data: bytes, size: int = 1 << 20) -> list[tuple[Entry, bytes]]:
    reader = TarReader(buffers(data, size))
    found = []
    while (entry := reader.next()) is not None:
        content = b""
        while (piece := reader.read()) is not None:
            content += piece
        found.append((entry, content))
    return found


def whole(entry: Entry, stored: bytes) -> bytes:
    """Return the content of a file, holes filled in."""
    if entry.extents is None:
        return stored
    content, at = bytearray(entry.size), 0
    for offset, length in entry.extents:
        content[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(content)


def gnu_tar(directory, *options: str) -> bytes:
    return subprocess.run(["tar", *options, "-cf", "-", "."], cwd=directory, capture_output=True, check=True).stdout


@pytest.fixture
def tree(tmp_path):
    """A directory with everything that needs no root."""
    root = tmp_path / "tree"
    deep = root / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    (deep / ("f" * 120)).write_bytes(b"deep")
    (root / "empty").touch()
    (root / "block").write_bytes(os.urandom(512))
    (root / "big").write_bytes(os.urandom(700_001))
    (root / "ünï").write_bytes(b"u")
    (root / "link").symlink_to("t" * 150)
    (root / "short").symlink_to("big")
    os.link(root / "big", root / "hard")
    os.mkfifo(root / "fifo")
    for path in root.rglob("*"):
        os.utime(path, ns=(NS, 1_234_567_890_123_456_789), follow_symlinks=False)
    return root


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
@pytest.mark.parametrize("size", [512, 1 << 20])
def test_gnu_tar_is_read_as_tarfile_reads_it(tree, form, size):
    """Every format that GNU tar writes, whatever the buffers' length."""
    options = ["--format=" + form]
    if form in ("v7", "ustar"):
        options += ["--exclude=link", "--exclude=" + "f" * 120]
    if form == "v7":
        options += ["--exclude=fifo", "--exclude=" + "e" * 90]
    data = gnu_tar(tree, *options)

    found = read(data, size)

    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        assert len(members) == len(found) >= 8
        for member, (entry, content) in zip(members, found, strict=True):
            assert os.fsdecode(entry.name).rstrip("/") == member.name
            assert entry.kind == (b"0" if member.type == b"\0" else member.type)
            assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
            assert entry.mtime_ns // NS == int(member.mtime)
            assert os.fsdecode(entry.link) == member.linkname
            if member.isreg():
                assert content == archive.extractfile(member).read()
    if form == "posix":
        assert {entry.mtime_ns for entry, _ in found if entry.name != b"./"} >= {1_234_567_890_123_456_789}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tarfile_is_read_back(form):
    """What Python writes in each of its formats comes back."""
    items = [
        directory("d/", 0o2755, uid=1, gid=2),
        file("d/f", b"x" * 1000, mode=0o4755, mtime=7),
        hard_link("d/h", "d/f"),
        symlink("s", "to"),
        character("c", 10, 200),
        fifo("p"),
        file("n" * 60 + "/" + "m" * 60, b"long"),
    ]

    found = read(layer_tar(*items, form=form))

    assert [os.fsdecode(entry.name).rstrip("/") for entry, _ in found] == [item.name.rstrip("/") for item in items]
    assert [entry.kind for entry, _ in found] == [item.kind for item in items]
    assert [entry.mode for entry, _ in found] == [item.mode for item in items]
    assert (found[0][0].uid, found[0][0].gid) == (1, 2)
    assert (found[1][1], found[1][0].mtime_ns) == (b"x" * 1000, 7 * NS)
    assert found[2][0].link == b"d/f"
    assert (found[4][0].major, found[4][0].minor) == (10, 200)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=lambda options: "-".join(option.partition("=")[2] for option in options),
)
@pytest.mark.parametrize("extents", [0, 1, 3, 4, 5, 60])
@pytest.mark.parametrize("ends_in_hole", [False, True])
def test_sparse_files_of_every_format(tmp_path, options, extents, ends_in_hole):
    """Content and holes come back, with maps that need more blocks than one too."""
    path = tmp_path / "sparse"
    with path.open("wb") as out:
        for index in range(extents):
            out.seek((index * 3 + 1) << 16)
            out.write(os.urandom(4096 + index))
        out.truncate(((extents * 3 + 2) << 16) if ends_in_hole else max(out.tell(), 1))
    data = subprocess.run(
        ["tar", "--sparse", "--hole-detection=raw", *options, "-cf", "-", "sparse", "sparse"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout

    (first, stored), *rest = read(data, 512)

    assert first.name == b"sparse"
    assert first.size == path.stat().st_size
    assert whole(first, stored) == path.read_bytes()
    if extents:
        assert first.extents is not None
        assert len(stored) < first.size
    assert len(rest) == 1


@pytest.mark.parametrize("value", [1 << 33, (1 << 62) + 1])
def test_base_256_numbers(value):
    """GNU's way with numbers too big for octal digits: owners, times; a size in a header."""
    data = layer_tar(file("f", b"x", uid=1 << 21, mtime=8_589_934_592), form=tarfile.GNU_FORMAT)
    (entry, _), *_ = read(data)
    assert (entry.uid, entry.mtime_ns) == (1 << 21, 8_589_934_592 * NS)

    info = tarfile.TarInfo("big")
    info.size = value
    reader = TarReader(buffers(info.tobuf(tarfile.GNU_FORMAT)))
    entry = reader.next()
    assert entry.size == value


def test_pax_records_change_the_entry():
    """Names of any bytes and length, owners, times with nanoseconds, xattrs with any bytes."""
    name = os.fsdecode(b"\xff\xfe" * 200)
    data = layer_tar(
        file(
            name,
            b"x",
            uid=1 << 40,
            xattrs={"user.a=b": b"1", "user.b": b"\0\n="},
            pax={"mtime": "12.5", "atime": "13.000000001"},
        )
    )

    ((entry, content),) = read(data)

    assert (os.fsdecode(entry.name), entry.uid, content) == (name, 1 << 40, b"x")
    assert (entry.mtime_ns, entry.atime_ns) == (12_500_000_000, 13_000_000_001)
    assert entry.xattrs["user.b"] == b"\0\n="


def test_global_headers_change_nothing():
    """As in Go, by which containerd and Docker read layers: read, checked, and not applied."""
    info = tarfile.TarInfo("f")
    head = tarfile.TarInfo.create_pax_global_header({"comment": "x", "uid": "5"})

    ((entry, _),) = read(head + info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))

    assert (entry.name, entry.uid) == (b"f", 0)


@pytest.mark.parametrize(("mtime", "expected"), [("-1", 0), ("99999999999", 0), ("5", 5 * NS)])
def test_times_that_files_cannot_have_are_the_epoch(mtime, expected):
    """As containerd does."""
    ((entry, _),) = read(layer_tar(file("f", pax={"mtime": mtime})))

    assert entry.mtime_ns == expected


def header(**fields: bytes) -> bytearray:
    """Return a regular file's header with raw *fields*, its checksum right."""
    block = bytearray(tarfile.TarInfo("f").tobuf(tarfile.USTAR_FORMAT))
    places = {"size": 124, "uid": 108, "type": 156, "mtime": 136}
    for name, value in fields.items():
        at = places[name]
        block[at : at + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return block


def test_v7_directories_are_told_by_their_slash():
    """V7 had a type for them neither; a contiguous file is a regular one."""
    info = tarfile.TarInfo("d/")
    info.type = tarfile.AREGTYPE
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(header(type=b"7"))

    assert [entry.kind for entry, _ in read(data)] == [tar.DIRECTORY, tar.REGULAR]


def test_signed_checksums_are_accepted():
    """Some old writers summed signed bytes."""
    block = bytearray(tarfile.TarInfo(os.fsdecode(b"\xe4\xf6")).tobuf(tarfile.GNU_FORMAT, "latin-1", "surrogateescape"))
    block[0:2] = b"\xe4\xf6"
    block[148:156] = b"        "
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:512])
    block[148:156] = b"%06o\0 " % signed

    assert read(bytes(block))[0][0].name == b"\xe4\xf6"


def test_types_without_data_have_none():
    """Whatever the size field of a directory or link says, the next header follows at once."""
    data = bytes(header(type=b"5", size=b"00000001000\0")) + bytes(header())

    assert [entry.size for entry, _ in read(data)] == [0, 0]


def test_the_end_may_be_missing():
    """At an entry's boundary, as some writers leave it."""
    data = layer_tar(file("f", b"x" * 10))

    assert len(read(data[:1024])) == 1
    assert len(read(data[:1536])) == 1
    assert read(b"") == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(layer_tar(file("f", b"x" * 2000))[:1500], "truncated", id="data"),
        pytest.param(layer_tar(file("f", b"x" * 2000))[:2512], "truncated", id="padding"),
        pytest.param(bytes(header())[:300], "truncated", id="header"),
        pytest.param(layer_tar(file("n" * 150))[:1024], "truncated", id="after-pax"),
        pytest.param(layer_tar(file("n" * 150))[:512], "truncated", id="in-pax"),
        pytest.param(b"x" * 512, "malformed number|checksum", id="garbage"),
        pytest.param(bytes(header()).replace(b"f", b"g", 1), "checksum", id="checksum"),
        pytest.param(bytes(header(size=b"9999")), "malformed number", id="digits"),
        pytest.param(bytes(header(size=b"-1")), "malformed number", id="minus"),
        pytest.param(bytes(header(size=b"\xff" * 12)), "negative", id="negative-size"),
        pytest.param(bytes(header(uid=b"\xff" * 8)), "negative", id="negative-owner"),
        pytest.param(bytes(header(type=b"V")), "unknown type", id="type"),
        pytest.param(bytes(512) + bytes(header()), "zero block", id="zero-block"),
        pytest.param(bytes(header(type=b"x", size=b"77777777777\0")), "extended header of", id="huge-pax"),
        pytest.param(bytes(header(type=b"L", size=b"77777777777\0")), "extended header of", id="huge-name"),
    ],
)
def test_a_broken_archive_is_refused(data, reason):
    """With what is wrong with it."""
    with pytest.raises(TarError, match=reason):
        read(data)


@pytest.mark.parametrize(
    "records",
    [
        b"no length",
        b"5 a=b\n",
        b"99 a=b\n",
        b"6 a=bX",
        b"5 ab\n",
        b"-6 a=b\n",
        b"12 mtime=x1\n",
        b"10 size=-\n",
        b"11 uid=1_0\n",
        b"12 path=a\0b\n",
    ],
)
def test_malformed_pax_records_are_refused(records):
    """Lengths, keys, numbers, times, names."""
    head = header(type=b"x", size=b"%011o\0" % len(records))

    with pytest.raises(TarError):
        read(bytes(head) + records.ljust(512, b"\0") + bytes(header()))


@pytest.mark.parametrize(
    "pax",
    [
        {"GNU.sparse.map": "0,1,0,1", "GNU.sparse.size": "10"},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "10"},
        {"GNU.sparse.map": "0,2", "GNU.sparse.size": "1"},
        {"GNU.sparse.map": "0", "GNU.sparse.size": "1"},
        {"GNU.sparse.map": "0,-2", "GNU.sparse.size": "1"},
        {"GNU.sparse.map": "0,2"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"},
        {"GNU.sparse.numbytes": "2", "GNU.sparse.size": "10"},
    ],
)
def test_malformed_sparse_maps_are_refused(pax):
    """Overlapping, past the end, at odds with the data, or without a size."""
    with pytest.raises(TarError):
        read(layer_tar(file("f", b"xy", pax=pax)))


def test_a_sparse_map_cannot_claim_more_than_its_data():
    """A 1.0 map that promises a million extents ends with its data."""
    data = b"1000000\n".ljust(512, b"0")
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}

    with pytest.raises(TarError, match="malformed"):
        read(layer_tar(file("f", data, pax=pax)))


def test_data_that_is_not_read_is_skipped():
    """The next header is found wherever the caller stopped."""
    reader = TarReader(buffers(layer_tar(file("a", b"x" * 5000), file("b", b"y")), 1024))

    assert reader.next().name == b"a"
    reader.read()
    assert reader.next().name == b"b"
    assert bytes(reader.read()) == b"y"
    assert reader.next() is None
