"""Maps of sparse files in tar archives: which ranges of the file have data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """A range of a sparse file that has data."""

    offset: int
    length: int


def parse_old_map(fields: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the number fields of (offset, length) pairs of an old GNU map, up to the first empty one."""
    for at in range(0, len(fields) - 23, 24):
        offset, length = fields[at : at + 12], fields[at + 12 : at + 24]
        if not offset[0] and not length[0]:
            return
        yield offset, length


def map_of_pax(records: list[tuple[str, bytes]], error: type[Exception]) -> list[Extent]:
    """Return the map of a pax sparse file of format 0.0 (repeated records) or 0.1 (one list).

    Raises:
        error: it is malformed.
    """
    numbers: list[bytes] = []
    for key, value in records:
        if key == "GNU.sparse.map":
            numbers = value.split(b",") if value else []
        elif key in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
            if (key == "GNU.sparse.numbytes") != bool(len(numbers) % 2):
                raise error("its sparse map is malformed")
            numbers.append(value)
    if len(numbers) % 2 or not all(number.isdigit() and len(number) <= 20 for number in numbers):  # noqa: PLR2004
        raise error("its sparse map is malformed")
    return [Extent(int(numbers[i]), int(numbers[i + 1])) for i in range(0, len(numbers), 2)]


def check_extents(extents: list[Extent], size: int, stored: int) -> str:
    """Return what is wrong with a map, or an empty string.

    The extents must ascend without overlap within *size*, and come to the *stored* bytes.
    """
    at = 0
    total = 0
    for extent in extents:
        if extent.offset < at or extent.length < 0:
            return "its sparse map overlaps or descends"
        at = extent.offset + extent.length
        total += extent.length
    if at > size:
        return "its sparse map goes past its end"
    return "" if total == stored else "its sparse map does not match its data"
