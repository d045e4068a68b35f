"""Files, environment and what runs, put together."""

from pathlib import Path

import pytest

from cluster.config import CacheConfig, Config, FetchConfig, NodeConfig, RegistryConfig
from cluster.config_check import keys
from cluster.errors import ConfigError
from cluster.settings import Running
from lazyfarm.settings import default_state_dir, load_running, load_settings, load_wanted
from storage.farm_file import farm_file, forget_running, read_running, write_running


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def write_config(tmp_path):
    def write(text):
        path = tmp_path / "farm-config.toml"
        path.write_text(text)
        return path

    return write


def running(**changes):
    values = {
        "farm_id": "7d5a",
        "farm_name": "lazyfarm",
        "redis_url": "redis://127.0.0.1:7001/0",
        "redis_password_file": "/state/secrets/redis",
        "s3_endpoint": "http://127.0.0.1:7002",
        "s3_region": "us-east-1",
        "s3_bucket": "lazyfarm",
        "s3_credentials_file": "/state/secrets/s3",
        "ray_address": "127.0.0.1:7003",
        "ray_token_file": "/state/secrets/ray",
        "ray_jobs_url": "http://127.0.0.1:7004",
    }
    return Running(**{**values, **changes})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LAZYFARM_STATE_DIR": "/a", "XDG_STATE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_STATE_HOME": "/b", "HOME": "/c"}, "/b/lazyfarm"),
        ({"HOME": "/c"}, "/c/.local/state/lazyfarm"),
    ],
)
def test_the_state_directory_follows_the_environment(environ, expected):
    """The farm's own variable first, then the XDG base directory specification."""
    assert default_state_dir(environ) == Path(expected)


def test_a_named_state_directory_wins_over_the_environment(state):
    """--state-dir is what the user says now."""
    assert load_settings(state, None, {"LAZYFARM_STATE_DIR": "/elsewhere"}).state_dir == state


def test_nothing_set_is_the_defaults(state):
    """An empty state directory and an empty environment need no file."""
    settings = load_settings(state, None, {})
    assert settings.wanted == settings.config == Config()
    assert settings.running is None


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults(state, write_config):
    """Three layers, key by key."""
    file = write_config("[fetch]\nattempts = 7\nranges_per_layer = 5\n")
    config = load_settings(state, file, {"LAZYFARM__FETCH__ATTEMPTS": "9"}).config
    assert (config.fetch.attempts, config.fetch.ranges_per_layer, config.fetch.layers_per_node) == (9, 5, 4)


_EXAMPLES = {
    "farm.name": ("x", "x"),
    "redis.url": ("redis://h:1/2", "redis://h:1/2"),
    "s3.endpoint": ("https://h", "https://h"),
    "s3.region": ("eu", "eu"),
    "s3.bucket": ("abc", "abc"),
    "ray.address": ("h:1", "h:1"),
    "ray.gcs_redis": ("redis://h:1", "redis://h:1"),
    "ray.dashboard": ("false", False),
    "web.enabled": ("false", False),
    "gateway.enabled": ("true", True),
    "node.root": ("/r", "/r"),
    "node.snapshotter": ("copying", "copying"),
    "log.level": ("debug", "debug"),
    "registries.*.mirrors": ("a, b:5000", ("a", "b:5000")),
    "registries.*.plain_http": ("true", True),
}


@pytest.mark.parametrize("key", keys())
def test_every_key_can_be_set_by_the_environment(key, state, tmp_path):
    """LAZYFARM__SECTION__KEY for each key there is."""
    section, _, name = key.rpartition(".")
    environ = {}
    if name.endswith("_file"):
        secret = tmp_path / "secret"
        secret.write_text("s")
        text, expected = str(secret), str(secret)
        # A secret's file belongs to a service that is named, and a key's to a certificate.
        environ = {
            "LAZYFARM__REDIS__URL": "rediss://h",
            "LAZYFARM__REDIS__CLIENT_CERT_FILE": str(secret),
            "LAZYFARM__S3__ENDPOINT": "http://h",
            "LAZYFARM__RAY__ADDRESS": "h:1",
            "LAZYFARM__GATEWAY__CERT_FILE": str(secret),
            "LAZYFARM__GATEWAY__KEY_FILE": str(secret),
        }
    elif key in _EXAMPLES:
        text, expected = _EXAMPLES[key]
    else:
        owner = Config().registry("default") if "*" in section else getattr(Config(), section)
        expected = getattr(owner, name)
        text = str(expected)
    variable = f"LAZYFARM__{section.replace('*', 'default').replace('.', '__')}__{name}".upper()
    config = load_settings(state, None, {**environ, variable: text}).wanted
    owner = config.registry("default") if "*" in section else getattr(config, section)
    assert getattr(owner, name) == expected


