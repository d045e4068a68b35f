"""Where a process begins to trace: only if its farm's configuration names who takes spans is OpenTelemetry imported."""

from __future__ import annotations

import os
import socket

from cluster import tracing
from cluster.config import Config


def start_traces(config: Config, *, component: str, instance: str, node: str = "") -> None:
    """Have this process's spans sent, if ``[tracing]`` says where to; does nothing where they are already.

    Args:
        config: The farm's.
        component: What this process is: ``driver``, or an actor's kind.
        instance: Which one.
        node: Where, as the farm names it; "" for a driver.
    """
    if not config.tracing.endpoint or tracing.is_installed():
        return
    try:
        from actors.otel import otel_tracer  # noqa: PLC0415 - 0.3 s, and an extra that may be missing

        tracing.install(otel_tracer(config, component=component, instance=instance, node=node))
    except (ImportError, OSError, ValueError) as exc:
        import structlog  # noqa: PLC0415 - 0.1 s, which drivers are spared

        # What is traced is worth less than what is built: this process's part of the traces is missing.
        structlog.get_logger().warning(
            "traces.off", error_type=type(exc).__name__, error=str(exc), hint="pip install lazyfarm[otel]"
        )


def start_driver_traces(config: Config) -> None:
    """Do so for a driver."""
    start_traces(config, component="driver", instance=f"{socket.gethostname()}/{os.getpid()}")
