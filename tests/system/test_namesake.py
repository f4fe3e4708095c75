"""Two workers of one name, as when a command is pasted into a second terminal."""

from pathlib import Path

import pytest

from broker.errors import UsageError
from tests.system.rig import federation


async def test_the_second_of_two_workers_with_one_name_is_told_so_and_the_run_goes_on_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.post.NAMESAKE_S", 0.05)
    async with federation(tmp_path, rounds=3, cohort=1, quorum=1) as fed:
        fed.lasting = False
        first = fed.join("ada")
        first.lesson.gate.clear()
        fed.begin()
        await fed.until(lambda: "ada" in fed.here())
        incarnation = fed.incarnation("ada")
        second = fed.join("ada")
        with pytest.raises(UsageError, match="another worker called ada is connected"):
            await second.task
        assert fed.incarnation("ada") == incarnation, "the second one has spoken in the name of the first"
        fed.places["first"] = first
        first.lesson.gate.set()
        await fed.end()
        assert fed.counted() == [["ada"]] * 3
