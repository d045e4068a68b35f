"""Patterns of ignore files: what moby's matcher says of a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidPatternError
from cluster.patterns import ROOT, PatternMatcher, read_ignore_file


@pytest.mark.parametrize(
    ("pattern", "path", "is_match"),
    [
        # ** is any number of directories
        ("**", "file", True),
        ("**/", "dir/file", True),
        ("**/**", "dir/file", True),
        ("dir/**", "dir/a/b", True),
        ("dir/**", "dir", False),
        ("**/dir", "dir", True),
        ("**/dir", "a/dir/file", True),
        ("**/dir2/*", "dir/dir2/file", True),
        ("**/dir2/**", "dir/dir2/dir3/file", True),
        ("**/.foo", ".foo", True),
        ("**/.foo", "bar.foo", False),
        ("**/file*.txt", "a/b/file1.txt", True),
        ("**/**/*.txt2", "a/b/file.txt", False),
        ("a**/*.txt", "a/dir/dir/file.txt", True),
        ("a/*.txt**", "a/file.txt", True),
        # without a slash beside it, at an end, it stops at no slash
        ("**file", "dir/dir/file", True),
        ("**file", "dir/profile", True),
        ("**file*", "profile", False),
        ("name**", "names/x", True),
        # * and ? don't match slashes
        ("*", "file", True),
        ("*", "dir/file", True),  # as dir is matched
        ("*.txt", "dir/a.txt", False),
        ("a/*.txt", "a/dir/file.txt", False),
        ("a?b", "a/b", False),
        ("a?b", "a☺b", True),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", False),
        # what is in a matched directory is matched
        ("docs", "docs/a/b", True),
        ("docs/", "docs/a", True),
        ("docs", "docs2", False),
        # from the root, however it is written
        ("/docs", "docs/a", True),
        ("./docs//a/../a", "docs/a", True),
        ("docs", "src/docs", False),
        ("/", "docs", False),
        # sets
        ("a[b-d]e", "ace", True),
        ("a[b-d]e", "aae", False),
        ("a[^b-d]e", "aze", True),
        ("[!a]", "!", True),
        ("[a-ж]*", "д", True),
        ("[\\]a]", "]", True),
        ("[x\\-]", "-", True),
        ("[[a]", "[", True),
        # escapes, and what is special elsewhere only
        ("a\\*b", "a*b", True),
        ("a\\*b", "axb", False),
        ("\\!a", "!a", True),
        ("a.|)$(}+{bc", "a.|)$(}+{bc", True),
        ("abc.def", "abcZdef", False),
        ("x]", "x]", True),
    ],
)
def test_a_pattern_matches_as_in_docker(pattern, path, is_match):
    """One pattern against one path, by moby's rules."""
    assert PatternMatcher([pattern]).matches(path) is is_match


@pytest.mark.parametrize(
    ("patterns", "path", "is_match"),
    [
        (["*.go", "!main.go"], "main.go", False),
        (["!main.go", "*.go"], "main.go", True),
        (["docs/", "!docs/README.md"], "docs/README.md", False),
        (["docs/", "!docs/README.md"], "docs/other.md", True),
        (["**", "!util/docker/web"], "util/docker/web/foo", False),
        (["**", "!util/docker/web", "util/docker/web/foo"], "util/docker/web/foo", True),
        (["*", "! dist/*.whl"], "dist/a+b.whl", False),
        (["*", "!foo/x", "foo"], "foo/x", True),
        (["", "  docs  "], "docs", True),
        ([], "docs", False),
    ],
)
def test_the_last_match_decides(patterns, path, is_match):
    """Exceptions take back what patterns before them match, and later patterns match it again."""
    assert PatternMatcher(patterns).matches(path) is is_match


@pytest.mark.parametrize(
    "pattern", ["!", "! ", "[", "[]", "[]a]", "[^", "[^bc", "a[", "[-]", "[x-]", "[-x]", "[a-b-c]", "[z-a]", "a\\"]
)
def test_a_malformed_pattern_is_refused(pattern):
    """A pattern that means nothing is an error that names it."""
    with pytest.raises(InvalidPatternError) as raised:
        PatternMatcher([pattern])

    assert raised.value.pattern == pattern


def test_comments_and_blank_lines_are_no_patterns():
    """An ignore file may begin with a byte order mark; only a # in the first column makes a comment."""
    assert read_ignore_file("\ufeff# x\n\n  a/b  \r\n!c\n #d\n") == ("a/b", "!c", "#d")


COMPONENT = st.sampled_from(["a", "b", "ab"])
PATH = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join)
PATTERN = st.builds(
    str.__add__,
    st.sampled_from(["", "!"]),
    st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "?b", "[a]"]), min_size=1, max_size=4).map("/".join),
)


@given(patterns=st.lists(PATTERN, max_size=5), directory=PATH, below=PATH)
def test_a_walk_may_skip_where_nothing_differs(patterns, directory, below):
    """Where nothing is said to differ below a directory, all in it stands as the directory does."""
    matcher = PatternMatcher(patterns)
    match, parts = ROOT, directory.split("/")
    for depth in range(1, len(parts) + 1):
        match = matcher.step("/".join(parts[:depth]), match)

    if not matcher.may_differ_below(directory, match):
        assert matcher.matches(f"{directory}/{below}") is match.is_match


def test_excluded_directories_are_not_walked():
    """Exceptions elsewhere don't make a walk enter a directory that is excluded."""
    matcher = PatternMatcher(["node_modules", "!src/main.js", "!dist/**"])
    match = matcher.step("node_modules", ROOT)

    assert match.is_match
    assert not matcher.may_differ_below("node_modules", match)
