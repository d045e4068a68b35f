"""Metrics, through Ray's own endpoint on each node. Names end in their unit."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter, Histogram

from cluster.messages import LayerFetch


class WorkerMetrics:
    """What a fetch worker counts."""

    def __init__(self, node: str) -> None:
        tags = ("node",)
        self._fetched = Counter(
            "lazyfarm_registry_read_bytes", description="Layer bytes read from registries.", tag_keys=tags
        )
        self._layers = Counter(
            "lazyfarm_unlazy_layers", description="Layers asked for, by how they came.", tag_keys=("node", "how")
        )
        self._seconds = Histogram(
            "lazyfarm_unlazy_seconds",
            description="Seconds until a layer was present.",
            boundaries=[0.01, 0.05, 0.2, 1, 5, 20, 60, 300],
            tag_keys=tags,
        )
        self._node = node

    def unlazied(self, layers: Sequence[LayerFetch]) -> None:
        """Count layers that were asked for."""
        node = {"node": self._node}
        for layer in layers:
            how = "joined" if layer.joined else "present" if layer.source in ("present", "snapshot") else "fetched"
            self._layers.inc(1, {**node, "how": how})
            if layer.bytes_fetched:
                self._fetched.inc(layer.bytes_fetched, node)
            self._seconds.observe(layer.seconds, node)
