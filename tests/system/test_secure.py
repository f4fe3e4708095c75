"""Secure rounds: only the sum is seen, it is the plain sum's bits, and whoever drops out or dies costs no more."""

import asyncio
import errno
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import workers.journal
import workers.ledger
import workers.outbox
import workers.owner
from broker.errors import UsageError
from broker.link import Delivery, Outgoing
from broker.masks import Words
from broker.messages import PART_BYTES_MIN, Attempt, Call, Payload, Ready, Refusal, Secure, Step, Task, Update
from broker.pact import Advert, Dealt, Finishers, Masked, Opened, Reveal, Settled, Shares, Vow, roster_digest
from broker.pinned import Roster, public_of, shown_roster
from broker.topology import CONTROL
from coordinator import secrecy
from coordinator.claim import Claim
from coordinator.journal import Journal
from coordinator.opened import Secret
from coordinator.store import Store
from coordinator.unmasking import Unmasking
from coordinator.vault import FILE, Vault
from tests.memory import MemoryLink
from tests.system.rig import (
    BOUND_S,
    IDENTITIES,
    KEYS,
    MODEL,
    OPERATOR,
    SECURE,
    Federation,
    Place,
    federation,
    read,
    secure_expected,
    start_weights,
)
from workers import secrecy as worker_secrecy
from workers.ledger import Ledger
from workers.masking import Masking, Member

THREE = ("a", "b", "c")
NAMES = ("a", "b", "c", "d", "e")


async def test_a_secure_run_makes_the_versions_of_the_plain_sums_to_the_last_bit(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE, cohort=5, quorum=5) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert fed.weights() == secure_expected(fed.store.plan, [NAMES, NAMES])
        line = fed.lines("round")[-1]
        assert line["secure"]["of"] == list(NAMES)
        assert line["counted"] == {name: {"examples": 0, "metrics": {}} for name in NAMES}
        assert line["metrics"] == {"loss": 0.5}


# -- who drops out --------------------------------------------------------------------------------------------------

SEVEN = ("a", "b", "c", "d", "e", "f", "g")
STAGES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    # when it is asked for this, it dies; who is in the sum then
    "shares": (Settled, SEVEN[:-1]),
    "masked words": (Dealt, SEVEN[:-1]),
    "its vow": (Finishers, SEVEN),
    "its opened shares": (Reveal, SEVEN),
}


def asks(what: Outgoing | Delivery, kind: type[Any], number: int = 1) -> bool:
    """Whether the coordinator says this in a round."""
    message = read(what) if isinstance(what, Outgoing) and what.exchange == CONTROL else None
    return isinstance(message, Call) and isinstance(message.says, kind) and message.of.round == number


def says(what: Outgoing | Delivery, kind: type[Any], number: int = 1) -> str:
    """The worker from whom this has come to the coordinator in a round, or nobody."""
    message = None if isinstance(what, Outgoing) or what.key.startswith("upload") else read(what)
    of = getattr(message, "of", None)
    if isinstance(message, Ready | Step) and of and of.round == number:
        found = message.advert if isinstance(message, Ready) else message.says
        return message.worker if isinstance(found, kind) else ""
    return ""


@pytest.mark.parametrize("stage", STAGES)
async def test_a_worker_that_dies_before_it_gives(tmp_path: Path, stage: str) -> None:
    """Its lease ends; the others go on without it, and their sum is the plain sum of those who are in it."""
    asked, counted = STAGES[stage]
    async with federation(tmp_path, **SECURE, rounds=2, cohort=7, quorum=5) as fed:
        places = {name: fed.join(name) for name in SEVEN}
        dying: list[asyncio.Task[None]] = []

        def look(what: Outgoing | Delivery) -> None:
            if asks(what, asked) and not dying:
                dying.append(asyncio.create_task(places["g"].die()))

        fed.hook = look
        await fed.end()
        await dying[0]
        assert fed.counted() == [list(counted), list(SEVEN[:-1])]
        assert fed.weights() == secure_expected(fed.store.plan, [counted, SEVEN[:-1]])
        line = fed.lines("round")[0]
        if counted != SEVEN:
            assert list(line["secure"]["gone"]) == ["g"]
            assert "dropped out of the secure sum in the stage" in line["refused"]["g"]


