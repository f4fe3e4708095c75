"""Lines of a run's history: how they are made from a round, and how they are read back as a curve.

Pure. Knows the names in `history.jsonl`; does not know files or the wire. There are four kinds of line, told apart by
`event`: `round` (a version was made), `abandoned` (a try at one failed), `score` (an evaluating worker's judgement of
a version), `final` (the last version, scored by everyone).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, create_model

from broker.fields import NAME
from broker.messages import COUNT_MAX
from coordinator.round import Round

Metrics = Mapping[str, float]
Line = dict[str, Any]
REPORT_BYTES_MAX = 32 * 1024
"""So much of the history may what one worker reports of one task take: as much as 512 metrics with names of 40."""
REASON_MAX = 1000
"""Characters of a reason that are kept."""
_Count = Annotated[int, Field(ge=0, le=COUNT_MAX)]
_Numbers, _Reasons = dict[str, float], dict[str, str]
_STRICT = ConfigDict(strict=True)
_OTHER: Any = create_model(
    "_OTHER", __config__=_STRICT, worker=(str, ...), verdict=(str, ...), reason=(str, ...), times=(_Count, 1)
)
_STRUCK: Any = create_model("_STRUCK", __config__=_STRICT, times=(_Count, ...), why=(str, ...))
_RESTED: Any = create_model("_RESTED", __config__=_STRICT, rounds=(_Count, ...), why=(str, ...))
_KINDS: dict[str, Any] = {
    "event": str, "round": _Count, "attempt": _Count, "version": _Count, "why": str, "cohort": list[str],
    "counted": dict[str, Line], "refused": _Reasons, "failed": _Reasons, "declined": _Reasons,
    "metrics": _Numbers, "scored": _Numbers,
    "others": list[_OTHER], "struck": dict[str, _STRUCK], "rested": dict[str, _RESTED],
    "worker": str, "seconds": float, "bytes_down": float, "bytes_up": float,
    "privacy": dict[str, float], "weights": str, "start": str, "updates": _Reasons,
}  # fmt: skip
_FIELDS: dict[str, Any] = {name: (kind, None) for name, kind in _KINDS.items()}
_LINE = create_model("_LINE", __config__=_STRICT, **_FIELDS)


@dataclass(slots=True)
class Facts:
    """What the service learns in the course of one round, besides the round's own state."""

    trained: dict[str, Metrics] = field(default_factory=dict)
    scored: dict[str, Metrics] = field(default_factory=dict)
    others: list[Line] = field(default_factory=list)
    rested: dict[str, Line] = field(default_factory=dict)
    secure: Line = field(default_factory=dict)
    struck: dict[str, Line] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    within: list[str] = field(default_factory=list)
    privacy: Line = field(default_factory=dict)
    _noted: dict[tuple[str, str, str], Line] = field(default_factory=dict)

    def count(self, worker: str, metrics: Metrics, *, within: bool) -> None:
        """An update is in the sum; `within`: it was no longer than the clip before it was cut."""
        self.trained[worker] = metrics
        self.within += [worker] * within

    def note_other(self, worker: str, verdict: str, reason: str, *, most: int) -> None:
        """An update was not counted; what happens again is tallied, and a flood does not fill the disk."""
        if line := self._noted.get((worker, verdict, reason)):
            line["times"] = line.get("times", 1) + 1
        elif len(self.others) < most:
            line = {"worker": worker, "verdict": verdict, "reason": reason}
            self._noted[worker, verdict, reason] = line
            self.others.append(line)

    def strike(self, worker: str, why: str) -> None:
        """A worker has sent what is not merely late or lost, but a lie."""
        self.struck[worker] = {"times": self.struck.get(worker, {"times": 0})["times"] + 1, "why": why}


def is_line(found: object) -> bool:
    """Whether what stands in a file that anybody may have written has, where it is a line's, a line's types."""
    try:
        _LINE.model_validate(found)
    except ValidationError:
        return False
    return True


def size_of(said: Mapping[str, Any]) -> int:
    """How many bytes of the history it takes."""
    return len(json.dumps(said))


def overlong(metrics: Metrics) -> str:
    """Why a worker's metrics are not kept; empty if they are."""
    size = size_of(metrics)
    said = f"its {len(metrics)} metrics would take {size} bytes of the history, over the limit of {REPORT_BYTES_MAX}"
    return f"{said}: report fewer, or under shorter names" if size > REPORT_BYTES_MAX else ""


def mean_metrics(weighted: Iterable[tuple[float, Metrics]]) -> dict[str, float]:
    """Each metric's mean, weighted; a metric counts only where it was given. `examples` is summed instead.

    A metric whose sum is beyond all numbers, as one worker can make it, is left out.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for weight, metrics in weighted:
        for name, value in metrics.items():
            if name == "examples":
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = 1.0
            else:
                sums[name] = sums.get(name, 0.0) + weight * value
                weights[name] = weights.get(name, 0.0) + weight
    means = {name: sums[name] / weights[name] for name in sums if weights[name] > 0}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def scores(scored: Mapping[str, Metrics]) -> dict[str, float]:
    """The mean of several workers' scores, weighted by the examples that each was judged on (1 if it did not say)."""
    return mean_metrics((max(metrics.get("examples", 1.0), 0.0), metrics) for metrics in scored.values())


