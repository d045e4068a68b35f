"""``python -m lazyfarm``."""

from lazyfarm.cli.main import run

run()
