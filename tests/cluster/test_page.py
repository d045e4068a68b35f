"""The farm's page in a real browser, over a real farm: what somebody who looks on sees, and when."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.errors import DigestMismatchError
from lazyfarm.graph import image, merge
from storage.services.page import page_link, page_url
from tests.doubles.browser import browser, has_browser
from tests.doubles.builds import BuildFarm
from tests.doubles.registry import build_image, build_layer
from tests.doubles.registry_faults import Lie, Seen
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(not has_browser(), reason="there is no chromium"),
]

_BULK_BYTES = 3 << 20
_SLOW_BYTES_PER_S = 300_000

#: Bytes of the layer have come, and not all.
SOME = "[...document.querySelectorAll('.layer.fetching progress')].some(bar => bar.value > 0 && bar.value < bar.max)"
UNPACKED = "document.querySelectorAll('.layer.done[data-work=extract], .layer.joined[data-work=extract]').length"
ENDED = "document.querySelector('#job .state.{}') !== null"
#: How many vertices are in a state, and how many are drawn so.
SHOWN = "[document.querySelectorAll('.vertex.{0}').length, document.querySelectorAll('.node.{0}').length].join()"


@pytest.fixture(autouse=True)
async def _nothing_left(farm):
    """What a build did leaves nothing once it has ended."""
    yield
    await BuildFarm(running=farm).assert_nothing_left()


@pytest.fixture
def base(registry, registry_proxy):
    """Push an image with a shell and a layer of some size that no farm has seen; return its name and that layer."""
    words = secrets.token_hex(8)
    bulk = build_layer({"bulk": secrets.token_bytes(_BULK_BYTES)})
    registry.push("base", "1", build_image([*shell_image(words).layers, bulk], label=words))
    return f"{registry_proxy.host}/base:1", bulk


@asynccontextmanager
async def looking(farm, *, at="/"):
    """Open the page in a browser of its own; whatever a script complains of, or is refused, fails the test."""
    async with browser() as running, running.tab() as tab:
        await tab.open(page_link(farm.state_dir))
        await tab.open(page_url(farm.state_dir) + at)
        yield tab
        assert tab.complaints == []


async def test_no_token_no_page(farm):
    """Nothing but how to get it; with it the address is the page's own, and the token is in it no more."""
    async with browser() as running, running.tab() as tab:
        url = page_url(farm.state_dir)
        for path in ("/", "/refs", "/static/page.css", "/?token=wrong"):
            await tab.open(url + path)
            assert (await tab.text()).strip() == "No token, no page: `lazyfarm page` prints the address that opens it."
        await tab.open(farm.cli_json("page")["page"])
        assert await tab.ask("location.href") == f"{url}/"
        assert "All is well." in await tab.text()
        assert "fetch-worker" in await tab.text()
        assert await tab.ask("document.cookie") == ""  # no script can read it


async def test_a_pull_is_seen_live_from_the_first_byte_to_the_unpacked_layer(farm, base, registry_proxy):
    """One page, opened before: bytes, then extracts, then the end, and what the command said; and flights meanwhile."""
    name, bulk = base
    registry_proxy.bytes_per_s = _SLOW_BYTES_PER_S
    run = image(name, plain_http=True).named("the image").run("echo '<i>made</i>'; echo two").named("the command")
    async with await farm.connect() as driver, browser() as running, running.tab() as tab, running.tab() as other:
        job = await driver.submit(run)
        await tab.open(page_link(farm.state_dir))
        await tab.open(f"{page_url(farm.state_dir)}/jobs/{job.id}")
        await tab.ask("document.body.dataset.opened = 'once'")
        await tab.until(SOME)
        assert await tab.ask(SHOWN.format("running")) == "1,1"
        await other.open(f"{page_url(farm.state_dir)}/flights")
        await other.until(f"document.querySelector('main').textContent.includes('{bulk.digest[:19]}')")
        await other.until("document.querySelector('td progress')?.value > 0")
        registry_proxy.bytes_per_s = None
        await job

        await tab.until(ENDED.format("done"))
        assert await tab.until(UNPACKED) >= 4
        assert await tab.ask("document.querySelector('.layer.fetching')") is None
        await tab.until(f"{SHOWN.format('completed')} === '2,2' && {SHOWN.format('running')} === '0,0'")
        assert f"{registry_proxy.host}/base" in await tab.text("#vertices")  # where layers came from
        assert await tab.ask("document.body.dataset.opened") == "once"  # it was never loaded anew

        await tab.ask("[...document.querySelectorAll('.vertex a')].find(a => a.textContent === 'the command').click()")
        await tab.until("document.querySelector('#log')?.textContent.includes('two')")
        assert "<i>made</i>" in await tab.text("#log")
        await other.until("document.querySelector('main').textContent.includes('Nothing is under way')")
        assert tab.complaints + other.complaints == []


