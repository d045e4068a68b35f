"""What the page decides by itself: who may look, where vertices are drawn, what has changed."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cluster.digest import digest_of
from cluster.errors import DigestMismatchError, UnavailableError
from cluster.job import JobEnded, JobState, LogStream, VertexEvent, VertexLayers, VertexLog, VertexState
from cluster.progress import LayerPhase, ProgressItem
from cluster.traffic import Traffic
from cluster.wire import encode_error
from lazyfarm.graph import image, merge
from lazyfarm.web.flights import FlightRates
from lazyfarm.web.graph import HEIGHT, WIDTH, lay_out
from lazyfarm.web.guard import HEADERS, Guard
from lazyfarm.web.job import JobStory
from lazyfarm.web.plot import HEIGHT as PLOT_HEIGHT
from lazyfarm.web.plot import JOINED_HEIGHT, draw
from lazyfarm.web.reading import Fresh
from storage.services.page import PageService, page_link, page_url
from storage.services.state_dir import StateDir
from storage.traffic import SLOT_S

TOKEN = "a-token"
HERE = "http://127.0.0.1:8000"


# -- who may look ---------------------------------------------------------------------------------------------


@pytest.fixture
def client():
    app = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse(f"seen {request.url.query}"))])
    return TestClient(Guard(app, token=TOKEN, cookie="lazyfarm-1"), base_url=HERE, follow_redirects=False)


def test_no_token_no_page(client):
    """Without it, or with another one, nothing is told but how to get it, wherever one asks."""
    for path, headers in [
        ("/", {}),
        ("/static/page.css", {}),
        ("/?token=other", {}),
        ("/?token=", {}),
        ("/", {"authorization": "Bearer other"}),
        ("/", {"authorization": f"Basic {TOKEN}"}),
        ("/", {"cookie": f"lazyfarm-2={TOKEN}"}),
        ("/", {"cookie": b"lazyfarm-1=\xe4"}),
    ]:
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert "lazyfarm page" in answer.text
        assert "set-cookie" not in answer.headers


def test_the_token_opens_by_header_and_by_address(client):
    """In the address it becomes a cookie that no script reads and no other site sends, and leaves the address."""
    assert client.get("/", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    entered = client.get(f"/refs?q=a+b&token={TOKEN}")
    assert (entered.status_code, entered.headers["location"]) == (303, "/refs?q=a+b")
    assert {part.strip().lower() for part in entered.headers["set-cookie"].split(";")[1:]} == {
        "httponly",
        "path=/",
        "samesite=strict",
    }
    assert client.get("/refs?q=1").text == "seen q=1"  # by the cookie


def test_a_cookie_of_tls_is_never_sent_in_clear(client):
    """It has a name that a browser takes by TLS alone; under the other address there is another one."""
    tls = {"x-forwarded-proto": "https"}
    said = client.get(f"/?token={TOKEN}", headers=tls).headers["set-cookie"]
    assert said.startswith(f"__Host-lazyfarm-1={TOKEN};")
    assert {part.strip().lower() for part in said.split(";")[1:]} == {
        "httponly",
        "path=/",
        "samesite=strict",
        "secure",
    }
    client.cookies.clear()
    for name, headers, status in (
        ("__Host-lazyfarm-1", tls, 200),
        ("lazyfarm-1", {}, 200),
        ("lazyfarm-1", tls, 401),
        ("__Host-lazyfarm-1", {}, 401),
    ):
        assert client.get("/", headers={**headers, "cookie": f"{name}={TOKEN}"}).status_code == status, name


def test_the_token_leads_to_no_other_site(client):
    """Two slashes would name a host."""
    for path in ("//evil.example", "/\\evil.example", "///evil.example"):
        assert client.get(f"{HERE}{path}?token={TOKEN}").headers["location"] in ("/evil.example", "/%5Cevil.example")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_another_site_may_take_is_refused(client, host):
    """Also with the token: after a change of what it points to its scripts would count as the page's own."""
    answer = client.get("/", headers={"host": host, "authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:80", "localhost:9", "LOCALHOST", "[::1]:9", "[::1]", "10.1.2.3"]
)
def test_addresses_are_answered(client, host):
    """No other site can have them."""
    assert client.get("/", headers={"host": host, "authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_the_page_only_shows(client, method):
    """Nothing is changed by it, so nothing but reading is answered."""
    answer = client.request(method, f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_every_answer_says_what_a_browser_may_do_with_it(client):
    """No foreign or inline script, no frame, no copy: also of refusals."""
    for answer in (client.get("/"), client.get("/", headers={"authorization": f"Bearer {TOKEN}"})):
        assert HEADERS.items() <= answer.headers.items()
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_page_that_was_never_started_has_no_address(tmp_path):
    """And asking makes no secret."""
    assert (page_url(tmp_path), page_link(tmp_path)) == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert repr(PageService(StateDir(tmp_path))) == "PageService(ServiceProcess('page', pid=None, alive=False))"


# -- what is drawn --------------------------------------------------------------------------------------------


def test_a_vertex_is_right_of_all_that_it_is_over():
    """By the longest path; no two are at one place, and the picture holds all of them."""
    a, b, c, d = (digest_of(name) for name in (b"a", b"b", b"c", b"d"))
    found = lay_out({a: [], b: [a], c: [a], d: [b, a, a]})
    assert found.places[a].x < found.places[b].x == found.places[c].x < found.places[d].x
    assert len(set(found.places.values())) == 4
    assert all(x + WIDTH <= found.width and y + HEIGHT <= found.height for x, y in found.places.values())
    assert found.edges.count("M") == 4  # an input that is there twice is drawn once


def test_columns_follow_what_they_are_over():
    """So that edges of things side by side don't cross."""
    roots = [digest_of(bytes([n])) for n in range(5)]
    tops = {digest_of(b"top" + bytes([n])): [roots[n]] for n in (3, 0, 4, 1, 2)}
    places = lay_out({**{root: [] for root in roots}, **tops}).places
    assert [places[root].y for root in roots] == [
        places[digest].y for digest in sorted(tops, key=lambda one: roots.index(tops[one][0]))
    ]


def test_a_thousand_vertices_are_drawn():
    """In one line, and side by side: no recursion, no two at one place."""
    digests = [digest_of(b"%d" % n) for n in range(1000)]
    chain = lay_out({digest: digests[max(n - 1, 0) : n] for n, digest in enumerate(digests)})
    wide = lay_out({digest: digests[:1] if n else [] for n, digest in enumerate(digests)})
    for found in (chain, wide):
        assert len(set(found.places.values())) == 1000
        assert found.edges.count("M") == 999
    assert (chain.height, wide.width) == (HEIGHT + 12, 2 * WIDTH + 58)


def test_nothing_is_drawn_of_nothing():
    """A definition that can't be read has no picture."""
    assert lay_out({}).places == {}
    assert draw([]).bars == ()


def test_bars_stand_on_each_other_and_end_at_the_top():
    """Moved below, avoided above; the highest reaches the top, and what is little is still seen."""
    slots = [
        (0, Traffic(fetched_bytes=100, not_fetched_bytes=200, not_pushed_bytes=100)),
        (SLOT_S, Traffic(pushed_bytes=1)),
        (2 * SLOT_S, Traffic(joined=1)),
        (3 * SLOT_S, Traffic(joined=500)),
    ]
    plot = draw(slots)
    assert plot.top == 400
    first, second, third, fourth = plot.bars
    assert [part.name for part in first.parts] == ["moved", "not-fetched", "not-pushed"]
    assert first.parts[-1].y == 0
    assert sum(part.height for part in first.parts) == PLOT_HEIGHT
    assert [part.height for part in second.parts] == [1.0]
    assert third.parts == ()
    assert (plot.top_joined, first.joined) == (500, None)
    assert (third.joined.height, fourth.joined.y, fourth.joined.height) == (1.0, 0.0, JOINED_HEIGHT)


def test_many_slots_share_bars():
    """A week has no more bars than can be told apart, and loses nothing."""
    plot = draw([(n * SLOT_S, Traffic(fetched_bytes=1)) for n in range(2016)])
    assert len(plot.bars) <= 96
    assert sum(bar.traffic.fetched_bytes for bar in plot.bars) == 2016
    assert plot.seconds_a_bar * len(plot.bars) == 2016 * SLOT_S


# -- flights --------------------------------------------------------------------------------------------------


def told(current, *, fence=1, total=1000):
    flight = {"fence": fence, "owner": "n0/x", "waiters": 2, "state": "running"}
    return {"blob:sha256:1": {**flight, "current_bytes": current, "total_bytes": total}}


def test_a_rate_is_told_of_two_looks():
    """The first one tells none; looks that follow at once don't spoil it."""
    rates = FlightRates()
    (flight,) = rates.look(told(100), 10.0)
    assert (flight.rate, flight.left_s, flight.subject, flight.waiters) == (0.0, None, "sha256:1", 2)
    (flight,) = rates.look(told(300), 12.0)
    assert (flight.rate, flight.left_s) == (100.0, 7.0)
    (flight,) = rates.look(told(310), 12.1)
    assert flight.rate == 100.0


def test_another_owner_begins_anew():
    """What its predecessor did says nothing of its rate; what has ended is forgotten."""
    rates = FlightRates()
    rates.look(told(900), 10.0)
    (flight,) = rates.look(told(0, fence=2), 11.0)
    assert flight.rate == 0.0
    assert rates.look({}, 12.0) == []
    (flight,) = rates.look(told(500, fence=2), 13.0)
    assert flight.rate == 0.0


# -- jobs -----------------------------------------------------------------------------------------------------


def graph():
    base = image("debian:12").named("FROM debian")
    return merge([base.run("one").named("one"), base.run("two").named("two")]).definition()


def layer(vertex, phase, current=0, detail=""):
    item = ProgressItem(item="fetch:sha256:1", phase=phase, current_bytes=current, total_bytes=10, detail=detail)
    return VertexLayers(vertex=vertex, item=item, wall_s=2.0)


def test_a_story_begins_with_what_is_to_be_done():
    """Every vertex is there before any event, waiting, each after its inputs."""
    definition = graph()
    story = JobStory(definition)
    shown = story.vertices(1.0)
    assert [vertex.digest for vertex in shown] == list(definition.order)
    assert {vertex.state for vertex in shown} == {"waiting"}
    assert [vertex.kind for vertex in shown] == ["image", "run", "run", "merge"]
    assert (shown[0].label, shown[3].label) == ("FROM debian", "merge")
    assert story.job(1.0).state is JobState.QUEUED


def test_only_what_events_told_of_has_changed():
    """Once; and not what the page was made with."""
    definition = graph()
    first, second = definition.order[:2]
    story = JobStory(definition)
    story.take([VertexEvent(vertex=first, name="FROM debian", state=VertexState.RUNNING, wall_s=1.0)])
    story.forget_changes()
    assert story.changed(2.0) == []
    story.take([layer(first, LayerPhase.FETCHING, 4), layer(first, LayerPhase.FETCHING, 7)])
    story.take([VertexEvent(vertex=second, name="one", state=VertexState.CACHED, wall_s=3.0)])
    changed = story.changed(4.0)
    assert [vertex.digest for vertex in changed] == [first, second]
    assert changed[0].layers[0].item.current_bytes == 7
    assert story.job(4.0).fetched_bytes == 7
    assert (story.changed(4.0), story.count) == ([], 4)


def test_an_image_runs_on_while_its_layers_move():
    """Its result was there long before: what counts for who looks on is what goes on."""
    first = graph().order[0]
    story = JobStory(graph())
    story.take(
        [VertexEvent(vertex=first, name="", state=VertexState.CACHED, wall_s=1.0), layer(first, LayerPhase.FETCHING)]
    )
    assert story.shown(first, 5.0).state == "running"
    story.take([layer(first, LayerPhase.DONE, 10)])
    assert story.shown(first, 5.0).state == "cached"


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.FAILED])
def test_nothing_goes_on_in_a_job_that_ended_before_all_did(state):
    """Who stops what tells of it no more: vertices and layers are cancelled with it, and no clock ticks on."""
    definition = graph()
    first, second, third, last = definition.order
    story = JobStory(definition)
    story.take([VertexEvent(vertex=first, name="", state=VertexState.RUNNING, wall_s=1.0)])
    story.take([layer(first, LayerPhase.FETCHING, 4)])
    story.take([VertexEvent(vertex=second, name="", state=VertexState.CACHED, wall_s=2.0)])
    story.forget_changes()
    story.take([JobEnded(state=state, wall_s=3.0)])
    changed = {vertex.digest: vertex for vertex in story.changed(9.0)}
    assert {digest: vertex.state for digest, vertex in changed.items()} == dict.fromkeys(
        (first, third, last), "cancelled"
    )
    assert (changed[first].is_busy, changed[first].busy_s) == (False, 2.0)
    (moved,) = changed[first].layers
    assert (moved.item.phase, moved.item.current_bytes) == (LayerPhase.CANCELLED, 4)


def test_a_failure_is_told_with_its_hint_and_last_words():
    """The vertex's and the job's."""
    definition = graph()
    vertex = definition.order[1]
    error = encode_error(DigestMismatchError("sha256:1", "sha256:2", "r.example/a"))
    story = JobStory(definition, watched=vertex)
    said = story.take(
        [
            VertexEvent(vertex=vertex, name="one", state=VertexState.RUNNING, wall_s=1.0),
            VertexLog(vertex=vertex, stream=LogStream.STDERR, text="make: *** [all]\nErr", wall_s=2.0),
            VertexLog(vertex=definition.order[2], stream=LogStream.STDERR, text="another\n", wall_s=2.0),
            VertexEvent(vertex=vertex, name="one", state=VertexState.FAILED, error=error, wall_s=3.0),
            JobEnded(state=JobState.FAILED, error=error, wall_s=3.0),
        ]
    )
    assert [line.text for line in said] == ["make: *** [all]", "Err"]
    shown, job = story.shown(vertex, 9.0), story.job(9.0)
    assert (shown.state, [line.partition(" ")[2] for line in shown.lines]) == ("failed", ["make: *** [all]", "Err"])
    assert "another mirror" in shown.error.hint
    assert (job.state, str(job.error), job.elapsed_s) == (JobState.FAILED, str(shown.error), 2.0)
    assert story.is_over


def test_events_alone_tell_a_story_too():
    """Of a definition that this release can't read: no graph, no kinds, but all that happened."""
    vertex = digest_of(b"v")
    story = JobStory(None)
    story.take([VertexEvent(vertex=vertex, name="RUN make", state=VertexState.COMPLETED, wall_s=1.0)])
    (shown,) = story.vertices(2.0)
    assert (shown.label, shown.kind, shown.place, shown.state) == ("RUN make", "", None, "completed")


# -- what is costly to read -----------------------------------------------------------------------------------


async def test_it_is_read_once_for_all_and_again_when_it_is_old():
    """Costly things less often."""
    now_s, reads = [0.0], []

    async def read():
        await asyncio.sleep(0)
        now_s[0] += 1.0  # it takes a second
        reads.append(now_s[0])
        return len(reads)

    fresh = Fresh(read, lambda: now_s[0])
    assert await asyncio.gather(fresh.get(), fresh.get()) == [1, 1]
    now_s[0] += 9.0
    assert await fresh.get() == 1
    now_s[0] += 1.0
    assert await fresh.get() == 2


async def test_what_could_not_be_read_is_asked_for_again():
    """An error is nobody's but theirs who waited for it."""
    answers = [UnavailableError("redis", "away"), "there"]

    async def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    fresh = Fresh(read)
    with pytest.raises(UnavailableError):
        await fresh.get()
    assert await fresh.get() == "there"


async def test_who_leaves_early_spoils_nothing():
    """A tab that is closed cancels its own request alone."""
    gate = asyncio.Event()

    async def read():
        await gate.wait()
        return "read"

    fresh = Fresh(read)
    leaving, staying = asyncio.ensure_future(fresh.get()), asyncio.ensure_future(fresh.get())
    await asyncio.sleep(0)
    leaving.cancel()
    gate.set()
    assert await staying == "read"
