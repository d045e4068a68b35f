"""A streaming tar reader, as lean as it can be in Python.

Reads what layers are made of: V7, ustar, star, GNU (long names and links, base-256 numbers, sparse files)
and pax (extended headers, xattrs, sparse 0.0, 0.1 and 1.0). ``tarfile`` measured four times slower on a
Debian base layer, and resolves ambiguities otherwise than Go's ``archive/tar``, by which containerd and
Docker read layers: where formats leave a choice, this follows Go, so that a layer means the same here.

In particular: global pax headers are read and checked but don't change the entries after them; a file
may end without the two zero blocks, at an entry's boundary; the types that have no data have none,
whatever their size field says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from storage.snapshots.sparse import Extent, check_extents, map_of_pax, parse_old_map

BLOCK: Final = 512
#: Longest pax header, long name or sparse map that is read, as in Go.
MAX_SPECIAL_BYTES: Final = 1 << 20

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"

_PAX: Final = b"x"
_PAX_GLOBAL: Final = b"g"
_GNU_NAME: Final = b"L"
_GNU_LINK: Final = b"K"
_GNU_SPARSE: Final = b"S"
_CONTIGUOUS: Final = b"7"
_V7: Final = b"\0"
_KNOWN: Final = frozenset((REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO))

_PAX_NUMBERS: Final = frozenset(("size", "uid", "gid"))
_ZERO_BLOCK: Final = bytes(BLOCK)
_XATTR: Final = "SCHILY.xattr."
_ADLER_MODULUS: Final = 65521
_MAX_TIME_NS: Final = (1 << 63) - 1
#: What Linux takes at most: lengths of files, owners (2^32 - 1 says "as it is" to chown), parts of a device's number.
_MAX_SIZE: Final = (1 << 63) - 1
_MAX_ID: Final = (1 << 32) - 2
_MAX_DEVICE: Final = (1 << 20) - 1


class TarError(Exception):
    """The archive is truncated or malformed; *entry* is the one it was noticed at, or empty."""

    def __init__(self, reason: str, entry: bytes = b"") -> None:
        super().__init__(reason, entry)
        self.reason = reason
        self.entry = entry


@dataclass(slots=True)
class Entry:
    """One member of the archive. Not frozen: thousands are made a second, and freezing triples that cost."""

    #: As in the archive: not cleaned.
    name: bytes
    #: One of the type constants of this module.
    kind: bytes
    #: Permission bits with setuid, setgid and sticky.
    mode: int
    uid: int
    gid: int
    #: Length of the file as it is to be, holes included.
    size: int
    mtime_ns: int
    atime_ns: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    #: Where the data goes, for a sparse file; None for any other.
    extents: list[Extent] | None = None


class TarReader:
    """Reads entries one after the other: :meth:`next`, then :meth:`read` until the data is out.

    Args:
        next_buffer: Returns the next bytes of the archive, None at its end. Each but the last is a
            multiple of 512 bytes long, and stays valid until the next call.
    """

    def __init__(self, next_buffer: Callable[[], memoryview | None]) -> None:
        self._next_buffer = next_buffer
        self._view = memoryview(b"")
        self._at = 0
        self._end = 0
        #: Bytes of the current entry's data that are still to be read, and the padding after them.
        self._left = 0
        self._padding = 0
        self._name = b""

    # -- bytes --

    def _refill(self) -> bool:
        self._view.release()
        view = self._next_buffer()
        if view is None:
            self._view = memoryview(b"")
            self._at = self._end = 0
            return False
        self._view, self._at, self._end = view, 0, len(view)
        return True

    def _block(self) -> bytes | None:
        """Return the next 512 bytes, or None at the end."""
        if self._at == self._end and not self._refill():
            return None
        at = self._at
        if self._end - at < BLOCK:
            raise TarError("truncated", self._name)
        self._at = at + BLOCK
        return bytes(self._view[at : at + BLOCK])

    def read(self) -> memoryview | None:
        """Return the next piece of the entry's data, or None when it is all read.

        The piece is a part of the buffer: valid until the next call of any method.

        Raises:
            TarError: the archive ends before the data does.
        """
        left = self._left
        if not left:
            return None
        if self._at == self._end and not self._refill():
            raise TarError("truncated", self._name)
        at = self._at
        count = min(left, self._end - at)
        self._at = at + count
        self._left = left - count
        return self._view[at : self._at]

    def _skip(self) -> None:
        """Go to the next header: past what the caller left of the data, and the padding."""
        left = self._left + self._padding
        while left:
            if self._at == self._end and not self._refill():
                raise TarError("truncated", self._name)
            count = min(left, self._end - self._at)
            self._at += count
            left -= count
        self._left = self._padding = 0

    def _special(self, size: int) -> bytes:
        """Return the whole data of a pax header, long name or the like."""
        if size > MAX_SPECIAL_BYTES:
            raise TarError(f"an extended header of {size} bytes", self._name)
        self._left, self._padding = size, -size % BLOCK
        data = b""
        while (piece := self.read()) is not None:
            data += piece
        return data

    def drain(self) -> None:
        """Read what follows the end of the archive, to the end of the stream."""
        while self._refill():
            pass

    # -- headers --

    def next(self) -> Entry | None:
        """Return the next entry, or None at the end of the archive.

        Raises:
            TarError: the archive is truncated or malformed, or has an entry of an unknown type.
        """
        pax: list[tuple[str, bytes]] | None = None
        gnu_name: bytes | None = None
        gnu_link: bytes | None = None
        while True:
            if self._left or self._padding:
                self._skip()
            block = self._block()
            if block is None:
                if pax is not None or gnu_name is not None or gnu_link is not None:
                    raise TarError("truncated after an extended header")
                return None
            if block[0] == 0 and block == _ZERO_BLOCK:
                self._check_end()
                return None
            _verify_checksum(block)
            kind = block[156:157]
            if kind == _PAX:
                pax = _parse_pax(self._special(_number(block[124:136])))
            elif kind == _PAX_GLOBAL:
                _parse_pax(self._special(_number(block[124:136])))
            elif kind == _GNU_NAME:
                gnu_name = self._special(_number(block[124:136])).partition(b"\0")[0]
            elif kind == _GNU_LINK:
                gnu_link = self._special(_number(block[124:136])).partition(b"\0")[0]
            else:
                return self._entry(block, kind, pax, gnu_name, gnu_link)

    def _check_end(self) -> None:
        second = self._block()
        if second is not None and second != _ZERO_BLOCK:
            raise TarError("a zero block in the midst of the archive", self._name)

    def _entry(
        self,
        block: bytes,
        kind: bytes,
        pax: list[tuple[str, bytes]] | None,
        gnu_name: bytes | None,
        gnu_link: bytes | None,
    ) -> Entry:
        self._name = name = _name_in(block) if gnu_name is None else gnu_name
        mtime_ns = _number(block[136:148]) * 1_000_000_000
        entry = Entry(
            name,
            kind,
            _number(block[100:108]) & 0o7777,
            _number(block[108:116]),
            _number(block[116:124]),
            _number(block[124:136]),
            mtime_ns,
            mtime_ns,
            block[157:257].partition(b"\0")[0] if gnu_link is None else gnu_link,
        )
        if kind in (CHARACTER, BLOCK_DEVICE):
            entry.major, entry.minor = _number(block[329:337]), _number(block[337:345])
        sparse: list[tuple[str, bytes]] = []
        if pax is not None:
            sparse = _merge_pax(entry, pax)
            self._name = entry.name
        if entry.size < 0 or entry.uid < 0 or entry.gid < 0:
            raise TarError("a negative number in its header", self._name)
        self._begin_data(entry, block, sparse)
        entry.mtime_ns = _bounded(entry.mtime_ns)
        # containerd sets the access time to the later of the two.
        entry.atime_ns = max(_bounded(entry.atime_ns), entry.mtime_ns)
        return entry

    def _begin_data(self, entry: Entry, block: bytes, sparse: list[tuple[str, bytes]]) -> None:
        """Settle the entry's type and how much data follows."""
        kind = entry.kind
        if kind in (_V7, _CONTIGUOUS):
            # V7 had no type for directories; POSIX says to take a contiguous file for a regular one.
            entry.kind = DIRECTORY if kind == _V7 and entry.name.endswith(b"/") else REGULAR
        if entry.kind == REGULAR:
            self._left, self._padding = entry.size, -entry.size % BLOCK
            if sparse:
                self._read_pax_map(entry, sparse)
        elif kind == _GNU_SPARSE:
            self._read_gnu_map(entry, block)
        elif entry.kind in _KNOWN:
            entry.size = 0
        else:
            raise TarError(f"unknown type {kind!r}", self._name)

    # -- sparse files --

    def _read_gnu_map(self, entry: Entry, block: bytes) -> None:
        """Read the map of an old GNU sparse file: four extents in the header, more in blocks after it."""
        entry.kind = REGULAR
        stored = entry.size
        fields, is_extended = block[386:482], block[482]
        extents: list[Extent] = []
        while True:
            extents += [Extent(_number(a), _number(b)) for a, b in parse_old_map(fields)]
            if not is_extended:
                break
            if len(extents) * 24 > MAX_SPECIAL_BYTES:
                raise TarError("its sparse map is too long", self._name)
            more = self._block()
            if more is None:
                raise TarError("truncated", self._name)
            fields, is_extended = more[:504], more[504]
        entry.size = _number(block[483:495])
        self._left, self._padding = stored, -stored % BLOCK
        self._set_extents(entry, extents, stored)

    def _read_pax_map(self, entry: Entry, records: list[tuple[str, bytes]]) -> None:
        """Take the map of a pax sparse file from its records or, for 1.0, from the head of its data."""
        last = dict(records)
        if last.get("GNU.sparse.major") == b"1" and last.get("GNU.sparse.minor") == b"0":
            extents = self._map_from_data()
        else:
            extents = map_of_pax(records, TarError)
        if name := last.get("GNU.sparse.name"):
            entry.name = self._name = name
        stored = self._left
        real = last.get("GNU.sparse.realsize", last.get("GNU.sparse.size"))
        if real is None:
            raise TarError("a sparse file without its real size", self._name)
        entry.size = _decimal(real)
        self._set_extents(entry, extents, stored)

    def _map_from_data(self) -> list[Extent]:
        """Read a 1.0 map: decimal lines (their number, then offset and length of each) in whole blocks."""
        numbers: list[int] = []
        wanted = 1
        rest = b""
        taken = 0
        while len(numbers) < wanted:
            if taken > MAX_SPECIAL_BYTES or self._left < BLOCK:
                raise TarError("its sparse map is malformed", self._name)
            block = self._block()
            if block is None:
                raise TarError("truncated", self._name)
            self._left -= BLOCK
            taken += BLOCK
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if len(numbers) < wanted:
                    numbers.append(_decimal(line))
                    wanted = 1 + 2 * numbers[0]
        return [Extent(numbers[i], numbers[i + 1]) for i in range(1, wanted, 2)]

    def _set_extents(self, entry: Entry, extents: list[Extent], stored: int) -> None:
        problem = check_extents(extents, entry.size, stored)
        if problem:
            raise TarError(problem, self._name)
        entry.extents = extents


