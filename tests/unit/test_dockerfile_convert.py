"""Dockerfiles converted: which stages, which ops, which config."""

import json

import pytest

from cluster.errors import DockerfileError, ManifestNotFoundError
from cluster.graph import (
    BindMount,
    CacheMount,
    CopyAction,
    FileOp,
    ImageOp,
    LocalOp,
    MakeDirectory,
    MakeFile,
    Network,
    RunOp,
    SecretMount,
    Sharing,
    TmpfsMount,
)
from cluster.reference import parse_platform, parse_reference
from lazyfarm import graph
from lazyfarm.dockerfile.config import DEFAULT_PATH
from lazyfarm.dockerfile.convert import Base, BuildOptions, convert
from lazyfarm.dockerfile.instructions import parse_dockerfile

AMD64 = parse_platform("linux/amd64")
ARM64 = parse_platform("linux/arm64")
PINNED = "sha256:" + "a" * 64


class Images:
    """Bases by name; remembers what was asked for."""

    def __init__(self, **configs):
        self.configs = configs
        self.asked = []

    async def __call__(self, reference, platform):
        self.asked.append((reference.name, str(platform)))
        name = reference.repository.rpartition("/")[2]
        if name not in self.configs:
            raise ManifestNotFoundError(reference.name)
        config = {"architecture": platform.architecture, "os": platform.os, "config": self.configs[name]}
        pinned = parse_reference(f"{reference.registry}/{reference.repository}@{PINNED}")
        return Base(reference=pinned, config=json.dumps({**config, "rootfs": {"diff_ids": ["x"]}}).encode())


class Build:
    """A Dockerfile's conversion, for looking at."""

    def __init__(self, converted, images):
        self.converted = converted
        self.images = images
        self.config = json.loads(converted.config)
        self.run = self.config["config"]

    @property
    def vertices(self):
        definition = self.converted.state.definition()
        return [definition.vertices[digest] for digest in definition.order]

    @property
    def ops(self):
        return [vertex.op for vertex in self.vertices]

    @property
    def last(self):
        definition = self.converted.state.definition()
        return definition.vertices[definition.targets[0]]

    @property
    def name(self):
        definition = self.converted.state.definition()
        return definition.name(definition.targets[0])


@pytest.fixture
def build(tmp_path):
    """Convert a Dockerfile, its build context an empty directory."""

    async def build(text, *, images=None, platform=AMD64, **options):
        images = images or Images(base={}, other={})
        asked = BuildOptions(platform=platform, build_platform=AMD64, **options)
        return Build(await convert(parse_dockerfile(text, "f"), graph.local(tmp_path), asked, images), images)

    return build


async def refused(build, text, message, **options):
    with pytest.raises(DockerfileError) as caught:
        await build(text, **options)
    assert str(caught.value).startswith(message)


