"""The registry client against a real docker-registry."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from dataclasses import dataclass, field

import pytest

from cluster.config import Config, RegistryConfig
from cluster.descriptor import Compression, Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    DigestMismatchError,
    InsecureRegistryError,
    MalformedManifestError,
    ManifestNotFoundError,
    PlatformNotFoundError,
    RateLimitedError,
    RegistryProtocolError,
    SizeMismatchError,
    UnavailableError,
    UnsupportedManifestError,
    UntrustedCertificateError,
)
from cluster.ports import Slot
from cluster.provider import ProviderHandle
from cluster.quota import Budget, Quota
from cluster.reference import parse_platform, parse_reference
from storage.registry.auth import CredentialAuthorizer
from storage.registry.client import RegistryClient
from storage.registry.credentials import CredentialSource
from storage.registry.endpoint import next_hop
from tests.doubles.registry import (
    HTPASSWD_PASSWORD,
    HTPASSWD_USER,
    build_image,
    build_index,
    build_layer,
    docker_registry,
    htpasswd_config,
    make_authority,
    random_image,
)
from tests.doubles.registry_faults import (
    Hang,
    Lie,
    RedirectTo,
    Reset,
    Respond,
    Truncate,
    blobs,
    manifests,
    registry_fault_proxy,
    uploads,
)
from tests.doubles.stores import eventually

pytestmark = pytest.mark.registry

AMD64 = parse_platform("linux/amd64")
QUICK = RegistryConfig(timeout_s=5, attempts=4, retry_budget_s=10)


@dataclass
class Limits:
    """Records what a client tells the cluster's limiter; limits nothing."""

    throttles: list[tuple[str, float]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    quotas: list[tuple[str, Budget, Quota]] = field(default_factory=list)
    successes: int = 0
    held: int = 0
    most_held: int = 0
    is_probe: bool = False

    @contextlib.asynccontextmanager
    async def slot(self, host, *, deadline_s, budget):
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        try:
            yield Slot(host, is_probe=self.is_probe, budget=budget)
        finally:
            self.held -= 1

    async def throttled(self, slot, retry_after_s):
        self.throttles.append((slot.host, retry_after_s))

    async def succeeded(self, slot):
        self.successes += 1

    async def quoted(self, slot, quotas):
        self.quotas.append((slot.host, slot.budget, *quotas))

    async def failed(self, slot, failure):
        self.failures.append((slot.host, failure))


@pytest.fixture
def limits():
    found = Limits()
    yield found
    assert found.held == 0


@pytest.fixture
async def make(limits):
    """Make a client and an authorizer: ``make(config, {host: (user, password)})``."""
    made = []

    def build(config=None, given=None, **registries):
        config = config or Config(registries={"default": QUICK})
        client = RegistryClient(config, limiter=limits)
        authorizer = CredentialAuthorizer(CredentialSource(given), config, identity_key=b"key")
        made.extend((client, authorizer))
        return client, authorizer

    yield build
    for one in made:
        await one.aclose()


def opener(data, opened=None):
    """Return what upload_blob wants: opens *data*, and counts how often."""

    @contextlib.contextmanager
    def open_stream():
        if opened is not None:
            opened.append(1)
        yield io.BytesIO(data)

    return open_stream


def descriptor_of(data):
    return Descriptor(media_type="application/octet-stream", digest=digest_of(data), size_bytes=len(data))


# -- resolve ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize(
    ("compression", "expected"), [("gzip", Compression.GZIP), ("zstd", Compression.ZSTD), ("none", Compression.NONE)]
)
async def test_resolving_reads_manifest_and_config_once_and_no_layer(registry, make, docker, compression, expected):
    """OCI and Docker schema 2, every compression: one GET for the manifest, one for the config, no HEAD."""
    image = build_image(
        [build_layer({"a": bytes([n]) * 100}, compression=compression, docker=docker) for n in range(3)], docker=docker
    )
    registry.push("plain/image", "1", image)
    registry.forget()
    client, authorizer = make()
    found = await client.resolve(parse_reference(f"{registry.host}/plain/image:1"), AMD64, authorizer)
    assert [layer.digest for layer in found.layers] == [layer.digest for layer in image.layers]
    assert [layer.diff_id for layer in found.layers] == [layer.diff_id for layer in image.layers]
    assert {layer.compression for layer in found.layers} == {expected}
    assert (found.manifest.digest, found.manifest_bytes, found.config_bytes) == (
        image.digest,
        image.manifest,
        image.config,
    )
    assert [(one.method, one.kind) for one in registry.requests()] == [("GET", "manifest"), ("GET", "blob")]


