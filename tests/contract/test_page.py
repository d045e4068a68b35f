"""The page over a real Redis: everything but a browser and a farm behind it."""

from __future__ import annotations

import asyncio
import html
import re
import socket
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from cluster.audit import AuditEntry, Operation
from cluster.circuit import BURST_S
from cluster.config import AuditConfig, Config, WebConfig
from cluster.digest import digest_of
from cluster.errors import StartError
from cluster.job import VertexEvent, VertexState
from cluster.lease import LeaseId, blob_resource, image_resource, ref_resource
from cluster.messages import ActorRecord, NodeRecord
from cluster.ports import Slot
from cluster.quota import Budget, Quota, RequestKind
from cluster.ref import RefRecord
from cluster.traffic import Traffic
from lazyfarm.graph import image
from lazyfarm.settings import load_running
from lazyfarm.web.app import ROWS, build_app
from lazyfarm.web.reading import FarmReader
from storage.audit import RedisAudit
from storage.presence import Presence
from storage.services.local import LocalServices
from storage.services.loopback import choose_ports, is_listening
from storage.services.page import PageService, page_link, page_url
from storage.services.state_dir import StateDir
from storage.traffic import RedisTraffic
from storage.whereabouts import RedisWhereabouts
from tests.doubles.collect import L, chain, layer
from tests.doubles.observed import eventually
from tests.doubles.page import EVIL, IMAGE, TOKEN, paged_farm
from tests.doubles.stores import BREAKER

pytestmark = pytest.mark.redis

#: Of a page that looks again.
PART = {"hx-request": "true"}


@pytest.fixture
async def farm(redis_servers, tmp_path):
    """A farm with an image of two layers, the lower one present; a driver holds it."""
    async with paged_farm(redis_servers, tmp_path) as farm:
        yield farm


@pytest.fixture
async def failed(farm):
    """A job whose image's layer came wrong; its command had said something before."""
    return await farm.fail_a_build()


# -- pages ----------------------------------------------------------------------------------------------------


async def test_the_farm_page_tells_what_runs_and_what_is_wrong(farm):
    """As `lazyfarm status` does, and what is stored."""
    presence = Presence(farm.link, farm.keys)
    await presence.announce_nodes(
        [NodeRecord(id=f"n{n}", ray_id=str(n), address=f"127.0.0.{n + 2}", alive=n != 1) for n in range(3)]
    )
    await presence.drain("n2")
    await presence.announce(
        ActorRecord(name="fetch-worker-n0", kind="fetch-worker", node="n0", pid=4711, state="ready")
    )
    said = farm.words("/")
    for fact in (
        "node n1 is dead",
        "no supervisor runs",
        "fetch-worker-n0 ready fetch-worker n0 4711",
        "n0 alive 127.0.0.2 1 0 0",
        "n2 draining 127.0.0.4 0 0 0",
        "2 refs, 1 lazy",
        "1 image ",
        "100 B lazy: not pulled",
        "the farm's directory",
        "S3 http://127.0.0.1:9",
    ):
        assert fact in said, said


async def test_refs_are_filtered_and_lead_to_all_that_is_known_of_one(farm):
    """State, blob, providers, who holds it, where it is unpacked."""
    lower, upper = chain("base", "top")
    await Presence(farm.link, farm.keys).announce_nodes([NodeRecord(id="n7", ray_id="7", address="a", alive=True)])
    await RedisWhereabouts(farm.link, farm.keys).note_here("n7", [lower.chain])

    assert f'href="/refs/{lower.id}"' in farm.get("/refs?state=present")
    assert upper.id not in farm.get("/refs?state=present")
    assert lower.id not in farm.get("/refs?state=lazy")
    assert "1\u20131 of 1 ref" in farm.words(f"/refs?q={upper.blob.digest[7:20]}")
    assert "1\u20131 of 1 ref" in farm.words("/refs?q=EXAMPLE/app%20registry.example")
    assert "no ref" in farm.words("/refs?state=unheld")

    said = farm.words(f"/refs/{lower.id}")
    for fact in (lower.blob.digest, "present", f"blobs/{lower.blob.digest}/", "Unpacked on n7", "owner=driver"):
        assert fact in said, said
    said = farm.words(f"/refs/{upper.id}")
    for fact in ("lazy", "registry.example /example/app", IMAGE, "no: nobody has needed its bytes", L):
        assert fact in said, said
    assert "There is no ref sha256:0" in farm.words("/refs/sha256:0", status=404)


