# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
# (flwr lives in a virtual environment of its own, where no type checker sees it)
"""The same round in Flower 1.13: FedAvg on the server, clients that add one to what they get, gRPC between.

`flower_grpc.py server|client ADDRESS WORKERS PARAMETERS ROUNDS`. Run by a Python that has flwr 1.13; knows nothing of
Fluffle.
"""

import json
import re
import sys
import time
from pathlib import Path

import flwr
import numpy as np
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

MESSAGE_MAX = 2**31 - 1


class Adds(flwr.client.NumPyClient):
    def fit(self, arrays, config):  # noqa: ARG002 (Flower's signature)
        return [array + 1 for array in arrays], 1, {}


class Timed(flwr.server.strategy.FedAvg):
    """FedAvg that notes when each round's updates are averaged, and keeps what they came to."""

    def aggregate_fit(self, server_round, results, failures):
        made = super().aggregate_fit(server_round, results, failures)
        self.at = [*getattr(self, "at", []), time.time()]
        self.last = made[0]
        return made


def serve(address, workers, parameters, rounds):
    weights = ndarrays_to_parameters([np.zeros(parameters, np.float32)])
    everyone = {"fraction_fit": 1.0, "min_fit_clients": workers, "min_available_clients": workers}
    strategy = Timed(**everyone, fraction_evaluate=0.0, initial_parameters=weights)
    config = flwr.server.ServerConfig(num_rounds=rounds)
    flwr.server.start_server(
        server_address=address, config=config, strategy=strategy, grpc_max_message_length=MESSAGE_MAX
    )
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    (made,) = parameters_to_ndarrays(strategy.last)
    values = [float(made.min()), float(made.max())]
    sys.stdout.write(json.dumps({"at": strategy.at, "peak_bytes": int(peak[1]) * 1024, "values": values}) + "\n")


if __name__ == "__main__":
    role, where, *sizes = sys.argv[1:]
    if role == "server":
        serve(where, *map(int, sizes))
    else:
        flwr.client.start_client(server_address=where, client=Adds().to_client(), grpc_max_message_length=MESSAGE_MAX)
