"""A configuration kept as plain data, compared, and told apart by its digest."""

from dataclasses import fields, replace

import pytest

from cluster.config import (
    CacheConfig,
    Config,
    FetchConfig,
    GatewayConfig,
    NodeConfig,
    RayConfig,
    RegistryConfig,
    WebConfig,
)
from cluster.config_check import check
from cluster.config_record import actor_digest, differing_keys, gateway_digest, non_defaults
from cluster.wire import decode, encode

CHANGED = Config(
    cache=CacheConfig(shards=4, keep_s=100.5),
    node=NodeConfig(snapshotter="copying"),
    ray=RayConfig(nodes=3),
    registries={"r:5000": RegistryConfig(mirrors=("m", "n")), "named": RegistryConfig()},
)


@pytest.mark.parametrize("config", [Config(), CHANGED])
def test_what_differs_from_the_defaults_is_the_whole_configuration(config):
    """Reading it back gives what it was, and only what differs is kept."""
    assert check(non_defaults(config), "the record") == config
    assert non_defaults(Config()) == {}
    assert non_defaults(CHANGED)["cache"] == {"shards": 4, "keep_s": 100.5}


def test_what_differs_is_named_by_its_key():
    """As a user would write it, in either direction, and only that."""
    assert differing_keys(CHANGED, CHANGED) == []
    assert differing_keys(Config(fetch=FetchConfig(attempts=7)), Config()) == ["fetch.attempts"]
    registries = {"r:5000": RegistryConfig(attempts=2)}
    assert differing_keys(Config(), Config(registries=registries)) == ['registries."r:5000"']


def test_a_digest_is_the_same_in_every_process():
    """Through the wire, and whatever order the file names registries in."""
    digest = actor_digest(CHANGED)
    assert actor_digest(decode("config", Config, encode("config", CHANGED))) == digest
    turned = dict(reversed(list(CHANGED.registries.items())))
    assert actor_digest(replace(CHANGED, registries=turned)) == digest


def test_a_digest_tells_apart_all_that_actors_read():
    """Every section counts but page, gateway, what the machine's own Ray nodes offer, and how many they are."""
    changes = [Config(cache=CacheConfig(shards=3)), Config(ray=RayConfig(address="h:1")), CHANGED, Config()]
    assert len({actor_digest(config) for config in changes}) == len(changes)
    nodes = RayConfig(
        gcs_redis="redis://h:1",
        nodes=9,
        node_cpus=3,
        node_memory_bytes=2**30,
        object_store_bytes=2**27,
        dashboard=False,
    )
    assert actor_digest(Config(ray=nodes)) == actor_digest(Config())
    outside = Config(web=WebConfig(port=1), gateway=GatewayConfig(port=1))
    assert actor_digest(outside) == actor_digest(Config())
    assert {field.name for field in fields(RayConfig)} - {"address", "token_file", "call_timeout_s"} == {
        "gcs_redis",
        "nodes",
        "node_cpus",
        "node_memory_bytes",
        "object_store_bytes",
        "dashboard",
    }


def test_the_gateway_s_digest_tells_apart_all_that_it_reads():
    """The farm's configuration, its own section, and what else it depends on, in that order."""
    told = [
        gateway_digest(Config()),
        gateway_digest(Config(), "1.0"),
        gateway_digest(Config(), "1.0", "4711"),
        gateway_digest(Config(gateway=GatewayConfig(port=1)), "1.0"),
        gateway_digest(Config(cache=CacheConfig(shards=3)), "1.0"),
    ]
    assert len(set(told)) == len(told)
    assert gateway_digest(Config(web=WebConfig(port=1)), "1.0") == told[1]
