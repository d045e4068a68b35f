"""Dockerfiles of other projects: what comes of each."""

import json
import tomllib
from pathlib import Path

import pytest

from cluster.errors import DockerfileError, EmptyGraphError
from cluster.graph import FileOp, ImageOp, RunOp
from cluster.reference import parse_platform
from lazyfarm import graph
from lazyfarm.dockerfile.convert import Base, BuildOptions, convert
from lazyfarm.dockerfile.instructions import parse_dockerfile

CORPUS = Path(__file__).parents[1] / "dockerfiles"
EXPECTED = tomllib.loads((CORPUS / "expected.toml").read_text())
AMD64 = parse_platform("linux/amd64")


async def silent(reference, platform):
    """Return a base that says nothing."""
    config = {"architecture": platform.architecture, "os": platform.os}
    return Base(reference=reference, config=json.dumps(config).encode())


async def outcome(name, args, context):
    """Convert one and say what came of it, as expected.toml does."""
    try:
        dockerfile = parse_dockerfile((CORPUS / name).read_bytes(), name)
        options = BuildOptions(platform=AMD64, build_platform=AMD64, args=args)
        converted = await convert(dockerfile, graph.local(context), options, silent)
    except DockerfileError as error:
        return {"refused": str(error).removeprefix(f"{name}:")}
    try:
        ops = [vertex.op for vertex in converted.state.definition().vertices.values()]
    except EmptyGraphError:
        ops = []
    run = json.loads(converted.config)["config"]
    return {
        "bases": sorted(op.reference for op in ops if isinstance(op, ImageOp)),
        "runs": sum(isinstance(op, RunOp) for op in ops),
        "files": sum(isinstance(op, FileOp) for op in ops),
        "starts": (run.get("Entrypoint") or []) + (run.get("Cmd") or []),
    }


def test_every_file_is_expected_to_come_to_something():
    """There are enough, of several origins, most convert, and none is left out."""
    files = {str(path.relative_to(CORPUS)) for path in CORPUS.rglob("*") if path.is_file()}

    assert files - {"README.md", "LICENSES.txt", "expected.toml"} == EXPECTED.keys()
    assert sum("refused" not in expected for expected in EXPECTED.values()) >= 100
    readme = (CORPUS / "README.md").read_text()
    assert all(f"| `{folder}` |" in readme for folder in {name.partition("/")[0] for name in EXPECTED})


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_real_dockerfile_comes_to_what_is_expected(name, tmp_path):
    """It converts into so many ops upon these images, or is refused at that line for that reason."""
    expected = dict(EXPECTED[name])
    args = expected.pop("args", {})

    assert await outcome(name, args, tmp_path) == expected