def starts_anew(fed: Federation, places: dict[str, Place], name: str) -> Callable[[Outgoing | Delivery], None]:
    """A hook that starts a worker anew, once, when the others' shares are dealt."""
    begun = list[asyncio.Task[None]]()

    async def anew() -> None:
        await places[name].die()
        places[name] = fed.join(name)

    def look(what: Outgoing | Delivery) -> None:
        if asks(what, Dealt) and not begun:
            begun.append(asyncio.create_task(anew()))

    return look


async def test_a_worker_that_is_started_anew_in_the_midst_of_a_sum_is_in_the_next_one_untrained(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, **SECURE, rounds=1) as fed:
        places = {name: fed.join(name) for name in THREE}
        fed.hook = starts_anew(fed, places, "c")
        await fed.end()
        assert fed.counted() == [list(THREE)]
        assert fed.lines("round")[0]["secure"]["sum"] == 2
        assert not [done for done in places["c"].lesson.done if done[0]]
        assert fed.weights() == secure_expected(fed.store.plan, [THREE])


@pytest.mark.parametrize("rules", ["cohort_min = 4", "nonsense"])
async def test_the_owners_rules_hold_for_what_a_worker_has_finished_before_it_was_started_anew(
    tmp_path: Path, rules: str
) -> None:
    """Of four that were asked, one cannot: `a` is in no sum of three, though no task has come since its start."""
    (tmp_path / "policy.toml").write_text("cohort_min = 4")
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=3) as fed:
        begun, dealt = list[asyncio.Task[None]](), list[str]()

        async def anew() -> None:
            await fed.places["a"].die()
            (tmp_path / "policy.toml").write_text(rules)
            fed.join("a", policy=tmp_path / "policy.toml")

        def look(what: Outgoing | Delivery) -> None:
            if says(what, Advert) == "a" and not begun:
                begun.append(asyncio.create_task(anew()))
            dealt.append(says(what, Shares))

        fed.hook = look
        for name in THREE:
            fed.join(name, policy=tmp_path / "policy.toml" if name == "a" else None)
        fed.join("d", member=pinning("d", identity="a"))
        fed.begin()
        await fed.until(lambda: bool(fed.lines("abandoned") or fed.lines("round")))
        assert "a" not in dealt
        assert not fed.lines("round")


async def test_whatever_comes_twice_counts_once(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE) as fed:
        link, again = MemoryLink(fed.broker), 0

        async def look(what: Outgoing | Delivery) -> None:
            nonlocal again
            if isinstance(what, Outgoing) and isinstance(read(what), Ready | Step | Call):
                again += 1
                await link.publish(what)

        fed.hook = look
        for name in THREE:
            fed.join(name)
        await fed.end()
        await link.close()
        assert again >= 2 * 8 * 3 - 6
        assert fed.weights() == secure_expected(fed.store.plan, [THREE, THREE])
        assert [line["secure"]["sum"] for line in fed.lines("round")] == [1, 1]


async def test_a_second_unmasking_of_a_round_is_refused_and_the_owner_is_told(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, **SECURE, rounds=1) as fed:
        refusals = list[Refusal]()

        async def look(what: Outgoing | Delivery) -> None:
            if says(what, Opened) == "a":
                call = Call(Attempt("test", 1, 1), 2)
                assert fed.coordinator
                await fed.coordinator.post.tell(["a"], call)
            elif not isinstance(what, Outgoing) and isinstance(message := read(what), Refusal):
                refusals.append(message)

        fed.hook = look
        for name in THREE:
            fed.join(name)
        fed.begin()
        await fed.until(lambda: bool(refusals))
        await fed.end()
        assert [(each.worker, "has helped to unmask this round" in each.reason) for each in refusals] == [("a", True)]
        ledger = Ledger(fed.folder / "spool-a" / "a.ledger").read()
        told = [line for line in ledger if line["event"] in ("secure", "alarm")]
        assert [line["event"] for line in told] == ["secure", "alarm"]
        assert (told[0]["cohort"], told[0]["of"]) == (list(THREE), list(THREE))
        assert "has helped to unmask" in told[1]["why"]
        assert fed.counted() == [list(THREE)]


