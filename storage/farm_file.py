"""``STATE/farm.toml``: what runs under a state directory, written by ``up`` and read by every command."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from cluster.config_check import check
from cluster.config_record import non_defaults
from cluster.errors import ConfigError
from cluster.settings import Running
from storage.services.state_dir import write_atomic

_FILE = "farm.toml"
#: Raised where an older reader would misunderstand; keys may be added without.
_VERSION = 1

#: Tables of the configuration that the farm was brought up with, and of what of it came from the environment.
_CONFIG = "config"
_OVERRIDES = "overrides"

#: Where each field of :class:`Running` is in the file.
_PLACES = {
    "farm_id": ("farm", "id"),
    "farm_name": ("farm", "name"),
    "redis_url": ("redis", "url"),
    "redis_password_file": ("redis", "password_file"),
    "s3_endpoint": ("s3", "endpoint"),
    "s3_region": ("s3", "region"),
    "s3_bucket": ("s3", "bucket"),
    "s3_credentials_file": ("s3", "credentials_file"),
    "ray_address": ("ray", "address"),
    "ray_token_file": ("ray", "token_file"),
    "ray_jobs_url": ("ray", "jobs_url"),
}
#: Fields that files of earlier releases lack.
_LATER = {"ray_jobs_url"}


def farm_file(state_dir: Path) -> Path:
    """Return the path of the state directory's farm file."""
    return state_dir / _FILE


def read_running(state_dir: Path) -> Running | None:
    """Return what runs under *state_dir*; None where nothing was brought up.

    Raises:
        ConfigError: the file is damaged or of another release; all faults are named.
    """
    path = farm_file(state_dir)
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ConfigError(str(path), (f"the file can't be read: {exc}",)) from exc
    if plain.get("version") != _VERSION:
        raise ConfigError(str(path), (f"version: this release reads {_VERSION}, not {plain.get('version')!r}",))
    values: dict[str, str] = {}
    faults: list[str] = []
    for name, (section, key) in _PLACES.items():
        table = plain.get(section)
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str):
            values[name] = value
        elif value is not None or name not in _LATER:
            faults.append(f"{section}.{key}: must be text, is {'absent' if value is None else type(value).__name__}")
    if faults:
        raise ConfigError(str(path), tuple(faults))
    config_file = plain.get("config_file")
    return Running(
        config_file=Path(config_file) if isinstance(config_file, str) and config_file else None,
        config=check(_table(plain, _CONFIG), str(path)),
        overrides=_table(plain, _OVERRIDES),
        **values,
    )


def write_running(state_dir: Path, running: Running) -> Path:
    """Record what runs, in one step: a reader sees the old file or the new one. Returns its path."""
    sections: dict[str, list[str]] = {}
    for name, (section, key) in _PLACES.items():
        sections.setdefault(section, []).append(f"{key} = {_quoted(getattr(running, name))}")
    lines = [
        "# What runs under this directory. Written by `lazyfarm up`; edits are lost.",
        f"version = {_VERSION}",
        f"config_file = {_quoted(str(running.config_file or ''))}",
    ]
    for section, entries in sections.items():
        lines += ["", f"[{section}]", *entries]
    for name, table in ((_CONFIG, non_defaults(running.config)), (_OVERRIDES, running.overrides)):
        for section, keys in table.items():
            lines += _tables(f"{name}.{section}", keys) if isinstance(keys, Mapping) else []
    path = farm_file(state_dir)
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def forget_running(state_dir: Path) -> None:
    """Remove the record: nothing runs here any more. Nothing to do is no error."""
    farm_file(state_dir).unlink(missing_ok=True)


def _table(plain: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = plain.get(name, {})
    return table if isinstance(table, dict) else {}


def _tables(name: str, table: Mapping[str, object]) -> list[str]:
    """Return *table*, which is named *name*, and the tables in it (of registries, by host) as lines of TOML."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _tables(f"{name}.{_quoted(key)}", value)
    return lines


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _quoted(value)
        case list() | tuple():
            return f"[{', '.join(_value(item) for item in value)}]"
        case _:
            return str(value)  # whole numbers and finite others are written as TOML has them


def _quoted(text: str) -> str:
    """Return *text* as a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else c for c in escaped) + '"'  # noqa: PLR2004 - TOML's control characters
