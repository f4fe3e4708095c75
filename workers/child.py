"""The training process: forked by `guard.py`, for the daemon's `training.py`.

Knows the other end of the socket it inherited: requests and answers are maps of msgpack, one answer a request. Large
models never go through the socket: they lie in files that both processes map. Does not know the broker, rounds or
what becomes of an answer.

It holds the user's data for as long as it lives and must never outlive the guard: the kernel kills it when the guard
dies, and, where the kernel cannot, the daemon's closed socket does. What the user's code prints goes to stderr.
"""

import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from broker.contract import fingerprint, other_file
from broker.errors import FluffleError, LearnerFailed, OutOfMemory, UsageError, WireError
from broker.files import opened, trouble
from broker.formats import FORMATS, count_floats, format_of
from broker.norms import clip
from broker.tensors import Layout
from workers import learner, task, weights
from workers.work import CLOSED, MEANT_FOR_DAEMON, Outcome, Work, bytes_of, layout_of, told

log = logging.getLogger(__name__)

DICE_OF_FORMATS = 1  # so that rounding does not follow the learner's dice

Answer = dict[str, Any]


def serve(link: socket.socket) -> None:
    """Answer requests until the other side closes the socket, and end the process then."""
    me = os.getpid()
    _mind_no_signals()
    np.random.seed()  # noqa: NPY002 (numpy's global dice, which a fork has inherited as they were)
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    pupil, requests = Pupil(), msgpack.Unpacker(link.makefile("rb", buffering=0))
    while True:
        request = _receive(requests)
        try:
            answer = getattr(pupil, f"on_{request['do']}")(request)
        except FluffleError as problem:
            kind = "usage" if isinstance(problem, UsageError) else "learner"
            answer = {"failed": kind, "text": str(problem), "spent": isinstance(problem, OutOfMemory)}
        except BaseException as problem:  # noqa: BLE001 (the user's code runs here; whatever it does is an answer)
            answer = {"failed": "learner", "text": f"the training process failed: {learner.told(problem)}"}
        if os.getpid() != me:
            os._exit(0)  # a copy of this process that the learner has made and let return: it has no say
        _send(link, {**answer, "ready_s": pupil.ready_s})


def _mind_no_signals() -> None:
    """Go on when all of us are told to end, which means the daemon; what the learner starts can still be told to."""
    for number in MEANT_FOR_DAEMON:
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited, by other programs, too
    wait = partial(signal.pthread_sigmask, signal.SIG_BLOCK, MEANT_FOR_DAEMON)
    listen = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, MEANT_FOR_DAEMON)
    os.register_at_fork(before=wait, after_in_parent=listen, after_in_child=_mind_signals)


def _mind_signals() -> None:
    """In a copy of this process; none is lost that has come meanwhile."""
    for number in MEANT_FOR_DAEMON:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_DAEMON)


def _end_with(link: socket.socket) -> None:
    """End when the socket is closed, also in the midst of training; a thread of its own waits for that."""
    closing = select.poll()
    closing.register(link, 0)
    closing.poll()
    os._exit(0)


def _receive(requests: Iterator[dict[str, Any]]) -> dict[str, Any]:
    try:
        return next(requests)
    except StopIteration:
        os._exit(0)
    except OSError:
        os._exit(CLOSED)


def _send(link: socket.socket, answer: Answer) -> None:
    with suppress(Exception):  # the learner may have closed or replaced it
        sys.stdout.flush()
    try:
        link.sendall(bytes_of(answer))
    except BrokenPipeError:
        os._exit(0)
    except OSError:
        os._exit(CLOSED)