def impossible(entry: Entry) -> str:
    """Return which number of an entry, well-formed as it is, no file of Linux can have; empty where there is none."""
    if entry.size > _MAX_SIZE:
        return f"a size of {entry.size} bytes"
    if max(entry.uid, entry.gid) > _MAX_ID:
        return f"an owner of {entry.uid}:{entry.gid}"
    if not (0 <= entry.major <= _MAX_DEVICE and 0 <= entry.minor <= _MAX_DEVICE):
        return f"a device of {entry.major}:{entry.minor}"
    return ""


def _name_in(block: bytes) -> bytes:
    """Return the name that a header has, with its ustar prefix."""
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:265] == b"ustar\x0000":
        # star keeps times in the last bytes of the prefix.
        prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
        return prefix.partition(b"\0")[0] + b"/" + name
    return name


def _verify_checksum(block: bytes) -> None:
    """Compare the header's checksum: the sum of its bytes with the checksum field read as spaces.

    Adler-32's lower half is one plus that very sum, modulo 65521, and takes a tenth of the time of
    ``sum``. Some old writers summed signed bytes: tried only where the usual sum is wrong.
    """
    stored = _number(block[148:156])
    blanked = block[:148] + b"        " + block[156:]
    if zlib.adler32(blanked) & 0xFFFF != (stored + 1) % _ADLER_MODULUS:
        signed = sum(blanked) - 256 * sum(byte > 127 for byte in blanked)  # noqa: PLR2004
        if signed != stored:
            raise TarError("a header's checksum is wrong")