async def test_a_run_put_back_to_before_an_unmasked_round_is_told_why_nobody_takes_part_and_nothing_is_trained(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, **SECURE, rounds=1) as fed:
        for name in THREE:
            fed.join(name)
        shutil.copytree(fed.run, tmp_path / "backup")
        await fed.end()
        shutil.rmtree(fed.run)
        shutil.copytree(tmp_path / "backup", fed.run)
        fed.begin()
        await fed.until(lambda: bool(fed.lines("abandoned")))
        assert dict.fromkeys(THREE, worker_secrecy.UNMASKED) == fed.lines("abandoned")[0]["refused"]
        assert fed.store.latest() == 0
        for place in fed.places.values():
            assert place.lesson.done == [(True, 1)]


async def test_shares_that_are_opened_when_the_sum_is_known_already_are_nobodys_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened, loop, result = list[Step](), asyncio.get_running_loop(), Unmasking.result
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=4) as fed:

        def late(core: Unmasking) -> Words:
            found = result(core)
            take = fed.coordinator and fed.coordinator.desk.take_secret
            assert take
            other = replace(opened[0], says=Opened(()))
            asyncio.run_coroutine_threadsafe(cast(Coroutine[Any, Any, None], take(other)), loop).result(BOUND_S)
            return found

        def look(what: Outgoing | Delivery) -> None:
            if says(what, Opened):
                opened.append(cast(Step, read(what)))

        fed.patch.setattr(Unmasking, "result", late)
        fed.hook = look
        for name in NAMES[:4]:
            fed.join(name)
        await fed.end()
        (line,) = fed.lines("round")
        assert (line["secure"]["of"], line["secure"]["gone"]) == (list(NAMES[:4]), {})
        assert (line["struck"], line["failed"], line["refused"]) == ({}, {}, {})
    assert "what does not count" not in caplog.text


async def test_one_who_opens_false_shares_before_others_open_theirs_spoils_no_sum(tmp_path: Path) -> None:
    tried, result, answer = asyncio.Event(), Unmasking.result, Masking.answer
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=4) as fed:
        loop = asyncio.get_running_loop()

        def lie(masking: Masking, reveal: Reveal) -> Any:
            said = answer(masking, reveal)
            return said if masking._member.name != "a" else said._replace(opened=Opened((b"\1" * 33,) * 4))

        def try_(core: Unmasking) -> Words:
            loop.call_soon_threadsafe(tried.set)
            return result(core)

        async def look(what: Outgoing | Delivery) -> None:
            step = read(what) if isinstance(what, Outgoing) else None
            if isinstance(step, Step) and step.worker == "d" and isinstance(step.says, Opened):
                await asyncio.wait_for(tried.wait(), BOUND_S)  # three are enough, were they all true

        fed.patch.setattr(Masking, "answer", lie)
        fed.patch.setattr(Unmasking, "result", try_)
        fed.hook = look
        for name in NAMES[:4]:
            fed.join(name)
        await fed.end()
        assert fed.counted() == [list(NAMES[:4])]
        assert fed.weights() == secure_expected(fed.store.plan, [NAMES[:4]])


