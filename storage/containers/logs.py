"""What a command says, as lines: bounded, and without the values of secrets."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.job import LogStream
from cluster.redact import REDACTED

#: Longer lines come in pieces.
MAX_LINE_BYTES: Final = 16 << 10
#: Shortest line of a secret of several lines that is taken out by itself: a lone brace says nothing.
_MIN_PART_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line, or a piece of one."""

    stream: LogStream
    #: Without its end; what is no UTF-8 is replaced.
    text: str
    #: Whether the line goes on in the next piece of this stream.
    is_partial: bool = False


#: Takes lines as they come; waited for, so that a slow one slows the command and nothing piles up.
LogSink = Callable[[Sequence[LogLine]], Awaitable[None]]


class Redactor:
    """Takes the values of secrets out of a stream, wherever its pieces are cut.

    Whole values, values without the white space around them, and lines of values of several lines. The
    end of a piece that may be the beginning of a value is held back until it is known.
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        values: set[bytes] = set()
        for secret in secrets:
            values |= {secret, secret.strip()}
            values |= {part.strip() for part in secret.splitlines() if len(part.strip()) >= _MIN_PART_BYTES}
        #: The longest first: of two that begin alike, it is the one to be taken out.
        self._values = sorted((value for value in values if value.strip()), key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._values))) if self._values else None
        self._by_first: dict[int, list[bytes]] = {}
        for value in self._values:
            self._by_first.setdefault(value[0], []).append(value)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what can be shown after *data*."""
        if self._pattern is None:
            return data
        data = self._held + data
        hold = self._hold_from(data)
        shown = bytearray()
        at = 0
        for match in self._pattern.finditer(data):
            if match.start() >= hold:
                break
            shown += data[at : match.start()] + REDACTED.encode()
            at = match.end()
        hold = max(hold, at)
        self._held = data[hold:]
        return bytes(shown + data[at:hold])

    def end(self) -> bytes:
        """Return what was held back: the stream is over."""
        held, self._held = self._held, b""
        return held if self._pattern is None else self._pattern.sub(REDACTED.encode(), held)

    def _hold_from(self, data: bytes) -> int:
        """Return where the longest end of *data* begins that is a proper beginning of a value."""
        longest = len(self._values[0]) - 1
        for start in range(max(len(data) - longest, 0), len(data)):
            length = len(data) - start
            for value in self._by_first.get(data[start], ()):
                if length < len(value) and data.endswith(value[:length]):
                    return start
        return len(data)


class LineReader:
    """Cuts one stream into lines."""

    def __init__(self, stream: LogStream, secrets: Iterable[bytes]) -> None:
        self._stream = stream
        self._redactor = Redactor(secrets)
        self._rest = b""

    @property
    def has_rest(self) -> bool:
        """Tell whether there is a line that has no end yet."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[LogLine]:
        """Return the lines that *data* completes."""
        return self._cut(self._redactor.feed(data))

    def flush(self) -> list[LogLine]:
        """Return the line that has no end yet, for those who wait: a prompt, a row of dots."""
        rest, self._rest = self._rest, b""
        return [self._line(rest, is_partial=True)] if rest else []

    def end(self) -> list[LogLine]:
        """Return the rest: the stream is over."""
        lines = self._cut(self._redactor.end())
        rest, self._rest = self._rest, b""
        return [*lines, self._line(rest)] if rest else lines

    def _cut(self, data: bytes) -> list[LogLine]:
        lines: list[LogLine] = []
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            pieces = _pieces(line.removesuffix(b"\r"))
            lines += [self._line(piece, is_partial=True) for piece in pieces[:-1]]
            lines.append(self._line(pieces[-1]))
        if len(self._rest) > MAX_LINE_BYTES:
            *pieces, self._rest = _pieces(self._rest)
            lines += [self._line(piece, is_partial=True) for piece in pieces]
        return lines

    def _line(self, data: bytes, *, is_partial: bool = False) -> LogLine:
        return LogLine(self._stream, data.decode("utf-8", "replace"), is_partial)


def _pieces(line: bytes) -> list[bytes]:
    """Cut a line where it gets too long, but never within a character."""
    pieces: list[bytes] = []
    while len(line) > MAX_LINE_BYTES:
        cut = MAX_LINE_BYTES
        while cut > MAX_LINE_BYTES - 4 and line[cut] & 0xC0 == 0x80:  # noqa: PLR2004  # a byte that goes on with one
            cut -= 1
        pieces.append(line[:cut])
        line = line[cut:]
    return [*pieces, line]
