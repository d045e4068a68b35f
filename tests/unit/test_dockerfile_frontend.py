"""From a directory to a graph: which files are read, what is left out, and what is told before a base is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from cluster.errors import (
    DockerfileError,
    InvalidArgumentError,
    InvalidPlatformError,
    ManifestNotFoundError,
    ScanError,
)
from cluster.graph import ImageOp, LocalOp, Network, RunOp
from cluster.reference import parse_reference
from lazyfarm import graph
from lazyfarm.dockerfile.frontend import build_options, check_source, dockerfile_graph, read_source

PINNED = "sha256:" + "a" * 64


class Images:
    """The part of a farm that finds bases."""

    def __init__(self, **env):
        self.env = [f"{name}={value}" for name, value in env.items()]
        self.asked = []

    async def resolve(self, image, *, platform=None, plain_http=False):
        self.asked.append((image, platform, plain_http))
        if "nosuch" in image:
            raise ManifestNotFoundError(image)
        reference = parse_reference(f"{image}@{PINNED}")
        return SimpleNamespace(reference=reference, config=json.dumps({"config": {"Env": self.env}}).encode())


@pytest.fixture
def context(tmp_path):
    (tmp_path / "main.c").write_text("int main() {}")
    (tmp_path / "notes.txt").write_text("notes")
    return tmp_path


def write(context, *lines, name="Dockerfile"):
    (context / name).write_text("\n".join(lines) + "\n")


def ops(converted, kind):
    vertices = converted.state.definition().vertices.values()
    return [vertex.op for vertex in vertices if isinstance(vertex.op, kind)]


def sent(converted):
    """Return the names of the files that the build sends."""
    (tree,) = graph.resolve([converted.state]).trees.values()
    return sorted(entry.path for entry in tree.tree.entries)


async def test_a_directory_becomes_a_graph(context):
    """Its bases are pinned by digest, for the platform that was asked for."""
    write(context, "FROM debian:12", "COPY . /src", "RUN make")
    images = Images()
    converted = await dockerfile_graph(images, context, platform="linux/arm64")
    assert images.asked == [("docker.io/library/debian:12", "linux/arm64", False)]
    (base,) = ops(converted, ImageOp)
    assert base.reference == f"docker.io/library/debian:12@{PINNED}"
    assert base.platform == "linux/arm64"
    assert sent(converted) == ["Dockerfile", "main.c", "notes.txt"]


async def test_registries_without_tls_are_named_for_the_call(context):
    """For the base's config as for its layers."""
    write(context, "FROM localhost:5000/base")
    images = Images()
    converted = await dockerfile_graph(images, context, plain_http=["localhost:5000"])
    assert images.asked[0][2] is True
    assert ops(converted, ImageOp)[0].plain_http is True


async def test_what_the_ignore_file_names_is_not_sent(context):
    """Of the directory; a Dockerfile's own ignore file comes first."""
    write(context, "FROM debian", "COPY . /")
    write(context, "# none of these", "*.txt", "Dockerfile", ".dockerignore", name=".dockerignore")
    assert sent(await dockerfile_graph(Images(), context)) == ["main.c"]
    write(context, "*", "!notes.txt", name="Dockerfile.dockerignore")
    assert sent(await dockerfile_graph(Images(), context)) == ["notes.txt"]


