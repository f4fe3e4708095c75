"""A federation on a vhost of its own, ended with the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation


@pytest.fixture
def federation(tmp_path: Path, vhost_url: str) -> Iterator[Federation]:
    made = Federation(tmp_path, vhost_url)
    yield made
    made.end()
