"""Assembled images as others read them: skopeo and umoci, through a real registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from cluster.assemble import assemble_image
from cluster.descriptor import Descriptor
from cluster.ref import RefRecord, RefState
from cluster.reference import default_platform
from tests.doubles.registry import build_layer

pytestmark = [
    pytest.mark.registry,
    pytest.mark.skipif(
        not (shutil.which("skopeo") and shutil.which("umoci")), reason="skopeo or umoci is not installed"
    ),
]

CONFIG = {"config": {"Cmd": ["/hello"], "Env": ["A=b"]}, "history": [{"created_by": "ADD /"}, {"created_by": "RUN"}]}


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def chain_of(layers):
    states, top = [], None
    for layer in layers:
        blob = Descriptor(
            media_type=layer.media_type, digest=layer.digest, size_bytes=len(layer.data), diff_id=layer.diff_id
        )
        top = RefRecord.over(blob, top)
        states.append(RefState(record=top, present=None, providers=()))
    return states


@pytest.mark.parametrize("config", [json.dumps(CONFIG).encode(), b""], ids=["config", "no config"])
@pytest.mark.parametrize("count", [0, 3])
def test_other_tools_take_an_assembled_image(registry, tmp_path, config, count):
    """Pushed, inspected, copied with every digest verified, and unpacked; of Docker's layers as well, and of none."""
    layers = [build_layer({f"file{n}": b"x" * n}, docker=n == 0) for n in range(count)]
    image = assemble_image(
        "x", chain_of(layers), config, created_s=1_700_000_000, platform=default_platform(os.uname().machine)
    )
    repository = f"assembled-{count}-{len(config)}"
    for data in (*(layer.data for layer in layers), image.config_bytes):
        registry.push_blob(repository, data)
    registry.push_manifest(repository, "1", image.manifest.media_type, image.manifest_bytes)

    source = f"docker://{registry.host}/{repository}:1"
    inspected = json.loads(run("skopeo", "inspect", "--tls-verify=false", source))
    assert inspected["Digest"] == image.manifest.digest
    assert inspected["Layers"] == [layer.digest for layer in layers]
    assert inspected["Created"] == "2023-11-14T22:13:20Z"

    run("skopeo", "copy", "--src-tls-verify=false", "--preserve-digests", source, f"oci:{tmp_path}/layout:1")
    if count:
        run("umoci", "unpack", "--rootless", "--image", f"{tmp_path}/layout:1", f"{tmp_path}/bundle")
        found = sorted(path.name for path in (tmp_path / "bundle/rootfs").iterdir())
        assert found == [f"file{n}" for n in range(count)]
    if config:
        assert json.loads(run("skopeo", "inspect", "--config", "--tls-verify=false", source))["config"]["Env"] == [
            "A=b"
        ]
