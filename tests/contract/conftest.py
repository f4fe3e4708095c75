"""The three grounds on which every promise of the link is tested."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.invitation import Access
from tests.contract.ground import Ground, MemoryGround, RabbitGround


@pytest.fixture(params=["memory", "rabbitmq", "rabbitmq by invitation"])
async def ground(request: pytest.FixtureRequest) -> AsyncIterator[Ground]:
    made: Ground
    if request.param == "memory":
        made = MemoryGround()
    elif request.param == "rabbitmq":
        made = RabbitGround(Access.at(request.getfixturevalue("vhost_url")))
    else:
        made = RabbitGround(Access.invited(request.getfixturevalue("invitation")))
    yield made
    await made.close()


@pytest.fixture
async def rabbit_ground(vhost_url: str) -> AsyncIterator[RabbitGround]:
    made = RabbitGround(Access.at(vhost_url))
    yield made
    await made.close()


@pytest.fixture
async def invited_ground(invitation: Path) -> AsyncIterator[RabbitGround]:
    made = RabbitGround(Access.invited(invitation))
    yield made
    await made.close()