async def test_a_dockerfile_may_be_elsewhere(context, tmp_path_factory):
    """Then its own ignore file is beside it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, "FROM scratch", "COPY . /", name="app.docker")
    write(elsewhere, "*.txt", name="app.docker.dockerignore")
    converted = await dockerfile_graph(Images(), context, file=elsewhere / "app.docker")
    assert sent(converted) == ["main.c"]
    assert len(ops(converted, LocalOp)) == 1


def test_a_dockerfile_may_come_from_stdin(context):
    """Where the caller has one; errors call it that."""
    source = read_source(context, "-", read_stdin=lambda: b"FROM scratch\nCOPY main.c /\n")
    assert source.dockerfile.file == "<stdin>"
    with pytest.raises(DockerfileError, match=r"^<stdin>:2: "):
        read_source(context, "-", read_stdin=lambda: b"FROM scratch\nNONSENSE\n")


async def test_the_time_of_a_build_reaches_commands_and_the_image(context):
    """Without an ARG, as a build argument that everybody asks for; the image is made then."""
    write(context, "FROM debian", "RUN date")
    converted = await dockerfile_graph(Images(), context, args={"SOURCE_DATE_EPOCH": "1700000000"})
    (command,) = ops(converted, RunOp)
    assert ("SOURCE_DATE_EPOCH", "1700000000") in dict(command.env).items()
    assert json.loads(converted.config)["created"] == "2023-11-14T22:13:20Z"
    assert converted.unused_args == ()
    without = await dockerfile_graph(Images(), context, args={"SOURCE_DATE_EPOCH": ""})
    assert "SOURCE_DATE_EPOCH" not in dict(ops(without, RunOp)[0].env)
    assert "created" not in json.loads(without.config)


@pytest.mark.parametrize("epoch", ["-1", "1.5", "now", "99999999999999", "\u0661"])
def test_a_time_that_is_none_is_refused(epoch):
    """Before anything is read."""
    with pytest.raises(InvalidArgumentError, match="SOURCE_DATE_EPOCH"):
        build_options(args={"SOURCE_DATE_EPOCH": epoch})


async def test_labels_of_the_call_are_the_images(context):
    """Over those of the Dockerfile."""
    write(context, "FROM scratch", "COPY . /", "LABEL a=1 b=2")
    converted = await dockerfile_graph(Images(), context, labels={"b": "3", "c": "4"})
    assert json.loads(converted.config)["config"]["Labels"] == {"a": "1", "b": "3", "c": "4"}


async def test_the_network_is_what_the_call_says(context):
    """Where the Dockerfile doesn't."""
    write(context, "FROM debian", "RUN a", "RUN --network=host b")
    converted = await dockerfile_graph(Images(), context, network="none")
    assert {command.network for command in ops(converted, RunOp)} == {Network.NONE, Network.HOST}


async def test_errors_of_the_farm_are_passed_on(context):
    """As they are."""
    write(context, "FROM nosuch")
    with pytest.raises(ManifestNotFoundError):
        await dockerfile_graph(Images(), context)


@pytest.mark.parametrize(
    ("options", "error"), [({"platform": "x"}, InvalidPlatformError), ({"network": "bridge"}, InvalidArgumentError)]
)
def test_options_that_cannot_be_meant_are_refused(options, error):
    """With what could be."""
    with pytest.raises(error):
        build_options(**options)


def test_what_is_not_there_is_named(context):
    """The directory, or the Dockerfile in it."""
    with pytest.raises(ScanError, match="no such directory"):
        read_source(context / "nosuch")
    with pytest.raises(ScanError, match="not a directory"):
        read_source(context / "main.c")
    with pytest.raises(InvalidArgumentError, match="Dockerfile: No such file"):
        read_source(context)


@pytest.mark.parametrize("data", [b"ok\n[bad\n", b"ok\n\xff\n"])
def test_what_is_wrong_with_an_ignore_file_is_told_with_its_line(context, data):
    """As with a Dockerfile."""
    write(context, "FROM scratch", "COPY . /")
    (context / ".dockerignore").write_bytes(data)
    with pytest.raises(DockerfileError, match=r"\.dockerignore:2: "):
        read_source(context)


# -- before bases are known -----------------------------------------------------------------------


@pytest.fixture
def other(tmp_path_factory):
    """Another directory to copy from, which leaves something out."""
    directory = tmp_path_factory.mktemp("other")
    for name, text in {"lib.c": "int f;", "draft.c": "", ".dockerignore": "draft.c\n.dockerignore\n"}.items():
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize(
    "lines",
    [
        ["FROM scratch", "COPY --from=lib / /"],
        ["FROM lib", "COPY --from=LIB / /"],
        ["FROM debian", "RUN --mount=from=lib,target=/m make"],
        ["FROM gone AS lib", "RUN not-this", "FROM scratch", "COPY --from=lib / /"],
        ["FROM gone AS lib", "COPY --from=gone-too / /", "FROM lib AS app", "COPY --from=0 / /"],
    ],
    ids=["copy", "base", "mount", "stage", "base-and-number"],
)
async def test_a_named_directory_is_found_by_its_name(context, other, lines):
    """Wherever a stage or an image may be named; a stage that is called so is not built, nor its base asked for."""
    write(context, *lines)
    images = Images()
    converted = await dockerfile_graph(images, context, contexts={"lib": other})
    assert sent(converted) == ["lib.c"]
    assert not [asked for asked in images.asked if "gone" in asked[0]]
    assert await check_source(read_source(context), build_options(contexts={"lib": str(other)}))


