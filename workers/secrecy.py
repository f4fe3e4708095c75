"""A worker's part in secure rounds: what a finished update says in them, and what is put down of that.

Knows in which order calls are answered, that a round is unmasked once, and what the data's owner is told. Does not
know keys and masks (`masking.py`), nor queues: what it is asked may take a while, and is asked in a thread.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from broker import pact
from broker.errors import Alarm, LearnerFailed, Refused, UsageError, insist
from broker.files import UNREADABLE, read_record, trouble, write_whole
from broker.messages import KEY_MAX, Attempt, Call, Payload, Ready, Secure, Step, Task
from broker.noise import KEY_BYTES, NOISE_MIN, add_discrete
from broker.norms import CLIP_MIN
from broker.pact import METRICS_MAX, SCORED, Dealt, Finishers, Masked, Opened, Reveal, Settled, Shares, Vow, context
from broker.pinned import Roster, read_roster, shown_roster
from broker.ring import Form, Ring, encode, ring_of
from workers.masking import Masking, Member
from workers.spool import Slot
from workers.work import Done, Who

Pay = Callable[[Task, Form], None]
"""Pays for the release of a sum with noise of which an update is a part."""
Note = Callable[..., None]
"""Writes a line into the ledger of the data's owner: see `Ledger.write`."""
UNMASKED = (
    "this worker has helped to unmask this round, or a later one: it takes part in no other attempt at it, and where "
    "the run's folder is an older copy, or damaged, only another run goes on."
)


def check(task: Task, who: Who) -> None:
    """Whether this worker does a task, as far as secrecy goes.

    Raises:
        LearnerFailed: it does not.
        UsageError: the task's ring is too small.
    """
    if who.member and who.trains and (task.secure is None or task.work != "train"):
        raise LearnerFailed(
            "this worker is on a roster, and tells its update and its score to nobody alone: the plan must say "
            "privacy = secure."
        )
    if task.secure and who.trains:
        if who.member is None:
            raise LearnerFailed(
                "updates of this run are only added up in secret: that takes an invitation with a key for it, or "
                "--roster and --identity."
            )
        if task.format != "float32":  # words that stand for other things in each update would not hide each other
            raise LearnerFailed(f"updates are added up in secret as float32 only, and the task says {task.format}.")
        ring_for(task)
    if task.noise and who.trains:
        shared, private = task.noise.of == "sum", task.noise.multiplier >= NOISE_MIN and task.noise.clip >= CLIP_MIN
        if not private or (shared and (task.secure is None or task.noise.least < pact.COHORT_MIN)):
            raise LearnerFailed("the noise that this task asks for hides nobody.")


def ring_for(task: Task) -> Ring:
    """In which the updates of a secure task are added up.

    Raises:
        UsageError: it is too small.
    """
    assert task.secure
    noise = task.noise if task.noise and task.noise.of == "sum" else None
    return ring_of(
        task.secure.bits, clip=task.clip, examples_max=task.examples_max, cohort=task.secure.cohort,
        noise=noise.multiplier if noise else 0.0, least=max(noise.least, 1) if noise else 1,
    )  # fmt: skip


