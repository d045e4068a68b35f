r"""Patterns that choose files of a tree: those of ``.dockerignore``, and wildcards in names as in ``COPY``.

The rules are those of moby's ``patternmatcher``, which Docker and BuildKit use:

- ``*`` and ``?`` don't match a slash, ``**`` matches any number of directories, also none; ``[a-z]``, ``[^a-z]`` and
  ``\`` are as in Go's ``filepath.Match``;
- a pattern is of the whole path from the root, and matches all that is below what it matches;
- of several patterns the last one that matches decides; one that begins with ``!`` takes the match back.

Names that are no UTF-8 have surrogate escapes, as :func:`os.fsdecode` gives them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import InvalidPatternError


def read_ignore_file(text: str) -> tuple[str, ...]:
    """Return the patterns of an ignore file: one a line; blank lines and those that begin with ``#`` are none."""
    lines = text.removeprefix("\ufeff").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@dataclass(frozen=True, slots=True)
class Match:
    """How patterns stand to one path."""

    is_match: bool
    #: Bit *i*: pattern *i* matches the path or a directory that it is in, whatever later ones say.
    by_pattern: int


#: How patterns stand to the root: it is never matched.
ROOT = Match(is_match=False, by_pattern=0)


class PatternMatcher:
    """Patterns, in their order.

    Raises:
        InvalidPatternError: a pattern is malformed.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        parsed = (_parse(text) for text in patterns)
        self._patterns = [pattern for pattern in parsed if pattern is not None]

    def __repr__(self) -> str:
        return f"PatternMatcher({[pattern.text for pattern in self._patterns]})"

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def matches(self, path: str) -> bool:
        """Tell whether *path*, relative and with slashes, is matched."""
        match, parts = ROOT, path.split("/")
        for depth in range(1, len(parts) + 1):
            match = self.step("/".join(parts[:depth]), match)
        return match.is_match

    def step(self, path: str, above: Match) -> Match:
        """Match *path*, given the match of the directory that it is in (:data:`ROOT` for those at the top).

        For walks: patterns that match a directory aren't tried on what is in it.
        """
        is_match, by_pattern = False, above.by_pattern
        for index, pattern in enumerate(self._patterns):
            bit = 1 << index
            if by_pattern & bit or pattern.regex.fullmatch(path):
                by_pattern |= bit
                is_match = not pattern.is_exception
        return Match(is_match, by_pattern)

    def may_differ_below(self, directory: str, match: Match) -> bool:
        """Tell whether a path in *directory* may stand otherwise than the directory itself does, by *match*.

        May err on the side of True: it saves walks.
        """
        parts = directory.split("/")
        return any(
            pattern.is_exception == match.is_match and pattern.may_match_below(parts) for pattern in self._patterns
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    text: str
    is_exception: bool
    regex: re.Pattern[str]
    #: The components before the first one with a wildcard.
    start: tuple[str, ...]
    #: Whether these are all of it.
    is_literal: bool

    def may_match_below(self, parts: list[str]) -> bool:
        """Tell whether it may match a path in the directory of these components, without matching the directory."""
        common = min(len(parts), len(self.start))
        if tuple(parts[:common]) != self.start[:common]:
            return False
        return not self.is_literal or len(self.start) > len(parts)


def _parse(text: str) -> _Pattern | None:
    """Return a pattern, or None where *text* is blank."""
    stripped = text.strip()
    if not stripped:
        return None
    is_exception = stripped.startswith("!")
    path = stripped.removeprefix("!").strip()
    if not path:
        raise InvalidPatternError(text, "there is nothing after the exclamation mark")
    cleaned = posixpath.normpath(path).lstrip("/")
    if not cleaned:
        return None  # the root, which is never matched
    parts = cleaned.split("/")
    # Specials of regular expressions that are none of patterns are literal here.
    plain = next((index for index, part in enumerate(parts) if re.search(r"[*?\[\\]", part)), len(parts))
    return _Pattern(
        text=stripped,
        is_exception=is_exception,
        regex=re.compile(_translate(text, cleaned), re.DOTALL),
        start=tuple(parts[:plain]),
        is_literal=plain == len(parts),
    )


def has_wildcards(name: str) -> bool:
    """Tell whether *name*, a component of a path, has a wildcard that isn't escaped."""
    return re.search(r"[*?\[]", re.sub(r"\\.", "", name, flags=re.DOTALL)) is not None


def unescaped(name: str) -> str:
    """Return the one name that a pattern without wildcards matches."""
    return re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL)


def name_pattern(name: str) -> re.Pattern[str]:
    """Return what matches whole names as *name*, a component of a path, does by Go's ``filepath.Match``.

    Raises:
        InvalidPatternError: it is malformed.
    """
    return re.compile(_translate(name, name, has_double_stars=False) + r"\Z", re.DOTALL)


def _translate(text: str, pattern: str, *, has_double_stars: bool = True) -> str:
    """Return the regular expression of a cleaned pattern."""
    regex, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if has_double_stars and pattern.startswith("**", at - 1):
            at += 1
            is_whole = pattern.startswith("/", at)
            at += is_whole
            if at == len(pattern) or (not regex and not is_whole and _is_plain(pattern[at:])):
                # "**name" is any path that ends so, "name**" any that begins so: there it stops at no slash.
                regex += ".*"
            else:
                regex += "(?:.*/)?"
        elif char == "*":
            regex += "[^/]*"
        elif char == "?":
            regex += "[^/]"
        elif char == "[":
            set_, at = _translate_set(text, pattern, at)
            regex += set_
        else:
            char, at = _literal(text, pattern, at - 1)
            regex += re.escape(char)
    return regex


def _is_plain(pattern: str) -> bool:
    return re.search(r"[*?\[\]\\]", pattern) is None


def _translate_set(text: str, pattern: str, at: int) -> tuple[str, int]:
    """Return the regular expression of the set whose bracket opens before *at*, and where it ends."""
    is_negated = pattern.startswith("^", at)
    at += is_negated
    ranges: list[str] = []
    while not (ranges and pattern.startswith("]", at)):
        if at >= len(pattern) or pattern[at] in "-]":
            raise InvalidPatternError(text, "a set in brackets is empty, not closed, or has a bare hyphen at an end")
        low, at = _literal(text, pattern, at)
        high = low
        if pattern.startswith("-", at):
            if at + 1 >= len(pattern) or pattern[at + 1] in "-]":
                raise InvalidPatternError(text, "a range in brackets has no end")
            high, at = _literal(text, pattern, at + 1)
        if low > high:
            raise InvalidPatternError(text, f"the range {low}-{high} is upside down")
        ranges.append(f"{re.escape(low)}-{re.escape(high)}")
    return f"[{'^' if is_negated else ''}{''.join(ranges)}]", at + 1


def _literal(text: str, pattern: str, at: int) -> tuple[str, int]:
    """Return the character at *at*, or the one after a backslash there, and what follows it."""
    if pattern[at] != "\\":
        return pattern[at], at + 1
    if at + 1 == len(pattern):
        raise InvalidPatternError(text, "it ends in a backslash")
    return pattern[at + 1], at + 2
