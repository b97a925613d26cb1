"""Processes that are ready to train together."""

from collections.abc import Iterator

import pytest

from tests.distributed.warm import Server
from tests.e2e.conftest import dalle  # noqa: F401 (a fixture: commands of one process)


@pytest.fixture(scope="session")
def teams(tmp_path_factory) -> Iterator[Server]:
    """`teams(module, functions, *arguments, local=…)` calls them in so many processes."""
    server = Server(tmp_path_factory.mktemp("teams"))
    yield server
    server.close()
