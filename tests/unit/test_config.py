"""The configuration's checks, and that the files in configs/ say what the code does."""

import dataclasses
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

from cluster.config import Config, RegistryConfig
from cluster.config_check import RANGES, RELATIONS, RULES, check, examine, keys
from cluster.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def reasons(plain):
    return {fault.key: fault.reason for fault in examine(plain)[1]}


def test_the_default_file_says_every_default_key_for_key():
    """default.toml has exactly the keys of the code, with exactly its defaults and types."""
    plain = tomllib.loads((CONFIGS / "default.toml").read_text())
    registries = plain.pop("registries")
    expected = dataclasses.asdict(Config())
    del expected["registries"]

    assert plain == expected
    assert registries == {"default": {**dataclasses.asdict(RegistryConfig()), "mirrors": []}}
    for section, table in plain.items():
        for key, value in table.items():
            assert type(value) is type(expected[section][key]), f"{section}.{key}"


def test_the_default_file_has_a_comment_on_every_key():
    """Every key of default.toml is explained: no two keys follow each other without a comment."""
    before = ""
    for line in (CONFIGS / "default.toml").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), f"{line!r} has no comment"
        before = line


@pytest.mark.parametrize("name", ["default", "local", "production"])
def test_each_file_in_configs_passes_its_own_check(name):
    """What we hand out as examples has no fault."""
    check(tomllib.loads((CONFIGS / f"{name}.toml").read_text()), name)


def test_the_default_file_means_the_default_configuration():
    """Starting from default.toml is the same as starting from nothing."""
    config = check(tomllib.loads((CONFIGS / "default.toml").read_text()), "default.toml")
    assert dataclasses.replace(config, registries={}) == Config() == check({}, "nothing")
    assert config.registry("anything") == Config().registry("anything")


def test_every_key_has_a_check():
    """A number has a range, a text or list a rule: a key without either fails here, not in production."""
    assert set(keys()) == RANGES.keys() | RULES.keys()


def test_every_default_is_within_its_range():
    """The defaults themselves pass: ranges are not looser or tighter than what is shipped."""
    for key, limits in RANGES.items():
        section, _, name = key.rpartition(".")
        owner = RegistryConfig() if section.startswith("registries") else getattr(Config(), section)
        assert limits.reason(getattr(owner, name)) == "", key


def test_all_faults_are_told_at_once():
    """One run tells everything: nobody mends a file fault by fault."""
    plain = {
        "fetch": {"part_bytes": 1, "attempts": "five"},
        "flights": {},
        "node": {"snapshotter": "zfs"},
        "registries": {"ghcr.io": {"max_concurrency": 0}},
    }
    with pytest.raises(ConfigError) as caught:
        check(plain, "my.toml")

    assert caught.value.source == "my.toml"
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "fetch.part_bytes",
        "fetch.attempts",
        "flights",
        "node.snapshotter",
        'registries."ghcr.io".max_concurrency',
    ]


@pytest.mark.parametrize(
    ("plain", "key", "says"),
    [
        ({"fetch": {"part_byte": 8}}, "fetch.part_byte", "did you mean part_bytes?"),
        ({"flights": {"poll_s": 1}}, "flights", "did you mean flight?"),
        ({"redis": 3}, "redis", "must be a section"),
        ({"registries": {"ghcr.io": {"mirror": []}}}, 'registries."ghcr.io".mirror', "did you mean mirrors?"),
        ({"zzz": {}}, "zzz", "known: farm, redis"),
    ],
)
def test_an_unknown_key_is_a_fault_with_the_nearest_known_one(plain, key, says):
    """A misspelled key never silently means its default."""
    assert says in reasons(plain)[key]


