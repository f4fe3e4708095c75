# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
# (flwr lives in a virtual environment of its own, where no type checker sees it)
"""The same round in today's Flower, as a ServerApp and a ClientApp that adds one to what it gets.

`flwr run` takes both from here for a deployment; `flower_apps.py WORKERS PARAMETERS ROUNDS OUT` runs them in Flower's
simulation on Ray. Run by a Python that has flwr 1.41; knows nothing of Fluffle.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

worker = ClientApp()
server = ServerApp()


@worker.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001 (Flower's signature)
    arrays = [array + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    asked = context.run_config
    make_rounds(grid, (asked["workers"], asked["parameters"], asked["rounds"]), Path(asked["out"]))


def make_rounds(grid, sizes, out):
    """Make them all and write to `out` when each ended; the first moment is that before the first round."""
    workers, parameters, rounds = sizes
    at, last = [], []

    def ended(_, arrays):
        at.append(time.time())
        last[:] = [arrays]

    everyone = {"fraction_train": 1.0, "min_train_nodes": workers, "min_available_nodes": workers}
    weights = ArrayRecord([np.zeros(parameters, np.float32)])
    FedAvg(**everyone, fraction_evaluate=0.0).start(grid, weights, num_rounds=rounds, evaluate_fn=ended)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    (made,) = last[0].to_numpy_ndarrays()
    values = [float(made.min()), float(made.max())]
    part = out.with_suffix(".part")
    part.write_text(json.dumps({"at": at[1:], "peak_bytes": int(peak[1]) * 1024, "values": values}))
    part.rename(out)


def simulate(sizes, out):
    from flwr.simulation import run_simulation

    here = ServerApp()
    here.main()(lambda grid, context: make_rounds(grid, sizes, out))  # noqa: ARG005 (Flower's signature)
    resources = {
        "init_args": {"_node_ip_address": "127.0.0.1", "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
    }
    run_simulation(here, worker, num_supernodes=sizes[0], backend_config=resources)


if __name__ == "__main__":
    simulate(tuple(map(int, sys.argv[1:4])), Path(sys.argv[4]))