async def test_a_long_list_comes_in_parts(farm):
    """One part costs what it shows; a number that makes no sense is the nearest that does."""
    stores = farm.stores()
    records = [RefRecord.over(layer(f"one-{n}"), None, "example/many:1") for n in range(2 * ROWS)]
    await stores.refs.get_or_create(records, {}, lease_id=L)
    total = 2 * ROWS + 2
    seen: set[str] = set()
    for page in (1, 2, 3):
        found = set(re.findall(r'href="/refs/(sha256:[0-9a-f]{64})"', farm.get(f"/refs?page={page}&q=")))
        assert len(found) == (ROWS if page < 3 else 2)
        seen |= found
    assert len(seen) == total
    assert f"1\u2013{ROWS} of {total} refs next" in farm.words("/refs")
    assert 'href="/refs?q=one&amp;page=2"' not in farm.get("/refs?q=one-7")
    assert 'href="/refs?q=example%2Fmany&amp;page=2"' in farm.get("/refs?q=example/many")
    for page in ("0", "-1", "999", "x", "²", "9" * 5000):
        assert "of 102 refs" in farm.words(f"/refs?page={page}")


async def test_images_flights_registries_and_what_was_avoided(farm):
    """Each list with its figures."""
    stores = farm.stores()
    flying = digest_of(b"flying")
    owned = await stores.flights.join(f"blob:{flying}", worker="n1/x", token="t", ttl_s=600.0)
    await stores.flights.join(f"blob:{flying}", worker="n2/y", token="u", ttl_s=600.0)
    await stores.flights.report(owned.fence, 1 << 20, 4 << 20)
    await stores.limiter.throttled(Slot("registry.example"), 0.0)
    traffic = RedisTraffic(farm.link, farm.keys)
    part = Traffic(fetched_bytes=2 << 20, joined=3)
    traffic.note(Traffic(fetched_bytes=5 << 20, not_pushed_bytes=3 << 20, joined=4, registries={EVIL: part}))
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.traffic), "the figures to be noted")

    assert f"{IMAGE} 100 B 100 B 100 B held" in farm.words("/images")
    assert f"layer {flying[:19]} n1 1 1.0 MiB of 4.0 MiB" in farm.words("/flights")
    assert "Nothing is under way" in farm.words("/flights?q=n9")
    assert "registry.example avoided reduced 0 of 2 (12) 0" in farm.words("/registries")
    said = farm.words("/avoided?window=6h")
    assert "3.0 MiB not pushed 4 requests that joined another's 5.0 MiB moved" in said
    assert f"{EVIL} 2.0 MiB 0 B 0 B 0 B 3 From" in said
    page = farm.get("/avoided")
    assert 'class="not-pushed"' in page
    assert '<rect class="joined"' in page
    assert EVIL not in page


async def test_figures_of_an_earlier_release_are_shown(farm):
    """It counted no requests that joined, and told of no registry: 0, and none."""
    await farm.link.run("traffic_note", farm.keys.prefix, 300, 600, "fetched_bytes", 5 << 20)
    said = farm.words("/avoided")
    assert "0 requests that joined another's 5.0 MiB moved" in said
    assert "Nothing was moved or avoided at a registry" in said
    assert '<rect class="joined"' not in farm.get("/avoided")


