"""What a worker has spent of its data's privacy, in all runs, in a file beside its models: `NAME.privacy`.

Knows that file and the bounds: the plan's for its run, and the data owner's for all runs together. Does not know how
noise is made (`privacy.py`), nor what else becomes of an update.

Spent before it is released: what an update costs is on the disk before its first byte is sent. An update that is
never counted has cost as much as any, and so has one that had to be trained again: it may have been seen. A masked
one is paid whenever its words are about to leave, for each sum that it is asked for: others can reveal one without
this worker's help, and a coordinator that lies may have had that done before it begins another.

Steps with noise on rows are put down by the training process before anything is seen of them, in `NAME.steps`: when
and how a training ends tells of them, too, and whoever dies cannot. That file has those of one training, which are
paid for when it ends; what an earlier process left, or a training that was given up, is counted before anything else.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from threading import Lock

from broker.accountant import SPENT, Released, epsilon, of_sum, together
from broker.errors import LearnerFailed, UsageError
from broker.files import UNREADABLE, read_record, trouble, write_whole
from broker.messages import Attempt, Noise, Task
from broker.ring import Form
from broker.tensors import Layout
from workers.owner import Owner
from workers.secrecy import ring_for
from workers.work import Done, Work

Spent = dict[str, list[Released]]


class Spending:
    """One worker's.

    Args:
        folder: where its files are; they outlive the process.
        worker: its name.
        owner: of the data, who says how large ε may be over all runs, and in whose ledger it is written.
    """

    def __init__(self, folder: Path, worker: str, owner: Owner) -> None:
        self._path, self._steps = folder / f"{worker}.privacy", folder / f"{worker}.steps"
        self._owner = owner
        self._last: dict[str, list[Released]] = {}
        self._alone = Lock()
        with suppress(LearnerFailed):  # it is said when a task is to be paid
            self._recover()

    def begin(self, task: Task, model: Layout, work: Work) -> Work:
        """A task is about to be done, if it can be paid: one that is masked, or another like the run's last one.

        Returns:
            The work, and where its steps with noise are put down.

        Raises:
            LearnerFailed: it cannot be paid.
        """
        assert task.noise is not None
        self._recover()
        run, masked = task.of.run, task.noise.of == "sum"
        what = [_cost(task, Form(ring_for(task), model))] if masked else self._last.get(run, [])
        self._after(run, task.noise, what)
        return replace(work, steps=(str(self._steps), *astuple(task.of)))

    def pay(self, task: Task, done: Done) -> Done:
        """Pay for what came of a private task, and put it into the ledger; the update then tells its ε, no more.

        One that is to be masked is not paid yet, and tells nothing.

        Raises:
            LearnerFailed: as for `spend`, or it is not known what it costs.
        """
        assert task.noise is not None
        if task.noise.of == "sum":
            return replace(done, metrics={})
        if (spent := self._pay_steps(task)) is None:
            raise LearnerFailed(f"{self._steps} does not tell of this update's steps with noise: it stays here.")
        return replace(done, metrics={"epsilon": spent})

    def share(self, task: Task, form: Form) -> None:
        """Pay for a part in a masked sum with noise, and put it into the ledger.

        Raises:
            LearnerFailed: as for `spend`.
        """
        self._pay(task, [_cost(task, form)])

    def told(self, task: Task, problem: Exception) -> str:
        """What may be told of a task's end, which is paid for first if the task had taken steps with noise."""
        try:
            self._pay_steps(task)
        except LearnerFailed as spent:
            return str(spent)
        return str(problem)

    def _pay(self, task: Task, released: Sequence[Released]) -> float:
        assert task.noise is not None
        spent = self.spend(task.of.run, task.noise, released)
        self._owner.note("spent", task.of, epsilon=spent, delta=task.noise.delta)
        return spent

    def _pay_steps(self, task: Task) -> float | None:
        """ε with a task's steps, if it has taken any. If they cannot be paid, no more than that is told of it."""
        of, taken = self._taken()
        if of != task.of or not taken:
            return None
        try:
            return self._pay(task, taken)
        finally:
            self._steps.unlink(missing_ok=True)

    def _taken(self) -> tuple[Attempt, list[Released]]:
        """Whose steps with noise are put down, and which; of a file that is empty or not there, none."""
        what, remedy = f"{self._steps} does not tell which steps with noise were taken", f"count them in {self._path}"
        with trouble(what, f"{remedy}, and remove it", error=LearnerFailed, of=UNREADABLE):
            said = self._steps.read_bytes() if self._steps.exists() else b""
            run, number, attempt, taken = json.loads(said or '["", 0, 0, []]')
            return Attempt(run, number, attempt), [Released(*each) for each in taken]

    def _recover(self) -> None:
        """Count the steps of a training whose end nobody has heard of, whatever is allowed."""
        of, taken = self._taken()
        if taken:
            self.spend(of.run, None, taken)
            why = "its training was given up, or ended with this worker"
            self._owner.note("spent", of, steps=sum(each.times for each in taken), why=why)
        self._steps.unlink(missing_ok=True)

    def spend(self, run: str, noise: Noise | None, released: Sequence[Released]) -> float:
        """Pay for an update; the run's ε with it. When this returns it survives a power failure.

        Args:
            run: whose task it is.
            noise: what the task asks for; None to pay whatever is allowed.
            released: what was.

        Raises:
            LearnerFailed: there is not enough left, or the file cannot be read or written.
        """
        self._last[run] = [*released]
        with self._alone:
            spent, found = self._after(run, noise, released)
            with trouble(f"what an update costs cannot be noted in {self._path}", "make room", error=LearnerFailed):
                write_whole(self._path, json.dumps(spent).encode(), mode=0o600)
        return found

    def _after(self, run: str, noise: Noise | None, what: Sequence[Released]) -> tuple[Spent, float]:
        spent = self._read()
        spent[run] = together([*spent.get(run, []), *what])
        if noise is None:
            return spent, math.inf
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

    def _read(self) -> Spent:
        what = f"{self._path} does not tell what was spent of this data's privacy"
        with trouble(what, "restore it", error=LearnerFailed, of=UNREADABLE):
            return {run: [Released(*each) for each in kinds] for run, kinds in read_record(self._path).items()}


def _cost(task: Task, form: Form) -> Released:
    assert task.noise is not None
    return of_sum(form.ring.grain, replace(task.noise, clip=task.clip), form.floats)
