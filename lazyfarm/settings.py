"""Settings of a farm: defaults, then the configuration file, then the environment; all faults at once.

Every key can be overridden by ``LAZYFARM__SECTION__KEY=value`` (two underscores), for example
``LAZYFARM__FETCH__PART_BYTES=16777216``. Texts are taken as they are, lists as ``a,b`` or ``["a", "b"]``,
other values as in TOML. A registry's keys are ``LAZYFARM__REGISTRIES__DEFAULT__KEY``; a host that the file
names is written with ``_`` for what is no letter or digit (``LAZYFARM__REGISTRIES__GHCR_IO__PLAIN_HTTP``), and
``LAZYFARM__REGISTRIES`` takes a whole inline table. An empty value of a text is the empty text.

The state directory is ``--state-dir``, else ``LAZYFARM_STATE_DIR``, else ``lazyfarm`` under
``XDG_STATE_HOME``, else ``~/.local/state/lazyfarm``. What runs there, and the configuration it was brought up
with, is in its ``farm.toml``: the file that ``up`` was given is read by ``up`` alone.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import Config
from cluster.config_check import FILES, REGISTRIES, Fault, examine, key_type
from cluster.config_record import non_defaults
from cluster.errors import ConfigError
from cluster.settings import FarmSettings, Running
from storage.farm_file import farm_file, read_running

__all__ = ["FarmSettings", "Running", "default_state_dir", "load_running", "load_settings", "load_wanted"]

STATE_DIR_VARIABLE = "LAZYFARM_STATE_DIR"
_PREFIX = "LAZYFARM__"
_PATH_KEYS = {*FILES, "node.root", "gateway.cert_file", "gateway.key_file"}


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return the state directory that holds where none is named."""
    if named := environ.get(STATE_DIR_VARIABLE):
        return Path(named)
    if state_home := environ.get("XDG_STATE_HOME"):
        return Path(state_home, "lazyfarm")
    return Path(environ.get("HOME") or Path.home(), ".local", "state", "lazyfarm")


def load_settings(
    state_dir: Path | str | None, config_file: Path | str | None, environ: Mapping[str, str]
) -> FarmSettings:
    """Read and check everything that is set for whoever uses a farm.

    Where one runs, that is what its ``up`` recorded, and this process's environment over it: for this process
    alone, and never against what all parts of the farm must agree on (:attr:`FarmSettings.config`).

    Args:
        state_dir: None: as :func:`default_state_dir`.
        config_file: None: what ``up`` recorded in that directory, if anything.
        environ: Usually ``os.environ``; read here and nowhere else.

    Raises:
        ConfigError: with every fault of the file and the environment, each with its key.
    """
    root = _absolute(state_dir or default_state_dir(environ))
    running = read_running(root)
    layers = _Layers()
    if config_file is not None:
        layers.read_file(_absolute(config_file))
    elif running is not None:
        layers.read_record(farm_file(root), running.config)
    layers.read_environment(environ)
    named = _absolute(config_file) if config_file is not None else None
    file = named or (running.config_file if running else None)
    return FarmSettings(
        state_dir=root, wanted=layers.check(), config_file=file, overrides=layers.overrides, running=running
    )


def load_wanted(
    state_dir: Path | str | None, config_file: Path | str | None, environ: Mapping[str, str]
) -> FarmSettings:
    """Read and check what ``up`` is to bring about; arguments as :func:`load_settings`.

    A named file and the environment are all there is to it. Where none is named, ``up`` goes on with what it
    was last told: the file that was named then, read again (what is recorded of it, where it is gone), what the
    environment overrode then, and over both what it overrides now.

    Raises:
        ConfigError: with every fault of the file and the environment, each with its key.
    """
    root = _absolute(state_dir or default_state_dir(environ))
    running = read_running(root)
    layers = _Layers()
    file = _absolute(config_file) if config_file is not None else None
    if file is not None:
        layers.read_file(file)
    elif running is not None:
        file = running.config_file
        if file is not None and is_there(file):
            layers.read_file(file)
        elif file is not None:
            layers.read_record(farm_file(root), running.config)
        layers.lay(running.overrides)
    layers.read_environment(environ)
    return FarmSettings(
        state_dir=root, wanted=layers.check(), config_file=file, overrides=layers.overrides, running=running
    )


def load_running(state_dir: Path | str | None, environ: Mapping[str, str]) -> FarmSettings:
    """Return what runs, as it is recorded: for ``down``, which a broken configuration must not stop.

    Raises:
        ConfigError: the state directory's own record is damaged.
    """
    root = _absolute(state_dir or default_state_dir(environ))
    running = read_running(root)
    return FarmSettings(
        state_dir=root,
        wanted=running.config if running else Config(),
        config_file=running.config_file if running else None,
        running=running,
    )


