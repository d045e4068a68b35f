"""Lines, directives, comments, continuation, flags and heredocs of Dockerfiles."""

import pytest

from cluster.errors import DockerfileError
from lazyfarm.dockerfile.parser import Heredoc, parse_opener, read_statements
from lazyfarm.dockerfile.refused import RefusedError


def read(text):
    return read_statements(text, "Dockerfile").statements


def only(text):
    (statement,) = read(text)
    return statement


class TestLines:
    def test_a_statement_knows_its_lines(self):
        """Lines count from 1, those of comments, continuation and heredocs included."""
        text = "# first\n\nFROM a\nRUN one \\\n  two\nCOPY <<X /x\nbody\nX\nCMD x\n"

        assert [(s.keyword, s.line, s.last_line) for s in read(text)] == [
            ("FROM", 3, 3),
            ("RUN", 4, 5),
            ("COPY", 6, 8),
            ("CMD", 9, 9),
        ]

    def test_continued_lines_are_joined_as_they_are(self):
        """Blanks that begin a continued line stay; the escape and the newline go."""
        assert only("RUN a \\\n    b\\\nc").arguments == "a     bc"

    def test_blanks_may_follow_the_escape(self):
        """What looks like a continuation to people is one."""
        assert only("RUN a \\  \t\nb").arguments == "a b"

    def test_an_escaped_escape_continues_nothing(self):
        """Two backslashes at the end of a line are text."""
        assert [s.keyword for s in read("RUN a \\\\\nCMD b")] == ["RUN", "CMD"]

    def test_comments_and_empty_lines_do_not_end_a_statement(self):
        """Within a continued statement they are dropped."""
        assert only("RUN a && \\\n# why\n\n   # indented\n b").arguments == "a &&  b"

    def test_a_hash_later_in_a_line_is_text(self):
        """Only what begins a line is a comment."""
        assert only("RUN echo # no comment").arguments == "echo # no comment"

    def test_a_continued_comment_is_no_continuation(self):
        """A backslash that ends a comment says nothing."""
        assert [s.keyword for s in read("# a \\\nRUN b")] == ["RUN"]

    def test_a_continuation_at_the_end_of_the_file_ends_there(self):
        """Nothing follows, nothing is missing."""
        assert only("RUN a \\").arguments == "a"
        assert [s.keyword for s in read("FROM a\n\\\n")] == ["FROM"]

    def test_windows_line_ends_and_byte_order_mark_are_no_text(self):
        """What Windows editors add is taken off."""
        statements = read("\ufeffFROM a\r\nRUN b \\\r\n  c\r\n")

        assert [(s.keyword, s.arguments) for s in statements] == [("FROM", "a"), ("RUN", "b   c")]

    def test_keywords_have_no_case(self):
        """They are given in upper case."""
        assert only("fRoM a").keyword == "FROM"

    @pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
    def test_a_file_without_instructions_is_refused(self, text):
        """There is nothing to build."""
        with pytest.raises(DockerfileError, match=r"Dockerfile:1: there are no instructions"):
            read(text)


class TestDirectives:
    def test_the_escape_directive_changes_what_continues(self):
        """With a backtick, backslashes are text, as Windows paths need."""
        source = read_statements("# escape=`\nRUN a `\nb c:\\\nCMD d", "f")

        assert source.escape == "`"
        assert [s.arguments for s in source.statements] == ["a b c:\\", "d"]

    def test_directives_stand_first(self):
        """After a comment, an empty line or an instruction they are comments."""
        for before in ("# comment\n", "\n", "FROM a\n"):
            assert read_statements(f"{before}# escape=`\nRUN a \\\nb", "f").escape == "\\"

    def test_the_syntax_is_known(self):
        """Who converts decides whether it can be."""
        assert read_statements("#syntax = docker/dockerfile:1\n# escape=`\nFROM a", "f").syntax == "docker/dockerfile:1"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("# escape=x\nFROM a", "f:1: the escape directive must be"),
            ("# escape=`\n# escape=`\nFROM a", "f:2: there is a second escape directive"),
        ],
    )
    def test_wrong_directives_are_refused(self, text, message):
        """They would change what all else means."""
        with pytest.raises(DockerfileError, match=message):
            read_statements(text, "f")


