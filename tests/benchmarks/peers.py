"""The same round in other systems, each in a virtual environment of its own: `make bench-peers`.

Knows which versions are compared with, how they are installed, started on loopback and ended, and what of them is
counted as the server. Does not know our figures. A peer that cannot be had or fails says why, and is left out.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from broker.errors import RunEnded
from tests.benchmarks.rows import Row
from tests.benchmarks.troupe import free_ports, listens, peak_bytes, troupe

INSTALL_S, PEER_S = 900.0, 400.0
HERE = Path(__file__).parent
GRPC, APPS = HERE / "flower_grpc.py", HERE / "flower_apps.py"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

# Exactly what was compared with. 1.13.1 is the last Flower with a server that clients talk to directly.
FLOWER_1_13 = ("flwr==1.13.1", "grpcio==1.64.3", "numpy==2.4.6", "protobuf==4.25.9")
FLOWER_NOW = ("flwr[simulation]==1.41.0", "grpcio==1.85.1", "numpy==2.4.6", "protobuf==6.33.6", "ray==2.55.1")

FLOWER_APP = """
[project]
name = "adds"
version = "1.0.0"
description = "Adds one"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"
components = {{ serverapp = "adds:server", clientapp = "adds:worker" }}

[tool.flwr.app.config]
workers = {workers}
parameters = {parameters}
rounds = {rounds}
out = "{out}"
"""
FLOWER_CONFIG = """
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


class Said(NamedTuple):
    """What a peer's rounds came to: when each ended, and the most memory that its server's processes held."""

    at: list[float]
    server_peak_bytes: int


class Peer(NamedTuple):
    """`aims`: our seconds a round at most, as a share of its, by workers and parameters; `rounds_max`: in a turn."""

    name: str
    packages: tuple[str, ...]
    rounds: Callable[[Path, Path, Row], Said]
    aims: dict[tuple[int, int], float]
    rounds_max: int


def flower_grpc(python: Path, folder: Path, row: Row) -> Said:
    (port,) = free_ports(1)
    words = (f"127.0.0.1:{port}", str(row.workers), str(row.parameters), str(row.all_rounds))
    end = time.monotonic() + PEER_S
    with troupe(folder, QUIET) as company:
        company.start("server", str(python), str(GRPC), "server", *words)
        company.until(lambda: listens(port), end)
        for n in range(1, row.workers + 1):
            company.start(f"c{n}", str(python), str(GRPC), "client", *words)
        company.until(lambda: company.running["server"].poll() == 0, end)
        return said(company.words("server").splitlines()[-1], row)


def flower_simulation(python: Path, folder: Path, row: Row) -> Said:
    out = folder / "said.json"
    words = (str(row.workers), str(row.parameters), str(row.all_rounds), str(out))
    with troupe(folder, {**QUIET, "FLWR_HOME": str(folder / "home"), "RAY_TMPDIR": str(folder)}) as company:
        company.start("simulation", str(python), str(APPS), *words)
        company.until(lambda: company.running["simulation"].poll() == 0, time.monotonic() + PEER_S)
    return said(out.read_text(), row)


def flower_deployment(python: Path, folder: Path, row: Row) -> Said:
    home, app, out = folder / "home", folder / "app", folder / "said.json"
    port, *ports = free_ports(1 + row.workers)
    for made in (home, app):
        made.mkdir()
    shutil.copy(APPS, app / "adds.py")
    sizes = {"workers": row.workers, "parameters": row.parameters, "rounds": row.all_rounds}
    (app / "pyproject.toml").write_text(FLOWER_APP.format(**sizes, out=out))
    (home / "config.toml").write_text(FLOWER_CONFIG.format(port=port))
    programs, end = python.parent, time.monotonic() + PEER_S
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"  # its programs start one another by name
    with troupe(folder, {**QUIET, "FLWR_HOME": str(home), "PATH": path}) as company:
        link = ("--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port))
        company.start("superlink", str(programs / "flower-superlink"), *link)
        company.until(lambda: listens(port), end)
        for n, own in enumerate(ports, 1):
            node = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(own))
            company.start(f"supernode{n}", str(programs / "flower-supernode"), *node)
        company.until(lambda: all(map(listens, ports)), end)
        company.start("run", str(programs / "flwr"), "run", str(app), "bench")
        company.until(out.exists, end)
        server_app = said(out.read_text(), row)
        link_bytes = peak_bytes(company.running["superlink"].pid)
    return server_app._replace(server_peak_bytes=server_app.server_peak_bytes + link_bytes)


def said(words: str, row: Row) -> Said:
    """What a peer's server said when it was done.

    Raises:
        RunEnded: its rounds did not come to what they had to.
    """
    spoken = json.loads(words)
    if set(spoken["values"]) != {row.all_rounds} or len(spoken["at"]) != row.all_rounds:
        raise RunEnded(f"the last model does not hold what was learned: {spoken}")
    return Said(spoken["at"], spoken["peak_bytes"])


PEERS = (
    Peer("Flower 1.13, gRPC in memory", FLOWER_1_13, flower_grpc, {(4, 10**6): 0.75, (4, 10**7): 0.35}, 40),
    Peer("Flower 1.41, simulation on Ray", FLOWER_NOW, flower_simulation, {}, 10),
    Peer("Flower 1.41, deployment", FLOWER_NOW, flower_deployment, {(4, 10**6): 0.02, (4, 10**7): 0.07}, 3),
)


def install(peer: Peer, place: Path, pip_words: list[str]) -> Path:
    """Make sure of a virtual environment below `place` with what a peer needs; its Python.

    Raises:
        RunEnded: it cannot be installed, and why.
    """
    folder = place.absolute() / peer.packages[0].replace("[simulation]", "").replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(peer.packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *pip_words)
    for command in ((sys.executable, "-m", "venv", "--clear", str(folder)), (*pip, *peer.packages)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired as late:
            raise RunEnded(f"{peer.packages[0]} was not installed within {INSTALL_S:.0f} s: try again") from late
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise RunEnded(f"{peer.packages[0]} cannot be installed: {last}")
    stamp.write_text(wanted)
    return python
