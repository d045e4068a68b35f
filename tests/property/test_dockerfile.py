"""Dockerfiles written in any way: what was meant is read back, and what can't be read is refused with its line."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st

from cluster.errors import DockerfileError
from lazyfarm.dockerfile.expand import expand, expand_words, raw_words
from lazyfarm.dockerfile.instructions import parse_dockerfile
from lazyfarm.dockerfile.parser import Heredoc, read_statements

#: What words are made of: all that quoting is about, and some that it isn't.
TEXT = st.text(st.sampled_from("ab/=.-_#$\\\"'` {}é"), max_size=12)
#: Words that need no quotes and open no heredoc.
PLAIN = st.text(st.sampled_from("abc/=.$_é"), min_size=1, max_size=8)
ENVIRONMENT = st.dictionaries(st.sampled_from(["a", "b", "ab"]), TEXT)


def single_quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def double_quoted(text):
    return '"' + "".join("\\" + one if one in '"$\\' else one for one in text) + '"'


def escaped(text):
    return "".join("\\" + one for one in text)


@st.composite
def quoted(draw):
    """Return a text and a way to write it, each part in a style of its own."""
    parts = draw(st.lists(st.tuples(TEXT, st.sampled_from([single_quoted, double_quoted, escaped])), min_size=1))
    text, source = "".join(text for text, _ in parts), "".join(style(text) for text, style in parts)
    # At a line's end a backslash before white space is none that escapes it: it continues the line.
    return text, source + "''" if source.endswith(" ") else source


@given(quoted(), ENVIRONMENT)
def test_what_is_quoted_is_itself(written, env):
    """However it is quoted, and whatever variables there are."""
    text, source = written

    assert expand(source, env) == text


@given(st.lists(quoted().filter(lambda pair: pair[0])), ENVIRONMENT)
def test_quoted_words_stay_apart(words, env):
    """Splitting finds the words that were written, expanded at once or one by one."""
    line = " \t ".join(source for _, source in words)

    assert expand_words(line, env) == [text for text, _ in words]
    assert [expand(word, env) for word in raw_words(line, "\\")] == [text for text, _ in words]


@given(st.lists(st.tuples(st.from_regex(r"[A-Z_]{1,6}", fullmatch=True), quoted()), min_size=1))
def test_pairs_are_read_back(pairs):
    """ENV's names and values, whatever the values are."""
    line = " ".join(f"{name}={source}" for name, (_, source) in pairs)
    (stage,) = parse_dockerfile(f"FROM a\nENV {line}\n").stages
    (env,) = stage.instructions

    assert [(name, expand(value, {})) for name, value in env.items] == [(name, text) for name, (text, _) in pairs]


@dataclass(frozen=True)
class Written:
    """A statement as meant, and as written."""

    keyword: str
    flags: tuple[str, ...]
    arguments: str
    heredocs: tuple[Heredoc, ...]
    source: str


@st.composite
def heredoc(draw):
    """Return a heredoc and its opener; the body holds anything but the line that ends it."""
    name = draw(st.from_regex(r"[A-Z]{1,4}", fullmatch=True))
    lines = draw(st.lists(st.text(st.sampled_from("af#\\ \t<'\"$"), max_size=8), max_size=4))
    chomped, expanded = draw(st.booleans()), draw(st.booleans())
    opener = "<<" + "-" * chomped + (name if expanded else single_quoted(name))
    content = "".join(f"{line}\n" for line in lines)
    return Heredoc(name=name, content=content, is_expanded=expanded, is_chomped=chomped), opener


@st.composite
def statements(draw):
    """Return a statement, its words on any number of lines with comments between them."""
    keyword = draw(st.sampled_from(["RUN", "COPY", "ADD", "ENV", "CMD"]))
    flags = draw(st.lists(st.from_regex(r"--[a-z]{1,4}=[a-z,=/]{1,6}", fullmatch=True), max_size=2))
    # A comment begins a line, a flag the arguments, and JSON has heredocs of its own: plain words do neither.
    words = draw(st.lists(PLAIN, min_size=1, max_size=4))
    docs = draw(st.lists(heredoc(), max_size=2)) if keyword in ("RUN", "COPY", "ADD") else []
    words[1:1] = [opener for _, opener in docs]
    shown = draw(st.sampled_from([str.upper, str.lower, str.title]))(keyword)
    pieces = [shown, *flags, *words]
    gaps = draw(
        st.lists(
            st.sampled_from([" ", " \\\n", " \\  \n", " \\\n# comment \\\n", " \\\n\n  # x\n"]),
            min_size=len(pieces) - 1,
            max_size=len(pieces) - 1,
        )
    )
    source = "".join(piece + gap for piece, gap in zip(pieces, [*gaps, ""], strict=True)) + "\n"
    bodies = "".join(f"{doc.content}{draw(indent(doc))}{doc.name}\n" for doc, _ in docs)
    return Written(keyword, tuple(flags), " ".join(words), tuple(doc for doc, _ in docs), source + bodies)


def indent(doc):
    return st.sampled_from(["", "\t", "\t\t"] if doc.is_chomped else [""])


@given(st.lists(st.tuples(st.sampled_from(["", "\n", "# comment \\\n", "  \n"]), statements()), min_size=1))
def test_statements_are_read_back(written):
    """However they are laid out: keyword, flags, words, heredocs, and the lines that they take."""
    meant, text, line = [], "", 1
    for before, one in written:
        text += before + one.source
        line += before.count("\n")
        last = line + one.source.count("\n") - 1
        meant.append((one.keyword, one.flags, one.arguments, one.heredocs, line, last))
        line = last + 1
    read = read_statements(text, "f").statements

    assert [(s.keyword, s.flags, s.arguments, s.heredocs, s.line, s.last_line) for s in read] == meant


@given(
    st.lists(
        st.one_of(
            TEXT,
            st.sampled_from(["FROM a", "RUN <<E", "E", "COPY [", "ENV a=${b", "# escape=`", "ARG", "HEALTHCHECK CMD"]),
            st.builds(" ".join, st.tuples(st.sampled_from(["RUN", "COPY", "ENV", "EXPOSE", "SHELL", "FROM"]), TEXT)),
        )
    )
)
@example(["FROM a", "RUN <<$("])
def test_any_text_is_read_or_refused_with_its_line(lines):
    """Nothing else happens, whatever is in it."""
    try:
        dockerfile = parse_dockerfile("\n".join(lines), "f")
    except DockerfileError as error:
        assert 1 <= error.line <= max(1, len(lines))  # noqa: PT017 - that it is raised is no rule
    else:
        assert dockerfile.stages
