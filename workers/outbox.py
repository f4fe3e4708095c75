"""What a worker has made, on its way to the coordinator, until there is a verdict or nobody waits for it any more.

Knows how often something is sent, and how long its verdict may take. Does not know how it was made, nor what becomes
of the worker meanwhile: it goes on with the next task.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from xxhash import xxh3_64_digest

from broker.errors import Declined, LearnerFailed, LinkClosed, LinkError, NoRoom, Refused, UsageError, WireError
from broker.formats import FORMATS
from broker.messages import TEXT_MAX, Answer, Attempt, Call, Closed, Payload, Refusal, Score, Task, Update
from broker.pact import Dealt
from workers.journal import Kept, Place, forget, keep
from workers.owner import Owner
from workers.post import SAY_S, Post
from workers.residuals import Residuals
from workers.secrecy import Secrecy, Talk
from workers.spool import Slot
from workers.work import Done

VERDICT_S = 10.0
"""How long an update may wait for its verdict once the next task is here: that is sent while the version is saved."""
LOOK_S, STILL_S = 0.05, 2.0
"""How often it is looked whether what was uploaded for another run is drained, and how long that may stand still."""
AGAIN_S = 5.0
"""How long after a publish that was given up the next one is begun, unless there is a reason before."""
SENT_MAX, SENT_MAX_OF_ALL = 2, 16
"""Updates of a run, and of all, that may be on their way or wait for verdicts; the oldest is given up for another, as
its coordinator is told, which would wait until its deadline."""
RUNS_MAX = 256
"""Of how many runs a worker remembers who speaks for them, and what it refused them."""
CALLS_MAX = 16
"""Calls that may wait to be heeded, of which a sum has five; one that is lost is asked for again."""
_THREADS = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "secret")
"""In which all who are hosted together reckon in secret: more would take cores and Python's lock from each other."""

Start = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(slots=True, eq=False)
class Sent:
    """Something on its way; `done.delta` is None where there is no update."""

    task: Task
    done: Done
    payload: Payload | None = None  # as it was named when the update was first said
    over: bool = False
    calls: deque[Call] = field(default_factory=lambda: deque(maxlen=CALLS_MAX))  # of a secure sum, to be heeded
    unsent: bool = True  # its parts are to be sent, for the first time or again
    uploaded: bool = False  # parts of it may lie in the upload queue
    news: asyncio.Event = field(default_factory=asyncio.Event)  # a verdict, or a reason to send it again
    bell: asyncio.TimerHandle | None = None
    work: asyncio.Task[None] | None = None
    verdict: tuple[str, str] = "none", "nobody has said what became of it"

    @property
    def owes(self) -> bool:
        """Whether its format leaves something out."""
        return self.done.delta is not None and FORMATS[self.task.format].lossy


def patience_s(task: Task) -> float:
    """How long what came of a task may wait for its verdict; a secure round goes on after its deadline."""
    return (task.deadline_s + SAY_S) * (2 if task.secure else 1)