async def test_a_sum_that_is_lost_after_its_release_is_gone_without_and_never_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three die when their shares are asked for: the version stays as it was, and the run goes on."""
    monkeypatch.setattr(secrecy, "STAGE_S", 0.2)
    async with federation(tmp_path, **SECURE, rounds=2, round_s=1.0) as fed:
        places = {name: fed.join(name) for name in THREE}
        begun: list[asyncio.Task[None]] = []
        released: list[int] = []

        async def anew() -> None:
            for name in ("b", "c"):
                await places[name].die()
                fed.join(name)

        def look(what: Outgoing | Delivery) -> None:
            if asks(what, Reveal):
                released.append(1)
                if not begun:
                    begun.append(asyncio.create_task(anew()))

        fed.hook = look
        await fed.end()
        first, second = fed.lines("round")
        assert first["counted"] == {}
        assert "may be revealed" in first["refused"]["b"]
        assert fed.store.load(1)[1] == start_weights()
        assert second["secure"]["of"] == list(THREE)
        assert released == [1]


FIVE_OF_THREE: dict[str, Any] = {**SECURE, "cohort": 5, "quorum": 3, "round_s": 1.0, "gather_s": 1.0}


async def test_members_who_are_ready_and_deal_nothing_rest_and_the_others_go_on(tmp_path: Path) -> None:
    """Two of five end every sum, for without them there is no quorum of five: they are asked no more."""
    heed = worker_secrecy.Talk._heed
    async with federation(tmp_path, **FIVE_OF_THREE, rounds=1) as fed:

        def say_nothing(talk: worker_secrecy.Talk, call: Call) -> bool:
            silent = talk._secrecy.member.name in ("d", "e") and call.says is not None
            return not silent and heed(talk, call)

        fed.patch.setattr(secrecy, "STAGE_S", 0.2)
        fed.patch.setattr(worker_secrecy.Talk, "_heed", say_nothing)
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert [[*line["failed"]] for line in fed.lines("abandoned")] == [["d", "e"]] * 3
        assert fed.counted() == [list(THREE)]
        assert fed.weights() == secure_expected(fed.store.plan, [THREE])


async def test_who_deals_shares_that_nobody_can_open_is_named_and_rests_and_the_others_go_on(tmp_path: Path) -> None:
    shares = Masking.shares
    async with federation(tmp_path, **FIVE_OF_THREE, rounds=4) as fed:

        def lie(masking: Masking, settled: Settled, metrics: Collection[str]) -> Shares:
            said = shares(masking, settled, metrics)
            return said if masking._member.name != "e" else replace(said, sealed=(b"junk" * 20,) * 4)

        fed.patch.setattr(Masking, "shares", lie)
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert [[*line["failed"]] for line in fed.lines("round")] == [["e"]] * 3 + [[]]
        assert fed.counted() == [[], [], [], list("abcd")]


# -- the coordinator dies -------------------------------------------------------------------------------------------

POINTS: dict[str, Callable[[Outgoing | Delivery], bool]] = {
    "the first is ready": lambda what: bool(says(what, Advert, 2)),
    "the cohort is told": lambda what: asks(what, Settled, 2),
    "the first shares have come": lambda what: bool(says(what, Shares, 2)),
    "shares are handed on": lambda what: asks(what, Dealt, 2),
    "the first masked words are there": lambda what: bool(says(what, Masked, 2)),
    "who has finished is told": lambda what: asks(what, Finishers, 2),
    "the first vow has come": lambda what: bool(says(what, Vow, 2)),
    "shares are asked for": lambda what: asks(what, Reveal, 2),
    "the first shares are opened": lambda what: bool(says(what, Opened, 2)),
}


def kill_when(fed: Federation, point: str, then: Callable[[], None] = lambda: None) -> list[str]:
    """Let the coordinator die at a point, and something else happen; which point it was, once it has."""
    killed = list[str]()

    def look(what: Outgoing | Delivery) -> None:
        if not killed and POINTS[point](what):
            killed.append(point)
            fed.kill()
            then()

    fed.hook = look
    return killed


@pytest.mark.parametrize("point", POINTS)
async def test_a_coordinator_that_dies_when(tmp_path: Path, point: str) -> None:
    """Nothing is trained again: another sum of the same updates is begun, or one that was released is completed."""
    async with federation(tmp_path, **SECURE, rounds=3) as fed:
        killed = kill_when(fed, point)
        places = [fed.join(name) for name in THREE]
        await fed.end()
        assert killed
        assert fed.counted() == [list(THREE)] * 3
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 3)
        assert [line["attempt"] for line in fed.lines("round")] == [1, 1, 1]
        assert [[number for train, number in place.lesson.done if train] for place in places] == [[1, 2, 3]] * 3


@pytest.mark.parametrize("lost", [1, 200, 1000])
async def test_what_is_put_down_of_a_released_sum_and_damaged_costs_its_round_and_no_other(
    tmp_path: Path, lost: int
) -> None:
    """Workers will not help to unmask that round again, so there must be no other attempt at it."""
    async with federation(tmp_path, **SECURE, rounds=2) as fed:
        torn = list[bytes]()

        def look(what: Outgoing | Delivery) -> None:
            if not torn and asks(what, Reveal, 1):
                fed.kill()
                torn.append((fed.run / FILE).read_bytes())
                (fed.run / FILE).write_bytes(torn[0][:-lost])

        fed.hook = look
        for name in THREE:
            fed.join(name)
        await fed.end()
        first, second = fed.lines("round")
        assert (first["attempt"], first["secure"]["failed"]) == (1, "what was put down of it is not there any more.")
        assert fed.store.load(1)[1] == start_weights()
        assert second["secure"]["of"] == list(THREE)


@pytest.mark.parametrize("point", ["shares are asked for", "the first shares are opened"])
@pytest.mark.parametrize("left", [b"{", None])
async def test_a_released_sum_is_completed_though_the_journal_is_lost_when(
    tmp_path: Path, left: bytes | None, point: str
) -> None:
    """No worker takes part in another attempt at that round: without this one there is no next version, ever."""
    async with federation(tmp_path, **SECURE, rounds=3) as fed:

        def lose() -> None:
            (fed.run / "round.json").unlink()
            if left:
                (fed.run / "round.json").write_bytes(left)

        killed = kill_when(fed, point, lose)
        places = [fed.join(name) for name in THREE]
        await fed.end()
        assert killed
        assert fed.counted() == [list(THREE)] * 3
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 3)
        assert [line["secure"]["sum"] for line in fed.lines("round")] == [1, 1, 1]
        assert [[number for train, number in place.lesson.done if train] for place in places] == [[1, 2, 3]] * 3


@pytest.mark.parametrize("point", POINTS)
async def test_a_broker_that_is_started_anew_when(tmp_path: Path, point: str) -> None:
    """What is said in a sum does not survive that: all of it is said again, and the same sum goes on."""
    async with federation(tmp_path, **SECURE, rounds=2) as fed:
        lost = list[int]()

        def look(what: Outgoing | Delivery) -> None:
            if not lost and POINTS[point](what):
                lost.append(1)
                fed.broker.pause()
                fed.broker.forget()
                fed.broker.resume()

        fed.hook = look
        places = [fed.join(name) for name in THREE]
        await fed.end()
        assert lost
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 2)
        assert [line["secure"]["sum"] for line in fed.lines("round")] == [1, 1]
        assert [[number for train, number in place.lesson.done if train] for place in places] == [[1, 2]] * 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "method"), [(Vault, "keep"), (Vault, "add"), (Journal, "release"), (Store, "draft"), (Store, "seal")]
)
async def test_a_coordinator_that_dies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, owner: type[Any], method: str, when: str
) -> None:
    """What it has written by then stands: no worker is asked to unmask a round for other survivors."""
    original, loop, calls = getattr(owner, method), asyncio.get_running_loop(), 0
    async with federation(tmp_path, **SECURE, rounds=2) as fed:

        def dying(*arguments: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != 1:
                return original(*arguments, **words)
            if when == "after":
                original(*arguments, **words)
            loop.call_soon_threadsafe(fed.kill)
            raise asyncio.CancelledError

        monkeypatch.setattr(owner, method, dying)
        for name in THREE:
            fed.join(name)
        await fed.end()
        assert calls > 1
        assert fed.counted() == [list(THREE)] * 2
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 2)


@pytest.mark.parametrize("method", ["keep", "add"])
async def test_a_disk_that_is_full_when_a_sum_is_put_down_is_reported_in_a_sentence_and_the_sum_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    fails = [True]

    class Full:
        """Of a file whose disk has no room: as a write finds out, it names no file."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def writelines(self, lines: Any) -> None:
            if fails:
                fails.clear()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.writelines(lines)

    usual, usually = Claim.writing, Path.open

    @contextmanager
    def writing(claim: Claim, path: Path, **how: Any) -> Iterator[Any]:
        with usual(claim, path, **how) as file:
            yield Full(file) if path.name == FILE else file

    @contextmanager
    def opened(file: Any) -> Iterator[Any]:
        with file:
            yield Full(file)

    def open_(path: Path, *how: Any, **more: Any) -> Any:
        file = usually(path, *how, **more)
        return opened(file) if path.name == FILE and "ab" in how else file

    if method == "keep":
        monkeypatch.setattr(Claim, "writing", writing)
    else:
        monkeypatch.setattr(Path, "open", open_)
    async with federation(tmp_path, **SECURE, rounds=2) as fed:
        for name in THREE:
            fed.join(name)
        with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\): make room or mend its"):
            await fed.end()
        await fed.end()
        assert fed.counted() == [list(THREE)] * 2
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 2)