async def test_a_registry_tells_of_its_breaker_and_its_quota(farm):
    """Since when it is given up, why, and when it is tried again; what is left, little or enough, for how long."""
    stores = farm.stores()
    for _ in range(BREAKER.failures):
        await stores.limiter.failed(Slot("gone.example"), f"gone.example: {EVIL}")
        farm.pass_time(2 * BURST_S)
    low = Slot("low.example", budget=Budget(kind=RequestKind.MANIFEST, account="me:you"))
    await stores.limiter.throttled(low, 0.0)
    await stores.limiter.quoted(low, [Quota(remaining=7, limit=100, reset_s=7200.0)])

    said = farm.words("/registries?q=gone")
    assert re.search(r"failed 0 of \d+ .* open for [\d.]+ s, tried again in \d+ s gone\.example: ", said), said
    assert EVIL in said
    assert EVIL not in farm.get("/registries")
    said = farm.words("/registries?q=low")
    assert re.search(r"reduced .* closed manifest: 7 left for (2 h|120 min)", said), said

    farm.pass_time(BREAKER.open_s)
    assert "tried again by the next request" in farm.words("/registries?q=gone")
    await stores.limiter.quoted(low, [Quota(remaining=90, limit=100, reset_s=7200.0)])
    await eventually(lambda: farm.link.execute("EXISTS", f"{farm.keys.prefix}:enough:low.example"), "it to be told")
    assert "manifest: 90 of 100 left for 120 min" in farm.words("/registries?q=low")


async def test_blobs_lead_to_all_that_became_of_one(farm):
    """What it is, where it is, who could give it, what stands on it, who brings it, and who had what done with it."""
    lower, upper = (layer(name).digest for name in ("base", "top"))
    audit = RedisAudit(farm.link, farm.keys, AuditConfig(), by="n0/fetch-worker")
    audit.note(
        AuditEntry(operation=Operation.UNLAZY, outcome="joined", job="4f2a00", credential="5e55", digest=lower),
        AuditEntry(operation=Operation.FETCH, outcome="failed", digest=upper, error="DigestMismatchError"),
        AuditEntry(operation=Operation.PRUNE, digest=digest_of(b"gone before")),
    )
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.audit), "the entries to be noted")
    await farm.stores().flights.join(f"blob:{upper}", worker="n7/x", token="t", ttl_s=600.0)

    assert "1\u20134 of 4 blobs" in farm.words("/blobs")
    assert f'href="/blobs/{lower}"' in farm.get("/blobs?state=present&q=example/app")
    assert lower not in farm.get("/blobs?state=lazy")
    assert "1\u20131 of 1 blob " in farm.words("/blobs?state=manifest")
    said = farm.words(f"/blobs/{lower}")
    for fact in ("present", f"blobs/{lower}/", IMAGE, "a layer, held", "unlazy joined", "4f2a00 5e55 n0/fetch-worker"):
        assert fact in said, said
    said = farm.words(f"/blobs/{upper}")
    for fact in ("fetching", "not yet", "running owned by n7", "registry.example /example/app", "DigestMismatchError"):
        assert fact in said, said
    assert "State gone" in farm.words(f"/blobs/{digest_of(b'gone before')}")
    assert "There is no blob" in farm.words(f"/blobs/{digest_of(b'never was')}", status=404)


async def test_leases_tell_who_keeps_what_and_until_when(farm):
    """Those that end first first; what one holds leads to it, in parts where it is much."""
    stores = farm.stores()
    many = [blob_resource(digest_of(b"%d" % n)) for n in range(ROWS)]
    await stores.leases.create(name := LeaseId("pin/of a&b?"), ttl_s=None, labels={"why": EVIL})
    await stores.leases.attach(name, [*many, ref_resource(chain("base")[0].id), image_resource(IMAGE)])

    page = farm.get("/leases")
    assert page.index(">driver-1<") < page.index(">pin/of a&amp;b?<")
    assert "driver-1" not in farm.get("/leases?state=pinned")
    assert ">driver-1<" in farm.get(f"/leases?q={chain('base')[0].id}")
    link = html.unescape(re.search(r'href="(/leases/pin[^"]+)"', page)[1])
    said = farm.words(link)
    assert f"1\u2013{ROWS} of {ROWS + 2} resources next" in said
    assert f"why={EVIL}" in said
    assert f'href="/refs/{chain("base")[0].id}"' in farm.get(f"{link}?page=2")
    assert f"image {IMAGE}" in farm.words(f"{link}?q=image:")
    assert "There is no lease nosuch" in farm.words("/leases/nosuch", status=404)


