"""Typed instructions of Dockerfiles, and what is refused in any stage."""

import pytest

from cluster.errors import DockerfileError
from lazyfarm.dockerfile.instructions import (
    Arg,
    Cmd,
    Command,
    Copy,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Label,
    OnBuild,
    Run,
    Shell,
    User,
    Volume,
    Workdir,
    parse_dockerfile,
)
from lazyfarm.dockerfile.parser import Heredoc


def one(line):
    """Parse an instruction of a stage."""
    (stage,) = parse_dockerfile(f"FROM base\n{line}\n").stages
    (instruction,) = stage.instructions
    return instruction


def fields(instruction):
    names = [name for name in type(instruction).__dataclass_fields__ if name not in ("line", "text")]
    return {name: getattr(instruction, name) for name in names}


class TestStages:
    def test_from_begins_a_stage(self):
        """Names are in lower case; platforms and bases are not expanded yet."""
        stages = parse_dockerfile("FROM --platform=$P ${B} as Build\nRUN x\nFROM scratch\n").stages

        assert [(s.start.base, s.start.platform, s.start.name) for s in stages] == [
            ("${B}", "$P", "build"),
            ("scratch", "", ""),
        ]
        assert [len(s.instructions) for s in stages] == [1, 0]

    def test_global_arguments_stand_before_the_first_stage(self):
        """They are no stage's."""
        dockerfile = parse_dockerfile("ARG A=1\nARG B C=2\nFROM x\nARG A\n")

        assert [arg.items for arg in dockerfile.global_args] == [(("A", "1"),), (("B", None), ("C", "2"))]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("RUN x\nFROM a", "f:1: only ARG may stand before the first FROM"),
            ("ARG a\nENV b=c\nFROM a", "f:2: only ARG may stand before the first FROM"),
            ("ARG a", "f:1: there is no FROM"),
            ("FROM a b", "f:1: FROM is followed by an image"),
            ("FROM a AS", "f:1: FROM is followed by an image"),
            ("FROM a AS 1x", "f:1: '1x' is no name for a stage"),
            ("FROM", "f:1: FROM needs an argument"),
            ("FROM a\nMAKE x", "f:2: there is no instruction MAKE"),
            ("FROM a\nRUN", "f:2: RUN needs an argument"),
            ("FROM a\nRUN []", "f:2: RUN needs a command"),
            ("FROM a\nRUN [1]", "f:2: a JSON array here must be of strings only"),
            ("FROM a\nRUN --mounts=x y", "f:2: RUN has no flag --mounts"),
            ("FROM a\nRUN --network=x y", "f:2: --network is none, default or host, not 'x'"),
            ("FROM a\nRUN --security=x y", "f:2: --security is sandbox or insecure"),
            ("FROM a\nRUN --mount=id=1,id=2 y", "f:2: --mount=id=1,id=2 has a field 'id' twice"),
            ("FROM a\nRUN --mount=id=1,,x y", "f:2: --mount=id=1,,x has a field ''"),
            ("FROM a\nCOPY a", "f:2: COPY needs a source and a destination"),
            ("FROM a\nCOPY --from= a b", "f:2: --from needs a value"),
            ("FROM a\nCOPY --from a b", "f:2: --from needs a value"),
            ("FROM a\nCOPY --from=a --from=b a b", "f:2: --from is given twice"),
            ("FROM a\nCOPY --link=maybe --parents=x a b", "f:2: --parents is true or false, not 'x'"),
            ("FROM a\nADD --from=x a b", "f:2: ADD has no flag --from"),
            ("FROM a\nCOPY a <<EOF\nx\nEOF", "f:2: the heredocs of COPY must come before its destination"),
            ("FROM a\nENV a", "f:2: ENV a has no value: write a=VALUE"),
            ("FROM a\nENV a=b c", "f:2: 'c' is not of the form NAME=VALUE"),
            ("FROM a\nENV =b", "f:2: a name before = is missing"),
            ("FROM a\nENV a='b", "f:2: a quote ' is not closed"),
            ("FROM a\nARG =b", "f:2: a name before = is missing"),
            ("FROM a\nSHELL sh -c", "f:2: SHELL needs a JSON array"),
            ("FROM a\nSHELL []", "f:2: SHELL needs a JSON array"),
            ("FROM a\nVOLUME []", "f:2: VOLUME needs paths"),
            ("FROM a\nHEALTHCHECK curl x", "f:2: HEALTHCHECK is followed by NONE, or by CMD"),
            ("FROM a\nHEALTHCHECK NONE x", "f:2: HEALTHCHECK NONE takes no arguments"),
            ("FROM a\nHEALTHCHECK --interval=5 CMD x", "f:2: --interval is a duration such as 1m30s, not '5'"),
            ("FROM a\nHEALTHCHECK --timeout=1us CMD x", "f:2: --timeout is 1ms or more"),
            ("FROM a\nHEALTHCHECK --retries=x CMD x", "f:2: --retries is a number"),
            ("FROM a\nCMD --x y", "f:2: CMD has no flag --x"),
        ],
    )
    def test_what_is_written_wrongly_is_refused(self, text, message):
        """In any stage, with file and line."""
        with pytest.raises(DockerfileError) as caught:
            parse_dockerfile(text, "f")

        assert str(caught.value).startswith(message)
        assert caught.value.hint

    def test_bytes_must_be_utf_8(self):
        """The line of the first byte that is not is told."""
        assert parse_dockerfile("FROM a\nLABEL a=é\n".encode()).stages
        with pytest.raises(DockerfileError, match=r"f:2: it is not UTF-8"):
            parse_dockerfile(b"FROM a\nLABEL a=\xe9\n", "f")