class Pupil:
    """The learner with one model, and the data of everyone who has trained here; each `on_` answers a request.

    Attributes:
        ready_s: how long it has taken to load the learner, and the data so far.
    """

    def __init__(self) -> None:
        self.ready_s = 0.0
        self._place: task.Place | None = None
        self._data: dict[str, Any] = {}
        self._files: dict[str, mmap.mmap] = {}
        self._unpacked = bytearray()

    def on_ping(self, _request: dict[str, Any]) -> Answer:
        """Be there."""
        return {}

    def on_open(self, request: dict[str, Any]) -> Answer:
        """Load the learner, and say which tensors its model has."""
        began = time.monotonic()
        torch.set_num_threads(request["threads"])  # sums depend on how they are shared out: never on the cores here
        found = learner.load(request["learner"])
        self._renew(found)
        self.ready_s += time.monotonic() - began
        return {"specs": told(self.place.layout), "contract": fingerprint(self.place.layout), "file": found.file}

    @property
    def place(self) -> task.Place:
        """The learner and its model, beside nobody's data."""
        assert self._place is not None
        return self._place

    def on_load(self, request: dict[str, Any]) -> Answer:
        """Load the data of a source, unless it is here."""
        self._beside(request["source"])
        return {}

    def on_draw(self, request: dict[str, Any]) -> Answer:
        """Draw the weights of a fresh model."""
        model = task.new_model(self.place.learner, seed=request["seed"])
        layout = weights.layout_of(model)
        if layout == self.place.layout:
            weights.read(model, layout, into=self._room(request["weights"]))
        return {"specs": told(layout)}

    def on_task(self, request: dict[str, Any]) -> Answer:
        """Do one task."""
        began = time.monotonic()
        place, work = self._beside(request["source"]), Work(**request["work"])
        if another := other_file(place.learner.file, work.learner_file):
            raise LearnerFailed(another)  # it was changed after the daemon had looked
        layout = self.place.layout if request["specs"] is None else layout_of(request["specs"])
        received, room = self._room(request["weights"]), self._room(request["delta"]) if work.train else None
        try:
            into = room if work.format == "float32" else self._scratch(layout)
            done = task.do(place, work, layout=layout, received=received, into=into)
        except FluffleError:
            self._mend()
            raise
        within = done.delta is None or _pack(layout, done, work, room=room, residual=request["residual"])
        return {
            "examples": done.examples, "metrics": done.metrics, "scores": done.scores,
            "seconds": time.monotonic() - began, "within": within,
        }  # fmt: skip

    def _scratch(self, layout: Layout) -> bytearray:
        """Memory for a delta that is going to be packed, always the same."""
        if len(self._unpacked) != layout.size_bytes:
            self._unpacked = bytearray(layout.size_bytes)
        return self._unpacked

    def _renew(self, found: learner.Learner) -> None:
        model = task.new_model(found)
        self._place = task.Place(found, model, None, weights.layout_of(model))

    def _mend(self) -> None:
        """What a failed task has done to the model's tensors must not fail the next one, which may be another's."""
        with suppress(UsageError):
            if weights.layout_of(self.place.model) == self.place.layout:
                return
        self._renew(self.place.learner)

    def _beside(self, source: str) -> task.Place:
        """The learner beside the data of a source, which is loaded once."""
        if source not in self._data:
            began = time.monotonic()
            self._data[source] = task.load_data(self.place.learner, source)
            self.ready_s += time.monotonic() - began
        return task.Place(self.place.learner, self.place.model, self._data[source], self.place.layout)

    def _room(self, where: dict[str, Any]) -> memoryview:
        """The bytes that a request speaks of."""
        if where["file"] not in self._files:  # which is there as long as the daemon wants it, and so are its pages
            self._files = {name: mapped for name, mapped in self._files.items() if Path(name).exists()}
            with Path(where["file"]).open("r+b") as file:
                self._files[where["file"]] = mmap.mmap(file.fileno(), 0)
        return memoryview(self._files[where["file"]])[where["at"] : where["at"] + where["size"]]


@np.errstate(all="ignore")  # a learner may have told numpy to raise where numbers vanish, as small ones do in formats
def _pack(
    layout: Layout, done: Outcome, work: Work, *, room: memoryview | None, residual: tuple[str, str] | None
) -> bool:
    """Cut the update to its clip, and write it as its format has it; what that leaves out is added to what is owed.

    Returns:
        Whether it was within the clip before.

    Raises:
        LearnerFailed: the format cannot carry it, or there is no room for what it leaves out.
    """
    delta = memoryview(done.delta or b"")
    within = not work.clip or clip(FORMATS["float32"], layout, delta, work.clip) <= work.clip
    if work.format == "float32":
        return within
    fmt, dice = format_of(work.format, keep=work.keep), np.random.default_rng([work.seed, DICE_OF_FORMATS])
    what = f"what the format {work.format} leaves out of an update cannot be kept"
    remedy = "make room on this worker's disk, or choose another folder with --state"
    try:
        with trouble(what, remedy, error=LearnerFailed):
            owed = None if residual is None else _read_floats(Path(residual[0]), count_floats(layout))
            packed = fmt.pack(layout, delta, residual=owed, dice=dice, into=room)
            if work.clip:
                clip(fmt, layout, packed, work.clip)
            if residual is not None and owed is not None:
                with opened(Path(residual[1]), "wb", 0o600) as left:
                    owed.tofile(left)
                    left.write(xxh3_64_digest(owed.data))
    except WireError as problem:
        raise LearnerFailed(str(problem)) from None
    return within


def _read_floats(file: Path, count: int) -> NDArray[np.float32]:
    """What is owed; nothing if that was never written, not by a worker with this model, or is damaged."""
    found = np.fromfile(file, np.uint8) if file.exists() else np.zeros(0, np.uint8)
    floats, check = found[: 4 * count], found[4 * count :].tobytes()
    if check == xxh3_64_digest(floats.data):
        return floats.view(np.float32)
    if len(found):
        log.warning("%s is damaged, or of another model: what earlier updates left out is lost", file)
    return np.zeros(count, np.float32)


if __name__ == "__main__":  # where a guard cannot fork
    serve(socket.socket(fileno=int(sys.argv[1])))