async def test_the_audit_trail_is_told_newest_first_for_as_long_as_it_may_be(farm):
    """Filtered by what was done and by any word; what came since is put before; what is too old is told no more."""
    audit = RedisAudit(farm.link, farm.keys, AuditConfig())

    async def note(*images):
        before = await farm.link.execute("XLEN", farm.keys.audit)
        audit.note(*(AuditEntry(operation=Operation.PULL, image=image, who="driver") for image in images))
        await eventually(lambda: _is_longer(before), "the entries to be noted")

    async def _is_longer(before):
        return await farm.link.execute("XLEN", farm.keys.audit) > before

    await note("one:1", EVIL)
    said = farm.words("/audit?state=pull&q=driver")
    assert "1\u20132 of 2 entries" in said
    assert said.index(EVIL) < said.index("one:1")
    assert "no entry" in farm.words("/audit?state=push")
    await note("two:2")
    await eventually(lambda: asyncio.to_thread(lambda: "of 3 entries" in farm.words("/audit")), "it to be read again")
    said = farm.words("/audit")
    assert said.index("two:2") < said.index("one:1")


async def test_nodes_and_actors_are_filtered_and_come_in_parts(farm):
    """Each list by itself, and a node leads to all that is there."""
    presence = Presence(farm.link, farm.keys)
    await presence.announce_nodes(
        [NodeRecord(id=f"n{n:03}", ray_id=str(n), address=f"10.0.0.{n}", alive=True) for n in range(ROWS + 1)]
    )
    for n in range(ROWS + 2):
        await presence.announce(
            ActorRecord(name=f"op-worker-n{n:03}", kind="op-worker", node=f"n{n:03}", pid=n, state="ready")
        )
    await farm.stores().flights.join(f"blob:{digest_of(b'x')}", worker="n007/x", token="t", ttl_s=600.0)

    said = farm.words("/")
    assert f"1\u2013{ROWS} of {ROWS + 1} nodes next" in said
    assert f"1\u2013{ROWS} of {ROWS + 2} actors next" in said
    page = farm.get("/?nodes=2")
    assert 'id="node-n050"' in page
    assert "op-worker-n000" in page  # the other list stays where it was
    said = farm.words("/?q=n007")
    assert "n007 alive 10.0.0.7 1 0 1" in said
    assert "1\u20131 of 1 actor " in said
    assert 'href="/flights?q=n007/"' in farm.get("/?q=n007")


LISTS = ("/", "/jobs", "/images", "/refs", "/blobs", "/leases", "/flights", "/registries", "/avoided", "/audit")


@pytest.mark.parametrize("path", LISTS)
async def test_every_list_filters_and_links(farm, failed, path):
    """All rows, then none; and each row leads on."""
    presence = Presence(farm.link, farm.keys)
    await presence.announce_nodes([NodeRecord(id="n1", ray_id="1", address="127.0.0.2", alive=True)])
    await farm.stores().flights.join(f"blob:{layer('top').digest}", worker="n1/x", token="t", ttl_s=600.0)
    await farm.stores().limiter.throttled(Slot("registry.example"), 0.0)
    part = Traffic(fetched_bytes=2 << 20)
    RedisTraffic(farm.link, farm.keys).note(replace(part, registries={"registry.example": part}))
    RedisAudit(farm.link, farm.keys, AuditConfig()).note(AuditEntry(operation=Operation.PULL, image=IMAGE))
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.traffic), "the figures to be noted")
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.audit), "the entry to be noted")

    page = farm.get(path)
    (rows, *_) = re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert 'id="filter"' in page
    assert re.findall(r"<tr>(?!.*?<a [^>]*href=)", rows) == []
    for address in set(re.findall(r'href="(/[^"]*)"', rows)):
        farm.get(html.unescape(address))
    (rows, *_) = re.findall(r"<tbody>(.*?)</tbody>", farm.get(f"{path}?q=nothing-has-this"), re.DOTALL)
    assert "href=" not in rows


@pytest.mark.parametrize("path", [*LISTS, "/blobs/x", "/leases/x", "/refs/x", "/jobs/x/events"])
def test_nothing_is_told_without_the_token(farm, path):
    """Not even whether there is such a thing."""
    farm.client.headers.pop("authorization")
    answer = farm.client.get(path)
    assert (answer.status_code, answer.text.count("\n")) == (401, 1)
    assert "No token, no page" in answer.text


