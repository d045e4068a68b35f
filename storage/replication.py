"""What a Redis server says of its replicas."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.redis_url import Place

_REPLICA = re.compile(r"slave[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """The section ``replication`` of INFO, of a primary."""

    #: Offset in the stream of writes that the server has come to.
    written: int
    #: Offsets that replicas which follow it say they have; they say so once a second.
    received: tuple[int, ...]
    #: Where its replicas are.
    places: tuple[Place, ...]


def read_replication(info: bytes) -> Replication:
    """Return what *info* says; of a replica, that it has none of its own."""
    facts = dict(line.partition(":")[::2] for line in info.decode().splitlines())
    # slave0:ip=10.0.0.7,port=6379,state=online,offset=1234,lag=0
    replicas = [
        dict(field.partition("=")[::2] for field in value.split(","))
        for name, value in facts.items()
        if _REPLICA.fullmatch(name)
    ]
    return Replication(
        written=int(facts.get("master_repl_offset", 0)),
        received=tuple(int(said["offset"]) for said in replicas if said.get("state") == "online"),
        places=tuple(Place(said["ip"], int(said["port"])) for said in replicas),
    )
