"""The lines of a Dockerfile: directives, comments, continuation, flags and heredocs. No instruction's own rules.

After BuildKit's ``frontend/dockerfile/parser``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import DockerfileError
from lazyfarm.dockerfile.expand import DEFAULT_ESCAPE, raw_words, split_raw, unquote
from lazyfarm.dockerfile.refused import RefusedError

_DIRECTIVE = re.compile(r"#\s*(?P<name>[a-zA-Z][a-zA-Z0-9]*)\s*=\s*(?P<value>.+?)\s*\Z")
_DIRECTIVES = frozenset({"escape", "syntax", "check"})
_ESCAPES = frozenset({"\\", "`"})
_HEREDOC = re.compile(r"(?P<fd>\d*)<<(?P<chomp>-?)(?P<name>[^<]*)\Z")
_BARE_OPENER = re.compile(r"\d*<<-?\Z")
#: Whose arguments may open heredocs.
_WITH_HEREDOCS = frozenset({"ADD", "COPY", "RUN"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Heredoc:
    """A here-document that follows an instruction."""

    #: The word that ends it, without its quotes.
    name: str
    #: The body as it stands in the file, its last newline included; "" for none.
    content: str
    #: False where a part of the word was quoted: variables in the body stay as they are.
    is_expanded: bool = True
    #: ``<<-``: tabs at the start of lines are dropped.
    is_chomped: bool = False

    @property
    def data(self) -> str:
        """Return the body as the reader of the here-document sees it, but for its variables."""
        return re.sub(r"^\t+", "", self.content, flags=re.MULTILINE) if self.is_chomped else self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One instruction as it was written: lines joined, comments gone, nothing expanded."""

    #: In upper case.
    keyword: str
    #: The words before the arguments that start with ``--``, quotes removed.
    flags: tuple[str, ...]
    #: What follows, as written.
    arguments: str
    heredocs: tuple[Heredoc, ...]
    #: First and last line in the file, from 1.
    line: int
    last_line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Dockerfile's statements, in order, and what its directives say."""

    #: For messages.
    file: str
    #: ``\\`` or ````` `````.
    escape: str
    #: The ``syntax`` directive; "" for none.
    syntax: str
    statements: tuple[Statement, ...]


def read_statements(text: str, file: str) -> Source:
    """Split a Dockerfile into its statements.

    Args:
        text: The Dockerfile.
        file: Its name, for messages.

    Raises:
        DockerfileError: a directive, a flag or a heredoc is malformed, or there is no instruction at all.
    """
    # Only "\n" ends a line: str.splitlines would also split at form feeds and Unicode's separators.
    lines = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").split("\n")
    if lines[-1] == "":
        lines.pop()
    escape, syntax = _directives(lines, file)
    statements = tuple(_Reader(lines, escape, file).statements())
    if not statements:
        raise DockerfileError(file, 1, "there are no instructions")
    return Source(file=file, escape=escape, syntax=syntax, statements=statements)


def read_json_words(text: str) -> tuple[str, ...] | None:
    """Return the strings of a JSON array; None where *text* is none, which makes it shell form.

    Raises:
        ValueError: it is an array, but not of strings.
    """
    text = text.strip()
    if not text.startswith("["):
        return None
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(word, str) for word in words):
        raise ValueError("a JSON array here must be of strings only")
    return tuple(words)


