"""Many workers in one process: what they are called, where their data is, and how often they speak."""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from broker.errors import FluffleError, UsageError
from fluffle import app
from workers import host
from workers.service import Worker
from workers.work import LEASE_S, Who


def test_each_has_a_number_and_its_data_by_that_number() -> None:
    names, sources = host.named("ann", "shards/{index}-of-{count}.pt", 3)
    assert names == ["ann-1", "ann-2", "ann-3"]
    assert sources == ["shards/1-of-3.pt", "shards/2-of-3.pt", "shards/3-of-3.pt"]
    assert host.named("ann", "all {of} it", 2)[1] == ["all {of} it"] * 2


def test_many_workers_speak_no_more_often_than_the_host_may() -> None:
    assert host.lease_s(1) == LEASE_S
    assert host.lease_s(300) == LEASE_S
    for many in (1, 300, 1000, 10_000):
        assert 3 * many / host.lease_s(many) <= host.HELLOS_PER_S


def test_a_name_that_has_no_room_for_its_number_is_refused() -> None:
    command = ["worker", "toy", "--broker", "amqp://localhost", "--data", "x", "--name", "a" * 62, "--many", "10"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UsageError)
    assert f"a worker cannot be called '{'a' * 62}-10'" in str(done.exception)


@dataclass(frozen=True)
class Actor:
    """Stands in for a worker: leaves when it is told to, unless it fails at once."""

    who: Who
    failure: Exception | None = None

    async def serve(self, stop: asyncio.Event) -> None:
        if self.failure:
            raise self.failure
        await stop.wait()


def cast_of(*failures: Exception | None) -> list[Worker]:
    actors: list[Any] = [Actor(Who(f"w-{i}", "x", hosted=True), failure) for i, failure in enumerate(failures, 1)]
    return cast(list[Worker], actors)


async def test_one_that_fails_ends_alone_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(host.serve(cast_of(None, UsageError("no data."), None), stop))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not serving.done()
    assert "w-2 has ended: no data." in caplog.text
    stop.set()
    await serving


async def test_when_all_have_failed_the_first_reason_is_told() -> None:
    with pytest.raises(FluffleError, match="first"):
        await host.serve(cast_of(UsageError("first."), UsageError("second.")), asyncio.Event())


async def test_what_the_disk_refuses_is_told_as_the_command_line_knows_it() -> None:
    refused = OSError(30, "Read-only file system", "ada.toy.1.1.update")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        await host.serve(cast_of(refused), asyncio.Event())
    assert caught.value is refused


async def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await host.serve(cast_of(None, ZeroDivisionError()), asyncio.Event())
    assert isinstance(caught.value.exceptions[0], ZeroDivisionError)
