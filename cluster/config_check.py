"""Checks of a configuration: from plain data to :class:`cluster.config.Config`, or every fault at once.

One table holds the range of each number, one the rule of each text, one the relations between keys.
Whether files exist is asked by :mod:`lazyfarm.settings`, which may look at the disk.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_origin, get_type_hints
from urllib.parse import urlsplit

from cluster.config import Config, RegistryConfig
from cluster.errors import ConfigError
from cluster.redis_url import RedisKind, parse_redis_url

_KIB = 1024
_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4

REGISTRIES = "registries"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. Never repeats a value that may be a secret."""

    #: ``section.key``.
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def check(plain: Mapping[str, object], source: str) -> Config:
    """Return the configuration that *plain* (as TOML gives it) means; what is absent has its default.

    Raises:
        ConfigError: with every fault, each with its key; *source* names the file.
    """
    config, faults = examine(plain)
    if faults:
        raise ConfigError(source, tuple(str(fault) for fault in faults))
    return config


def examine(plain: Mapping[str, object]) -> tuple[Config, tuple[Fault, ...]]:
    """Return the configuration and its faults; a faulty key has its default, so that the rest can be looked at."""
    faults: list[Fault] = []
    sections: dict[str, Any] = {}
    hints = get_type_hints(Config)
    for name, value in plain.items():
        if name not in hints:
            faults.append(Fault(name, _unknown(name, "", tuple(hints))))
        elif not isinstance(value, Mapping):
            faults.append(Fault(name, f"must be a section ([{name}]), is {_kind(value)}"))
        elif name == REGISTRIES:
            sections[name] = _registries(value, faults)
        else:
            sections[name] = _section(name, name, hints[name], value, faults)
    config = Config(**sections)
    faulty = {fault.key for fault in faults}
    faults += [
        Fault(relation.keys[0], relation.reason)
        for relation in RELATIONS
        if faulty.isdisjoint(relation.keys) and not relation.holds(config)
    ]
    return config, tuple(faults)


def key_type(section: str, key: str) -> object | None:
    """Return the type of a key, for reading it from text; None where there is no such key."""
    cls = RegistryConfig if section == REGISTRIES else get_type_hints(Config).get(section)
    return None if cls is None else _types(cls).get(key)


def keys() -> tuple[str, ...]:
    """Return every key as ``section.key``; those of a registry as ``registries.*.key``."""
    hints = get_type_hints(Config)
    found = [f"{name}.{field.name}" for name, hint in hints.items() if name != REGISTRIES for field in fields(hint)]
    return (*found, *(f"{REGISTRIES}.*.{field.name}" for field in fields(RegistryConfig)))


# -- one section ---------------------------------------------------------------------------------


def _section(prefix: str, rules: str, cls: Any, plain: Mapping[str, object], faults: list[Fault]) -> Any:
    """Build *cls* from a table; *prefix* is shown, *rules* (``registries.*``) finds the checks."""
    hints = _types(cls)
    values: dict[str, object] = {}
    for name, raw in plain.items():
        key = f"{prefix}.{name}"
        if name not in hints:
            faults.append(Fault(key, _unknown(name, rules.partition(".")[0], tuple(hints))))
            continue
        value = _typed(hints[name], raw)
        if value is None:
            faults.append(Fault(key, f"must be {_WORDS[hints[name]]}, is {_kind(raw)}"))
            continue
        reason = _reason(f"{rules}.{name}", value)
        if reason:
            faults.append(Fault(key, reason))
        else:
            values[name] = value
    return cls(**values)


