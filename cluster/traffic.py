"""What a farm has moved, and what it has not had to move: the figures that laziness is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cluster.digest import Digest
from cluster.messages import LayerFetch, LayerPush
from cluster.provider import S3_KIND
from cluster.ref import RefState

#: How a layer got to a registry that it was not sent to, or nowhere: it never leaves its owner's.
_NOT_SENT = frozenset({"exists", "mounted"})
#: Names of the figures, in all and of each registry.
_FIGURES = ("fetched_bytes", "not_fetched_bytes", "joined", "pushed_bytes", "not_pushed_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Figures of some time, or of one call."""

    #: Bytes of layers read from registries.
    fetched_bytes: int = 0
    #: Bytes of layers that somebody needed and that were there, or came by another's fetch.
    not_fetched_bytes: int = 0
    #: Layers that were waited for while another call fetched them.
    joined: int = 0
    #: Bytes of layers sent to registries.
    pushed_bytes: int = 0
    #: Bytes of layers that a push did not send: the registry had them, or mounted them from a repository of its own.
    not_pushed_bytes: int = 0
    #: What of it is told of each registry, by host; these have no such parts themselves. What moved counts for who gave
    #: or got it, what wasn't fetched for who would have been asked: nobody where that is not one host. Earlier releases
    #: told of none.
    registries: Mapping[str, Traffic] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _FIGURES}
        parts = dict(self.registries)
        for registry, traffic in other.registries.items():
            parts[registry] = parts[registry] + traffic if registry in parts else traffic
        return Traffic(**sums, registries=parts)

    @property
    def avoided_bytes(self) -> int:
        """Return the bytes that were not moved."""
        return self.not_fetched_bytes + self.not_pushed_bytes

    def at(self, registries: Iterable[str]) -> Traffic:
        """Return what of it is told of some registries."""
        return sum((self.registries[name] for name in registries if name in self.registries), Traffic())

    @property
    def figures(self) -> dict[str, int]:
        """Return the figures that are not 0, by name; those of a registry by ``NAME REGISTRY``."""
        found = {name: value for name in _FIGURES if (value := getattr(self, name))}
        for registry, traffic in self.registries.items():
            found |= {f"{name} {registry}": value for name, value in traffic.figures.items()}
        return found

    @classmethod
    def of_figures(cls, figures: Mapping[str, int]) -> Self:
        """Return what :attr:`figures` told, and maybe a later release: figures that are unknown here are left out."""
        told: dict[str, dict[str, Any]] = {"": {}}
        for text, value in figures.items():
            name, _, registry = text.partition(" ")
            if name in _FIGURES:
                told.setdefault(registry, {})[name] = value
        total = told.pop("")
        return cls(**total, registries={registry: cls(**part) for registry, part in told.items()})


def fetch_traffic(layers: Iterable[LayerFetch], chain: Iterable[RefState]) -> Traffic:
    """Return what it came to that the layers of a chain were needed in the content store."""
    states = {state.record.blob.digest: state for state in chain}
    total = Traffic()
    for layer in layers:
        if layer.source == "snapshot":
            continue  # its bytes were not needed
        state = states.get(layer.digest)
        size_bytes = 0 if state is None else state.record.blob.size_bytes
        one = Traffic(
            fetched_bytes=layer.bytes_fetched,
            not_fetched_bytes=0 if layer.bytes_fetched else size_bytes,
            joined=int(layer.joined),
        )
        # Of another's fetch it is known that it was one, not always from where.
        was_asked = not layer.joined and layer.source != "present"
        registry = layer.source.partition("/")[0] if was_asked else _only_registry(state)
        total += _at("" if registry == S3_KIND else registry, one)  # a bucket of caches is none
    return total


def push_traffic(layers: Iterable[LayerPush], chain: Iterable[RefState], registry: str) -> Traffic:
    """Return what it came to that a chain was pushed to a registry."""
    sizes = blob_sizes(chain)
    layers = list(layers)
    total = Traffic(
        pushed_bytes=sum(layer.bytes for layer in layers),
        not_pushed_bytes=sum(sizes.get(layer.digest, 0) for layer in layers if layer.how in _NOT_SENT),
    )
    return _at(registry, total)


def _only_registry(state: RefState | None) -> str:
    """Return the one registry that is known to have a layer; "" where there is none, or more."""
    providers = () if state is None else state.providers
    found = {one.registry for one in providers if one.kind == "registry" and not one.is_farm}
    return found.pop() if len(found) == 1 else ""


def _at(registry: str, traffic: Traffic) -> Traffic:
    """Tell of traffic at which registry it was; "": that isn't known."""
    return replace(traffic, registries={registry: traffic}) if registry and traffic.figures else traffic


def blob_sizes(chain: Iterable[RefState]) -> dict[Digest, int]:
    """Return the bytes of each layer of a chain, by its blob."""
    return {state.record.blob.digest: state.record.blob.size_bytes for state in chain}
