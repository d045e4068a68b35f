"""``lazyfarm build`` against a farm that is made up: what it is asked for, in which order, and what is said of it.

The cluster's own tests run it against a real farm.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster.cache_options import parse_cache_source, parse_cache_target
from cluster.config import Config
from cluster.digest import digest_of
from cluster.errors import ManifestNotFoundError
from cluster.graph import LocalOp, RunOp
from cluster.job import JobEnded, JobState, VertexEvent, VertexState
from cluster.messages import LayerPush, PushResult
from cluster.progress import LayerPhase, ProgressItem
from cluster.reference import parse_reference
from lazyfarm.cli import parts
from lazyfarm.cli.main import app
from tests.doubles.documents import read_document, read_progress

PINNED = "sha256:" + "a" * 64
MIB = 1 << 20
NAME = "r.example/app:1"


def fake_ref(digest=""):
    blob = SimpleNamespace(digest=digest_of(b"layer"), size_bytes=20 * MIB)
    layer = SimpleNamespace(record=SimpleNamespace(blob=blob), is_lazy=True)
    return SimpleNamespace(id=digest_of(b"ref"), digest=digest, layers=(layer,))


class FakeJob:
    id = "4f2a"

    def __init__(self, farm, on_event):
        self._farm = farm
        self._on_event = on_event

    async def submitted(self):
        self._farm.did.append("submitted")
        return self

    def __await__(self):
        return self._build().__await__()

    async def _build(self):
        self._farm.did.append("built")
        if self._on_event is not None:
            for event in (
                VertexEvent(vertex=digest_of(b"v"), name="RUN make", state=VertexState.CACHED),
                JobEnded(state=JobState.DONE),
            ):
                self._on_event(event)
        if self._farm.error is not None:
            raise self._farm.error
        return SimpleNamespace(ref=fake_ref(), config=b"{}")


class FakeFarm:
    """Remembers what it was asked for."""

    def __init__(self):
        self.did = []
        self.options = None
        self.definition = None
        self.resolved = []
        self.exports = []
        self.error = None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.did.append("left")

    async def resolve(self, image, *, platform=None, plain_http=False):
        self.resolved.append((image, platform, plain_http))
        return SimpleNamespace(reference=parse_reference(f"{image}@{PINNED}"), config=b"{}")

    def solve(self, resolved, /, **options):
        self.definition = resolved.definition
        self.options = options
        return FakeJob(self, options["on_event"])

    async def tag(self, result, name, *, created_s=None):
        self.did.append(f"tagged {name} {created_s}")
        return fake_ref(digest_of(b"manifest"))

    async def push(self, ref, target, *, plain_http=False, progress=None):
        self.did.append(f"pushed {target} {plain_http}")
        if progress is not None:
            progress(ProgressItem(item="push:" + digest_of(b"layer"), phase=LayerPhase.DONE, total_bytes=20 * MIB))
        pushed = (
            LayerPush(digest=digest_of(b"base"), how="mounted", bytes=0),
            LayerPush(digest=digest_of(b"layer"), how="uploaded", bytes=20 * MIB),
        )
        return PushResult(target=target, digest=ref.digest, layers=pushed)

    async def export(self, result, output, *, names=(), stdout=None, progress=None):
        self.did.append(f"exported {output} {' '.join(names)}")


@pytest.fixture
def farm(monkeypatch, tmp_path):
    fake = FakeFarm()
    settings = SimpleNamespace(state_dir=tmp_path / "state", config=Config(), gateway="")
    (tmp_path / "state" / "logs").mkdir(parents=True)

    async def connect(where):
        fake.did.append("joined")
        return fake

    monkeypatch.setattr(parts, "_running_settings", lambda state_dir: settings)
    monkeypatch.setattr(parts, "connect", connect)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return fake


@pytest.fixture
def context(tmp_path):
    directory = tmp_path / "context"
    directory.mkdir()
    (directory / "Dockerfile").write_text("FROM debian:12\nARG VERSION\nCOPY . /src\nRUN make $VERSION\n")
    return str(directory)


def run(*args, stdin=None):
    return CliRunner().invoke(app, ["build", *args], prog_name="lazyfarm", input=stdin)


def document(*args):
    result = run(*args, "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1, result.stdout
    return read_document(("build",), result.stdout), result.exit_code


def test_a_build_is_solved_named_pushed_and_written(farm, context, tmp_path):
    """In this order; the document has it all."""
    told, code = document(context, "-t", NAME, "--push", "-o", f"oci:{tmp_path}/out")
    assert code == 0
    assert farm.did == [
        "joined",
        "built",
        f"tagged {NAME} None",
        f"pushed {NAME} False",
        f"exported oci:{tmp_path}/out {NAME}",
        "left",
    ]
    assert told == {
        "job": "4f2a",
        "ref": digest_of(b"ref"),
        "layers": [{"digest": digest_of(b"layer"), "size": 20 * MIB, "lazy": True}],
        "images": [
            {
                "name": NAME,
                "digest": digest_of(b"manifest"),
                "pushed": [
                    {"digest": digest_of(b"base"), "how": "mounted", "bytes": 0},
                    {"digest": digest_of(b"layer"), "how": "uploaded", "bytes": 20 * MIB},
                ],
            }
        ],
        "outputs": [f"oci:{tmp_path}/out"],
    }


def test_people_see_progress_and_what_came_of_it(farm, context):
    """Off a terminal: a line a step, then names, what moved, and the ref."""
    result = run(context, "-t", NAME, "--push")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:2] == ["#1 RUN make", "#1 CACHED"]
    assert f"{NAME}  {digest_of(b'manifest')}" in lines
    assert f"pushed {NAME}: 1 layer, 20.0 MiB uploaded" in lines
    assert lines[-1].endswith("1 layer, 1 lazy, 20.0 MiB")


def test_a_build_context_is_what_the_dockerfile_finds(farm, context, tmp_path):
    """An image instead of the base that is written, and a directory beside the one that is built."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "lib.c").write_text("int f;")
    dockerfile = "FROM debian:12\nCOPY --from=lib / /lib\n"
    contexts = (
        "--build-context",
        f"lib={tmp_path}/lib",
        "--build-context",
        "debian:12=docker-image://r.example/debian:1",
    )
    result = run(context, "-f", "-", *contexts, stdin=dockerfile)
    assert result.exit_code == 0, result.output
    assert [asked[0] for asked in farm.resolved] == ["r.example/debian:1"]
    assert sum(isinstance(vertex.op, LocalOp) for vertex in farm.definition.vertices.values()) == 1