async def test_an_index_is_resolved_to_the_platform_that_was_asked_for(registry, make):
    """An index costs one manifest more; an older variant is taken where the wanted one isn't there."""
    images = {
        platform: build_image([build_layer({"a": platform.encode()})], platform=platform)
        for platform in ("linux/amd64", "linux/arm64", "linux/arm/v6")
    }
    registry.push("plain/index", "1", build_index(images))
    registry.forget()
    client, authorizer = make()
    reference = parse_reference(f"{registry.host}/plain/index:1")
    found = await client.resolve(reference, parse_platform("linux/arm/v7"), authorizer)
    assert found.manifest.digest == images["linux/arm/v6"].digest
    assert registry.count("GET", "manifest") == 2
    with pytest.raises(PlatformNotFoundError) as caught:
        await client.resolve(reference, parse_platform("linux/s390x"), authorizer)
    assert caught.value.available == ("linux/amd64", "linux/arm/v6", "linux/arm64")


async def test_what_the_caller_has_is_not_read_again_but_access_is_proven(registry, make):
    """With config and manifest at hand only the first manifest GET is made; it is made for a digest too."""
    image = random_image(7)
    registry.push("plain/had", "1", image)
    registry.forget()
    client, authorizer = make()
    had = {digest_of(data): data for data in (image.manifest, image.config)}

    async def have(digest):
        return had.get(digest)

    reference = parse_reference(f"{registry.host}/plain/had@{image.digest}")
    await client.resolve(reference, AMD64, authorizer, have=have)
    assert [(one.method, one.kind) for one in registry.requests()] == [("GET", "manifest")]

    async def have_wrong(digest):
        return b"something else"

    found = await client.resolve(reference, AMD64, authorizer, have=have_wrong)
    assert found.config_bytes == image.config


async def test_a_missing_tag_or_repository_is_named(registry, make):
    """404 is ManifestNotFoundError with the reference."""
    client, authorizer = make()
    with pytest.raises(ManifestNotFoundError, match="plain/nothing:1"):
        await client.resolve(parse_reference(f"{registry.host}/plain/nothing:1"), AMD64, authorizer)


async def test_a_manifest_without_its_config_is_a_missing_blob(registry_proxy, registry, make):
    """The config's 404 names the config, not the image."""
    image = random_image(8)
    registry.push("plain/headless", "1", image)
    registry_proxy.script(Respond(404))
    client, authorizer = make()
    with pytest.raises(BlobNotFoundError, match=digest_of(image.config)):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/headless:1"), AMD64, authorizer)


async def test_a_manifest_of_other_bytes_than_its_digest_is_refused(registry, registry_proxy, make):
    """Both for a digest that was asked for and for the one that the registry claims."""
    image, other = random_image(9), random_image(10)
    registry.push("plain/lie", "1", image)
    client, authorizer = make()
    for selector, claim in ((":1", {"Docker-Content-Digest": image.digest}), (f"@{image.digest}", {})):
        wrong = Respond(200, {"Content-Type": image.media_type, **claim}, other.manifest)
        registry_proxy.script(wrong, of=manifests)
        with pytest.raises(DigestMismatchError) as caught:
            await client.resolve(parse_reference(f"{registry_proxy.host}/plain/lie{selector}"), AMD64, authorizer)
        assert (caught.value.expected, caught.value.actual) == (image.digest, other.digest)


async def test_a_config_of_other_bytes_is_refused(registry, registry_proxy, make):
    """The config is checked against its descriptor."""
    registry.push("plain/configlie", "1", random_image(11))
    registry_proxy.script(Lie())
    client, authorizer = make()
    with pytest.raises(DigestMismatchError):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/configlie:1"), AMD64, authorizer)


async def test_documents_that_are_no_images_are_refused_by_name(registry_proxy, make):
    """Schema 1, an oversized manifest, and no JSON at all: each its own typed error."""
    client, authorizer = make()
    reference = parse_reference(f"{registry_proxy.host}/plain/odd:1")
    schema1 = json.dumps({"schemaVersion": 1, "name": "odd"}).encode()
    kind = {"Content-Type": "application/vnd.docker.distribution.manifest.v1+prettyjws"}
    registry_proxy.script(Respond(200, kind, schema1), of=manifests)
    with pytest.raises(UnsupportedManifestError, match="schema 1"):
        await client.resolve(reference, AMD64, authorizer)
    registry_proxy.script(Respond(200, {}, b"{" + b" " * (5 * 1024**2) + b"}"), of=manifests)
    with pytest.raises(MalformedManifestError, match="larger than"):
        await client.resolve(reference, AMD64, authorizer)
    registry_proxy.script(Respond(200, {}, b"<html>"), of=manifests)
    with pytest.raises(MalformedManifestError, match="not JSON"):
        await client.resolve(reference, AMD64, authorizer)


