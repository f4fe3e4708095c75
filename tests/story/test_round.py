"""Two rounds, told by their lines in the history: who was counted, who could not, who came too late.

Ada trains. Ben's learner raises. Cleo's line is so slow that her first update comes when the round is over.
"""

import asyncio
from collections.abc import Awaitable
from pathlib import Path

from broker.link import Delivery, Outgoing
from broker.messages import Closed, Part, Refusal, Update
from tests.system.rig import expected, federation, read


async def test_the_history_tells_who_was_counted_and_why_the_others_were_not(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, quorum=1, round_s=3.0) as run:
        ada, ben, cleo = (run.join(name) for name in ("ada", "ben", "cleo"))
        ben.lesson.fails = "ValueError: the file of rows is empty"
        through, sent = asyncio.Event(), asyncio.Event()

        def slow(what: Outgoing | Delivery) -> Awaitable[object] | None:
            message = read(what)
            if isinstance(message, Update):
                sent.set()
            if isinstance(message, Closed):  # has not reached her yet
                return sent.wait()
            return through.wait() if isinstance(what, Outgoing) and isinstance(message, Part) else None

        def mend(what: Outgoing | Delivery) -> None:
            if isinstance(what, Outgoing) and isinstance(read(what), Refusal):
                ben.lesson.fails = ""

        cleo.wire.hook, ben.wire.hook = slow, mend
        run.begin()
        await run.until(lambda: len(run.lines("round")) == 1)
        through.set()
        await run.end()

        first, second = run.lines("round")

        assert first["cohort"] == ["ada", "ben", "cleo"]
        assert list(first["counted"]) == ["ada"]
        assert first["refused"] == {"ben": "ValueError: the file of rows is empty"}
        assert first["why"] == "1/3 updates, quorum 1"

        assert list(second["counted"]) == ["ada", "ben", "cleo"]
        assert second["others"] == [
            {"worker": "cleo", "verdict": "late", "reason": "it is for round 1, this is round 2"}
        ]
        assert second["why"] == "3/3 updates, quorum 1"

        assert run.weights() == expected(run.store.plan, [["ada"], ["ada", "ben", "cleo"]])
        assert ada.lesson.done == [(True, 1), (True, 2), (False, 2)]