@dataclass(eq=False)
class Secrecy:
    """One worker's.

    Attributes:
        member: who it is, and whom it knows.
        folder: where it is put down which rounds it has helped to unmask.
        room: makes room for masked words.
        note: writes into the owner's ledger.
        pay: see there.
        least: of how many the owner wants a cohort to be, and how large the part that must help to open a secret.
    """

    member: Member
    folder: Path
    room: Callable[[int], Slot]
    note: Note
    pay: Pay
    least: Callable[[], tuple[int, float]] = lambda: (0, 2 / 3)

    def __post_init__(self) -> None:
        self._path, self._seen = (self.folder / f"{self.member.name}.{what}" for what in ("unmasked", "roster"))
        self._alone = Lock()
        known = self.member.roster
        self._known = pact.roster_digest(known), known  # or what was shown last, behind its digest

    def trust(self, secure: Secure) -> bool:
        """Whether the roster that a task names is known, and trusted; if not, it is to be shown.

        Who pins the operator takes over what is shown, unless a later one was seen.

        Raises:
            UsageError: it is not this worker's, or what is shown is not the operator's, is an old one, has another
                key for this worker, or is not what the task names.
            LearnerFailed: it cannot be put down that it was seen.
        """
        member, known = self.member, secure.roster == self._known[0]
        if member.roster and not known:
            raise UsageError("the coordinator's roster is not this worker's: ask the operator for the latest.")
        if member.roster or not secure.shown:
            return known and bool(self._known[1])
        roster = shown_roster(secure.shown, member.operator)
        roster.vouch(member.name, member.identity)
        with trouble(f"{self._seen} cannot be used", "mend its permissions, or make room", error=LearnerFailed):
            seen = Roster.read(self._seen).check(source=str(self._seen)) if self._seen.exists() else Roster({}, 0)
            if seen.operator != roster.operator or seen.version < roster.version:
                roster.write(self._seen)
            elif (seen.version, seen.workers) != (roster.version, roster.workers):
                raise UsageError(
                    f"the coordinator shows version {roster.version} of the roster, and this worker has seen "
                    f"another, version {seen.version}: it must have the latest from the operator."
                )
        self._known = pact.roster_digest(roster.workers), roster.workers
        if self._known[0] != secure.roster:
            raise UsageError("the coordinator shows another roster than the one that its task names.")
        return True

    def roster(self, secure: Secure) -> Mapping[str, bytes]:
        """Names and keys, in the sums of a task that was trusted, perhaps by an earlier process.

        Raises:
            Refused: another roster was trusted since then.
            UsageError: there is none any more.
        """
        known = self._known[1] or read_roster(self._seen, self.member.operator.hex()).workers
        insist(pact.roster_digest(known) == secure.roster, "another roster has been shown since this task came.")
        return known

    def answered(self, of: Attempt) -> str:
        """The record of this worker's answer in this round of a run, or in a later one; empty if there is none.

        Raises:
            Refused: it cannot be known.
        """
        number, record = self._records().get(of.run, (0, ""))
        return record if of.round <= number else ""

    def record(self, of: Attempt, record: str) -> None:
        """Put an answer down, one at a time; when this returns it survives a power failure.

        Raises:
            Alarm: there is another one, perhaps of an attempt that was open at the same time.
            Refused: it cannot be put down.
        """
        with self._alone:
            if self.answered(of) not in ("", record):
                raise Alarm(UNMASKED)
            with trouble(f"{self._path} cannot be written", "nothing is told", error=Refused):
                write_whole(self._path, json.dumps(self._records() | {of.run: (of.round, record)}).encode())

    def _records(self) -> dict[str, tuple[int, str]]:
        with trouble(f"what was unmasked cannot be read in {self._path}", "restore it", error=Refused, of=UNREADABLE):
            return {run: (number, record) for run, (number, record) in read_record(self._path).items()}