class TestStages:
    async def test_only_stages_that_the_target_needs_are_converted(self, build):
        """Others may be of anything: their bases are not asked for, and what they can't do is no matter."""
        built = await build("FROM gone AS a\nONBUILD RUN x\nFROM base AS b\nRUN b\nFROM b\nRUN c\n")

        assert built.images.asked == [("docker.io/library/base:latest", "linux/amd64")]
        assert [op.args[-1] for op in built.ops if isinstance(op, RunOp)] == ["b", "c"]

    async def test_stages_may_be_copied_from_and_mounted(self, build):
        """By name or number, also from stages that nothing is built upon."""
        built = await build(
            "FROM base AS a\nRUN a\nFROM base AS b\nRUN b\nFROM scratch\n"
            "COPY --from=A /x /\nCOPY --from=1 /x /\nRUN --mount=from=b,target=/m c\n"
        )

        assert sorted(op.args[-1] for op in built.ops if isinstance(op, RunOp)) == ["a", "b", "c"]
        assert built.last.op.binds == (BindMount(target="/m", input=1),)

    async def test_the_target_may_be_named(self, build):
        """By name, in any case, or by number."""
        text = "FROM base AS one\nRUN 1\nFROM base AS two\nRUN 2\n"

        assert (await build(text, target="ONE")).last.op.args[-1] == "1"
        assert (await build(text, target="1")).last.op.args[-1] == "2"
        await refused(build, text, "f:3: there is no stage 'three' (stages: one, two)", target="three")

    async def test_a_base_is_asked_for_once_a_platform(self, build):
        """However many stages are built upon it; the build platform's is another."""
        built = await build(
            "FROM base AS a\nFROM base AS b\nFROM --platform=$BUILDPLATFORM base AS c\nFROM scratch\n"
            "COPY --from=a / /\nCOPY --from=b / /\nCOPY --from=c / /\n",
            platform=ARM64,
        )

        assert sorted(built.images.asked) == [
            ("docker.io/library/base:latest", "linux/amd64"),
            ("docker.io/library/base:latest", "linux/arm64"),
        ]

    async def test_bases_are_what_was_found(self, build):
        """The graph names the digest that the config was read from, and how its registry is spoken to."""
        built = await build("FROM localhost:5000/base\nRUN x", plain_http=frozenset({"localhost:5000"}))

        assert built.ops[0] == ImageOp(
            reference=f"localhost:5000/base@{PINNED}", platform="linux/amd64", plain_http=True
        )

    async def test_a_stage_built_upon_another_goes_on_where_that_ended(self, build):
        """Its config and its arguments are its own from there."""
        built = await build("FROM base AS a\nARG v=1\nENV e=a\nUSER u\nFROM a AS b\nENV e=b\nFROM a\nRUN $v $e\n")

        assert built.last.op.env == (("PATH", DEFAULT_PATH), ("e", "a"), ("v", "1"))
        assert built.last.op.user == "u"
        assert built.run["Env"] == ["e=a"]

    async def test_an_image_may_be_copied_from(self, build):
        """Its config is no matter."""
        built = await build("FROM scratch\nCOPY --from=other:1 /x /\n")

        assert built.images.asked == []
        assert built.ops[0] == ImageOp(reference="docker.io/library/other:1", platform="linux/amd64")

    async def test_errors_of_the_resolver_pass(self, build):
        """They say themselves what could not be found."""
        with pytest.raises(ManifestNotFoundError):
            await build("FROM gone")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("# syntax=me/mine\nFROM a", "f:1: the frontend me/mine is not supported"),
            ("FROM $A", "f:1: the base $A is empty"),
            ("FROM UPPER", "f:1: invalid image reference 'UPPER'"),
            ("FROM --platform=$A base", "f:1: the platform $A is empty"),
            ("FROM --platform=a/b/c/d base", "f:1: invalid platform 'a/b/c/d'"),
            ("ARG a=${b\nFROM base", "f:1: a } is missing"),
            ("FROM base AS a\nCOPY --from=a x /", "f:2: stage a (line 1) needs its own result"),
            (
                "FROM base AS a\nCOPY --from=b x /\nFROM base AS b\nCOPY --from=a x /",
                "f:2: stage b (line 3) needs its own result",
            ),
            ("FROM base\nCOPY --from=7 x /", "f:2: there is no stage 7"),
            ("FROM base\nCOPY --from=$a x /", "f:2: --from=$a can't hold variables"),
            ("FROM base\nCOPY --from=: x /", "f:2: invalid image reference ':'"),
        ],
    )
    async def test_stages_that_cannot_be(self, build, text, message):
        """They are refused with their line."""
        await refused(build, text, message)

    async def test_bases_with_triggers_are_refused(self, build):
        """They would change what the stage does."""
        images = Images(base={"OnBuild": ["COPY . /app"]})

        await refused(build, "FROM base", f"f:1: docker.io/library/base@{PINNED} has ONBUILD triggers", images=images)


