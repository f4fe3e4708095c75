"""Every error that Fluffle raises on purpose, sorted by who can act on it.

FluffleError
 ├── UsageError          the user: wrong plan, learner, folder, URL … (exit status 2)
 │    └── BrokerRefused  RabbitMQ answered, and said no: password, vhost, permission
 ├── WireError           the sender: bytes that lie; the message is dropped with this sentence as the reason
 │    └── PartsLost      nobody, perhaps: what was promised did not come
 ├── Refused             the other side of a secure round: it asks for, or says, what must not be; nothing was given
 │    └── Alarm          … and an honest one never would: the data's owner should look
 ├── Aborted             nobody: too few are left of a secure attempt; nothing was revealed
 ├── LinkError           nobody at once: the broker is away or busy; wait and try again
 │    ├── Unroutable     no queue takes this message: the receiver is not there (any more)
 │    ├── Lacking        a queue or a right is not there, and only somebody else can give it
 │    ├── QueueInUse     another party consumes this queue, and one of us wants it alone
 │    ├── NoRoom         a queue is full and says so; waiting has not helped
 │    └── LinkClosed     our own side closed the link
 ├── LearnerFailed       the learner's author: the user's code raised; carries the end of its traceback
 │    └── OutOfMemory    … because it ran out of memory
 ├── Declined            the data's owner: their policy does not allow it
 ├── GaveUp              a supervisor: the process has ended to be started anew (exit status 4)
 └── RunEnded            the operator: a run cannot go on, and the sentence says what it waited for

Each error's text is one sentence that says what is wrong and what to do. This file knows no other file.
"""

STOPPED, GAVE_UP = 3, 4
"""Exit statuses: told to stop before the work was done; unable to go on, for reasons that a new process may mend."""


class FluffleError(Exception):
    """Anything that Fluffle raises on purpose; its text is one sentence meant to be read.

    `status` is with which a command exits that ends with it.
    """

    status = 1


class UsageError(FluffleError):
    """The user can mend this: a setting, a path, a file, a learner. The command line exits with status 2."""

    status = 2


class BrokerRefused(UsageError):
    """RabbitMQ answered and refused: wrong password, wrong vhost, missing permission."""


class WireError(FluffleError):
    """The bytes received do not keep the protocol; the sender's contribution is dropped, nothing else."""


class PartsLost(WireError):
    """Parts that were said to be there are not, nor came when they were asked for; the broker may have lost them."""


class Refused(FluffleError):
    """The other side of a secure round asked for, or said, what it must not; nothing was given, nothing counted."""


class Alarm(Refused):
    """What an honest coordinator never asks: a second cohort, second survivors, a round that is over."""


class Aborted(FluffleError):
    """An attempt at a secure round cannot be finished, for too few are left; nothing was revealed."""


class LinkError(FluffleError):
    """The way to the broker is interrupted; what was being sent may or may not have arrived."""


class Unroutable(LinkError):
    """No queue takes this message: its receiver has not been here, or has been removed."""


class Lacking(LinkError):
    """A queue that is not there, or a right that an invited worker has not: others may put that right meanwhile."""


class QueueInUse(LinkError):
    """Another party consumes this queue, and one of the two wants it alone."""


class NoRoom(LinkError):
    """A queue that this message belongs in is full, and has been for as long as we have waited."""


class LinkClosed(LinkError):
    """This side has closed the link; no more can be sent or received through it."""


class LearnerFailed(FluffleError):
    """The user's learner raised, or died; the text ends with the last lines of its traceback."""


class OutOfMemory(LearnerFailed):
    """The user's code ran out of memory; its process may still hold it."""


class Declined(FluffleError):
    """The policy of the data's owner stands in the way; the text is the rule, and no more than that."""


class GaveUp(FluffleError):
    """This process cannot do its work any more; a new one may, once the text's reason has passed."""

    status = GAVE_UP


class RunEnded(FluffleError):
    """The run cannot go on by itself; the text says why."""


def insist(holds: bool, otherwise: str) -> None:
    """Refuse, for this reason, what does not hold."""
    if not holds:
        raise Refused(otherwise)