async def test_what_was_avoided_at_one_registry_is_plotted_by_itself(farm):
    """The filter finds registries, and keeps the window."""
    at = {name: Traffic(not_fetched_bytes=size << 20) for name, size in (("a.example", 3), ("b.example", 5))}
    RedisTraffic(farm.link, farm.keys).note(Traffic(not_fetched_bytes=9 << 20, registries=at))
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.traffic), "the figures to be noted")

    assert "9.0 MiB not pulled, 0 B not pushed" in farm.words("/avoided?window=6h")
    page = farm.get("/avoided?window=6h&q=b.ex")
    assert "5.0 MiB not pulled, 0 B not pushed" in page
    assert "a.example" not in page
    assert '<input type="hidden" name="window" value="6h">' in page
    assert 'href="/avoided?window=7d&amp;q=b.ex"' in page


def test_what_has_not_changed_is_not_sent_again(farm):
    """Who looks on asks again and again: nothing, until there is something new."""
    page = farm.get("/images")
    look = html.unescape(re.search(r'hx-get="(/images\?have=[^"]+)"', page)[1])
    assert farm.get(look, status=204, **PART) == ""
    part = farm.get("/images?q=nothing&have=0", **PART)
    assert part.startswith('<div id="live"')
    assert "no image" in part


def test_nothing_is_run_or_taken_from_elsewhere(farm):
    """Every script, style and picture is a file of ours; none is in a page."""
    for path in ("/", "/refs", "/jobs", "/avoided"):
        page = farm.get(path)
        assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", page) == []
        for address in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert address.startswith(("/", "#")), address
            if address.startswith("/static/"):
                assert farm.get(address)
    farm.get("/static/%2e%2e/app.py", status=404)


async def test_a_farm_without_redis_says_so(farm):
    """To who comes, with what to do; a page that is open shows it and goes on looking."""
    reader = FarmReader(
        replace(
            load_running(farm.state_dir, {}),
            running=replace(load_running(farm.state_dir, {}).running, redis_url="redis://127.0.0.1:1/0"),
            wanted=Config(redis=replace(Config().redis, timeout_s=0.1)),
        )
    )
    headers = {"authorization": f"Bearer {TOKEN}"}
    with TestClient(build_app(reader, token=TOKEN, cookie="c"), base_url="http://127.0.0.1", headers=headers) as client:
        answer = client.get("/flights")
        assert (answer.status_code, "127.0.0.1:1" in answer.text) == (503, True)
        part = client.get("/flights?q=x", headers=PART)
        assert (part.status_code, 'hx-get="/flights?q=x"' in part.text) == (200, True)


# -- jobs -----------------------------------------------------------------------------------------------------


def told(stream):
    """Return the changes that a stream of server-sent events brought, and what it ended with."""
    *changes, end = stream.strip().split("\n\n")
    assert all(block.startswith("event: change\ndata: ") for block in changes)
    return "\n".join(line.removeprefix("data: ") for block in changes for line in block.split("\n")[1:]), end


def test_jobs_are_listed_filtered_and_found_by_their_beginning(farm, failed):
    """As on the command line."""
    assert "4f2a00 failed" in farm.words("/jobs?state=failed&q=make")
    assert "No job" in farm.words("/jobs?state=running")
    assert "4f2a00" in farm.words("/jobs/4f")
    assert "nosuch" in farm.words("/jobs/nosuch", status=404)
    assert farm.words(f"/jobs/4f/{digest_of(b'none')}", status=404)


def test_a_late_visitor_sees_the_whole_story(farm, failed):
    """States, layers, error, hint and graph, without a script; and there is nothing to wait for."""
    base, run = failed.order
    page = farm.get("/jobs/4f2a00")
    said = farm.words("/jobs/4f2a00")
    for fact in ("0 of 2 vertices done", "2.0 MiB of 4.0 MiB", "served other bytes", "try another mirror"):
        assert fact in said, said
    assert f'id="n-{base[7:23]}" class="node failed"' in page
    assert f'id="n-{run[7:23]}" class="node cancelled"' in page
    assert "sse-connect" not in page
    filtered = farm.get("/jobs/4f2a00?state=failed")
    assert re.findall(r'<li id="v-\w+" class="vertex (\w+)" hidden>', filtered) == ["cancelled"]
    log = farm.words(f"/jobs/4f2a00/{run}")
    assert re.search(rf"one [\d.]+ {re.escape(EVIL)} [\d.]+ red", log), log


