"""The coordinator's desk: what workers say is judged here, and what was accepted is added up.

Knows the roster, the open round and the sum. Does not know when a round begins or ends, nor what a round is sent:
that is `service.py`, which looks whenever `changed` is set.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from broker import topology
from broker.errors import PartsLost, WireError
from broker.fields import NAME
from broker.files import Put
from broker.formats import CHUNK_ITEMS, format_of
from broker.link import Delivery
from broker.messages import Answer, Attempt, Claim, Goodbye, Hello, Message, Ready, Refusal, Score, Step, Update
from broker.tensors import Layout
from coordinator import history, updates
from coordinator.aggregation import Spread, alone
from coordinator.hands import SEATS, Hands
from coordinator.history import Facts
from coordinator.keeping import Keeping
from coordinator.opened import Open, Secret
from coordinator.post import Post
from coordinator.rooms import Room, copied, forgetting_put, read_lightly
from coordinator.roster import WORKERS_MAX, Rests, Roster
from coordinator.round import Round, Verdict, judge
from coordinator.rules import RULES
from coordinator.scores import Scores, let_oldest_go
from coordinator.store import Store

log = logging.getLogger(__name__)

REMEMBERED_ROUNDS = 64


class Desk:
    """Where everything that workers say arrives.

    Attributes:
        roster, rests: who is here, and who is not asked for a while.
        open: the round in the making, if one is; the service sets it.
        rule, sums: how updates are added up; what the present turn has, in memory that is used again and again.
        version, unsafe: the last one that was made; the round that made it, while that is not on the disk.
        uploads, spread: what was accepted and is to be drained; adds it up and finishes, chunk by chunk.
        take_secret, add_secret: take what is said in a secure sum, and what was sent; None where there is none.
        scores, changed: what is said of versions but in the open round; set whenever something was heard.
    """

    def __init__(self, store: Store, post: Post, layout: Layout, version: int, *, drains: int) -> None:
        self.roster, self.rests = Roster(store.plan.workers), Rests()
        self.open: Open | None = None
        self.scores = Scores(store)
        self.take_secret: Callable[[Ready | Step], Awaitable[None]] | None = None
        self.add_secret: Callable[[Secret, str, memoryview], None] | None = None
        self.changed, self._received = asyncio.Event(), asyncio.Event()
        self.store, self.plan, self.post = store, store.plan, post
        post.blame = self._blame
        self.version, self._hearing = version, False
        self.unsafe: Round | None = None
        self.format = format_of(self.plan.format, keep=self.plan.kept)
        self.payload_layout = self.format.layout(layout)
        self.rule = RULES[self.plan.rule]
        self.sums = self.rule.init(
            layout, read_lightly(self.format), seats=SEATS, clip=self.plan.clip, trim=self.plan.trims,
            aside=partial(copied, store.folder),
        )  # fmt: skip
        self._hands = Hands()
        # a model of one chunk is added before a second thread has woken up
        self.spread: Spread = self._hands.spread if len(self.sums.low) > CHUNK_ITEMS else alone
        self._rooms = [Room(store.folder) for _ in range(drains)]
        self._adding = asyncio.Lock()  # one update is added at a time
        self._receiving: dict[asyncio.Timeout, None] = {}  # in the order in which they began
        self.facts = Facts()  # for the line of the round that is open, or comes next
        self.uploads: asyncio.Queue[tuple[Open, Update]] = asyncio.Queue()
        self._made: dict[int, dict[Attempt, frozenset[str]]] = {}  # by round: the last try at a version is
        self._holds: dict[str, tuple[str, int]] = {}  # worker → its incarnation, and the version that it claimed
        self.keeping = Keeping(store, self.sums, self._adding)

    def holds(self, worker: str, version: int | None = None) -> bool:
        """Whether the worker has claimed this version, or any, from this coordinator, and has lost nothing since."""
        incarnation, held = self._holds.get(worker, (None, 0))
        return incarnation == self.roster.incarnation(worker) and version in (None, held)

    def made(self, done: Round) -> None:
        """The round has made its version, which is not safe yet, and is open no longer."""
        self.open, self.version, self.unsafe, self.facts = None, done.of.round, done, Facts()
        self.scores.made()

    def safe(self, done: Round) -> None:
        """The version that the round made is on the disk."""
        self.unsafe = None
        self._remember(done.of, done.counted)
        self.keeping.made(done.of)

    def _remember(self, of: Attempt, counted: Iterable[str]) -> None:
        self._made.pop(of.round, None)
        self._made[of.round] = {of: frozenset(counted)}
        let_oldest_go(self._made, REMEMBERED_ROUNDS)

    def remember(self, lines: Iterable[history.Line]) -> history.Line | None:
        """Whose updates were counted before this coordinator came up, and who has failed; the last round's line."""
        last = None
        for line in lines:
            self.rests.remember([line])
            if history.rounds([line]) and line["version"] <= self.version:
                self._remember(Attempt(self.plan.run, line["round"], line["attempt"]), line["counted"])
                last = line
        return last

    def rest(self, here: Open) -> None:
        """Note how everyone has fared in a round that is over, and who begins to rest because of it."""
        for worker, rest in self.rests.note(here.round.fared, here.facts.struck).items():
            log.warning("%s keeps failing and rests for %d rounds: %s", worker, rest.rounds, rest.why)
            here.facts.rested[worker] = {"rounds": rest.rounds, "why": rest.why}
        self.rests.excuse(here.round.declined)

    async def begin_turn(self) -> None:
        """Add up anew; what was being added for a turn that is over comes to its end first, and is void."""
        async with self._adding:
            self.sums.clear()
            self.post.asked.clear()
            self.keeping.begin_turn()

    async def end_turn(self) -> None:
        """A turn is over: what is being added comes to its end, what is only being received is left where it is."""
        for receiving in self._receiving:
            if not receiving.expired():
                receiving.reschedule(asyncio.get_running_loop().time())
        while self._receiving:
            self._received.clear()
            await self._received.wait()
        async with self._adding:
            pass

    async def drop_uploads(self, here: Open) -> None:
        """Leave nothing of a round that is over in the queues of those who will upload for the next one."""
        await self.end_turn()  # it may have been given up in the midst of one
        for worker in sorted(here.untidy | (here.round.members - here.round.counted.keys())):
            await self.post.drop_upload(worker)

    def _add(self, update: Update, data: memoryview) -> None:
        if self.plan.keep_updates:
            updates.keep(update, data, self.payload_layout, run=self.store.folder, claim=self.store.claim)
        self.rule.add(self.sums, update.examples, data, spread=self.spread)

    def finish(self, weights: memoryview, put: Put) -> None:
        """Put the version that comes of the present turn's sum and of the weights it began with."""
        if not self.sums.updates and not self.sums.veil:
            put(0, weights)
            return
        self.rule.finish(self.sums, weights, forgetting_put(put, weights), spread=self.spread)

    async def hear(self, message: Message, delivery: Delivery) -> None:
        """Take a sign of life, or a goodbye.

        Raises:
            RunEnded: this is another coordinator's to hear by now.
        """
        self.store.claim.check()
        now = time.monotonic()
        if isinstance(message, Hello) and not message.incarnation:
            if self.post.link.vouched:
                await self.post.restore(message.worker)
        elif isinstance(message, Hello):
            self._greet(message, now)
        elif isinstance(message, Goodbye) and delivery.user == topology.OPERATOR:
            self.roster.leave(message.worker)
            log.warning("%s is out of the federation: %s", message.worker, message.reason)
            if self.open:
                self.open.round.revoke(message.worker, message.reason)
        elif isinstance(message, Goodbye) and self.roster.leave(message.worker):
            log.info("%s left: %s", message.worker, message.reason)
            if self.open:
                self.open.round.leave(message.worker, f"it left: {message.reason[: history.REASON_MAX]}")
        await delivery.ack()
        self.changed.set()

    def _greet(self, hello: Hello, now: float) -> None:
        joins = not self.roster.has(hello.worker)
        if not self.roster.hear(hello, now):
            log.warning("no room for %s: the roster is full", hello.worker)
            return
        if joins:
            log.info("%s is here%s", hello.worker, "" if hello.trains else ", to evaluate")
        here = self.open
        if here is None or not here.round.find(hello.worker):
            return
        if hello.doing == here.round.of:
            here.sent_to[hello.worker] = hello.incarnation
            here.round.claimed.add(hello.worker)
        lost = here.sent_to.get(hello.worker) != hello.incarnation and hello.worker not in here.returned
        if lost and here.round.reissue(hello.worker):
            log.info("%s is back and has lost its task: sending it again", hello.worker)
            here.returned.add(hello.worker)

    async def read(self, message: Message, delivery: Delivery) -> None:
        """Take what a worker says to this run; updates are acknowledged when their version is safe, or at once.

        Raises:
            RunEnded: this is another coordinator's to hear by now.
        """
        self.store.claim.check()
        match message:
            case Update():
                await self._judge(message, delivery)
                return
            case Ready() | Step() if self.take_secret:
                await self.take_secret(message)
            case Score():
                self._score(message)
            case Refusal():
                self._refused(message)
            case Claim():
                known = self.roster.has(message.worker)  # names that nobody has would pile up
                if known and self.open and message.of == self.open.round.of:
                    if message.worker in self.open.round.members:
                        self.open.round.claimed.add(message.worker)
                    self._holds[message.worker] = message.incarnation, self.version
                    let_oldest_go(self._holds, WORKERS_MAX)
            case _:
                await self.post.bury(delivery, f"a {type(message).__name__.lower()} does not belong into the inbox.")
                return
        await delivery.ack()
        self.changed.set()

    async def _judge(self, update: Update, delivery: Delivery) -> None:
        """Give an update its verdict; accepted ones stay unacknowledged until their version is safe."""
        here = self.open
        if self.unsafe and update.of == self.unsafe.of and update.worker in self.unsafe.counted:
            await self._leave_parts(update.worker)  # it will be told when the version is safe
        elif self.has_counted(update.of, update.worker):
            await self.post.tell([update.worker], Answer(update.of, "accepted", "it was counted already"))
            await self._leave_parts(update.worker)
        else:
            most = self.plan.counts_most
            verdict, reason = judge(update, here.round if here else None, self.payload_layout, examples_max=most)
            if verdict is Verdict.ACCEPTED and (said := history.overlong(update.metrics)):
                verdict, reason = Verdict.INVALID, said
            if self.take_secret and verdict is Verdict.ACCEPTED:
                verdict, reason = Verdict.INVALID, "updates of this run are only added up in secret"
            if here and verdict is Verdict.ACCEPTED and not here.is_of_this_turn(update):
                log.info("%s: %s has trained from other weights: asking for another", update.of, update.worker)
                here.untidy.add(update.worker)
                if here.round.reissue(update.worker):
                    here.returned.add(update.worker)
            elif here and verdict is Verdict.ACCEPTED:
                here.round.accept(update.worker)
                self.uploads.put_nowait((here, update))
                if len(here.held) < self.post.held_max:
                    here.held.append(delivery)
                    return  # else its worker, which has it, will say so to the coordinator after this one
            else:
                await self._turn_down(update, verdict, reason)
        await delivery.ack()
        self.changed.set()

    def has_counted(self, of: Attempt, worker: str) -> bool:
        """Whether a worker is in the version that an attempt has made."""
        return worker in self._made.get(of.round, {}).get(of, ())

    def _note_other(self, worker: str, verdict: str, reason: str, *, lie: bool) -> None:
        self.facts.note_other(worker, verdict, reason, most=2 * self.plan.asks + 16)
        if lie:
            self.facts.strike(worker, reason)

    def _blame(self, delivery: Delivery, reason: str) -> None:
        """See `Post.blame`. A routing key is anybody's to choose: only whom the broker vouches for is struck."""
        user = delivery.user if self.post.link.vouched else ""
        name = user or delivery.key.rsplit(".", 1)[-1]
        self._note_other(name if NAME.fullmatch(name) else "somebody", "invalid", reason, lie=bool(user))

    async def _turn_down(self, update: Update, verdict: Verdict, reason: str, *, lost: bool = False) -> None:
        log.warning("an update of %s is %s: %s", update.worker, verdict.value, reason)
        # a folder was put back: this try may come again, and its worker, asked the same, would have nothing to say
        tried = [each.round for each in self.store.journal.tries if each.attempt >= update.of.attempt]
        early = self.open is None and update.of.round > self.version and update.of.round not in tried
        await self._leave_parts(update.worker)
        if self.open and verdict is Verdict.INVALID:
            self.open.round.refuse(update.worker, reason)
        self._note_other(update.worker, verdict.value, reason, lie=verdict is Verdict.INVALID and not lost)
        if verdict is not Verdict.DUPLICATE and not early:  # the first copy will be answered
            await self.post.tell([update.worker], Answer(update.of, verdict.value, reason[:1000]))

    async def _leave_parts(self, worker: str) -> None:
        """Nobody will drain what the worker has uploaded; while a round is open, something else may lie there too."""
        if self.open is None:
            await self.post.drop_upload(worker)
        elif worker in self.open.round.members or self.roster.has(worker):  # of strangers there may be many
            self.open.untidy.add(worker)

    def _score(self, score: Score) -> None:
        worker, here, metrics = score.worker, self.open, score.metrics
        if said := history.overlong(metrics):
            log.warning("%s: the score of %s is not kept: %s", score.of, worker, said)
            self._note_other(worker, "invalid", said, lie=False)
            metrics = {}
        if here and score.of == here.round.of and worker in here.round.members:
            here.facts.scored[worker] = metrics
        elif self._is_final(score.of):
            if worker in self.scores.final:
                self.scores.final[worker] = metrics
        elif score.version <= self.version and worker in self.roster.evaluators():
            self.scores.take(worker, score.version, metrics)

    def _is_final(self, of: Attempt) -> bool:
        return of == Attempt(self.plan.run, self.version, 0)

    def _refused(self, refusal: Refusal) -> None:
        worker, reason = refusal.worker, refusal.reason[: history.REASON_MAX]
        log.warning("%s: %s refused: %s", refusal.of, worker, reason)
        if self.open and refusal.of == self.open.round.of:
            withdraw = self.open.round.decline if refusal.declined else self.open.round.withdraw
            withdraw(worker, reason)
            if self.open.secret and worker in self.open.round.members:
                self.open.secret.gone.setdefault(worker, reason)
        elif self._is_final(refusal.of) and worker in self.scores.final:
            self.scores.final[worker] = self.scores.final[worker] or {}

    async def drain_uploads(self) -> None:
        """Drain accepted updates, as many at once as there are rooms; while one is added, others are on their way."""
        try:
            async with asyncio.TaskGroup() as group:
                for room in self._rooms:
                    group.create_task(self._drain_uploads(room))
        finally:
            self._hands.rest()

    async def _drain_uploads(self, room: Room) -> None:
        while True:
            here, update = await self.uploads.get()
            data = room.clear(update.payload.layout.size_bytes)
            try:
                if await self._receive(here, update, data):
                    await self._add_up(here, update, data)
            except WireError as problem:
                await self._turn_out(here, update, problem)

    async def _receive(self, here: Open, update: Update, data: memoryview) -> bool:
        """Let an update land in `data`; False if its turn has ended before it was there, or others come first.

        Raises:
            WireError: its parts lie, or do not come.
        """
        if not self._wanted(here, update):
            return False
        try:
            async with asyncio.timeout(None) as receiving:  # until the turn ends
                self._receiving[receiving] = None
                if not await self.post.drain(update, data, within_s=self.plan.round_s, waiting=self.uploads.qsize):
                    self.uploads.put_nowait((here, update))
                    return False
        except TimeoutError:
            log.info("%s: what %s has sent is left: the turn is over", update.of, update.worker)
            return False
        finally:
            del self._receiving[receiving]
            self._received.set()
        return True

    async def _add_up(self, here: Open, update: Update, data: memoryview) -> None:
        async with self._adding:
            if not self._wanted(here, update):  # any more
                return
            if self.add_secret and here.secret:
                await asyncio.to_thread(self.add_secret, here.secret, update.worker, data)  # another may begin
            else:
                await asyncio.to_thread(self._add, update, data)
                here.round.count(update.worker, update.examples)
                here.facts.count(update.worker, update.metrics, within=update.within)
        here.facts.bytes_up += len(data)
        self.changed.set()

    def _wanted(self, here: Open, update: Update) -> bool:
        takes = here.secret.wants(update) if here.secret else here.round.takes(update.worker)
        return here is self.open and takes

    async def _turn_out(self, here: Open, update: Update, problem: WireError) -> None:
        if here.secret:
            here.secret.gone.setdefault(update.worker, str(problem))
        elif here is self.open:
            await self._turn_down(update, Verdict.INVALID, str(problem), lost=isinstance(problem, PartsLost))
        self.changed.set()

    async def listen(self, hearing: bool) -> None:
        """We begin or cease to hear hellos. While the broker is away nobody can be heard, so no lease ends."""
        self._hearing = hearing
        self.roster.renew(time.monotonic())

    def lapse(self, now: float) -> None:
        """Strike off those whose leases have ended."""
        if not self._hearing:
            self.roster.renew(now)
        for worker in self.roster.lapse(now):
            log.warning("%s has not been heard of: its lease has ended", worker)
            if self.open:
                self.open.round.lose(worker)