# -- transient failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Respond(500), Respond(503), Respond(429), Reset(), Reset(10), Truncate(10), Respond(408)],
    ids=lambda fault: repr(fault)[:20],
)
async def test_transient_failures_are_retried(registry, registry_proxy, make, fault):
    """5xx, 429, resets and short bodies cost a try, not the pull."""
    image = random_image(12)
    registry.push("plain/flaky", "1", image)
    registry_proxy.script(fault, of=manifests)
    registry_proxy.script(fault, of=blobs)
    client, authorizer = make()
    found = await client.resolve(parse_reference(f"{registry_proxy.host}/plain/flaky:1"), AMD64, authorizer)
    assert found.manifest.digest == image.digest
    assert len(registry_proxy.seen) == 4


async def test_retries_end_with_the_number_of_tries(registry_proxy, make):
    """A registry that stays down is asked ``attempts`` times, and the error says what it answered."""
    registry_proxy.script(Respond(502), of=manifests, times=None)
    client, authorizer = make()
    with pytest.raises(UnavailableError, match="HTTP 502"):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/down:1"), AMD64, authorizer)
    assert len(registry_proxy.seen) == QUICK.attempts


async def test_retry_after_is_kept_and_told_to_the_cluster(registry, registry_proxy, make, limits):
    """A 429 is not followed by another request before its Retry-After; every other client learns of it."""
    registry.push("plain/slow", "1", random_image(13))
    registry_proxy.script(Respond(429, {"Retry-After": "1"}), of=manifests)
    client, authorizer = make()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await client.resolve(parse_reference(f"{registry_proxy.host}/plain/slow:1"), AMD64, authorizer)
    assert loop.time() - began_s >= 1
    assert limits.throttles == [(registry_proxy.host, 1.0)]
    assert limits.successes == 2


async def test_a_retry_after_beyond_the_budget_fails_at_once(registry_proxy, make):
    """Waiting in vain is not done: the error says how long the registry wants."""
    registry_proxy.script(Respond(429, {"Retry-After": "3600"}), of=manifests, times=None)
    client, authorizer = make()
    with pytest.raises(RateLimitedError) as caught:
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/limited:1"), AMD64, authorizer)
    assert caught.value.retry_after_s == 3600
    assert len(registry_proxy.seen) == 1


async def test_a_registry_that_hangs_is_given_up_in_time(registry_proxy, make):
    """No answer within ``timeout_s`` is a failure like any other."""
    hang = Hang()
    registry_proxy.script(hang, of=manifests, times=None)
    quick = RegistryConfig(timeout_s=0.3, attempts=2, retry_budget_s=5)
    client, authorizer = make(Config(registries={"default": quick}))
    with pytest.raises(UnavailableError, match="in time"):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/hang:1"), AMD64, authorizer)
    hang.proceed.set()


async def test_a_refused_connection_is_unavailable(make):
    """Nobody listens: the error names the host."""
    with docker_registry() as gone:
        host = gone.host
    client, authorizer = make(Config(registries={"default": RegistryConfig(attempts=2, timeout_s=2)}))
    with pytest.raises(UnavailableError, match=host):
        await client.resolve(parse_reference(f"{host}/plain/gone:1"), AMD64, authorizer)


# -- mirrors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Respond(500), Respond(404), Reset(), Respond(403), Respond(200, {}, b"<html>")])
async def test_a_mirror_that_fails_is_skipped_at_once(registry, make, fault):
    """Mirrors in order, one try each, then the registry itself."""
    image = random_image(14)
    registry.push("plain/mirrored", "1", image)
    with registry_fault_proxy(registry.url) as mirror:
        config = Config(registries={registry.host: RegistryConfig(mirrors=(mirror.host,))})
        client, authorizer = make(config)
        reference = parse_reference(f"{registry.host}/plain/mirrored:1")
        mirror.script(fault, of=manifests, times=None)
        registry.forget()
        await client.resolve(reference, AMD64, authorizer)
        # aiohttp itself repeats a GET whose connection was lost before an answer, once.
        assert len(mirror.seen) == (2 if isinstance(fault, Reset) else 1)
        assert registry.count("GET", "manifest") == 1

        registry.forget()
        mirror.forget()
        found = await client.resolve(reference, AMD64, authorizer)
        assert found.manifest.digest == image.digest
        assert len(mirror.seen) == 2, "a mirror that works serves both"
        assert len(registry.requests()) == 2, "and only it asks the registry"


