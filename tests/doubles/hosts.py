"""Hosts of one farm on one machine: network namespaces with addresses of their own, each with a Ray node.

Redis, S3 and registries stay where they listen, on this machine's loopback, which every host reaches at the
network's gateway. ``python -m tests.doubles.hosts NETWORK …`` is ``lazyfarm …`` whose nodes are put on hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import S3Config
from lazyfarm.settings import load_settings
from storage.services.process import ServiceProcess
from storage.services.ray_nodes import RayNode
from tests.doubles.driver_process import DriverProcess, driver_process
from tests.doubles.farm import RunningFarm
from tests.doubles.faults import BrokenFarm, FaultSwitches, behind_proxies, environ_of
from tests.doubles.redis import redis_binaries, redis_server
from tests.doubles.registry import Image
from tests.doubles.s3_faults import S3FaultProxy

_ROOT = Path(__file__).parents[2]
_UP_S = 180.0
#: The first host's last byte.
_FIRST = 10


@dataclass(frozen=True)
class Network:
    """A bridge with hosts at it: 10.77.NUMBER.0/24."""

    number: int
    count: int

    @property
    def bridge(self) -> str:
        """Return the bridge's name, with which everything of the network begins."""
        return f"lfh{self.number}"

    @property
    def gateway(self) -> str:
        """Return the address at which hosts find this machine."""
        return f"10.77.{self.number}.1"

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.77.{self.number}.{_FIRST + host}"

    def inside(self, host: int) -> list[str]:
        """Return what a command begins with to run on a host; it sees the same files."""
        return ["/usr/bin/nsenter", f"--net=/run/netns/{self.bridge}n{host}"]

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Have the network while the body runs."""
        forward = ["PREROUTING", "-i", self.bridge, "-p", "tcp", "-d", self.gateway]
        forward += ["-j", "DNAT", "--to-destination", "127.0.0.1"]
        with contextlib.ExitStack() as stack:
            _ip("link", "add", self.bridge, "type", "bridge")
            stack.callback(_ip, "link", "del", self.bridge)
            _ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            Path(f"/proc/sys/net/ipv4/conf/{self.bridge}/route_localnet").write_text("1")
            _run("iptables", "-w", "-t", "nat", "-I", *forward)
            stack.callback(_run, "iptables", "-w", "-t", "nat", "-D", *forward)
            for host in range(self.count):
                name = f"{self.bridge}n{host}"
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", name, "master", self.bridge, "up")
                _run(*self.inside(host), "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _run(*self.inside(host), "ip", "link", "set", device, "up")
            yield

    @contextlib.contextmanager
    def cut_off(self, host: int) -> Iterator[None]:
        """Drop all that a host sends and is sent while the body runs: no connection is closed, nothing is told."""
        for chain, side in (("INPUT", "-i"), ("OUTPUT", "-o")):
            _run(*self.inside(host), "iptables", "-w", "-I", chain, side, "eth0", "-j", "DROP")
        try:
            yield
        finally:
            for chain in ("INPUT", "OUTPUT"):
                _run(*self.inside(host), "iptables", "-w", "-F", chain)


@dataclass(kw_only=True)
class HostFarm(BrokenFarm):
    """A farm whose nodes are hosts."""

    network: Network

    @contextlib.asynccontextmanager
    async def driver_on(self, host: int, *arguments: str) -> AsyncIterator[DriverProcess]:
        """Run a driver on a host."""
        within = self.network.inside(host)
        async with driver_process(self.running.state_dir, *arguments, within=within) as driver:
            yield driver

    def hosted_image(self, *sizes: int) -> tuple[str, Image]:
        """Push an image that nobody has seen; return its name as hosts reach it."""
        name, image = self.image(*sizes)
        return name.replace("127.0.0.1", self.network.gateway), image

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run the command line on the head."""
        return _command(self.network, self.running, *arguments)


@contextlib.contextmanager
def host_farm(s3: S3Config, network: Network) -> Iterator[HostFarm]:
    """Bring a farm up on the hosts of a network, behind proxies, whose every process follows the standing plan."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-hosts-", ignore_cleanup_errors=True)))
        faults = FaultSwitches(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lf-faults-"))))
        s3_proxy = stack.enter_context(S3FaultProxy(s3))
        redis = stack.enter_context(redis_server(next(iter(redis_binaries().values())), "--protected-mode", "no"))
        stack.enter_context(network.up())
        near = {**environ_of(s3_proxy.config), "LAZYFARM__REDIS__URL": redis.config.url}
        far = {name: value.replace("127.0.0.1", network.gateway) for name, value in near.items()}
        far |= {"LAZYFARM__RAY__DASHBOARD": "false", "LAZYFARM__RAY__CALL_TIMEOUT_S": "4"}
        settings = load_settings(root, None, near)
        running = RunningFarm(state_dir=root, settings=settings, environ={**far, **faults.environ})
        # What was begun is taken down even where not all of it came up.
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        stack.callback(_command, network, running, "down", "--purge")
        _command(network, running, "up", "--nodes", str(network.count))
        lab = stack.enter_context(behind_proxies(running, faults, s3_proxy, s3))
        parts = {name: getattr(lab, name) for name in ("running", "faults", "s3_proxy", "proxy", "registry", "store")}
        yield HostFarm(**parts, network=network)


def _command(network: Network, running: RunningFarm, *arguments: str) -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.doubles.hosts", f"{network.number}", *arguments, "--json"]
    done = subprocess.run(
        [*network.inside(0), *program],
        cwd=_ROOT,
        env={**os.environ, **running.environ, "LAZYFARM_STATE_DIR": str(running.state_dir)},
        capture_output=True,
        text=True,
        timeout=_UP_S,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# -- on the head ------------------------------------------------------------------------------------------------


def _put_nodes_on_hosts(network: Network) -> None:
    """Make each Ray node that this process starts one of its host, with the host's address."""
    start = ServiceProcess.start

    def started_on_host(self: ServiceProcess, command: Sequence[str], **options: Any) -> None:
        if self.name.startswith("ray-n"):
            command = [*network.inside(int(self.name.removeprefix("ray-n"))), *command]
        start(self, command, **options)

    ServiceProcess.start = started_on_host  # type: ignore[method-assign]
    RayNode.ip = property(lambda self: network.address(self.index))  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    _put_nodes_on_hosts(Network(int(sys.argv[1]), 0))
    from lazyfarm.cli.main import run

    sys.argv[:] = ["lazyfarm", *sys.argv[2:]]
    run()
