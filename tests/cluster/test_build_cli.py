"""``lazyfarm build``, ``jobs`` and ``attach`` as processes, on a real farm of three nodes."""

import json
import os
import re
import secrets
import subprocess
import sys

import pytest

from tests.doubles.oci_layout import run_tool
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

DOCKERFILE = """\
ARG BASE
FROM $BASE AS build
WORKDIR /src
COPY hello .
RUN --mount=type=secret,id=token <<EOT
set -e
test "$(cat /run/secrets/token)" = hunter2
cat hello > /out
EOT
FROM scratch
COPY --from=build /out /out
ENV WHO=world
CMD ["/out"]
"""


@pytest.fixture
def base(registry):
    """Push an image with a shell that no farm has seen; return its name."""
    registry.push("base", "1", shell_image(secrets.token_hex(8)))
    registry.forget()
    return f"{registry.host}/base:1"


@pytest.fixture
def context(tmp_path):
    """Make a directory to build."""
    directory = tmp_path / "context"
    directory.mkdir()
    (directory / "Dockerfile").write_text(DOCKERFILE)
    (directory / "hello").write_text("hello\n")
    (directory / ".dockerignore").write_text("ignored\n")
    return directory


@pytest.fixture
def build(farm, context, base, monkeypatch):
    """Run ``lazyfarm build`` of the context."""
    monkeypatch.setenv("TOKEN", "hunter2")
    fixed = ("--build-arg", f"BASE={base}", "--secret", "id=token,env=TOKEN")
    return lambda *args, **options: farm.cli("build", *fixed, *args, str(context), **options)


def document(done):
    """Return a command's JSON document."""
    return json.loads(done.stdout)


def test_a_dockerfile_is_built_pushed_and_read_elsewhere(build, registry, tmp_path):
    """Several stages, a heredoc and a secret; what is pushed is an image to other tools, with its config and file."""
    told = document(build("--tag", f"{registry.host}/out:1", "--push", "--json"))
    assert [layer["lazy"] for layer in told["layers"]] == [False]
    target = f"docker://{registry.host}/out:1"
    seen = json.loads(run_tool("skopeo", "inspect", "--tls-verify=false", "--config", target))
    assert (seen["config"]["Cmd"], seen["config"]["Env"][-1]) == (["/out"], "WHO=world")
    assert "hunter2" not in json.dumps(seen)
    layout = tmp_path / "layout"
    run_tool(
        *("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", target, f"oci:{layout}:1"),
    )
    run_tool("umoci", "unpack", "--image", f"{layout}:1", str(tmp_path / "bundle"))
    assert (tmp_path / "bundle/rootfs/out").read_text() == "hello\n"
    # Podman's own library verifies every digest of a pull.
    storage = ("--storage-driver", "vfs", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"))
    run_tool("buildah", *storage, "pull", "--quiet", "--tls-verify=false", target)
    listed = json.loads(run_tool("buildah", *storage, "images", "--json"))
    assert [name for image in listed for name in image["names"]] == [f"{registry.host}/out:1"]


def test_a_second_build_is_all_cached_and_its_image_is_the_same(build, registry):
    """No blob is asked for, every step says CACHED, and the digest is what it was."""
    first = document(build("--tag", "app:1", "--json"))
    registry.forget()
    done = build("--tag", "app:1", "--progress", "plain")
    assert first["images"][0]["digest"] in done.stdout
    assert "DONE" not in done.stdout
    assert len(re.findall(r"^#\d+ CACHED$", done.stdout, re.MULTILINE)) >= 5
    assert registry.count("GET", "blob", 200) == 0


def test_outputs_are_written_here(build, tmp_path):
    """A layout that skopeo reads, an archive, and the files alone."""
    build("-o", f"oci:{tmp_path}/layout", "-o", f"type=oci,dest={tmp_path}/a.tar", "-o", str(tmp_path / "files"))
    assert json.loads(run_tool("skopeo", "inspect", f"oci:{tmp_path}/layout"))["Layers"]
    assert json.loads(run_tool("skopeo", "inspect", f"oci-archive:{tmp_path}/a.tar"))["Layers"]
    assert (tmp_path / "files/out").read_text() == "hello\n"


def test_a_failing_step_is_one_line_and_exit_code_1(farm, context, base):
    """No traceback; what the command said last is shown with the step."""
    (context / "Dockerfile").write_text(f"FROM {base}\nRUN echo so long; exit 3\n")
    done = farm.cli("build", str(context), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "so long" in done.stdout
    assert "exit code 3" in done.stderr


def test_what_is_not_supported_is_said_before_anything_runs(farm, context, base):
    """With file and line; the farm sees no job."""
    before = len(farm.cli_json("jobs", "ls")["jobs"])
    (context / "Dockerfile").write_text(f"FROM {base}\nRUN echo 1\nRUN --mount=type=ssh echo 2\n")
    done = farm.cli("build", str(context), check=False)
    assert done.returncode == 1
    assert f"{context}/Dockerfile:3:" in done.stderr
    assert len(farm.cli_json("jobs", "ls")["jobs"]) == before


def test_a_detached_build_is_attached_listed_and_logged(farm, context, base):
    """Its ID, or the start of it, is all that is needed."""
    (context / "Dockerfile").write_text(f"FROM {base}\nRUN echo from afar; sleep 1\n")
    job = farm.cli_json("build", "--detach", str(context))["job"]
    attached = farm.cli("attach", job[:8], "--progress", "plain")
    assert "from afar" in attached.stdout
    assert farm.cli_json("jobs", "show", job)["state"] == "done"
    assert [row["job"] for row in farm.cli_json("jobs", "ls")["jobs"] if row["state"] == "done"].count(job) == 1
    assert "from afar" in farm.cli("jobs", "logs", job).stdout


def test_a_cancelled_job_ends_who_is_attached(farm, context, base):
    """``jobs cancel`` stops the command; ``attach`` ends with an error."""
    (context / "Dockerfile").write_text(f"FROM {base}\nRUN echo begun; sleep 600\n")
    job = farm.cli_json("build", "--detach", str(context))["job"]
    with subprocess.Popen(
        [sys.executable, "-m", "lazyfarm", "attach", job, "--progress", "plain"],
        env={**os.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as attached:
        for line in attached.stdout:
            if "begun" in line:
                break
        farm.cli("jobs", "cancel", job)
        _, errors = attached.communicate(timeout=60)
    assert attached.returncode == 1
    assert "cancelled" in errors