def test_options_reach_the_graph_and_the_job(farm, context, tmp_path, monkeypatch):
    """Arguments, secrets, labels, caches, platform, registries."""
    monkeypatch.setenv("TOKEN", "hunter2")
    monkeypatch.setenv("VERSION", "1.2")
    (tmp_path / "key").write_text("k")
    result = run(
        context,
        *("--build-arg", "VERSION", "--secret", "id=token,env=TOKEN", "--secret", f"id=key,src={tmp_path}/key"),
        *("--label", "who=me", "--no-cache", "--platform", "linux/arm64", "--plain-http", "docker.io"),
        *("--cache-from", "type=registry,ref=r.example/c:1", "--cache-to", "type=registry,ref=r.example/c:2,mode=max"),
    )
    assert result.exit_code == 0, result.output
    assert farm.resolved == [("docker.io/library/debian:12", "linux/arm64", True)]
    (command,) = [vertex.op for vertex in farm.definition.vertices.values() if isinstance(vertex.op, RunOp)]
    assert dict(command.env)["VERSION"] == "1.2"
    options = farm.options
    assert options["secrets"] == {"token": b"hunter2", "key": tmp_path / "key"}
    assert options["labels"] == {"directory": context, "who": "me"}
    assert options["no_cache"] is True
    assert options["detached"] is False
    assert options["cache_from"] == (parse_cache_source("r.example/c:1"),)
    assert options["cache_to"] == (parse_cache_target("type=registry,ref=r.example/c:2,mode=max"),)
    assert json.loads(options["config"])["config"]["Labels"] == {"who": "me"}
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    ("environ", "args", "epoch"),
    [
        ({"SOURCE_DATE_EPOCH": "1700000000"}, [], "1700000000"),
        ({"SOURCE_DATE_EPOCH": "1700000000"}, ["--build-arg", "SOURCE_DATE_EPOCH=5"], "5"),
        ({}, ["--build-arg", "SOURCE_DATE_EPOCH=5"], "5"),
        ({}, [], "None"),
    ],
)
def test_the_time_of_a_build_may_come_from_the_environment(farm, context, environ, args, epoch):
    """What is given counts more; the image is of that time."""
    result = CliRunner(env=environ).invoke(app, ["build", context, "-t", NAME, *args])
    assert result.exit_code == 0
    assert f"tagged {NAME} {epoch}" in farm.did