class TestInstructions:
    def test_run_in_shell_form_keeps_its_text(self):
        """Quotes and variables are the shell's."""
        assert one("RUN echo \"$x\" 'y' && \\\n  z").command == Command(args=("echo \"$x\" 'y' &&   z",), is_shell=True)

    def test_run_in_exec_form_is_words(self):
        """JSON, without a shell."""
        assert one('RUN ["a", "b c"]').command == Command(args=("a", "b c"), is_shell=False)

    def test_what_is_not_quite_json_is_shell_form(self):
        """As in Docker: a test in brackets is a command."""
        assert one("RUN ['a', 'b']").command.is_shell
        assert one("RUN [ -f x ] && y").command.is_shell

    def test_run_with_flags(self):
        """Mounts keep their order; fields without a value are true."""
        run = one("RUN --mount=type=cache,target=/a,ro --mount=type=secret,id=s --network=none make")

        assert isinstance(run, Run)
        assert run.mounts == (
            {"type": "cache", "target": "/a", "ro": "true"},
            {"type": "secret", "id": "s"},
        )
        assert run.network == "none"
        assert run.text == "RUN --mount=type=cache,target=/a,ro --mount=type=secret,id=s --network=none make"

    def test_copy(self):
        """The last word is the destination."""
        copy = one("COPY --from=x --chown=a:b --chmod=755 --link --parents --exclude=*.o --exclude=*.a s1 s2 d/")

        assert isinstance(copy, Copy)
        assert fields(copy) == {
            "sources": ("s1", "s2"),
            "heredocs": (),
            "destination": "d/",
            "is_add": False,
            "source": "x",
            "chown": "a:b",
            "chmod": "755",
            "exclude": ("*.o", "*.a"),
            "keeps_parents": True,
            "unpack": None,
        }

    def test_copy_with_blanks_in_names_is_json(self):
        """As there is no other way to write them."""
        copy = one('ADD ["a b", "c d/"]')

        assert (copy.sources, copy.destination, copy.is_add) == (("a b",), "c d/", True)

    def test_copy_of_heredocs(self):
        """They are no paths."""
        copy = one("COPY a <<X <<'Y' /d/\n$x\nX\n$y\nY")

        assert copy.sources == ("a",)
        assert copy.heredocs == (
            Heredoc(name="X", content="$x\n"),
            Heredoc(name="Y", content="$y\n", is_expanded=False),
        )

    @pytest.mark.parametrize(
        ("line", "items"),
        [
            ("ENV a=b", (("a", "b"),)),
            ("ENV a=b c=\"d e\" f='g h' i=j\\ k", (("a", "b"), ("c", '"d e"'), ("f", "'g h'"), ("i", "j\\ k"))),
            ("ENV a b  c=d ", (("a", "b  c=d"),)),
            ("ENV a=b=c d=", (("a", "b=c"), ("d", ""))),
        ],
    )
    def test_env(self, line, items):
        """Pairs, or one name and the rest of the line; quotes stay until they are expanded."""
        assert one(line) == Env(line=2, text=" ".join(line.split()), items=items)

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("ARG a b=c d=", Arg(line=2, text="ARG a b=c d=", items=(("a", None), ("b", "c"), ("d", "")))),
            ("LABEL a.b=c", Label(line=2, text="LABEL a.b=c", items=(("a.b", "c"),))),
            ("WORKDIR /a b", Workdir(line=2, text="WORKDIR /a b", path="/a b")),
            ("USER a:b", User(line=2, text="USER a:b", user="a:b")),
            ("EXPOSE 1 2/udp $p", Expose(line=2, text="EXPOSE 1 2/udp $p", ports=("1", "2/udp", "$p"))),
            ("VOLUME /a /b", Volume(line=2, text="VOLUME /a /b", paths=("/a", "/b"))),
            ('VOLUME ["/a b"]', Volume(line=2, text='VOLUME ["/a b"]', paths=("/a b",))),
            ('SHELL ["a", "-c"]', Shell(line=2, text='SHELL ["a", "-c"]', args=("a", "-c"))),
            ("CMD a b", Cmd(line=2, text="CMD a b", command=Command(args=("a b",), is_shell=True))),
            ("CMD []", Cmd(line=2, text="CMD []", command=Command(args=(), is_shell=False))),
            (
                'ENTRYPOINT ["a"]',
                Entrypoint(line=2, text='ENTRYPOINT ["a"]', command=Command(args=("a",), is_shell=False)),
            ),
            ("ONBUILD RUN a", OnBuild(line=2, text="ONBUILD RUN a")),
        ],
    )
    def test_others(self, line, expected):
        """Each with its line and its text."""
        assert one(line) == expected

    def test_healthcheck(self):
        """Durations are Go's, kept in nanoseconds."""
        check = one("HEALTHCHECK --interval=1m30s --timeout=1.5s --start-period=2h --retries=3 CMD curl -f x")

        assert fields(check) == {
            "test": ("CMD-SHELL", "curl -f x"),
            "interval_ns": 90 * 10**9,
            "timeout_ns": 1_500_000_000,
            "start_period_ns": 7200 * 10**9,
            "start_interval_ns": 0,
            "retries": 3,
        }
        assert one('HEALTHCHECK CMD ["a", "b"]').test == ("CMD", "a", "b")
        assert one("HEALTHCHECK none").test == ("NONE",)
        assert isinstance(check, Healthcheck)
