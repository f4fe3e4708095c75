"""A federation on a vhost of its own, ended with the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation
from tests.acceptance.secured import Secured


@pytest.fixture
def federation(tmp_path: Path, vhost_url: str) -> Iterator[Federation]:
    made = Federation(tmp_path, vhost_url)
    yield made
    made.end()


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A federation from nothing, with its broker: ada and bob are its workers, and eve."""
    made = Secured(tmp_path_factory.mktemp("secured") / "fed")
    try:
        made.fluffle("broker", "secure", str(made.folder), "--start")
        made.fluffle("invite", "ada", "bob", "eve", "--dir", str(made.folder))
        yield made
    finally:
        made.fluffle("broker", "stop", "--dir", str(made.folder))
