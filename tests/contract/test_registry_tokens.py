"""Bearer tokens: a real docker-registry that trusts a real token server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import weakref

import pytest

from cluster.config import Config, RegistryConfig
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import AccessDeniedError, InsecureRegistryError, RateLimitedError, RegistryProtocolError
from cluster.ports import Authorization, AuthRequest, Slot
from cluster.provider import ProviderHandle
from cluster.reference import parse_platform, parse_reference
from storage.registry.auth import CredentialAuthorizer
from storage.registry.client import RegistryClient
from storage.registry.credentials import Credential, CredentialSource
from tests.doubles.registry import random_image
from tests.doubles.registry_faults import Respond, manifests, registry_fault_proxy, uploads

pytestmark = pytest.mark.registry

AMD64 = parse_platform("linux/amd64")
CONFIG = Config(registries={"default": RegistryConfig(timeout_s=5, attempts=3, retry_budget_s=10)})


class NoLimits:
    @contextlib.asynccontextmanager
    async def slot(self, host, *, deadline_s, budget):
        yield Slot(host)

    async def throttled(self, slot, retry_after_s):
        pass

    async def succeeded(self, slot):
        pass

    async def failed(self, slot, failure):
        pass


@pytest.fixture
async def client():
    found = RegistryClient(CONFIG, limiter=NoLimits())
    yield found
    await found.aclose()


@pytest.fixture
async def as_user():
    """Make an authorizer: ``as_user(host, user, password)``, or anonymous without arguments."""
    made = []

    def build(host=None, user="", password="", *, credential=None, clock=None):
        given = {host: credential or (user, password)} if host else None
        more = {"clock": clock} if clock else {}
        made.append(CredentialAuthorizer(CredentialSource(given), CONFIG, identity_key=b"key", **more))
        return made[-1]

    yield build
    for one in made:
        await one.aclose()


@pytest.fixture
def private(token_registry):
    """A registry with one image in ``team/app`` that alice may pull and push."""
    token_registry.tokens.allow("alice", "wonderland", {"team/app": {"pull", "push"}})
    token_registry.registry.push("team/app", "1", random_image(1))
    token_registry.registry.forget()
    return token_registry


def app(private, tag="1"):
    return parse_reference(f"{private.registry.host}/team/app:{tag}")


async def test_a_pull_costs_one_token(private, client, as_user):
    """One manifest GET that counts, one config GET, one token request; the second pull needs no token."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    await client.resolve(app(private), AMD64, alice)
    assert private.registry.count("GET", "manifest", 200) == 1
    assert private.registry.count("GET", "manifest", 401) == 1
    assert private.registry.count("GET", "blob") == 1
    assert [one.status for one in private.tokens.requests] == [200]
    private.registry.forget()
    await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 1
    assert private.registry.count("GET", "manifest", 401) == 0


async def test_another_client_of_the_same_caller_uses_its_token(private, client, as_user):
    """The authorizer answers from its cache before the registry is asked: no challenge, no token request."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    await client.resolve(app(private), AMD64, alice)
    private.registry.forget()
    second = RegistryClient(CONFIG, limiter=NoLimits())
    await second.resolve(app(private), AMD64, alice)
    await second.aclose()
    assert len(private.tokens.requests) == 1
    assert private.registry.count("GET", "manifest") == 1


async def test_many_pulls_at_once_cost_one_token(private, client, as_user):
    """Callers that need the same token at the same time share one request for it."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    await asyncio.gather(*(client.resolve(app(private), AMD64, alice) for _ in range(8)))
    assert len(private.tokens.requests) == 1


