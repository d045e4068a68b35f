"""What the code tells of itself: a sink of metrics to look into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from cluster import metrics


class _Told:
    """A sink that keeps sums, how often histograms were told, and what gauges stand at."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}

    def record(self, metric: metrics.Metric, value: float, labels: Mapping[str, str]) -> None:
        """Keep it under the metric's name, without ours before it, and its labels' values."""
        key = (metric.name.removeprefix("lazyfarm_"), *labels.values())
        if isinstance(metric, metrics.Gauge):
            self.sums[key] = value
        else:
            self.sums[key] = self.sums.get(key, 0) + (1 if isinstance(metric, metrics.Histogram) else value)


@pytest.fixture
def told() -> Iterator[dict[tuple[str, ...], float]]:
    """Everything that is told while a test runs."""
    sink = _Told()
    metrics.install(sink)
    yield sink.sums
    metrics.install(None)