def test_a_dockerfile_from_stdin(farm, context):
    """``-f -``, as docker's."""
    assert run(context, "-f", "-", stdin="FROM scratch\nCOPY . /\n").exit_code == 0
    assert farm.resolved == []


def test_a_detached_build_is_submitted_and_left(farm, context):
    """Its job's ID is told."""
    assert document(context, "--detach") == ({"job": "4f2a", "detached": True}, 0)
    assert farm.did == ["joined", "submitted", "left"]
    assert farm.options["detached"] is True
    assert run(context, "--detach").stdout == "job 4f2a: `lazyfarm attach 4f2a` follows it\n"


def test_events_as_documents_are_alone_on_stdout(farm, context):
    """What people are told is on stderr then."""
    result = run(context, "-t", NAME, "--push", "--progress", "json")
    assert [line["event"] for line in read_progress(result.stdout)] == ["vertex", "end"]
    assert f"pushed {NAME}" in result.stderr


def test_what_fails_is_one_line(farm, context):
    """Nothing is named or pushed; exit 1."""
    farm.error = ManifestNotFoundError("debian:12")
    result = run(context, "-t", NAME, "--push")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: debian:12 is not in its registry (hint: ")
    assert farm.did == ["joined", "built", "left"]


def test_a_secret_that_is_missing_is_told_before_anything_runs(farm, context):
    """The command that needs it would fail much later."""
    run_it = "FROM debian\nRUN --mount=type=secret,id=token,required=true x\n"
    told = run(context, "-f", "-", stdin=run_it)
    assert told.exit_code == 1
    assert "--secret id=ID,src=FILE" in told.stderr
    assert "built" not in farm.did


def test_arguments_that_nobody_asks_for_are_warned_of(farm, context):
    """On stderr; the build goes on."""
    result = run(context, "--build-arg", "VERSOIN=1")
    assert result.exit_code == 0
    assert result.stderr == "warning: build arguments that no ARG asks for: VERSOIN\n"


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--target", "nosuch"], "DockerfileError"),
        (["-f", "nosuch"], "InvalidArgumentError"),
        (["--platform", "linux/amd64,linux/arm64"], "InvalidArgumentError"),
        (["--platform", "x"], "InvalidPlatformError"),
        (["--network", "bridge"], "InvalidArgumentError"),
        (["--build-arg", "=x"], "InvalidArgumentError"),
        (["--build-context", "lib"], "InvalidArgumentError"),
        (["--build-context", "=."], "InvalidArgumentError"),
        (["--build-context", "lib=/nosuch"], "InvalidArgumentError"),
        (["--build-context", "lib=.", "--build-context", "lib=/"], "InvalidArgumentError"),
        (["--build-arg", "SOURCE_DATE_EPOCH=x"], "InvalidArgumentError"),
        (["--secret", "id=nosuch"], "InvalidArgumentError"),
        (["-t", "UPPER"], "InvalidReferenceError"),
        (["--push"], "InvalidArgumentError"),
        (["-o", "type=docker"], "InvalidOutputError"),
        (["--detach", "-t", "x"], "InvalidArgumentError"),
        (["--detach", "--secret", "id=PATH"], "InvalidArgumentError"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_refused_before_the_farm_is_joined(args, error, farm, context):
    """Not after a second of joining Ray, nor after a minute of building."""
    told, code = document(context, *args)
    assert (told["error"]["type"], code) == (error, 1)
    assert farm.did == []


@pytest.mark.parametrize("directory", ["-", "https://github.com/x/y.git", "nosuch"])
def test_the_directory_is_one_of_this_machine(directory, farm):
    """What is not supported says so."""
    _, code = document(directory)
    assert code == 1
    assert farm.did == []


def test_a_dockerfile_that_is_wrong_is_told_with_file_and_line(farm, context):
    """In one line."""
    result = run(context, "-f", "-", stdin="FROM debian\nADD https://example.com/x /\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: <stdin>:2: ")
    assert result.stderr.count("\n") == 1
    assert farm.did == []


@pytest.mark.parametrize("args", [["--progress", "fancy"], ["--json", "--progress", "json"], []], ids=" ".join)
def test_wrong_usage_exits_2(args, farm, context):
    """Before anything is read."""
    assert run(*([context] if args else []), *args).exit_code == 2
