"""``lazyfarm report``: what its page tells of a job, and that it needs nothing beside itself."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.digest import Digest
from cluster.job import JobEnded, JobId, JobRecord, JobSpec, JobState, VertexEvent, VertexLayers, VertexState
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
from lazyfarm.cli.job_report import bytes_by_source, critical_path, page, timeline
from lazyfarm.cli.job_view import JobView
from lazyfarm.graph import image

BASE = image("debian:12")
LEFT, RIGHT = BASE.run("left").named("left"), BASE.run("right").named("right")
TOP = LEFT.copy(RIGHT, "/a", "/b").named("<b>top</b>")
DEFINITION = TOP.definition()
IDS = {DEFINITION.name(digest): digest for digest in DEFINITION.order}
(IMAGE,) = set(DEFINITION.order) - {IDS["left"], IDS["right"], IDS["<b>top</b>"]}
LAYERS = [Digest("sha256:" + letter * 64) for letter in "abc"]


def vertex(digest, state, wall_s, node=""):
    return VertexEvent(vertex=digest, name=DEFINITION.name(digest), state=state, wall_s=wall_s, node=node)


def layer(item, phase, wall_s, size_bytes=0, detail=""):
    moved = ProgressItem(item=item, phase=phase, current_bytes=size_bytes, total_bytes=size_bytes, detail=detail)
    return VertexLayers(vertex=IMAGE, item=moved, wall_s=wall_s)


EVENTS = [
    vertex(IMAGE, VertexState.RUNNING, 100.0),
    vertex(IMAGE, VertexState.COMPLETED, 100.5),
    layer(f"fetch:{LAYERS[0]}", LayerPhase.FETCHING, 101.0),
    layer(f"fetch:{LAYERS[1]}", LayerPhase.FETCHING, 101.0),
    layer(f"fetch:{LAYERS[2]}", LayerPhase.PRESENT, 101.0, 3000),
    layer(f"fetch:{LAYERS[0]}", LayerPhase.DONE, 103.0, 1_000_000, "registry.example/debian"),
    layer(f"fetch:{LAYERS[1]}", LayerPhase.JOINED, 104.0, 2000),
    layer(f"extract:n1:{LAYERS[0]}", LayerPhase.EXTRACTING, 104.0, 1_000_000),
    layer(f"extract:n1:{LAYERS[0]}", LayerPhase.DONE, 104.5, 1_000_000),
    vertex(IDS["left"], VertexState.RUNNING, 105.0, "n1"),
    vertex(IDS["right"], VertexState.RUNNING, 105.0, "n2"),
    vertex(IDS["left"], VertexState.COMPLETED, 106.0),
    vertex(IDS["right"], VertexState.COMPLETED, 109.0),
    vertex(IDS["<b>top</b>"], VertexState.RUNNING, 109.0, "n2"),
    vertex(IDS["<b>top</b>"], VertexState.COMPLETED, 110.0),
    JobEnded(state=JobState.DONE, wall_s=110.0),
]


def seen(events):
    view = JobView()
    for event in events:
        view.handle(event)
    return view


@pytest.fixture
def record():
    spec = JobSpec(
        id=JobId("4f2a"), definition=LAYERS[0], targets=DEFINITION.targets, session=SessionInfo(session_id="s")
    )
    return JobRecord(spec=spec, state=JobState.DONE, created_wall_s=99.0, ended_wall_s=110.0)


def test_the_critical_path_is_what_the_end_waited_for():
    """The slow one of two inputs, not the quick one; down to the image whose layers had to come."""
    path = critical_path(seen(EVENTS), DEFINITION)
    assert [each.digest for each in path] == [IMAGE, IDS["right"], IDS["<b>top</b>"]]


def test_what_was_done_for_another_step_is_not_waited_for():
    """An image whose layers are brought to a second node later did not hold up who had begun by then."""
    late = [
        layer(f"extract:n9:{LAYERS[0]}", LayerPhase.EXTRACTING, 108.0, 1_000_000),
        layer(f"extract:n9:{LAYERS[0]}", LayerPhase.DONE, 109.5, 1_000_000),
    ]
    view = seen([*EVENTS[:-1], *late, EVENTS[-1]])
    two = {**DEFINITION.vertices}
    # As if the top stood on the image, too: it had begun when the image's last layer came.
    two[IDS["<b>top</b>"]] = replace(two[IDS["<b>top</b>"]], inputs=(IMAGE, *two[IDS["<b>top</b>"]].inputs))
    path = critical_path(view, SimpleNamespace(targets=DEFINITION.targets, vertices=two))
    assert [each.digest for each in path] == [IMAGE, IDS["right"], IDS["<b>top</b>"]]


def test_nothing_that_has_not_ended_is_on_the_critical_path():
    """A job that goes on has a path as far as it has got."""
    assert critical_path(seen(EVENTS[:1]), DEFINITION) == []
    assert critical_path(JobView(), DEFINITION) == []


def test_each_node_has_a_lane_whose_rows_dont_overlap():
    """The farm's own is first; what is extracted or runs on a node is on its lane, at its time."""
    view = seen(EVENTS)
    lanes = {lane.name: lane.rows for lane in timeline(view, critical_path(view, DEFINITION))}
    assert list(lanes) == ["farm", "n1", "n2"]
    told = [(bar.work, bar.began_s, bar.ended_s, bar.is_critical) for row in lanes["n2"] for bar in row]
    assert told == [("run", 5.0, 9.0, True), ("run", 9.0, 10.0, True)]
    assert [(bar.work, bar.began_s, bar.ended_s) for row in lanes["n1"] for bar in row] == [
        ("extract", 4.0, 4.5),
        ("run", 5.0, 6.0),
    ]
    # Two fetches at once; what was there all along is not shown.
    assert sorted(bar.work for row in lanes["farm"] for bar in row) == ["fetch", "fetch", "run"]
    for rows in lanes.values():
        for row in rows:
            assert all(one.ended_s <= other.began_s for one, other in itertools.pairwise(row))


