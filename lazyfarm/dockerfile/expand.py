"""Words of a Dockerfile: quotes, escapes and variables, as BuildKit's ``frontend/dockerfile/shell`` takes them.

A subset of the POSIX shell's word expansion: ``$x``, ``${x}``, ``${x:-word}`` with ``-``, ``+`` and ``?``, with and
without the colon, ``${x#pattern}``, ``##``, ``%``, ``%%``, ``${x/pattern/word}`` and ``//``. A variable that is not
set is empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lazyfarm.dockerfile.refused import RefusedError

#: The escape character where no directive says otherwise.
DEFAULT_ESCAPE = "\\"

_NAME = re.compile(r"[^\W\d]\w*|\d+|[@*#?\-$!]")
_MODIFIERS = frozenset("-+?#%/")


def expand(text: str, env: Mapping[str, str], escape: str = DEFAULT_ESCAPE) -> str:
    """Return *text* as one word: quotes and escapes taken off, variables replaced.

    Raises:
        RefusedError: a quote or brace is not closed, a substitution is malformed, or ``${x:?}`` refuses.
    """
    return _Lexer(text, env, escape).read()[0]


def expand_words(text: str, env: Mapping[str, str], escape: str = DEFAULT_ESCAPE) -> list[str]:
    """Return the words of *text*, split at blanks that are not quoted, also those that variables bring.

    Raises:
        RefusedError: as :func:`expand`.
    """
    return _Lexer(text, env, escape).read()[1]


def expand_body(text: str, env: Mapping[str, str]) -> str:
    r"""Return the body of a here-document with its variables replaced; quotes stay, a backslash escapes.

    As in BuildKit, and unlike in the shell, a backslash before any character goes.

    Raises:
        RefusedError: as :func:`expand`.
    """
    return _Lexer(text, env, DEFAULT_ESCAPE, has_quotes=False).read()[0]


def unquote(word: str, escape: str) -> str:
    """Take quotes and escapes off; variables stay."""
    result: list[str] = []
    quote = ""
    characters = iter(word)
    for character in characters:
        if quote and character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif character == escape and quote != "'":
            result.append(next(characters, ""))
        else:
            result.append(character)
    return "".join(result)


def split_raw(text: str, escape: str) -> tuple[str, str]:
    """Return the first word of *text*, quotes and escapes left as they are, and what follows the blanks after it.

    Raises:
        RefusedError: a quote is not closed.
    """
    text = text.lstrip()
    quote = ""
    at = 0
    while at < len(text):
        character = text[at]
        if character == escape and quote != "'":
            at += 1
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character.isspace():
            break
        at += 1
    if quote:
        raise RefusedError(f"a quote {quote} is not closed")
    return text[:at], text[at:].lstrip()


def raw_words(text: str, escape: str) -> list[str]:
    """Return the words of *text*, quotes and escapes left as they are.

    Raises:
        RefusedError: a quote is not closed.
    """
    words = []
    rest = text.strip()
    while rest:
        word, rest = split_raw(rest, escape)
        words.append(word)
    return words


class _Words:
    """Characters gathered into words."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._word = ""

    def add_quoted(self, text: str) -> None:
        self._word += text

    def add(self, text: str) -> None:
        """Add text that is split at its blanks."""
        for character in text:
            if not character.isspace():
                self._word += character
            else:
                self.end()

    def end(self) -> None:
        if self._word:
            self.done.append(self._word)
        self._word = ""