def test_masked_words_that_were_announced_for_a_former_sum_are_not_wanted_in_the_next() -> None:
    """They may still wait to be drained when that sum has failed: in another they would spoil it, or end us."""
    core: Any = SimpleNamespace(stage="masked", waiting={"a", "b"})
    secret, of = Secret(2, b"", core), Attempt("test", 1, 1)
    former, present = (Payload(name, PART_BYTES_MIN, ()) for name in ("former", "present"))

    def words(payload: Payload) -> Update:
        return Update(of, "a", 0, 1, {}, payload)

    assert not secret.wants(words(former))
    secret.coming["a"] = Step(of, "a", 2, Masked(b""), present)
    assert secret.wants(words(present))
    assert not secret.wants(words(former))


# -- who knows the operator alone -----------------------------------------------------------------------------------


def shown(roster: Roster) -> Secure:
    """As a task shows it to whom the coordinator has not heard of before."""
    return Secure(32, 3, roster_digest(roster.workers), roster.text)


def secrecy_of(name: str, folder: Path) -> worker_secrecy.Secrecy:
    """Of a worker that has only just been started."""
    return worker_secrecy.Secrecy(
        pinning(name), folder,
        room=lambda _: pytest.fail("no room is needed"), note=lambda *_, **__: None, pay=lambda *_: None,
    )  # fmt: skip


