r"""Patterns of names: shell wildcards as in COPY, and lists of what is left out as in .dockerignore.

Wildcards are those of Go's ``filepath.Match``: ``*`` and ``?`` never match ``/``, ``[a-z]`` and ``[^a-z]`` are
ranges, ``\`` takes the meaning away. A list's patterns may have ``**`` for any number of directories and ``!``
for exceptions; the last one that matches decides, and what matches a directory matches all in it
(``moby/patternmatcher``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: A character that takes several bytes; a byte that should go on with one but doesn't counts as one, too.
_WIDE = r"(?:[\xc0-\xff][\x80-\xbf]*(?![\x80-\xbf])|(?<![\x80-\xff])[\x80-\xbf])"


class BadPatternError(ValueError):
    """A pattern is malformed; the caller says what it was for."""


def has_wildcards(pattern: str) -> bool:
    """Tell whether *pattern* has a wildcard that isn't escaped."""
    return re.search(r"[*?\[]", re.sub(r"\\.", "", pattern, flags=re.DOTALL)) is not None


def unescaped(pattern: str) -> str:
    """Return the one name that a pattern without wildcards matches."""
    return re.sub(r"\\(.)", r"\1", pattern, flags=re.DOTALL)


def name_pattern(pattern: str) -> re.Pattern[bytes]:
    """Return what matches whole names as *pattern*, one component of a path, does.

    Raises:
        BadPatternError: it is malformed.
    """
    return _compile(_translate(pattern, has_double_stars=False), pattern)


def _compile(expression: str, pattern: str) -> re.Pattern[bytes]:
    try:
        return re.compile(expression.encode("utf-8", "surrogateescape") + rb"\Z", re.DOTALL)
    except re.error as exc:
        raise BadPatternError(f"malformed pattern {pattern!r}") from exc


def _translate(pattern: str, *, has_double_stars: bool) -> str:
    expression = ""
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if has_double_stars and pattern.startswith("**", at - 1):
            at += 1
            if pattern.startswith("/", at):
                at += 1
            expression += "(?:.*/)?" if at < len(pattern) else ".*"
        elif char == "*":
            expression += "[^/]*"
        elif char == "?":
            expression += rf"(?:(?!/)[\x00-\x7f]|{_WIDE})"
        elif char == "[":
            ranges, at = _ranges(pattern, at)
            expression += ranges
        elif char == "\\":
            if at == len(pattern):
                raise BadPatternError(f"malformed pattern {pattern!r}: it ends in a backslash")
            expression += re.escape(pattern[at])
            at += 1
        else:
            expression += re.escape(char)
    return expression


def _ranges(pattern: str, at: int) -> tuple[str, int]:
    """Translate a character class that begins before *at*; return it, and what is after it."""
    is_negated = pattern.startswith("^", at)
    at += is_negated
    alternatives: list[tuple[str, str]] = []
    while not pattern.startswith("]", at) or not alternatives:
        low, at = _class_character(pattern, at)
        high = low
        if pattern.startswith("-", at):
            high, at = _class_character(pattern, at + 1)
        alternatives.append((low, high))
    if any(char > "\x7f" for pair in alternatives for char in pair):
        raise BadPatternError(f"malformed pattern {pattern!r}: only ASCII characters in brackets are supported")
    ranges = "".join(f"\\x{ord(low):02x}-\\x{ord(high):02x}" for low, high in alternatives)
    if is_negated:
        return rf"(?:(?!/)[^{ranges}\x80-\xff]|{_WIDE})", at + 1
    return f"(?!/)[{ranges}]", at + 1


def _class_character(pattern: str, at: int) -> tuple[str, int]:
    char = pattern[at : at + 1]
    if char == "\\":
        at += 1
        char = pattern[at : at + 1]
    elif char in ("-", "]"):
        char = ""
    if not char:
        raise BadPatternError(f"malformed pattern {pattern!r}")
    return char, at + 1


@dataclass(frozen=True, slots=True)
class _Line:
    expression: re.Pattern[bytes]
    is_exception: bool
    cleaned: bytes


class IgnoreList:
    """What a list of patterns, as in .dockerignore, leaves out.

    Raises:
        BadPatternError: one of them is malformed.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._lines: list[_Line] = []
        for each in patterns:
            pattern = each.strip()
            is_exception = pattern.startswith("!")
            pattern = pattern[1:].strip() if is_exception else pattern
            if not pattern:
                if is_exception:
                    raise BadPatternError("a pattern that is only '!'")
                continue
            pattern = posixpath.normpath("/" + pattern).lstrip("/")
            if not pattern:  # the root itself is never left out
                continue
            expression = _compile(_translate(pattern, has_double_stars=True), pattern)
            self._lines.append(_Line(expression, is_exception, pattern.encode("utf-8", "surrogateescape")))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def leaves_out(self, path: bytes) -> bool:
        """Tell whether *path*, relative and clean, is left out."""
        parts = path.split(b"/")
        above = [b"/".join(parts[: count + 1]) for count in range(len(parts))]
        is_out = False
        for line in self._lines:
            # What would not change the verdict needn't be looked at.
            if line.is_exception == is_out and any(line.expression.match(each) for each in above):
                is_out = not line.is_exception
        return is_out

    def may_keep_below(self, directory: bytes) -> bool:
        """Tell whether an exception may bring back something in *directory*, which is left out."""
        return any(
            line.is_exception and (line.cleaned.startswith(directory + b"/") or re.search(rb"[*?\[]", line.cleaned))
            for line in self._lines
        )
