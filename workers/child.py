"""The training process: `python -m workers.child SOCKET PARENT`, started by `training.py` and by nothing else.

Knows the other end of the socket it inherited: requests and answers are maps of msgpack behind four bytes of length,
one answer a request. Weights never go through the socket: they lie in files that both processes map. Does not know
the broker, rounds or what becomes of an answer.

It holds the user's data for as long as it lives and must never outlive its parent: the kernel kills it when the
parent dies, and, where the kernel cannot, the closed socket does. What the user's code prints goes to stderr.
"""

import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import torch

from broker.daemon import die_with
from broker.errors import FluffleError, UsageError
from broker.tensors import Layout, TensorSpec
from workers import learner, task, weights
from workers.work import Work

LENGTH_BYTES = 4


def main() -> None:
    """Serve requests until the parent closes the socket."""
    die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the daemon, which tells us what to do
    print_to_stderr()
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, requests), daemon=True).start()
    place: task.Place | None = None
    while True:
        request = requests.get()
        try:
            if request["do"] == "open":
                place, answer = _open(request)
            else:
                assert place is not None
                answer = {"initial": _initial, "task": _task}[request["do"]](place, request)
        except FluffleError as problem:
            answer = {"failed": "usage" if isinstance(problem, UsageError) else "learner", "text": str(problem)}
        except BaseException as problem:  # noqa: BLE001 (the user's code runs here; whatever it does is an answer)
            answer = {"failed": "learner", "text": f"the training process failed: {learner.told(problem)}"}
        _send(link, answer)


def print_to_stderr() -> int:
    """Send what this process prints to stderr; what was stdout is returned as a file descriptor of its own."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _listen(link: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queue what is asked; a thread of its own, so that a closed socket ends the process in the midst of training."""
    try:
        while True:
            length = int.from_bytes(_exactly(link, LENGTH_BYTES), "big")
            requests.put(msgpack.unpackb(_exactly(link, length)))
    except (EOFError, OSError):
        os._exit(0)


def _exactly(link: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = link.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _send(link: socket.socket, answer: dict[str, Any]) -> None:
    sys.stdout.flush()
    packed = msgpack.packb(answer)
    link.sendall(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)


def _open(request: dict[str, Any]) -> tuple[task.Place, dict[str, Any]]:
    began = time.monotonic()
    torch.set_num_threads(request["threads"])  # sums depend on how they are shared out: never on this machine's cores
    place = task.set_up(learner.load(request["learner"]), request["source"])
    return place, {"specs": _told_specs(place.layout), "seconds": time.monotonic() - began}


def _initial(place: task.Place, request: dict[str, Any]) -> dict[str, Any]:
    model = task.new_model(place.learner, seed=request["seed"])
    layout = weights.layout_of(model)
    Path(request["weights_file"]).write_bytes(weights.read(model, layout))
    return {"specs": _told_specs(layout)}


def _task(place: task.Place, request: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    layout = Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in request["specs"]))
    received = _mapped(Path(request["weights_file"]))
    outcome = task.do(place, Work(**request["work"]), layout=layout, received=received)
    if outcome.delta is not None:
        Path(request["delta_file"]).write_bytes(outcome.delta)
    return {
        "examples": outcome.examples, "metrics": outcome.metrics, "scores": outcome.scores,
        "delta": outcome.delta is not None, "seconds": time.monotonic() - began,
    }  # fmt: skip


def _mapped(path: Path) -> weights.Raw:
    """The file's bytes, read when they are looked at; writes stay ours (torch looks at no read-only memory)."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _told_specs(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(spec.name, spec.dtype, spec.shape) for spec in layout.specs]


if __name__ == "__main__":
    main()
