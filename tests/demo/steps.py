"""The steps of the demo: each does something with the farm and returns what came of it, as rows."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.demo.farm_process import DriverFailedError
from tests.demo.stage import Stage
from tests.demo.table import Row, at_least, at_most, exactly, that
from tests.demo.variants import padded
from tests.doubles.oci_layout import LayoutImage

#: Every concurrent extract of the third step.
CALLERS = 8
#: Seconds that a throttled step takes to move its image: long enough for all callers to meet.
_MEETING_S = 8.0
#: Parts that the owner has moved when it is killed.
_PARTS_BEFORE_KILL = 3
_PART_BYTES = 5 << 20
_RANGES_PER_LAYER = 3
#: The farm's settings: parts of S3's least size, so that a layer has many.
CONFIG = f"""\
[fetch]
part_bytes = {_PART_BYTES}
whole_up_to_bytes = {_PART_BYTES}
parallel_from_bytes = {2 * _PART_BYTES}
ranges_per_layer = {_RANGES_PER_LAYER}
"""
_PROGRAMS = (("/srv/app/hello",), ("/bin/sh", "-c", "echo hello from $0 in a layer"), ("/bin/busybox", "echo", "hello"))


def lazy_pull(stage: Stage, image: LayoutImage, reference: str) -> list[Row]:
    """Pull: manifest and configuration are read, no layer is."""
    with stage.counting(image) as traffic:
        began = time.monotonic()
        pulled = stage.cli("pull", reference)
        seconds = time.monotonic() - began
    return [
        exactly("layers in the image", len(pulled["layers"]), len(image.layers)),
        exactly("of them lazy", sum(layer["lazy"] for layer in pulled["layers"]), len(image.layers)),
        exactly("layer GETs at the registry", traffic.layer_gets, 0, f"  ({seconds:.1f} s)"),
    ]


def pull_as_named(stage: Stage, reference: str) -> list[Row]:
    """Pull the user's image from where it is, with the user's own logins."""
    pulled = stage.cli("pull", reference)
    lazy = sum(layer["lazy"] for layer in pulled["layers"])
    return [exactly("layers that are lazy", lazy, len(pulled["layers"]), f"  ({pulled['image']})")]


def retag_and_push(stage: Stage, image: LayoutImage, reference: str, elsewhere: str) -> list[Row]:
    """Push to another tag, then to another repository: the registry has the bytes, so none move."""
    ref = stage.cli("pull", reference)["ref"]
    with stage.counting(image) as traffic:
        retagged = stage.cli("push", ref, f"{reference}-retagged")
        pushed = stage.cli("push", ref, elsewhere)
    distinct = len({layer.digest for layer in image.layers})
    how = Counter({layer["digest"]: layer["how"] for layer in pushed["layers"]}.values())
    return [
        that(
            "retag: every layer is there",
            ok=all(layer["how"] == "exists" for layer in retagged["layers"]),
            value=", ".join(sorted({layer["how"] for layer in retagged["layers"]})),
            wanted="exists",
        ),
        exactly("push to another repository: layers mounted", how["mounted"], distinct),
        exactly("mounts in the registry's log", traffic.mounts, distinct),
        exactly("layer GETs at the registry", traffic.layer_gets, 0),
        exactly("layer bytes uploaded", sum(layer["bytes"] for layer in pushed["layers"]), 0),
    ]


def eight_extracts(stage: Stage, image: LayoutImage, reference: str) -> list[Row]:
    """Eight processes extract at once on three nodes, from an empty content store, over a thin link."""
    nodes = stage.nodes()
    drivers = [stage.driver("extract", reference, node=nodes[i % len(nodes)]) for i in range(CALLERS)]
    for driver in drivers:
        driver.wait_ready()
    pids = " ".join(str(driver.pid) for driver in drivers)
    stage.say(f"{CALLERS} drivers ready, pids {pids}")
    with stage.counting(image) as traffic, stage.thin(image.size_bytes / _MEETING_S):
        began = time.monotonic()
        for driver in drivers:
            driver.go()
        results = [driver.result() for driver in drivers]
        seconds = time.monotonic() - began

    biggest = max(image.layers, key=lambda layer: layer.size_bytes)
    joined = Counter(fetch["digest"] for result in results for fetch in result["layers"] if fetch["joined"])
    fetchers = Counter(fetch["digest"] for result in results for fetch in result["layers"] if fetch["bytes_fetched"])
    used = {result["node"] for result in results}
    return [
        exactly("driver processes", len({driver.pid for driver in drivers}), CALLERS, f"  (pids {pids})"),
        exactly("processes that ended well", len(results), CALLERS, f"  ({seconds:.1f} s)"),
        exactly("nodes extracted on", len(used), len(nodes)),
        _once("bytes at the registry / unique bytes", traffic.layer_bytes, image.size_bytes),
        exactly("most fetchers of one layer", max(fetchers.values(), default=0), 1),
        at_least("callers that joined the biggest layer's flight", joined[biggest.digest], CALLERS - 1),
    ]


def program_from_root(stage: Stage, reference: str) -> list[Row]:
    """Run a program of the image from its extracted root."""
    ref = stage.cli("pull", reference)["ref"]
    extracted = stage.cli("extract", ref, "--node", stage.nodes()[0])
    root = Path(extracted["nodes"][0]["path"])
    command = next((command for command in _PROGRAMS if os.path.lexists(root / command[0][1:])), None)
    if command is None:
        return [that("a program from the extracted root", ok=True, value="the image has no shell", wanted="-")]
    # Without root: root of a namespace of its own, which may change its root directory too.
    as_root = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    done = subprocess.run(
        [*as_root, "chroot", str(root), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    said = (done.stdout or done.stderr).strip().splitlines()
    return [that(f"{command[0]} says", ok=done.returncode == 0, value=said[-1] if said else "", wanted="exit 0")]


def one_of_each_request(stage: Stage, image: LayoutImage) -> list[Row]:
    """Pull and unlazy by one driver from a registry with a token server: one request of each kind."""
    variant = padded(image, stage.directory / "variant-private", records=1)
    stage.push_private(variant, "demo/private:1")
    with stage.counting(variant) as traffic:
        driver = stage.driver("unlazy", stage.private_reference("demo/private:1"), with_credentials=True)
        driver.wait_ready()
        driver.go()
        driver.result()
    return [
        exactly("manifest requests", traffic.manifest_gets, 1),
        exactly("configuration requests", traffic.config_gets, 1),
        exactly("token requests", traffic.token_requests, 1),
        _once("bytes at the registry / unique bytes", traffic.layer_bytes, variant.size_bytes),
    ]


def owner_killed(stage: Stage, image: LayoutImage) -> list[Row]:
    """Kill -9 the process that fetches the biggest layer: another worker takes over and resumes."""
    biggest = max(image.layers, key=lambda layer: layer.size_bytes)
    if biggest.size_bytes < 2 * _PARTS_BEFORE_KILL * _PART_BYTES:
        return [that("biggest layer", ok=True, value=f"{biggest.size_bytes / 1e6:.1f} MB: no time to kill", wanted="-")]
    variant = padded(image, stage.directory / "variant-killed", records=2)
    stage.push(variant, "demo/killed:1")
    target = max(variant.layers, key=lambda layer: layer.size_bytes)
    nodes = stage.nodes()
    drivers = [stage.driver("extract", stage.reference("demo/killed:1"), node=node) for node in nodes]
    for driver in drivers:
        driver.wait_ready()
    with stage.counting(variant) as traffic:
        with stage.thin(variant.size_bytes / (3 * _MEETING_S)):
            for driver in drivers:
                driver.go()
            before = stage.wait_owner(target.digest, min_parts=_PARTS_BEFORE_KILL)
            os.kill(before.pid, signal.SIGKILL)
            stage.say(f"killed the owner on {before.node} (pid {before.pid}) after {before.parts} parts")
            after = stage.wait_owner(target.digest, other_than=before.name)
            stage.say(f"{after.node} (pid {after.pid}) has taken over")
        ended, failed = 0, []
        for driver, node in zip(drivers, nodes, strict=True):
            try:
                driver.result()
            except DriverFailedError as error:
                failed.append((node, str(error)))
            else:
                ended += 1
    spare_bytes = _RANGES_PER_LAYER * _PART_BYTES
    bystanders_failed = [error for node, error in failed if node != before.node]
    return [
        at_least("parts done when the owner is killed -9", before.parts, _PARTS_BEFORE_KILL, f"  (pid {before.pid})"),
        # Its node may have a new worker before the lease has lapsed, which takes it like any other's.
        that(
            "taken over by another worker",
            ok=after.pid != before.pid,
            value=f"{after.node}  (pid {after.pid})",
            wanted=f"not {before.pid}",
        ),
        exactly(
            "callers on other nodes that failed",
            len(bystanders_failed),
            0,
            "".join(f"  {e}" for e in bystanders_failed),
        ),
        at_least("callers that ended well", ended, len(nodes) - 1),
        at_most(
            "bytes of that layer at the registry", traffic.bytes_of(target.digest), target.size_bytes + spare_bytes
        ),
    ]


def _once(what: str, served_bytes: int, unique_bytes: int) -> Row:
    # Exact, down to the byte: the ratio is what is shown of it.
    return exactly(what, served_bytes / unique_bytes, 1.0, f"  ({served_bytes:,} bytes)")
