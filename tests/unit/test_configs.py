"""The configurations that are to be copied: each is what its own tool takes."""

import subprocess
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
UNITS = sorted((CONFIGS / "systemd").glob("*.service"))


def test_the_systemd_units_are_whole(tmp_path):
    """systemd-analyze finds nothing to say of them, with their programs where they are to be."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS:
        text = unit.read_text()
        assert "password" not in text
        for name in ("ray", "lazyfarm"):
            text = text.replace(f"/opt/lazyfarm/bin/{name} ", f"{program} ")
        (tmp_path / unit.name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert len(UNITS) == 4
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_ray_cluster_is_one_that_ray_takes():
    """By Ray's own schema, and its check of what is missing."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415 - two seconds

    config = yaml.safe_load((CONFIGS / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config({**config, "setup_command": "x"}))