# -- redirects ----------------------------------------------------------------------------------------------


async def test_authorization_stays_at_home(tmp_path, make):
    """A redirect to another port gets no Authorization header, and its query is kept as it is."""
    storage = tmp_path / "storage"
    with (
        docker_registry(htpasswd_config(tmp_path), storage=storage) as private,
        docker_registry(storage=storage) as store,
        registry_fault_proxy(private.url) as front,
        registry_fault_proxy(store.url) as other,
    ):
        image = random_image(15)
        store.push("plain/redirected", "1", image)
        front.script(RedirectTo(other.url, "X-Amz-Signature=a%2Fb%3D"), times=None)
        client, authorizer = make(given={front.host: (HTPASSWD_USER, HTPASSWD_PASSWORD)})
        await client.resolve(parse_reference(f"{front.host}/plain/redirected:1"), AMD64, authorizer)
        assert blobs(front.seen[-1])
        assert front.seen[-1].authorization
        assert [one.authorization for one in other.seen] == [None]
        assert other.seen[0].path.endswith("?X-Amz-Signature=a%2Fb%3D")
        assert other.seen[0].headers["accept-encoding"] == "identity"


async def test_redirects_for_ever_end(registry, registry_proxy, make):
    """A circle of redirects is an error, not a hang."""
    registry.push("plain/circle", "1", random_image(16))
    registry_proxy.script(RedirectTo(registry_proxy.url), times=None)
    client, authorizer = make()
    with pytest.raises(RegistryProtocolError, match="redirected more than"):
        await client.resolve(parse_reference(f"{registry_proxy.host}/plain/circle:1"), AMD64, authorizer)


async def test_a_redirect_from_https_to_plain_http_elsewhere_is_refused(tmp_path, authority, make):
    """Bytes that were asked for over TLS don't come without it from a host that isn't configured for that."""
    with pytest.raises(InsecureRegistryError, match=r"store\.example"):
        next_hop(Config(), "https://registry.example/v2/a", "http://store.example/a", doing="reading")
    assert next_hop(Config(), "https://registry.example/v2/a", "/b", doing="reading").crosses is False
    assert next_hop(Config(), "https://a.example/x", "https://a.example:443/y", doing="reading").crosses is False
    assert next_hop(Config(), "https://a.example/x", "https://a.example:444/y", doing="reading").crosses is True


# -- TLS ----------------------------------------------------------------------------------------------------


async def test_a_custom_authority_is_trusted_where_it_is_configured(authority, make):
    """With ca_file a loopback registry is asked over TLS; without trust the error says so."""
    with docker_registry(authority.registry_config, tls=authority.context) as registry:
        image = random_image(17)
        registry.push("plain/tls", "1", image)
        reference = parse_reference(f"{registry.host}/plain/tls:1")
        config = Config(registries={registry.host: RegistryConfig(ca_file=str(authority.ca_file), attempts=1)})
        client, authorizer = make(config)
        assert (await client.resolve(reference, AMD64, authorizer)).manifest.digest == image.digest


async def test_an_unknown_authority_is_a_definite_error(authority, tmp_path, make):
    """A certificate that doesn't verify is not tried again, and the hint names ca_file."""
    (tmp_path / "other").mkdir()
    other = make_authority(tmp_path / "other")
    with docker_registry(authority.registry_config, tls=authority.context) as registry:
        config = Config(registries={registry.host: RegistryConfig(ca_file=str(other.ca_file))})
        client, authorizer = make(config)
        with pytest.raises(UntrustedCertificateError) as caught:
            await client.resolve(parse_reference(f"{registry.host}/plain/tls:1"), AMD64, authorizer)
        assert "ca_file" in caught.value.hint


async def test_plain_http_behind_an_https_address_says_so(registry, authority, make):
    """TLS to a registry that speaks plain HTTP: the error names the setting, and nothing is retried."""
    config = Config(registries={registry.host: RegistryConfig(ca_file=str(authority.ca_file))})
    client, authorizer = make(config)
    with pytest.raises(InsecureRegistryError, match=registry.host):
        await client.resolve(parse_reference(f"{registry.host}/plain/image:1"), AMD64, authorizer)


