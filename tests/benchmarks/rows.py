"""The rows of a measurement: how many workers, how large a model, in how many processes, for how many rounds.

Knows how a row is written and how often it is worth repeating. Does not know how it is measured.
"""

import re
from dataclasses import dataclass

WARMUP = 2
"""The first rounds pay for connections, page faults and torch's first steps: they are made and not counted."""
DEFAULT = ("2xtoy", "4x1M", "4x10M", "16x1M", "64x1M", "1000x0.1M")
SCALES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
TOY = 3
ALONE_MAX = 16
"""Most workers that get a process each; beyond, PyTorch's own weight in each would be all that there is to see."""
HOSTS = 4
ROUNDS_MIN, ROUNDS_MAX = 3, 40
ROW_PARAMETERS = 400_000_000
"""About so many are moved in a row's rounds, each of which costs a worker as much as so many more:"""
WORKER_PARAMETERS = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """What one row measures; `rounds` are those that count. `hosts` processes share the workers among them.

    `secure`: updates are only added up in secret; `lost` workers, others each time, drop out of every sum.
    """

    label: str
    workers: int
    parameters: int
    hosts: int
    rounds: int
    secure: bool = False
    lost: int = 0

    @property
    def all_rounds(self) -> int:
        """Those that do not count, too."""
        return WARMUP + self.rounds

    @property
    def shares(self) -> list[int]:
        """How many workers each host has."""
        each, more = divmod(self.workers, self.hosts)
        return [each + (n < more) for n in range(self.hosts)]

    @property
    def names(self) -> list[str]:
        """Of all workers, those of the first host first."""
        if self.hosts == self.workers:
            return [f"w{number}" for number in range(1, self.workers + 1)]
        shares = enumerate(self.shares, 1)
        return [f"w{number}-{each}" for number, share in shares for each in range(1, share + 1)]


def rows_of(text: str, rounds: int | None = None) -> list[Row]:
    """`2xtoy,4x1M,64x1M@8` as rows; `default` stands for those of DEFAULT.

    Args:
        text: WORKERSxPARAMETERS or WORKERSxPARAMETERS@HOSTS, with commas; `+secure` behind one adds up in secret, and
            with `+secure-10` ten workers drop out of each round after they have dealt their shares.
        rounds: for every row; without, each has as many as its size leaves time for.

    Raises:
        ValueError: a row is not one, and how to write it.
    """
    words = [word.strip() for word in text.split(",")]
    words = [each for word in words for each in (DEFAULT if word == "default" else (word,))]
    return [row_of(word, rounds) for word in words]


def row_of(word: str, rounds: int | None) -> Row:
    found = re.fullmatch(r"(\d+)x(?:toy|(\d+(?:\.\d+)?)([kMG]?))(?:@(\d+))?(?:(\+secure)(?:-(\d+))?)?", word)
    if found is None:
        raise ValueError(f"{word!r} is not a row: write WORKERSxPARAMETERS, as in 4x1M, 2xtoy or 64x1M@4")
    workers = int(found[1])
    parameters = TOY if found[2] is None else round(float(found[2]) * SCALES[found[3]])
    hosts = int(found[4]) if found[4] else workers if workers <= ALONE_MAX else HOSTS
    if not 1 <= hosts <= workers or parameters < 1:
        raise ValueError(f"{word!r} cannot be measured: it takes a parameter, and from 1 to {workers} hosts")
    lost, losable = int(found[6] or 0), workers - (2 * workers // 3 + 1)
    if lost > losable:
        raise ValueError(f"{word!r} cannot be measured: of {workers} workers at most {losable} may drop out of a sum")
    fitting = round(ROW_PARAMETERS / (workers * (parameters + WORKER_PARAMETERS)))
    how = " secure" * bool(found[5]) + f", {lost} lost" * bool(lost)
    label = word.partition("@")[0].partition("+")[0].replace("x", " × ") + how
    most = rounds or min(ROUNDS_MAX, max(ROUNDS_MIN, fitting))
    return Row(label, workers, parameters, hosts, most, secure=bool(found[5]), lost=lost)
