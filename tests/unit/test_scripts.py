"""Scripts of a process, and those on disk."""

import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]

_PROGRAM = """
import sys
from pathlib import Path
import storage
from cluster.config import RedisConfig
from storage.address import redis_address
from storage.link import RedisLink
from storage.scripts import script, script_names

assert Path(storage.__file__).is_relative_to(sys.argv[1])
RedisLink(redis_address(RedisConfig(url="redis://127.0.0.1:1")))
lua = Path(storage.__file__).parent / "lua"
names = script_names()
for file in lua.rglob("*.lua"):
    file.write_text("return 'exchanged'")
print(len(names), sum("exchanged" in script(name).source for name in names))
"""


def test_a_process_that_has_begun_keeps_the_scripts_of_its_release(tmp_path):
    """An upgrade exchanges them under it, and with them what they take and return."""
    for package in ("storage", "cluster"):
        shutil.copytree(_ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM, tmp_path],
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    read, changed = done.stdout.split()
    assert int(read) > 50, done.stderr
    assert changed == "0"
