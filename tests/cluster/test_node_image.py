"""The image of a node: built by a farm from the Dockerfile that people use, and then a farm by itself."""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.config import S3Config
from storage.services.loopback import choose_ports
from tests.doubles.container import Container, container
from tests.doubles.debian import bootstrapped_image, debian_image
from tests.doubles.oci_layout import run_tool
from tests.doubles.redis import redis_binaries, redis_server
from tests.doubles.registry import random_image
from tests.doubles.shell_image import shell_image
from tests.doubles.wheels import build_wheel, install, uv

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

IMAGE = Path(__file__).parents[2] / "configs" / "image"
#: What the Dockerfile installs, where its base lacks it.
PACKAGES = ("attr", "ca-certificates", "iproute2", "procps", "python3", "runc", "wget")
#: No more of the machine than a test needs, and none of the ports that another cluster may have.
RAY = ("--num-cpus=1", "--memory=1073741824", "--object-store-memory=78643200", "--dashboard-agent-listen-port=0")
WORKERS = ("fetch-worker", "op-worker")
UP_S = 180.0


@dataclass
class Nodes:
    """Containers of one image, to be nodes of one cluster."""

    root: Path
    config: dict
    settings: Path
    gcs_port: int
    stack: contextlib.ExitStack

    def head(self) -> Container:
        """Run the head, which brings the farm up."""
        return self._run("one", "head", 1, f"--port={self.gcs_port}", "--include-dashboard=false")

    def node(self) -> Container:
        """Run another node."""
        return self._run("two", "node", 2, first=(f"{self._address(1)}:{self.gcs_port}",), drain_s=UP_S)

    @staticmethod
    def _address(index: int) -> str:
        return f"127.0.77.{index}"

    def _run(
        self, name: str, role: str, index: int, *options: str, first: tuple[str, ...] = (), drain_s: float = 0
    ) -> Container:
        disk = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-disk-")))
        ports = [f"--metrics-export-port={choose_ports(['metrics'], {})['metrics']}"]
        args = (role, *first, f"--node-ip-address={self._address(index)}", *options, *RAY, *ports)
        env = {"LAZYFARM_NODE": name, "RAY_AUTH_TOKEN_PATH": "/etc/lazyfarm/ray-token"}
        env["LAZYFARM_DRAIN_S"] = f"{drain_s:g}"
        volumes = {disk: "/var/lib/lazyfarm", self.settings: "/etc/lazyfarm"}
        return self.stack.enter_context(container(self.root, self.config, *args, env=env, volumes=volumes))