class TestVariables:
    async def test_arguments_have_values_in_order(self, build):
        """What is given, else the ARG's default, else the global one."""
        built = await build(
            "ARG g=global\nARG o=global\nARG n\nFROM base\n"
            "ARG g\nARG o=own\nARG d=default\nARG n\nARG x=$g-${d}\nRUN x",
            args={"d": "given", "unused": "1"},
        )

        assert built.last.op.env == (
            ("PATH", DEFAULT_PATH),
            ("d", "given"),
            ("g", "global"),
            ("o", "own"),
            ("x", "global-given"),
        )
        assert built.converted.unused_args == ("unused",)
        assert "Env" not in built.run

    async def test_a_proxy_is_given_and_is_no_part_of_the_step(self, build):
        """In small letters and capitals, without an ARG; with any the step is the same, and none is in the image."""
        text = "FROM base\nENV NO_PROXY=own\nRUN x"
        built = await build(text, args={"HTTP_PROXY": "p", "https_proxy": "q", "no_proxy": "n", "All_Proxy": "a"})

        assert built.last.op.proxy_env == (
            *(("ALL_PROXY", "a"), ("All_Proxy", "a"), ("HTTPS_PROXY", "q"), ("HTTP_PROXY", "p"), ("NO_PROXY", "n")),
            *(("all_proxy", "a"), ("http_proxy", "p"), ("https_proxy", "q"), ("no_proxy", "n")),
        )
        assert built.last.op.env == (("NO_PROXY", "own"), ("PATH", DEFAULT_PATH))
        assert built.converted.unused_args == ()
        assert built.run["Env"] == ["NO_PROXY=own"]
        assert built.last.digest == (await build(text)).last.digest

    async def test_a_proxy_that_is_asked_for_is_a_part_of_the_step(self, build):
        """An ARG of its name makes it an argument like others, as in BuildKit."""
        text = "FROM base\nARG HTTP_PROXY\nRUN x"
        built = await build(text, args={"HTTP_PROXY": "p"})

        assert ("HTTP_PROXY", "p") in built.last.op.env
        assert built.last.digest != (await build(text, args={"HTTP_PROXY": "q"})).last.digest

    async def test_global_arguments_are_not_seen_before_they_are_declared(self, build):
        """A stage says what it uses."""
        built = await build("ARG v=1\nFROM base\nWORKDIR /a$v\nARG v\nWORKDIR /b$v")

        assert [op.actions[0].path for op in built.ops if isinstance(op, FileOp)] == ["/a", "/b1"]

    async def test_platforms_are_arguments(self, build):
        """In FROM always, in a stage where it declares them."""
        built = await build(
            "FROM other-$TARGETARCH\nARG TARGETPLATFORM BUILDARCH\nRUN x",
            platform=ARM64,
            images=Images(**{"other-arm64": {}}),
        )

        assert dict(built.last.op.env) == {"PATH": DEFAULT_PATH, "TARGETPLATFORM": "linux/arm64", "BUILDARCH": "amd64"}

    async def test_an_architecture_alone_is_a_platform(self, build):
        """Of the target's system."""
        built = await build("FROM --platform=arm64 base")

        assert built.images.asked == [("docker.io/library/base:latest", "linux/arm64")]

    async def test_all_of_one_env_see_what_was_before(self, build):
        """As Docker has it."""
        built = await build("FROM base\nENV a=1\nENV a=2 b=$a\nENV c=\"$a $b\" d='$a'\nRUN x")

        assert built.run["Env"] == ["a=2", "b=1", "c=2 1", "d=$a"]
        assert dict(built.last.op.env) == {"PATH": DEFAULT_PATH, "a": "2", "b": "1", "c": "2 1", "d": "$a"}

    async def test_the_base_brings_its_environment(self, build):
        """Expansion and commands see it; it is kept in its order."""
        images = Images(base={"Env": ["PATH=/p", "H=/h", "odd"], "User": "u", "WorkingDir": "/w"})
        built = await build("FROM base\nENV H=$H/x\nRUN x", images=images)

        assert built.run["Env"] == ["PATH=/p", "H=/h/x", "odd="]
        assert built.last.op.env == (("H", "/h/x"), ("PATH", "/p"), ("odd", ""))
        assert (built.last.op.user, built.last.op.cwd) == ("u", "/w")

    async def test_commands_are_not_expanded(self, build):
        """Their shell does it, with the environment."""
        built = await build('FROM base\nENV a=1\nRUN echo $a\nCMD echo $a\nENTRYPOINT ["$a"]')

        assert built.last.op.args == ("/bin/sh", "-c", "echo $a")
        assert built.run["Entrypoint"] == ["$a"]
        assert built.run["Cmd"] == ["/bin/sh", "-c", "echo $a"]

    async def test_what_cannot_be_expanded_is_refused(self, build):
        """With the line of the instruction."""
        await refused(build, 'FROM base\nARG v\nLABEL a="${v:?say it}"', "f:3: v: say it")
        await refused(build, "FROM base\nENV $v=1", "f:2: the name of a variable is empty")


