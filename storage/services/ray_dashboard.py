"""The part of Ray's dashboard that takes jobs: what ``ray job submit`` speaks to.

A process of the farm's own. As a child of ``ray start`` it would be one whose death ends the head, and the head
takes every actor of the cluster with it. Three of the dashboard's ten modules are loaded; the others are there for its
pages, at 20 MiB each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import StartError
from storage.services.loopback import HOST, choose_ports, is_listening
from storage.services.process import ServiceProcess
from storage.services.state_dir import StateDir

_NAME = "ray-dashboard"
#: Takes jobs; says in the cluster which node is the head, where jobs run; takes what the agents of nodes report, who
#: would log an error for each event.
_MODULES = "JobHead,NodeHead,EventHead"
_READY_S = 60.0
#: Seconds that it may take to end by itself: it does so at once.
_STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """The run of a Ray cluster that a dashboard belongs to."""

    #: ``HOST:PORT`` of its GCS.
    gcs_address: str
    #: In hexadecimal digits; who has another's is not listened to.
    cluster_id: str
    #: The head's directory of sockets and logs.
    directory: Path


class RayDashboard:
    """The farm's job submission server, on loopback; whoever has no token is refused. Callers hold the lock ``ray``."""

    def __init__(self, state: StateDir) -> None:
        self.process = ServiceProcess(state, _NAME)

    def __repr__(self) -> str:
        return f"RayDashboard({self.process!r})"

    @property
    def url(self) -> str:
        """Return ``http://HOST:PORT`` as it was last started; "" where it was not, or was stopped."""
        return "" if self.process.pid is None else f"http://{HOST}:{self.process.ports.get('http', 0)}"

    def is_alive(self) -> bool:
        """Tell whether it runs and accepts connections; it does so when its modules are ready."""
        return self.process.is_alive() and is_listening(self.process.ports.get("http", 0))

    def start(self, session: RaySession, environment: Mapping[str, str]) -> None:
        """Start it, at the ports it had, and wait until it takes jobs.

        Raises:
            StartError: it did not start.
        """
        try:
            self._start(session, environment, self.process.ports)
        except StartError:
            # Once more: the ports were taken between being chosen and being bound.
            self._start(session, environment, {})

    def stop(self) -> bool:
        """End it; tell whether it ran."""
        return self.process.stop(deadline_s=_STOP_S)

    def _start(self, session: RaySession, environment: Mapping[str, str], before: Mapping[str, int]) -> None:
        self.stop()
        ports = choose_ports(["http", "metrics"], before)
        self.process.start(
            # -P: the working directory is no place to import from.
            [
                sys.executable, "-P", "-m", "ray.dashboard.dashboard",
                f"--host={HOST}",
                f"--port={ports['http']}",
                f"--node-ip-address={HOST}",  # where its metrics are served, and agents find it
                f"--gcs-address={session.gcs_address}",
                f"--cluster-id-hex={session.cluster_id}",
                f"--temp-dir={session.directory.parent}",
                f"--session-dir={session.directory}",
                f"--log-dir={session.directory / 'logs'}",
                f"--modules-to-load={_MODULES}",
            ],
            environment={**environment, "DASHBOARD_METRIC_PORT": str(ports["metrics"])},
            ports=ports,
        )  # fmt: skip
        self.process.wait_until(lambda: is_listening(ports["http"]), deadline_s=_READY_S)
