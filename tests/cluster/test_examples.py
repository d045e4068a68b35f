"""The programs of examples/, run as a user does."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles.registry import build_image, build_layer, docker_registry, random_image
from tests.doubles.shell_image import shell_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(farm, name, *arguments, check=True):
    """Run an example in a directory that is not the project's; return what it prints, line by line."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        cwd=farm.state_dir,
        env={**os.environ, **farm.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode == 0) is check, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


@pytest.fixture
def pushed(registry):
    """An image that nobody has seen, and its name."""
    repository, image = f"example/{secrets.token_hex(4)}", random_image(secrets.randbits(64), layers=3)
    registry.push(repository, "1", image)
    return f"{registry.host}/{repository}:1", image


def manifest(registry, name):
    """Return the digest of what a registry has under a name."""
    repository, _, tag = name.partition("/")[2].rpartition(":")
    status, headers, _ = registry.call(
        "HEAD", f"/v2/{repository}/manifests/{tag}", headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}
    )
    assert status == 200
    return headers["Docker-Content-Digest"]


def test_retag_moves_no_layer(farm, registry, pushed):
    """Two new names, in another repository; the layers stay lazy."""
    source, image = pushed
    targets = [f"{registry.host}/retagged/{secrets.token_hex(4)}:{tag}" for tag in ("a", "b")]
    lines = run(farm, "retag", source, *targets)
    assert lines == [f"{target}@{image.digest}: 0 bytes of layers sent" for target in targets]
    assert {manifest(registry, target) for target in targets} == {image.digest}


def test_promote_brings_an_image_to_another_registry(farm, pushed):
    """Every byte of it, once; the second time there is nothing to do."""
    source, image = pushed
    with docker_registry() as elsewhere:
        target = f"{elsewhere.host}/promoted/{secrets.token_hex(4)}:1"
        lines = run(farm, "promote", source, target)
        assert lines[-1] == f"{target}@{image.digest}"
        assert sum("uploaded" in line for line in lines) == len(image.layers)
        assert manifest(elsewhere, target) == image.digest
        again = run(farm, "promote", source, target)
        assert sum("exists, 0 bytes" in line for line in again) == len(image.layers)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")
def test_a_build_matrix_shares_what_its_builds_share(farm, registry, tmp_path):
    """Four images of four commands and one that all have; one that fails stops none."""
    tag = secrets.token_hex(4)
    registry.push("example/shell", tag, shell_image(tag))
    (tmp_path / "Dockerfile").write_text(
        f"FROM {registry.host}/example/shell:{tag}\n"
        "RUN head -c 20 /dev/urandom > /shared\n"
        "ARG A\nARG B\n"
        'RUN test "$A$B" != 21 && echo "$A$B" > /own\n'
    )
    target = f"{registry.host}/matrix/{tag}"
    lines = run(farm, "build_matrix", str(tmp_path), target, "A=1,2", "B=1,2", check=False)
    assert [line.split(": ")[0] for line in lines] == ["A=1 B=1", "A=1 B=2", "A=2 B=1", "A=2 B=2"]
    assert "exit" in lines[2]
    names = [line.split(": ")[1].partition("@")[0] for line in lines if line is not lines[2]]
    assert names == [f"{target}:{pair}" for pair in ("1-1", "1-2", "2-2")]
    layers = [[layer["digest"] for layer in farm.cli_json("pull", name)["layers"]] for name in names]
    assert len({each[-2] for each in layers}) == 1
    assert len({each[-1] for each in layers}) == 3


def test_a_warm_up_fetches_once_for_every_node_and_holds_it(farm, registry, pushed):
    """Each node has it, its bytes came once, a lease holds it; an image that isn't there is told of."""
    source, image = pushed
    lines = run(farm, "warm_up", source, f"{registry.host}/example/none:1", check=False)
    size = sum(len(layer.data) for layer in image.layers)
    assert lines[0] == f"{source}: on 3 nodes, {size} bytes fetched"
    assert "none" in lines[1]
    (lease,) = [
        lease["id"]
        for lease in farm.cli_json("leases", "ls")["leases"]
        if lease["labels"].items() >= {"why": "warm-up", "image": source}.items()
    ]
    farm.cli("leases", "release", lease)


def test_the_biggest_files_are_found_by_tasks_of_the_cluster(farm, registry):
    """Of a layer upon another: what the upper one replaces is not told of."""
    repository = f"example/{secrets.token_hex(4)}"
    lower = {"usr/big": b"x" * 3_000_000, "usr/gone": b"x" * 2_000_000, "etc/small": b"x" * 10}
    image = build_image([build_layer(lower), build_layer({"usr/gone": b"x" * 5, "opt/middle": b"x" * 50_000})])
    registry.push(repository, "1", image)
    lines = run(farm, "biggest_files", f"{registry.host}/{repository}:1")
    assert [line.split() for line in lines] == [
        ["3,000,000", "usr/big"],
        ["50,000", "opt/middle"],
        ["10", "etc/small"],
        ["5", "usr/gone"],
    ]
