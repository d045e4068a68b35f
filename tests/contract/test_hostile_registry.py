"""A registry that means harm: what it answers costs little, and gets it no login but its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from cluster.config import Config, RegistryConfig
from cluster.digest import digest_of
from cluster.errors import AccessDeniedError, ClusterError, MalformedManifestError, RegistryProtocolError
from cluster.image import MAX_MANIFEST_BYTES
from cluster.reference import parse_platform, parse_reference
from storage.registry.auth import CredentialAuthorizer
from storage.registry.client import RegistryClient
from storage.registry.credentials import CredentialSource
from tests.contract.test_registry_tokens import NoLimits

pytestmark = pytest.mark.timeout(60)

MIB = 1024**2
AMD64 = parse_platform("linux/amd64")
CONFIG = Config(registries={"default": RegistryConfig(timeout_s=5, attempts=1, retry_budget_s=0)})
LOGIN = ("alice", "wonderland")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass
class Seen:
    """A server that answers as a test says, and what it was asked."""

    host: str = ""
    requests: list[web.Request] = field(default_factory=list)
    answer: Callable[[web.Request], web.StreamResponse] = lambda _: web.Response(status=404)

    @property
    def authorizations(self) -> list[str]:
        return [request.headers["Authorization"] for request in self.requests if "Authorization" in request.headers]


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Seen]:
    seen = Seen()

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.requests.append(request)
        answer = seen.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    runner = web.AppRunner(_app(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    seen.host = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield seen
    finally:
        await runner.cleanup()


def _app(handle) -> web.Application:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    return app


@pytest.fixture
async def registry():
    async with serving() as seen:
        yield seen


@pytest.fixture
async def elsewhere():
    async with serving() as seen:
        yield seen


@pytest.fixture
async def pull(registry, elsewhere):
    """Resolve an image there, as one who has logins for both hosts."""
    logins = {registry.host: LOGIN, elsewhere.host: ("other", "elsewheres-own")}
    client = RegistryClient(CONFIG, limiter=NoLimits())
    caller = CredentialAuthorizer(CredentialSource(logins), CONFIG, identity_key=b"key")

    async def resolve():
        return await client.resolve(parse_reference(f"{registry.host}/x/y:t"), AMD64, caller)

    yield resolve
    await caller.aclose()
    await client.aclose()


def challenged(realm: str, **headers: str) -> web.Response:
    return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",service="s"', **headers})


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# -- logins -------------------------------------------------------------------------------------------


async def test_a_realm_elsewhere_gets_the_login_of_the_registry_that_named_it(registry, elsewhere, pull):
    """As everywhere (docker.io names auth.docker.io): it is that registry's own login, never the realm's host's."""
    registry.answer = lambda _: challenged(f"http://{elsewhere.host}/token")
    elsewhere.answer = lambda _: web.json_response({"token": "t"})
    with pytest.raises(ClusterError):
        await pull()
    assert set(elsewhere.authorizations) == {basic(*LOGIN)}


async def test_a_token_server_that_redirects_elsewhere_hands_no_login_on(registry, elsewhere, pull):
    """The login goes to the address that the challenge names and no further."""
    registry.answer = lambda request: (
        web.Response(status=302, headers={"Location": f"http://{elsewhere.host}/steal"})
        if request.path == "/token"
        else challenged(f"http://{registry.host}/token")
    )
    elsewhere.answer = lambda _: web.json_response({"token": "t"})
    with pytest.raises(ClusterError):
        await pull()
    assert basic(*LOGIN) in registry.authorizations
    assert elsewhere.requests
    assert not elsewhere.authorizations


async def test_a_registry_that_redirects_elsewhere_hands_no_token_on(registry, elsewhere, pull):
    """Neither its own token, nor, when the other one asks for it, that one's login."""

    def answer(request):
        if request.path == "/token":
            return web.json_response({"token": "a-token"})
        if "Authorization" not in request.headers:
            return challenged(f"http://{registry.host}/token")
        return web.Response(status=307, headers={"Location": f"http://{elsewhere.host}{request.path}"})

    registry.answer = answer
    elsewhere.answer = lambda _: web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="give"'})
    with pytest.raises(ClusterError):
        await pull()
    assert "Bearer a-token" in registry.authorizations
    assert elsewhere.requests
    assert not elsewhere.authorizations


@pytest.mark.parametrize(
    "realm",
    [
        *("", "file:///etc/passwd", "gopher://x", "//", "http://", "javascript:x", "\x01", "a" * 4000),
        *("http://[::1", "http://h:port", "http://h:99999"),
    ],
)
async def test_a_realm_that_is_no_address_is_refused(registry, pull, realm):
    """No file is read and nobody else is asked."""
    registry.answer = lambda _: challenged(realm)
    with pytest.raises(ClusterError):
        await pull()


@pytest.mark.parametrize("location", ["", "http://[::1", "http://h:port/x", "file:///etc/passwd"])
async def test_a_redirect_that_is_no_address_is_refused(registry, pull, location):
    """Told by type, and followed nowhere."""
    registry.answer = lambda _: web.Response(status=302, headers={"Location": location})
    with pytest.raises(RegistryProtocolError, match="no address"):
        await pull()


# -- sizes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_memory():
    """Fail where memory grows by more than a few manifests."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 6 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()


def endless(request: web.Request, *, content_type: str):
    """Send bytes until the other side leaves, at most 200 MiB."""

    async def send() -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                await response.write(b" " * MIB)
        return response

    return send()


async def test_a_manifest_without_end_is_left_at_the_limit(registry, pull):
    """4 MiB are read of it, whatever it says of its length."""
    registry.answer = lambda request: endless(request, content_type=MANIFEST)
    with little_memory(), pytest.raises(MalformedManifestError, match="larger than"):
        await pull()


async def test_a_token_without_end_is_left_at_the_limit(registry, pull):
    """A token server's answer has a limit, too."""
    registry.answer = lambda request: (
        endless(request, content_type="application/json")
        if request.path == "/token"
        else challenged(f"http://{registry.host}/token")
    )
    with little_memory(), pytest.raises(RegistryProtocolError):
        await pull()


async def test_a_challenge_of_megabytes_is_refused(registry, pull):
    """Headers of more than some KiB end the connection: a typed error, and no retry for ever."""
    registry.answer = lambda _: challenged("http://x/" + "a" * MIB)
    with little_memory(), pytest.raises(ClusterError):
        await pull()


@pytest.mark.parametrize("size", [0, 1, -1, 2**62, MAX_MANIFEST_BYTES + 1])
async def test_a_config_of_another_size_than_it_claims_is_refused(registry, pull, size):
    """As much is read as is claimed, and what is claimed is no more than a manifest may be."""
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}).encode()
    claimed = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config), "size": size}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": claimed, "layers": []}).encode()

    def answer(request):
        if "/manifests/" in request.path:
            return web.Response(body=manifest, content_type=MANIFEST)
        return web.Response(body=config)

    registry.answer = answer
    with little_memory(), pytest.raises(ClusterError):
        await pull()


async def test_who_refuses_for_ever_is_asked_a_few_times(registry, pull):
    """A token that is never good enough ends in AccessDeniedError, not in a loop."""
    registry.answer = lambda request: (
        web.json_response({"token": "never"})
        if request.path == "/token"
        else challenged(f"http://{registry.host}/token")
    )
    with pytest.raises(AccessDeniedError):
        await pull()
    assert len(registry.requests) < 10
