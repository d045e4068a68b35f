"""What the documentation tells people to type, typed: every console session of the tutorial and of the README.

And what the README has in Python, run.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from storage.services.loopback import choose_ports
from tests.doubles.farm import WHOLE
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.timeout(500),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

ROOT = Path(__file__).parents[2]

#: Types a command that goes on until it is interrupted, and interrupts it once it has told its address.
UNTIL_IT_SERVES = """\
{command} > served &
until grep -q : served; do kill -0 $!; sleep 0.2; done
kill -TERM $!
wait $!
"""
#: What a build of the README's needs to be there; `make` is a command of the image.
DOCKERFILE = """\
FROM docker.io/library/debian:12 AS base
COPY --chmod=755 make /bin/make
FROM base AS test
ARG VERSION
RUN --mount=type=secret,id=token test "$(cat /run/secrets/token)" = secret && test "$VERSION" = 1.2
FROM base AS app
RUN make
"""
#: The image of this test has neither a package manager nor a compiler.
IN_PLACE = {
    "apt-get update && apt-get install -y gcc": "true",
    'tree.run("make"': 'tree.run("true"',
    'image("debian:12")': 'image("docker.io/library/debian:12")',
}


def blocks(document, language):
    """Return the blocks of a document in that language; none in another that somebody might type goes unseen."""
    fences = re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", (ROOT / document).read_text(), re.MULTILINE)
    assert {name for name, _ in fences} <= {"console", "python"}, document
    return [text for name, text in fences if name == language]


def sessions(document):
    """Return the commands of a document's console sessions: one text a session."""
    found = []
    for block in blocks(document, "console"):
        lines = []
        for line in block.splitlines():
            assert line.startswith(("$ ", "> ", ">")), (
                f"{document}: {line!r} is neither typed nor a command's next line"
            )
            lines.append(line[2:])
        found.append("\n".join(lines))
    assert found
    return found


@pytest.fixture
def place(registry):
    """A directory, and an environment in which a person would type."""
    # Short, for the sake of Unix sockets.
    root = Path(tempfile.mkdtemp(prefix="lf-doc-"))
    registry.push("library/debian", "12", shell_image(secrets.token_hex(8)))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, **WHOLE, "PATH": path, "LAZYFARM_STATE_DIR": str(root / "farm"), "TOKEN": "secret"}
    environ["LAZYFARM__GATEWAY__PORT"] = str(choose_ports(["gateway"], {})["gateway"])
    yield root, environ
    subprocess.run(["lazyfarm", "down", "--purge"], env=environ, cwd=root, check=False, timeout=120)
    shutil.rmtree(root, ignore_errors=True)


def typed(place, registry, text):
    """Type a session where the last one ended; return what was said, having seen that every command ends well."""
    root, environ = place
    where = root / "where"
    text = text.replace("docker.io/", f"{registry.host}/").replace("registry.example/", f"{registry.host}/")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{text}\npwd > {where}"],
        cwd=where.read_text().strip() if where.exists() else root,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_tutorial_is_as_it_says(registry, place):
    """From `up` to `down`: each session works, in order, and says what the text around it promises."""
    said = {text: typed(place, registry, text) for text in sessions("docs/tutorial.md")}
    (retagged,) = (out for text, out in said.items() if "push docker.io" in text)
    assert set(re.findall(r"^sha256:\w+ +(mounted|uploaded|exists|copied)", retagged, re.MULTILINE)) == {"mounted"}
    (rebuilt,) = (out for text, out in said.items() if "goodbye" in text)
    assert re.search(r"RUN head.*\n.*CACHED", rebuilt)
    (driven,) = (out for text, out in said.items() if "driver.py" in text)
    assert driven.count("extracted at") == 2


def test_the_readmes_commands_are_as_it_says(registry, place):
    """With what it leaves to the reader put in: a ref, a job's ID, a project to build."""
    root, _ = place
    project = root / "project"
    project.mkdir()
    (root / "lib").mkdir()
    (project / "Dockerfile").write_text(DOCKERFILE.replace("docker.io", registry.host))
    (project / "make").write_text("#!/bin/sh\necho made\n")
    typed(place, registry, f"cd {project}; lazyfarm up --nodes 1")
    pulled = json.loads(typed(place, registry, f"lazyfarm pull --json {registry.host}/library/debian:12"))
    for text in sessions("README.md"):
        if "make demo" in text:
            continue  # CI runs both
        for line in text.splitlines():
            if line.startswith(("lazyfarm up", "lazyfarm down")):
                continue  # it is up, and is to be
            command = re.sub(r"\bREF\b", pulled["ref"], line)
            if "4f2a" in command:
                newest = json.loads(typed(place, registry, "lazyfarm jobs ls --json"))["jobs"][0]["job"]
                command = command.replace("4f2a", newest)
            if command.startswith("lazyfarm gateway"):
                command = UNTIL_IT_SERVES.format(command=command.partition(" #")[0])
            typed(place, registry, command)
    assert list(project.glob("job-*.html"))
    (project / "src").mkdir()
    (project / "src/main.c").write_text("int main(void) { return 0; }\n")
    for number, text in enumerate(blocks("README.md", "python")):
        said = typed(place, registry, f"cat > {number}.py <<'END'\n{script(text)}\nEND\npython {number}.py")
        assert said.strip()


def script(text):
    """Return a program of a block, which may be what stands inside an asynchronous function."""
    for found, put in IN_PLACE.items():
        text = text.replace(found, put)
    if "asyncio.run" in text:
        return text
    body = "\n".join(f"    {line}" for line in text.splitlines())
    return f"import asyncio\nasync def main():\n{body}\nasyncio.run(main())"
