"""A federation that was secured as the README says, and how it stands in the broker."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yarl import URL

from broker.federation import Federation, as_text
from broker.folder import known
from broker.invitation import Access, Invitation
from broker.management import Management
from broker.topology import OPERATOR, of_run
from tests.acceptance.federation import typed


class Secured:
    """Folder and broker of a federation; its worker eve belongs to nobody in particular."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fluffle(self, *words: str, status: int = 0) -> str:
        """One command to its end; what it said on both ways."""
        env = {**os.environ, "XDG_STATE_HOME": str(self.folder.parent / "state")}
        found, out, err = typed(*words, env=env)
        assert found == status, out + err
        return out + err

    @property
    def federation(self) -> Federation:
        return Federation.read(self.folder)

    @property
    def ca(self) -> str:
        return (self.folder / "broker" / "ca.pem").read_text()

    @property
    def first_password(self) -> str:
        """Of the user that the node had before it was secured."""
        return known(self.folder).password

    @property
    def pages(self) -> Management:
        now = self.federation
        return Management(URL(now.management), (OPERATOR, now.parties[OPERATOR].password), self.ca)

    def foreign(self, pages: str) -> Management:
        """The pages of a broker that is somebody else's, by its administrator."""
        url = URL(pages)
        return Management(url, (url.user or "", url.password or ""), self.ca, public=True)

    def connected(self) -> set[tuple[str, str, bool]]:
        """Users, what their certificates say, and whether by TLS, of all connections that the pages know by now."""
        found = self.pages.ask("GET", "connections")
        return {(each["user"], each.get("peer_cert_subject", ""), each["ssl"]) for each in found if "ssl" in each}

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.pages.ask("GET", "overview")["rabbitmq_version"].split(".")))

    def invitation(self, name: str) -> Invitation:
        return Invitation.read(self.folder / f"{name}.fluffle")

    def access(self, name: str) -> Access:
        return Access.invited(self.folder / f"{name}.fluffle")

    def queue(self, name: str) -> dict[str, Any]:
        return self.pages.ask("GET", "queues", self.federation.vhost, name) or {}

    def declare(self, run: str) -> None:
        """A run's queues, as its coordinator would declare them."""
        queues, bindings = of_run(run).queues, of_run(run).bindings
        where = {"vhost": self.federation.vhost, "durable": True, "auto_delete": False}
        wanted = {
            "queues": [{"name": queue.name, "arguments": dict(queue.arguments), **where} for queue in queues],
            "bindings": [
                {
                    "source": binding.exchange, "destination": binding.queue, "routing_key": binding.key,
                    "vhost": self.federation.vhost, "destination_type": "queue", "arguments": {},
                }
                for binding in bindings
            ],
        }  # fmt: skip
        self.pages.ask("POST", "definitions", body=wanted)

    def exported(self) -> str:
        """All that the broker says of itself."""
        found = self.pages.ask("GET", "definitions")
        for listed in found.values():
            if isinstance(listed, list):
                listed.sort(key=lambda each: json.dumps(each, sort_keys=True))
        return as_text(found)

    def files(self) -> dict[str, bytes]:
        """All that the operator keeps, and what RabbitMQ reads of it."""
        return {
            path.name: path.read_bytes()
            for path in [*self.folder.iterdir(), *(self.folder / "broker").iterdir()]
            if path.suffix in (".json", ".pem", ".key", ".fluffle", ".conf") or path.name == "enabled_plugins"
        }

    async def until(self, what: Callable[[], bool], within_s: float = 20.0) -> None:
        end = time.monotonic() + within_s
        while not what():
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
