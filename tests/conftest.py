"""Fixtures for all tests, from the doubles."""

pytest_plugins = [
    "tests.doubles.documents",
    "tests.doubles.farm",
    "tests.doubles.s3",
    "tests.doubles.stores",
    "tests.doubles.solver_stores",
    "tests.doubles.registry",
    "tests.doubles.registry_faults",
    "tests.doubles.token_server",
    "tests.doubles.told",
]
