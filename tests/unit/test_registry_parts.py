"""The registry client's pure parts: challenges, scopes, addresses, Retry-After, retries."""

from __future__ import annotations

import pytest

from cluster.config import Config, RegistryConfig
from cluster.errors import AccessDeniedError, CircuitOpenError, RateLimitedError, UnavailableError
from cluster.fetch.retry import RetryPolicy
from cluster.provider import ProviderHandle
from storage.registry.answers import error_detail, raise_if_transient, retry_after_s
from storage.registry.challenge import covers, merge_scopes, parse_challenges
from storage.registry.endpoint import endpoints, is_loopback, origin, registry_config

# -- challenges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://t/token",service="s",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://t/token", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        ('Basic realm="a, b=\\"c\\""', [("basic", {"realm": 'a, b="c"'})]),
        ('BEARER Realm = "x" , service=y', [("bearer", {"realm": "x", "service": "y"})]),
        (
            "Bearer realm=https://t/x,scope=repository:a:pull",
            [("bearer", {"realm": "https://t/x", "scope": "repository:a:pull"})],
        ),
        ('Basic realm="a", Bearer realm="b"', [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})]),
        ("Negotiate YWJj==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate", [("negotiate", {})]),
        ("Negotiate, Basic", [("negotiate", {}), ("basic", {})]),
        ('Bearer realm="unterminated', [("bearer", {"realm": ""})]),
        ("", []),
        (' , "junk"', []),
    ],
)
def test_challenges_are_parsed(header, expected):
    """Quoted commas, several challenges, unquoted values, and nonsense that ends the list."""
    assert [(one.scheme, one.parameters) for one in parse_challenges(header)][: len(expected)] == expected


def test_scopes_of_one_resource_are_merged():
    """Two sets that ask for the same are equal; names may have colons."""
    assert merge_scopes(["repository:b:pull", "repository:a:push", "repository:a:pull"]) == (
        "repository:a:pull,push",
        "repository:b:pull",
    )
    assert merge_scopes(["repository:h:1/a:push,pull", ""]) == ("repository:h:1/a:pull,push",)


def test_a_wider_token_covers_a_narrower_wish():
    """Actions and resources are compared one by one."""
    held = ("repository:a:pull,push", "repository:b:pull")
    assert covers(held, ["repository:a:pull"])
    assert covers(held, ["repository:a:pull,push", "repository:b:pull"])
    assert not covers(held, ["repository:b:push"])
    assert not covers(held, ["repository:c:pull"])
    assert not covers([], ["registry:catalog:*"])


# -- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("a.localhost:1", True),
        ("127.0.0.1:5000", True),
        ("127.8.8.8", True),
        ("[::1]:5000", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("registry.example:5000", False),
    ],
)
def test_loopback_is_told_without_dns(host, expected):
    """By name or address; a name that merely resolves there doesn't count."""
    assert is_loopback(host) is expected


def test_plain_http_only_where_it_is_allowed():
    """Loopback, configuration or the caller's flag; an authority configured for loopback means TLS."""

    def scheme(host, config=None, **more):
        handle = ProviderHandle(registry=host, repository="a", **more)
        return origin(Config(registries={host: config} if config else {}), handle).scheme

    assert scheme("registry.example") == "https"
    assert scheme("registry.example", RegistryConfig(plain_http=True)) == "http"
    assert scheme("registry.example", plain_http=True) == "http"
    assert scheme("127.0.0.1:5000") == "http"
    assert scheme("127.0.0.1:5000", RegistryConfig(ca_file="/ca.pem")) == "https"


def test_the_callers_flag_is_not_for_mirrors():
    """--plain-http says something of the registry that was named, of no other."""
    config = Config(registries={"r.example": RegistryConfig(mirrors=("m.example",))})
    handle = ProviderHandle(registry="r.example", repository="a", plain_http=True)
    assert [one.scheme for one in endpoints(config, handle)] == ["https", "http"]


def test_docker_hub_is_configured_under_either_name():
    """docker.io is what people write, registry-1.docker.io what is asked."""
    config = Config(registries={"docker.io": RegistryConfig(mirrors=("m.example",))})
    assert registry_config(config, "registry-1.docker.io").mirrors == ("m.example",)
    handle = ProviderHandle(registry="registry-1.docker.io", repository="library/debian")
    assert [one.registry for one in endpoints(config, handle)] == ["m.example", "registry-1.docker.io"]