# -- what is there, and push --------------------------------------------------------------------------------


async def test_existence_costs_a_head_and_no_byte(registry, make):
    """A blob's size, or None."""
    image = random_image(18)
    registry.push("plain/there", "1", image)
    registry.forget()
    client, authorizer = make()
    handle = ProviderHandle(registry=registry.host, repository="plain/there")
    layer = image.layers[0]
    assert await client.blob_exists(handle, layer.digest, authorizer) == len(layer.data)
    assert await client.blob_exists(handle, digest_of(b"no"), authorizer) is None
    assert {one.method for one in registry.requests()} == {"HEAD"}


async def test_a_foreign_layer_is_looked_for_at_its_own_addresses(registry, registry_proxy, make):
    """The first that has it says how large it is; nobody's credentials are sent or asked for."""
    image = random_image(20)
    registry.push("plain/foreign", "1", image)
    layer = image.layers[0]
    gone = f"{registry_proxy.url}/v2/plain/foreign/blobs/{digest_of(b'no')}"
    there = f"{registry_proxy.url}/v2/plain/foreign/blobs/{layer.digest}"
    client, authorizer = make()
    handle = ProviderHandle(kind="urls", registry="r.example", repository="app", urls=(gone, there))
    assert await client.blob_exists(handle, layer.digest, authorizer) == len(layer.data)
    refuse = Respond(401, {"WWW-Authenticate": 'Basic realm="x"'})
    registry_proxy.script(refuse, of=lambda seen: "blobs" in seen.path, times=None)
    with pytest.raises(AccessDeniedError):
        await client.blob_exists(handle, layer.digest, authorizer)
    assert [(one.method, one.authorization) for one in registry_proxy.seen] == [("HEAD", None)] * 4


async def test_a_digest_that_is_pushed_to_is_written_with_an_at_sign(registry_proxy, make):
    """A manifest that the registry refuses under a digest: the message has the reference as people write it."""
    registry_proxy.script(Respond(400), of=lambda seen: seen.method == "PUT")
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="plain/at")
    digest = digest_of(b"{}")
    with pytest.raises(RegistryProtocolError, match=f"plain/at@{digest}") as caught:
        await client.push_manifest(target, digest, "application/vnd.oci.image.manifest.v1+json", b"{}", authorizer)
    assert "takes blobs of that size" in caught.value.hint


async def test_a_blob_is_mounted_from_another_repository(registry, make):
    """201: the blob is in the target, and no byte moved."""
    image = random_image(19)
    registry.push("mount/from", "1", image)
    registry.forget()
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="mount/to")
    digest = image.layers[0].digest
    assert await client.mount_blob(target, digest, "mount/from", authorizer) is True
    assert await client.blob_exists(target, digest, authorizer) == len(image.layers[0].data)
    assert [one.method for one in registry.requests()] == ["POST", "HEAD"]


async def test_a_mount_that_becomes_an_upload_is_false_and_leaves_no_upload(registry, make):
    """202: the upload that the registry began instead is dropped."""
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="mount/nothing")
    assert await client.mount_blob(target, digest_of(b"nowhere"), "mount/empty", authorizer) is False
    assert [(one.method, one.status) for one in registry.requests()] == [("POST", 202), ("DELETE", 204)]


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_refused_mount_is_false(registry_proxy, make, status):
    """A mount that the registry refuses, however, may be followed by an upload."""
    registry_proxy.script(Respond(status), of=lambda seen: seen.method == "POST", times=None)
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="mount/refused")
    assert await client.mount_blob(target, digest_of(b"x"), "mount/from", authorizer) is False


async def test_an_upload_arrives_whole_and_tells_its_progress(registry, make):
    """One POST, one PUT; the bytes are there afterwards."""
    data = bytes(range(256)) * 8192
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/load")
    told = []
    await client.upload_blob(target, descriptor_of(data), opener(data), authorizer, told.append)
    assert registry.call("GET", f"/v2/up/load/blobs/{digest_of(data)}")[2] == data
    assert told == sorted(told)
    assert told[-1] == len(data)
    assert [one.method for one in registry.requests()][:2] == ["POST", "PUT"]


async def test_an_empty_blob_can_be_uploaded(registry, make):
    """Zero bytes is a legal size."""
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/empty")
    await client.upload_blob(target, descriptor_of(b""), opener(b""), authorizer)
    assert await client.blob_exists(target, digest_of(b""), authorizer) == 0