def round_line(done: Round, facts: Facts, *, why: str, seconds: float, at: float) -> Line:
    """The line of a round that made a version. `at` is in seconds since 1970, `seconds` how long the round took."""
    line = {
        "event": "round",
        "round": done.of.round,
        "attempt": done.of.attempt,
        "version": done.of.round,
        "at": round(at, 3),
        "why": why,
        "cohort": list(done.cohort),
        "counted": {
            worker: {"examples": n, "metrics": dict(facts.trained.get(worker, {}))}
            for worker, n in sorted(done.counted.items())
        },
        "refused": dict(sorted(done.refused.items())),
        "failed": {worker: why for worker, why in done.fared.items() if why},
        "declined": dict(sorted(done.declined.items())),
        "others": facts.others,
        "struck": facts.struck,
        "rested": facts.rested,
        "metrics": mean_metrics((n, facts.trained.get(worker, {})) for worker, n in sorted(done.counted.items())),
        "scored": scores({w: facts.scored[w] for w in sorted(facts.scored) if w in done.members}),
        "seconds": round(seconds, 3),
        "bytes_down": facts.bytes_down,
        "bytes_up": facts.bytes_up,
        **({"privacy": facts.privacy} if facts.privacy else {}),
    }
    if facts.secure:  # metrics came inside the sum, as means
        line |= {"secure": facts.secure, **{key: facts.secure[key] for key in ("metrics", "scored")}}
    return line


def abandoned_line(given_up: Round, facts: Facts, *, why: str, seconds: float, at: float) -> Line:
    """The line of a round that made no version."""
    line = round_line(given_up, facts, why=why, seconds=seconds, at=at)
    return {**{key: value for key, value in line.items() if key != "version"}, "event": "abandoned"}


def rounds(lines: Iterable[Line]) -> dict[int, Line]:
    """The line of each version: the last one, should it have been made anew. What is no round's line is left out."""
    return {line["version"]: line for line in lines if line.get("event") == "round" and _tells_its_round(line)}


def _tells_its_round(line: Line) -> bool:
    """Whether a line that anybody may have written (`is_line`) has what is needed to make the version again."""
    return {"version", "round", "attempt", "cohort", "counted", "weights"} <= line.keys() and all(
        NAME.fullmatch(worker) and worker in line["cohort"] and "examples" in told
        for worker, told in line["counted"].items()
    )


def checksum_of(made: Mapping[int, Line], version: int) -> str | None:
    """The checksum that `rounds` have of a version's bytes; None if they have none."""
    return made[version]["weights"] if version in made else made.get(version + 1, {}).get("start")


def score_line(version: int, worker: str, metrics: Metrics, *, at: float) -> Line:
    """An evaluating worker's judgement of a version."""
    return {"event": "score", "version": version, "worker": worker, "metrics": dict(metrics), "at": round(at, 3)}


def final_line(version: int, scored: Mapping[str, Metrics], *, seconds: float, at: float) -> Line:
    """The last version as the training workers see it."""
    workers = sorted(scored)
    return {
        "event": "final",
        "version": version,
        "scored": scores({worker: scored[worker] for worker in workers}),
        "workers": workers,
        "seconds": round(seconds, 3),
        "at": round(at, 3),
    }


def spent(lines: Iterable[Line]) -> Iterator[str]:
    """What of the run's privacy has been spent, if it was, in a sentence."""
    said = ""
    for line in lines:
        if found := line.get("privacy"):
            said = f"epsilon {found.get('epsilon', 0):.4g} of a worker, delta {found.get('delta', 0):g}"
        elif line.get("event") == "round":
            rows = [told.get("metrics") for told in line.get("counted", {}).values()]
            found = [each.get("epsilon") for each in rows if isinstance(each, dict)]
            most = max((each for each in found if isinstance(each, float)), default=None)
            said = said if most is None else f"epsilon {most:.4g} of a row, at the most"
    if said:
        yield f"privacy spent: {said}"


def last_abandoned(lines: Iterable[Line]) -> Line | None:
    """The last try at a version that was given up, unless that version has been made since."""
    ends = [line for line in lines if line.get("event") in ("round", "abandoned")]
    return ends[-1] if ends and ends[-1]["event"] == "abandoned" else None


@dataclass(frozen=True, slots=True)
class Point:
    """What is known of one version: means over the training workers, and each evaluating worker's scores."""

    version: int
    scored: Metrics
    held_out: Mapping[str, Metrics]


def curve(lines: Iterable[Line]) -> list[Point]:
    """What became of every version that was made or scored, in order.

    The round that makes version n + 1 begins with scores of version n.
    """
    scored: dict[int, Metrics] = {}
    held_out: dict[int, dict[str, Metrics]] = {}
    for line in lines:
        event = line.get("event")
        number, made = line.get("version", 0), line.get("scored", {})
        if event == "round":
            scored[number - 1] = made
            held_out.setdefault(number, {})
        elif event == "final":
            scored[number] = made
        elif event == "score":
            held_out.setdefault(number, {})[line.get("worker", "")] = line.get("metrics", {})
    return [Point(n, scored.get(n, {}), held_out.get(n, {})) for n in sorted(scored | held_out)]