class Talk:
    """What one finished update says in the secure sums that it is asked for.

    Attributes:
        said: what was said last, to be said again should it be lost; None where there is nothing to say.
        words: the masked words, once there are any.
        payload: what they are called.
    """

    def __init__(self, secrecy: Secrecy, task: Task, done: Done) -> None:
        self.said: Ready | Step | None = None
        self.words: Slot | None = None
        self.payload: Payload | None = None
        self._secrecy, self._task, self._done = secrecy, task, done
        scored = {SCORED + name: value for name, value in done.scores.items() if name != "examples"}
        metrics = {name: value for name, value in sorted((done.metrics | scored).items()) if len(name) <= KEY_MAX}
        self._metrics = dict([*metrics.items()][:METRICS_MAX])
        self._serial = 0
        self._masking: Masking | None = None
        self._form: Form | None = None
        self._heard: list[Settled | Dealt | Finishers | Reveal] = []

    def begin(self) -> None:
        """Be ready for the first sum, unless there was one already, whose outcome is waited for.

        Raises:
            Refused: whether there was cannot be known.
        """
        if not self._secrecy.answered(self._task.of):
            self._advertise(1)

    def heed(self, call: Call) -> bool:
        """Do what is asked; whether there is anything new to say.

        Raises:
            Refused: it must not be done, and this update takes no further part in this sum.
            WireError: the update cannot be masked, likewise; LearnerFailed: there is no room.
        """
        try:
            return self._heed(call)
        except Refused as problem:
            of, event = call.of, "alarm" if isinstance(problem, Alarm) else "refused"
            self._secrecy.note(event, run=of.run, round=of.round, attempt=of.attempt, why=str(problem))
            self._masking = self.said = None
            raise

    def _heed(self, call: Call) -> bool:
        if call.says is None:
            if fresh := call.serial > self._serial:
                self._advertise(call.serial)
            return fresh
        # shares are opened once, by whichever vows: each other quorum's would be one more line in the owner's ledger
        known = call.says in self._heard or (isinstance(call.says, Reveal) and Reveal in map(type, self._heard))
        if call.serial != self._serial or self._masking is None or known:
            return False
        says = self._answer(self._masking, call.says)
        payload = self.payload if isinstance(says, Masked) else None
        self.said = Step(call.of, self._secrecy.member.name, call.serial, says, payload)
        self._heard.append(call.says)
        return True

    def _advertise(self, serial: int) -> None:
        """Fresh keys for another sum; nothing is left of the one before."""
        task, (least, part) = self._task, self._secrecy.least()
        assert task.secure
        of, model, roster = task.of, self._done.model, self._secrecy.roster(task.secure)
        member = replace(self._secrecy.member, cohort_min=least, threshold_min=part, roster=roster)
        bound = context(of.run, of.round, of.attempt << 32 | serial, model=model, plan=task.terms, roster=roster)
        self._masking = Masking(member, bound, secrets.token_bytes, answered=self._secrecy.answered(of))
        self._serial, self.words, self.payload, self._heard = serial, None, None, []
        self.said = Ready(of, member.name, serial, self._masking.advert, tuple(self._metrics))

    def _answer(self, masking: Masking, says: Settled | Dealt | Finishers | Reveal) -> Shares | Masked | Vow | Opened:
        match says:
            case Settled():
                assert self._task.secure
                members = len(says.workers)
                insist(members <= self._task.secure.cohort, f"the ring has no room for a cohort of {members}.")
                self._form = Form(ring_for(self._task), self._done.layout, says.metrics)
                return masking.shares(says, self._metrics)
            case Dealt():
                return self._mask(masking, says)
            case Finishers():
                least, found = self._task.noise.least if self._task.noise else 0, len(says.workers)
                insist(found >= least, f"there are {found} finishers, and the noise is that of {least} or more.")
                return masking.vow(says)
            case Reveal():
                answer = masking.answer(says)
                self._secrecy.record(self._task.of, answer.record)  # before it leaves
                self._note()
                return answer.opened

    def _mask(self, masking: Masking, dealt: Dealt) -> Masked:
        form, done = self._form, self._done
        if form is None:
            raise Refused("shares are dealt out before there is a cohort.")
        assert done.delta
        assert done.examples
        slot = self._secrecy.room(form.layout.size_bytes)
        words = encode(form, done.delta.data, examples=done.examples, metrics=self._metrics, into=slot.data)
        if grain := form.ring.grain:
            self._secrecy.pay(self._task, form)  # from here on enough of the others can open this sum
            add_discrete(secrets.token_bytes(KEY_BYTES), grain.bits, form.signed(words)[: form.floats])
        masked = masking.mask(dealt, words)
        called = f"{self._task.payload.id}/{self._secrecy.member.name}/{self._serial}-{secrets.token_hex(4)}"
        self.payload = Payload(called, self._task.payload.part_bytes, form.layout.specs)
        self.words = slot
        return masked

    def _note(self) -> None:
        """Tell the owner what this worker has helped to reveal."""
        settled, _, finishers, *_ = self._heard
        assert isinstance(settled, Settled)
        assert isinstance(finishers, Finishers)
        of = self._task.of
        self._secrecy.note(
            "secure", run=of.run, round=of.round, attempt=of.attempt, sum=self._serial,
            cohort=list(settled.workers), of=list(finishers.workers),
            revealed=["the sum of these updates", "the sum of their examples", *settled.metrics],
        )  # fmt: skip
