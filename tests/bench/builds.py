"""Builds of which nothing has changed, and a push of which nothing moves, on one machine, with default settings."""

from __future__ import annotations

import statistics
import time

from tests.bench.images import random_image
from tests.bench.peers import ray_init
from tests.bench.ratio import Ratio
from tests.demo.farm_process import Driver
from tests.demo.stage import Stage
from tests.doubles.shell_image import shell_image

_VERTICES = 1000
_ROUNDS = 11
_STARTS = 7
_LAYERS = 8
#: FROM and nine steps more, as programs are built: metadata, files, commands.
_DOCKERFILE = """\
FROM {base}
ENV LANG=C.UTF-8
WORKDIR /work
COPY requirements.txt ./
RUN cat requirements.txt > installed
COPY src/ ./src/
RUN cat src/main.c > main.o
RUN cat main.o > main
RUN mkdir -p /out && cat main > /out/main
CMD ["/out/main"]
"""


class BuildBench:
    """The measures of builds; each with graphs and images that the farm has not seen before."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def rebuild(self) -> list[Ratio]:
        """A graph that is all cached, from a connected driver, against as many tasks of dask.distributed."""
        # One after the other: the first build of ours takes a minute, and would be slowed.
        ours = self._side("rebuild")
        peers = self._side("tasks")
        # In turn, so that a busy moment of the machine meets both.
        took = [(_round_s(ours), _round_s(peers)) for _ in range(_ROUNDS)]
        for side in (ours, peers):
            side.end()
        ours_s = statistics.median(own for own, _ in took)
        peers_s = statistics.median(peer for _, peer in took)
        return [
            Ratio(
                name=f"noop_rebuild_ms_per_vertex_{_VERTICES}_vertices",
                value=ours_s / _VERTICES * 1e3,
                target=1.0,
                detail=f"{ours_s * 1e3:.0f} ms, {min(own for own, _ in took) * 1e3:.0f} ms at best, "
                f"for `await farm.solve(graph)` of a connected driver; median of {_ROUNDS}",
            ),
            Ratio(
                name="noop_rebuild_over_dask_distributed",
                value=statistics.median(own / peer for own, peer in took),
                target=1.0,
                detail=f"{ours_s * 1e3:.0f} ms of {peers_s * 1e3:.0f} ms for a graph of the same shape of tasks that "
                f"do nothing, on a LocalCluster of processes; median of {_ROUNDS} pairs",
            ),
        ]

    def _side(self, side: str) -> Driver:
        process = self._stage.process("tests.bench.rounds", side, "--vertices", str(_VERTICES))
        process.wait_ready()
        return process

    def dockerfile(self) -> list[Ratio]:
        """``lazyfarm build`` of which all is cached, from start to exit, against a program that only joins Ray."""
        base = "bench/base:1"
        self._stage.push_image(shell_image("bench"), base)
        context = self._stage.directory / "context"
        (context / "src").mkdir(parents=True)
        (context / "src" / "main.c").write_text("int main(void) { return 0; }\n")
        (context / "requirements.txt").write_text("nothing\n")
        (context / "Dockerfile").write_text(_DOCKERFILE.format(base=self._stage.direct_reference(base)))
        self._stage.cli("build", str(context))
        ray = self._stage.config.ray
        took: list[tuple[float, float]] = []
        for _ in range(_STARTS):
            floor_s = ray_init(ray.address, ray.token_file)
            began = time.monotonic()
            self._stage.cli("build", str(context))
            took.append((time.monotonic() - began, floor_s))
        ours_s = statistics.median(own for own, _ in took)
        peers_s = statistics.median(peer for _, peer in took)
        found = Ratio(
            name="cached_dockerfile_build_over_ray_init",
            value=statistics.median(own / peer for own, peer in took),
            target=1.6,
            detail=f"`build` of ten steps {ours_s:.2f} s of {peers_s:.2f} s for ray.init and ray.shutdown; "
            f"median of {_STARTS} pairs",
        )
        return [found]

    def retag(self) -> list[Ratio]:
        """A push to another repository of the same registry, of an image whose layers nobody has fetched."""
        image = random_image(self._stage.directory / "retagged", layers=_LAYERS, layer_bytes=100_000, seed=1)
        name = "bench/retagged:1"
        self._stage.push(image, name)
        ref = self._stage.cli("pull", self._stage.direct_reference(name))["ref"]
        with self._stage.counting(image) as traffic:
            self._stage.cli("push", ref, self._stage.direct_reference("bench/elsewhere:1"))
        found = Ratio(
            name=f"retag_requests_{_LAYERS}_layers",
            value=traffic.others,
            target=10,
            detail=f"requests but for {traffic.heads} HEADs and {traffic.mounts} mounts: "
            + ", ".join(f"{count} {what}" for what, count in sorted(traffic.kinds.items())),
        )
        return [found]


def _round_s(side: Driver) -> float:
    side.go()
    return float(side.said("seconds")["seconds"])
