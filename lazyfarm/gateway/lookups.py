"""What a gateway looks at for its drivers, in the farm's Redis."""

from __future__ import annotations

from cluster.config import Config
from lazyfarm.explain import FarmExplain
from lazyfarm.leases import FarmLeases
from lazyfarm.miss import OpenTree
from lazyfarm.records import FarmRecords
from storage.keys import Keys
from storage.link import RedisLink


class Lookups:
    """What one driver may look at.

    Args:
        config: The farm's.
        link: Its Redis; whoever gives it closes it.
        open_tree: Reads what drivers sent to it.
    """

    def __init__(self, config: Config, link: RedisLink, open_tree: OpenTree) -> None:
        keys = Keys(config.farm.name)
        self.records = FarmRecords.over(link, keys)
        self.leases = FarmLeases.over(link, keys, config.cache)
        self.explain = FarmExplain.over(link, keys, config.audit, open_tree)
