"""What two learners must have in common to take part in the same run.

Knows the fingerprint of a model's tensors, and the sentence on what differs. Does not know the learner's code, nor
how its file is found.
"""

import json
from dataclasses import dataclass
from hashlib import sha256

from broker.messages import PROTOCOL, Task
from broker.tensors import Layout


@dataclass(frozen=True, slots=True)
class Contract:
    """One learner's: the fingerprint of its tensors, and its file's SHA-256 in hex; empty where there is none."""

    tensors: str = ""
    file: str = ""

    def breach(self, task: Task, mine: Layout, theirs: Layout) -> str:
        """In what this worker's learner is another than the run's, a sentence; empty if it is the same.

        Args:
            task: what the run's plan says.
            mine: this learner's tensors, as they would travel.
            theirs: those that travel.
        """
        differs = theirs.difference(mine)
        if task.contract not in ("", self.tensors):
            differs = differs or "the tensors are the same, so the run was made for others or by another fluffle"
            contracts = f"its contract is {self.tensors[:16]}…, the run's is {task.contract[:16]}…"
            return f"this worker's learner is another than the run's: {contracts}: {differs}."
        if differs:
            return f"this worker's learner has other tensors than the version: {differs}."
        return other_file(self.file, task.learner_file)


def fingerprint(layout: Layout) -> str:
    """Of a model's tensors: hex SHA-256 of the protocol's version and their names, dtypes and shapes, in order."""
    told = [PROTOCOL, [[spec.name, spec.dtype, spec.shape] for spec in layout.specs]]
    return sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()


def other_file(mine: str, pinned: str) -> str:
    """In what a learner's file is another than the one that the run's plan has pinned; empty if it is that one."""
    if pinned in ("", mine):
        return ""
    return f"this worker's learner is another than the run's: its file has the SHA-256 {mine or '-'}, not {pinned}."
