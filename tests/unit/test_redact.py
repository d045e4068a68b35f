"""What must never be in a log line (invariant I8)."""

import io
import json
import logging

import pytest
import structlog

from actors.logs import configure_logs, logs_to
from cluster.redact import REDACTED, redact


@pytest.fixture(autouse=True)
def logs_as_they_were():
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.contextvars.clear_contextvars()
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "Authorization",
        "token",
        "identity_token",
        "refresh.token",
        "secret",
        "client_secret",
        "cookie",
        "s3_secret",
        "access_key",
        "secret_access_key",
        "api_key",
        "apikey",
        "credentials",
        "auth",
        "X-Registry-Auth",
    ],
)
def test_a_value_under_a_secret_s_name_is_dropped(key):
    """By the name, whatever the value is, and however deep."""
    event = redact(None, "info", {"event": "x", key: "hunter2", "deep": [{key: ["hunter2"]}]})
    assert event[key] == REDACTED
    assert "hunter2" not in repr(event)


@pytest.mark.parametrize("key", ["token_file", "tokens_used", "author", "password_file", "digest", "secretary"])
def test_names_that_only_look_alike_stay(key):
    """Redaction that eats paths and figures makes logs useless."""
    assert redact(None, "info", {key: "value"})[key] == "value"


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer hunter2hunter2",
        "basic aHVudGVyMjpodW50ZXIy",
        "redis://:hunter2@localhost",
        "https://me:hunter2@host/x",
        "https://host/blob?token=hunter2&x=1",
        "https://s3/x?X-Amz-Signature=hunter2",
    ],
)
def test_a_secret_s_form_is_dropped_wherever_it_stands(text):
    """In messages of errors, too, that somebody else wrote."""
    event = redact(None, "info", {"event": text, "error": ValueError(text), "bytes": text.encode()})
    assert "hunter2" not in repr(event)
    assert "aHVudGVyMjpodW50ZXIy" not in repr(event)


def test_figures_and_nested_data_come_through():
    """What is no secret is as it was."""
    event = {"event": "x", "n": 1, "f": 1.5, "b": True, "none": None, "list": [1, "a"], "map": {"k": "v"}}
    assert redact(None, "info", dict(event)) == event


def test_a_line_is_one_json_object_with_its_context():
    """Time, level, event, context; secrets out, also from the standard library's loggers and tracebacks."""
    stream = io.StringIO()
    configure_logs(level="info", stream=stream, node="n0")
    structlog.get_logger().info("unlazy.complete", size_bytes=3, password="hunter2")
    structlog.get_logger().debug("not.this")
    logging.getLogger("some.library").warning("with %s", "Bearer hunter2hunter2")
    try:
        int("redis://:hunter2@h")
    except ValueError:
        structlog.get_logger().exception("call.crashed")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["unlazy.complete", f"with Bearer {REDACTED}", "call.crashed"]
    assert lines[0]["node"] == "n0"
    assert lines[0]["level"] == "info"
    assert "hunter2" not in stream.getvalue()


def test_logs_go_back_to_where_they_went_before(tmp_path):
    """A command in process (a test, a notebook) leaves the logs as it found them."""
    before = structlog.get_config()["processors"]
    with logs_to(tmp_path / "logs" / "cli.log", level="info", command="pull"):
        structlog.get_logger().info("command.complete")
    assert structlog.get_config()["processors"] is before
    assert json.loads((tmp_path / "logs" / "cli.log").read_text())["command"] == "pull"