@pytest.mark.parametrize("fault", [Respond(500), Reset(), Respond(429, {"Retry-After": "0"})])
async def test_an_upload_begins_anew_after_a_transient_failure(registry, registry_proxy, make, fault):
    """Each try opens the stream again, from the first byte."""
    data = b"again" * 500_000
    registry_proxy.script(fault, of=uploads)
    client, authorizer = make()
    opened = []
    target = ProviderHandle(registry=registry_proxy.host, repository="up/again")
    await client.upload_blob(target, descriptor_of(data), opener(data, opened), authorizer)
    assert len(opened) == 2
    assert registry.call("GET", f"/v2/up/again/blobs/{digest_of(data)}")[2] == data


@pytest.mark.parametrize("data", [b"too short", b"much longer than it should be" * 100_000])
async def test_a_stream_of_another_size_is_refused_and_nothing_is_left(registry, make, data):
    """More or fewer bytes than the descriptor says: a typed error, once, and no upload is left behind."""
    wanted = Descriptor(media_type="x/y", digest=digest_of(data), size_bytes=1000)
    client, authorizer = make()
    opened = []
    target = ProviderHandle(registry=registry.host, repository="up/size")
    with pytest.raises(SizeMismatchError):
        await client.upload_blob(target, wanted, opener(data, opened), authorizer)
    assert len(opened) == 1
    assert registry.count("DELETE", "upload") == 1


async def test_what_the_stream_raises_is_raised_unchanged(registry, make):
    """An error of the content store is not taken for one of the registry."""

    class Failing:
        def readinto(self, buffer):
            raise BlobNotFoundError("sha256:x", "the content store")

    @contextlib.contextmanager
    def open_failing():
        yield Failing()

    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/fails")
    with pytest.raises(BlobNotFoundError, match="the content store"):
        await client.upload_blob(target, descriptor_of(b"abc"), open_failing, authorizer)


async def test_wrong_bytes_are_refused_by_the_registry(registry, make):
    """The registry hashes what it got: another digest is a definite error."""
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/wrong")
    opened = []
    with pytest.raises(RegistryProtocolError, match="DIGEST_INVALID"):
        await client.upload_blob(target, descriptor_of(b"abc"), opener(b"xyz", opened), authorizer)
    assert len(opened) == 1


async def test_a_cancelled_upload_leaves_nothing_behind(registry_proxy, registry, make, limits):
    """Cancelling ends the request, the reading thread and the upload at the registry."""
    data = b"c" * 3_000_000
    hang = Hang()
    registry_proxy.script(hang, of=uploads)
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="up/cancel")
    closed = []

    @contextlib.contextmanager
    def open_stream():
        yield io.BytesIO(data)
        closed.append(1)

    task = asyncio.create_task(client.upload_blob(target, descriptor_of(data), open_stream, authorizer))
    await asyncio.to_thread(hang.arrived.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [1]
    assert limits.held == 0
    assert [seen.method for seen in registry_proxy.seen] == ["POST", "PUT", "DELETE"]
    hang.proceed.set()


# -- forwarding ------------------------------------------------------------------------------------------------

MIB = 1024**2


class Arriving:
    """A stream whose bytes come when the test says so, and a verdict on them."""

    def __init__(self, data):
        self.data = data
        self.frontier = 0
        self.changed = threading.Condition()
        self.verdict = asyncio.get_running_loop().create_future()
        self.at = 0

    def come(self, frontier):
        with self.changed:
            self.frontier = frontier
            self.changed.notify_all()

    def readinto(self, buffer):
        with self.changed:
            while self.at >= self.frontier and self.at < len(self.data):
                assert self.changed.wait(20), "no more bytes came"
            count = min(len(buffer), self.frontier - self.at)
        buffer[:count] = self.data[self.at : self.at + count]
        self.at += count
        return count

    @contextlib.contextmanager
    def open(self):
        yield self

    async def verified(self):
        await self.verdict


def requests(proxy):
    return [seen.method for seen in proxy.seen]


async def test_a_blob_is_forwarded_while_it_arrives(registry_proxy, registry, make, limits):
    """A piece goes when it is here; the last one, which makes a blob of them, when all have proven to be right."""
    data = bytes(range(256)) * (20 * MIB // 256)
    arriving, moved = Arriving(data), []
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="forward/comes")
    forwarding = asyncio.create_task(
        client.forward_blob(
            target, descriptor_of(data), arriving.open, authorizer, moved.append, verified=arriving.verified
        )
    )
    arriving.come(9 * MIB)
    await eventually(lambda: moved == [8 * MIB])
    # While bytes are waited for nothing is under way, and no slot is held.
    assert (requests(registry_proxy), limits.held) == (["POST", "PATCH"], 0)
    arriving.come(len(data))
    await eventually(lambda: arriving.at == len(data) and len(moved) == 2)
    assert registry.call("HEAD", f"/v2/forward/comes/blobs/{digest_of(data)}")[0] == 404
    assert (requests(registry_proxy), limits.held) == (["POST", "PATCH", "PATCH"], 0)
    arriving.verdict.set_result(None)
    await forwarding
    assert requests(registry_proxy) == ["POST", "PATCH", "PATCH", "PUT"]
    assert await client.blob_exists(target, digest_of(data), authorizer) == len(data)


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 16 * MIB, 16 * MIB + 1])
async def test_blobs_of_every_size_can_be_forwarded(registry, make, size):
    """Less than a piece, whole pieces, and a byte more."""
    data = b"f" * size
    arriving = Arriving(data)
    arriving.come(size)
    arriving.verdict.set_result(None)
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="forward/sizes")
    await client.forward_blob(target, descriptor_of(data), arriving.open, authorizer, verified=arriving.verified)
    assert await client.blob_exists(target, digest_of(data), authorizer) == size