class TestRun:
    async def test_run(self, build):
        """The command, where and as whom; Docker's commands see the network."""
        built = await build('FROM base\nWORKDIR /w\nUSER me\nSHELL ["/bin/bash", "-ec"]\nRUN make')

        assert built.last.op == RunOp(
            args=("/bin/bash", "-ec", "make"),
            env=(("PATH", DEFAULT_PATH),),
            cwd="/w",
            user="me",
            network=Network.HOST,
        )
        assert built.name == "RUN make"

    async def test_names_tell_the_stage(self, build):
        """Where it has one."""
        assert (await build("FROM base AS one\nRUN  make  it")).name == "[one] RUN make it"

    @pytest.mark.parametrize(
        ("flag", "default", "network"),
        [
            ("", Network.NONE, Network.NONE),
            ("--network=default", Network.HOST, Network.HOST),
            ("--network=none", Network.HOST, Network.NONE),
            ("--network=host", Network.NONE, Network.HOST),
        ],
    )
    async def test_network(self, build, flag, default, network):
        """What the command says, else what the build is asked for."""
        assert (await build(f"FROM base\nRUN {flag} x", network=default)).last.op.network is network

    async def test_mounts(self, build):
        """Fields are expanded; targets are relative to the working directory."""
        built = await build(
            "FROM base\nWORKDIR /w\nARG id=one\n"
            "RUN --mount=type=bind,src=/s,dst=b,rw "
            "--mount=type=cache,target=/c/$id,id=$id,sharing=locked,mode=0700,uid=1,gid=2 "
            "--mount=type=cache,target=/d,readonly "
            "--mount=type=secret,id=$id --mount=type=secret,id=t,env=T,required=true "
            "--mount=type=secret,id=u,target=/u,mode=0440,uid=3 "
            "--mount=type=tmpfs,target=/t,size=64m x"
        )
        op = built.last.op

        assert op.binds == (BindMount(target="/w/b", input=1, source="/s", is_read_only=False),)
        assert op.caches == (
            CacheMount(target="/c/one", id="one", sharing=Sharing.LOCKED, mode=0o700, uid=1, gid=2),
            CacheMount(target="/d", id="/d", is_read_only=True),
        )
        assert op.secrets == (
            SecretMount(id="one", target="/run/secrets/one"),
            SecretMount(id="t", env="T", is_required=True),
            SecretMount(id="u", target="/u", mode=0o440, uid=3),
        )
        assert op.tmpfs == (TmpfsMount(target="/t", size_bytes=64 * 1024**2),)
        assert isinstance(built.ops[0], LocalOp | ImageOp)

    @pytest.mark.parametrize(
        ("mount", "message"),
        [
            ("type=ssh", "--mount=type=ssh is not supported"),
            ("type=volume,target=/x", "--mount has no type 'volume'"),
            ("type=bind", "bind(): target is the root"),
            ("type=cache", "a mount of type cache needs a target"),
            ("type=cache,target=/x,from=base", "a cache mount that begins with the files of another stage"),
            ("type=cache,target=/x,sharing=all", "cache(): sharing is 'all', not one of"),
            ("type=cache,target=/x,mode=x", "mode of a mount is a number, not 'x'"),
            ("type=cache,target=/x,dst=/y", "a mount has its target twice"),
            ("type=cache,target=/x,ro=x", "readonly of a mount is true or false"),
            ("type=secret", "a secret mount needs an id"),
            ("type=secret,id=x,z", "a mount of type secret has no field 'z'"),
            ("type=tmpfs,target=/x,size=big", "size of a mount is a number of bytes"),
            ("type=bind,target=/x,from=$a", "--from=$a can't hold variables"),
            ("type=tmpfs,target=/a --mount=type=tmpfs,target=/a", "run(): two mounts are at /a"),
        ],
    )
    async def test_mounts_that_cannot_be(self, build, mount, message):
        """They are refused with their line."""
        await refused(build, f"FROM base\nRUN --mount={mount} x", f"f:2: {message}")

    async def test_insecure_commands_are_refused(self, build):
        """Op workers have nothing more to give."""
        await refused(build, "FROM base\nRUN --security=insecure x", "f:2: --security=insecure is not supported")

    async def test_a_heredoc_alone_is_the_script(self, build):
        """For the stage's shell, which need not know heredocs."""
        built = await build("FROM base\nRUN <<-EOF\n\techo $a\n\techo b\nEOF\n")

        assert built.last.op.args == ("/bin/sh", "-c", "echo $a\necho b\n")

    async def test_a_heredoc_with_an_interpreter_is_run_by_it(self, build):
        """It is mounted, so that it is in no layer."""
        built = await build("FROM base\nRUN <<EOF\n#!/usr/bin/python3\nprint()\nEOF\n")
        op = built.last.op

        assert op.args == ("/dev/pipes/EOF",)
        assert op.binds == (BindMount(target="/dev/pipes", input=1),)
        script = MakeFile(path="/EOF", data=b"#!/usr/bin/python3\nprint()\n", mode=0o755)
        assert FileOp(actions=(script,)) in built.ops

    async def test_other_heredocs_are_left_to_the_shell(self, build):
        """As they were written."""
        built = await build("FROM base\nRUN python3 <<A && cat <<'B'\na\nA\nb\nB\n")

        assert built.last.op.args == ("/bin/sh", "-c", "python3 <<A && cat <<'B'\na\nA\nb\nB")