class TestFlags:
    def test_flags_stand_before_the_arguments(self):
        """What begins with two dashes later on is an argument."""
        statement = only("RUN --mount=type=cache,target=/a --network=none make --jobs")

        assert statement.flags == ("--mount=type=cache,target=/a", "--network=none")
        assert statement.arguments == "make --jobs"

    def test_quotes_in_flags_are_taken_off(self):
        """A quoted blank is part of the flag."""
        statement = only("""COPY --from="a b" --chown='x y' c d""")

        assert statement.flags == ("--from=a b", "--chown=x y")
        assert statement.arguments == "c d"

    def test_two_dashes_alone_end_the_flags(self):
        """As in the shell."""
        statement = only("RUN --network=none -- --strange")

        assert (statement.flags, statement.arguments) == (("--network=none",), "--strange")

    def test_an_unclosed_quote_in_a_flag_is_refused(self):
        """The rest of the line would be taken for the flag."""
        with pytest.raises(DockerfileError, match=r"Dockerfile:2: a quote ' is not closed"):
            read("FROM a\nRUN --mount='type=cache make")


class TestHeredocs:
    @pytest.mark.parametrize(
        ("word", "name", "is_expanded", "is_chomped"),
        [
            ("<<EOF", "EOF", True, False),
            ("<<-EOF", "EOF", True, True),
            ("<<'EOF'", "EOF", False, False),
            ('<<"EOF"', "EOF", False, False),
            ("<<-'EOF'", "EOF", False, True),
            ("3<<EOF", "EOF", True, False),
            ("<< EOF", "EOF", True, False),
            ("<<file.txt", "file.txt", True, False),
            ("<<eo'f'", "eof", False, False),
            (r"<<eo\'f", "eo'f", True, False),
            (r"<<'e'o\'f", "eo'f", False, False),
            ("<<'one two'", "one two", False, False),
            ("<<$EOF", "$EOF", True, False),
        ],
    )
    def test_openers(self, word, name, is_expanded, is_chomped):
        """The word is unquoted as the shell does; a quote anywhere keeps the body as it is."""
        assert parse_opener(word) == Heredoc(name=name, content="", is_expanded=is_expanded, is_chomped=is_chomped)

    @pytest.mark.parametrize("word", ["", "EOF", "<<", "<<-", "<EOF", "<<<EOF", "<<EOF sh", "a<<EOF"])
    def test_what_opens_none(self, word):
        """Less-than signs have other uses."""
        assert parse_opener(word) is None

    @pytest.mark.parametrize("word", ["<<'EOF", '<<"EOF', "<<EOF'"])
    def test_an_opener_with_an_open_quote_is_refused(self, word):
        """Its end could not be told."""
        with pytest.raises(RefusedError):
            parse_opener(word)

    def test_the_body_is_taken_as_it_is(self):
        """Comments, instructions and continuations in it are text."""
        statement = only("RUN <<EOF\n# comment\nFROM a\nb \\\n\nEOF\n")

        assert statement.heredocs == (Heredoc(name="EOF", content="# comment\nFROM a\nb \\\n\n"),)

    def test_bodies_follow_one_another(self):
        """In the order of their openers; each may hold the other's word."""
        statement = only("COPY <<X <<Y /dest/\nY\nX\nX\nY\n")

        assert [(h.name, h.data) for h in statement.heredocs] == [("X", "Y\n"), ("Y", "X\n")]

    def test_chomped_bodies_lose_leading_tabs(self):
        """Also the line that ends them may be indented."""
        (heredoc,) = only("RUN <<-EOF\n\ta\n\t\t b\n\tEOF\n").heredocs

        assert heredoc.data == "a\n b\n"

    def test_openers_may_stand_on_continued_lines(self):
        """The bodies begin after the whole statement."""
        (heredoc,) = only("RUN cat \\\n  <<EOF \\\n  > /x\nbody\nEOF\n").heredocs

        assert heredoc.data == "body\n"

    @pytest.mark.parametrize(
        "line",
        [
            "ENV a=<<EOF",
            "USER <<EOF",
            'RUN ["cat", "<<EOF"]',
            "RUN echo '<<EOF'",
            'RUN echo "<<EOF"',
            "RUN echo $(( 1 << 2 ))",
            "RUN echo $((1<<2))",
            "RUN cat <<<EOF",
        ],
    )
    def test_what_looks_like_one(self, line):
        """Only RUN, COPY and ADD in shell form have heredocs, and only as words that are not quoted."""
        statements = read(f"{line}\nCMD x\n")

        assert [s.keyword for s in statements] == [line.split()[0], "CMD"]
        assert statements[0].heredocs == ()

    def test_heredocs_of_triggers_are_read_too(self):
        """Or their bodies would be taken for instructions."""
        assert [h.data for h in only("ONBUILD RUN <<EOF\nFROM x\nEOF\n").heredocs] == ["FROM x\n"]

    def test_one_that_does_not_end_is_refused(self):
        """With the line that opens it."""
        with pytest.raises(DockerfileError, match=r"Dockerfile:2: heredoc EOF is not ended by a line 'EOF'"):
            read("FROM a\nRUN <<EOF\nb\n EOF\n")