def pinning(name: str, operator: Ed25519PrivateKey = OPERATOR, identity: str = "") -> Member:
    return Member(name, IDENTITIES[identity or name], {}, operator=public_of(operator))


async def test_workers_that_were_given_the_operators_key_alone_take_the_roster_from_the_coordinator(
    tmp_path: Path,
) -> None:
    """They and those who were given the roster itself are in one sum."""
    async with federation(tmp_path, **SECURE, cohort=3, quorum=3) as fed:
        for name in ("a", "b"):
            fed.join(name, member=pinning(name))
        fed.join("c")
        await fed.end()
        assert fed.weights() == secure_expected(fed.store.plan, [THREE, THREE])


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (pinning("d", IDENTITIES["a"]), "the roster is signed by another operator: "),
        (pinning("d", identity="a"), "the roster has another key for d, or none: ask the operator for one"),
        (Member("d", IDENTITIES["d"], {"d": KEYS["d"]}), "the coordinator's roster is not this worker's: ask the"),
    ],
    ids=["operator", "identity", "roster"],
)
async def test_a_worker_refuses_before_it_trains(tmp_path: Path, member: Member, said: str) -> None:
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=3) as fed:
        places = [fed.join(name) for name in THREE]
        places.append(fed.join("d", member=member))
        await fed.end()
        line = fed.lines("round")[-1]
        assert line["secure"]["of"] == list(THREE)
        assert line["refused"]["d"].startswith(said)
        assert not places[3].lesson.done


@pytest.mark.parametrize("how", ["an older", "another"])
async def test_a_worker_that_has_seen_a_roster_takes_no(how: str, tmp_path: Path) -> None:
    """Who was struck off would be among those again whom a coordinator may ask, or pretend to be."""
    former = Roster({**KEYS, "x": KEYS["a"][::-1]}, 0 if how == "an older" else 1).signed(OPERATOR)
    async with federation(tmp_path, **SECURE, rounds=1, cohort=3, quorum=3) as fed:
        fed.roster = Roster(KEYS, 1).signed(OPERATOR)
        for name in THREE:
            fed.join(name, member=pinning(name))
        await fed.end()
        seen = tmp_path / "spool-a" / "a.roster"
        assert Roster.read(seen) == fed.roster
    secrecy_of_a = secrecy_of("a", seen.parent)
    said = f"shows version {former.version} of the roster, and this worker has seen another, version 2: it must"
    with pytest.raises(UsageError, match=said):
        secrecy_of_a.trust(shown(former))
    for lean in (former.workers, {}):
        assert not secrecy_of_a.trust(Secure(32, 3, roster_digest(lean)))
    good, path = seen.read_bytes(), re.escape(str(seen))
    for damage, said in (
        (good[:-9], f"{path} is not a roster: restore it, or ask the operator for it"),
        (
            good.replace(b'"version":2', b'"version":9').replace(b'"version": 2', b'"version": 9'),
            f"{path} is not what",
        ),
    ):
        seen.write_bytes(damage)
        with pytest.raises(UsageError, match=said):
            secrecy_of_a.trust(shown(former))
    seen.write_bytes(good)
    latest = Roster(KEYS, 2).signed(OPERATOR)  # the same names, and yet it is not forgotten that there was a third
    assert secrecy_of_a.trust(shown(latest))
    assert Roster.read(seen) == latest