class TestCopy:
    async def copied(self, build, line):
        op = (await build(f"FROM base AS a\nFROM base\nWORKDIR /w\nARG v=val\n{line}")).last.op
        assert isinstance(op, FileOp)
        return op.actions

    async def test_copy_from_the_context(self, build):
        """To below the working directory, as root's; one layer for all sources."""
        assert await self.copied(build, "COPY a/$v ../b*.c d/") == (
            CopyAction(input=1, sources=("/a/val",), destination="/w/d/", owner="0:0", follow_symlinks=True),
            CopyAction(
                input=1, sources=("/b*.c",), destination="/w/d/", owner="0:0", follow_symlinks=True, allow_missing=True
            ),
        )

    async def test_copy_from_a_stage_keeps_owners(self, build):
        """Unless it says whose they shall be."""
        assert await self.copied(build, "COPY --from=a --chmod=0750 x y") == (
            CopyAction(input=1, sources=("/x",), destination="/w/y", mode=0o750, follow_symlinks=True),
        )
        (action,) = await self.copied(build, "COPY --from=a --chown=$v:1 x y")
        assert action.owner == "val:1"

    @pytest.mark.parametrize(
        ("written", "destination"),
        [(".", "/w/"), ("./", "/w/"), ("", "/w/"), ("/", "/"), ("/x/.", "/x/"), ("../x", "/x"), ("/a/../b/", "/b/")],
    )
    async def test_destinations(self, build, written, destination):
        """A slash or a dot at the end makes it a directory."""
        (action,) = await self.copied(build, f'COPY ["x", "{written}"]')

        assert action.destination == destination

    async def test_add_unpacks(self, build):
        """Local archives, unless told not to."""
        assert [action.unpack for action in await self.copied(build, "ADD a.tar /")] == [True]
        assert [action.unpack for action in await self.copied(build, "ADD --unpack=false a.tar /")] == [False]

    async def test_exclude(self, build):
        """Patterns are expanded."""
        (action,) = await self.copied(build, "COPY --exclude=*.$v --exclude=x . .")

        assert action.exclude == ("*.val", "x")

    async def test_parents(self, build):
        """The source's directories are kept, from the pivot on."""
        actions = await self.copied(build, "COPY --parents a/b/c.txt x/./y/z *.txt /d/")

        assert [(a.sources, a.destination, a.contents_only) for a in actions] == [
            (("/a/b/c.txt",), "/d/a/b/", False),
            (("/x/y/z",), "/d/y/", False),
            (("/*.txt",), "/d/", False),
        ]

    async def test_heredocs_are_files(self, build):
        """Expanded, unless quoted; of their word's name, and copied as other files are."""
        built = await build("FROM base\nARG v=1\nCOPY --chown=u <<a.txt <<'b' x /d/\n\"$v\"\na.txt\n$v\nb\n")
        files = [action for op in built.ops if isinstance(op, FileOp) for action in op.actions]

        assert MakeFile(path="/a.txt", data=b'"1"\n') in files
        assert MakeFile(path="/b", data=b"$v\n") in files
        assert [(a.input, a.sources, a.owner, a.wildcards) for a in built.last.op.actions] == [
            (1, ("/x",), "u", True),
            (2, ("/a.txt", "/b"), "u", False),
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("ADD https://example.com/x /", "https://example.com/x: sources at a URL are not supported"),
            ("ADD git@example.com:a/b.git /", "git@example.com:a/b.git: sources at a URL are not supported"),
            ("COPY a b c", "several sources need a destination that ends in a slash, not c"),
            ("COPY $a b", "a source is empty"),
            ("COPY --chmod=u+x a b", "--chmod=u+x is not supported"),
            ("COPY --parents */x b", "*/x: with --parents, wildcards in directories are not supported"),
            ("COPY --exclude=[ a b", "invalid pattern"),
        ],
    )
    async def test_copies_that_cannot_be(self, build, line, message):
        """They are refused with their line."""
        await refused(build, f"FROM base\n{line}", f"f:2: {message}")