class _Lexer:
    """One pass over a text."""

    def __init__(self, text: str, env: Mapping[str, str], escape: str, *, has_quotes: bool = True) -> None:
        self._text = text
        self._env = env
        self._escape = escape
        self._has_quotes = has_quotes
        self._at = 0

    def read(self) -> tuple[str, list[str]]:
        """Return the whole text as one word, and as words."""
        return self._read_until("", keeps_escapes=False)

    @property
    def _next(self) -> str:
        """The next character; "" at the end."""
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._next
        self._at += len(character)
        return character

    def _read_until(self, stop: str, *, keeps_escapes: bool) -> tuple[str, list[str]]:
        """Read up to and with the character *stop*; "" for the end of the text."""
        result: list[str] = []
        words = _Words()
        while character := self._take():
            if stop and character == stop:
                break
            if character == "$":
                part = self._variable()
                words.add(part)
            elif self._has_quotes and character in "'\"":
                part = self._single_quoted() if character == "'" else self._double_quoted(keeps_escapes=keeps_escapes)
                words.add_quoted(part)
            elif character == self._escape:
                # At the very end of the text an escape escapes nothing, and goes.
                part = (character if keeps_escapes else "") + self._take()
                words.add_quoted(part)
            else:
                part = character
                words.add(part)
            result.append(part)
        else:
            if stop:
                raise RefusedError(f"a {stop} is missing in a substitution")
        words.end()
        return "".join(result), words.done

    def _single_quoted(self) -> str:
        end = self._text.find("'", self._at)
        if end < 0:
            raise RefusedError("a quote ' is not closed")
        quoted = self._text[self._at : end]
        self._at = end + 1
        return quoted

    def _double_quoted(self, *, keeps_escapes: bool) -> str:
        result: list[str] = []
        while character := self._take():
            if character == '"':
                return "".join(result)
            if character == "$":
                result.append(self._variable())
            elif character == self._escape and self._next in ('"', "$", self._escape):
                result.append((character if keeps_escapes else "") + self._take())
            else:
                result.append(character)
        raise RefusedError('a quote " is not closed')

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _variable(self) -> str:
        """Read a variable whose ``$`` was just taken, and return what it stands for."""
        if self._next != "{":
            name = self._name()
            return self._env.get(name, "") if name else "$"
        start = self._at - 1
        self._take()
        name = self._name()
        if not name:
            raise RefusedError(f"bad substitution at {self._text[start : start + 20]!r}")
        modifier = self._take()
        if modifier == "}":
            return self._env.get(name, "")
        is_empty_unset = modifier == ":"
        if is_empty_unset:
            modifier = self._take()
        if not modifier:
            raise RefusedError("a } is missing in a substitution")
        if modifier not in _MODIFIERS or (is_empty_unset and modifier not in "-+?"):
            colon = ":" if is_empty_unset else ""
            raise RefusedError(f"the modifier {colon}{modifier} in a substitution is not supported")
        return self._modified(name, modifier, is_empty_unset=is_empty_unset)

    def _modified(self, name: str, modifier: str, *, is_empty_unset: bool) -> str:
        value = self._env.get(name, "")
        if modifier in "#%":
            return self._trimmed(value, modifier)
        if modifier == "/":
            return self._replaced(value)
        word, _ = self._read_until("}", keeps_escapes=False)
        is_set = name in self._env and not (is_empty_unset and not value)
        if modifier == "+":
            return word if is_set else ""
        if is_set:
            return value
        if modifier == "-":
            return word
        raise RefusedError(f"{name}: {word or 'is not allowed to be unset or empty'}")

    def _trimmed(self, value: str, modifier: str) -> str:
        pattern, _ = self._read_until("}", keeps_escapes=True)
        is_longest = pattern.startswith(modifier)
        matches = _compile(pattern[1:] if is_longest else pattern).fullmatch
        lengths = range(len(value) + 1)
        for length in reversed(lengths) if is_longest else lengths:
            if modifier == "#" and matches(value[:length]):
                return value[length:]
            if modifier == "%" and matches(value[len(value) - length :]):
                return value[: len(value) - length]
        return value

    def _replaced(self, value: str) -> str:
        is_every = self._next == "/"
        if is_every:
            self._take()
        pattern, _ = self._read_until("/", keeps_escapes=True)
        word, _ = self._read_until("}", keeps_escapes=False)
        return _compile(pattern).sub(lambda _: word, value, count=0 if is_every else 1)


def _compile(pattern: str) -> re.Pattern[str]:
    """Turn a shell pattern into a regular expression: ``*``, ``?`` and backslash escapes; no brackets."""
    result: list[str] = []
    characters = iter(pattern)
    for character in characters:
        if character == "*":
            result.append(".*")
        elif character == "?":
            result.append(".")
        else:
            result.append(re.escape(next(characters, "\\") if character == "\\" else character))
    return re.compile("".join(result), re.DOTALL)