def test_a_registry_of_the_file_is_reached_by_its_spelled_out_host(state, write_config):
    """Variable names can't hold dots and colons: they are underscores."""
    file = write_config('[registries."127.0.0.1:5000"]\nmax_concurrency = 3\n')
    config = load_settings(state, file, {"LAZYFARM__REGISTRIES__127_0_0_1_5000__ATTEMPTS": "2"}).config
    entry = config.registry("127.0.0.1:5000")
    assert (entry.max_concurrency, entry.attempts) == (3, 2)


def test_any_registry_is_reached_by_an_inline_table(state):
    """What no file names can't be spelled as a variable, but as TOML."""
    environ = {"LAZYFARM__REGISTRIES": '{ "r.internal:5000" = { plain_http = true, mirrors = ["m"] } }'}
    entry = load_settings(state, None, environ).config.registry("r.internal:5000")
    assert entry.plain_http
    assert entry.mirrors == ("m",)


def test_faults_of_file_environment_and_disk_come_together(state, write_config, tmp_path):
    """One error, each fault with its key and where it came from."""
    file = write_config('[redis]\nurl = "redis://h"\npassword_file = "nothere"\n[fetch]\nattemps = 3\n')
    environ = {"LAZYFARM__FLIGHT__POLL_S": "soon", "LAZYFARM__NOD__ROOT": "/x", "LAZYFARM__FARM": "x"}
    with pytest.raises(ConfigError) as caught:
        load_settings(state, file, environ)

    told = caught.value.faults
    assert str(file) in caught.value.source
    assert len(told) == 5, told
    assert any(f.startswith("fetch.attemps: unknown key; did you mean attempts?") for f in told)
    assert f"redis.password_file: {tmp_path / 'nothere'} can't be read: No such file or directory" in told
    assert any(f.startswith("flight.poll_s (from LAZYFARM__FLIGHT__POLL_S): must be a number, is text") for f in told)
    assert any(f.startswith("nod (from LAZYFARM__NOD__ROOT): unknown section; did you mean node?") for f in told)
    assert any("LAZYFARM__FARM" in f and "names no key" in f for f in told)


def test_paths_of_a_file_are_relative_to_it(state, write_config, tmp_path):
    """A configuration directory can be moved as a whole."""
    (tmp_path / "pw").write_text("secret")
    file = write_config('[redis]\nurl = "redis://h"\npassword_file = "pw"\n')
    assert load_settings(state, file, {}).config.redis.password_file == str(tmp_path / "pw")


def test_a_directory_where_a_file_should_be_is_a_fault(state, write_config, tmp_path):
    """It exists, but nothing can be read from it."""
    file = write_config(f'[s3]\nca_file = "{tmp_path}"\n')
    with pytest.raises(ConfigError, match="Is a directory"):
        load_settings(state, file, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [("[redis\n", "no TOML"), ("\xff", "no TOML"), (None, "doesn't exist")],
    ids=["syntax", "bytes", "absent"],
)
def test_a_file_that_cannot_be_read_is_a_config_error(text, says, state, tmp_path):
    """With the file's name, and line and column where there are any."""
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says) as caught:
        load_settings(state, path, {})
    assert caught.value.source == str(path)


def test_variables_of_others_are_left_alone(state):
    """Only the double underscore is ours to check; LAZYFARM_DEBUG and the like are not keys."""
    load_settings(state, None, {"LAZYFARM_DEBUG": "1", "LAZYFARM_STATE_DIR": "/x", "PATH": "/bin"})


def test_what_runs_survives_writing_and_reading(state):
    """Any text a path can hold comes back as it was."""
    config = Config(
        fetch=FetchConfig(attempts=7),
        cache=CacheConfig(keep_s=100.5),
        node=NodeConfig(root='/a "b"'),
        registries={
            "r.internal:5000": RegistryConfig(mirrors=("m:1", "n"), plain_http=True, max_requests_per_s=0.00001),
            "plain": RegistryConfig(),
        },
    )
    overrides = {"fetch": {"attempts": 7}, "registries": {"r.internal:5000": {"mirrors": ["m:1", "n"]}}}
    written = running(
        config_file=Path('/odd "path"\\with\ttab/ü.toml'), s3_bucket="b", config=config, overrides=overrides
    )
    write_running(state, written)
    assert read_running(state) == written
    forget_running(state)
    forget_running(state)
    assert read_running(state) is None


def test_a_record_of_an_earlier_release_is_read(state):
    """What it has no word of is not there: the farm takes no jobs until the next `up`."""
    path = write_running(state, running())
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "jobs_url" not in line))
    assert read_running(state) == running(ray_jobs_url="")


def test_what_runs_is_filled_in_but_what_was_wanted_stays_known(state):
    """Every command finds the farm by its directory; `up` still sees that it is to start its own Redis."""
    write_running(state, running())
    settings = load_settings(state, None, {})
    assert settings.wanted.redis.url == ""
    assert settings.config.redis.url == "redis://127.0.0.1:7001/0"
    assert settings.config.s3.credentials_file == "/state/secrets/s3"
    assert settings.config.ray.address == "127.0.0.1:7003"