async def test_bytes_that_turn_out_wrong_never_become_a_blob(registry_proxy, registry, make):
    """The end is withheld, and what was sent is dropped."""
    data = b"w" * (9 * MIB)
    arriving = Arriving(data)
    arriving.come(len(data))
    arriving.verdict.set_exception(DigestMismatchError(digest_of(b"a"), digest_of(b"b"), "the source"))
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="forward/wrong")
    with pytest.raises(DigestMismatchError):
        await client.forward_blob(target, descriptor_of(data), arriving.open, authorizer, verified=arriving.verified)
    assert requests(registry_proxy) == ["POST", "PATCH", "DELETE"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Respond(405), RegistryProtocolError),
        (Respond(416), RegistryProtocolError),
        (Respond(503), UnavailableError),
        (Reset(), UnavailableError),
    ],
    ids=["no pieces", "out of range", "unavailable", "reset"],
)
async def test_a_registry_that_takes_no_pieces_is_asked_once(registry_proxy, make, fault, error):
    """There is another way to upload: nothing is tried again here, and nothing is left behind."""
    data = b"n" * (9 * MIB)
    registry_proxy.script(fault, of=lambda seen: seen.method == "PATCH", times=None)
    arriving = Arriving(data)
    arriving.come(len(data))
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="forward/refused")
    with pytest.raises(error):
        await client.forward_blob(target, descriptor_of(data), arriving.open, authorizer, verified=arriving.verified)
    assert requests(registry_proxy) == ["POST", "PATCH", "DELETE"]
    arriving.verdict.cancel()


async def test_pieces_go_to_no_other_host(registry_proxy, make):
    """The caller's authorization would go along with each; and one that wants huge pieces is not served from memory."""
    data = b"h" * (9 * MIB)
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="forward/elsewhere")
    for headers in (
        {"Location": "http://127.0.0.2:1/v2/x"},
        {"Location": f"{registry_proxy.url}/v2/forward/elsewhere/blobs/uploads/x", "OCI-Chunk-Min-Length": "99999999"},
    ):
        registry_proxy.forget()
        registry_proxy.script(Respond(202, headers), of=lambda seen: seen.method == "POST")
        arriving = Arriving(data)
        arriving.come(len(data))
        with pytest.raises(RegistryProtocolError):
            await client.forward_blob(
                target, descriptor_of(data), arriving.open, authorizer, verified=arriving.verified
            )
        assert "PATCH" not in requests(registry_proxy)
        arriving.verdict.cancel()


@pytest.mark.parametrize("there", [-1, 1], ids=["fewer", "more"])
async def test_a_forwarded_stream_of_another_length_is_refused(registry, make, there):
    """Not the blob that was meant; nothing becomes of it."""
    data = b"l" * (9 * MIB)
    arriving = Arriving(data[:there] if there < 0 else data + b"l")
    arriving.come(len(arriving.data))
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="forward/length")
    with pytest.raises(SizeMismatchError):
        await client.forward_blob(target, descriptor_of(data), arriving.open, authorizer, verified=arriving.verified)
    arriving.verdict.cancel()


