"""What the tests of one file leave for each other, and for nobody else."""

from collections.abc import Iterator

import pytest

from tests.system import kept_guard


@pytest.fixture(scope="module", autouse=True)
def _guards_end_with_their_file() -> Iterator[None]:
    yield
    kept_guard.end_all()