def test_what_many_workers_of_a_process_are_shown_is_parsed_and_checked_once_and_known_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Counter[str]()

    def counted(kind: str, what: Callable[..., Any]) -> Callable[..., Any]:
        def count(*asked: Any, **more: Any) -> Any:
            done[kind] += 1
            return what(*asked, **more)

        return count

    shown_roster.cache_clear()
    for kind in ("parse", "check", "write"):
        monkeypatch.setattr(Roster, kind, counted(kind, getattr(Roster, kind)))
    task = shown(Roster(KEYS, 1).signed(OPERATOR))
    company = [secrecy_of(name, tmp_path) for name in NAMES]
    assert not any(each.trust(replace(task, shown=b"")) for each in company)
    assert all(each.trust(task) for each in company)
    assert done == {"parse": 1, "check": 1, "write": len(NAMES)}
    for name in NAMES:
        (tmp_path / f"{name}.roster").unlink()
    assert all(each.trust(replace(task, shown=b"")) and each.roster(task) == KEYS for each in company)
    assert done == {"parse": 1, "check": 1, "write": len(NAMES)}


FIRST = [(1, "abc", "shown"), (2, "abc", "named")]


@pytest.mark.parametrize(
    ("who", "then"),
    [
        ("a worker", [(3, "c", "shown"), (3, "ab", "named")]),
        ("a worker without its folder", [(2, "c", "shown"), (3, "abc", "named")]),
        ("the coordinator", [(3, "abc", "shown")]),
        ("the coordinator, with a later roster", [(2, "abc", "shown"), (3, "abc", "named")]),
    ],
)
async def test_the_roster_is_shown_to_everyone_once_and_again_when_somebody_is_started_anew(
    tmp_path: Path, who: str, then: list[tuple[int, str, str]]
) -> None:
    """In the midst of the second round, as soon as its task is sent or while its updates are being added up."""
    told, begun, killed = list[tuple[int, str, str]](), list[asyncio.Task[None]](), list[int]()
    async with federation(tmp_path, **SECURE, rounds=3) as fed:

        def join(name: str) -> None:
            # or a hello of before is heard after, and its task is sent again
            fed.join(name, member=pinning(name), lease_s=900.0)

        async def anew() -> None:
            await fed.places["c"].die()
            if "without" in who:
                shutil.rmtree(tmp_path / "spool-c")
            join("c")

        def look(what: Outgoing | Delivery) -> None:
            if isinstance(what, Outgoing) and isinstance(task := read(what), Task) and task.secure:
                told.append((task.of.round, "".join(sorted(what.keys)), "shown" if task.secure.shown else "named"))
            now = len(told) == 2 if "without" in who else asks(what, Dealt, 2)
            if not now or begun or killed:
                return
            if "worker" in who:
                begun.append(asyncio.create_task(anew()))
            else:
                killed.append(1)
                fed.roster = roster
                fed.kill()

        fed.hook = look
        roster = Roster({name: KEYS[name] for name in THREE}, 1).signed(OPERATOR) if "later" in who else fed.roster
        for name in THREE:
            join(name)
        await fed.end()
        assert told == [*FIRST, *then]
        assert fed.weights() == secure_expected(fed.store.plan, [THREE] * 3)
        assert Roster.read(tmp_path / "spool-a" / "a.roster") == roster


# -- what is wrong from the beginning -------------------------------------------------------------------------------


async def test_an_update_with_nan_is_refused_before_it_is_masked_and_the_others_are_added_up(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=3) as fed:
        masked = set[str]()
        fed.hook = lambda what: masked.add(says(what, Masked))
        for name in NAMES[:4]:
            fed.join(name)
        lesson = fed.places["d"].lesson
        train = lesson.run

        async def diverge(*asked: Any, **more: Any) -> Any:
            done = await train(*asked, **more)
            if done.delta:
                done.delta.data[MODEL.offsets["w"] :][:4] = np.float32(np.nan).tobytes()
            return done

        fed.patch.setattr(lesson, "run", diverge)
        await fed.end()
        (line,) = fed.lines("round")
        assert line["secure"]["gone"] == {"d": "the update holds NaN or infinity: training has diverged there."}
        assert line["secure"]["of"] == [*"abc"]
        assert masked - {""} == {*"abc"}
        assert fed.weights() == secure_expected(fed.store.plan, ["abc"])


