"""Fixtures for all tests, from the doubles."""

pytest_plugins = ["tests.doubles.s3"]
