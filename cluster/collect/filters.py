"""Filters choose items: ``type==regular,inuse!=true``, as in ``buildctl prune --filter``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cluster.collect.values import Item
from cluster.errors import InvalidArgumentError

_CONDITION = re.compile(r"\s*(?P<field>[a-z]+)\s*(?:(?P<operator>==|!=|~=|=)(?P<value>.*))?\Z", re.DOTALL)

#: What can be asked of an item, each as text. Those that are yes or no say ``true`` or ``false``.
FIELDS: Mapping[str, Callable[[Item], tuple[str, ...]]] = MappingProxyType(
    {
        "id": lambda item: (item.id,),
        "parents": lambda item: item.parents,
        "type": lambda item: (item.kind.value,),
        "description": lambda item: (item.description,),
        "inuse": lambda item: (_flag(item.is_held),),
        "shared": lambda item: (_flag(item.is_shared),),
        "private": lambda item: (_flag(not item.is_shared),),
        "lazy": lambda item: (_flag(item.size_bytes == 0),),
    }
)
_FLAGS = frozenset({"inuse", "shared", "private", "lazy"})


def _flag(is_so: bool) -> str:  # noqa: FBT001 - the value itself
    return "true" if is_so else "false"


@dataclass(frozen=True, slots=True)
class Condition:
    """One field compared."""

    field: str
    #: ``==``, ``!=`` or ``~=`` (a regular expression found in it).
    operator: str
    value: str

    def matches(self, item: Item) -> bool:
        """Tell whether the field's value, or one of them, is as wanted; for ``!=`` whether none is."""
        found = FIELDS[self.field](item)
        if self.operator == "~=":
            return any(re.search(self.value, text) for text in found)
        return (self.value in found) is (self.operator == "==")


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that hold together."""

    conditions: tuple[Condition, ...]

    def matches(self, item: Item) -> bool:
        """Tell whether every condition holds."""
        return all(condition.matches(item) for condition in self.conditions)


def parse_filter(text: str) -> Filter:
    """Read ``FIELD``, ``FIELD==VALUE``, ``FIELD!=VALUE`` or ``FIELD~=REGEX``, several with commas: all must hold.

    ``=`` is ``==``, as in ``docker buildx prune``, and a field alone is ``==true``.

    Raises:
        InvalidArgumentError: it can't be read, or names a field that there isn't.
    """
    return Filter(tuple(_parse_condition(part, text) for part in text.split(",")))


def _parse_condition(part: str, text: str) -> Condition:
    found = _CONDITION.match(part)
    if found is None:
        raise InvalidArgumentError("filter", repr(text), "write it as FIELD==VALUE, FIELD!=VALUE or FIELD~=REGEX")
    field, operator, value = found["field"], found["operator"], (found["value"] or "").strip()
    if field not in FIELDS:
        raise InvalidArgumentError("filter", repr(text), f"there is no field {field!r}, but {', '.join(FIELDS)}")
    if operator is None:
        if field not in _FLAGS:
            raise InvalidArgumentError("filter", repr(text), f"say what {field} shall be: {field}==VALUE")
        return Condition(field, "==", "true")
    if operator == "~=":
        try:
            re.compile(value)
        except re.error as exc:
            raise InvalidArgumentError("filter", repr(text), f"{value!r} is no regular expression: {exc}") from exc
    elif field in _FLAGS and value not in ("true", "false"):
        raise InvalidArgumentError("filter", repr(text), f"{field} is true or false")
    return Condition(field, "==" if operator == "=" else operator, value)
