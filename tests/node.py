"""A private RabbitMQ node that tests and benchmarks may also ask, and end as a power cut would."""

import os
import re
import signal
import subprocess

from broker import node
from broker.errors import UsageError
from broker.folder import BROKER, environment
from broker.node import find_server
from broker.processes import STOP_S, holder


class Node(node.Node):
    def kill(self) -> None:
        """End the broker as a power cut would; `restart` brings it back with what was on its disk."""
        broker = holder(self.folder / BROKER)
        if broker is not None and self._keeper is not None:
            os.killpg(broker, signal.SIGKILL)
            self._keeper.wait(2 * STOP_S)

    def settle(self) -> None:
        """Wait until what was declared is on disk. While Mnesia dumps its log, as after a start, it is not yet."""
        self.ctl("eval", "mnesia:system_info(is_running) =:= yes andalso mnesia:dump_log().")

    def restart(self) -> None:
        """Stop what still runs and start again: same URL, same data."""
        self.stop()
        self.start()

    def ctl(self, *words: str) -> str:
        """What `rabbitmqctl WORDS` prints about this node, which must run; half a second each."""
        if holder(self.folder / BROKER) is None:  # rabbitmqctl would start an epmd of its own, for nobody to end
            raise UsageError(f"no broker runs in {self.folder}: start it first")
        command = [str(find_server().with_name("rabbitmqctl")), "-q", "-n", self._address.name, *words]
        done = subprocess.run(
            command,
            env=environment(self.folder, self._address),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise UsageError(f"rabbitmqctl {words[0]} failed: {' '.join((done.stdout + done.stderr).split())}")
        return done.stdout


def server_version() -> str:
    """Of the machine's rabbitmq-server, as its path tells; "unknown" where the path does not.

    Raises:
        UsageError: there is none.
    """
    found = re.search(r"rabbitmq[^/]*[-/](\d+\.\d+\.\d+)", str(find_server().resolve()))
    return found[1] if found else "unknown"