def _registries(plain: Mapping[str, object], faults: list[Fault]) -> dict[str, RegistryConfig]:
    found: dict[str, RegistryConfig] = {}
    for host, table in plain.items():
        prefix = f'{REGISTRIES}."{host}"'
        if host != "default" and not _HOST.fullmatch(host):
            faults.append(Fault(prefix, "must be HOST[:PORT] or default, without a scheme or a path"))
        if not isinstance(table, Mapping):
            faults.append(Fault(prefix, f"must be a section ([{prefix}]), is {_kind(table)}"))
            continue
        entry: RegistryConfig = _section(prefix, f"{REGISTRIES}.*", RegistryConfig, table, faults)
        if host in entry.mirrors:
            faults.append(Fault(f"{prefix}.mirrors", "names the registry itself, which is tried last anyway"))
        found[host] = entry
    return found


def _types(cls: Any) -> dict[str, object]:
    """Return the types of a section's keys; a choice of words is text, its rule knows the words."""
    return {key: str if get_origin(hint) is Literal else hint for key, hint in get_type_hints(cls).items()}


_TUPLE_OF_TEXT = tuple[str, ...]
_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    _TUPLE_OF_TEXT: "a list of texts",
}


def _typed(hint: object, raw: object) -> object | None:
    """Return *raw* as a value of type *hint*, or None where it isn't one. TOML's true is no number."""
    if hint == _TUPLE_OF_TEXT:
        is_list = isinstance(raw, list | tuple) and all(isinstance(item, str) for item in raw)
        return tuple(raw) if is_list else None  # type: ignore[arg-type]  # is_list says that it can be iterated
    if hint is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    return raw if isinstance(raw, hint) and isinstance(raw, bool) == (hint is bool) else None  # type: ignore[arg-type]  # one of _WORDS