class Outbox:
    """One worker's.

    Args:
        worker: its name.
        post: its end of the wire.
        owner: of the data; in whose folder finished updates are kept until they have a verdict.
        residuals: what its updates have left out.
        tell: writes a line into the log, at a level.
        rest: called when something is done with.

    Attributes:
        secrecy: this worker's part in secure rounds, if it takes any.
    """

    secrecy: Secrecy | None = None

    def __init__(
        self,
        worker: str,
        post: Post,
        *,
        owner: Owner,
        residuals: Residuals,
        tell: Callable[[str, int], None],
        rest: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._post = post
        self._owner = owner
        self._folder = owner.folder
        self._residuals = residuals
        self._tell = tell
        self._rest = rest
        self._sent: list[Sent] = []
        self._uploading = asyncio.Lock()
        self._refusals: dict[str, Refusal] = {}  # run → the last one, until another task of it is here

    @property
    def tasks(self) -> list[Task]:
        """What is on its way, or waits for its verdict, the oldest first."""
        return [sent.task for sent in self._sent]

    def put(self, task: Task, done: Done, start: Start) -> None:
        """Send what came of a task; `start` begins the sending."""
        sent = Sent(task, done)
        self._sent.append(sent)
        sent.work = start(self._send(sent))
        of_run = [each for each in self._sent if each.task.of.run == task.of.run]
        for former in {*of_run[:-SENT_MAX], *self._sent[:-SENT_MAX_OF_ALL]}:
            self._give_up(former, why := "newer ones are on their way")
            if former.work:
                former.work.cancel()
            if former not in of_run:
                start(self.refuse(former.task, why))

    def restore(self, kept: Kept, delta: Slot, start: Start) -> None:
        """Send what an earlier process of this worker has finished; its parts only if they are asked for."""
        update, left_s = kept.update, max(kept.until - time.time() - SAY_S, 0.0)
        task, layout = replace(kept.task, deadline_s=left_s), update.payload.layout
        done = Done(update.examples, update.metrics, dict(kept.scores), delta, 0.0, layout, kept.model, update.within)
        sent = Sent(task, done, update.payload, unsent=False, uploaded=True)
        size = f"{layout.size_bytes:,} bytes"
        self._tell(f"{update.of} of {update.of.run} was finished before: sending it again, {size}", logging.INFO)
        self._sent.append(sent)
        sent.work = start(self._send(sent))

    async def settle(self, run: str) -> None:
        """Wait until nothing of a run is on its way."""
        while works := [sent.work for sent in self._sent if sent.task.of.run == run and sent.work]:
            await asyncio.wait(works)

    def hurry(self, task: Task) -> None:
        """A run's next task is here: a verdict comes soon, or never. With other weights it replaces what was made."""
        self._refusals.pop(task.of.run, None)
        for sent in self._sent:
            if sent.task.of == task.of and sent.task.work == task.work:
                self._give_up(sent, "it is asked for anew, from other weights")
            elif sent.bell is None and sent.task.of.run == task.of.run:
                why = f"no verdict within {VERDICT_S:.0f} s of the next task"
                sent.bell = asyncio.get_running_loop().call_later(VERDICT_S, self._give_up, sent, why)

    def ask_again(self, run: str = "") -> None:
        """What was said, or the answer to it, may be lost: say it again, of one run or of all.

        Parts that are lost, too, will be asked for.
        """
        for sent in self._sent:
            if run in ("", sent.task.of.run):
                sent.news.set()

    def hear(self, message: Answer | Closed | Call) -> None:
        """What has become of an update."""
        for sent in self._sent:
            if sent.task.of != message.of or sent.done.delta is None:
                continue
            if isinstance(message, Call):
                sent.calls.append(message)
                sent.news.set()
            elif isinstance(message, Closed):
                self._give_up(sent, message.reason)
            else:
                self._heed(sent, message)

    async def refuse(self, task: Task, reason: str, *, declined: bool = False) -> None:
        """Tell the coordinator why a task is not done here; if it does not hear that, it waits for its deadline.

        `declined`: the data's owner does not allow it.
        """
        self._tell(f"{task.of} refused: {reason}", logging.WARNING)
        self._owner.note("refused", task.of, reason=reason)
        said = self._refusals[task.of.run] = Refusal(task.of, self._worker, reason[:TEXT_MAX], declined)
        while len(self._refusals) > RUNS_MAX:
            del self._refusals[next(iter(self._refusals))]
        await self._try_to_say(said)

    async def refuse_again(self, run: str) -> None:
        """The inbox of a run may be a new one: say again what was refused, unless something of it is on its way."""
        last = self._refusals.get(run)
        if last and last.of not in (task.of for task in self.tasks):
            await self._try_to_say(last)

    # -- one of them --------------------------------------------------------------------------------------------

    async def _send(self, sent: Sent) -> None:
        task, ended = sent.task, True
        try:
            async with asyncio.timeout(patience_s(task)):
                if sent.payload is None:  # else an earlier process has written that it left
                    self._owner.let_go(task, sent.done)
                    await asyncio.to_thread(self._owner.ledger.keep)
                secret = task.secure and sent.done.delta is not None
                await (self._send_secret(sent) if secret else self._send_all(sent))
        except asyncio.CancelledError:
            ended = sent.over  # else this process ends, and the next one goes on
            raise
        except TimeoutError:
            self._tell(f"{task.of}: no verdict has come", logging.WARNING)
        except (LearnerFailed, LinkError) as problem:  # the first: the ledger cannot be written
            await self.refuse(task, f"what came of it could not be sent: {problem}")
        finally:
            sent.over = sent.over or ended
            if sent.bell:
                sent.bell.cancel()
            self._sent.remove(sent)
            sent.work = None
            if ended and sent.owes:
                self._residuals.forget(task.of)
            if ended and sent.done.delta is not None:
                self._owner.note("verdict", task.of, verdict=sent.verdict[0], reason=sent.verdict[1])
                forget(self._folder, self._worker, task.of)
            self._rest()

    async def _send_all(self, sent: Sent) -> None:
        task, done, who = sent.task, sent.done, self._worker
        score = Score(task.of, who, task.version, done.scores)
        if done.delta is None or done.examples is None:
            await self._post.say(score)
            return
        # a training that was repeated may differ; its parts must not be mixed with those of the one before
        payload_id = f"{task.payload.id}/{who}/{secrets.token_hex(4)}"
        payload = sent.payload or Payload(payload_id, task.payload.part_bytes, done.layout.specs)
        update = Update(task.of, who, task.version, done.examples, done.metrics, payload, done.within)
        keeping = None if sent.payload else asyncio.create_task(self._keep(sent, update))
        try:
            while not sent.over:
                sent.news.clear()
                uploaded = not sent.unsent
                scored = asyncio.create_task(self._try_to_say(score)) if done.scores else None
                try:
                    if not uploaded:
                        sent.unsent = False
                        await self._upload(sent, payload, done.delta.data)
                        uploaded = True
                    if scored:
                        await scored  # before the update, which may end the round
                    if keeping:
                        await keeping
                    await self._post.say(update)
                    await sent.news.wait()
                except (LinkClosed, NoRoom):
                    raise
                except LinkError as problem:  # away for long, or blocked: the update is here, and so is the round
                    sent.unsent = sent.unsent or not uploaded
                    await self._outwait(sent, problem)
                finally:
                    if scored:
                        scored.cancel()
        finally:
            if keeping:  # or it would be written after it is forgotten
                await asyncio.wait([keeping])

    async def _upload(self, sent: Sent, payload: Payload, data: memoryview) -> None:
        """Upload its parts when those of other runs are drained: a coordinator leaves nothing that it comes upon.

        Where nobody drains them they are lost to it, and will be asked for again.
        """
        now, run = asyncio.get_running_loop().time, sent.task.of.run
        async with self._uploading:
            left, since = -1, now()
            while any(each.uploaded and each.task.of.run != run for each in self._sent):
                if (lie := await self._post.uploads()) != left:
                    left, since = lie, now()
                if not lie or now() > since + STILL_S:
                    break
                await asyncio.sleep(LOOK_S)
            sent.uploaded = True
            await self._post.upload(payload, data)

    async def _outwait(self, sent: Sent, problem: LinkError) -> None:
        self._tell(f"{sent.task.of}: the update waits for the broker: {problem}", logging.WARNING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGAIN_S):
                await sent.news.wait()

    async def _send_secret(self, sent: Sent) -> None:
        """Let an update be added up in secret: it stays here, and nothing leaves that is not masked or sealed."""
        task, done = sent.task, sent.done
        assert self.secrecy
        assert done.examples
        if sent.payload is None:
            payload = Payload(f"{task.payload.id}/{self._worker}/kept", task.payload.part_bytes, done.layout.specs)
            await self._keep(sent, Update(task.of, self._worker, task.version, done.examples, done.metrics, payload))
        talk, sent.unsent, owed = Talk(self.secrecy, task, done), False, True
        await self._partake(sent, talk.begin)
        while not sent.over:
            sent.news.clear()
            owed = owed or not sent.calls  # without a call it is time to say it again
            try:
                while sent.calls:
                    call = sent.calls.popleft()
                    if await self._partake(sent, partial(talk.heed, call)):
                        owed, sent.unsent = True, isinstance(call.says, Dealt)
                if sent.unsent and talk.words and talk.payload:
                    await self._upload(sent, talk.payload, talk.words.data)
                    sent.unsent, owed = False, True
                if owed and talk.said:
                    await self._post.say(talk.said)
                owed = False
                await sent.news.wait()
            except LinkClosed:
                raise
            except LinkError as problem:
                await self._outwait(sent, problem)

    async def _partake(self, sent: Sent, what: Callable[[], bool | None]) -> bool:
        """Whether there is anything new to say in a secure sum, and no reason not to."""
        try:
            return bool(await asyncio.get_running_loop().run_in_executor(_THREADS, what))
        except (Declined, Refused, WireError, LearnerFailed, UsageError) as problem:
            await self.refuse(sent.task, str(problem), declined=isinstance(problem, Declined))
            return False

    async def _keep(self, sent: Sent, update: Update) -> None:
        """Keep the update for the process after this one; if the disk will not, it would be trained again."""
        task, done, delta = sent.task, sent.done, sent.done.delta
        assert delta is not None
        path, at = delta.file
        place = Place(path.name, at, len(delta.data), await asyncio.to_thread(xxh3_64_digest, delta.data))
        kept = Kept(task, update, done.scores, time.time() + patience_s(task), place, done.model)
        try:
            if not sent.over:  # or it would be written after it is forgotten
                keep(self._folder, kept)
        except OSError as problem:
            said = f"{task.of}: the update cannot be kept on the disk ({problem.strerror}); it is sent all the same"
            self._tell(said, logging.WARNING)

    async def _try_to_say(self, message: Score | Refusal) -> None:
        """Say what changes nothing for us if it is not heard."""
        try:
            await self._post.say(message)
        except LinkError as problem:
            said = f"{message.of}: the {type(message).__name__.lower()} could not be sent: {problem}"
            self._tell(said, logging.WARNING)

    def _heed(self, sent: Sent, answer: Answer) -> None:
        of: Attempt = sent.task.of
        if answer.verdict == "resend":
            self._tell(f"{of}: sending again: {answer.reason}", logging.INFO)
            sent.unsent = True
        elif answer.verdict == "accepted":
            self._tell(f"{of}: the update is accepted: {answer.reason}", logging.DEBUG)
            if sent.owes:
                self._residuals.accept(of)
        else:
            self._tell(f"{of}: the update is {answer.verdict}: {answer.reason}", logging.WARNING)
        if answer.verdict != "resend":
            sent.over, sent.verdict = True, (answer.verdict, answer.reason)
        sent.news.set()

    def _give_up(self, sent: Sent, reason: str) -> None:
        """Not in the midst of an upload, though: half of one is of no use."""
        self._tell(f"{sent.task.of} is given up: {reason}", logging.INFO)
        sent.over, sent.verdict = True, ("given up", reason)
        sent.news.set()
