"""What may go to a terminal, or into a pipe, of texts that came from elsewhere: commands, registries, Dockerfiles."""

from __future__ import annotations

import os
import re
from typing import TextIO

# Sequences that move the cursor, set colours or titles (ECMA-48), also those that are cut off, and characters that
# are none; but for tabs, and what begins the line anew. All in one pass: what is left must not make another one.
_NO_TEXT = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*(?:[@-~]|$)"
    r"|\x1b(?:[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
    r"|[\x00-\x08\x0a-\x0c\x0e-\x1f\x7f-\x9f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_RESET = "\x1b[0m"


def wants_colours(stream: TextIO) -> bool:
    """Tell whether to colour what goes there: a terminal that has colours, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(line: str, *, colours: bool = False) -> str:
    """Return a line as a terminal would leave it, without what moves its cursor; what was overwritten is gone.

    Args:
        line: Text without a newline.
        colours: Keep those; they end with the line.
    """
    if line.isprintable():  # nearly all are
        return line
    shown = _NO_TEXT.sub(_coloured if colours else "", line)
    overwritten = [part for part in shown.split("\r") if part]
    left = overwritten[-1] if overwritten else ""
    return left + _RESET if "\x1b" in left and not left.endswith(_RESET) else left


def _coloured(found: re.Match[str]) -> str:
    return found[0] if _COLOUR.fullmatch(found[0]) else ""


def one_line(text: str) -> str:
    """Return a text of several lines as one, fit for a terminal."""
    return visible(" ".join(text.split()))
