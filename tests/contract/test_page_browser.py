"""The page in a real browser, over a real Redis: by keyboard, by ear, on any screen, and as big as it gets."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import aiohttp
import pytest

from cluster.audit import AuditEntry, Operation
from cluster.config import AuditConfig
from cluster.job import JobState, VertexEvent, VertexState
from cluster.messages import ActorRecord, NodeRecord
from cluster.ports import Slot
from cluster.quota import Quota
from cluster.ref import RefRecord
from cluster.traffic import Traffic
from lazyfarm.graph import image, merge
from lazyfarm.web.app import ROWS
from storage.audit import RedisAudit
from storage.presence import Presence
from storage.services.page import PageService, page_url
from storage.services.state_dir import StateDir
from storage.traffic import RedisTraffic
from tests.doubles.browser import has_browser
from tests.doubles.collect import L, chain, layer
from tests.doubles.observed import eventually
from tests.doubles.page import EVIL, IMAGE, looking, paged_farm

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    pytest.mark.skipif(not has_browser(), reason="there is no chromium"),
]

#: Of the page of which each has something to show.
PAGES = (
    "/", "/jobs", "/images", "/refs", "/blobs", "/leases", "/flights", "/registries", "/avoided", "/audit",
    "/jobs/4f2a00", "/jobs/4f2a00/{run}", "/refs/{ref}", "/blobs/{blob}", "/leases/driver-1",
)  # fmt: skip


@pytest.fixture
async def farm(redis_servers, tmp_path):
    """A farm with an image of two layers, the lower one present; a driver holds it."""
    async with paged_farm(redis_servers, tmp_path) as farm:
        yield farm


@pytest.fixture
async def pages(farm):
    """Addresses, each with something to show: what is there, what moves, what failed, and names that never end."""
    failed = await farm.fail_a_build()
    stores, long = farm.stores(), "registry.example/" + "very-" * 20 + "long/app"
    presence = Presence(farm.link, farm.keys)
    await presence.announce_nodes(
        [NodeRecord(id=f"n{n}", ray_id=str(n), address="127.0.0.2", alive=n != 1) for n in range(3)]
    )
    await presence.announce(ActorRecord(name="op-worker-n0", kind="op-worker", node="n0", pid=4711, state="ready"))
    flight = await stores.flights.join(f"blob:{layer('top').digest}", worker="n0/x", token="t", ttl_s=600.0)
    await stores.flights.report(flight.fence, 1 << 20, 4 << 20)
    await stores.limiter.throttled(Slot("registry.example"), 0.0)
    await stores.limiter.quoted(Slot("registry.example"), [Quota(remaining=3, limit=100, reset_s=600.0)])
    part = Traffic(fetched_bytes=2 << 20, not_fetched_bytes=9 << 20, not_pushed_bytes=3 << 20, joined=3)
    RedisTraffic(farm.link, farm.keys).note(part + Traffic(registries={"registry.example": part}))
    RedisAudit(farm.link, farm.keys, AuditConfig(), by="n0/fetch-worker").note(
        AuditEntry(operation=Operation.PULL, image=long, who="driver", ref=chain("base")[0].id),
        AuditEntry(operation=Operation.FETCH, outcome="failed", digest=layer("top").digest, source=long, error=EVIL),
    )
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.audit), "the entries to be noted")
    named = {"run": failed.order[1], "ref": chain("base")[0].id, "blob": layer("top").digest}
    return [path.format(**named) for path in PAGES]


#: All that can have the focus, in the document's order; it may be put anew at any time.
STOPS = """
window.stops = () => [...document.querySelectorAll("a[href], input:not([type=hidden]), select, button, [tabindex='0']")]
    .filter(one => one.getClientRects().length);