class TestConfig:
    async def test_an_image_from_nothing(self, build):
        """It has a platform and a PATH; rootfs and times are for who knows the layers."""
        built = await build("FROM scratch\nCOPY a /\nMAINTAINER me", platform=ARM64)

        assert built.config == {
            "architecture": "arm64",
            "os": "linux",
            "author": "me",
            "config": {"Env": [f"PATH={DEFAULT_PATH}"], "WorkingDir": "/"},
            "history": [{"created_by": "COPY a /"}, {"created_by": "MAINTAINER me", "empty_layer": True}],
        }

    async def test_metadata(self, build):
        """Each goes where Docker looks for it."""
        built = await build(
            "FROM base\nARG v=1\nLABEL a=$v \"b c\"='d'\nEXPOSE 80 $v-3/UDP\nVOLUME /v$v\nUSER u$v:g\n"
            "STOPSIGNAL SIGRTMIN+3\nHEALTHCHECK --interval=5s --retries=2 CMD x\n"
            'ENTRYPOINT ["e"]\nCMD ["c"]\n'
        )

        assert built.run == {
            "Labels": {"a": "1", "b c": "d"},
            "ExposedPorts": {"80/tcp": {}, "1/udp": {}, "2/udp": {}, "3/udp": {}},
            "Volumes": {"/v1": {}},
            "User": "u1:g",
            "StopSignal": "SIGRTMIN+3",
            "Healthcheck": {"Test": ["CMD-SHELL", "x"], "Interval": 5 * 10**9, "Retries": 2},
            "Entrypoint": ["e"],
            "Cmd": ["c"],
        }

    async def test_what_the_base_says_stays(self, build):
        """But for what is another's: its rootfs."""
        images = Images(base={"Labels": {"a": "1", "b": "1"}, "Volumes": {"/x": {}}, "Odd": [1]})
        built = await build("FROM base\nLABEL b=2\nVOLUME /y", images=images)

        assert built.run["Labels"] == {"a": "1", "b": "2"}
        assert built.run["Volumes"] == {"/x": {}, "/y": {}}
        assert built.run["Odd"] == [1]
        assert "rootfs" not in built.config

    @pytest.mark.parametrize(
        ("lines", "cmd"),
        [
            ("ENV a=b", ["base"]),
            ('ENTRYPOINT ["e"]', None),
            ('CMD ["c"]\nENTRYPOINT ["e"]', ["c"]),
            ('ENTRYPOINT ["e"]\nCMD ["c"]', ["c"]),
        ],
    )
    async def test_an_entrypoint_drops_the_command_of_the_base(self, build, lines, cmd):
        """It would be the arguments of another program; the stage's own stays."""
        built = await build(f"FROM base\n{lines}", images=Images(base={"Cmd": ["base"]}))

        assert built.run.get("Cmd") == cmd

    async def test_working_directories_are_made(self, build):
        """As its user's; they are relative to one another."""
        built = await build("FROM base\nWORKDIR a\nUSER me\nWORKDIR b/../c\nWORKDIR /\nWORKDIR x")
        made = [action for op in built.ops if isinstance(op, FileOp) for action in op.actions]

        assert made == [
            MakeDirectory(path="/a"),
            MakeDirectory(path="/a/c", owner="me"),
            MakeDirectory(path="/x", owner="me"),
        ]
        assert built.run["WorkingDir"] == "/x"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("EXPOSE 8080:80", "8080:80 is no port"),
            ("EXPOSE 0", "0 is no port"),
            ("EXPOSE 9-8", "9-8 is no port"),
            ("EXPOSE 70000", "70000 is no port"),
            ("STOPSIGNAL now!", "'now!' is no signal"),
            ("ONBUILD RUN x", "ONBUILD is not supported"),
        ],
    )
    async def test_metadata_that_cannot_be(self, build, line, message):
        """It is refused with its line."""
        await refused(build, f"FROM base\n{line}", f"f:2: {message}")

    async def test_equal_dockerfiles_have_equal_results(self, build):
        """Digests and configs depend on nothing else, spacing and comments among it."""
        one = await build("FROM base\nENV a=1\nRUN x\nCOPY <<E /\n1\nE\n")
        two = await build("# note\nFROM   base\nENV a='1'\nRUN x\n\nCOPY <<E /\n1\nE\n")

        assert one.last == two.last
        assert one.run == two.run
