"""The byte path against a real docker-registry: ranges, refusals, broken bodies."""

from __future__ import annotations

import socket
import threading

import pytest

from cluster.config import Config, FetchConfig, RegistryConfig
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    ChallengedError,
    DeadlineExceededError,
    InsecureRegistryError,
    RangeRefusedError,
    RateLimitedError,
    RegistryProtocolError,
    SizeMismatchError,
    UnavailableError,
    UntrustedCertificateError,
)
from cluster.provider import FARM, ProviderHandle
from storage.registry.blob import BlobSource
from storage.registry.endpoint import Endpoint
from tests.doubles.registry import docker_registry, htpasswd_config, make_authority
from tests.doubles.registry_faults import (
    Hang,
    IgnoreRange,
    RedirectTo,
    RefuseRange,
    Reset,
    Respond,
    Truncate,
    registry_fault_proxy,
)

pytestmark = pytest.mark.registry

DATA = bytes(range(256)) * 4096
DIGEST = digest_of(DATA)
REPOSITORY = "blob/path"
ALICE = "Basic YWxpY2U6d29uZGVybGFuZA=="


@pytest.fixture(scope="module")
def filled(registry_server):
    registry_server.push_blob(REPOSITORY, DATA)
    return registry_server


@pytest.fixture
def proxy(filled):
    with registry_fault_proxy(filled.url) as found:
        yield found


@pytest.fixture
def source():
    found = BlobSource(Config(fetch=FetchConfig(stall_timeout_s=0.5)))
    yield found
    found.close()


def handle_of(server):
    return ProviderHandle(registry=server.host, repository=REPOSITORY)


def read_all(response, found=None):
    """Read a response to its end through one buffer; *found* has what came also where it breaks off."""
    found, buffer = bytearray() if found is None else found, memoryview(bytearray(100_000))
    while count := response.readinto(buffer):
        found += buffer[:count]
    return bytes(found)


def test_a_blob_is_read_whole(filled, source):
    """200: every byte, the size known from the head."""
    with source.open(handle_of(filled), DIGEST, size_bytes=len(DATA)) as response:
        assert (response.status, response.offset, response.total_bytes) == (200, 0, len(DATA))
        assert read_all(response) == DATA
        assert response.read_bytes == len(DATA)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 10, DATA[:10]),
        (1000, 5000, DATA[1000:6000]),
        (len(DATA) - 3, None, DATA[-3:]),
        (len(DATA) - 3, 100, DATA[-3:]),
        (5, None, DATA[5:]),
    ],
)
def test_a_range_is_read(filled, source, offset, length, expected):
    """206: exactly the bytes asked for, or what there is of them; the blob's whole size is told."""
    with source.open(handle_of(filled), DIGEST, offset=offset, length=length, size_bytes=len(DATA)) as response:
        assert (response.status, response.offset, response.total_bytes) == (206, offset, len(DATA))
        assert read_all(response) == expected


def test_an_empty_blob_is_read(filled, source):
    """Zero bytes end at once."""
    filled.push_blob(REPOSITORY, b"")
    with source.open(handle_of(filled), digest_of(b""), size_bytes=0) as response:
        assert read_all(response) == b""


def test_connections_are_kept_alive(filled, source):
    """A response that was read to its end gives its connection to the next; one that wasn't doesn't."""
    for _ in range(3):
        with source.open(handle_of(filled), DIGEST, length=100) as response:
            read_all(response)
        assert "1 idle" in repr(source)
    with source.open(handle_of(filled), DIGEST) as response:
        response.readinto(memoryview(bytearray(10)))
    assert "0 idle" in repr(source)


def test_an_idle_connection_that_was_lost_is_replaced(filled, source):
    """A server that closed an idle connection has not failed: the request goes over a new one."""
    with source.open(handle_of(filled), DIGEST, length=10) as response:
        read_all(response)
    for idle in source._pool._idle.values():
        for _, connection in idle:
            connection.sock.shutdown(socket.SHUT_RDWR)
    with source.open(handle_of(filled), DIGEST, length=10) as response:
        assert read_all(response) == DATA[:10]


def test_many_threads_read_at_once(filled, source):
    """One source serves all threads; each gets its own bytes."""
    found = {}

    def read(n):
        with source.open(handle_of(filled), DIGEST, offset=n * 1000, length=1000) as response:
            found[n] = read_all(response)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: DATA[n * 1000 : (n + 1) * 1000] for n in range(16)}


def test_a_registry_without_ranges_answers_the_whole(proxy, source):
    """200 to a range request: the response says that it begins at 0."""
    proxy.script(IgnoreRange())
    with source.open(handle_of(proxy), DIGEST, offset=1000, length=10) as response:
        assert (response.status, response.offset, response.total_bytes) == (200, 0, len(DATA))
        assert read_all(response) == DATA


