"""A farm in Redis whose page is looked at, by itself or in a browser; nothing else of it runs."""

from __future__ import annotations

import asyncio
import html
import re
from contextlib import asynccontextmanager

from starlette.testclient import TestClient

from cluster.config import WebConfig
from cluster.digest import digest_of
from cluster.errors import DigestMismatchError
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec, JobState, LogStream, VertexEvent, VertexLayers, VertexLog, VertexState
from cluster.messages import SessionInfo
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.wire import encode_error
from lazyfarm.graph import image
from lazyfarm.settings import load_running
from lazyfarm.web.app import build_app
from lazyfarm.web.reading import FarmReader
from storage.job_events import RedisJobEvents
from storage.jobs import RedisJobStore
from storage.services.page import PageService, page_link
from storage.services.state_dir import StateDir
from tests.doubles.browser import browser
from tests.doubles.collect import Bench, layer
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

TOKEN = "the-token"
IMAGE = "docker.io/example/app:1"
SOURCE = ProviderHandle(registry="registry.example", repository="example/app")
#: What a name may be that somebody else chose.
EVIL = '"><script>alert(1)</script>'


class PagedFarm(FarmOfRedis):
    """A farm whose page is asked."""

    client: TestClient

    @property
    def link(self):
        return self.links[0]

    def get(self, path, *, status=200, **headers):
        answer = self.client.get(path, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.text

    def words(self, path, **options):
        """Return what a page says, without its marks."""
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", self.get(path, **options))).split())

    async def submit(self, name, graph):
        definition = graph.definition()
        payload = encode_definition(definition)
        spec = JobSpec(
            id=JobId(name),
            definition=digest_of(payload),
            targets=definition.targets,
            session=SessionInfo(session_id="s"),
        )
        await RedisJobStore(self.link, self.keys).submit(spec, payload)
        return definition

    async def tell(self, job, *events):
        await RedisJobEvents(self.link, self.keys).publish(JobId(job), events)

    async def end(self, job, state, error=b""):
        store = RedisJobStore(self.link, self.keys)
        (claimed,) = [c for c in await store.claim("s0", ttl_s=60.0, most=9) if c.claim.job == job]
        await store.end(claimed.claim, state, error=error)

    async def fail_a_build(self):
        """Have a job fail as an image's layer comes wrong; its command had said something before."""
        graph = image(IMAGE).named("FROM app").run("make").named(f"RUN make {EVIL}")
        definition = await self.submit("4f2a00", graph)
        base, run = definition.order
        error = encode_error(DigestMismatchError("sha256:1", "sha256:2", f"registry.example/{EVIL}"))
        await self.tell(
            "4f2a00",
            VertexEvent(vertex=base, name="FROM app", state=VertexState.RUNNING),
            fetching(base, LayerPhase.FETCHING, 1 << 20),
            VertexEvent(vertex=run, name=f"RUN make {EVIL}", state=VertexState.RUNNING),
            VertexLog(vertex=run, stream=LogStream.STDOUT, text=f"one\n{EVIL}\n\x1b[31mred\x1b[0m\n"),
            fetching(base, LayerPhase.FAILED, 2 << 20, detail="served other bytes"),
            VertexEvent(vertex=base, name="FROM app", state=VertexState.FAILED, error=error),
            VertexEvent(vertex=run, name=f"RUN make {EVIL}", state=VertexState.CANCELLED),
        )
        await self.end("4f2a00", JobState.FAILED, error)
        return definition


def fetching(vertex, phase, current=0, detail=""):
    item = ProgressItem(
        item=f"fetch:{layer('top').digest}", phase=phase, current_bytes=current, total_bytes=4 << 20, detail=detail
    )
    return VertexLayers(vertex=vertex, item=item)


@asynccontextmanager
async def paged_farm(redis_servers, tmp_path):
    """Make a farm with an image of two layers, the lower one present; a driver holds it."""
    farm = PagedFarm(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    stores = farm.stores()
    bench = Bench(stores)
    await bench.pull(IMAGE, "base", "top")
    await stores.refs.add_providers(layer("top").digest, [SOURCE])
    await bench.fetch(layer("base").digest)
    reader = FarmReader(load_running(farm.state_dir, {}))
    with TestClient(
        build_app(reader, token=TOKEN, cookie="c"),
        base_url="http://127.0.0.1",
        headers={"authorization": f"Bearer {TOKEN}"},
    ) as farm.client:
        yield farm
    await farm.close()


@asynccontextmanager
async def looking(farm):
    """Open the page of its own process in a browser; what a script complains of fails the test."""
    page = PageService(StateDir(farm.state_dir))
    await asyncio.to_thread(page.start, WebConfig(), "d")
    try:
        async with browser() as running, running.tab() as tab:
            await tab.open(page_link(farm.state_dir))
            yield tab
            assert tab.complaints == []
    finally:
        await asyncio.to_thread(page.stop)
