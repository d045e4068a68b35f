"""The two faces of the Python API: one set of names, and what a notebook shows of what they return."""

from __future__ import annotations

import inspect

import pytest

import lazyfarm.farm
import lazyfarm.job
import lazyfarm.lease
import lazyfarm.ref
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.job import JobId
from cluster.ref import BlobRecord, RefRecord, RefState
from lazyfarm import blocking
from lazyfarm.job import Result
from lazyfarm.ref import Ref

#: What only one face has, and why.
ONLY_ASYNCHRONOUS = {
    # For what is built upon a farm within this package: a script has no use for these.
    lazyfarm.farm.Farm: {
        *("chain", "end_stream", "extract_chain", "follow", "hold", "lease_id"),
        *("audit_reader", "builds", "get_by_blob_under", "lease_store", "pull_told", "push_told"),
        *("states", "unlazy_chain"),
    },
    lazyfarm.lease.FarmLease: {"held"},
    lazyfarm.ref.Ref: {"handlers", "raise_if_released"},
    lazyfarm.job.Result: {"inline"},
    # Awaited, or iterated over: which only asynchronous code can.
    lazyfarm.job.Job: {"events", "submitted"},
}
#: `await job` is `job.result()`; the other's is an attribute that a class does not show.
ONLY_BLOCKING = {lazyfarm.job.Job: {"result"}, lazyfarm.lease.FarmLease: {"id"}}


def public(face):
    names = {name for name, _ in inspect.getmembers(face) if not name.startswith("_")}
    return names | {name for name in getattr(face, "__dataclass_fields__", {}) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("asynchronous", "twin"),
    [
        (lazyfarm.farm.Farm, blocking.Farm),
        (lazyfarm.ref.Ref, blocking.Ref),
        (lazyfarm.job.Result, blocking.Result),
        (lazyfarm.job.Job, blocking.Job),
        (lazyfarm.lease.FarmLease, blocking.FarmLease),
    ],
)
def test_both_faces_have_the_same_names(asynchronous, twin):
    """But for what only one of them can be."""
    assert public(asynchronous) - public(twin) == ONLY_ASYNCHRONOUS.get(asynchronous, set())
    assert public(twin) - public(asynchronous) == ONLY_BLOCKING.get(asynchronous, set())


def layer(name, *, present):
    blob = Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip", digest=digest_of(name), size_bytes=2048,
        diff_id=digest_of(name + b"-diff"),
    )  # fmt: skip
    found = BlobRecord(digest=blob.digest, key="blobs/x", size_bytes=2048, etag="e", fence=1)
    record = RefRecord.over(blob, None, "<i>image</i>")
    return RefState(record=record, present=found if present else None, providers=())


def test_a_notebook_shows_the_layers_of_a_ref_and_of_a_result():
    """As a table, escaped; of the blocking twin, too."""
    ref = Ref(None, [layer(b"a", present=True), layer(b"b", present=False)], None)
    html = ref._repr_html_()
    assert html.count("<tr>") == 3
    assert "2 layers, 1 lazy" in html
    assert "2.0 KiB" in html
    assert ">present<" in html
    result = Result(JobId("j"), (ref, ref))
    assert result._repr_html_() == html * 2
    assert blocking.Ref(ref, None)._repr_html_() == html
    assert blocking.Result(result, None)._repr_html_() == html * 2
    assert blocking.Job(object(), None)._repr_html_() is None


def test_what_a_registry_names_is_no_markup():
    """A notebook runs scripts."""
    shown = lazyfarm.ref.layers_table("<script>alert(1)</script>", [])
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