stops().length
"""
#: What has the focus: which of them it is, -1 for none of them, and what it looks like.
AT = "stops().indexOf(document.activeElement), document.activeElement.outerHTML"
#: Whether what has the focus can be told by eye: by an outline, or a frame that got thicker, that stands out.
SEEN = """
(() => {
    const at = document.activeElement, drawn = at.matches(".node") ? at.querySelector("rect") : at;
    const style = getComputedStyle(at), line = parseFloat(style.outlineWidth);
    const isOutlined = style.outlineStyle !== "none" && line >= 2 && contrast(style.outlineColor, backOf(at)) >= 3;
    const rect = at.getBoundingClientRect();
    const isThere = rect.bottom > 0 && rect.top < innerHeight && rect.right > 0 && rect.left < innerWidth;
    return isThere && (isOutlined || (drawn !== at && parseFloat(getComputedStyle(drawn).strokeWidth) >= 3));
})()
"""
#: Contrast as WCAG 2 has it, and the colour behind an element.
COLOURS = """
window.parsed = colour => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return {r, g, b, a};
};
window.luminance = ({r, g, b}) => {
    const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
window.contrast = (one, other) => {
    const [low, high] = [luminance(parsed(one)), luminance(parsed(other))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
};
window.backOf = element => {
    const box = element.closest(".node")?.querySelector("rect");
    if (box) return getComputedStyle(box).fill;
    for (let at = element; at; at = at.parentElement) {
        const colour = getComputedStyle(at).backgroundColor;
        if (parsed(colour).a === 1) return colour;
    }
};
"""
#: Whether what is written in a picture is big enough to be read, however narrow the picture is.
LEGIBLE = "[...document.querySelectorAll('svg text')].every(one => one.getBoundingClientRect().height >= 9)"
#: Every text that is seen and stands out too little, with how much; and how many were looked at.
FAINT = """
(() => {
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
    let looked = 0;
    while (walk.nextNode()) {
        const element = walk.currentNode.parentElement;
        if (!walk.currentNode.textContent.trim() || !element.getClientRects().length) continue;
        const style = getComputedStyle(element), colour = element.closest("svg") ? style.fill : style.color;
        const ratio = contrast(colour, backOf(element));
        looked += 1;
        if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${element.outerHTML}`);
    }
    for (const input of document.querySelectorAll("input[placeholder]")) {
        const ratio = contrast(getComputedStyle(input, "::placeholder").color, backOf(input));
        if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} placeholder`);
    }
    for (const input of document.querySelectorAll("input:not([type=hidden]), select")) {
        const ratio = contrast(getComputedStyle(input).borderTopColor, backOf(input.parentElement));
        if (ratio < 3) faint.push(`${ratio.toFixed(2)} border of ${input.name}`);
    }
    return JSON.stringify([looked, faint]);
})()
"""


async def press(tab, key, **more):
    codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
    text = {"Enter": {"text": "\r"}}.get(key, {})
    await tab.press(key, code=key, windowsVirtualKeyCode=codes[key], **text, **more)


async def test_all_is_reached_by_tab_in_its_order_and_seen(farm, pages):
    """From the skip link to the end and out again, on every page and in either scheme: no trap, nothing left out."""
    async with looking(farm) as tab:
        for number, path in enumerate(pages):
            await tab.look_like(scheme=("light", "dark")[number % 2], width=1280, height=800)
            await tab.open(page_url(farm.state_dir) + path)
            await tab.ask(COLOURS)
            wanted = await tab.ask(STOPS)
            assert wanted >= 11, path
            reached = []
            while True:
                await press(tab, "Tab")
                at, tag, is_seen = json.loads(await tab.ask(f"JSON.stringify([{AT}, {SEEN}])"))
                if tag.startswith("<body") or (reached and at == reached[0]):
                    break  # out of the page, or from its end to its beginning
                assert is_seen, f"{path}: {tag}"
                if at >= 0:  # else a box that can be moved aside by keys, which the browser lets stop there
                    reached.append(at)
                assert len(reached) <= wanted, path
            assert reached == list(range(wanted)), path


async def test_all_has_a_name_and_a_place(farm, pages):
    """By ear: one main heading and no gap below it, named links, lists and bars, and a head for every column."""
    async with looking(farm) as tab:
        for path in pages:
            await tab.open(page_url(farm.state_dir) + path)
            nodes = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
            told = [
                (node["role"]["value"], node.get("name", {}).get("value", "").strip())
                for node in nodes
                if not node.get("ignored")
            ]
            named = {"link", "button", "searchbox", "combobox", "progressbar", "image", "img", "navigation", "heading"}
            assert [one for one in told if one[0] in named and not one[1]] == [], path
            assert {"main", "banner", "navigation"} <= {role for role, _ in told}, path
            levels = await tab.ask("[...document.querySelectorAll('h1, h2, h3')].map(one => one.tagName[1]).join('')")
            assert levels.startswith("1"), path
            assert set(levels[1:]) <= {"2"}, path
            assert await tab.ask("document.title.length > 5 && document.documentElement.lang === 'en'"), path
            assert await tab.ask("[...document.querySelectorAll('th')].filter(one => !one.scope).length") == 0, path
            assert await tab.ask("[...document.querySelectorAll('table')].every(one => one.tHead.rows.length)"), path


async def test_all_stands_out_and_fits(farm, pages):
    """Text at 4.5 to 1 or more in either scheme; no page wider than a narrow screen."""
    async with looking(farm) as tab:
        for path in pages:
            await tab.open(page_url(farm.state_dir) + path)
            await tab.ask(COLOURS)
            for scheme, width in (("light", 1280), ("dark", 380), ("light", 320)):
                await tab.look_like(scheme=scheme, width=width, height=800)
                looked, faint = json.loads(await tab.ask(FAINT))
                assert looked > 10, path
                assert faint == [], f"{path} in {scheme}"
                assert await tab.ask(LEGIBLE), f"{path} at {width}"
                assert await tab.ask("document.documentElement.scrollWidth <= innerWidth"), f"{path} at {width}"


async def test_it_is_used_with_keys_alone(farm):
    """Past the head, through a list's parts, by filter and state, and past the graph to what it draws."""
    many = [RefRecord.over(layer(f"one-{n}"), None, "example/many:1") for n in range(ROWS + 10)]
    await farm.stores().refs.get_or_create(many, {}, lease_id=L)
    await farm.submit("77", image(IMAGE).run("make"))
    async with looking(farm) as tab:
        await tab.open(page_url(farm.state_dir) + "/refs")
        for key in ("Tab", "Enter"):  # over the skip link
            await press(tab, key)
        assert await tab.ask("document.activeElement.id") == "live"
        await press(tab, "Tab")
        assert await tab.ask("document.activeElement.rel") == "next"
        await press(tab, "Enter")
        await tab.until("location.search === '?page=2' && document.readyState === 'complete'")

        await tab.press("/", text="/")
        assert await tab.ask("document.activeElement.name") == "q"
        await tab.call("Input.insertText", text="example")
        await tab.until("location.search.startsWith('?q=example')")
        for key in ("Tab", "ArrowDown"):
            await press(tab, key)
        await tab.until("location.search.includes('state=lazy')")
        assert await tab.ask("document.activeElement.name") == "state"
        said = await tab.text("#said")  # aloud, and not before
        assert said == await tab.text("#live .paging span")
        assert said.endswith("61 refs")

        await tab.open(page_url(farm.state_dir) + "/jobs/77")
        await tab.ask("document.querySelector('#filter select').focus()")
        for key in ("Tab", "Tab", "Enter", "Tab"):  # the audit trail, and over the graph
            await press(tab, key)
        assert await tab.ask("document.activeElement.matches('.vertex a')")
        await press(tab, "Enter")
        await tab.until("location.pathname.startsWith('/jobs/77/sha256:')")


async def test_who_looks_on_stays_where_he_is(farm):
    """Focus and scrolling outlast every change of the page; only what matters is said aloud, once."""
    audit = RedisAudit(farm.link, farm.keys, AuditConfig(), by="a-worker-of-some-name")
    audit.note(*(AuditEntry(operation=Operation.PULL, image=f"example/app:{n}", who="driver") for n in range(40)))
    await eventually(lambda: farm.link.execute("EXISTS", farm.keys.audit), "the entries to be noted")
    definition = await farm.submit("77", merge([image(IMAGE).run(f"echo {n}") for n in range(30)]))
    vertex = definition.order[5]
    where = "JSON.stringify([document.activeElement.id || document.activeElement.href, scrollY, {}])"
    async with looking(farm) as tab:
        await tab.look_like(scheme="light", width=380, height=700)
        await tab.open(page_url(farm.state_dir) + "/audit")
        await tab.ask("document.querySelectorAll('#live .scroll a')[20].focus()")
        await tab.ask("scrollBy(0, 40); document.querySelector('.scroll').scrollLeft = 30")
        place = where.format("document.querySelector('.scroll').scrollLeft")
        before = await tab.ask(place)
        audit.note(AuditEntry(operation=Operation.PUSH, image="example/new:1", who="driver"))
        await tab.until("document.querySelector('#live').textContent.includes('example/new:1')")
        assert await tab.ask(place) == before
        assert json.loads(before)[0].endswith("/images?q=example/app%3A19")
        assert json.loads(before)[1] > 0 < json.loads(before)[2]

        await tab.open(page_url(farm.state_dir) + "/jobs/77")
        for selector in (f"#n-{vertex[7:23]}", f"#v-{vertex[7:23]} .quiet"):
            await farm.tell("77", VertexEvent(vertex=vertex, name="RUN", state=VertexState.RUNNING, node="n0"))
            await tab.until(f"document.querySelector('#v-{vertex[7:23]} .quiet') !== null")
            await tab.ask(f"document.querySelector('{selector}').focus()")
            await tab.ask("document.querySelector('.graph').scrollTop = 60; scrollBy(0, 30)")
            place = where.format("document.querySelector('.graph').scrollTop")
            before = await tab.ask(place)
            await tab.ask(f"document.querySelector('#v-{vertex[7:23]}').dataset.old = ''")
            await farm.tell("77", VertexEvent(vertex=vertex, name="RUN", state=VertexState.RUNNING, node="n0"))
            await tab.until(f"!('old' in document.querySelector('#v-{vertex[7:23]}').dataset)")
            assert await tab.ask(place) == before
        assert await tab.text("#said") == "Job running"
        await tab.ask("document.querySelector('#said').textContent = 'nothing more'")
        await farm.tell("77", VertexEvent(vertex=vertex, name="RUN", state=VertexState.COMPLETED))
        await tab.until("document.querySelectorAll('.vertex.completed').length === 1")
        assert await tab.text("#said") == "nothing more"
        await farm.end("77", JobState.DONE)
        await tab.until("document.querySelector('#said').textContent === 'Job done'")


# -- as big as it gets ----------------------------------------------------------------------------------------

#: What the document has of elements, and what of them was put in or changed since it was asked to look.
ELEMENTS = "document.querySelectorAll('*').length"
WATCH = """
window.touched = 0;
new MutationObserver(changes => {
    for (const {addedNodes} of changes) {
        window.touched += 1;
        for (const node of addedNodes) window.touched += node.querySelectorAll?.("*").length ?? 0;
    }
}).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
"""
#: Of a page that looks again.
PART = {"hx-request": "true"}
#: Looks at a list, of which the mean is taken.
LOOKS = 40


class Looks:
    """What looks at a page cost its process, and the wire."""

    def __init__(self, farm):
        self._pid = PageService(StateDir(farm.state_dir)).process.pid
        self._url = page_url(farm.state_dir)
        self._farm = farm

    def cpu_s(self):
        """Return the seconds that the process has worked."""
        user, system = Path(f"/proc/{self._pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def look(self, path):
        """Return the seconds of work and the bytes that a look took: the best of some rounds.

        In one of them all refs may be read anew, which is done once for all who look, and seldom.
        """
        rounds = []
        async with aiohttp.ClientSession(headers={"authorization": f"Bearer {self._token()}", **PART}) as http:
            for _ in range(3):
                before_s, got = self.cpu_s(), 0
                for _ in range(LOOKS):
                    async with http.get(self._url + path) as answer:
                        assert answer.status == 200
                        got += len(await answer.read())
                rounds.append(((self.cpu_s() - before_s) / LOOKS, got / LOOKS))
        return min(rounds)

    def _token(self):
        return PageService(StateDir(self._farm.state_dir)).token_file.read_text().strip()


async def worked_s(tab):
    """Return the seconds that a tab's own thread has worked: scripts, styles, layout."""
    metrics = (await tab.call("Performance.getMetrics"))["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


async def test_ten_thousand_refs_are_looked_at_as_a_hundred_are(farm):
    """The browser holds no more of them, no more comes over the wire, and nothing where nothing is new."""
    stores = farm.stores()

    async def add(numbers):
        many = [RefRecord.over(layer(f"one-{n}"), None, "example/many:1") for n in numbers]
        for start in range(0, len(many), 1000):
            await stores.refs.get_or_create(many[start : start + 1000], {}, lease_id=L)

    await add(range(100))
    async with looking(farm) as tab:
        looks = Looks(farm)
        await tab.open(page_url(farm.state_dir) + "/refs")
        few = await tab.ask(ELEMENTS)
        of_few = {path: await looks.look(path) for path in ("/static/page.css", "/refs", "/blobs", "/")}
        await add(range(100, 10_000))
        async with asyncio.timeout(60):
            # What others look at just now is read once for all: the first answer may be a little old.
            while "of 10002 refs" not in " ".join((await tab.text()).split()):
                await tab.open(page_url(farm.state_dir) + "/refs")
        assert await tab.ask(ELEMENTS) <= few + 10
        floor_s, _ = of_few.pop("/static/page.css")
        for path, (few_s, few_bytes) in of_few.items():
            many_s, many_bytes = await looks.look(path)
            assert many_bytes < 1.1 * few_bytes, path
            assert many_s < 3 * few_s + floor_s, path  # a hundred times as many refs
        await tab.ask(WATCH)
        await tab.press("/", text="/")
        await tab.call("Input.insertText", text=layer("one-7777").digest)
        await tab.until("document.querySelectorAll('tbody tr').length === 1")
        assert await tab.ask("touched") < few


async def test_a_job_of_a_thousand_vertices_is_told_by_what_changes(farm):
    """News of one step touches that step, not a thousand; what it costs is a small part of what the page cost."""
    definition = await farm.submit("big", merge([image(IMAGE).run(f"echo {n}") for n in range(998)]))
    vertices = definition.order
    assert len(vertices) == 1000
    await farm.tell("big", *(VertexEvent(vertex=one, name="RUN", state=VertexState.WAITING) for one in vertices))
    async with looking(farm) as tab:
        await tab.call("Performance.enable")
        before_s = await worked_s(tab)
        await tab.open(page_url(farm.state_dir) + "/jobs/big")
        assert await tab.ask("document.querySelectorAll('.vertex').length") == 1000
        assert await tab.ask(ELEMENTS) < 20 * 1000
        opened_s = await worked_s(tab) - before_s
        await tab.ask(WATCH)
        before_s = await worked_s(tab)
        await farm.tell("big", VertexEvent(vertex=vertices[500], name="RUN", state=VertexState.RUNNING))
        await tab.until("document.querySelectorAll('.vertex.running').length === 1")
        assert await worked_s(tab) - before_s < opened_s / 3
        assert 0 < await tab.ask("touched") < 100
