"""The gateway of a real farm, over TLS: builds, pulls and pushes from outside, and a gateway that dies meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
from functools import partial

import pytest

from cluster.errors import ProcessFailedError, RegistryError
from cluster.job import JobEnded, VertexEvent, VertexLog, VertexState
from cluster.progress import LayerPhase
from lazyfarm.graph import image, local, secret
from storage.connect import connect
from tests.doubles import at_rest
from tests.doubles.registry import (
    HTPASSWD_PASSWORD,
    HTPASSWD_USER,
    docker_registry,
    htpasswd_config,
    random_image,
)
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

BASIC = "Basic YWxpY2U6d29uZGVybGFuZA=="


async def test_a_private_image_is_pulled_moved_and_pushed_from_outside(farm, gateway, tmp_path):
    """Its driver answers for the registry; what it says rests nowhere, and who says another thing is told so."""
    with docker_registry(htpasswd_config(tmp_path), authorize=lambda _scope: BASIC) as private:
        private.push("team/app", "1", made := random_image(secrets.randbits(64), layers=2, layer_bytes=20_000))
        name = f"{private.host}/team/app:1"
        items = []
        async with await gateway.connect({private.host: (HTPASSWD_USER, HTPASSWD_PASSWORD)}) as outside:
            ref = await outside.pull(name)
            assert ref.is_lazy
            assert [state.record.blob.digest for state in ref.layers] == [layer.digest for layer in made.layers]
            await ref.unlazy(progress=items.append)
            assert not ref.is_lazy
            assert {item.item for item in items if item.phase is LayerPhase.DONE} == {
                f"fetch:{layer.digest}" for layer in made.layers
            }
            pushed = await outside.push(ref, f"{private.host}/team/copy:1")
            assert {layer.bytes for layer in pushed.layers} == {0}
            assert [node.id for node in await outside.nodes()] == [node.id for node in await outside.nodes()] != []
        status = json.loads(await asyncio.to_thread(run, gateway, tmp_path, "status"))
        assert status == farm.cli_json("status")
        assert {actor["kind"] for actor in status["actors"]} >= {"supervisor", "fetch-worker"}
        async with await gateway.connect({private.host: (HTPASSWD_USER, "wrong")}) as outside:
            with pytest.raises(RegistryError) as refused:
                await outside.pull(name)
            assert refused.value.hint
    link = connect(farm.settings.config.redis)
    assert await at_rest.in_redis(partial(link.execute, may_repeat=True), {HTPASSWD_PASSWORD.encode()}) == []
    await link.close()
    assert at_rest.in_files(farm.state_dir / "logs", {HTPASSWD_PASSWORD.encode()}) == []


async def test_a_build_outlives_its_gateway(farm, registry, gateway, tmp_path):
    """A local directory and a secret went in; a gateway that is started anew is told all that the job goes on with.

    A command on a machine without a farm follows the job by its ID, and what fails is told as it is within the farm.
    """
    base = shell_image(secrets.token_hex(8))
    registry.push("base", "1", base)
    source = tmp_path / "source"
    source.mkdir()
    (source / "word").write_text(word := secrets.token_hex(8))
    events = []
    running = asyncio.Event()

    def heard(event):
        events.append(event)
        if isinstance(event, VertexLog) and "begun" in event.text:
            running.set()

    command = "echo begun; for i in 1 2 3 4 5 6 7 8; do sleep 1; done; cat /run/secrets/pass /word; echo ended"
    graph = (
        image(f"{registry.host}/base:1", plain_http=True)
        .copy(local(source), "/word", "/word")
        .run(command, mounts=[secret("pass")])
        .named("the command")
    )
    async with await gateway.connect() as outside:
        job = outside.solve(graph, secrets={"pass": "open-sesame:"}, on_event=heard)
        building = asyncio.ensure_future(job._result())
        async with asyncio.timeout(60):
            await running.wait()
        gateway.end(signal.SIGKILL)
        await asyncio.to_thread(gateway.start)
        result = await building
        said = "".join(event.text for event in events if isinstance(event, VertexLog))
        assert said.count("begun") == said.count("ended") == 1
        assert f"[redacted]{word}" in said
        assert [e.state for e in events if isinstance(e, VertexEvent) and e.name == "the command"] == [
            VertexState.WAITING,
            VertexState.RUNNING,
            VertexState.COMPLETED,
        ]
        assert len(result.ref.layers) == len(base.layers) + 1  # the command wrote nothing
        followed = await asyncio.to_thread(run, gateway, tmp_path, "attach", job.id)
        assert '"state": "done"' in followed
        with pytest.raises(ProcessFailedError) as failed:
            await outside.solve(image(f"{registry.host}/base:1", plain_http=True).run("exit 7"))
        assert failed.value.exit_code == 7
        assert [type(event) async for event in (await outside.job(job.id[:12])).events()][-1] is JobEnded


#: What either side may take more for a large image than for a small one: buffers are of a size, an image is not.
MORE_KIB = 32 * 1024
LARGE_BYTES = 192 * 1024**2


def test_an_image_comes_to_a_machine_outside_in_bounded_memory(registry, gateway, tmp_path):
    """As `lazyfarm build --output` writes it: its layers straight from S3, whole, and never as a whole in memory."""
    context = tmp_path / "context"
    context.mkdir()
    (context / "word").write_text(word := secrets.token_hex(8))
    peaks = {}
    for name, size in (("small", 10_000), ("large", LARGE_BYTES)):
        registry.push("base", name, base := random_image(secrets.randbits(64), layers=1, layer_bytes=size))
        (context / "Dockerfile").write_text(f"FROM {registry.host}/base:{name}\nCOPY word /word\n")
        gateway.forget_peak()
        written = tmp_path / f"{name}.tar"
        driver_kib = build(gateway, tmp_path, str(context), "--output", f"type=oci,dest={written}")
        peaks[name] = driver_kib, gateway.peak_kib()
        with tarfile.open(written) as layout:
            (lower, upper) = manifest(layout)["layers"]
            assert lower["digest"] == base.layers[0].digest
            assert sha256(layout, lower["digest"]) == lower["digest"]
            assert word.encode() in gzip.decompress(blob(layout, upper["digest"]).read())
        written.unlink()
    for small, large in zip(*peaks.values(), strict=True):
        assert large - small < MORE_KIB, peaks


#: Runs a command and says what it took at most. From a process of its own: what a child begins with, before it becomes
#: the command, is its parent's, and counts.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def build(gateway, home, *arguments) -> int:
    """Build on a machine that has no farm; return the KiB of memory that the driver had at most."""
    measured = ("-c", MEASURED, sys.executable, "-m", "lazyfarm", "build", *arguments)
    return int(python(gateway, home, *measured, timeout_s=200))


def blob(layout, digest):
    return layout.extractfile(f"blobs/{digest.replace(':', '/')}")


def manifest(layout):
    (entry,) = json.load(layout.extractfile("index.json"))["manifests"]
    return json.load(blob(layout, entry["digest"]))


def sha256(layout, digest) -> str:
    return f"sha256:{hashlib.file_digest(blob(layout, digest), 'sha256').hexdigest()}"


def run(gateway, home, *words) -> str:
    """Run a command as on a machine that has no farm; return what it says."""
    return python(gateway, home, "-m", "lazyfarm", *words, "--json", timeout_s=60)


def python(gateway, home, *arguments, timeout_s) -> str:
    """Run Python as on a machine that has no farm; return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **gateway.environ, "HOME": str(home), "XDG_STATE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