async def test_a_named_image_takes_the_place_of_another(context):
    """However its name is written; for the stage's platform, and without TLS where that is said of its registry."""
    write(context, "FROM --platform=linux/arm64 debian", "COPY --from=docker.io/library/tools:latest /x /")
    images = Images()
    contexts = {"debian": "docker-image://mirror:5000/debian:12", "tools": "docker-image://mirror:5000/tools"}
    converted = await dockerfile_graph(images, context, contexts=contexts, plain_http=["mirror:5000"])
    assert images.asked == [("mirror:5000/debian:12", "linux/arm64", True)]
    assert {(op.reference.partition("@")[0], op.plain_http) for op in ops(converted, ImageOp)} == {
        ("mirror:5000/debian:12", True),
        ("mirror:5000/tools:latest", True),
    }
    write(context, "FROM debian:12")
    await dockerfile_graph(images, context, contexts=contexts)
    assert images.asked[-1][0] == "docker.io/library/debian:12"


async def test_a_stage_that_is_replaced_may_be_the_target(context):
    """Then the image is what takes its place, config and all; so the stage's own faults are none."""
    write(context, "FROM scratch AS app", "ONBUILD RUN x")
    contexts = {"APP": "docker-image://mirror/app"}
    converted = await dockerfile_graph(Images(A="1"), context, target="app", contexts=contexts)
    assert json.loads(converted.config)["config"]["Env"] == ["A=1"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("a b", ".", "the name of a build context can't be 'a b'"),
        ("scratch", ".", "the empty image"),
        ("lib", "", "no such directory"),
        ("lib", "/nosuch", "the build context lib can't be '/nosuch': there is no such directory"),
        ("lib", __file__, "no such directory"),
        ("lib", "docker-image://", "the build context lib can't be 'docker-image://'"),
        ("lib", "oci-layout:///x", "docker-image://IMAGE"),
        ("lib", "https://example.com/x.git", "docker-image://IMAGE"),
        ("lib", "target:base", "docker-image://IMAGE"),
    ],
)
def test_a_context_that_can_not_be_is_told_in_a_line(name, value, told):
    """Before anything is asked for."""
    with pytest.raises(InvalidArgumentError) as caught:
        build_options(contexts={name: value})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_contexts_for_one_image_are_refused(context):
    """The two names mean the same: one of them would be overlooked."""
    with pytest.raises(InvalidArgumentError, match="another has that name"):
        build_options(contexts={"debian": context, "docker.io/library/debian:latest": context})


@pytest.mark.parametrize(
    "wrong",
    [
        "ADD https://example.com/x /",
        "RUN --security=insecure x",
        "COPY --from=5 a b",
        "ONBUILD RUN x",
        "EXPOSE 70000",
    ],
)
async def test_what_is_wrong_is_told_without_its_base(context, wrong):
    """With the line; nothing is asked of a registry."""
    write(context, "FROM debian", "RUN ok", wrong)
    with pytest.raises(DockerfileError, match=r"Dockerfile:3: "):
        await check_source(read_source(context), build_options())


async def test_what_the_base_may_make_right_is_not_wrong_yet(context):
    """A variable may be set by the base: then the build is fine, and else it fails when the base is known."""
    write(context, "FROM debian", "COPY ${FILE:?needed} /")
    assert await check_source(read_source(context), build_options()) is None
    assert await dockerfile_graph(Images(FILE="main.c"), context)
    with pytest.raises(DockerfileError, match="needed"):
        await dockerfile_graph(Images(), context)


async def test_arguments_that_nobody_asks_for_are_told(context):
    """Before anything runs."""
    write(context, "FROM debian", "ARG A", "RUN $A")
    checked = await check_source(read_source(context), build_options(args={"A": "1", "B": "2"}))
    assert checked.unused_args == ("B",)


async def test_a_stage_that_is_not_there_is_wrong(context):
    """The ones that are there are named."""
    write(context, "FROM scratch AS app", "COPY . /")
    with pytest.raises(DockerfileError, match="app"):
        await check_source(read_source(context), build_options(target="nosuch"))
