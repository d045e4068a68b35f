"""A configuration as plain data that can be kept, compared and told apart: the way back from :mod:`config_check`."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

from cluster.config import Config, GatewayConfig, RayConfig, WebConfig
from cluster.config_check import REGISTRIES
from cluster.wire import encode

_DIGEST_DIGITS = 16


def non_defaults(config: Config) -> dict[str, dict[str, Any]]:
    """Return the keys that differ from their defaults, by section, as a configuration file would have them.

    A registry that is named stays named even where nothing of it differs: ``default`` doesn't hold for it.
    """
    found = {
        section.name: _differing(getattr(config, section.name))
        for section in fields(config)
        if section.name != REGISTRIES
    }
    plain = {name: table for name, table in found.items() if table}
    if config.registries:
        plain[REGISTRIES] = {host: _differing(entry) for host, entry in sorted(config.registries.items())}
    return plain


def differing_keys(one: Config, other: Config) -> list[str]:
    """Return the keys, as ``section.key``, in which two configurations differ."""
    left, right = _flat(non_defaults(one)), _flat(non_defaults(other))
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def actor_digest(config: Config) -> str:
    """Return a digest of what actors are started with: two that differ in it can't serve one farm side by side.

    What the machine's Ray nodes offer is no part of it, nor how many there are, nor page and gateway: actors don't read
    that.
    """
    ray = RayConfig(
        address=config.ray.address, token_file=config.ray.token_file, call_timeout_s=config.ray.call_timeout_s
    )
    registries = dict(sorted(config.registries.items()))
    seen = replace(config, ray=ray, web=WebConfig(), gateway=GatewayConfig(), registries=registries)
    return _digest(encode("config", seen))


def gateway_digest(config: Config, *beside: str) -> str:
    """Return a digest of what the gateway is started with, and of what else it depends on."""
    parts = (actor_digest(config), *beside)
    return _digest(encode("config", config.gateway), *(part.encode() for part in parts))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:_DIGEST_DIGITS]


def _differing(section: Any) -> dict[str, Any]:
    default = type(section)()
    pairs = ((field.name, getattr(section, field.name)) for field in fields(section))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in pairs
        if value != getattr(default, name)
    }


def _flat(plain: dict[str, dict[str, Any]]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for section, table in plain.items():
        for key, value in table.items():
            if section == REGISTRIES:
                flat[f'{REGISTRIES}."{key}"'] = value
            else:
                flat[f"{section}.{key}"] = value
    return flat
