"""What stands beside a round: a bare pump through the same broker, a plain memcpy, and the same round in Flower.

Each does what a round does with less around it, or with something else around it. Knows nothing of Fluffle above the
link.
"""

import asyncio
import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from broker import rabbit
from broker.link import Lane, publish_parts
from broker.messages import Part
from broker.topology import Binding, Exchange, Queue, Topology
from tests.benchmarks.troupe import troupe

PUMP_PARTS, PART_BYTES = 192, 1 << 20
PUMP = "fluffle.pump"
FLOWER_S = 300.0

# The same round in Flower 1.13: FedAvg on the server, clients that add one to what they get, gRPC between.
FLOWER = """
import json, re, sys, time
import flwr, numpy as np

role, address, (workers, parameters, rounds) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
began = []

class Adds(flwr.client.NumPyClient):
    def fit(self, arrays, config):
        return [array + 1 for array in arrays], 1, {}

def at_begin(number):
    began.append(time.time())
    return {}

if role == "client":
    limit = 2**31 - 1
    flwr.client.start_client(server_address=address, client=Adds().to_client(), grpc_max_message_length=limit)
    sys.exit()
weights = flwr.common.ndarrays_to_parameters([np.zeros(parameters, np.float32)])
strategy = flwr.server.strategy.FedAvg(
    fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=workers, min_available_clients=workers,
    initial_parameters=weights, on_fit_config_fn=at_begin,
)
config = flwr.server.ServerConfig(num_rounds=rounds)
flwr.server.start_server(
    server_address=address, config=config, strategy=strategy, grpc_max_message_length=2**31 - 1
)
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps({"at": began, "server_peak_bytes": int(peak[1]) * 1024}))
"""


def pump(url: str) -> float:
    """Bytes a second through the broker with nothing around them: parts published, consumed and acked, once each."""
    return uvloop.run(_pump(url))


async def _pump(url: str) -> float:
    place = Topology((Exchange(PUMP, "direct"),), (Queue(PUMP, {}),), (Binding(PUMP, PUMP, PUMP),))
    link = await rabbit.connect(url, name="pump")
    try:
        await link.declare(place)
        async with link.consume(PUMP, lane=Lane.UP, prefetch=16) as deliveries:
            parts = [Part("pump", index, 0, bytes(PART_BYTES)) for index in range(PUMP_PARTS)]
            began = time.perf_counter()
            publishing = asyncio.create_task(publish_parts(link, parts, PUMP, (PUMP,), lane=Lane.DOWN))
            for _ in parts:
                await (await anext(deliveries)).ack()
            sent = await publishing
            return sent / (time.perf_counter() - began)
    finally:
        await link.close()


def memcpy() -> float:
    """Bytes a second that this machine copies from memory to memory; both places are mapped already."""
    source = np.ones(PUMP_PARTS * PART_BYTES // 8)
    target = source.copy()
    began = time.perf_counter()
    for _ in range(4):
        np.copyto(target, source)
    return 4 * source.nbytes / (time.perf_counter() - began)


def flower(python: str, folder: Path, *, workers: int, parameters: int, rounds: int) -> dict[str, Any]:
    """The same rounds in Flower, by a Python that has it: `at`, when each began, and `server_peak_bytes`.

    Raises:
        RunEnded: they were not done, and why.
    """
    folder.mkdir()
    script = folder / "same_round.py"
    script.write_text(FLOWER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    end = time.monotonic() + FLOWER_S
    words = (address, str(workers), str(parameters), str(rounds))
    with troupe(folder, {"FLWR_TELEMETRY_ENABLED": "0"}) as company:
        company.start("server", python, str(script), "server", *words)
        company.until(lambda: _listens(address), end)
        for n in range(1, workers + 1):
            company.start(f"c{n}", python, str(script), "client", *words)
        company.until(lambda: company.running["server"].poll() == 0, end)
        said: dict[str, Any] = json.loads(company.words("server").splitlines()[-1])
    return said


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
