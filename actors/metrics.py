"""Metrics at Ray's own endpoint on each node: hands over to Ray what :mod:`cluster.metrics` defines."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import ray.util.metrics

from cluster.messages import LayerFetch, LayerPush
from cluster.metrics import (
    METRICS,
    MOST_OPEN,
    OTHER,
    PULLED_BYTES,
    PUSHED_BYTES,
    PUSHED_LAYERS,
    REGISTRY_CIRCUIT_OPEN,
    UNLAZY_BYTES,
    UNLAZY_SECONDS,
    Counter,
    Gauge,
    Histogram,
    Keeper,
    Metric,
    install,
)
from cluster.ref import RefState
from cluster.traffic import blob_sizes
from storage.circuits import Circuits

#: What every metric says of who keeps it. Ray leaves the worker's ID away, and would make one series of two actors'.
_OWN = ("farm", "node", "actor")
_REFRESH_S = 5.0


class RayMetrics:
    """A :class:`cluster.metrics.MetricSink` that keeps every metric in Ray, for this process."""

    def __init__(self, *, farm: str, node: str, actor: str) -> None:
        self._own = {"farm": farm, "node": node, "actor": actor}
        self._instruments = {metric.name: _instrument(metric) for metric in METRICS}
        #: Values seen of each open label.
        self._seen: defaultdict[str, set[str]] = defaultdict(set)
        #: What every gauge was last set to, with its labels.
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[Gauge, float, Mapping[str, str]]] = {}

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Hand one value over; takes some ten microseconds, and any thread may."""
        told = {label: self._bounded(label, labels[label], known) for label, known in metric.labels.items()}
        if isinstance(metric, Gauge):
            self._gauges[metric.name, tuple(told.values())] = (metric, value, told)
        # Not `inc`, which refuses the 0 that a counter has to start with.
        self._instruments[metric.name]._record(value, {**self._own, **told})  # noqa: SLF001

    def start(self, keeper: Keeper) -> None:
        """Show every counter that *keeper* keeps as 0."""
        for metric in METRICS:
            if isinstance(metric, Counter) and keeper in metric.by:
                for labels in metric.combinations():
                    self.record(metric, 0, labels)

    async def refresh_forever(self) -> None:
        """Tell every gauge again and again: Ray forgets one that it hears nothing of for two reports, of 10 s each."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            for gauge, value, labels in list(self._gauges.values()):
                self.record(gauge, value, labels)

    def _bounded(self, label: str, value: str, known: Sequence[str]) -> str:
        if known:
            return value
        seen = self._seen[label]
        if value not in seen:
            if len(seen) >= MOST_OPEN:
                return OTHER
            seen.add(value)
        return value


def _instrument(metric: Metric) -> ray.util.metrics.Metric:
    tags = (*_OWN, *metric.labels)
    match metric:
        case Counter():
            return ray.util.metrics.Counter(metric.name, description=metric.help, tag_keys=tags)
        case Gauge():
            return ray.util.metrics.Gauge(metric.name, description=metric.help, tag_keys=tags)
        case Histogram():
            bounds = list(metric.buckets)
            return ray.util.metrics.Histogram(metric.name, description=metric.help, boundaries=bounds, tag_keys=tags)
        case _:
            raise TypeError(f"{metric.name}: {type(metric).__name__}")


def export_metrics(keeper: Keeper, *, farm: str, node: str, actor: str) -> RayMetrics:
    """Have the metrics of this process, which has joined the cluster, shown at its node's endpoint."""
    sink = RayMetrics(farm=farm, node=node, actor=actor)
    sink.start(keeper)
    install(sink)
    return sink


# -- what the supervisor sees ----------------------------------------------------------------------------------------


async def show_circuits(circuits: Circuits, named: frozenset[str]) -> frozenset[str]:
    """Show of each registry that the cluster ever gave up whether it has now; return those that are shown by name.

    Those of *named* stay; the first ones beside have a name, too. Of all others together it is shown whether any is
    given up: by a label's bound alone one would be hidden by the next, which is well.
    """
    is_open = {one.host for one in await circuits.given_up()}
    named |= frozenset(sorted(is_open - named)[: MOST_OPEN - 1 - len(named)])
    for host in named:
        REGISTRY_CIRCUIT_OPEN.set(host in is_open, registry=host)
    REGISTRY_CIRCUIT_OPEN.set(not is_open <= named, registry=OTHER)
    return named


# -- what a fetch worker did -----------------------------------------------------------------------------------------


def count_pulled(layers: Iterable[RefState]) -> None:
    """Count the layers of an image that was pulled."""
    for layer in layers:
        PULLED_BYTES.add(layer.record.blob.size_bytes, state="lazy" if layer.is_lazy else "present")


def count_unlazied(chain: Sequence[RefState], layers: Sequence[LayerFetch]) -> None:
    """Count layers that were asked for, each with its ref."""
    sizes = blob_sizes(chain)
    for layer in layers:
        how = "joined" if layer.joined else "present" if layer.source in ("present", "snapshot") else "fetched"
        UNLAZY_BYTES.add(sizes[layer.digest], how=how)
        UNLAZY_SECONDS.observe(layer.seconds, how=how)


def count_pushed(layers: Iterable[LayerPush]) -> None:
    """Count the layers of a push or of a cache's export."""
    for layer in layers:
        PUSHED_LAYERS.add(how=layer.how)
        PUSHED_BYTES.add(layer.bytes)