def test_bytes_are_told_by_where_they_came_from():
    """Those that did not move, too."""
    assert bytes_by_source(seen(EVENTS)) == {
        "registry.example/debian": 1_000_000,
        "already in the farm": 3000,
        "fetched for somebody else at the time": 2000,
    }


def test_the_page_needs_nothing_but_itself(record):
    """It tells of every step, escaped, and loads and links nothing."""
    text = page(record, ["<b>top</b>"], seen(EVENTS), DEFINITION)
    assert "&lt;b&gt;top&lt;/b&gt;" in text
    assert "<b>top</b>" not in text
    words = ("right", "left", "registry.example/debian", "Critical path", "n1", "n2", "10 s", "1970-01-01 00:01:39 UTC")
    for word in (*words, "976.6 KiB", "4.9 KiB"):  # fetched, avoided
        assert word in text
    assert not re.search(r"<script|src=|href=|https?://|url\(|@import", text)


def test_digests_in_names_are_cut(record):
    """An image by its digest would fill the line; the whole name is in the job's other views."""
    named = VertexEvent(
        vertex=IMAGE, name=f"image debian:12@{LAYERS[0]} for linux/amd64", state=VertexState.COMPLETED, wall_s=111.0
    )
    text = page(record, [], seen([*EVENTS[:-1], named]), DEFINITION)
    assert f"image debian:12@{LAYERS[0][:19]} for linux/amd64" in re.sub(r"<title>.*?</title>", "", text)


def test_a_page_of_a_job_that_nothing_is_known_of_says_so(record):
    """Its graph is gone, and nothing happened yet."""
    text = page(record, [], JobView(), None)
    assert "Nothing ran, and nothing moved." in text
    assert "Not known" in text