@pytest.mark.parametrize(
    ("plain", "key", "says"),
    [
        ({"ray": {"nodes": True}}, "ray.nodes", "must be a whole number, is true or false"),
        ({"ray": {"nodes": 2.0}}, "ray.nodes", "must be a whole number, is a number"),
        ({"redis": {"timeout_s": "10"}}, "redis.timeout_s", "must be a number, is text"),
        ({"redis": {"timeout_s": float("nan")}}, "redis.timeout_s", "is nan"),
        ({"farm": {"name": 7}}, "farm.name", "must be text, is a whole number"),
        ({"registries": {"x": {"mirrors": "a"}}}, 'registries."x".mirrors', "must be a list of texts, is text"),
        ({"registries": {"x": {"mirrors": [1]}}}, 'registries."x".mirrors', "must be a list of texts, is a list"),
        ({"registries": {"x": {"plain_http": 1}}}, 'registries."x".plain_http', "must be true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_fault(plain, key, says):
    """Types are TOML's own: text is not read as a number, true is no 1."""
    assert says in reasons(plain)[key]


@pytest.mark.parametrize("value", [5 * 1024**2 - 1, 5 * 1024**3 + 1])
def test_a_part_is_5_mib_to_5_gib(value):
    """S3 refuses parts outside these bounds, so the configuration does."""
    assert (
        "must be 5242880 (5 MiB) to 5368709120 (5 GiB)" in reasons({"fetch": {"part_bytes": value}})["fetch.part_bytes"]
    )


@pytest.mark.parametrize("name", ["", "Farm", "a_b", "a.b", "x" * 33, "a\n"])
def test_a_farm_name_is_1_to_32_of_lower_case_digits_and_dash(name):
    """It is part of Redis keys, of a Ray namespace and of object keys: only what all of these take."""
    assert "farm.name" in reasons({"farm": {"name": name}})
    assert reasons({"farm": {"name": "a-9"}}) == {}


@pytest.mark.parametrize("key", ["password", "PASSWORD", "pass", "auth", "token"])
def test_a_password_in_the_configuration_is_refused_with_what_to_do(key):
    """Secrets are in files of their own, so that configurations can be shown, logged and committed."""
    told = reasons({"redis": {key: "hunter2"}})[f"redis.{key}"]
    assert "secrets are never configuration values" in told
    assert "redis.password_file" in told
    assert "hunter2" not in told


def test_registry_credentials_have_no_place_in_the_configuration():
    """Credentials stay with drivers (DESIGN §4)."""
    told = reasons({"registries": {"ghcr.io": {"token": "hunter2"}}})['registries."ghcr.io".token']
    assert "drivers answer for registry credentials" in told


def test_a_misspelled_file_key_is_a_misspelling_not_a_secret():
    """`pasword_file` holds no secret; say how it is spelled."""
    assert "did you mean password_file?" in reasons({"redis": {"pasword_file": "/x"}})["redis.pasword_file"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("redis", "url", "redis://:hunter2@localhost:6379/0"),
        ("redis", "url", "redis://me:hunter2@localhost"),
        ("redis", "url", "redis://me:hunter2@localhost:port"),
        ("redis", "url", "hunter2"),
        ("s3", "endpoint", "https://me:hunter2@s3.internal"),
    ],
)
def test_a_password_within_a_url_is_refused_and_not_repeated(section, key, value):
    """The fault itself must not leak what it complains of."""
    told = reasons({section: {key: value}})[f"{section}.{key}"]
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:6379/0",
        "redis://h",
        "rediss://h:1/12",
        "unix:///run/redis.sock",
        "redis://me@h",
        "redis://[::1]:6379",
        "redis+sentinel://a:26379,b,[::1]:26380/farm-1",
        "rediss+sentinel://me@a/farm/3",
        "redis+cluster://a:7000,b:7001",
        "rediss+cluster://a/0",
    ],
)
def test_good_redis_urls_pass(url):
    """TCP, TLS and Unix sockets."""
    assert reasons({"redis": {"url": url}}) == {}


@pytest.mark.parametrize(
    "url",
    [
        *("http://h", "redis://", "redis://h/zero", "redis://h?db=1", "unix://h/x", "redis://h:99999", "redis://a,b"),
        *("redis+sentinel://a:1,b:1", "redis+sentinel://a,,b/farm", "redis+sentinel:///farm", "redis+sentinel://a/f/x"),
        *("redis+cluster://a/1", "redis+cluster://", "redis+other://a"),
    ],
)
def test_bad_redis_urls_are_faults(url):
    """What can't be connected to is told at start, not at the first command."""
    assert "redis.url" in reasons({"redis": {"url": url}})


@pytest.mark.parametrize("address", ["auto", "ray://h:10001", "h", "h:port", "h:99999"])
def test_a_ray_address_is_host_and_port(address):
    """`auto` joins whatever cluster the machine knows of: never ours by design."""
    assert "ray.address" in reasons({"ray": {"address": address}})
    assert reasons({"ray": {"address": "head.internal:6379"}}) == {}


@pytest.mark.parametrize(
    "url", ["h:1", "redis://h:1/2", "redis://me@h:1", "redis://:hunter2@h:1", "redis+cluster://h:1", "unix:///x"]
)
def test_ray_keeps_its_state_on_one_open_server(url):
    """Ray shows what it is given on a command line, and knows neither databases nor several places."""
    told = reasons({"ray": {"gcs_redis": url}})["ray.gcs_redis"]
    assert "hunter2" not in told
    assert reasons({"ray": {"gcs_redis": "redis://127.0.0.1:6380"}}) == {}