async def test_a_forwarding_that_is_cancelled_leaves_nothing_behind(registry_proxy, make, limits):
    """What was begun at the registry is dropped."""
    data = b"c" * (20 * MIB)
    arriving, moved = Arriving(data), []
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="forward/cancel")
    forwarding = asyncio.create_task(
        client.forward_blob(
            target, descriptor_of(data), arriving.open, authorizer, moved.append, verified=arriving.verified
        )
    )
    arriving.come(9 * MIB)
    await eventually(lambda: moved)
    forwarding.cancel()
    arriving.come(len(data))
    with pytest.raises(asyncio.CancelledError):
        await forwarding
    assert (requests(registry_proxy), limits.held) == (["POST", "PATCH", "DELETE"], 0)
    arriving.verdict.cancel()


def of_drops(seen):
    """Match what drops an upload."""
    return seen.method == "DELETE"


async def fail_upload(client, target, authorizer):
    await client.upload_blob(target, descriptor_of(b"abcd"), opener(b"abc"), authorizer)


async def fail_forwarding(client, target, authorizer):
    async def verified():
        pytest.fail("a stream that is too short was asked for its verdict")

    await client.forward_blob(target, descriptor_of(b"abcd"), opener(b"abc"), authorizer, verified=verified)


async def fail_mount(client, target, authorizer):
    await client.mount_blob(target, digest_of(b"nowhere"), "drop/empty", authorizer)


@pytest.mark.parametrize("failing", [fail_upload, fail_forwarding, fail_mount])
async def test_a_cancellation_while_an_upload_is_dropped_waits_for_that(registry, registry_proxy, make, failing):
    """Failed and cancelled at once, as a push whose source lies: no upload stays behind at the registry."""
    hang = Hang()
    registry_proxy.script(hang, of=of_drops)
    client, authorizer = make()
    target = ProviderHandle(registry=registry_proxy.host, repository="drop/cancelled")
    task = asyncio.create_task(failing(client, target, authorizer))
    assert await asyncio.to_thread(hang.arrived.wait, 10)
    task.cancel()
    # The registry has not dropped it yet: whoever goes now may close the client under it.
    assert await asyncio.wait({task}, timeout=0.1) == (set(), {task})
    hang.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert registry.count("DELETE", "upload") == 1


async def test_a_pushed_manifest_can_be_pulled(registry, make):
    """Blobs, then the manifest, by tag: what comes back is what was pushed."""
    image = random_image(20)
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/image")
    for data in (image.config, *(layer.data for layer in image.layers)):
        await client.upload_blob(target, descriptor_of(data), opener(data), authorizer)
    assert await client.push_manifest(target, "1", image.media_type, image.manifest, authorizer) == image.digest
    found = await client.resolve(parse_reference(f"{registry.host}/up/image:1"), AMD64, authorizer)
    assert found.manifest_bytes == image.manifest


async def test_a_manifest_whose_blobs_are_missing_is_refused_with_the_registrys_reason(registry, make):
    """The registry's own code is in the message."""
    image = random_image(21)
    client, authorizer = make()
    target = ProviderHandle(registry=registry.host, repository="up/hollow")
    with pytest.raises(RegistryProtocolError, match="MANIFEST_BLOB_UNKNOWN"):
        await client.push_manifest(target, "1", image.media_type, image.manifest, authorizer)


# -- basic auth ---------------------------------------------------------------------------------------------


async def test_basic_auth(tmp_path, make):
    """Right credentials work, and are sent at once the second time; wrong and missing ones are denied."""
    storage = tmp_path / "storage"
    with (
        docker_registry(htpasswd_config(tmp_path), storage=storage) as private,
        docker_registry(storage=storage) as back,
    ):
        back.push("basic/image", "1", random_image(22))
        reference = parse_reference(f"{private.host}/basic/image:1")
        client, authorizer = make(given={private.host: (HTPASSWD_USER, HTPASSWD_PASSWORD)})
        await client.resolve(reference, AMD64, authorizer)
        await client.resolve(reference, AMD64, authorizer)
        _, nobody = make()
        with pytest.raises(AccessDeniedError, match="no credentials"):
            await client.resolve(reference, AMD64, nobody)
        _, wrong = make(given={private.host: (HTPASSWD_USER, "wrong")})
        with pytest.raises(AccessDeniedError) as caught:
            await client.resolve(reference, AMD64, wrong)
        assert "wrong" not in repr(caught.value)