async def test_a_cancelled_caller_does_not_take_the_token_from_the_others(private, as_user, monkeypatch):
    """The request for a token that several wait for goes on when one of them is cancelled."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    challenge = f'Bearer realm="{private.tokens.url}/token",service="test-registry"'
    request = AuthRequest(
        registry=private.registry.host, plain_http=True, scopes=("repository:team/app:pull",), challenge=challenge
    )
    joined, bearer = asyncio.Semaphore(0), alice._bearer

    def join(*args):
        # Runs up to the shared request before anything else does.
        joined.release()
        return bearer(*args)

    monkeypatch.setattr(alice, "_bearer", join)
    private.tokens.gate.clear()
    first, second = (asyncio.create_task(alice.authorize(request)) for _ in range(2))
    await joined.acquire()
    await joined.acquire()
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    private.tokens.gate.set()
    assert (await second).header.startswith("Bearer ")
    assert len(private.tokens.requests) == 1


async def test_without_rights_access_is_denied(private, client, as_user):
    """Anonymous, a user without rights, a wrong password: AccessDeniedError, and no secret in it."""
    private.tokens.allow("bob", "builder", {})
    for who in (
        as_user(),
        as_user(private.registry.host, "bob", "builder"),
        as_user(private.registry.host, "alice", "oyster"),
    ):
        with pytest.raises(AccessDeniedError) as caught:
            await client.resolve(app(private), AMD64, who)
        assert "oyster" not in f"{caught.value!r} {caught.value}"


async def test_one_callers_token_never_serves_another(private, client, as_user):
    """Alice's pull leaves nothing that lets bob in."""
    alice, bob = as_user(private.registry.host, "alice", "wonderland"), as_user()
    await client.resolve(app(private), AMD64, alice)
    with pytest.raises(AccessDeniedError):
        await client.resolve(app(private), AMD64, bob)


async def test_anonymous_tokens(private, client, as_user):
    """Without credentials a token is asked for without any; it is enough where everybody may read."""
    private.tokens.allow("", "", {"team/app": {"pull"}})
    await client.resolve(app(private), AMD64, as_user())
    assert [(one.user, one.status) for one in private.tokens.requests] == [("", 200)]


async def test_an_expired_token_is_renewed_before_it_is_used(private, client, as_user):
    """A token is used for 0.9 of its life, then a new one is asked for."""
    now = [1000.0]
    client.authorizations._clock = lambda: now[0]
    alice = as_user(private.registry.host, "alice", "wonderland", clock=lambda: now[0])
    private.tokens.expires_in = 100
    await client.resolve(app(private), AMD64, alice)
    now[0] += 89
    await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 1
    now[0] += 2
    await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 2


@pytest.mark.parametrize("expires_in", [None, 0])
async def test_a_token_without_an_end_holds_sixty_seconds(private, client, as_user, expires_in):
    """Missing or zero expires_in means 60 s, of which 54 are used."""
    now = [1000.0]
    client.authorizations._clock = lambda: now[0]
    alice = as_user(private.registry.host, "alice", "wonderland", clock=lambda: now[0])
    private.tokens.expires_in = expires_in
    await client.resolve(app(private), AMD64, alice)
    now[0] += 53
    await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 1
    now[0] += 2
    await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 2


