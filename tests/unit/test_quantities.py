"""Durations and sizes as they are typed."""

import pytest

from cluster.errors import InvalidArgumentError
from lazyfarm.cli.quantities import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("7d", 604800), ("2w", 1209600), ("1.5h", 5400), ("0s", 0)]
)
def test_durations(text, seconds):
    assert parse_duration("--ttl", text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("123", 123), ("512MB", 512_000_000), ("512m", 512_000_000), ("10GiB", 10 * 2**30), ("1.5 KiB", 1536)],
)
def test_sizes(text, count):
    assert parse_size("--keep-bytes", text) == count


@pytest.mark.parametrize("text", ["", "5", "h", "1x", "-1s", "1h 30m", "1e3s"])
def test_what_is_no_duration_is_refused_by_its_option(text):
    with pytest.raises(InvalidArgumentError, match="--ttl can't be"):
        parse_duration("--ttl", text)


@pytest.mark.parametrize("text", ["", "MB", "1XB", "-1", "1 G i", "0x10"])
def test_what_is_no_size_is_refused_by_its_option(text):
    with pytest.raises(InvalidArgumentError, match="--keep-bytes can't be"):
        parse_size("--keep-bytes", text)
