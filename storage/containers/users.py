"""Users and groups as a root's own ``/etc/passwd`` and ``/etc/group`` have them; this machine's are never asked.

Follows ``moby/sys/user.GetExecUser`` for who a command runs as, and BuildKit's file ops for who a file
belongs to: the two differ in what a lone number means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cluster.errors import UnknownUserError
from storage.file_ops.paths import read_file
from storage.snapshots.tree import Tree

_MAX_FILE_BYTES: Final = 16 << 20
#: The highest ID; the one above means "none" to the kernel.
_MAX_ID: Final = (1 << 32) - 2
_PASSWD_FIELDS: Final = 4
_GROUP_FIELDS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A user and a group by number."""

    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUser:
    """Who a process runs as."""

    uid: int = 0
    gid: int = 0
    #: Supplementary groups; the primary one among them, as containerd does since CVE-2023-25173.
    groups: tuple[int, ...] = (0,)


def find_user(tree: Tree, user: str) -> ProcessUser:
    """Return who ``user[:group]``, by name or number, is in *tree*; "" is root.

    A user's groups of ``/etc/group`` count only where no group is given. A number that isn't listed is
    taken as it is, with group 0.

    Raises:
        UnknownUserError: a name isn't listed, a number is out of range, or a file can't be read.
    """
    name, colon, group = user.partition(":")
    if colon and not group:
        raise UnknownUserError(user, "no group after the colon")
    name = name or "0"
    uid, gid, login = _number(user, name), 0, ""
    for fields in _entries(tree, user, "/etc/passwd", _PASSWD_FIELDS):
        if fields[0] == name if uid is None else int(fields[2]) == uid:
            uid, gid, login = int(fields[2]), int(fields[3]), fields[0]
            break
    if uid is None:
        raise UnknownUserError(user, f"no {name!r} in the root's /etc/passwd")
    if group:
        gid = _find_group(tree, user, group)
        return ProcessUser(uid=uid, gid=gid, groups=(gid,))
    groups = [gid]
    if login:
        for fields in _entries(tree, user, "/etc/group", _GROUP_FIELDS):
            member = int(fields[2])
            if login in fields[3].split(",") and member not in groups:
                groups.append(member)
    return ProcessUser(uid=uid, gid=gid, groups=tuple(groups))


def find_owner(tree: Tree, owner: str) -> Owner | None:
    """Return whom ``uid[:gid]``, or names looked up in *tree*, means as an owner of files; None for "".

    A name alone brings its own group, a number alone the group of the same number.

    Raises:
        UnknownUserError: as :func:`find_user`.
    """
    if not owner:
        return None
    name, colon, group = owner.partition(":")
    if colon and not group:
        raise UnknownUserError(owner, "no group after the colon")
    uid = _number(owner, name or "0")
    gid = uid
    if uid is None:
        for fields in _entries(tree, owner, "/etc/passwd", _PASSWD_FIELDS):
            if fields[0] == name:
                uid, gid = int(fields[2]), int(fields[3])
                break
    if uid is None or gid is None:
        raise UnknownUserError(owner, f"no {name!r} in the destination's /etc/passwd")
    return Owner(uid=uid, gid=_find_group(tree, owner, group) if group else gid)


def _find_group(tree: Tree, whole: str, group: str) -> int:
    gid = _number(whole, group)
    if gid is not None:
        return gid
    for fields in _entries(tree, whole, "/etc/group", _GROUP_FIELDS):
        if fields[0] == group:
            return int(fields[2])
    raise UnknownUserError(whole, f"no {group!r} in the root's /etc/group")


def _entries(tree: Tree, user: str, path: str, wanted: int) -> Iterator[list[str]]:
    """Yield the fields of the lines of a passwd or group file, malformed ones left out."""
    try:
        data = read_file(tree, path, limit_bytes=_MAX_FILE_BYTES)
    except OSError as exc:
        raise UnknownUserError(user, f"{path} can't be read: {exc.strerror}") from exc
    for line in (data or b"").decode("utf-8", "surrogateescape").splitlines():
        fields = line.strip().split(":")
        if len(fields) < wanted or line.startswith("#"):
            continue
        numbers = fields[2:wanted]
        if all(text.isascii() and text.isdigit() and int(text) <= _MAX_ID for text in numbers):
            yield [*fields, "", "", "", ""]


def _number(whole: str, text: str) -> int | None:
    """Return *text* as an ID; None where it is a name."""
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > len(str(_MAX_ID)) or int(text) > _MAX_ID:
        raise UnknownUserError(whole, f"{text} is not between 0 and {_MAX_ID}")
    return int(text)
