"""The worker's end of the wire: what it says, what it listens to, and how its queue becomes its own.

Knows queues, parts and reconnecting. Does not know tasks: what is said when, and what becomes of what was heard, is
the worker's (`service.py`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from broker import topology
from broker.errors import BrokerRefused, GaveUp, Lacking, LinkError, QueueInUse, Unroutable, UsageError, WireError
from broker.link import Delivery, Lane, Link, Outgoing, heard, publish_parts
from broker.messages import Claim, Goodbye, Hello, Message, Payload, Ready, Refusal, Score, Step, Update, encode
from broker.parts import Aim, split
from workers.spool import Spool

log = logging.getLogger(__name__)

RETRY_S = 0.2
PREFETCH, PREFETCH_MIN = 32, 4
GOODBYE_S = 2.0
NAMESAKE_S, NAMESAKE_RETRY_S = 100.0, 1.0
"""How long a former connection of our own may keep our queue, and how often we look: the broker notices its end after
three heartbeats."""
SAY_S = 120.0
"""How long a claim, score, update or refusal tries to reach the broker before the job is given up."""
LACKING_S, LACKING_RETRY_S = 3600.0, 5.0
"""How long an invited worker waits for queues or rights, which only others can give it, and how often it looks."""
ASK_S = 10.0
SETTING_UP_MAX = 32
"""How many workers of one process set up their queues at the same time: a thousand at once only get in each other's
way."""


class Shared:
    """What all workers of one process have in common.

    Args:
        link: their way to the broker.
        spool: where their models lie.
        workers: how many they are.
    """

    def __init__(self, link: Link, spool: Spool, *, workers: int = 1) -> None:
        self.link = link
        self.spool = spool
        # parts in hand never wait for room, they land at once; so this bounds what a burst can pile up
        self.prefetch = max(PREFETCH // workers, PREFETCH_MIN)
        self.setting_up = asyncio.Semaphore(SETTING_UP_MAX)
        self.declared = False  # the exchanges, which are the same for all


class Post:
    """One worker, as the federation hears it.

    Args:
        shared: what it has in common with others.
        worker: its name.
        tell: writes a line into the log, at a level.
    """

    def __init__(self, shared: Shared, worker: str, tell: Callable[[str, int], None]) -> None:
        self.worker = worker
        self._shared = shared
        self._link = shared.link
        self._tell = tell
        self._lacks: dict[str, float] = {}  # queues that others must give us back, and since when

    async def declare(self) -> None:
        """Make sure that the worker's queues and the federation's exchanges exist; if it is invited, others do."""
        if self._link.vouched:
            return
        async with self._shared.setting_up:
            if not self._shared.declared:
                await self._link.declare(topology.FEDERATION)
                self._shared.declared = True
            await self._link.declare(topology.of_worker(self.worker))

    async def _come_back(self, problem: LinkError, queue: str) -> None:
        """The connection was lost, or a queue: there may be another broker, which has nothing of ours.

        Raises:
            GaveUp: what it takes to consume the queue has been withheld from this worker for too long.
        """
        if self._shared.declared:  # the first of all to notice
            log.info("the broker is away: %s", problem)
        self._shared.declared = False
        await asyncio.sleep(RETRY_S)
        await self.declare()
        if not (self._link.vouched and isinstance(problem, Lacking)):
            return
        now = asyncio.get_running_loop().time()
        if queue not in self._lacks:
            self._tell(f"waiting for a coordinator, or whoever runs the federation: {problem}", logging.WARNING)
        if now - self._lacks.setdefault(queue, now) > LACKING_S:
            raise GaveUp(f"{self.worker} has waited for {LACKING_S:g} s; is its invitation still good? {problem}")
        await self._ask_for_queues()
        await asyncio.sleep(LACKING_RETRY_S)

    async def _ask_for_queues(self) -> None:
        """An invited worker's are a coordinator's to make anew, who hears of it by a hello without incarnation."""
        await self.greet(Hello(self.worker, "", "", trains=False, lease_s=0.0, doing=None), within_s=ASK_S)

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        """What an invited worker may not do now it may be allowed in a while; anybody else will not."""
        try:
            yield
        except BrokerRefused as problem:
            if not self._link.vouched:
                raise
            raise Lacking(str(problem)) from None

    # -- saying -------------------------------------------------------------------------------------------------

    async def greet(self, greeting: Hello | Goodbye, *, within_s: float) -> bool:
        """Give a sign of life, or leave, if the broker hears of it soon; whether anybody listens."""
        key, lasting = topology.hello_key(self.worker), isinstance(greeting, Goodbye)
        try:
            with self._allowed():
                said = Outgoing(topology.UP, (key,), encode(greeting), persistent=lasting)
                await self._link.publish(said, within_s=within_s)
        except Unroutable:
            return False
        except LinkError as problem:
            log.debug("no greeting sent: %s", problem)
        return True

    async def say(self, message: Claim | Score | Update | Refusal | Ready | Step) -> None:
        """Send a small message to the coordinator of its run; if that is gone for good, nobody needs it.

        Raises:
            LinkError: the broker did not take it within SAY_S.
        """
        # what is said in a sum and lost with the broker is said again when we listen again
        key, lasting = topology.inbox_key(message.of.run, self.worker), not isinstance(message, Ready | Step)
        said = Outgoing(topology.UP, (key,), encode(message), persistent=lasting)
        try:
            with self._allowed():
                await self._link.publish(said, within_s=SAY_S)
        except Unroutable:
            self._tell(f"the run {message.of.run} has no coordinator any more", logging.INFO)

    async def uploads(self) -> int:
        """How many parts lie in the worker's upload queue; none, where that cannot be known."""
        with suppress(LinkError, BrokerRefused):
            return await self._link.depth(topology.upload_queue(self.worker)) or 0
        return 0

    async def upload(self, payload: Payload, data: memoryview) -> None:
        """Put a payload's parts into the worker's upload queue. Nothing may change in `data` meanwhile.

        Raises:
            LinkError: the broker did not take them all.
        """
        queue, key = topology.upload_queue(self.worker), (topology.upload_key(self.worker),)
        try:
            with self._allowed():
                await publish_parts(self._link, split(payload, data), queue, key, lane=Lane.UP)
        except Unroutable as problem:  # we never consume that queue, so nothing else tells us that it was deleted
            if self._link.vouched:
                await self._ask_for_queues()
                raise
            log.info("making the upload queue anew: %s", problem)
            self._shared.declared = False  # it may be another broker, and we the first to notice
            await self.declare()
            await publish_parts(self._link, split(payload, data), queue, key, lane=Lane.UP)

    # -- listening ----------------------------------------------------------------------------------------------

    async def hear_answers(self, take: Callable[[Message], None], again: Callable[[], None]) -> None:
        """Give everything in the control queue to `take`, for ever; `again` is called whenever listening begins."""
        queue = topology.control_queue(self.worker)
        while True:
            try:
                async with AsyncExitStack() as stack:
                    async with self._shared.setting_up:
                        with self._allowed():
                            deliveries = await stack.enter_async_context(self._link.consume(queue, alone=True))
                    self._lacks.pop(queue, None)
                    again()
                    async for delivery in deliveries:
                        try:
                            message = heard(bytes(delivery.body))
                        except WireError as problem:
                            self._tell(f"refused what came from the coordinator: {problem}", logging.WARNING)
                        else:
                            take(message)
                        await delivery.ack()
            except QueueInUse:  # another worker of this name: what is said to it is not for us
                await asyncio.sleep(NAMESAKE_RETRY_S)
            except LinkError as problem:
                await self._come_back(problem, queue)

    async def receive_tasks(
        self,
        begin: Callable[[], Awaitable[None]],
        take: Callable[[Delivery], Awaitable[None]],
        end: Callable[[], None],
        aim: Aim,
    ) -> None:
        """Give everything in the queue of tasks to `take`, for ever.

        `begin` is called whenever the queue has become ours alone and empty, `end` when we lose it; `aim` says where
        parts land.

        Raises:
            UsageError: another worker of this name is connected.
        """
        free = asyncio.timeout(None)  # runs only while someone else has our queue
        try:
            async with free:
                while True:
                    try:
                        async with self._own_queue(aim) as deliveries:
                            free.reschedule(None)
                            self._lacks.pop(topology.down_queue(self.worker), None)
                            await begin()
                            async for delivery in deliveries:
                                await take(delivery)
                                del delivery  # or each worker would hold a part until its next one comes
                    except QueueInUse as problem:
                        if free.when() is None:
                            said = f"another worker called {self.worker} is connected, or was a moment ago"
                            self._tell(said, logging.WARNING)
                            free.reschedule(asyncio.get_running_loop().time() + NAMESAKE_S)
                        log.debug("%s", problem)
                        await asyncio.sleep(NAMESAKE_RETRY_S)
                    except LinkError as problem:
                        end()
                        await self._come_back(problem, topology.down_queue(self.worker))
        except TimeoutError:
            if not free.expired():
                raise
            raise UsageError(f"another worker called {self.worker} is connected: choose another --name.") from None

    @asynccontextmanager
    async def _own_queue(self, aim: Aim) -> AsyncIterator[AsyncIterator[Delivery]]:
        """What comes into the queue of tasks from now on; what lies in it was sent to a former incarnation."""
        queue = topology.down_queue(self.worker)
        async with AsyncExitStack() as stack:
            async with self._shared.setting_up:
                with self._allowed():
                    async with self._link.consume(queue, lane=Lane.DOWN, prefetch=1, alone=True):
                        pass  # nobody else is at our queue: only now may it be purged
                    await self._link.purge(queue)
                    deliveries = await stack.enter_async_context(
                        self._link.consume(queue, lane=Lane.DOWN, prefetch=self._shared.prefetch, alone=True, aim=aim)
                    )
            yield deliveries