@pytest.fixture
def context():
    """The directory to build, with an environment made outside: 400 MB less to fetch and install in the build."""
    directory = Path(tempfile.mkdtemp(prefix="lf-image-"))
    for name in ("Dockerfile", ".dockerignore", "lazyfarm-node"):
        shutil.copy(IMAGE / name, directory / name)
    venv = directory / "opt" / "lazyfarm"
    uv("venv", "-q", "--relocatable", "--python", "/usr/bin/python3", venv)
    install(venv, build_wheel(directory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def downloads():
    """A directory that is served over HTTP on this machine, for what is in no package index; and its URL."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with tempfile.TemporaryDirectory(prefix="lf-wheels-") as directory:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=directory))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Path(directory), f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def built(farm, registry, context):
    """Build the image and push it; return its file system on this machine, and its config."""
    registry.push("debian", "1", debian_image(*PACKAGES))
    args = ("--build-arg", f"BASE={registry.host}/debian:1", "--build-arg", "FROM=context")
    return build_image(farm, registry, context, *args)


def build_image(farm, registry, directory, *args):
    """Build an image and push it; return its file system on this machine, and its config."""
    name = f"{registry.host}/lazyfarm:1"
    made = farm.cli_json("build", *args, "-t", name, "--push", str(directory), timeout_s=700)
    (node,) = farm.cli_json("extract", made["ref"], timeout_s=300)["nodes"]
    config = json.loads(run_tool("skopeo", "inspect", "--tls-verify=false", "--config", f"docker://{name}"))
    return Path(node["path"]), config["config"]


@pytest.fixture
def nodes(built, s3_config):
    """What nodes of a farm are made of: the image, a Redis, a bucket, and /etc/lazyfarm."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server(next(iter(redis_binaries().values()))))
        settings = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-etc-")))
        gcs_port = choose_ports(["gcs"], {})["gcs"]
        write_settings(settings, redis.config.url, s3_config, gcs_port)
        yield Nodes(*built, settings, gcs_port, stack)


def write_settings(directory: Path, redis_url: str, s3: S3Config, gcs_port: int) -> None:
    """Write what the configuration of a node is, as the chart does."""
    secret_files = {"ray-token": secrets.token_hex(32), "s3-credentials": Path(s3.credentials_file).read_text()}
    for name, text in secret_files.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o400)
    sections = {
        "farm": {"name": f"image-{secrets.token_hex(4)}"},
        "redis": {"url": redis_url},
        "s3": {"endpoint": s3.endpoint, "bucket": s3.bucket, "credentials_file": "/etc/lazyfarm/s3-credentials"},
        "ray": {"address": f"127.0.77.1:{gcs_port}", "token_file": "/etc/lazyfarm/ray-token"},
        "cache": {"shards": 1},
        "node": {"root": "/var/lib/lazyfarm/nodes", "snapshotter": "overlay"},
        "web": {"enabled": False},
    }
    lines = [
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in sections.items()
    ]
    (directory / "farm.toml").write_text("\n".join(lines))


def until(head, has):
    """Wait until the farm of a head is well, and has the actors, by kind and node, that it is to have."""
    give_up_s = time.monotonic() + UP_S
    while True:
        done = head.run("lazyfarm", "status", "--json")
        actors = json.loads(done.stdout)["actors"] if done.returncode == 0 else []
        if has({(actor["kind"], actor["node"]) for actor in actors}):
            return
        assert head.process.poll() is None, head.log.read_text()
        assert time.monotonic() < give_up_s, f"{done.stdout}\n{done.stderr}\n{head.log.read_text()}"
        time.sleep(0.5)


def test_what_a_farm_has_built_is_a_farm_of_two_nodes(nodes, registry):
    """The head brings the farm up and another node joins; a layer is brought to it, and a build's command runs."""
    head = nodes.head()
    node = nodes.node()
    until(head, lambda actors: {(kind, name) for kind in WORKERS for name in ("one", "two")} <= actors)

    image = random_image(secrets.randbits(64), layers=1)
    registry.push("pulled", "1", image)
    registry.push("base", "1", shell_image(secrets.token_hex(8)))
    head.json("lazyfarm", "pull", f"{registry.host}/pulled:1")
    (found,) = head.json("lazyfarm", "extract", "--node", "two", f"{registry.host}/pulled:1")["nodes"]
    assert node.run("ls", found["path"]).stdout.split() == ["data-0"]

    dockerfile = f"FROM {registry.host}/base:1\nRUN cat /words > /copy\n"
    made = head.run(
        "sh", "-c", f"mkdir /tmp/b && printf '{dockerfile}' > /tmp/b/Dockerfile && lazyfarm build --json /tmp/b"
    )
    assert made.returncode == 0, made.stderr
    copied = head.json("lazyfarm", "extract", "--node", "two", json.loads(made.stdout)["ref"])["nodes"][0]["path"]
    assert node.run("cat", f"{copied}/copy").stdout == node.run("cat", f"{copied}/words").stdout != ""

    assert node.stop(UP_S) == 0
    assert "two has drained" in node.log.read_text()
    assert head.stop() == 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_image_of_debians_packages_and_a_package_index_runs(farm, registry, downloads):
    """As people build it: upon Debian's own base, with what apt and pip fetch. Its programs are there and start."""
    directory, url = downloads
    wheel = shutil.copy(build_wheel(directory), directory)
    registry.push("debian", "bookworm", bootstrapped_image(directory))
    args = ("--build-arg", f"LAZYFARM=lazyfarm[farm] @ {url}/{Path(wheel).name}", "--build-context")
    base = f"debian:bookworm-slim=docker-image://{registry.host}/debian:bookworm"
    root, config = build_image(farm, registry, IMAGE, *args, base)

    with tempfile.TemporaryDirectory(prefix="lf-disk-") as disk:
        volumes = {Path(disk): "/var/lib/lazyfarm"}
        with container(root, config, "sleep", "1000", env={}, volumes=volumes) as node:
            for command in (
                ("lazyfarm", "--version"),
                ("ray", "--version"),
                ("runc", "--version"),
                ("setfattr", "--version"),
                ("wget", "--version"),
                ("ip", "-V"),
                ("ps", "--version"),
            ):
                done = node.run(*command)
                assert done.returncode == 0, f"{command}: {done.stderr}"