def bring_up(state, file, environ):
    """Record what an `up` with that file and environment would."""
    wanted = load_wanted(state, file, environ)
    write_running(state, running(config_file=wanted.config_file, config=wanted.wanted, overrides=wanted.overrides))
    return wanted.wanted


def test_what_up_was_given_holds_for_later_commands(state, write_config):
    """File and environment together, without naming either again, and whatever becomes of the file."""
    file = write_config("[cache]\nkeep_s = 100\n")
    bring_up(state, file, {"LAZYFARM__FETCH__ATTEMPTS": "9"})
    for change in (lambda: None, lambda: file.write_text("[cache]\nkeep_s = 200\n"), file.unlink):
        change()
        config = load_settings(state, None, {}).config
        assert (config.cache.keep_s, config.fetch.attempts) == (100.0, 9)


def test_up_reads_the_file_again_and_remembers_what_the_environment_overrode(state, write_config):
    """An edit takes effect; an override stays until a file is named anew or another override replaces it."""
    file = write_config("[fetch]\nattempts = 7\nranges_per_layer = 5\n[cache]\nshards = 3\n")
    bring_up(state, file, {"LAZYFARM__FETCH__ATTEMPTS": "9"})
    file.write_text("[fetch]\nattempts = 8\nranges_per_layer = 6\n")

    def figures(config):
        return config.fetch.attempts, config.fetch.ranges_per_layer, config.cache.shards

    assert figures(bring_up(state, None, {})) == (9, 6, 2)
    assert figures(bring_up(state, None, {"LAZYFARM__FETCH__ATTEMPTS": "4"})) == (4, 6, 2)
    assert figures(bring_up(state, None, {})) == (4, 6, 2)
    assert figures(bring_up(state, file, {})) == (8, 6, 2)


def test_up_goes_on_with_what_is_recorded_where_the_file_is_gone(state, write_config):
    """Nothing changes by that; when the file is back, it is read again."""
    file = write_config("[fetch]\nattempts = 7\n")
    before = bring_up(state, file, {"LAZYFARM__CACHE__KEEP_S": "100"})
    file.unlink()
    assert bring_up(state, None, {}) == before
    write_config("[fetch]\nattempts = 8\n")
    after = bring_up(state, None, {})
    assert (after.fetch.attempts, after.cache.keep_s) == (8, 100.0)


def test_a_file_that_is_named_must_be_there(state, tmp_path):
    """What was recorded is no answer to a name that the user gave just now."""
    bring_up(state, None, {})
    with pytest.raises(ConfigError, match="doesn't exist"):
        load_wanted(state, tmp_path / "gone.toml", {})


def test_a_command_s_own_environment_holds_for_it_alone_but_never_splits_the_farm(state):
    """Addresses and the ring's size are everybody's; the rest is that process's own."""
    bring_up(state, None, {"LAZYFARM__CACHE__SHARDS": "4"})
    environ = {"LAZYFARM__CACHE__SHARDS": "2", "LAZYFARM__CACHE__KEEP_S": "100"}
    config = load_settings(state, None, environ).config
    assert (config.cache.shards, config.cache.keep_s) == (4, 100.0)
    assert load_settings(state, None, {}).config.cache.keep_s == Config().cache.keep_s


def test_faults_are_counted_and_told_where_they_came_from(state, write_config):
    """In words that read as a sentence."""
    environ = {"LAZYFARM__FETCH__ATTEMPTS": "0", "LAZYFARM__FLIGHT__POLL_S": "soon"}
    with pytest.raises(ConfigError, match=r"^configuration from the environment has 2 faults: "):
        load_settings(state, None, environ)
    file = write_config("[fetch]\nattempts = 0\n")
    with pytest.raises(ConfigError, match=rf"^configuration from {file} has 1 fault: "):
        load_settings(state, file, {})


def test_what_runs_wins_over_an_edited_address(state):
    """An edit takes effect with the next `up`; until then all commands see one farm."""
    write_running(state, running())
    environ = {"LAZYFARM__REDIS__URL": "redis://elsewhere:1/0", "LAZYFARM__FARM__NAME": "other"}
    settings = load_settings(state, None, environ)
    assert settings.config.redis.url == "redis://127.0.0.1:7001/0"
    assert settings.config.farm.name == "lazyfarm"
    assert settings.wanted.redis.url == "redis://elsewhere:1/0"


def test_a_broken_configuration_does_not_hide_what_runs(state, write_config):
    """`down` must be able to end a farm whose configuration was broken, or deleted, since."""
    write_running(state, running(config_file=write_config("[redis\n")))
    assert load_running(state, {"LAZYFARM__NONE__SUCH": "1"}).running is not None


@pytest.mark.parametrize(
    "text", ["version = 2\n", "version = 1\n", "version = 1\nfarm = 3\n", "=", "version = 1\n[farm]\nid = 1\n"]
)
def test_a_damaged_record_of_what_runs_is_a_config_error(text, state):
    """It names the file; nothing is guessed."""
    farm_file(state).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_running(state)
    assert caught.value.source == str(state / "farm.toml")
