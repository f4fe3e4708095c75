"""What both daemons do to begin and to end: the event loop, signals, the log's form, not outliving a parent.

Does not know what the daemon does, nor the command line's options.
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from uvloop import new_event_loop

from broker.errors import FluffleError

PARENT = "FLUFFLE_PARENT"
"""Environment variable: a daemon that finds it dies with the process of that id."""
PR_SET_PDEATHSIG = 1


class StoppedEarly(FluffleError):
    """The daemon was told to stop before its work was done."""


def start_log(*, quiet: bool = False) -> None:
    """One line per event on stderr, with the time; warnings only when `quiet`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for chatty in ("aio_pika", "aiormq", "asyncio"):  # they tell of every lost connection at length; we do in a line
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


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


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run a daemon until it returns.

    The first SIGTERM or SIGINT sets the event that `main` is given, the second one cancels `main`.

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
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told)
        try:
            await work
        except asyncio.CancelledError:
            if stop.is_set():
                raise StoppedEarly("stopped at once.") from None
            raise
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(under_signals())