def test_a_refused_range_says_so(proxy, source):
    """416 is an error of its own: the whole blob may still be had."""
    proxy.script(RefuseRange())
    with pytest.raises(RangeRefusedError):
        source.open(handle_of(proxy), DIGEST, offset=1000)


@pytest.mark.parametrize("content_range", ["bytes 7-16/1048576", "bytes 1000-1004/1048576", "nonsense", ""])
def test_another_range_than_was_asked_for_is_refused(proxy, source, content_range):
    """A 206 whose bytes are others than those asked for would put them in the wrong place."""
    proxy.script(Respond(206, {"Content-Range": content_range}, b"0123456789"))
    with pytest.raises(RegistryProtocolError):
        source.open(handle_of(proxy), DIGEST, offset=1000, length=10)


def test_a_blob_of_another_size_is_refused_before_its_bytes(filled, source):
    """The size is compared with the head, for the whole and for a range."""
    for more in ({}, {"offset": 10, "length": 10}):
        with pytest.raises(SizeMismatchError) as caught:
            source.open(handle_of(filled), DIGEST, size_bytes=5, **more)
        assert (caught.value.expected_bytes, caught.value.actual_bytes) == (5, len(DATA))


@pytest.mark.parametrize("fault", [Truncate(200_000), Reset(200_000)])
def test_a_body_that_breaks_off_is_unavailable(proxy, source, fault):
    """A short body is never an end: what came before it is right, and the rest can be asked for."""
    proxy.script(fault)
    with source.open(handle_of(proxy), DIGEST) as response:
        got = bytearray()
        with pytest.raises(UnavailableError):
            read_all(response, got)
        assert got == DATA[: len(got)]
        assert len(got) < len(DATA)
    with source.open(handle_of(proxy), DIGEST, offset=len(got)) as response:
        assert bytes(got) + read_all(response) == DATA


def test_a_source_that_stalls_is_given_up(proxy, source):
    """No byte for the stall timeout is a failure."""
    hang = Hang(after_bytes=100_000)
    proxy.script(hang)
    with source.open(handle_of(proxy), DIGEST) as response, pytest.raises(DeadlineExceededError):
        read_all(response)
    hang.proceed.set()


def test_another_thread_can_abort_a_read(proxy):
    """abort() ends a read that blocks, at once."""
    patient = BlobSource(Config(fetch=FetchConfig(stall_timeout_s=60)))
    hang = Hang(after_bytes=100_000)
    proxy.script(hang)
    with patient.open(handle_of(proxy), DIGEST) as response:
        errors = []

        def read():
            try:
                read_all(response)
            except UnavailableError as exc:
                errors.append(str(exc))

        thread = threading.Thread(target=read)
        thread.start()
        assert hang.arrived.wait(10)
        response.abort()
        thread.join(10)
        assert not thread.is_alive()
        assert "aborted" in errors[0]
    hang.proceed.set()
    patient.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Respond(404), BlobNotFoundError),
        (Respond(403), AccessDeniedError),
        (Respond(500), UnavailableError),
        (Respond(503, {"Retry-After": "4"}), RateLimitedError),
        (Reset(), UnavailableError),
        (Respond(418), RegistryProtocolError),
        (Respond(200, {"Content-Encoding": "gzip"}, b"x"), RegistryProtocolError),
        (Respond(307), RegistryProtocolError),
    ],
    ids=lambda one: repr(one)[:30],
)
def test_each_refusal_is_an_error_of_its_own(proxy, source, answer, error):
    """Nothing is retried here: who fetches decides."""
    proxy.script(answer, times=None)
    with pytest.raises(error):
        source.open(handle_of(proxy), DIGEST)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("", 0), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_retry_after_is_told(proxy, source, header, seconds):
    """429 carries what the registry asks for; what can't be read, or is past, is 0."""
    proxy.script(Respond(429, {"Retry-After": header}))
    with pytest.raises(RateLimitedError) as caught:
        source.open(handle_of(proxy), DIGEST)
    assert caught.value.retry_after_s == seconds


def test_a_401_carries_its_challenge(tmp_path, source):
    """Who has the session answers it; with what it says the same request succeeds."""
    with docker_registry(htpasswd_config(tmp_path), authorize=lambda scope: ALICE) as private:
        private.push_blob(REPOSITORY, DATA)
        with pytest.raises(ChallengedError) as caught:
            source.open(handle_of(private), DIGEST)
        assert caught.value.challenge.startswith("Basic realm=")
        with source.open(handle_of(private), DIGEST, length=5, authorization=ALICE) as response:
            assert read_all(response) == DATA[:5]


