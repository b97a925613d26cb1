"""The commands, ready to run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.settings import dvae, prior
from tests.e2e.warm import Server


@pytest.fixture(scope="session")
def dalle(tmp_path_factory) -> Iterator[Server]:
    """`dalle(*arguments)` runs a command to its end; `dalle.start(*arguments)` lets it run."""
    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def trained(dalle, tmp_path_factory) -> Path:
    """A run with both stages and their states, to be left as it is."""
    run = tmp_path_factory.mktemp("trained") / "run"
    for command in (dvae(run, steps=2), prior(run, steps=2)):
        done = dalle(*command)
        assert done.code == 0, done.err
    return run
