"""A secure round at the coordinator: who is ready, which stage its sum is in, and what is said to whom.

Knows the stages' order, how long each may take, what is put down before anything is revealed, and how it goes on from
there. Does not know keys, masks and shares (`unmasking.py`), nor how an upload is drained (`desk.py`).

A turn goes as usual, but that workers say `Ready` in place of sending an update. When it is over, those who are ready
are the cohort of a secure sum. A sum that fails, or dies with the coordinator, before it was released is begun anew
with fresh keys: nothing is trained again. **Released** means that shares may have left the workers. That is put down
first, together with the masked sum and all that was said; from then on this sum is completed, by whoever is the
coordinator, or the version stays what it was: no round is ever unmasked twice.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

import numpy as np

from broker import pact
from broker.errors import Aborted, Refused, WireError, insist
from broker.messages import Answer, Attempt, Call, Ready, Resumed, Secure, Step, Task, Update
from broker.pact import SCORED, Dealt, Finishers, Masked, Opened, Reveal, Settled, Shares, Vow, context
from broker.pinned import Roster as Keys
from broker.ring import Form
from coordinator.desk import Desk
from coordinator.journal import Try
from coordinator.opened import Open, Secret
from coordinator.round import Verdict
from coordinator.store import Store
from coordinator.unmasking import Unmasking, into_sums
from coordinator.vault import Vault

log = logging.getLogger(__name__)

Wait = Callable[[float], Awaitable[None]]
STAGE_S = 30.0
"""How long a stage may take in which only a few small things are said."""
SUMS_MAX = 3
"""So many secure sums of one attempt are begun at the most."""


class Secrecy:
    """A run's.

    Args:
        store: its folder.
        desk: where everything arrives.
        keys: the roster of everyone who may take part.
        wait: until something was heard, or the given instant.
        pay: for what an attempt is about to reveal, where that has a price.

    Attributes:
        secure: of a task whose updates are added up so.
    """

    def __init__(self, store: Store, desk: Desk, *, keys: Keys, wait: Wait, pay: Callable[[Attempt], None]) -> None:
        self._store = store
        self._plan = store.plan
        self._desk = desk
        self._keys = keys.workers
        self.secure = Secure(store.plan.ring_bits, store.plan.cohort, pact.roster_digest(keys.workers), keys.text)
        self._wait = wait
        self._pay = pay
        self._vault = Vault(store.folder, store.claim)
        desk.take_secret = self._take
        desk.add_secret = self._add

    async def begin(self, here: Open, task: Task, *, again: bool) -> None:
        """A secure sum begins; not the first of this attempt (`again`), or the one that was released goes on."""
        of = here.round.of
        serial, released = self._store.journal.next_sum(of.round) if again else (1, False)
        model = await asyncio.to_thread(pact.model_digest, here.weights)
        # a serial is told apart within its attempt only
        bound = context(of.run, of.round, of.attempt << 32 | serial, model=model, plan=task.terms, roster=self._keys)
        least, part = self._plan.least, self._plan.threshold
        core = Unmasking(bound, self._keys, cohort_min=least, threshold=part, spread=self._desk.spread)
        secret = Secret(serial, bound, core, released=released)
        if released:
            if kept := self._vault.read(_name(here, secret)):
                with contextlib.suppress(Aborted):  # less is whole than it takes: as lost as nothing at all
                    self._recall(here, secret, *kept[1:])
            here.round.target = len(here.round.counted)  # nobody else is waited for
        here.secret = secret
        if again:  # they say again what they have opened, or take up keys anew
            post, news = self._desk.post, Resumed(of.run, 0) if released else Call(of, serial)
            await post.tell(here.round.cohort, news)

    async def sum_up(self, here: Open, task: Task) -> None:
        """The turn is over: add up in secret what those have who are ready.

        Raises:
            Aborted: that cannot be done, and nothing was revealed.
        """
        for left in reversed(range(SUMS_MAX)):
            secret = here.secret
            assert secret
            try:
                if not secret.released:
                    await self._gather_words(here, secret)
                    await self._release(here, secret)
                await self._unmask(here, secret)
                return
            except (Aborted, WireError) as problem:
                log.warning("%s: secure sum %d: %s", here.round.of, secret.serial, problem)
                if secret.released:
                    here.facts.secure = {"metrics": {}, "scored": {}, "gone": secret.gone, "failed": str(problem)}
                    here.round.go_without(str(problem), secret.core.spoilers.union(secret.gone))
                    return
                if not left:
                    for worker, why in secret.gone.items():  # or it could do that for ever
                        here.round.drop_out(worker, why)
                    raise
                await self.begin(here, task, again=True)

    # -- the stages ---------------------------------------------------------------------------------------------

    async def _gather_words(self, here: Open, secret: Secret) -> None:
        """Everything until something may be revealed."""
        core, short_s = secret.core, min(STAGE_S, self._plan.round_s)
        await self._stage(secret, lambda: here.round.counted.keys() - secret.ready.keys(), short_s)
        settled = self._settle(secret)
        log.info("%s: updates of %s are added up in secret", here.round.of, ", ".join(secret.ready))
        await self._call(here, secret.ready, settled)
        await self._stage(secret, lambda: core.waiting, short_s)
        secret.form = Form(self._plan.ring, self._desk.sums.layout, settled.metrics)
        for worker, dealt in core.deal(secret.form).items():
            await self._call(here, [worker], dealt)
        await self._stage(secret, lambda: core.waiting, self._plan.round_s)
        await self._desk.end_turn()  # what is only being received is left
        finishers = core.finishers()
        if len(finishers.workers) < self._plan.least:
            raise Aborted(f"{len(finishers.workers)} have finished, and the quorum is {self._plan.least}.")
        secret.finished = finishers.workers
        await self._call(here, secret.finished, finishers)
        await self._stage(secret, lambda: core.waiting, short_s)

    def _settle(self, secret: Secret) -> Settled:
        for worker in sorted(secret.ready):
            try:
                secret.core.advert(secret.ready[worker].advert)
            except Refused as problem:
                secret.gone[worker] = str(problem)
                del secret.ready[worker]
        secret.said += secret.ready.values()
        names = [set(ready.metrics) for ready in secret.ready.values()]
        return secret.core.settle(sorted(set.intersection(*names)) if names else ())

    async def _release(self, here: Open, secret: Secret) -> None:
        """From here on there is no other sum of this round: put that down, and all that it takes to complete it."""
        reveal = secret.core.reveal()
        await asyncio.to_thread(self._pay, here.round.of)
        await asyncio.to_thread(self._vault.keep, _name(here, secret), secret.core.total, secret.said)
        self._store.journal.release(here.round.of.round)
        secret.released = True
        await self._call(here, secret.finished, reveal)

    async def _unmask(self, here: Open, secret: Secret) -> None:
        form, core = secret.form, secret.core
        if form is None or not secret.calls:
            raise Aborted("what was put down of it is not there any more.")
        # whoever was cut off may come back, and nobody else can take its place
        waits_s = max(STAGE_S, self._plan.round_s)
        await self._stage(secret, lambda: () if core.enough else core.waiting, waits_s, present=False)
        try:
            total = await asyncio.to_thread(core.result)
        except Aborted:  # a share is false, perhaps, and there are others on their way
            await self._stage(secret, lambda: core.waiting, waits_s, present=False)
            total = await asyncio.to_thread(core.result)
        seen = await asyncio.to_thread(into_sums, form, total, len(secret.finished), self._desk.sums)
        for worker in here.round.counted.keys() - set(secret.finished):
            here.round.drop_out(worker, secret.gone.get(worker, "it dropped out of the secure sum"))
        here.facts.secure = {
            "sum": secret.serial, "cohort": sorted(secret.ready), "of": list(secret.finished),
            "gone": {worker: why for worker, why in secret.gone.items() if worker not in secret.finished},
            "examples": seen.examples, "revealed": "their sum alone",
            "metrics": {k: v for k, v in seen.metrics.items() if not k.startswith(SCORED)},
            "scored": {k.removeprefix(SCORED): v for k, v in seen.metrics.items() if k.startswith(SCORED)},
        }  # fmt: skip

    async def _stage(
        self, secret: Secret, waiting: Callable[[], Iterable[str]], within_s: float, *, present: bool = True
    ) -> None:
        """Wait for these, as long as they may answer; who does not has dropped out of this sum."""
        stage, ends_at, here = secret.core.stage, time.monotonic() + within_s, self._desk.open
        assert here
        while time.monotonic() < ends_at:
            self._desk.lapse(time.monotonic())
            owing = (worker for worker in waiting() if worker not in secret.gone)
            if all(present and here.round.is_away(worker) for worker in owing):
                break
            await self._wait(ends_at)
        for worker in waiting():
            secret.gone.setdefault(worker, f"it dropped out of the secure sum in the stage of {stage}")

    async def _call(self, here: Open, workers: Iterable[str], says: Settled | Dealt | Finishers | Reveal) -> None:
        assert here.secret
        workers, call = list(workers), Call(here.round.of, here.secret.serial, says)
        here.secret.calls |= dict.fromkeys(workers, call)
        await self._desk.post.tell(workers, call)

    # -- what workers say ---------------------------------------------------------------------------------------

    async def _take(self, message: Ready | Step) -> None:
        here, of, worker = self._desk.open, message.of, message.worker
        secret = here.secret if here and here.round.of == of else None
        if here is None or secret is None or message.serial != secret.serial:
            await self._turn_down(message, secret)
            return
        try:
            if isinstance(message, Ready):
                await self._greet(here, secret, message)
            elif secret.core.stage == "done" or await self._say(here, secret, message):
                return  # nothing is asked of it, or it will be in the next stage
            elif call := secret.calls.get(worker):  # it may have missed it
                await self._desk.post.tell([worker], call)
        except Refused as problem:
            log.warning("%s: %s said what does not count: %s", of, worker, problem)
            if worker in here.round.members:  # of strangers there may be many
                secret.gone.setdefault(worker, str(problem))
            here.round.withdraw(worker, str(problem))  # unless it is ready, so that nobody waits for it
            if worker in here.round.refused:
                await self._desk.post.tell([worker], Answer(of, "invalid", str(problem)))

    async def _turn_down(self, message: Ready | Step, secret: Secret | None) -> None:
        """It is of another sum than the present one."""
        of, worker, here, tell = message.of, message.worker, self._desk.open, self._desk.post.tell
        if secret and secret.core.stage == "adverts":
            await tell([worker], Call(of, secret.serial))
        elif secret and isinstance(message, Ready) and worker in secret.ready:
            secret.gone.setdefault(worker, "it was started anew, and has lost the keys of this sum")
        elif self._desk.has_counted(of, worker):
            await tell([worker], Answer(of, "accepted", "it was counted already"))
        # a version that is not safe yet is told of when it is
        elif of not in (each.of for each in (self._desk.unsafe, here and here.round) if each):
            await tell([worker], Answer(of, "late", f"{of} is over"))

    async def _greet(self, here: Open, secret: Secret, ready: Ready) -> None:
        """A worker is ready; one that was started anew since then is, too, with other keys.

        Raises:
            Refused: its keys are not its own, or it comes too late for others.
        """
        worker, round_ = ready.worker, here.round
        verdict, reason = round_.judge(ready.of, worker)
        if verdict not in (Verdict.ACCEPTED, Verdict.DUPLICATE):
            await self._desk.post.tell([worker], Answer(ready.of, verdict.value, reason))
        elif secret.ready.get(worker) != ready:
            insist(secret.core.stage == "adverts", f"{worker} was started anew, and has lost the keys of this sum.")
            insist(ready.advert.worker == worker, f"{worker} advertises keys of {ready.advert.worker}.")
            pact.check_advert(secret.context, ready.advert, self._keys)
            secret.ready[worker] = ready
            round_.count(worker, 0)
        elif call := secret.calls.get(worker):
            await self._desk.post.tell([worker], call)

    async def _say(self, here: Open, secret: Secret, step: Step) -> bool:
        """Whether it is news, which is put down as far as it counts by now.

        Raises:
            Refused: it must not be.
        """
        core, worker = secret.core, step.worker
        match step.says:
            case Masked():  # it counts when its words are added
                insist(secret.coming.get(worker, step) == step, f"{worker} has said something else before.")
                if (news := core.expects(worker)) and worker not in secret.coming:
                    self._expect(here, secret, step)
                return news
            case Shares():
                news = core.shares(worker, step.says)
            case Vow():
                news = core.vow(worker, step.says)
            case Opened():
                if news := core.opened(worker, step.says):  # before it is acknowledged
                    await asyncio.to_thread(self._vault.add, step)
        if news:
            secret.said.append(step)
        return news

    def _expect(self, here: Open, secret: Secret, step: Step) -> None:
        """Masked words are in the upload queue: let them be drained.

        Raises:
            Refused: they are of another form.
        """
        form, payload = secret.form, step.payload
        if form is None or payload is None or form.layout.difference(payload.layout):
            raise Refused(f"{step.worker} sends masked words of another form.")
        secret.coming[step.worker] = step
        self._desk.uploads.put_nowait((here, Update(step.of, step.worker, step.of.round - 1, 1, {}, payload)))

    def _add(self, secret: Secret, worker: str, data: memoryview) -> None:
        """Add masked words to the sum.

        Raises:
            WireError: their worker has signed something else.
        """
        assert secret.form
        step = secret.coming[worker]
        assert isinstance(step.says, Masked)
        try:
            if secret.core.masked(worker, np.frombuffer(data, secret.form.ring.dtype), step.says):
                secret.said.append(step)
        except Refused as problem:
            raise WireError(str(problem)) from None

    # -- what outlives the coordinator --------------------------------------------------------------------------

    def released(self, number: int, plan: str) -> Try | None:
        """The try at a round whose sum was put down to be released: there must be no other, should it be lost."""
        if (kept := self._vault.read(f"{self._plan.run}/{number}/")) is None:
            return None
        attempt, serial = map(int, kept[0].split("/")[2:4])
        cohort = tuple(each.worker for each in kept[2] if isinstance(each, Ready))
        return Try(number, attempt, plan, cohort, time.time(), serial=serial, released=True)

    def forget(self) -> None:
        """The version is safe."""
        self._vault.drop()

    def _recall(self, here: Open, secret: Secret, words: memoryview, said: list[Ready | Step]) -> None:
        """Let the sum that was released be as it was: its words count as one finisher's, the others' as zero."""
        core, steps = secret.core, [each for each in said if isinstance(each, Step)]
        secret.ready = {each.worker: each for each in said if isinstance(each, Ready)}
        settled = self._settle(secret)
        secret.form = Form(self._plan.ring, self._desk.sums.layout, settled.metrics)
        for step in steps:
            if isinstance(step.says, Shares):
                core.shares(step.worker, step.says)
        core.deal(secret.form)
        total = np.frombuffer(words, secret.form.ring.dtype)
        for step in steps:
            if isinstance(step.says, Masked):
                core.masked(step.worker, total, step.says)
                total = np.zeros(secret.form.words, total.dtype)
        secret.finished = core.finishers().workers
        for step in steps:
            if isinstance(step.says, Vow):
                core.vow(step.worker, step.says)
        secret.calls = dict.fromkeys(secret.finished, Call(here.round.of, secret.serial, core.reveal()))
        for step in steps:
            if isinstance(step.says, Opened):
                core.opened(step.worker, step.says)
        for worker in secret.ready:
            here.round.count(worker, 0)


def _name(here: Open, secret: Secret) -> str:
    """What a sum is called on the disk: it says who was asked, under which plan, and of which model."""
    return f"{here.round.of.run}/{here.round.of.round}/{here.round.of.attempt}/{secret.serial}/{secret.context.hex()}"