def _kind(value: object) -> str:
    """Name what a value is, without showing it."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    return _WORDS.get(type(value), type(value).__name__)


# -- keys that don't exist -----------------------------------------------------------------------

_SECRET = re.compile(r"pass(word|wd|phrase)?|secret|token|api_?key|access_key|credentials?|auth(orization)?|username")

_SECRET_ADVICE = {
    "redis": "put the password into a file and name it in redis.password_file",
    "s3": "put the keys into a file and name it in s3.credentials_file",
    "tracing": "put the header into a file and name it in tracing.headers_file",
    "ray": "put the token into a file and name it in ray.token_file",
    REGISTRIES: "drivers answer for registry credentials, from their own config.json and credential helpers",
}


def _unknown(name: str, section: str, known: tuple[str, ...]) -> str:
    import difflib  # noqa: PLC0415 - 5 ms that only a fault should cost

    if section and _SECRET.search(name.lower()) and name.lower() not in known:
        advice = _SECRET_ADVICE.get(section, "keep it in a file")
        if not difflib.get_close_matches(name, [key for key in known if key.endswith("_file")], cutoff=0.9):
            return f"secrets are never configuration values; {advice}"
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    what = "key" if section else "section"
    return f"unknown {what}" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}")


# -- one value -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """Least and greatest value of a number, both included."""

    least: float
    most: float

    def reason(self, value: float) -> str:
        """Return what is wrong with *value*; "" for nothing."""
        if math.isfinite(value) and self.least <= value <= self.most:
            return ""
        return f"must be {_number(self.least)} to {_number(self.most)}, is {_number(value)}"


_MAX_PORT = 65535
_MINUTE_S = 60.0
_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S

RANGES: dict[str, Range] = {
    "redis.timeout_s": Range(0.05, 10 * _MINUTE_S),
    "redis.wait_replicas": Range(0, 16),
    "s3.timeout_s": Range(0.1, _HOUR_S),
    "s3.attempts": Range(1, 100),
    "s3.connections": Range(1, 1000),
    "ray.nodes": Range(1, 100),
    "ray.node_cpus": Range(1, 1024),
    # Ray itself refuses less: an actor process takes some 50 MiB.
    "ray.node_memory_bytes": Range(256 * _MIB, 64 * _TIB),
    # OBJECT_STORE_MINIMUM_MEMORY_BYTES of Ray.
    "ray.object_store_bytes": Range(75 * _MIB, _TIB),
    "ray.call_timeout_s": Range(0.1, _DAY_S),
    "cache.shards": Range(1, 256),
    "cache.lease_ttl_s": Range(0.5, _DAY_S),
    "cache.keep_s": Range(1, 3660 * _DAY_S),
    "cache.proof_ttl_s": Range(0.1, 30 * _DAY_S),
    "collect.every_s": Range(0, 30 * _DAY_S),
    "collect.grace_s": Range(0, _DAY_S),
    "collect.stray_s": Range(0, 30 * _DAY_S),
    "collect.missing_every_s": Range(0, 366 * _DAY_S),
    "collect.requests_per_s": Range(0.1, 10_000),
    "collect.scrub_bytes_per_s": Range(0, 64 * _GIB),
    "collect.scrub_every_s": Range(_MINUTE_S, 366 * _DAY_S),
    "collect.reserved_bytes": Range(0, 1024 * _TIB),
    "collect.max_used_bytes": Range(0, 1024 * _TIB),
    "collect.unused_s": Range(1, 3660 * _DAY_S),
    "flight.lease_ttl_s": Range(0.3, _HOUR_S),
    "flight.poll_s": Range(0.01, _HOUR_S),
    "flight.deadline_s": Range(1, 7 * _DAY_S),
    # S3's own limits for a part of a multi-part upload.
    "fetch.part_bytes": Range(5 * _MIB, 5 * _GIB),
    "fetch.whole_up_to_bytes": Range(0, _GIB),
    "fetch.parallel_from_bytes": Range(5 * _MIB, 64 * _TIB),
    "fetch.ranges_per_layer": Range(1, 64),
    "fetch.layers_per_node": Range(1, 256),
    # An actor takes 1000 calls; for each of these its caller has another open, to be asked for credentials.
    "fetch.calls_per_node": Range(2, 450),
    "fetch.stall_timeout_s": Range(0.1, _HOUR_S),
    "fetch.attempts": Range(1, 100),
    "fetch.retry_budget_s": Range(0, _DAY_S),
    "node.cache_bytes": Range(5 * _MIB, 1024 * _TIB),
    "node.layer_bytes": Range(_MIB, 1024 * _TIB),
    "node.layer_entries": Range(1000, 1_000_000_000),
    "node.collect_every_s": Range(0, 30 * _DAY_S),
    "node.reserved_bytes": Range(0, 1024 * _TIB),
    "node.max_used_bytes": Range(0, 1024 * _TIB),
    "node.min_free_bytes": Range(0, 1024 * _TIB),
    "node.unused_s": Range(1, 3660 * _DAY_S),
    "node.disk_wait_s": Range(0, _DAY_S),
    "audit.most_entries": Range(0, 10_000_000),
    "audit.retention_s": Range(_MINUTE_S, 3660 * _DAY_S),
    "build.schedulers": Range(1, 64),
    "build.ops_per_node": Range(1, 1024),
    "build.op_timeout_s": Range(1, 7 * _DAY_S),
    "build.claim_ttl_s": Range(1, _HOUR_S),
    "web.port": Range(0, _MAX_PORT),
    "gateway.port": Range(1, _MAX_PORT),
    "gateway.grace_s": Range(1, _HOUR_S),
    # Each has two connections to Redis and a thread.
    "gateway.sessions": Range(1, 10_000),
    "tracing.sample_ratio": Range(0, 1),
    "registries.*.max_concurrency": Range(1, 10_000),
    "registries.*.max_requests_per_s": Range(0, 10_000),
    "registries.*.quota_pace_s": Range(0, _HOUR_S),
    "registries.*.breaker_failures": Range(0, 1000),
    "registries.*.breaker_open_s": Range(0.1, _HOUR_S),
    "registries.*.timeout_s": Range(0.1, _HOUR_S),
    "registries.*.attempts": Range(1, 100),
    "registries.*.retry_budget_s": Range(0, _DAY_S),
}

_NAME = re.compile(r"[a-z0-9-]{1,32}")
# What every S3 server takes; AWS's rules for new buckets.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
#: Or "".
_REDIS_USER = re.compile(r"[^\s:]{0,64}")
_SERVICE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REGION = re.compile(r"[A-Za-z0-9-]{1,64}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_HOST_PORT = re.compile(_HOST.pattern.removesuffix("?").removesuffix("(?::[0-9]{1,5})") + r":[0-9]{1,5}")


def _matches(pattern: re.Pattern[str], form: str) -> Callable[[str], str]:
    return lambda text: "" if pattern.fullmatch(text) else f"must be {form}, is {text!r}"


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda text: "" if text in words else f"must be one of {', '.join(words)}, is {text!r}"


def _redis_url(text: str) -> str:
    if not text:
        return ""
    try:
        url = parse_redis_url(text)
    except ValueError as exc:
        return str(exc)
    return f"holds a password; {_SECRET_ADVICE['redis']}" if url.password else ""


def _s3_endpoint(text: str) -> str:
    reason = _endpoint(text, _SECRET_ADVICE["s3"])
    return reason if reason or not _has_more(text) else f"{_BARE} and nothing more; the bucket is s3.bucket"


def _otlp_endpoint(text: str) -> str:
    reason = _endpoint(text, _SECRET_ADVICE["tracing"])
    return reason if reason or not _has_more(text) else f"{_BARE} and nothing more; /v1/traces is added"


_BARE = "must be http[s]://HOST[:PORT]"


def _endpoint(text: str, advice: str) -> str:
    if not text:
        return ""
    parts, reason = _url(text, ("http", "https"))
    if parts is None:
        return reason
    if parts.username is not None or parts.password is not None:
        return f"holds credentials; {advice}"
    return ""


def _has_more(text: str) -> bool:
    """Tell whether a URL is not of one server alone."""
    parts = urlsplit(text)
    return bool(text) and (not parts.hostname or bool(parts.path.strip("/") or parts.query or parts.fragment))


def _url(text: str, schemes: tuple[str, ...]) -> tuple[Any, str]:
    """Split a URL; None and the reason where it can't be. The text is not shown: it may hold a password."""
    forms = ", ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no number, or too great a one
    except ValueError:
        return None, "is no URL: its host or port can't be read"
    return (parts, "") if parts.scheme in schemes else (None, f"must start with one of {forms}")


