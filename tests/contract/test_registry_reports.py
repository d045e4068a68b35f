"""What the cluster's limiter is told of requests to registries: by the client, and by the byte path of layers."""

from __future__ import annotations

import asyncio
import contextlib
import io

import pytest

from cluster.circuit import BreakerLimits
from cluster.config import Config, RegistryConfig
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    BlobNotFoundError,
    CircuitOpenError,
    NodeDiskError,
    RateLimitedError,
    RedirectTargetError,
    SessionGoneError,
    UnavailableError,
)
from cluster.provider import ProviderHandle
from cluster.quota import Budget, Quota, RequestKind
from cluster.reference import parse_platform, parse_reference
from storage.fetching import _Bridge, _RegistrySource
from storage.memory import Memory, MemoryHostLimiter
from storage.registry.auth import CredentialAuthorizer
from storage.registry.blob import BlobSource
from storage.registry.client import RegistryClient
from storage.registry.credentials import CredentialSource
from tests.contract.test_registry_client import Limits
from tests.doubles.registry import random_image
from tests.doubles.registry_faults import (
    Hang,
    RedirectTo,
    Reset,
    Respond,
    Truncate,
    manifests,
    registry_fault_proxy,
    uploads,
)
from tests.doubles.stores import FakeClock

pytestmark = pytest.mark.registry

AMD64 = parse_platform("linux/amd64")
ONCE = Config(registries={"default": RegistryConfig(timeout_s=0.5, attempts=1, retry_budget_s=0)})
#: Nobody listens there: a port that needs root.
NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def layer():
    data = bytes(range(256)) * 4096
    return data, Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar",
        digest=digest_of(data),
        size_bytes=len(data),
        diff_id=digest_of(data),
    )


@pytest.fixture
async def parts():
    """A client, an authorizer, and the limiter that both are told by."""
    limits = Limits()
    client = RegistryClient(ONCE, limiter=limits)
    authorizer = CredentialAuthorizer(CredentialSource(None), ONCE, identity_key=b"key")
    yield client, authorizer, limits
    await client.aclose()
    await authorizer.aclose()


def told(limits):
    return [failure for _, failure in limits.failures], len(limits.throttles), limits.successes


# -- control requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Respond(500), (["HTTP 500"], 0, 0)),
        (Respond(404), ([], 0, 1)),
        (Respond(403), ([], 0, 1)),
        (Respond(429), ([], 1, 0)),
        (Respond(503, {"Retry-After": "7"}), ([], 1, 0)),
        (RedirectTo(NOBODY), ([], 0, 0)),
    ],
    ids=str,
)
async def test_an_answer_is_an_answer_and_an_error_of_the_host_a_failure(registry_proxy, parts, fault, expected):
    """Failed has who breaks off or answers 5xx; who refuses, or is too busy, has not."""
    client, authorizer, limits = parts
    registry_proxy.script(fault, of=manifests)
    with contextlib.suppress(Exception):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/any:1"), AMD64, authorizer)

    assert told(limits) == expected


@pytest.mark.parametrize("fault", [Reset(), Hang()], ids=str)
async def test_no_answer_is_a_failure(registry_proxy, parts, fault):
    """A connection that breaks, or an answer that doesn't come."""
    client, authorizer, limits = parts
    registry_proxy.script(fault, of=manifests, times=None)
    with pytest.raises(UnavailableError):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/any:1"), AMD64, authorizer)
    if isinstance(fault, Hang):
        fault.proceed.set()

    assert [host for host, _ in limits.failures] == [registry_proxy.host]


