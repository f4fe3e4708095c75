"""A run's settings: frozen, checked once, in sentences; read from and written to `plan.toml`.

Knows what settings there are, their bounds and which contradict each other. Does not know what they bring about.
"""

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from broker import wording
from broker.errors import UsageError
from broker.formats import KEEP
from broker.messages import CLIP_MAX, EXAMPLES_MAX, KEY_MAX, MAP_MAX, PART_BYTES_MAX, PART_BYTES_MIN, TEXT_MAX, Noise
from broker.norms import CLIP_MIN
from broker.pact import COHORT_MAX, COHORT_MIN
from broker.parts import PART_BYTES
from broker.ring import Ring, ring_of
from broker.wording import Name
from coordinator.privacy import contradictions
from coordinator.rules import RULES, bent

FILE = "plan.toml"
ON_SUMS = "central", "distributed"  # kinds of `dp` that put noise on a sum of updates, and not on a row's share
HEADER = """\
# The plan of this run. It is frozen once version 1 is made; only `rounds` may still be raised.
# Change it with options of `fluffle coordinator`, or here by hand while the coordinator does not run.

"""
_DIGEST = Annotated[str, Field(max_length=64)]
_KEY = Annotated[str, Field(max_length=KEY_MAX)]
_VALUE = (
    bool
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=TEXT_MAX)]
)


