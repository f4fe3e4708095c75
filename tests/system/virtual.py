"""Processes, time and death inside one event loop whose clock jumps: what happens is a function of the dice alone.

Knows tasks, timers and to which simulated process each belongs. Does not know what they do, nor the federation.

A process is whatever runs in a context of its own: its tasks, its timers and what it gives to threads. Whose turn it
is among those that have something to do is drawn; within one process things happen in the order in which asyncio
would have them. When nobody has anything to do, the clock goes on to the next timer. A thread's work is done at one
instant, between two instants at which others are at work.

A process that is killed does nothing any more that anybody could see. Python must unwind its tasks all the same; this
is done at once, and whatever they try meanwhile raises `Killed` (see `Process.check`).
"""

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

STEPS_MAX = 2_000_000
"""No run takes more steps; who takes them in no time at all has got into an endless loop."""
UNWINDINGS_MAX = 20


class Killed(BaseException):
    """This process is no more."""


class Stuck(Exception):
    """Nobody has anything to do, and no timer is set; or there is no end of it."""


@dataclass(eq=False)
class Process:
    """What lives and dies as one.

    Attributes:
        name: whose it is, and how many have had that name before.
        alive: it has not been killed.
        stopped_until: when it goes on, should it be stopped.
        at_death: what the system does for it when it is dead.
    """

    name: str
    alive: bool = True
    stopped_until: float = 0.0
    at_death: list[Callable[[], None]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Go on only if we are alive.

        Raises:
            Killed: we are not.
        """
        if not self.alive:
            raise Killed(self.name)


OURS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")
"""The process that is at work."""


class Numbered(asyncio.Task[Any]):
    """A task that has a place in sets which does not depend on where it lies in memory."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, Any], **how: Any) -> None:
        self.number = number
        self.process = OURS.get()
        super().__init__(coro, **how)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop.

    Args:
        dice: whose turn it is, and how long a thread takes.
        bound_s: how long the whole may take, in its own time.

    Attributes:
        world: the process that is none: the broker, the network, and the test.
        thread_s: draws how long a thread's work waits for its turn, and for being noticed.
        complaints: what asyncio would only have logged.
    """

    def __init__(self, dice: random.Random, *, bound_s: float) -> None:
        super().__init__()
        self.world = Process("world")
        self.bound_s = bound_s
        self.thread_s: Callable[[], float] = lambda: 0.0
        self.complaints: list[str] = []
        self._now = 0.0
        self._dice = dice
        self._queues: dict[Process, deque[asyncio.Handle]] = {}
        self._dead: list[Process] = []
        self._buried: Process | None = None
        self._tasks = self._steps = 0
        self._ready: deque[asyncio.Handle]
        self._scheduled: list[asyncio.TimerHandle]
        self.set_task_factory(self._numbered)
        self.set_exception_handler(self._complain)

    # -- what asyncio asks for ----------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def _process_events(self, event_list: Any) -> None:
        """There are no files to wait for."""

    def _write_to_self(self) -> None:
        """There is nobody to wake up."""

    def _numbered(self, _: Any, coro: Any, **how: Any) -> Any:
        self._tasks += 1
        return Numbered(self._tasks, coro, loop=self, **how)

    def run_in_executor(  # type: ignore[override]  # asyncio's own has type variables that say no more here
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """As threads do it: what has begun is done, whoever waits for it or does not."""
        del executor
        future: asyncio.Future[Any] = self.create_future()
        begun = self._dice.random() < 0.5

        def work() -> None:
            if future.cancelled() and not begun:
                return
            made, problem = None, None
            try:
                made = func(*args)
            except BaseException as raised:  # noqa: BLE001 - it is the caller's
                problem = raised
            self.call_later(self.thread_s(), notice, made, problem)

        def notice(made: Any, problem: BaseException | None) -> None:
            if future.done():
                return
            if problem is None:
                future.set_result(made)
            else:
                future.set_exception(problem)

        self.call_later(self.thread_s(), work)
        return future

    def _complain(self, _: Any, context: dict[str, Any]) -> None:
        problem, task = context.get("exception"), context.get("task") or context.get("future")
        process = getattr(task, "process", None)
        if not isinstance(problem, Killed) and (process is None or process.alive):
            self.complaints.append(f"{context.get('message')}: {problem!r} {task!r}")

    def _run_once(self) -> None:
        self._sort()
        turns = [each for each, queue in self._queues.items() if queue and each.stopped_until <= self._now]
        if not turns:
            self._go_on()
            return
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise Stuck(f"{STEPS_MAX} steps, and no end of it")
        whose = turns[int(self._dice.random() * len(turns))] if len(turns) > 1 else turns[0]
        run(self._queues[whose].popleft())
        while self._dead:
            self._bury(self._dead.pop(0))

    # -- ours ---------------------------------------------------------------------------------------------------

    def begin(self, name: str, body: Callable[[Process], Coroutine[Any, Any, None]]) -> Process:
        """A new process that does this."""
        process = Process(name)
        context = contextvars.copy_context()
        context.run(OURS.set, process)
        process.task = context.run(self.create_task, body(process))
        return process

    def outside(self, at: float, act: Callable[..., object], *arguments: Any) -> asyncio.TimerHandle:
        """Let something happen in the world at an instant, whatever becomes of whoever has asked for it."""
        context = contextvars.copy_context()
        context.run(OURS.set, self.world)
        return self.call_at(at, act, *arguments, context=context)

    def kill(self, process: Process) -> None:
        """From now on it does nothing that anybody could see."""
        if process.alive:
            process.alive = False
            self._dead.append(process)

    def end(self) -> None:
        """Nobody goes on: all are killed, and unwound."""
        self.set_exception_handler(lambda *_: None)
        left = {task.process for task in asyncio.all_tasks(self) if isinstance(task, Numbered)}
        for process in sorted(left, key=lambda each: each.name):
            process.alive = False
            self._bury(process)

    def _sort(self) -> None:
        """What can be done now, by process."""
        scheduled, ready = self._scheduled, self._ready
        while scheduled and (scheduled[0].cancelled() or scheduled[0].when() <= self._now):
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            if not timer.cancelled():
                ready.append(timer)
        while ready:
            handle = ready.popleft()
            process: Process = handle._context.get(OURS, self.world)  # type: ignore[attr-defined]
            if not handle.cancelled() and (process.alive or process is self._buried):
                self._queues.setdefault(process, deque()).append(handle)

    def _go_on(self) -> None:
        """Nobody has anything to do now."""
        instants = [each.stopped_until for each, queue in self._queues.items() if queue]
        if self._scheduled:
            instants.append(self._scheduled[0].when())
        if not instants:
            raise Stuck("nobody has anything to do, and no timer is set")
        self._now = max(self._now, min(instants))
        if self._now > self.bound_s:
            raise Stuck(f"{self.bound_s:.0f} s, and no end of it")

    def _bury(self, process: Process) -> None:
        """Unwind its tasks, and nobody else's, at this very instant."""
        self._buried = process
        for _ in range(UNWINDINGS_MAX):
            left = sorted(
                (task for task in asyncio.all_tasks(self) if isinstance(task, Numbered) and task.process is process),
                key=lambda task: task.number,
            )
            if not left:
                break
            for task in left:
                task.cancel()
            self._sort()
            while queue := self._queues.get(process):
                run(queue.popleft())
                self._sort()
        else:
            raise Stuck(f"{process.name} is dead and does not lie down: {left}")
        self._buried = None
        self._queues.pop(process, None)
        process.task = None  # which knows how it ended, and so all that was there
        while process.at_death:
            process.at_death.pop()()


def run(handle: asyncio.Handle) -> None:
    if not handle.cancelled():
        handle._run()