async def test_a_token_that_the_registry_refuses_is_replaced_once(private, client, as_user):
    """A token over before its time (401 midway) costs one more request; everybody who was refused shares it."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    private.tokens.makes_expired = True
    with pytest.raises(AccessDeniedError):
        await client.resolve(app(private), AMD64, alice)
    assert len(private.tokens.requests) == 2, "one for the challenge, one anew, and no more"
    private.tokens.makes_expired = False
    await client.resolve(app(private), AMD64, alice)

    private.tokens.requests.clear()
    for slots in client.authorizations._slots.values():
        for slot in slots.values():
            slot.held.header = "Bearer stale"
    await asyncio.gather(*(client.resolve(app(private), AMD64, alice) for _ in range(5)))
    assert len(private.tokens.requests) == 1


async def test_a_401_midway_is_answered(private, client, as_user):
    """The registry changes its mind between two requests: the challenge is answered again."""
    with registry_fault_proxy(private.registry.url) as proxy:
        reference = parse_reference(f"{proxy.host}/team/app:1")
        alice = as_user(proxy.host, "alice", "wonderland")
        await client.resolve(reference, AMD64, alice)
        challenge = f'Bearer realm="{private.tokens.url}/token",service="test-registry",error="invalid_token"'
        proxy.script(Respond(401, {"WWW-Authenticate": challenge}), of=manifests)
        await client.resolve(reference, AMD64, alice)
        assert len(private.tokens.requests) == 2


async def test_identity_tokens_are_exchanged_by_post(private, client, as_user):
    """An identity token goes to the token server in a form, never in a URL."""
    private.tokens.refresh_tokens["refresh-me"] = "alice"
    alice = as_user(private.registry.host, credential=Credential(identity_token="refresh-me"))
    await client.resolve(app(private), AMD64, alice)
    assert [(one.method, one.user) for one in private.tokens.requests] == [("POST", "alice")]


async def test_a_server_without_post_is_asked_by_get(private, client, as_user):
    """404 and 405 to the form: the user and password are used, where there are any."""
    private.tokens.takes_post = False
    both = Credential(username="alice", secret="wonderland", identity_token="unused")
    await client.resolve(app(private), AMD64, as_user(private.registry.host, credential=both))
    assert [(one.method, one.status) for one in private.tokens.requests] == [("POST", 405), ("GET", 200)]


async def test_a_token_server_that_limits_is_reported_as_such(private, client, as_user):
    """429 from the token server is retried as its Retry-After says, and never becomes a 404."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    private.tokens.script = [(429, {"Retry-After": "0"})]
    await client.resolve(app(private), AMD64, alice)
    private.tokens.script = [(429, {"Retry-After": "7200"})] * 9
    with pytest.raises(RateLimitedError, match="token server") as caught:
        await client.resolve(app(private), AMD64, as_user(private.registry.host, "alice", "wonderland"))
    assert caught.value.retry_after_s == 7200


@pytest.mark.parametrize("status", [404, 400])
async def test_a_token_server_that_answers_nonsense_is_named(private, client, as_user, status):
    """A 404 of the token server is not a missing image."""
    private.tokens.script = [(status, {})] * 9
    with pytest.raises(RegistryProtocolError, match="token server"):
        await client.resolve(app(private), AMD64, as_user())


@pytest.mark.parametrize("status", [401, 403])
async def test_a_token_server_that_refuses_denies_access(private, client, as_user, status):
    """401 and 403 of the token server are AccessDeniedError, at once."""
    private.tokens.script = [(status, {})] * 9
    with pytest.raises(AccessDeniedError, match="token server"):
        await client.resolve(app(private), AMD64, as_user())
    assert len(private.tokens.requests) == 1


async def test_credentials_are_not_sent_to_a_realm_without_tls(as_user):
    """A challenge that names a plain HTTP realm elsewhere gets nothing."""
    alice = as_user("registry.example", "alice", "wonderland")
    request = AuthRequest(
        registry="registry.example",
        scopes=("repository:a:pull",),
        challenge='Bearer realm="http://tokens.example/token"',
    )
    with pytest.raises(InsecureRegistryError, match=r"tokens\.example"):
        await alice.authorize(request)