async def test_a_stream_that_fails_is_no_fault_of_the_registrys(registry_proxy, parts, layer):
    """An upload whose bytes the content store withholds says nothing of the host; one that it breaks off does."""
    client, authorizer, limits = parts
    data, descriptor = layer
    target = ProviderHandle(kind="registry", registry=registry_proxy.host, repository="plain/target")

    class Broken(io.BytesIO):
        def readinto(self, _buffer):
            raise UnavailableError("the content store", "HTTP 503")

    with pytest.raises(UnavailableError, match="content store"):
        await client.upload_blob(target, descriptor, lambda: contextlib.closing(Broken()), authorizer)
    assert limits.failures == []

    registry_proxy.script(Respond(500), of=uploads)
    with pytest.raises(UnavailableError, match="HTTP 500"):
        await client.upload_blob(target, descriptor, lambda: contextlib.closing(io.BytesIO(data)), authorizer)
    assert told(limits)[0] == ["HTTP 500"]


async def test_a_host_that_is_given_up_is_not_asked_and_others_are(registry, registry_proxy):
    """The error comes at once, without a retry; a mirror that is given up is skipped as any that fails."""
    registry.push("plain/app", "1", random_image(21))
    with registry_fault_proxy(registry.url) as mirror:
        config = Config(
            registries={
                "default": RegistryConfig(timeout_s=5, attempts=5, retry_budget_s=60),
                registry_proxy.host: RegistryConfig(mirrors=(mirror.host,)),
            }
        )
        memory = Memory(FakeClock())
        limiter = MemoryHostLimiter(memory, breaker=BreakerLimits(failures=1, open_s=60.0))
        client = RegistryClient(config, limiter=limiter)
        authorizer = CredentialAuthorizer(CredentialSource(None), config, identity_key=b"key")
        reference = parse_reference(f"{registry_proxy.host}/plain/app:1")

        async with limiter.slot(mirror.host, deadline_s=1.0) as slot:
            await limiter.failed(slot, "HTTP 500")
        await client.resolve(reference, AMD64, authorizer)
        assert mirror.seen == []
        asked = len(registry_proxy.seen)
        assert asked

        async with limiter.slot(registry_proxy.host, deadline_s=1.0) as slot:
            await limiter.failed(slot, "HTTP 500")
        with pytest.raises(CircuitOpenError, match=registry_proxy.host):
            await client.resolve(reference, AMD64, authorizer)
        assert len(registry_proxy.seen) == asked
        await client.aclose()
        await authorizer.aclose()


# -- layers -----------------------------------------------------------------------------------------------


class Caller:
    """Who reads without credentials, or whose session has gone."""

    def __init__(self, error=None):
        self.authorizer = self
        self._error = error

    def identity(self, _registry):
        return "me"

    async def authorize(self, _request):
        if self._error is not None:
            raise self._error


class Layers:
    """Reads one layer from a registry as the byte path does, in a thread."""

    def __init__(self, host, descriptor):
        self.limits = Limits()
        self._source = BlobSource(ONCE)
        handle = ProviderHandle(kind="registry", registry=host, repository="plain/app")
        (self._endpoint,) = self._source.endpoints(handle)
        self._descriptor = descriptor

    async def read(self, caller=None, *, disk=None):
        """Read all of it; *disk* is raised as its bytes are to be written."""
        source = _RegistrySource(
            self._endpoint,
            self._descriptor,
            caller or Caller(),
            origin=self._endpoint.source,
            blobs=self._source,
            limiter=self.limits,
            bridge=_Bridge(asyncio.get_running_loop()),
        )
        buffer = memoryview(bytearray(self._descriptor.size_bytes))

        def run():
            with source.open(0, None) as response:
                while response.readinto(buffer):
                    if disk is not None:
                        raise disk

        try:
            await asyncio.to_thread(run)
        finally:
            self._source.close()


@pytest.fixture
def layers(registry, registry_proxy, layer):
    data, descriptor = layer
    registry.push_blob("plain/app", data)
    registry_proxy.forget()
    return Layers(registry_proxy.host, descriptor)