def _ray_address(text: str) -> str:
    if not text:
        return ""
    if not _HOST_PORT.fullmatch(text) or int(text.rpartition(":")[2]) > _MAX_PORT:
        return f"must be HOST:PORT of the cluster's GCS, without a scheme, is {text!r}"
    return ""


def _gcs_redis(text: str) -> str:
    if not text:
        return ""
    try:
        url = parse_redis_url(text)
    except ValueError as exc:
        return str(exc)
    if url.username or url.password:
        return "holds a user or a password, which Ray would show on a command line"
    if url.kind is not RedisKind.SERVER or url.path or url.database:
        return "must be redis[s]://HOST:PORT of one server: Ray knows no sentinels and no databases"
    return ""


def _ip_address(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return f"must be an IP address of this machine, or 0.0.0.0 or :: for all of them, is {text!r}"
    return ""


def _mirrors(hosts: tuple[str, ...]) -> str:
    wrong = [host for host in hosts if not _HOST.fullmatch(host)]
    if wrong:
        return f"must be HOST[:PORT] each, without a scheme or a path, not {', '.join(map(repr, wrong))}"
    return "" if len(set(hosts)) == len(hosts) else "names a mirror twice"


def _absolute(text: str) -> str:
    return "" if not text or text.startswith("/") else f"must be an absolute path, is {text!r}"


#: Keys that name files with something to read, "" for none.
FILES = (
    "redis.password_file",
    "redis.ca_file",
    "redis.client_cert_file",
    "redis.client_key_file",
    "s3.credentials_file",
    "s3.ca_file",
    "ray.token_file",
    "build.credentials_file",
    "tracing.headers_file",
    "registries.*.ca_file",
)

RULES: dict[str, Callable[[Any], str]] = {
    "farm.name": _matches(_NAME, "1 to 32 of a-z, 0-9 and -"),
    "redis.url": _redis_url,
    "redis.username": _matches(_REDIS_USER, "up to 64 characters without a space or a colon"),
    "s3.endpoint": _s3_endpoint,
    "s3.region": _matches(_REGION, "1 to 64 letters, digits and -"),
    "s3.bucket": _matches(_BUCKET, "3 to 63 of a-z, 0-9, . and -, a letter or digit at both ends"),
    "ray.address": _ray_address,
    "ray.gcs_redis": _gcs_redis,
    "ray.dashboard": lambda _: "",
    "node.root": _absolute,
    "node.snapshotter": _one_of("auto", "overlay", "copying"),
    "build.compression": _one_of("gzip", "zstd", "none"),
    "web.enabled": lambda _: "",
    "web.host": _ip_address,
    "gateway.enabled": lambda _: "",
    "gateway.host": _ip_address,
    # Not among FILES: they are the gateway's alone, and no other process need be able to read them.
    "gateway.cert_file": _absolute,
    "gateway.key_file": _absolute,
    "gateway.s3_endpoint": _s3_endpoint,
    "log.level": _one_of("debug", "info", "warning", "error"),
    "tracing.endpoint": _otlp_endpoint,
    "tracing.service_name": _matches(_SERVICE, "1 to 64 letters, digits, ., _ and -"),
    "registries.*.mirrors": _mirrors,
    "registries.*.plain_http": lambda _: "",
    **dict.fromkeys(FILES, _absolute),
}


def _reason(rule: str, value: object) -> str:
    """Return what is wrong with a value of the right type; "" for nothing."""
    if isinstance(value, int | float) and rule in RANGES:
        return RANGES[rule].reason(value)
    return RULES[rule](value)


def _number(value: float) -> str:
    """Write a number as it would be in the file, with sizes in words as well."""
    if not math.isfinite(value) or value != int(value):
        return f"{value:g}"
    for unit, name in ((_TIB, "TiB"), (_GIB, "GiB"), (_MIB, "MiB")):
        if value and value % unit == 0:
            return f"{int(value)} ({int(value) // unit} {name})"
    return str(int(value))


# -- several keys --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Relation:
    """What must hold between keys; a fault is told of the first. Not looked at where one is faulty in itself."""

    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    reason: str


def _own(file_key: str, address_key: str, what: str) -> Iterator[Relation]:
    """A secret's file belongs to a service that is there; the farm makes the secrets of what it starts."""
    section, name = file_key.split(".")
    address = address_key.split(".")[1]
    yield Relation(
        (file_key, address_key),
        lambda config: not getattr(getattr(config, section), name) or bool(getattr(getattr(config, section), address)),
        f"is set although {address_key} is empty: the farm makes the {what} of what it starts itself",
    )


def _tls_only(name: str) -> Iterator[Relation]:
    """A file of certificates means something to TLS alone."""
    yield Relation(
        (f"redis.{name}", "redis.url"),
        lambda config: not getattr(config.redis, name) or config.redis.url.startswith("rediss"),
        "is set although redis.url doesn't begin with rediss:// (or rediss+…)",
    )


RELATIONS: tuple[Relation, ...] = (
    Relation(
        ("gateway.key_file", "gateway.cert_file"),
        lambda c: bool(c.gateway.cert_file) == bool(c.gateway.key_file),
        "must be set where gateway.cert_file is, and only there: TLS takes both",
    ),
    Relation(
        ("gateway.host", "gateway.cert_file"),
        lambda c: bool(c.gateway.cert_file) or ipaddress.ip_address(c.gateway.host).is_loopback,
        "must be of loopback where gateway.cert_file is empty: tokens and credentials don't cross a network in clear",
    ),
    Relation(
        ("flight.poll_s", "flight.lease_ttl_s"),
        lambda c: c.flight.poll_s <= c.flight.lease_ttl_s / 2,
        "must be at most half of flight.lease_ttl_s: who misses a message must look before its own lease lapses",
    ),
    Relation(
        ("cache.lease_ttl_s", "flight.lease_ttl_s"),
        lambda c: c.cache.lease_ttl_s >= c.flight.lease_ttl_s,
        "must be at least flight.lease_ttl_s: a waiter pins the result in its own lease before the flight's goes",
    ),
    Relation(
        ("cache.keep_s", "cache.lease_ttl_s"),
        lambda c: c.cache.keep_s >= c.cache.lease_ttl_s,
        "must be at least cache.lease_ttl_s: what is kept after a command outlives what is held during it",
    ),
    Relation(
        ("collect.reserved_bytes", "collect.max_used_bytes"),
        lambda c: not c.collect.max_used_bytes or c.collect.reserved_bytes <= c.collect.max_used_bytes,
        "must be at most collect.max_used_bytes: what is reserved can't be more than what may be used",
    ),
    Relation(
        ("node.reserved_bytes", "node.max_used_bytes"),
        lambda c: not c.node.max_used_bytes or c.node.reserved_bytes <= c.node.max_used_bytes,
        "must be at most node.max_used_bytes: what is reserved can't be more than what may be used",
    ),
    Relation(
        ("flight.deadline_s", "flight.lease_ttl_s"),
        lambda c: c.flight.deadline_s >= 2 * c.flight.lease_ttl_s,
        "must be at least twice flight.lease_ttl_s: an owner that dies is noticed only after one",
    ),
    Relation(
        ("fetch.stall_timeout_s", "flight.deadline_s"),
        lambda c: c.fetch.stall_timeout_s < c.flight.deadline_s,
        "must be less than flight.deadline_s: else the next source is never tried",
    ),
    Relation(
        ("fetch.retry_budget_s", "flight.deadline_s"),
        lambda c: c.fetch.retry_budget_s <= c.flight.deadline_s,
        "must be at most flight.deadline_s, which ends the retries anyway",
    ),
    Relation(
        ("fetch.parallel_from_bytes", "fetch.part_bytes"),
        lambda c: c.fetch.parallel_from_bytes >= c.fetch.part_bytes,
        "must be at least fetch.part_bytes: a layer of less than one part has one range",
    ),
    Relation(
        ("node.cache_bytes", "fetch.part_bytes"),
        lambda c: c.node.cache_bytes >= c.fetch.part_bytes,
        "must be at least fetch.part_bytes: else not one range fits",
    ),
    Relation(
        ("ray.object_store_bytes", "ray.node_memory_bytes"),
        lambda c: c.ray.object_store_bytes <= c.ray.node_memory_bytes,
        "must be at most ray.node_memory_bytes: it is a part of it",
    ),
    Relation(
        ("ray.gcs_redis", "ray.address"),
        lambda c: not (c.ray.gcs_redis and c.ray.address),
        "is set although ray.address names a cluster: where that one keeps its state is its own affair",
    ),
    *_own("redis.password_file", "redis.url", "password"),
    *_tls_only("ca_file"),
    *_tls_only("client_cert_file"),
    Relation(
        ("redis.client_key_file", "redis.client_cert_file"),
        lambda c: not c.redis.client_key_file or bool(c.redis.client_cert_file),
        "is set although redis.client_cert_file is not: a key without a certificate shows nothing",
    ),
    Relation(
        ("redis.username", "redis.url"),
        lambda c: not c.redis.username or bool(c.redis.url),
        "is set although redis.url is empty: the farm's own server knows the user `default` alone",
    ),
    *_own("s3.credentials_file", "s3.endpoint", "keys"),
    *_own("ray.token_file", "ray.address", "token"),
)