_SETTING_RULE = (
    f"must be a finite number of at most 64 bits, true, false, or text of at most {TEXT_MAX} characters, "
    f"under a name of at most {KEY_MAX}"
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Plan:
    """All settings of a run.

    **How far one worker can move the model.** Its update Δ, counted for n examples beside N of the others, adds
    n·Δ / (n + N) to the version before: in a parallel round, where at least quorum − 1 others are counted with one
    example each, at most

        reach = clip · examples_max / (examples_max + quorum − 1),

    in L2 norm over all floats, whatever it sends (times 1 + `norms.SLACK`). With examples_max = 1 all count the same,
    and that is clip / quorum. Against the mean of the others, all of whom keep to the clip, it makes a difference of
    at most twice that. In a cyclic round each turn is one worker's: reach is clip. None of this holds of integers
    and booleans, of which the largest counts.

    Attributes:
        run: the run's name on the wire, unique among the federation's runs.
        learner: what is learned; a name for people, the coordinator never loads it.
        rounds: versions to make.
        cohort: workers chosen for a round.
        over_select: so many times `cohort` workers are asked, rounded up, or as many as are here; the round closes
            when `cohort` updates are counted. Which these are depends on who was first.
        quorum: fewest updates that make a version; two thirds of the cohort, rounded up, unless given.
        round_s: seconds until a round (in a cyclic one: a turn) stops waiting.
        gather_s: seconds that a coordinator which has just come up waits for a full cohort; later rounds do not.
        schedule: `parallel` averages a cohort's updates; `cyclic` sends the model from one to the next.
        workers: only these take part, and cyclic rounds keep their order; empty: anyone, by name.
        rule: how updates become a change; a name in `rules.RULES`, which says what each bears.
        trim: how many of the smallest and largest values of each float the rule trimmed-mean leaves out; 1 unless
            given, and then only there.
        seed: begins all dice: cohorts, and the learner's own by way of the task.
        part_bytes: how large the pieces are in which models travel; no number is cut in two.
        format: how updates travel; a name in `broker/formats.py`, which says what each costs and loses.
        keep: the part of its floats that an update in the format top-k sends; 0.01 unless given, and then only there.
        down: how a version travels to those who have the one before: `full` as it is; else as the change from that
            one, in this format. The others get whole weights.
        clip: the largest norm of an update (`broker/norms.py`), 0 for any. A worker scales a longer one down; what
            comes longer all the same is refused.
        examples_max: the most examples that an update counts for; a worker that learned from more says this.
        privacy: `secure`: updates are only added up in secret (`broker/pact.py`), and nobody sees one; else `none`.
        ring_bits: secure: 32 or 64 bits for each number of a masked update, whose grid is as fine as they allow.
        min_cohort: secure: fewest updates in a sum, from 3.
        threshold: secure: more than this part of a worker's neighbours must help to open its secrets.
        keep_updates: every counted update stays in the run's folder, so that each version can be made again.
        contract: the fingerprint of the tensors that every worker's learner must have (`broker/contract.py`); empty,
            as in runs of a former fluffle: not checked.
        learner_file: SHA-256 of the learner's file, in hex, if no other will do; else empty.
        dp: differential privacy of the versions. `central`: of a worker; the coordinator adds noise to the sum.
            `distributed`: the same, but the workers add it, all counting the same, and nobody sees a sum without;
            what `quorum` workers add is enough. `record`: of a row; the workers train with noise.
        dp_noise: its standard deviation, in clips: of the sum's, or of a row's gradient.
        dp_budget: the largest ε; the run ends before the round that would pass it.
        dp_delta: the δ that belongs to it.
        dp_population: workers of the federation, each of whom takes part in a central round with probability
            cohort / dp_population; the cohort unless given, so that everybody does.
        dp_adaptive: `clip`, or 0.1, is only the first one; it follows the median of the updates' norms.
        dp_row_clip: the largest norm of a row's gradient.
        settings: what the learner's `train` is given.
    """

    run: Name
    learner: Annotated[str, Field(min_length=1, max_length=4096)]
    rounds: Annotated[int, Field(ge=1, le=10**9)] = 10
    cohort: Annotated[int, Field(ge=1, le=10**6)] = 2
    over_select: Annotated[float, Field(ge=1, le=3)] = 1.0
    quorum: Annotated[int, Field(ge=1, le=10**6)] | None = None
    round_s: Annotated[float, Field(ge=0.1, le=30 * 24 * 3600)] = 600.0
    gather_s: Annotated[float, Field(ge=0, le=24 * 3600)] = 30.0
    schedule: Literal["parallel", "cyclic"] = "parallel"
    workers: tuple[Name, ...] = ()
    rule: str = "mean"
    trim: Annotated[int, Field(ge=1, le=10**6)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    part_bytes: Annotated[int, Field(ge=PART_BYTES_MIN, le=PART_BYTES_MAX, multiple_of=8)] = PART_BYTES
    format: Literal["float32", "bfloat16", "int8", "top-k"] = "float32"
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    down: Literal["full", "bfloat16", "int8"] = "full"
    clip: Annotated[float, Field(ge=0, le=CLIP_MAX)] = 0.0
    examples_max: Annotated[int, Field(ge=1, le=EXAMPLES_MAX)] = EXAMPLES_MAX
    privacy: Literal["none", "secure"] = "none"
    ring_bits: Literal[32, 64] = 32
    min_cohort: Annotated[int, Field(ge=COHORT_MIN, le=COHORT_MAX)] = COHORT_MIN
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 2 / 3
    keep_updates: bool = False
    contract: _DIGEST = ""
    learner_file: _DIGEST = ""
    dp: Literal["none", "central", "distributed", "record"] = "none"
    dp_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    dp_budget: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    dp_delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    dp_population: Annotated[int, Field(ge=1, le=10**6)] | None = None
    dp_adaptive: bool = False
    dp_row_clip: Annotated[float, Field(ge=CLIP_MIN, le=CLIP_MAX)] = 1.0
    settings: Annotated[dict[_KEY, _VALUE], Field(max_length=MAP_MAX)] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_secure()
        if self.least > self.cohort:
            raise ValueError(f"the quorum ({self.quorum}) is above the cohort ({self.cohort}): lower it")
        if self.workers and self.cohort > len(self.workers):
            raise ValueError(f"the cohort ({self.cohort}) is above the {len(self.workers)} listed workers: lower it")
        if self.over_select > 1 and self.schedule == "cyclic":
            raise ValueError(
                f"a cyclic round asks one worker after another, so that more of them (over_select is "
                f"{self.over_select:g}) only take longer: set it to 1"
            )
        if self.over_select > 1 and len(self.workers) == self.cohort:
            raise ValueError(
                f"over_select ({self.over_select:g}) asks more workers than the cohort ({self.cohort}), and the list "
                "of workers names no more: name more, lower the cohort or set over_select to 1"
            )
        if len(set(self.workers)) != len(self.workers):
            raise ValueError("a worker is listed twice: name each once")
        if self.rule not in RULES:
            raise ValueError(f"there is no rule {self.rule!r}: choose one of {', '.join(RULES)}")
        if self.keep is not None and self.format != "top-k":
            raise ValueError(f"keep is for the format top-k, and the format is {self.format}: leave keep out")
        if self.down != "full" and self.schedule == "cyclic":
            raise ValueError(f"a cyclic round has no use for changes (down is {self.down}): set it to full")
        if said := next((sentence for wrong, sentence in (*bent(self), *contradictions(self)) if wrong), ""):
            raise ValueError(said)

    def _check_secure(self) -> None:
        if self.privacy != "secure":
            return
        if self.cohort < self.min_cohort:
            raise ValueError(
                f"the cohort ({self.cohort}) is below min_cohort ({self.min_cohort}): a sum of fewer updates hides "
                "nobody; raise it, or set privacy to none"
            )
        wanted = {"schedule": "parallel", "rule": "mean", "format": "float32", "keep_updates": False}
        for name, value in wanted.items():
            if (found := getattr(self, name)) != value:
                raise ValueError(
                    f"{name} is {found}, which needs the updates of single workers or cannot be masked, and with "
                    f"privacy = secure nobody sees them: set it to {value}, or privacy to none"
                )
        try:
            self.ring  # noqa: B018 (whether it has room)
        except UsageError as problem:
            raise ValueError(str(problem).removesuffix(".")) from None

    @property
    def ring(self) -> Ring:
        """In which masked updates are added up.

        Raises:
            UsageError: there is no clip, or no room for so many workers and examples.
        """
        return ring_of(
            self.ring_bits, clip=self.clip, examples_max=self.counts_most, cohort=self.cohort,
            noise=self.dp_noise if self.dp == "distributed" else 0.0, least=self.least,
        )  # fmt: skip

    @property
    def least(self) -> int:
        """The quorum in force: as given, or two thirds of the cohort, rounded up; not below a secure sum's least."""
        quorum = -(-2 * self.cohort // 3) if self.quorum is None else self.quorum
        return max(quorum, self.min_cohort) if self.privacy == "secure" else quorum

    @property
    def asks(self) -> int:
        """How many workers are asked in a round, if they are here."""
        return math.ceil(round(self.cohort * self.over_select, 6))  # 10 · 1.1 is 11, not the float above it

    @property
    def trims(self) -> int:
        """`trim` in force: as given, or 1; a median of two would leave out nothing, either."""
        return 1 if self.trim is None else self.trim

    @property
    def population(self) -> int:
        """`dp_population` in force: as given, or the cohort."""
        return self.cohort if self.dp_population is None else self.dp_population

    @property
    def rate(self) -> float:
        """The probability with which a worker takes part in a central round."""
        return self.cohort / self.population

    @property
    def counts_most(self) -> int:
        """`examples_max` in force: as given; under noise on the sum all updates count the same."""
        return 1 if self.dp in ON_SUMS else self.examples_max

    @property
    def noise(self) -> Noise | None:
        """What the workers are to add."""
        if self.dp in ("none", "central"):
            return None
        of, clip, least = ("row", self.dp_row_clip, 0) if self.dp == "record" else ("sum", self.clip, self.least)
        return Noise(cast(Any, of), self.dp_noise, clip, self.dp_delta, self.dp_budget, least)

    @property
    def kept(self) -> float:
        """`keep` in force: as given, or 0.01."""
        return KEEP if self.keep is None else self.keep


_ADAPTER = TypeAdapter(Plan)


def make(values: Mapping[str, Any], source: str = "the plan") -> Plan:
    """A checked plan.

    Raises:
        UsageError: a setting that is unknown, of the wrong type, out of bounds, or contradicts another.
    """
    return wording.make(Plan, values, source, say=_said)


def _said(error: ErrorDetails) -> str:
    """What pydantic found wrong first, in our words."""
    place = error["loc"]
    if len(place) > 1 and place[0] == "settings":
        return f"settings.{str(place[1])[:40]} {_SETTING_RULE}"
    return wording.said(error)


def change(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """The plan with some settings changed, checked again."""
    return make({**as_dict(plan), **changes}, "these options")


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; settings that are not given are left out."""
    return {k: v for k, v in _ADAPTER.dump_python(plan).items() if v is not None}


def digest(plan: Plan) -> str:
    """Of all that decides what a round's updates are made of, and who is asked."""
    settled = {key: value for key, value in as_dict(plan).items() if key not in ("rounds", "round_s", "gather_s")}
    return sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        UsageError: no such file, not TOML, or not a plan.
    """
    return make(wording.read(path), str(path))


def to_toml(plan: Plan) -> bytes:
    """The file's bytes."""
    return (HEADER + tomli_w.dumps(as_dict(plan))).encode()