@pytest.mark.parametrize(
    ("fault", "error", "expected"),
    [
        (Respond(502), UnavailableError, (["HTTP 502"], 0, 0)),
        (Respond(404), BlobNotFoundError, ([], 0, 1)),
        (Respond(429, {"Retry-After": "7"}), RateLimitedError, ([], 1, 0)),
        (RedirectTo(NOBODY), RedirectTargetError, ([], 0, 0)),
        (Truncate(1000), UnavailableError, (["it ended after 1000 of 1048576 bytes"], 0, 0)),
    ],
    ids=str,
)
async def test_how_a_layer_was_read_is_told(layers, registry_proxy, fault, error, expected):
    """As for control requests; a body that breaks off is a failure, a store behind a redirect is another's affair."""
    registry_proxy.script(fault)
    with pytest.raises(error):
        await layers.read()

    assert told(layers.limits) == expected


async def test_a_layer_that_was_read_whole_is_one_success(layers):
    """Told once, at its end."""
    await layers.read()

    assert told(layers.limits) == ([], 0, 1)


async def test_what_goes_wrong_here_is_no_fault_of_the_registrys(layers):
    """A full disk, a session that is gone, a token server that doesn't answer: the host isn't blamed."""
    for caller, disk in [
        (None, NodeDiskError("the node's disk", "no space left")),
        (Caller(SessionGoneError("s")), None),
        (Caller(UnavailableError("token server tokens.example", "HTTP 503")), None),
        (Caller(RateLimitedError("token server tokens.example", "HTTP 429", 60.0)), None),
    ]:
        with pytest.raises((UnavailableError, SessionGoneError)):
            await layers.read(caller, disk=disk)

    assert told(layers.limits) == ([], 0, 0)


async def test_a_probe_says_at_the_head_of_the_answer_that_the_host_is_back(layers):
    """All others wait for it: not for as long as a layer takes."""
    layers.limits.is_probe = True
    with pytest.raises(NodeDiskError):
        await layers.read(disk=NodeDiskError("the node's disk", "no space left"))

    assert told(layers.limits) == ([], 0, 1)


# -- what is left -------------------------------------------------------------------------------------------

LEFT = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "7;w=21600"}
TOLD = Quota(remaining=7, limit=100, window_s=21600.0)


@pytest.mark.parametrize("status", [404, 429])
async def test_what_is_left_is_told_of_the_kind_and_account_that_it_is_of(registry_proxy, parts, layer, status):
    """A manifest's answer speaks of manifests, a blob's of blobs, an upload's of pushes; a refusal's, too."""
    client, authorizer, limits = parts
    registry_proxy.script(Respond(status, LEFT), of=lambda _seen: True, times=None)
    target = ProviderHandle(registry=registry_proxy.host, repository="plain/any")
    for request in (
        client.resolve(parse_reference(f"{registry_proxy.host}/plain/any:1"), AMD64, authorizer),
        client.blob_exists(target, layer[1].digest, authorizer),
        client.push_manifest(target, "1", "application/vnd.oci.image.manifest.v1+json", b"{}", authorizer),
    ):
        with contextlib.suppress(Exception):
            await request

    kinds = (RequestKind.MANIFEST, RequestKind.BLOB, RequestKind.PUSH)
    assert limits.quotas == [(registry_proxy.host, Budget(kind=kind, account="anonymous"), TOLD) for kind in kinds]


async def test_what_the_store_behind_a_registry_says_is_its_own_affair(registry, registry_proxy, parts, layer):
    """A redirect's target counts for itself."""
    client, authorizer, limits = parts
    with registry_fault_proxy(registry.url) as store:
        store.script(Respond(404, LEFT), of=lambda _seen: True, times=None)
        registry_proxy.script(RedirectTo(store.url), of=lambda _seen: True, times=None)
        await client.blob_exists(
            ProviderHandle(registry=registry_proxy.host, repository="plain/any"), layer[1].digest, authorizer
        )

    assert limits.quotas == []


async def test_what_is_left_is_read_off_layers_too(layers, registry_proxy):
    """By the byte path, whoever it reads for."""
    registry_proxy.script(Respond(429, LEFT))
    with pytest.raises(RateLimitedError):
        await layers.read()

    budget = Budget(kind=RequestKind.BLOB, account="me")
    assert layers.limits.quotas == [(registry_proxy.host, budget, TOLD)]