def test_authorization_stays_at_home(proxy, filled, source):
    """A redirect to another port gets no Authorization header; the range goes along."""
    with registry_fault_proxy(filled.url) as other:
        proxy.script(RedirectTo(other.url, "X-Amz-Signature=a%2Fb%3D"))
        with source.open(handle_of(proxy), DIGEST, offset=10, length=10, authorization=ALICE) as response:
            assert (response.status, read_all(response)) == (206, DATA[10:20])
        assert proxy.seen[0].authorization == ALICE
        assert [(one.authorization, one.range) for one in other.seen] == [(None, "bytes=10-19")]
        assert other.seen[0].path.endswith("?X-Amz-Signature=a%2Fb%3D")

        # Nor is it sent again when the way leads back.
        proxy.forget()
        other.forget()
        proxy.script(RedirectTo(other.url))
        other.script(RedirectTo(proxy.url))
        with source.open(handle_of(proxy), DIGEST, length=1, authorization=ALICE) as response:
            read_all(response)
        assert [one.authorization for one in proxy.seen] == [ALICE, None]


def test_a_401_after_a_redirect_is_no_challenge_to_us(proxy, filled, source):
    """The store that a registry redirects to has no business with the caller's credentials."""
    with registry_fault_proxy(filled.url) as other:
        proxy.script(RedirectTo(other.url))
        other.script(Respond(401, {"WWW-Authenticate": "Basic"}))
        with pytest.raises(AccessDeniedError):
            source.open(handle_of(proxy), DIGEST)


def test_redirects_for_ever_end(proxy, source):
    """A circle of redirects is an error, not a hang."""
    proxy.script(RedirectTo(proxy.url), times=None)
    with pytest.raises(RegistryProtocolError, match="redirected more than"):
        source.open(handle_of(proxy), DIGEST)


def test_mirrors_come_before_the_registry(filled):
    """The endpoints of a handle, in the order in which to try them."""
    config = Config(
        registries={
            "registry.example": RegistryConfig(mirrors=("127.0.0.1:1", "mirror.example")),
            "mirror.example": RegistryConfig(plain_http=True),
        }
    )
    handle = ProviderHandle(registry="registry.example", repository="a/b")
    found = BlobSource(config).endpoints(handle)
    assert [(one.scheme, one.registry, one.is_mirror) for one in found] == [
        ("http", "127.0.0.1:1", True),
        ("http", "mirror.example", True),
        ("https", "registry.example", False),
    ]
    assert {one.repository for one in found} == {"a/b"}


def test_what_a_build_made_is_asked_for_nowhere():
    """The content store has it, or nobody; a host of that name gets no request."""
    assert BlobSource(Config()).endpoints(FARM) == []


def test_a_foreign_layer_that_is_gone_is_told_with_its_address_and_no_secret(proxy, source):
    """Scheme, host and path: not the query, nor a user's name and password."""
    url = f"{proxy.url}/v2/{REPOSITORY}/blobs/{digest_of(b'gone')}"
    with pytest.raises(BlobNotFoundError) as caught:
        source.open(ProviderHandle(kind="urls", registry="x", repository="", urls=(f"{url}?sig=hunter2",)), DIGEST)
    assert caught.value.where == url
    signed = url.replace("http://", "http://user:hunter2@") + "?sig=hunter2"
    assert Endpoint(registry=proxy.host, repository="", scheme="http", url=signed).source == url


def test_a_foreign_layer_is_read_from_its_own_address(proxy, source):
    """Kind ``urls``: no repository, no authorization, https unless configured."""
    urls = ("http://foreign.example/x", f"{proxy.url}/v2/{REPOSITORY}/blobs/{DIGEST}", "ftp://foreign.example/x")
    handle = ProviderHandle(kind="urls", registry=proxy.host, repository="", urls=urls)
    assert [one.registry for one in source.endpoints(handle)] == [proxy.host]
    with source.open(handle, DIGEST, length=4, authorization=ALICE) as response:
        assert read_all(response) == DATA[:4]
    assert proxy.seen[0].authorization is None
    with pytest.raises(InsecureRegistryError, match=r"foreign\.example"):
        source.open(ProviderHandle(kind="urls", registry="x", repository="", urls=urls[:1]), DIGEST)


def test_tls_with_a_custom_authority(authority, tmp_path):
    """With ca_file bytes come over TLS; with another authority the error says so."""
    (tmp_path / "other").mkdir()
    other = make_authority(tmp_path / "other")
    with docker_registry(authority.registry_config, tls=authority.context) as registry:
        registry.push_blob(REPOSITORY, DATA)
        for ca_file, error in ((authority.ca_file, None), (other.ca_file, UntrustedCertificateError)):
            source = BlobSource(Config(registries={registry.host: RegistryConfig(ca_file=str(ca_file))}))
            if error is None:
                with source.open(handle_of(registry), DIGEST) as response:
                    assert read_all(response) == DATA
            else:
                with pytest.raises(error):
                    source.open(handle_of(registry), DIGEST)
            source.close()


def test_plain_http_behind_an_https_address_says_so(filled, authority):
    """TLS to a registry that speaks plain HTTP names the setting."""
    source = BlobSource(Config(registries={filled.host: RegistryConfig(ca_file=str(authority.ca_file))}))
    with pytest.raises(InsecureRegistryError, match=filled.host):
        source.open(handle_of(filled), DIGEST)
