"""Every key explains itself: from the comments of configs/default.toml."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cluster.config_check import keys
from cluster.errors import InvalidArgumentError
from lazyfarm.cli.main import app
from lazyfarm.config_reference import every_key, explain


def run(*args, env=None, code=0):
    result = CliRunner().invoke(app, ["config", *args], env=env)
    assert result.exit_code == code, result.output
    return result.stdout


def test_every_key_is_explained():
    """Those of the code, no more and no less, each with some words."""
    every = every_key()
    assert {reference.key.replace("registries.default", "registries.*") for reference in every} == set(keys())
    assert all(len(reference.text) > 20 for reference in every)


def test_a_key_is_found_by_its_name_its_section_or_a_registrys_own():
    (keep,) = explain("cache.keep_s")
    assert (keep.default, keep.variable) == ("604800.0 (a week)", "LAZYFARM__CACHE__KEEP_S")
    assert explain("keep_s") == [keep]
    assert keep in explain("cache")
    assert explain('registries."ghcr.io:443".mirrors') == explain("registries.default.mirrors") == explain("mirrors")
    assert len(explain("registries")) > 5


@pytest.mark.parametrize(
    ("name", "said"), [("cache.keeps", "lists every key"), ("ttl", "there are .*cache.lease_ttl_s")]
)
def test_an_unknown_key_is_told_what_there_is(name, said):
    with pytest.raises(InvalidArgumentError, match=said):
        explain(name)


def test_what_is_set_here_is_told(tmp_path):
    """The value that holds, its default, and how to set it."""
    env = {"LAZYFARM_STATE_DIR": str(tmp_path), "LAZYFARM__CACHE__KEEP_S": "3600"}
    said = run("explain", "cache.keep_s", env=env)
    assert said.startswith("cache.keep_s = 3600.0\n  Seconds that what a command line made stays held")
    assert "default 604800.0 (a week); environment LAZYFARM__CACHE__KEEP_S" in said
    assert json.loads(run("show", "--json", env=env)) == {"set": {"cache.keep_s": 3600.0}}
    assert run("show", env={"LAZYFARM_STATE_DIR": str(tmp_path)}) == "every key has its default\n"
    assert "no key is called so" in run("explain", "nothing", "--json", env=env, code=1)
