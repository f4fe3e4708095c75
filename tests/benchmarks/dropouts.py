"""Workers of which some drop out of every secure sum, as rows such as `100x0.2M@4+secure-10` want it.

Run as a file it is `fluffle worker`, the product's own, but for one thing: those whose turn it is to drop out keep
back the words that they have masked, and say instead that they take no further part. By then they have dealt shares
and done all their work, and the others have masked against them: the coordinator must open their mask keys, and take
off what each of their neighbours has added for them. No drop-out costs more work.

What this does not measure is waiting. Workers that vanish without a word are waited for until their leases end, or
the stage does: a matter of settings, and no work.

Knows who drops out when, and how. Does not know what a round costs.
"""

import sys
from collections.abc import Sequence
from unittest.mock import patch

import fluffle
from broker.errors import Refused
from broker.messages import Call, Step
from broker.pact import Masked
from workers.secrecy import Talk

WHY = "it drops out, as it must, with its shares dealt and its words masked"


def dropping(names: Sequence[str], lost: int, round_: int) -> list[str]:
    """The `lost` of these workers that drop out in a round.

    They are others in the next round, for a worker that fails three times on end would rest; and they stand apart in
    the list, so that each host has its share of them.
    """
    step = len(names) // lost if lost else 1
    return [*names[round_ % step :: step]][:lost]


def main(names: list[str], lost: int) -> None:
    """Be `fluffle`, whose workers drop out when their turn comes."""
    heed = Talk.heed

    def heed_or_drop_out(talk: Talk, call: Call) -> bool:
        news, step = heed(talk, call), talk.said
        its_turn = step is not None and step.worker in dropping(names, lost, call.of.round)
        if its_turn and isinstance(step, Step) and isinstance(step.says, Masked):
            talk.said = None  # or it would be said all the same, to the first who asks
            raise Refused(WHY)
        return news

    with patch.object(Talk, "heed", heed_or_drop_out):
        fluffle.main()


if __name__ == "__main__":
    _, everyone, some, *words = sys.argv
    sys.argv = ["fluffle", *words]
    main(everyone.split(","), int(some))
