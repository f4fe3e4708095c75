"""The two grounds on which every promise of the link is tested."""

from collections.abc import AsyncIterator

import pytest

from tests.contract.ground import Ground, MemoryGround, RabbitGround


@pytest.fixture(params=["memory", "rabbitmq"])
async def ground(request: pytest.FixtureRequest) -> AsyncIterator[Ground]:
    made: Ground
    made = MemoryGround() if request.param == "memory" else RabbitGround(request.getfixturevalue("vhost_url"))
    yield made
    await made.close()


@pytest.fixture
async def rabbit_ground(vhost_url: str) -> AsyncIterator[RabbitGround]:
    made = RabbitGround(vhost_url)
    yield made
    await made.close()
