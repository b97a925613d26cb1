"""The commands, ready to run."""

from collections.abc import Iterator

import pytest

from tests.e2e.warm import Server


@pytest.fixture(scope="session")
def dalle(tmp_path_factory) -> Iterator[Server]:
    """`dalle(*arguments)` runs a command to its end; `dalle.start(*arguments)` lets it run."""
    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()