@pytest.mark.parametrize(
    "path", ["/jobs", "/jobs/4f2a00", "/jobs/4f2a00/{run}", "/jobs/4f2a00/events", "/refs?q={evil}"]
)
def test_what_others_chose_is_text(farm, failed, path):
    """Names, logs, errors and what was asked for are shown, never obeyed."""
    page = farm.get(path.format(run=failed.order[1], evil=EVIL))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_events_bring_what_is_new_since_the_page_was_made(farm, failed):
    """Each vertex and its place in the graph once, in the place of what has its ID; then the end."""
    base, run = failed.order
    changes, last = told(farm.get("/jobs/4f2a00/events?since=0"))
    assert last == "event: end\ndata:"
    for vertex in (base, run):
        assert changes.count(f'id="v-{vertex[7:23]}"') == changes.count(f'id="n-{vertex[7:23]}"') == 1
    assert changes.count("hx-swap-oob") == 5
    changes, _ = told(farm.get("/jobs/4f2a00/events?since=6"))
    assert f'id="v-{run[7:23]}"' in changes
    assert f'id="v-{base[7:23]}"' not in changes
    changes, _ = told(farm.get("/jobs/4f2a00/events?since=0&state=failed"))
    assert re.findall(r'<li id="v-(\w+)"[^>]* hidden>', changes) == [run[7:23]]  # what is filtered out comes hidden


def test_a_vertex_is_told_its_log(farm, failed):
    """Whole at first: who comes back after a drop misses nothing and sees nothing twice."""
    base, run = failed.order
    changes, _ = told(farm.get(f"/jobs/4f2a00/events?since=5&vertex={run}"))
    assert 'id="log"' in changes
    assert changes.count("red") == 1
    assert f'id="v-{base[7:23]}"' not in changes


async def test_a_page_of_a_job_that_runs_listens(farm):
    """From where it was made."""
    definition = await farm.submit("77", image(IMAGE).run("make"))
    await farm.tell("77", VertexEvent(vertex=definition.order[0], name="FROM", state=VertexState.RUNNING))
    assert 'sse-connect="/jobs/77/events?since=1"' in farm.get("/jobs/77")
    assert "since=1&amp;vertex=sha256%3A" in farm.get(f"/jobs/77/{definition.order[0]}")


# -- its process ----------------------------------------------------------------------------------------------


def fetch(address):
    try:
        with urllib.request.urlopen(address) as answer:  # noqa: S310 - of our own
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_the_process_starts_once_keeps_its_address_and_ends(farm):
    """Repaired after a kill, at the same address and with the same token; started anew where it is wanted otherwise."""
    services = LocalServices(farm.state_dir, Config())
    try:
        assert services.up_page(Config()) == (["page"], [])
        assert services.up_page(Config()) == ([], [])
        url, link = page_url(farm.state_dir), page_link(farm.state_dir)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(link) as answer:
            assert (answer.status, answer.url) == (200, f"{url}/")
        assert fetch(url) == 401
        log = (farm.state_dir / "logs" / "page.log").read_text()
        assert link.rpartition("=")[2] not in log

        page = PageService(StateDir(farm.state_dir))
        before = page.process.pid
        assert page.is_alive()
        other = replace(Config(), cache=replace(Config().cache, shards=5))
        assert services.up_page(other) == (["page"], [])
        assert services.up_page(other, release="2.0") == (["page"], [])
        assert page.process.pid != before
        assert (page_url(farm.state_dir), page_link(farm.state_dir)) == (url, link)
        assert services.up_page(Config(web=WebConfig(enabled=False))) == ([], ["page"])
        assert (page_url(farm.state_dir), page.is_alive()) == ("", False)
    finally:
        PageService(StateDir(farm.state_dir)).stop()


def test_a_port_that_is_taken_is_said(farm):
    """A port that was asked for is not exchanged for another."""
    port = choose_ports(["http"], {})["http"]
    with socket.create_server(("127.0.0.1", port)):
        assert is_listening(port)
        page = PageService(StateDir(farm.state_dir))
        try:
            with pytest.raises(StartError):
                page.start(WebConfig(port=port), "d")
        finally:
            page.stop()
