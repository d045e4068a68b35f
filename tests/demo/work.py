"""What the farm's workers say, in their own logs, that they did in a step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


class Work:
    """Ops and extracts since it was made; to be read when the step has ended: lines are written before answers."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._begin = {path: path.stat().st_size for path in logs.glob("*.jsonl")}
        #: By vertex, how often its op ran, on whatever node.
        self.ops: Counter[str] = Counter()
        #: Kinds of those ops.
        self.kinds: Counter[str] = Counter()
        #: Calls that had something extracted on a node, or found that it is there.
        self.extracts = 0

    def read(self) -> None:
        """Read what was logged since."""
        for path in self._logs.glob("*.jsonl"):
            with path.open("rb") as log:
                log.seek(self._begin.get(path, 0))
                for line in log:
                    self._take(json.loads(line))

    def _take(self, line: dict[str, str]) -> None:
        match line["event"]:
            case "op.complete" | "op.failed":
                self.ops[line["vertex"]] += 1
                self.kinds[line["op"]] += 1
            case "extract.complete" | "extract.failed":
                self.extracts += 1
            case _:
                pass