async def test_a_blob_is_mounted_only_with_rights_to_both(private, client, as_user):
    """With a token for both repositories 201; without rights to the source False, and an upload may follow."""
    image = random_image(1)
    digest = image.layers[0].digest
    private.tokens.allow("carol", "carols", {"team/app": {"pull"}, "carol/copy": {"pull", "push"}})
    private.tokens.allow("dave", "daves", {"dave/copy": {"pull", "push"}})
    carol = as_user(private.registry.host, "carol", "carols")
    dave = as_user(private.registry.host, "dave", "daves")
    host = private.registry.host
    to_carol = ProviderHandle(registry=host, repository="carol/copy")
    to_dave = ProviderHandle(registry=host, repository="dave/copy")
    assert await client.mount_blob(to_carol, digest, "team/app", carol) is True
    assert private.tokens.requests[-1].scopes == ("repository:carol/copy:pull,push", "repository:team/app:pull")
    assert await client.mount_blob(to_dave, digest, "team/app", dave) is False
    private.tokens.allow("", "", {"team/app": {"pull"}})
    before = len(private.tokens.requests)
    assert await client.mount_blob(to_carol, digest_of(b"none"), "team/app", carol) is False, "202"
    assert await client.mount_blob(to_carol, digest, "team/app", carol) is True
    dropping = {one.scopes for one in private.tokens.requests[before:]}
    assert dropping == {("repository:carol/copy:delete,pull,push",)}, "a refused drop costs no other token"
    private.tokens.is_strict = True
    assert await client.mount_blob(to_dave, digest_of(b"other"), "team/app", dave) is False, "403 of the token server"


async def test_a_token_that_ends_during_an_upload_is_renewed(private, client, as_user):
    """A 401 to the PUT begins the upload anew with a fresh token."""
    data = b"x" * 1_000_000
    wanted = Descriptor(media_type="x/y", digest=digest_of(data), size_bytes=len(data))
    with registry_fault_proxy(private.registry.url) as proxy:
        alice = as_user(proxy.host, "alice", "wonderland")
        challenge = f'Bearer realm="{private.tokens.url}/token",service="test-registry",error="invalid_token"'
        proxy.script(Respond(401, {"WWW-Authenticate": challenge}), of=uploads)
        target = ProviderHandle(registry=proxy.host, repository="team/app")
        await client.upload_blob(target, wanted, lambda: contextlib.closing(io.BytesIO(data)), alice)
        scopes = [one.scopes for one in private.tokens.requests]
        assert scopes.count(("repository:team/app:pull,push",)) == 2
        assert await client.blob_exists(target, wanted.digest, alice) == len(data)


async def test_what_a_caller_was_authorized_with_goes_with_it(private, client, as_user):
    """The pool holds callers weakly: nothing of a session that ended stays."""

    class Caller:
        def __init__(self, inner):
            self.inner = inner

        def identity(self, registry):
            return self.inner.identity(registry)

        async def authorize(self, request):
            return await self.inner.authorize(request)

    caller = Caller(as_user(private.registry.host, "alice", "wonderland"))
    await client.resolve(app(private), AMD64, caller)
    assert len(client.authorizations._slots) == 1
    gone = weakref.ref(caller)
    del caller
    gc.collect()
    assert gone() is None
    assert len(client.authorizations._slots) == 0


async def test_no_secret_is_shown(private, client, as_user):
    """Neither a password nor a token is in any repr."""
    alice = as_user(private.registry.host, "alice", "wonderland")
    await client.resolve(app(private), AMD64, alice)
    shown = " ".join(
        repr(one)
        for one in (
            alice,
            alice._credentials,
            client,
            *alice._tokens.items(),
            *client.authorizations._slots.values(),
            Authorization("Bearer secret"),
            Credential(username="alice", secret="wonderland", identity_token="wonderland"),
        )
    )
    assert "wonderland" not in shown
    assert "Bearer" not in shown


def test_identity_is_the_same_for_the_same_and_tells_nothing(as_user):
    """A keyed hash of registry, user and secret; ``anonymous`` without credentials."""
    config, key = Config(), b"key"

    def identity(user, password, registry="r.example", key=key):
        source = CredentialSource({registry: (user, password)})
        return CredentialAuthorizer(source, config, identity_key=key).identity(registry)

    assert identity("alice", "a") == identity("alice", "a")
    others = {
        identity("alice", "a"),
        identity("alice", "b"),
        identity("alicea", ""),
        identity("alice", "a", "s.example"),
        identity("alice", "a", key=b"other"),
    }
    assert len(others) == 5
    assert CredentialAuthorizer(CredentialSource(), config, identity_key=key).identity("r.example") == "anonymous"
