"""``WWW-Authenticate`` challenges and the scopes of tokens: what the texts say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_SEPARATOR = re.compile(r"[\s,]*")
_SCHEME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TOKEN68 = re.compile(r"[ \t]+[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
# Values outside quotes are read leniently: some registries leave the quotes of a scope or realm out.
_PARAMETER = re.compile(r"""([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """One way in which a registry lets itself be authorized."""

    #: In lower case: ``bearer``, ``basic``.
    scheme: str
    #: Names in lower case.
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(header: str) -> list[Challenge]:
    """Parse a ``WWW-Authenticate`` header, or several of them joined with commas.

    Commas within quotes belong to their value (``scope="repository:a:pull,push"``). Never raises: what
    can't be read ends the list. The grammar is RFC 9110, 11.6.1.
    """
    found: list[Challenge] = []
    position = 0
    while True:
        separator = _SEPARATOR.match(header, position)
        position = separator.end() if separator else position
        parameter = _PARAMETER.match(header, position)
        if parameter and found:
            name, quoted, bare = parameter.groups()
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
            found[-1].parameters.setdefault(name.lower(), value)
            position = parameter.end()
            continue
        scheme = _SCHEME.match(header, position)
        if scheme is None:
            return found
        found.append(Challenge(scheme=scheme[0].lower()))
        token68 = _TOKEN68.match(header, scheme.end())
        position = token68.end() if token68 else scheme.end()


def merge_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Merge scopes of one resource into one, and sort: two sets that ask for the same are equal.

    ``repository:a:pull`` and ``repository:a:push`` are ``repository:a:pull,push``. A scope is
    ``TYPE:NAME:ACTION[,ACTION]``, where the name may have colons.
    """
    return tuple(
        f"{resource}:{','.join(sorted(actions))}" if actions else resource
        for resource, actions in sorted(_actions_of(scopes).items())
    )


def covers(held: Iterable[str], wanted: Iterable[str]) -> bool:
    """Tell whether a token for the scopes *held* is good for all of *wanted* too."""
    actions_of = _actions_of(held)
    return all(
        resource in actions_of and actions <= actions_of[resource] for resource, actions in _actions_of(wanted).items()
    )


def _actions_of(scopes: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for scope in scopes:
        resource, colon, actions = scope.rpartition(":")
        if colon and ":" in resource:
            found.setdefault(resource, set()).update(action for action in actions.split(",") if action)
        elif scope:
            found.setdefault(scope, set())
    return found


def pull_scope(repository: str) -> str:
    """Return the scope that reading *repository* needs."""
    return f"repository:{repository}:pull"


def push_scope(repository: str) -> str:
    """Return the scope that writing to *repository* needs."""
    return f"repository:{repository}:pull,push"


def drop_scope(repository: str) -> str:
    """Return the scope that dropping an upload needs: distribution asks for ``delete`` there."""
    return f"repository:{repository}:delete,pull,push"