async def test_with_fewer_than_it_takes_an_attempt_ends_with_the_reason_and_nothing_was_revealed(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, **SECURE, rounds=1) as fed:
        places = {name: fed.join(name) for name in THREE}
        dying, asked = list[asyncio.Task[None]](), list[int]()

        def look(what: Outgoing | Delivery) -> None:
            if asks(what, Dealt) and not dying:
                dying.append(asyncio.create_task(places["c"].die()))
            if asks(what, Reveal):
                asked.append(1)

        fed.hook = look
        fed.begin()
        await fed.until(lambda: bool(fed.lines("abandoned")))
        assert not asked
        said = "2 workers were ready, and 3 are needed: the attempt ends, and no update was revealed."
        assert fed.lines("abandoned")[0]["why"] == said
        fed.join("c")
        await fed.end()
        assert fed.weights() == secure_expected(fed.store.plan, [THREE])


async def test_a_worker_whose_key_is_not_the_rosters_is_named_and_holds_nobody_up(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE, rounds=1, cohort=4, quorum=3) as fed:
        for name in THREE:
            fed.join(name)
        fed.join("d", member=Member("d", IDENTITIES["e"], KEYS))
        await fed.end()
        (line,) = fed.lines("round")
        assert line["refused"]["d"].startswith("d's signature is wrong: its key is not the roster's")
        assert fed.weights() == secure_expected(fed.store.plan, [THREE])


@pytest.mark.parametrize("off_s", [-1e9, 1e9])
async def test_workers_whose_clocks_are_off_by_thirty_years_make_the_same_sums(tmp_path: Path, off_s: float) -> None:
    """One of them is started anew, and finds by that clock what it has kept."""
    clock = SimpleNamespace(time=lambda: time.time() + off_s)
    async with federation(tmp_path, **SECURE) as fed:
        for module in (workers.journal, workers.ledger, workers.outbox, workers.owner):
            fed.patch.setattr(module, "time", clock)
        places = {name: fed.join(name) for name in THREE}
        fed.hook = starts_anew(fed, places, "c")
        await fed.end()
        assert not [number for train, number in places["c"].lesson.done if train and number == 1]
        assert fed.weights() == secure_expected(fed.store.plan, [THREE, THREE])


# -- what it costs --------------------------------------------------------------------------------------------------


async def bytes_of_rounds(folder: Path, names: str, **settings: Any) -> list[Counter[str]]:
    """Of two rounds: kind of message → bytes of it that a worker sends and is sent, parts aside, on the average."""
    found = [Counter[str](), Counter[str]()]
    async with federation(folder, **settings, rounds=2, cohort=len(names), quorum=len(names)) as fed:

        def look(what: Outgoing | Delivery) -> None:
            if not isinstance(what, Outgoing):
                return
            message, size = read(what), sum(map(len, what.pieces))
            if (of := getattr(message, "of", None)) not in (Attempt("test", 1, 1), Attempt("test", 2, 1)):
                return
            kind, spent = type(getattr(message, "says", None) or message).__name__, found[of.round - 1]
            if kind == "Task":  # sent again to whoever joined late
                spent[kind] = max(spent[kind], size * len(names))
            else:
                spent[kind] += size * len(what.keys)

        fed.hook = look
        for name in names:
            fed.join(name, lease_s=30.0)  # whose lease ends is shown the roster again
        await fed.end()
        assert fed.counted() == [[*names]] * 2
    return [Counter({kind: size // len(names) for kind, size in spent.items()}) for spent in found]


async def test_ten_workers_pay_less_than_5_kb_each_for_that_nobody_sees_their_updates(tmp_path: Path) -> None:
    """Both ways together, in each round but the first, which shows all of them the roster: 1 kB more.

    A model's words are as long as its floats, and each number behind them is 12 bytes.
    """
    for name in ("plain", "secure"):
        (tmp_path / name).mkdir()
    plain = await bytes_of_rounds(tmp_path / "plain", "abcdefghij")
    secure = await bytes_of_rounds(tmp_path / "secure", "abcdefghij", **SECURE)
    assert {"Settled", "Dealt", "Finishers", "Reveal", "Ready", "Shares", "Masked", "Vow", "Opened"} <= {*secure[1]}
    numbers = 12 * 3  # examples, and two metrics
    first, later = (dear.total() + numbers - cheap.total() for dear, cheap in zip(secure, plain, strict=True))
    assert later < 5_000
    assert first - later < 1_100