def _directives(lines: list[str], file: str) -> tuple[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        directive = _DIRECTIVE.match(line.strip())
        name = directive["name"].lower() if directive else ""
        if directive is None or name not in _DIRECTIVES:
            break
        if name in found:
            raise DockerfileError(file, number, f"there is a second {name} directive")
        found[name] = directive["value"]
        if name == "escape" and directive["value"] not in _ESCAPES:
            raise DockerfileError(file, number, f"the escape directive must be \\ or `, not {directive['value']!r}")
    return found.get("escape", DEFAULT_ESCAPE), found.get("syntax", "")


class _Reader:
    """Reads statements off lines, from the first to the last."""

    def __init__(self, lines: list[str], escape: str, file: str) -> None:
        self._lines = lines
        self._escape = escape
        self._file = file
        #: Lines read so far; the number of the last one.
        self._at = 0
        # An escape that is itself escaped continues nothing.
        mark = re.escape(escape)
        self._continued = re.compile(rf"(?<!{mark}){mark}[ \t]*\Z")

    def statements(self) -> Iterator[Statement]:
        while self._at < len(self._lines):
            line = self._next().strip()
            if line and not line.startswith("#"):
                statement = self._statement(line)
                if statement.keyword:  # none where there was nothing but a continuation
                    yield statement

    def _statement(self, first: str) -> Statement:
        start = self._at
        text, is_continued = self._cut(first)
        while is_continued and self._at < len(self._lines):
            line = self._next().removesuffix("\r")
            # Comments and empty lines within a statement are dropped, and continue it.
            if line.strip() and not line.lstrip().startswith("#"):
                more, is_continued = self._cut(line)
                text += more
        keyword, *rest = text.split(maxsplit=1) or [""]
        flags, arguments = self._flags("".join(rest).strip(), start)
        keyword = keyword.upper()
        openers = self._openers(keyword, arguments, start)
        heredocs = tuple([self._body(opener, start) for opener in openers])
        return Statement(
            keyword=keyword, flags=flags, arguments=arguments, heredocs=heredocs, line=start, last_line=self._at
        )

    def _next(self) -> str:
        line = self._lines[self._at]
        self._at += 1
        return line

    def _cut(self, line: str) -> tuple[str, bool]:
        cut = self._continued.sub("", line)
        return cut, cut != line

    def _flags(self, text: str, line: int) -> tuple[tuple[str, ...], str]:
        """Take the words that start with ``--`` off *text*; a lone ``--`` ends them."""
        flags = []
        rest = text
        while rest.startswith("--"):
            try:
                word, rest = split_raw(rest, self._escape)
                if word != "--":
                    flags.append(unquote(word, self._escape))
            except RefusedError as exc:
                raise DockerfileError(self._file, line, str(exc)) from exc
            if word == "--":
                break
        return tuple(flags), rest

    def _openers(self, keyword: str, arguments: str, line: int) -> list[Heredoc]:
        if keyword == "ONBUILD":
            inner, _, arguments = arguments.partition(" ")
            keyword = inner.upper()
        if keyword not in _WITH_HEREDOCS or "<<" not in arguments or _is_json(arguments):
            return []
        openers: list[Heredoc] = []
        rest = arguments
        depth = 0
        while rest:
            try:
                word, rest = split_raw(rest, self._escape)
            except RefusedError:
                return []  # An unclosed quote is for the command's shell to complain of.
            depth += word.count("((") - word.count("))")
            if depth > 0:
                continue  # In "$(( 1 << 2 ))" it is a shift.
            if _BARE_OPENER.match(word) and rest:
                # "<< EOF": the shell allows blanks before the word.
                name, rest = split_raw(rest, self._escape)
                word += name
            try:
                opener = parse_opener(word)
            except RefusedError as exc:
                raise DockerfileError(self._file, line, f"heredoc {word}: {exc}") from exc
            if opener is not None:
                openers.append(opener)
        return openers

    def _body(self, opener: Heredoc, line: int) -> Heredoc:
        content: list[str] = []
        while self._at < len(self._lines):
            text = self._next()
            end = text.removesuffix("\r")
            if (end.lstrip("\t") if opener.is_chomped else end) == opener.name:
                return Heredoc(
                    name=opener.name,
                    content="".join(content),
                    is_expanded=opener.is_expanded,
                    is_chomped=opener.is_chomped,
                )
            content.append(text + "\n")
        raise DockerfileError(self._file, line, f"heredoc {opener.name} is not ended by a line {opener.name!r}")


def _is_json(arguments: str) -> bool:
    try:
        return read_json_words(arguments) is not None
    except ValueError:
        return True


def parse_opener(word: str) -> Heredoc | None:
    """Return the heredoc that *word* opens, without its body; None where it opens none.

    Raises:
        RefusedError: a quote in it is not closed.
    """
    found = _HEREDOC.match(word)
    # Heredocs are the shell's: their quoting knows only the backslash.
    words = raw_words(found["name"], DEFAULT_ESCAPE) if found else []
    if found is None or len(words) != 1:
        return None
    is_quoted = re.search(r"['\"]", re.sub(r"\\.", "", words[0])) is not None
    name = unquote(words[0], DEFAULT_ESCAPE)
    return Heredoc(name=name, content="", is_expanded=not is_quoted, is_chomped=bool(found["chomp"]))