def test_addresses():
    """As the distribution-spec says; what a query holds is escaped."""
    one = origin(Config(), ProviderHandle(registry="[::1]:5000", repository="a/b"))
    assert one.blob_url("sha256:x") == "http://[::1]:5000/v2/a/b/blobs/sha256:x"
    assert one.manifest_url("1") == "http://[::1]:5000/v2/a/b/manifests/1"
    assert one.upload_url() == "http://[::1]:5000/v2/a/b/blobs/uploads/"
    assert one.upload_url(mount="sha256:x", from_="c/d&e").endswith("/blobs/uploads/?mount=sha256:x&from=c/d%26e")


# -- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        (" 1.5 ", 1.5),
        ("-3", 0),
        ("nan", 0),
        ("inf", 86400),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 59),
        ("Fri, 31 Dec 1999 23:00:00 GMT", 0),
        ("tomorrow", 0),
        ("", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    """What can't be read is 0; nobody is made to wait for more than a day."""
    assert retry_after_s(value, now_wall_s=946684740.0) == seconds


def test_what_may_change_is_raised():
    """429, 5xx and 408 are transient; 501 and 505 stay as they are, like all others."""
    for status in (200, 206, 307, 401, 403, 404, 416, 501, 505):
        raise_if_transient(status, {}, what="x")
    for status in (408, 425, 500, 502, 503, 504, 507):
        with pytest.raises(UnavailableError):
            raise_if_transient(status, {}, what="x")
    for status in (429, 503):
        with pytest.raises(RateLimitedError) as caught:
            raise_if_transient(status, {"Retry-After": "3"}, what="x")
        assert caught.value.retry_after_s == 3


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"errors":[{"code":"DENIED","message":"no\\n\\u001b[31m"}]}', "DENIED: no  [31m"),
        (b'{"errors":[]}', "no reason given"),
        (b'{"errors":{}}', "no reason given"),
        (b"<html>", "no reason given"),
        (b"", "no reason given"),
        (b"[1]", "no reason given"),
        (b"[" * 100_000, "no reason given"),
    ],
)
def test_a_registrys_reason_is_shown_as_plain_text(body, detail):
    """No control characters reach a terminal, whatever a registry writes."""
    assert error_detail(body) == detail


# -- retries ------------------------------------------------------------------------------------------------

POLICY = RetryPolicy(attempts=4, budget_s=30)
DOWN = UnavailableError("r", "HTTP 500")


def test_only_what_may_change_is_tried_again():
    """A definite error ends it, and so does the last try."""
    assert POLICY.next_delay_s(DOWN, 1, 0.0, 0.5) is not None
    assert POLICY.next_delay_s(AccessDeniedError("a", "r", "x"), 1, 0.0, 0.5) is None
    assert POLICY.next_delay_s(ValueError(), 1, 0.0, 0.5) is None
    assert POLICY.next_delay_s(DOWN, 4, 0.0, 0.5) is None


def test_a_host_that_is_given_up_is_not_tried_again():
    """Not even with budget left: the cluster tries it, once for all."""
    assert POLICY.next_delay_s(CircuitOpenError("r.example", 1.0, "HTTP 500", 5.0), 1, 0.0, 0.5) is None


def test_delays_grow_under_a_ceiling_and_are_drawn_evenly():
    """Full jitter: between 0 and base * 2^n, capped."""
    policy = RetryPolicy(attempts=10_000, budget_s=1e9, base_s=1, cap_s=8)
    assert [policy.next_delay_s(DOWN, n, 0, 1.0) for n in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 8, 8]
    assert policy.next_delay_s(DOWN, 3, 0, 0.0) == 0
    assert policy.next_delay_s(DOWN, 3, 0, 0.25) == 1


def test_retry_after_is_a_floor_and_the_budget_a_ceiling():
    """Nobody asks before they are told to, or waits for what comes too late."""
    assert POLICY.next_delay_s(RateLimitedError("r", "429", 5.0), 1, 0, 0.0) == 5
    assert POLICY.next_delay_s(RateLimitedError("r", "429", 31.0), 1, 0, 0.0) is None
    assert POLICY.next_delay_s(RateLimitedError("r", "429", 5.0), 1, 26, 0.0) is None
    assert POLICY.next_delay_s(DOWN, 1, 30.1, 0.0) is None


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"budget_s": -1}, {"base_s": 0}, {"base_s": 11}])
def test_an_impossible_policy_is_refused(wrong):
    """At least one try, and times that can be meant."""
    with pytest.raises(ValueError, match="impossible"):
        RetryPolicy(**{"attempts": 1, "budget_s": 1, **wrong})
