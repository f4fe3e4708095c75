"""What a worker has spent of its data's privacy, in all runs, in a file beside its models: `NAME.privacy`.

Knows that file and the bounds: the plan's for its run, and the data owner's for all runs together. Does not know how
noise is made (`privacy.py`), nor what else becomes of an update.

Spent before it is released: what an update costs is on the disk before its first byte is sent. An update that is
never counted has cost as much as any, and so has one that had to be trained again: it may have been seen. A masked
one is paid whenever its words are about to leave, for each sum that it is asked for: others can reveal one without
this worker's help, and a coordinator that lies may have had that done before it begins another.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

from broker.accountant import SPENT, Released, epsilon, of_sum, together
from broker.errors import LearnerFailed, UsageError
from broker.files import UNREADABLE, read_record, trouble, write_whole
from broker.messages import Noise, Task
from broker.ring import Form
from broker.tensors import Layout
from workers.owner import Owner
from workers.secrecy import ring_for
from workers.work import Done


class Spending:
    """One worker's.

    Args:
        folder: where its files are; they outlive the process.
        worker: its name.
        owner: of the data, who says how large ε may be over all runs, and in whose ledger it is written.
    """

    def __init__(self, folder: Path, worker: str, owner: Owner) -> None:
        self._path = folder / f"{worker}.privacy"
        self._owner = owner
        self._last: dict[str, list[Released]] = {}
        self._alone = Lock()

    def check(self, task: Task, model: Layout) -> None:
        """Whether a task can be paid: one that is masked, or another like the run's last one.

        Raises:
            LearnerFailed: it cannot.
        """
        assert task.noise is not None
        run, masked = task.of.run, task.noise.of == "sum"
        what = [_cost(task, Form(ring_for(task), model))] if masked else self._last.get(run, [])
        self._after(run, task.noise, what)

    def pay(self, task: Task, done: Done) -> Done:
        """Pay for what came of a private task, and put it into the ledger; the update then tells its ε, no more.

        One that is to be masked is not paid yet, and tells nothing.

        Raises:
            LearnerFailed: as for `spend`.
        """
        assert task.noise is not None
        masked = task.noise.of == "sum"
        return replace(done, metrics={} if masked else {"epsilon": self._pay(task, done.released)})

    def share(self, task: Task, form: Form) -> None:
        """Pay for a part in a masked sum with noise, and put it into the ledger.

        Raises:
            LearnerFailed: as for `spend`.
        """
        self._pay(task, [_cost(task, form)])

    def told(self, task: Task, problem: Exception) -> str:
        """What may be told of a task's failure, which is paid for first if the task had taken steps with noise."""
        try:
            if released := getattr(problem, "released", ()):
                self._pay(task, released)
        except LearnerFailed as spent:
            return str(spent)
        return str(problem)

    def _pay(self, task: Task, released: Sequence[Sequence[float]]) -> float:
        assert task.noise is not None
        spent = self.spend(task.of.run, task.noise, released)
        self._owner.note("spent", task.of, epsilon=spent, delta=task.noise.delta)
        return spent

    def spend(self, run: str, noise: Noise, released: Sequence[Sequence[float]]) -> float:
        """Pay for an update; the run's ε with it. When this returns it survives a power failure.

        Args:
            run: whose task it is.
            noise: what the task asks for.
            released: of each kind of step: noise, rate, how often, and whether noise is discrete, if it is.

        Raises:
            LearnerFailed: there is not enough left, or the file cannot be read or written.
        """
        what = [Released(noise_, rate, int(times), *map(bool, of)) for noise_, rate, times, *of in released]
        self._last[run] = what
        with self._alone:
            spent, found = self._after(run, noise, what)
            with trouble(f"what an update costs cannot be noted in {self._path}", "make room", error=LearnerFailed):
                write_whole(self._path, json.dumps(spent).encode(), mode=0o600)
        return found

    def _after(self, run: str, noise: Noise, what: Sequence[Released]) -> tuple[dict[str, list[Released]], float]:
        spent = self._read()
        spent[run] = together([*spent.get(run, []), *what])
        try:
            here = epsilon(spent[run], noise.delta)
            in_all = epsilon([each for kinds in spent.values() for each in kinds], noise.delta)
        except UsageError as problem:
            raise LearnerFailed(str(problem)) from None
        allowed = self._owner.policy.epsilon_max
        for found, most, whose in ((here, noise.budget, "the plan"), (in_all, allowed, "the owner of the data")):
            if found > most:
                raise LearnerFailed(f"{SPENT}: epsilon would be {found:.4g}, and {whose} allows {most:g}.")
        return spent, here

    def _read(self) -> dict[str, list[Released]]:
        what = f"{self._path} does not tell what was spent of this data's privacy"
        with trouble(what, "restore it", error=LearnerFailed, of=UNREADABLE):
            return {run: [Released(*each) for each in kinds] for run, kinds in read_record(self._path).items()}


def _cost(task: Task, form: Form) -> Released:
    assert task.noise is not None
    return of_sum(form.ring.grain, replace(task.noise, clip=task.clip), form.floats)
