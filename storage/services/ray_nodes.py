"""Ray nodes on one machine: a head and workers, each ``ray start --block`` in a session of its own.

Never ``ray stop``, which ends whatever on the machine looks like Ray. Each node has an address of its own
out of 127.0.0.0/8, so the cluster doesn't depend on the machine's network, and drivers use the address as
it is (Ray replaces 127.0.0.1 by the machine's outer address). Ray's own servers listen on every interface
all the same; whoever has no token is refused.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cluster.config import RayConfig
from cluster.errors import StartError
from storage.services.kept_cluster import KeptCluster
from storage.services.loopback import choose_ports, is_listening
from storage.services.process import FARM_MARK, SERVICE_MARK, ServiceProcess, marked_pids
from storage.services.ray_dashboard import RayDashboard, RaySession
from storage.services.state_dir import StateDir, write_atomic

#: Which node a process belongs to, in the environment of all that runs on it: ``n0``, ``n1``, …
NODE_VARIABLE = "LAZYFARM_NODE"
STATE_VARIABLE = "LAZYFARM_STATE_DIR"
#: The same as a label of the Ray node.
NODE_LABEL = "lazyfarm-node"

_READY_S = 90.0
#: Seconds that a node may take to end by itself.
_STOP_S = 2.0
_STARTED = b"Ray runtime started."
#: A raylet's argument.
_CLUSTER_ID = "--cluster-id="
#: Unix socket paths end at 107 bytes, and Ray's are some 70 long: no state directory is sure to be short.
_SHORT_TEMP = Path("/tmp")  # noqa: S108 - a directory of mkdtemp's goes there


class RayNode:
    """Node *index* of the farm's Ray cluster; 0 is the head. Callers hold the lock ``ray``."""

    def __init__(self, state: StateDir, index: int) -> None:
        self.index = index
        self.name = f"n{index}"
        self._state = state
        self.process = ServiceProcess(state, f"ray-{self.name}")

    def __repr__(self) -> str:
        return f"RayNode({self.name!r}, {self.process!r})"

    @property
    def ip(self) -> str:
        """Return the node's own address on loopback."""
        return f"127.0.{(self.index + 2) // 250}.{(self.index + 2) % 250}"

    def is_alive(self) -> bool:
        """Tell whether its parent process, its raylet and, on the head, the GCS all run.

        ``ray start`` itself looks for dead children only every second, so asking it alone says "alive" too long.
        """
        if not self.process.is_alive():
            return False
        running = self._commands()
        return {"raylet", "gcs_server"} <= running.keys() if self.index == 0 else "raylet" in running

    def cluster_id(self) -> str:
        """Return the ID of the cluster that the node is in, in hexadecimal digits.

        Raises:
            StartError: its raylet doesn't run.
        """
        raylet = self._commands().get("raylet", 0)
        for argument in _arguments(raylet):
            if argument.startswith(_CLUSTER_ID):
                return argument.removeprefix(_CLUSTER_ID)
        raise StartError(self.process.name, "its raylet names no cluster", str(self.process.log))

    def _commands(self) -> dict[str, int]:
        """Return the names of the node's commands, each with one of its pids."""
        marks = {FARM_MARK: self._state.farm_id(), SERVICE_MARK: self.process.name}
        return {_command_name(pid): pid for pid in marked_pids(marks)}

    def start(self, config: RayConfig, temp: Path, gcs_port: int, kept: Mapping[str, str] | None = None) -> None:
        """Start the node and wait until the cluster knows it; *kept* tells a head where its state is.

        Raises:
            StartError: it did not start.
        """
        before = self.process.ports
        self.process.stop()
        ports = choose_ports(["metrics"], before)
        if self.index == 0:
            ports["gcs"] = gcs_port
            role = ["--head", f"--port={gcs_port}", "--include-dashboard=false"]
            if config.dashboard:
                # Told to do without, Ray still runs a stump of a dashboard (70 MiB, 1.6 s of CPU), whose death ends the
                # head. Where it can't have its port it goes on without any, and the agents find ours.
                role.append("--dashboard-port=-1")
        else:
            role = [f"--address={RayNode(self._state, 0).ip}:{gcs_port}"]
        seen_bytes = self.process.log.stat().st_size if self.process.log.exists() else 0
        self.process.start(
            # -P: the working directory is no place to import from.
            [
                sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *role, "--block",
                f"--node-ip-address={self.ip}",
                f"--temp-dir={temp / self.name}",
                f"--num-cpus={config.node_cpus}",
                f"--memory={config.node_memory_bytes}",
                f"--object-store-memory={config.object_store_bytes}",
                f"--metrics-export-port={ports['metrics']}",
                "--dashboard-agent-listen-port=0",  # any: with the default one, jobs of a second farm would fail
                f"--labels={NODE_LABEL}={self.name}",
                "--include-log-monitor=false", "--no-monitor", "--disable-usage-stats",
            ],
            environment={
                **ray_environment(self._state),
                **(kept or {}),
                NODE_VARIABLE: self.name,
                STATE_VARIABLE: str(self._state.root),
                # `python driver.py` of a job is this one, which has Ray and us.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
                "RAY_ADDRESS": "",  # of whoever runs `lazyfarm up`
                # A worker costs 100 MiB and a second: none before it is needed.
                "RAY_prestart_worker_first_driver": "0",
                "RAY_enable_worker_prestart": "0",
            },
            ports=ports,
        )  # fmt: skip
        self.process.wait_until(lambda: self._has_started(seen_bytes), deadline_s=_READY_S)

    def _has_started(self, seen_bytes: int) -> bool:
        with self.process.log.open("rb") as log:
            log.seek(seen_bytes)
            return _STARTED in log.read()