def is_there(file: Path) -> bool:
    """Tell whether a configuration file exists; one that can't be looked at counts as there, and fails when read."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _absolute(path: Path | str) -> Path:
    return Path(path).expanduser().absolute()


@dataclass(slots=True)
class _Layers:
    """Values gathered from files and the environment; remembers where each came from."""

    plain: dict[str, object] = field(default_factory=dict)
    #: What of it overrides the file.
    overrides: dict[str, object] = field(default_factory=dict)
    #: ``section.key`` to the variable that set it; the file's otherwise.
    variables: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    file: Path | None = None
    file_sections: frozenset[str] = frozenset()

    def read_file(self, path: Path) -> None:
        """Take the values of a TOML file; paths in it are relative to its directory."""
        self.file = path
        try:
            self.plain = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(str(path), ("the file doesn't exist",)) from None
        except OSError as exc:
            raise ConfigError(str(path), (f"the file can't be read: {exc.strerror}",)) from exc
        except ValueError as exc:  # not TOML, or not UTF-8; its message names line and column
            raise ConfigError(str(path), (f"the file is no TOML: {exc}",)) from exc
        self.file_sections = frozenset(self.plain)
        self._resolve_paths(self.plain, path.parent)

    def read_record(self, path: Path, config: Config) -> None:
        """Take what ``up`` recorded in *path*: a whole configuration, which was checked then."""
        self.file = path
        self.plain = dict(non_defaults(config))

    def lay(self, overrides: Mapping[str, object]) -> None:
        """Lay *overrides*, of an earlier ``up``, over what is there."""
        _merge(self.overrides, overrides)
        _merge(self.plain, overrides)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """Lay ``LAZYFARM__…`` over what is there; relative paths are relative to the working directory."""
        overrides: dict[str, object] = {}
        for variable in sorted(environ):  # LAZYFARM__REGISTRIES before LAZYFARM__REGISTRIES__HOST__KEY
            if variable.startswith(_PREFIX):
                self._override(overrides, variable, environ[variable])
        self._resolve_paths(overrides, Path.cwd())
        self.lay(overrides)

    def check(self) -> Config:
        """Return the whole, checked.

        Raises:
            ConfigError: with all faults, those of each layer and of files that don't exist.
        """
        config, faults = examine(self.plain)
        every = [*self.faults, *faults, *_missing_files(config)]
        if every:
            raise ConfigError(self._source(), tuple(self._told(fault) for fault in every))
        return config

    def _override(self, overrides: dict[str, object], variable: str, text: str) -> None:
        section, *rest = variable.removeprefix(_PREFIX).lower().split("__")
        if section == REGISTRIES and not rest:
            table = _toml_value(text)
            if isinstance(table, dict):
                _merge(overrides, {REGISTRIES: table})
                for host in table:
                    self.variables[f'{REGISTRIES}."{host}"'] = variable
            else:
                self.faults.append(Fault(REGISTRIES, 'must be an inline table: { "HOST" = { KEY = VALUE } }'))
                self.variables[REGISTRIES] = variable
            return
        if section == REGISTRIES and len(rest) > 1:
            *host_words, key = rest
            host = self._host("__".join(host_words))
            _merge(overrides, {REGISTRIES: {host: {key: _value(text, key_type(section, key))}}})
            self.variables[f'{REGISTRIES}."{host}".{key}'] = variable
            return
        key = "__".join(rest)
        if not key:
            self.faults.append(Fault(f"{section}.", "names no key: write LAZYFARM__SECTION__KEY"))
            self.variables[f"{section}."] = variable
            return
        self.variables[f"{section}.{key}"] = variable
        self.variables[section] = variable  # where the section itself is unknown
        _merge(overrides, {section: {key: _value(text, key_type(section, key))}})

    def _host(self, spelled: str) -> str:
        """Find the registry host that a variable's part means."""
        hosts = self.plain.get(REGISTRIES)
        for host in hosts if isinstance(hosts, Mapping) else ():
            if re.sub(r"[^a-z0-9]", "_", host.lower()) == spelled:
                return str(host)
        return spelled

    def _told(self, fault: Fault) -> str:
        variable = self.variables.get(fault.key)
        if variable is None or fault.key in self.file_sections:
            return str(fault)
        return f"{fault.key} (from {variable}): {fault.reason}"

    def _source(self) -> str:
        parts = [str(self.file)] if self.file else []
        if self.variables:
            parts.append("the environment")
        return " and ".join(parts) or "the defaults"

    def _resolve_paths(self, plain: Mapping[str, object], base: Path) -> None:
        for section, table in plain.items():
            if not isinstance(table, dict):
                continue
            if section == REGISTRIES:
                for entry in table.values():
                    if isinstance(entry, dict):
                        _resolve(entry, f"{REGISTRIES}.*", base)
            else:
                _resolve(table, section, base)


def _resolve(table: dict[str, object], section: str, base: Path) -> None:
    for key, value in table.items():
        if f"{section}.{key}" in _PATH_KEYS and isinstance(value, str) and value:
            table[key] = str(base / Path(value).expanduser())


def _merge(under: dict[str, object], over: Mapping[str, object]) -> None:
    """Lay *over* upon *under*, table by table; no table of *over* becomes one of *under*."""
    for key, value in over.items():
        if isinstance(value, Mapping):
            there = under.get(key)
            table: dict[str, object] = dict(there) if isinstance(there, dict) else {}
            under[key] = table
            _merge(table, value)
        else:
            under[key] = value


def _value(text: str, hint: object) -> object:
    """Read a variable's text as a value of that type; what can't be read stays text, for the check to refuse."""
    if hint is str or hint is None:
        return text
    if hint == tuple[str, ...] and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    value = _toml_value(text)
    return text if value is None else value


def _toml_value(text: str) -> object | None:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return None
    return parsed["value"] if len(parsed) == 1 else None


def _missing_files(config: Config) -> list[Fault]:
    """Look for the files that are named; a directory or what we may not read is a fault as well."""
    named = [(f"{section}.{key}", str(getattr(getattr(config, section), key))) for section, key in _plain_files()]
    named += [(f'{REGISTRIES}."{host}".ca_file', entry.ca_file) for host, entry in config.registries.items()]
    faults = []
    for key, name in named:
        if not name:
            continue
        try:
            with Path(name).open("rb") as file:
                file.read(1)
        except OSError as exc:
            faults.append(Fault(key, f"{name} can't be read: {exc.strerror}"))
    return faults


def _plain_files() -> list[tuple[str, str]]:
    return [(section, key) for section, _, key in (name.partition(".") for name in FILES) if section != REGISTRIES]
