"""What both daemons do to begin and to end: the event loop, signals, a watchdog, the log's form, dying with a parent.

Does not know what the daemon does, nor the command line's options.
"""

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable

from uvloop import new_event_loop

from broker.errors import GAVE_UP, STOPPED, FluffleError
from broker.fields import legible

PARENT = "FLUFFLE_PARENT"
"""Environment variable: a daemon that finds it dies with the process of that id."""
PR_SET_PDEATHSIG = 1
NOW_S = 1.5
"""How long a daemon may take to tidy up after the second signal."""
HANG_S = 60.0
"""How long the event loop may hang before the process ends."""
LOOKS = 4
"""How often the watchdog looks in that time; each look must be in vain, and in time."""


LINE_MAX = 5000
"""Characters of an event in the log at the most."""
LOG_CHARS, LOG_S = 256 * 1024, 60.0
"""So many characters one place in the program may log in so many seconds."""
_logged: dict[tuple[str, int], tuple[float, int]] = {}  # place → since when, and for how many it has room still


class StoppedEarly(FluffleError):
    """The daemon was told to stop before its work was done."""

    status = STOPPED


def start_log() -> None:
    """One line per event on stderr, with day and time: a daemon stays for weeks."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%F %T", force=True
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_legible)
    for chatty in ("aio_pika", "aiormq", "asyncio"):  # they tell of every lost connection at length; we do in a line
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


def _legible(record: logging.LogRecord) -> bool:
    """Whether there is room for it. Reasons, names and routing keys are others' words, without number, if they like.

    So no escape sequence of theirs may reach a terminal, and no flood of them fill a disk.
    """
    place, now = (record.pathname, record.lineno), time.monotonic()
    since, room = _logged.get(place, (now, LOG_CHARS))
    since, room = (since, room) if now < since + LOG_S else (now, LOG_CHARS)
    if room > 0:
        said = legible(record.getMessage()[:LINE_MAX])[:LINE_MAX]
        record.msg, record.args = said + f" … and no more like this for {LOG_S:g} s" * (room <= len(said)), ()
        _logged[place] = since, room - len(said)
    return room > 0


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def mind_parent() -> None:
    """From now on, do not outlive the process that PARENT names, if it names one."""
    if os.environ.get(PARENT):
        die_with(int(os.environ[PARENT]))


def run(main: Callable[[asyncio.Event], Awaitable[None]], *, hang_s: float = HANG_S) -> None:
    """Run a daemon until it returns.

    The first SIGTERM or SIGINT sets the event that `main` is given, the second one cancels `main`, and ends the
    process if that takes longer than NOW_S. It ends, too, when the event loop has not turned for `hang_s`.

    Raises:
        StoppedEarly: it was cancelled by the second signal.
    """
    mind_parent()

    async def under_signals() -> None:
        stop = asyncio.Event()
        work = asyncio.ensure_future(main(stop))

        def told() -> None:
            if stop.is_set():
                work.cancel()
                timer = threading.Timer(NOW_S, _leave, ("stopped at once.", STOPPED))
                timer.daemon = True
                timer.start()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told)
        watchdog = Watchdog(loop, hang_s)
        try:
            await work
        except asyncio.CancelledError:
            if stop.is_set():
                raise StoppedEarly("stopped at once.") from None
            raise
        finally:
            watchdog.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)  # there is nothing left to tidy up, and no traceback to show

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(under_signals())


def _leave(why: str, status: int) -> None:
    """End the process from any thread, whatever the others do."""
    os.write(2, f"fluffle: {why}\n".encode())
    os._exit(status)


class Watchdog:
    """A thread that ends the process when an event loop has not turned for `hang_s`.

    It counts its own looks, not seconds: a process that was stopped, or a machine that slept, has not looked either,
    and a look that comes late says nothing.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, hang_s: float) -> None:
        self._loop = loop
        self._hang_s = hang_s
        self._turns = 0
        self._over = threading.Event()
        self._turn()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _turn(self) -> None:
        self._turns += 1
        if not self._over.is_set():
            self._loop.call_later(self._hang_s / LOOKS / 2, self._turn)

    def _watch(self) -> None:
        every_s, seen, missed, looked_at = self._hang_s / LOOKS, 0, 0, time.monotonic()
        while missed < LOOKS:
            if self._over.wait(every_s):
                return
            now, turns = time.monotonic(), self._turns
            missed = missed + 1 if turns == seen and now - looked_at < 2 * every_s else 0
            seen, looked_at = turns, now
        faulthandler.dump_traceback(all_threads=True)
        _leave(f"the event loop has hung for {self._hang_s:g} s, see above: ended, to be started anew.", GAVE_UP)
