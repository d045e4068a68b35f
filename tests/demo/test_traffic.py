"""The demo's counts are what its promises rest on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bench.ratio import Ratio
from tests.demo.table import at_least, at_most, exactly
from tests.demo.traffic import Traffic
from tests.demo.work import Work
from tests.doubles.oci_layout import ImageLayer, LayoutImage
from tests.doubles.registry import Request

LAYER = ImageLayer(digest="sha256:" + "a" * 64, size_bytes=100, diff_id="sha256:" + "b" * 64, media_type="layer")
CONFIG = "sha256:" + "c" * 64
IMAGE = LayoutImage(layout=Path(), tag="x", config_digest=CONFIG, layers=(LAYER,), config={})


def counted(*requests):
    traffic = Traffic()
    traffic.take(requests, IMAGE)
    return traffic


def test_every_byte_of_a_layer_is_counted_ranges_and_repetitions_too():
    """Two ranges and a second reader are three GETs and all of their bytes."""
    path = f"/v2/a/blobs/{LAYER.digest}"

    traffic = counted(Request("GET", path, 206, 60), Request("GET", path, 206, 40), Request("GET", path, 200, 100))

    assert (traffic.layer_gets, traffic.layer_bytes, traffic.bytes_of(LAYER.digest)) == (3, 200, 200)


def test_what_moves_no_layer_bytes_is_no_layer_get():
    """HEADs, refusals, other images' blobs and the configuration are told apart from layers."""
    traffic = counted(
        Request("HEAD", f"/v2/a/blobs/{LAYER.digest}", 200, 0),
        Request("GET", f"/v2/a/blobs/{LAYER.digest}", 401, 150),
        Request("GET", f"/v2/a/blobs/sha256:{'d' * 64}", 200, 7),
        Request("GET", f"/v2/a/blobs/{CONFIG}", 200, 50),
        Request("GET", "/v2/a/manifests/1", 200, 50),
        Request("GET", "/v2/a/manifests/1", 401, 50),
    )

    assert (traffic.layer_gets, traffic.config_gets, traffic.manifest_gets) == (0, 1, 1)
    assert traffic.blob_gets == 2


def test_a_mount_counts_where_the_registry_granted_it():
    """201 is a mount; 202 is an upload that was begun instead."""
    path = f"/v2/b/blobs/uploads/?mount={LAYER.digest}&from=a"

    assert counted(Request("POST", path, 201, 0), Request("POST", path, 202, 0)).mounts == 1


def test_an_upload_counts_once_its_blob_is_there():
    """What was begun, sent in pieces or refused is no upload; the digest that ended one is."""
    path = "/v2/a/blobs/uploads/1"

    traffic = counted(
        Request("POST", "/v2/a/blobs/uploads/", 202, 0),
        Request("PATCH", path, 202, 0),
        Request("PUT", f"{path}?digest=sha256%3A{'d' * 64}", 201, 0),
        Request("PUT", f"{path}?digest=sha256%3A{'e' * 64}", 400, 0),
    )

    assert traffic.uploads == [f"sha256:{'d' * 64}"]


def test_what_ran_counts_from_where_the_step_began(tmp_path):
    """Ops of earlier steps don't count; one that failed has run, too, and so has one on a node that came late."""

    def log(node, *lines):
        with (tmp_path / f"{node}.jsonl").open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)

    ran = {"event": "op.complete", "vertex": "v1", "op": "run"}
    log("n0", ran)
    work = Work(tmp_path)
    log("n0", ran, {"event": "extract.complete"}, {"event": "actor.ready"})
    log(
        "n1",
        {"event": "op.failed", "vertex": "v1", "op": "run"},
        {"event": "op.complete", "vertex": "v2", "op": "file"},
    )
    work.read()

    assert (work.ops, work.kinds, work.extracts) == ({"v1": 2, "v2": 1}, {"run": 2, "file": 1}, 1)


def test_what_a_lazy_push_costs_is_all_but_heads_and_granted_mounts():
    """A refused mount is an upload that was begun, and counts with what comes of it."""
    path = f"/v2/b/blobs/uploads/?mount={LAYER.digest}&from=a"

    traffic = counted(
        Request("HEAD", f"/v2/b/blobs/{LAYER.digest}", 404, 0),
        Request("POST", path, 201, 0),
        Request("POST", path, 202, 0),
        Request("PUT", "/v2/b/manifests/1", 201, 0),
    )

    assert (traffic.heads, traffic.mounts, traffic.others) == (1, 1, 2)
    assert traffic.kinds == {"POST upload": 1, "PUT manifest": 1}


def test_a_promise_of_one_is_kept_to_the_byte():
    """A ratio that is shown as 1.00 but isn't 1 is wrong, in the demo and in the benchmarks."""
    assert exactly("once", 1.0, 1.0).ok
    assert not exactly("once", 1_000_001 / 1_000_000, 1.0).ok
    assert not Ratio(name="once", value=1_000_001 / 1_000_000, target=1.0, side="exactly").met


def test_bounds_include_their_ends():
    """At least and at most hold at the bound itself."""
    assert at_least("n", 7, 7).ok
    assert not at_least("n", 6, 7).ok
    assert at_most("n", 7, 7).ok
    assert not at_most("n", 8, 7).ok
