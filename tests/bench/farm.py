"""The farm against its peers, on one machine, with its default settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.images import random_image
from tests.bench.memory import PeakMemory
from tests.bench.peers import boto3_upload, ray_init, skopeo_and_umoci
from tests.bench.ratio import Ratio
from tests.demo.stage import Stage
from tests.demo.variants import padded
from tests.doubles.image import cached_image
from tests.doubles.oci_layout import LayoutImage

_CALLERS = 8
_RUNS = 3
_STARTS = 5
_MIB = 1 << 20
_GIGABYTE = 10**9


class FarmBench:
    """The measures that need a farm; each gets blobs that nobody has fetched before."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._made = 0

    def duplicate_factors(self) -> list[Ratio]:
        """Bytes at the registry over unique bytes, for eight callers on one, two and three nodes."""
        nodes = self._stage.nodes()
        found = []
        for count in range(1, len(nodes) + 1):
            image, reference = self._pushed(self._random(layers=4, layer_bytes=5_000_000))
            drivers = [
                self._stage.driver("extract", reference, node=nodes[caller % count]) for caller in range(_CALLERS)
            ]
            for driver in drivers:
                driver.wait_ready()
            with self._stage.counting(image) as traffic:
                for driver in drivers:
                    driver.go()
                for driver in drivers:
                    driver.result()
            found.append(
                Ratio(
                    name=f"duplicate_factor_{_CALLERS}_callers_{count}_nodes",
                    value=traffic.layer_bytes / image.size_bytes,
                    target=1.0,
                    side="exactly",
                    detail=f"{traffic.layer_bytes:,} of {image.size_bytes:,} bytes",
                    is_correctness=True,
                )
            )
        return found

    def pull_and_extract(self) -> list[Ratio]:
        """Cold pull and extract against skopeo and umoci: the demo image, and eight layers of 20 MB."""
        demo = cached_image()
        return [
            self._pull_and_extract("demo_image", lambda directory, run: padded(demo, directory, records=run + 1)),
            self._pull_and_extract(
                "8x20MB",
                lambda directory, run: random_image(directory, layers=8, layer_bytes=20_000_000, seed=100 + run),
            ),
        ]

    def _pull_and_extract(self, name: str, make: Callable[[Path, int], LayoutImage]) -> Ratio:
        ours, copies, unpacks = [], [], []
        node = self._stage.nodes()[0]
        for run in range(_RUNS):
            _, reference = self._pushed(make(self._directory(), run))
            copied, unpacked = skopeo_and_umoci(reference, self._stage.directory / "peer")
            copies.append(copied)
            unpacks.append(unpacked)
            driver = self._stage.driver("pull+extract", reference, node=node)
            driver.wait_ready()
            driver.go()
            ours.append(float(driver.result()["seconds"]))
        peer_s = statistics.median(c + u for c, u in zip(copies, unpacks, strict=True))
        return Ratio(
            name=f"cold_pull_extract_{name}_over_skopeo_umoci",
            value=statistics.median(ours) / peer_s,
            target=1.0,
            detail=f"{statistics.median(ours):.2f} s of {peer_s:.2f} s "
            f"(skopeo {statistics.median(copies):.2f}, umoci {statistics.median(unpacks):.2f}); median of {_RUNS}",
        )

    def bytes_into_s3(self) -> list[Ratio]:
        """Registry to S3 against a tuned upload of the same bytes from files in memory."""
        ours, peers, setting = [], [], ""
        for run in range(_RUNS):
            image, reference = self._pushed(self._random(layers=8, layer_bytes=20_000_000))
            files = [image.blob(layer.digest) for layer in image.layers]
            peer_s, setting = boto3_upload(files, self._stage.config.s3, f"peer-{run}")
            peers.append(peer_s)
            driver = self._stage.driver("unlazy", reference)
            driver.wait_ready()
            driver.go()
            ours.append(float(driver.result()["seconds"]))
        ours_s, peer_s = statistics.median(ours), statistics.median(peers)
        found = Ratio(
            name="bytes_into_s3_over_boto3_upload",
            value=ours_s / peer_s,
            target=1.15,
            detail=f"{ours_s:.2f} s of {peer_s:.2f} s for 160 MB; boto3 with {setting}; median of {_RUNS}",
        )
        return [found]

    def command_start(self) -> list[Ratio]:
        """An acting command from start to exit, against a program that joins Ray and leaves again."""
        _, reference = self._pushed(self._random(layers=1, layer_bytes=1000))
        ray = self._stage.config.ray
        ours, peers = [], []
        for _ in range(_STARTS):
            peers.append(ray_init(ray.address, ray.token_file))
            began = time.monotonic()
            self._stage.cli("pull", reference)
            ours.append(time.monotonic() - began)
        ours_s, peer_s = statistics.median(ours), statistics.median(peers)
        found = Ratio(
            name="acting_command_over_ray_init",
            value=ours_s / peer_s,
            target=1.5,
            detail=f"`pull` {ours_s:.2f} s of {peer_s:.2f} s for ray.init and ray.shutdown; median of {_STARTS}",
        )
        return [found]

    def memory(self) -> list[Ratio]:
        """Call it first. Peak memory of a fetch worker's process tree over idle while it fetches a layer of 1 GB."""
        image, reference = self._pushed(self._random(layers=1, layer_bytes=_GIGABYTE))
        driver = self._stage.driver("unlazy", reference)
        driver.wait_ready()
        with PeakMemory(self._stage.workers()) as memory:
            driver.go()
            driver.result()
        found = Ratio(
            name="fetch_worker_MiB_over_idle_1GB_layer",
            value=memory.most_over_idle_bytes / _MIB,
            target=256.0,
            detail=f"PSS of the process tree of {memory.busiest}: "
            f"{memory.idle_bytes[memory.busiest] / _MIB:.0f} MiB idle, "
            f"{memory.peak_bytes[memory.busiest] / _MIB:.0f} MiB at most in {memory.samples} samples; "
            f"layer {image.size_bytes / 1e9:.2f} GB",
        )
        return [found]

    def _random(self, *, layers: int, layer_bytes: int) -> LayoutImage:
        return random_image(self._directory(), layers=layers, layer_bytes=layer_bytes, seed=self._made)

    def _directory(self) -> Path:
        self._made += 1
        return self._stage.directory / f"image-{self._made}"

    def _pushed(self, image: LayoutImage) -> tuple[LayoutImage, str]:
        name = f"bench/image-{self._made}:1"
        self._stage.push(image, name)
        return image, self._stage.direct_reference(name)
