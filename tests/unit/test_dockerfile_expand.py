"""Quotes, escapes and variables in a Dockerfile's words."""

import pytest

from lazyfarm.dockerfile.expand import expand, expand_body, expand_words, raw_words, unquote
from lazyfarm.dockerfile.refused import RefusedError

ENV = {"HOME": "/root", "empty": "", "v": "1.2.3-rc.1", "words": "a  b", "path": "/a/b/c.tar.gz", "q": "it's", "é": "e"}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("plain", "plain"),
        ("$HOME", "/root"),
        ("${HOME}/x", "/root/x"),
        ("$HOME_x", ""),
        ("a$unset.b", "a.b"),
        ("$", "$"),
        ("a$ b", "a$ b"),
        ("$é", "e"),
        # quotes
        ("'$HOME'", "$HOME"),
        ('"$HOME"', "/root"),
        ('"it\'s"', "it's"),
        ("'say \"x\"'", 'say "x"'),
        ("a'b'\"c\"d", "abcd"),
        ('"$q"', "it's"),
        ("$q", "it's"),
        # escapes
        (r"\$HOME", "$HOME"),
        (r"a\ b", "a b"),
        (r"\'", "'"),
        (r'"\$HOME \" \\ \n"', r'$HOME " \ \n'),
        (r"'\'", "\\"),
        ("a\\", "a"),
        # unset or empty
        ("${unset:-x}${unset-x}", "xx"),
        ("${empty:-x}${empty-x}", "x"),
        ("${HOME:-x}${HOME-x}", "/root/root"),
        ("${HOME:+x}${HOME+x}", "xx"),
        ("${empty:+x}${empty+x}", "x"),
        ("${unset:+x}${unset+x}", ""),
        ("${HOME:?no}${empty?no}", "/root"),
        ("${unset:-${HOME}}", "/root"),
        ("${unset:-$HOME/x}", "/root/x"),
        ("${unset:-'a}b'}", "a}b"),
        (r"${unset:-a\}b}", "a}b"),
        ("${unset:-a b}", "a b"),
        # trimming
        ("${v%-*}", "1.2.3"),
        ("${v%.*}", "1.2.3-rc"),
        ("${v%%.*}", "1"),
        ("${v#*.}", "2.3-rc.1"),
        ("${v##*.}", "1"),
        ("${path##*/}", "c.tar.gz"),
        ("${path%x}", "/a/b/c.tar.gz"),
        ("${v#?.?}", ".3-rc.1"),
        # replacing
        ("${v/./_}", "1_2.3-rc.1"),
        ("${v//./_}", "1_2_3-rc_1"),
        ("${v//-rc*/}", "1.2.3"),
        (r"${path//\//_}", "_a_b_c.tar.gz"),
    ],
)
def test_words_are_expanded(text, expanded):
    """As by the shell, as far as BuildKit goes along; what is not set is empty."""
    assert expand(text, ENV) == expanded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'a", "a quote ' is not closed"),
        ('"a', 'a quote " is not closed'),
        ("${", "bad substitution"),
        ("${}", "bad substitution"),
        ("${:-x}", "bad substitution"),
        ("${HOME", "a } is missing"),
        ("${HOME:", "a } is missing"),
        ("${HOME:-x", "a } is missing"),
        ("${HOME/x}", "a / is missing"),
        ("${HOME^^}", r"the modifier \^ in a substitution is not supported"),
        ("${HOME:=x}", "the modifier := in a substitution is not supported"),
        ("${unset:?give it}", "unset: give it"),
        ("${empty:?}", "empty: is not allowed to be unset or empty"),
        ("${unset?}", "unset: is not allowed"),
    ],
)
def test_what_cannot_be_expanded_is_refused(text, message):
    """Nothing is guessed."""
    with pytest.raises(RefusedError, match=message):
        expand(text, ENV)


def test_the_escape_may_be_another():
    """With a backtick a backslash is text."""
    assert expand(r"C:\x`$HOME", ENV, "`") == r"C:\x$HOME"


def test_variables_bring_words_and_quotes_keep_them_together():
    """Splitting comes after expanding; what a variable brings is not quoted."""
    assert expand_words("x $words '$words' \"$words\" $empty", ENV) == ["x", "a", "b", "$words", "a  b"]


def test_bodies_keep_their_quotes():
    """In a here-document only variables and backslashes are special."""
    assert expand_body("'$HOME' \"${v}\" \\$HOME\n", ENV) == "'/root' \"1.2.3-rc.1\" $HOME\n"


def test_raw_words_keep_all_marks():
    """They are split where blanks are not quoted, and expanded later."""
    assert raw_words(r"""a="b c" 'd e'=f  g\ h""", "\\") == ['a="b c"', "'d e'=f", r"g\ h"]


def test_unquoting_leaves_variables():
    """Flags are unquoted first and expanded when the variables are known."""
    assert unquote("""a'b c'"$d"\\ e""", "\\") == "ab c$d e"
