"""The steps of the demo that build: a Dockerfile of several stages, as a user of the farm does.

What ran is known from the op workers' own logs, what moved from the registry's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.demo.stage import NODES, Stage
from tests.demo.table import Row, at_least, exactly, that
from tests.demo.traffic import Traffic
from tests.demo.work import Work
from tests.doubles.image import Bases
from tests.doubles.oci_layout import fetch, run_tool

_PROJECT = Path(__file__).with_name("project")
_IMAGE = "demo/hello:1"
#: What depends on hello.c, as steps are called; and what is sent of the directory.
_OF_HELLO = ("local project", "[hello] COPY hello.c", "[hello] RUN gcc", "COPY --from=hello")
_DIGEST = re.compile(r"@sha256:[0-9a-f]+")
_WORDS = "the same words for both drivers"


class BuildSteps:
    """One project, built again and again: each step begins with what the one before it has left."""

    def __init__(self, stage: Stage, bases: Bases) -> None:
        """Push the bases to the registry, and copy the project, to change it."""
        self._stage = stage
        self._bases = bases
        self._directory = stage.directory / "project"
        #: Of the image that both drivers made.
        self._digest = ""
        shutil.copytree(_PROJECT, self._directory)
        stage.push(bases.compiler, "demo/compiler:12")
        stage.push(bases.runtime, "demo/runtime:12")

    # -- the steps ----------------------------------------------------------------------------------------

    def first(self) -> list[Row]:
        """Build where nothing is known yet: each base layer is fetched once for the cluster."""
        built = self._build()
        unique_bytes = self._bases.compiler.size_bytes + self._bases.runtime.size_bytes
        served_bytes = built.traffic.layer_bytes
        ran = built.steps("completed")
        return [
            exactly("nodes", len(self._stage.nodes()), NODES),
            exactly("steps that ran", len(ran), len(built.vertices), f"  ({built.seconds:.1f} s)"),
            exactly(
                "base bytes at the registry / unique bytes", served_bytes / unique_bytes, 1.0, _bytes(served_bytes)
            ),
            *_each_once(built.work, {vertex["vertex"] for vertex in ran if not _is_image(vertex)}),
        ]

    def again(self) -> list[Row]:
        """Build the same: nothing runs, moves or is extracted."""
        built = self._build()
        note = f"  ({built.seconds:.1f} s)"
        return [
            exactly("steps that were cached", len(built.steps("cached")), len(built.vertices), note),
            exactly("ops that ran", built.work.ops.total(), 0),
            exactly("blob GETs at the registry", built.traffic.blob_gets, 0),
            exactly("extracts", built.work.extracts, 0),
        ]

    def changed(self) -> list[Row]:
        """Change one byte of one source: what depends on it runs, the rest is cached."""
        self._set_version("2")
        built = self._build()
        rows = []
        for vertex in sorted(built.vertices, key=lambda vertex: bool(vertex["state"] == "cached")):
            name = self._name(vertex)
            wanted = "completed" if name.startswith(_OF_HELLO) else "cached"
            rows.append(that(name, ok=vertex["state"] == wanted, value=vertex["state"], wanted=wanted))
        ran = {vertex["vertex"] for vertex in built.steps("completed")}
        return [
            *rows,
            exactly("steps that ran", len(ran), len(_OF_HELLO), f"  ({built.seconds:.1f} s)"),
            *_each_once(built.work, ran),
            exactly("blob GETs at the registry", built.traffic.blob_gets, 0),
        ]

    def together(self) -> list[Row]:
        """Let two drivers build one new variant at the same time: they share what runs."""
        self._set_version("3")
        (self._directory / "words").write_text(f"{_WORDS}\n")
        arguments = [*self._arguments(), "--tag", self._stage.reference(_IMAGE)]
        drivers = [self._stage.driver("build", str(self._directory), *arguments) for _ in range(2)]
        for driver in drivers:
            driver.wait_ready()
        with self._stage.working() as work:
            for driver in drivers:
                driver.go()
            results = [driver.result() for driver in drivers]
        ran = [{vertex for vertex, state in result["states"].items() if state == "completed"} for result in results]
        digests = {result["digest"] for result in results}
        self._digest = min(digests)
        seconds = max(result["seconds"] for result in results)
        pids = " ".join(str(driver.pid) for driver in drivers)
        return [
            exactly(
                "driver processes", len({driver.pid for driver in drivers}), 2, f"  (pids {pids}; {seconds:.1f} s)"
            ),
            *_each_once(work, ran[0] | ran[1]),
            at_least("of them, followed by both drivers", len(ran[0] & ran[1]), 1),
            # Files have times of the second in which they were made: what ran twice would show.
            exactly("digests of the image", len(digests), 1),
        ]

    def pushed(self) -> list[Row]:
        """Push what is built: only new layers move. Another runtime's tools take it from there."""
        name = self._stage.reference(_IMAGE)
        built = self._build("--tag", name, "--push")
        [image] = built.document["images"]
        pulled = fetch(self._stage.direct_reference(_IMAGE), self._stage.directory / "pulled", plain_http=True)
        base = {layer.digest for layer in self._bases.runtime.layers}
        added = {layer.digest: layer.size_bytes for layer in pulled.layers if layer.digest not in base}
        uploaded = set(built.traffic.uploads) - {pulled.config_digest}
        sent_bytes = sum(layer["bytes"] for layer in image["pushed"])
        said = self._run_unpacked(pulled.layout, pulled.tag, pulled.config["config"]["Cmd"])
        return [
            exactly("steps that were cached", len(built.steps("cached")), len(built.vertices)),
            that(
                "digest of the image",
                ok=image["digest"] == self._digest,
                value=f"{image['digest'][:19]}…",
                wanted="as both had",
            ),
            exactly("base layers mounted, by the registry's log", built.traffic.mounts, len(base)),
            exactly("layers uploaded, by the registry's log", len(uploaded), len(added)),
            exactly("of them, new ones", len(uploaded & set(added)), len(added)),
            exactly("layer bytes uploaded", sent_bytes, sum(added.values())),
            exactly("blob GETs at the registry", built.traffic.blob_gets, 0),
            that(
                "copied by skopeo, unpacked by umoci, it says",
                ok=bool(re.fullmatch(rf"hello 3, zlib [\d.]+: {_WORDS}", said)),
                value=said,
                wanted="hello 3, …",
            ),
        ]

    # -- what they do -------------------------------------------------------------------------------------

    def _build(self, *more: str) -> _Built:
        command = ["build", *self._arguments(), *more, str(self._directory)]
        self._stage.say(f"$ lazyfarm {shlex.join(command)} --json")
        with self._stage.counting(self._bases.compiler, self._bases.runtime) as traffic, self._stage.working() as work:
            began = time.monotonic()
            document = self._stage.cli(*command)
            seconds = time.monotonic() - began
        vertices = self._stage.cli("jobs", "show", document["job"])["vertices"]
        return _Built(document, vertices, traffic, work, seconds)

    def _arguments(self) -> list[str]:
        return ["--build-arg", f"REGISTRY={self._stage.host}"]

    def _set_version(self, version: str) -> None:
        source = self._directory / "hello.c"
        before = source.read_text()
        after = re.sub(r'(?<=#define VERSION ")\d', version, before)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        source.write_text(after)

    def _name(self, vertex: dict[str, Any]) -> str:
        """Return what a step is called, without what differs from run to run."""
        name = str(vertex["name"]).replace(f"{self._stage.directory}/", "").replace(f"{self._stage.host}/", "")
        return _DIGEST.sub("", name)

    def _run_unpacked(self, layout: Path, tag: str, command: list[str]) -> str:
        bundle = self._stage.directory / "bundle"
        run_tool("umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle))
        done = subprocess.run(
            ["chroot", str(bundle / "rootfs"), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        return (done.stdout or done.stderr).strip()


class _Built:
    """One build, by all who know of it."""

    def __init__(
        self, document: dict[str, Any], vertices: list[dict[str, Any]], traffic: Traffic, work: Work, seconds: float
    ) -> None:
        self.document = document
        self.vertices = vertices
        self.traffic = traffic
        self.work = work
        self.seconds = seconds

    def steps(self, state: str) -> list[dict[str, Any]]:
        """Return the steps that ended so."""
        return [vertex for vertex in self.vertices if vertex["state"] == state]


def can_build() -> bool:
    """Tell whether this user may run containers, and make images to begin with."""
    return os.geteuid() == 0


def _each_once(work: Work, ran: set[str]) -> list[Row]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(work.kinds.items()))
    return [
        exactly("ops by the op workers' logs", work.ops.total(), len(ran), f"  ({kinds})"),
        exactly("of these steps, and each once", sum(work.ops[vertex] == 1 for vertex in ran), len(ran)),
    ]


def _is_image(vertex: dict[str, Any]) -> bool:
    return str(vertex["name"]).startswith("image ")


def _bytes(count: int) -> str:
    return f"  ({count:,} bytes)"