@pytest.mark.parametrize("host", ["https://ghcr.io", "ghcr.io/x", "", "-a"])
def test_registries_are_named_by_host(host):
    """A scheme or a path would never match a reference's host: the section would silently not hold."""
    assert f'registries."{host}"' in reasons({"registries": {host: {}}})
    assert reasons({"registries": {"127.0.0.1:5000": {}, "[::1]:5000": {}, "default": {}}}) == {}


@pytest.mark.parametrize("mirrors", [["http://m"], ["m/x"], ["m", "m"], ["ghcr.io"]])
def test_mirrors_are_other_hosts_each_once(mirrors):
    """Asking the same host twice for what it lacks only costs time."""
    assert 'registries."ghcr.io".mirrors' in reasons({"registries": {"ghcr.io": {"mirrors": mirrors}}})


BROKEN_RELATIONS = [
    ("gateway.key_file", {"gateway": {"cert_file": "/c"}}),
    ("gateway.host", {"gateway": {"host": "192.0.2.1"}}),
    ("flight.poll_s", {"flight": {"lease_ttl_s": 6.0, "poll_s": 4.0}}),
    ("cache.lease_ttl_s", {"cache": {"lease_ttl_s": 5.0}}),
    ("cache.keep_s", {"cache": {"keep_s": 30.0}}),
    ("collect.reserved_bytes", {"collect": {"reserved_bytes": 2, "max_used_bytes": 1}}),
    ("flight.deadline_s", {"flight": {"deadline_s": 10.0}, "fetch": {"stall_timeout_s": 1, "retry_budget_s": 1}}),
    ("fetch.stall_timeout_s", {"flight": {"deadline_s": 20.0}, "fetch": {"retry_budget_s": 1}}),
    ("fetch.retry_budget_s", {"flight": {"deadline_s": 60.0}}),
    ("fetch.parallel_from_bytes", {"fetch": {"parallel_from_bytes": 6 * 1024**2}}),
    ("node.cache_bytes", {"node": {"cache_bytes": 6 * 1024**2}}),
    ("node.reserved_bytes", {"node": {"reserved_bytes": 2, "max_used_bytes": 1}}),
    ("ray.object_store_bytes", {"ray": {"object_store_bytes": 3 * 1024**3}}),
    ("ray.gcs_redis", {"ray": {"address": "h:1", "gcs_redis": "redis://h:1"}}),
    ("redis.password_file", {"redis": {"password_file": "/x"}}),
    ("redis.username", {"redis": {"username": "x"}}),
    ("redis.ca_file", {"redis": {"url": "redis://h:1", "ca_file": "/x"}}),
    ("redis.client_cert_file", {"redis": {"url": "redis://h:1", "client_cert_file": "/x"}}),
    ("redis.client_key_file", {"redis": {"url": "rediss://h:1", "client_key_file": "/x"}}),
    ("s3.credentials_file", {"s3": {"credentials_file": "/x"}}),
    ("ray.token_file", {"ray": {"token_file": "/x"}}),
]


@pytest.mark.parametrize(("key", "plain"), BROKEN_RELATIONS)
def test_keys_that_contradict_each_other_are_a_fault(key, plain):
    """Each relation is told of its first key, and of nothing else."""
    assert list(reasons(plain)) == [key]


def test_every_relation_has_a_test():
    """A relation that nothing breaks may be dead."""
    assert {relation.keys[0] for relation in RELATIONS} == {key for key, _ in BROKEN_RELATIONS}


def test_a_relation_with_a_faulty_key_is_not_looked_at():
    """One mistake gives one fault: its default would make a misleading second one."""
    assert list(reasons({"flight": {"lease_ttl_s": -1, "poll_s": 5.0}})) == ["flight.lease_ttl_s"]


def test_whole_numbers_are_fine_where_fractions_are():
    """`timeout_s = 10` is what people write."""
    config = check({"redis": {"timeout_s": 10}}, "x")
    assert config.redis.timeout_s == 10.0
    assert type(config.redis.timeout_s) is float


def test_every_section_is_described_by_its_class():
    """Each section of the configuration is a dataclass with a docstring: what `default.toml` groups by."""
    for name, hint in get_type_hints(Config).items():
        if name != "registries":
            assert dataclasses.is_dataclass(hint)
            assert hint.__doc__