def _number(field_: bytes) -> int:
    """Parse a number: octal digits, or base-256 where the first bit is set."""
    first = field_[0]
    if first & 0x80:
        value = int.from_bytes(field_, "big")
        bits = 8 * len(field_)
        # Bit 7 of the first byte says base-256, bit 6 is the sign of a two's complement.
        return value - (1 << bits) if first & 0x40 else value & ~(1 << (bits - 1))
    digits = field_.partition(b"\0")[0].strip(b" ") if first else field_.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else _malformed(digits)
    except ValueError:
        return _malformed(digits)


def _malformed(digits: bytes) -> int:
    raise TarError(f"a malformed number {digits!r} in a header")


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:  # noqa: PLR2004  # 20 digits hold 64 bits
        raise TarError(f"a malformed number {text[:40]!r} in an extended header")
    return int(text)


def _time_ns(text: bytes) -> int:
    """Parse a pax time: decimal seconds since the epoch with a fraction, perhaps negative."""
    whole, _, fraction = text.partition(b".")
    sign = -1 if whole.startswith(b"-") else 1
    digits = whole.lstrip(b"-")
    if (fraction and not fraction.isdigit()) or len(whole) - len(digits) > 1:
        raise TarError(f"a malformed time {text[:40]!r} in an extended header")
    return sign * (_decimal(digits) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0")))


def _bounded(time_ns: int) -> int:
    """Take a time that the file system can't have for the epoch, as containerd does."""
    return time_ns if 0 <= time_ns <= _MAX_TIME_NS else 0


def _parse_pax(data: bytes) -> list[tuple[str, bytes]]:
    """Parse pax records, ``LENGTH KEY=VALUE`` and a newline; keys may repeat, and their order counts."""
    records: list[tuple[str, bytes]] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        if space < 0:
            # Some writers pad with zeros.
            if not data[at:].strip(b"\0"):
                break
            raise TarError("a malformed extended header")
        end = at + _decimal(data[at:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(data) or data[end - 1 : end] != b"\n" or not equals or not key:
            raise TarError("a malformed extended header")
        records.append((key.decode("utf-8", "surrogateescape"), value))
        at = end
    return records


def _merge_pax(entry: Entry, records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Let the records change *entry*; return those about sparse files. An empty value means: as the header has it."""
    sparse: list[tuple[str, bytes]] = []
    atime_ns: int | None = None
    for key, value in records:
        if key.startswith(_XATTR):
            entry.xattrs[key[len(_XATTR) :]] = value
        elif key.startswith("GNU.sparse."):
            sparse.append((key, value))
        elif not value:
            continue
        elif key == "path":
            entry.name = _no_nul(value)
        elif key == "linkpath":
            entry.link = _no_nul(value)
        elif key in _PAX_NUMBERS:
            setattr(entry, key, _decimal(value))
        elif key == "mtime":
            entry.mtime_ns = _time_ns(value)
        elif key == "atime":
            atime_ns = _time_ns(value)
    entry.atime_ns = entry.mtime_ns if atime_ns is None else atime_ns
    return sparse


def _no_nul(value: bytes) -> bytes:
    if b"\0" in value:
        raise TarError("a zero byte in a name")
    return value
