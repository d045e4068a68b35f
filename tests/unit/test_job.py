"""Jobs and their events as values: what ends, and how they get across."""

from __future__ import annotations

import pytest

from cluster import wire
from cluster.cache_options import BucketCache, CacheKind, CacheSource, CacheTarget
from cluster.digest import digest_of
from cluster.errors import MalformedPayloadError, UnknownVersionError
from cluster.graph import Definition, ImageOp, LocalOp, Vertex
from cluster.job import (
    JobEnded,
    JobId,
    JobRecord,
    JobSpec,
    JobState,
    LogStream,
    VertexEvent,
    VertexLayers,
    VertexLog,
    VertexLogDropped,
    VertexState,
    decode_event,
    encode_event,
    layer_stream,
    parse_layer_stream,
    registries_of,
)
from cluster.job_result import InlineEntry, TargetResult, decode_result, encode_result
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem

V = digest_of(b"vertex")

EVENTS = [
    VertexEvent(vertex=V, name="compile ü", state=VertexState.FAILED, error=b"\x00payload"),
    VertexLog(vertex=V, stream=LogStream.STDERR, text="line\nline\n"),
    VertexLogDropped(vertex=V),
    VertexLayers(vertex=V, item=ProgressItem(item="fetch:d", phase=LayerPhase.FETCHING, current_bytes=3)),
    JobEnded(state=JobState.CANCELLED),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_get_across(event):
    """What is decoded is what was encoded, in its own class."""
    assert decode_event(*encode_event(event)) == event


def test_events_of_other_kinds_are_refused():
    """A payload is no event of another kind, nor of one that is unknown."""
    _, data = encode_event(EVENTS[0])

    for kind in ("vertex-log", "unheard-of"):
        with pytest.raises(MalformedPayloadError, match=kind):
            decode_event(kind, data)


def test_a_job_record_gets_across():
    """A job's record is wire data, with all that it holds."""
    spec = JobSpec(id=JobId("j"), definition=V, targets=(V,), session=SessionInfo(session_id="s"), labels={"who": "ci"})
    record = JobRecord(spec=spec, state=JobState.DONE, created_wall_s=1.5, ended_wall_s=2.0, results={V: b"\x00"})

    assert wire.decode("job-record", JobRecord, wire.encode("job-record", record)) == record


@pytest.mark.parametrize("job", ["j", "job:1", "a:sha256:b", V])
def test_a_stream_of_layers_says_whose_they_are(job):
    """Job and vertex are found again in the stream's ID, whatever the job is called."""
    assert parse_layer_stream(layer_stream(JobId(job), V)) == (job, V)


@pytest.mark.parametrize(
    "stream", ["", "s", "job:", f"job:{V}", f"job::{V}", "job:j:sha256:ab", f"other:j:{V}", f"j:{V}"]
)
def test_other_streams_are_no_jobs(stream):
    """A stream that is not told to a job is not mistaken for one."""
    assert parse_layer_stream(stream) is None


def test_what_ends():
    """A job ends in three states and a vertex in four; in the others both go on."""
    assert [state.value for state in JobState if not state.is_end] == ["queued", "running"]
    assert [state.value for state in VertexState if not state.is_end] == ["waiting", "running"]


# -- who is asked for a job -------------------------------------------------------------------------------------------

IMAGE = Vertex(ImageOp(reference="images.example/app:1"))
BUCKET = BucketCache(bucket="caches", prefix="app", name="main")


def test_a_job_may_ask_the_registries_of_its_images_and_caches():
    """Each once; buckets are no registries, and an inline cache is where its image is."""
    found = registries_of(
        Definition({IMAGE.digest: IMAGE}, (IMAGE.digest,)),
        [
            CacheSource(kind=CacheKind.REGISTRY, ref="from.example/cache:1"),
            CacheSource(kind=CacheKind.REGISTRY, ref="images.example/cache:1"),
            CacheSource(kind=CacheKind.S3, bucket=BUCKET),
        ],
        [
            CacheTarget(kind=CacheKind.REGISTRY, ref="to.example:5000/cache:1"),
            CacheTarget(kind=CacheKind.INLINE),
            CacheTarget(kind=CacheKind.S3, bucket=BUCKET),
        ],
    )
    assert found == {"images.example", "from.example", "to.example:5000"}


def test_a_job_without_images_and_caches_asks_nobody():
    """Then no credentials are looked for."""
    local = Vertex(LocalOp(tree=V))
    assert registries_of(Definition({local.digest: local}, (local.digest,)), [], []) == frozenset()


# -- what a job came to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        TargetResult(ref=None),
        TargetResult(ref=V, config=b"{}"),
        TargetResult(ref=V, inline=(InlineEntry(keys=(V,), layers=2, config=b"{}"), InlineEntry(keys=(), layers=1))),
    ],
)
def test_results_get_across(result):
    """A driver reads what a scheduler recorded: also nothing, and no config."""
    assert decode_result(encode_result(result)) == result


def test_a_result_that_cant_be_read_is_told():
    """Cut, of another kind, or of a release to come: a typed error, never another result."""
    data = encode_result(TargetResult(ref=V, config=b"{}"))
    for broken in (data[:-1], b"", wire.encode("other", {"ref": V})):
        with pytest.raises(MalformedPayloadError):
            decode_result(broken)
    with pytest.raises(UnknownVersionError):
        decode_result(data.replace(data[:2], bytes([data[0], wire.VERSION + 1]), 1))