async def test_a_layer_that_fails_is_shown_with_its_error_and_what_to_do(farm, base, registry_proxy):
    """To who looked on, without a word from him; and to who comes when all is over, as the whole story."""
    name, bulk = base

    def of_bulk(seen: Seen) -> bool:
        return seen.digest == bulk.digest

    registry_proxy.bytes_per_s = _SLOW_BYTES_PER_S
    registry_proxy.script(Lie(), of=of_bulk, times=None)
    async with await farm.connect() as driver:
        job = await driver.submit(image(name, plain_http=True).named("the image").run("true").named("the command"))
        path = f"/jobs/{job.id}"
        async with looking(farm, at=path) as tab:
            await tab.until(SOME)
            registry_proxy.bytes_per_s = None
            with pytest.raises(DigestMismatchError) as failed:
                await job
            await tab.until(ENDED.format("failed"))
            await tab.until("document.querySelector('.layer.failed') !== null")
            live = await story(tab)
        async with looking(farm, at=path) as late:
            told = await story(late)
            assert await late.ask("document.querySelector('[sse-connect]')") is None
            await late.ask(f"document.querySelector('.layer.failed a[href=\"/blobs/{bulk.digest}\"]').click()")
            await late.until("[...document.querySelectorAll('.trail .failed')].length > 0")
            trail = await late.text(".trail")
    assert told == live
    for part in ("unlazy failed", "fetch failed", "DigestMismatchError", job.id[:12]):
        assert part in trail
    assert bulk.digest[:19] in told["layers"]
    for part in (str(failed.value), failed.value.hint):
        assert part in told["job"]


async def story(tab):
    """Return what a job's page tells, but for the clocks."""
    found = await tab.ask(
        """JSON.stringify({
            job: document.querySelector("#job .notice").textContent,
            layers: [...document.querySelectorAll(".layer.failed")].map(one => one.textContent).join(),
            vertices: [...document.querySelectorAll(".vertex")].map(one => one.id + one.className),
            nodes: [...document.querySelectorAll(".node")].map(one => one.id + one.getAttribute("class")),
        })"""
    )
    return json.loads(found)


async def test_a_build_is_pictured_while_its_layers_come(farm, registry, registry_proxy, tmp_path):
    """As the README shows it, in light and dark: layers of one image at once done, on their way and unpacked.

    ``LAZYFARM_PICTURES=docs`` puts the pictures there: ``make pictures``.
    """
    words = secrets.token_hex(8)
    bulk = [build_layer({f"bulk-{size}": secrets.token_bytes(size << 20)}) for size in (3, 5, 7)]
    registry.push("base", "12", build_image([*shell_image(words).layers, *bulk], label=words))
    name = f"{registry_proxy.host}/base:12"
    base = image(name, plain_http=True).named(f"FROM {name}")
    build = base.run("echo 1").named("[build 2/4] RUN install-deps").run("echo 2").named("[build 3/4] RUN make")
    assets = base.run("echo 3").named("[assets 2/3] RUN render").run("echo 4").named("[assets 3/3] RUN make docs")
    registry_proxy.bytes_per_s = _SLOW_BYTES_PER_S
    folder = Path(os.environ.get("LAZYFARM_PICTURES", tmp_path))
    async with await farm.connect() as driver:
        job = await driver.submit(merge([build, assets]).named("[stage-2 1/1] merge"))
        async with looking(farm, at=f"/jobs/{job.id}") as tab:
            await tab.until(f"{SOME} && {UNPACKED} > 0 && document.querySelectorAll('.layer.fetching').length >= 3")
            for scheme, file in (("light", "page.png"), ("dark", "page-dark.png")):
                await tab.look_like(scheme=scheme, width=1200, height=760)
                await tab.screenshot(folder / file)
            assert await tab.ask("document.querySelectorAll('.layer.fetching').length") >= 3
            await job.cancel()
            await tab.until(ENDED.format("cancelled"))
            assert await tab.ask("document.querySelector('.layer.fetching')") is None
    light, dark = ((folder / file).read_bytes() for file in ("page.png", "page-dark.png"))
    assert light[:8] == dark[:8] == b"\x89PNG\r\n\x1a\n"
    assert light != dark
    assert max(len(light), len(dark)) < 200_000  # each is a part of every clone


async def test_it_is_used_with_a_keyboard_on_any_screen(farm, base):
    """The filter by one key, links by Tab; dark where dark is preferred; no wider than the screen."""
    name, _ = base
    async with await farm.connect() as driver:
        ref = await driver.pull(name, plain_http=True)
        async with looking(farm, at="/refs") as tab:
            await tab.press("/", text="/")
            assert await tab.ask("document.activeElement.name") == "q"
            await tab.call("Input.insertText", text=name)
            await tab.until(f"document.querySelectorAll('tbody tr').length === {len(ref.layers)}")
            assert await tab.ask("location.search.startsWith('?q=')")  # which can be kept, and sent on
            await tab.press("Tab", code="Tab", windowsVirtualKeyCode=9)
            assert await tab.ask("document.activeElement.name") == "state"
            await tab.ask("document.querySelector('tbody a').focus()")
            await tab.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
            await tab.until("location.pathname.startsWith('/refs/sha256:') && document.readyState === 'complete'")
            assert registry_of(name) in await tab.text()

            back = {}
            for scheme in ("light", "dark"):
                await tab.look_like(scheme=scheme, width=360, height=700)
                back[scheme] = await tab.ask("getComputedStyle(document.body).backgroundColor")
            assert back["light"] != back["dark"]
            for path in (
                "/",
                "/jobs",
                "/images",
                "/refs",
                "/blobs",
                "/leases",
                "/flights",
                "/registries",
                "/avoided",
                "/audit",
            ):
                await tab.open(page_url(farm.state_dir) + path)
                assert await tab.ask("document.documentElement.scrollWidth <= innerWidth"), path


def registry_of(name):
    return name.partition("/")[0]