class RayService:
    """The farm's Ray nodes. Their sockets and logs are under ``STATE/ray``, a link to a short path."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._dashboard = RayDashboard(state)
        self._kept = KeptCluster(state.run)

    @property
    def jobs_url(self) -> str:
        """Return ``http://HOST:PORT`` that takes jobs; "" where none was started."""
        return self._dashboard.url

    @property
    def nodes(self) -> list[RayNode]:
        """Return the nodes that were ever started and not stopped, by index."""
        return [node for node in self._ever if node.process.pid is not None]

    @property
    def taken_down(self) -> frozenset[str]:
        """Return the names of the nodes that were ended on purpose."""
        return frozenset(node.name for node in self._ever if node.process.pid is None)

    @property
    def _ever(self) -> list[RayNode]:
        indices = sorted(int(path.stem.removeprefix("ray-n")) for path in self._state.run.glob("ray-n*.json"))
        return [RayNode(self._state, index) for index in indices]

    @property
    def processes(self) -> list[ServiceProcess]:
        """Return the nodes' processes, and the dashboard's where one was started."""
        dashboard = [self._dashboard.process] if self._dashboard.url else []
        return [*(node.process for node in self.nodes), *dashboard]

    def reached_by(self, config: RayConfig, nodes: int) -> RayConfig:
        """Return *config* with what is needed to reach this cluster."""
        head = RayNode(self._state, 0)
        return replace(
            config,
            address=f"{head.ip}:{head.process.ports.get('gcs', 0)}",
            token_file=str(self._token_file()),
            nodes=nodes,
        )

    def start(self, config: RayConfig, nodes: int) -> tuple[list[str], list[str]]:
        """Bring the cluster to *nodes* nodes; return the processes that were started, and those that were ended.

        A dead worker node or dashboard is started alone. A dead head takes the cluster's state with it, so all
        start anew; but where ``gcs_redis`` has that state, the head alone comes back to it.

        Args:
            config: What each node offers, and whether the dashboard is wanted.
            nodes: How many, the head included; what runs beyond is taken down.

        Raises:
            StartError: a part did not start.
        """
        wanted = [RayNode(self._state, index) for index in range(nodes)]
        head, workers = wanted[0], wanted[1:]
        stopped = self._stop(node for node in self.nodes if node.index >= nodes)
        if not config.dashboard:
            stopped += self._stop_dashboard()
        started: list[RayNode] = []
        if not (head.is_alive() and is_listening(head.process.ports.get("gcs", 0))):
            self._stop_dashboard()
            if not self._resume(head, config):
                self._stop(self.nodes)
                self._start_head(head, config)
            started.append(head)
        temp, gcs_port = self._temp_dir(), head.process.ports["gcs"]
        dead = [node for node in workers if not node.is_alive()]
        has_dashboard = not config.dashboard or self._dashboard.is_alive()
        with ThreadPoolExecutor(len(dead) + 1) as pool:
            starts = [pool.submit(self._try, node, config, temp, gcs_port) for node in dead]
            if not has_dashboard:
                starts.append(pool.submit(self._start_dashboard, head, temp))
        for start in starts:
            start.result()
        self._tell_prometheus()
        names = [node.process.name for node in (*started, *dead)]
        return names if has_dashboard else [*names, self._dashboard.process.name], stopped

    def stop(self) -> list[str]:
        """End all nodes, the head last; return the names of the processes that ran."""
        stopped = [*self._stop_dashboard(), *self._stop(self.nodes)]
        self._kept.forget()
        self._targets.unlink(missing_ok=True)
        return stopped

    def purge(self) -> None:
        """Remove sockets and logs; nothing runs."""
        link = self._state.root / "ray"
        if link.is_symlink():
            shutil.rmtree(link.readlink(), ignore_errors=True)
            link.unlink()

    @property
    def _targets(self) -> Path:
        return self._state.run / "prometheus-targets.json"

    def _tell_prometheus(self) -> None:
        """Write where the nodes' metrics are, for Prometheus to follow (``file_sd_configs``).

        Ray's dashboard would, but for the part of it that is left out here.
        """
        targets = [f"{node.ip}:{node.process.ports['metrics']}" for node in self.nodes]
        write_atomic(self._targets, json.dumps([{"targets": targets}]) + "\n", mode=0o644)

    def _start_dashboard(self, head: RayNode, temp: Path) -> None:
        session = RaySession(
            gcs_address=f"{head.ip}:{head.process.ports['gcs']}",
            cluster_id=head.cluster_id(),
            directory=(temp / head.name / "session_latest").resolve(),
        )
        self._dashboard.start(session, ray_environment(self._state))

    def _stop_dashboard(self) -> list[str]:
        return [self._dashboard.process.name] if self._dashboard.url and self._dashboard.stop() else []

    def _resume(self, head: RayNode, config: RayConfig) -> bool:
        """Start a head that died over the state that it left; tell whether the cluster goes on with it."""
        kept = self._kept.environment(config.gcs_redis)
        if not kept or head.process.pid is None:
            return False
        temp = self._temp_dir()
        (temp / head.name / "ray_current_cluster").unlink(missing_ok=True)
        try:
            head.start(config, temp, head.process.ports["gcs"], kept)
        except StartError:
            return False  # its port or its Redis is gone
        return True

    def _start_head(self, head: RayNode, config: RayConfig) -> None:
        temp = self._temp_dir()
        self._kept.forget()
        kept = self._kept.begin(config.gcs_redis)
        for node_dir in temp.glob("n*"):
            # Names a cluster that is gone, and makes a new head refuse to start.
            (node_dir / "ray_current_cluster").unlink(missing_ok=True)
            for session in sorted(node_dir.glob("session_2*"))[:-1]:
                shutil.rmtree(session, ignore_errors=True)  # the last one's logs may still be wanted
        # Not the port of the cluster that is gone: its drivers would ask this one thousands of times a second, each
        # time with the other's ID.
        gcs_port = choose_ports(["gcs"], {})["gcs"]
        self._try(head, config, temp, gcs_port, kept)

    def _try(
        self, node: RayNode, config: RayConfig, temp: Path, gcs_port: int, kept: Mapping[str, str] | None = None
    ) -> None:
        try:
            node.start(config, temp, gcs_port, kept)
        except StartError:
            # Once more: Ray takes ports that it saw free and finds them taken, or gives up under load.
            if node.index == 0:
                gcs_port = choose_ports(["gcs"], node.process.ports)["gcs"]
            node.start(config, temp, gcs_port, kept)

    @staticmethod
    def _stop(nodes: Iterable[RayNode]) -> list[str]:
        # All at once and without patience: whatever runs on a node may be killed at any instant by design.
        ending = sorted(nodes, key=lambda node: node.index, reverse=True)
        if not ending:
            return []
        with ThreadPoolExecutor(len(ending)) as pool:
            ran = list(pool.map(lambda node: node.process.stop(deadline_s=_STOP_S), ending))
        return [node.process.name for node, did_run in zip(ending, ran, strict=True) if did_run]

    def _temp_dir(self) -> Path:
        """Return the cluster's short directory, ours alone, made unless ``STATE/ray`` links to one."""
        link = self._state.root / "ray"
        if link.is_symlink():
            target = link.readlink()
            if target.is_dir():
                return target
            link.unlink()  # /tmp was cleaned
        base = _SHORT_TEMP if os.access(_SHORT_TEMP, os.W_OK) else None
        target = Path(tempfile.mkdtemp(prefix="lf-", dir=base))
        link.symlink_to(target)
        return target

    def _token_file(self) -> Path:
        return _token_file(self._state)


def taken_down(state_dir: str) -> frozenset[str]:
    """Return the names of the nodes that were started under *state_dir* once and ended on purpose since.

    Empty where the directory is not on this machine, or no Ray was started from it.
    """
    return RayService(StateDir(Path(state_dir))).taken_down if state_dir else frozenset()


def ray_environment(state: StateDir) -> dict[str, str]:
    """Return the environment with which processes join this farm's Ray cluster; holds no secret."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(state)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # A process title over the environment would hide the marks by which its process is found and ended.
        "SPT_NOENV": "1",
    }


def _token_file(state: StateDir) -> Path:
    return state.secret_file("ray-token", lambda: secrets.token_hex(32))


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
