"""Someone on the broker who keeps no rule: says anything, to anyone, in anybody's name.

Knows how to publish by hand what no worker and no coordinator would. Does not know what becomes of it.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from xxhash import xxh3_64_intdigest

from broker import topology
from broker.files import checksum
from broker.link import Outgoing
from broker.messages import (
    PART_BYTES_MIN,
    Answer,
    Attempt,
    Goodbye,
    Hello,
    Message,
    Part,
    Payload,
    Update,
    decode,
    encode,
)
from broker.parts import split
from broker.tensors import view
from coordinator.opened import named
from tests.memory import MemoryLink
from tests.system.rig import BOUND_S, MODEL, Federation, federation, learned, start_weights

HONEST = ("a", "b")
LIAR = "liar"
RUN = "test"
OF = Attempt(RUN, 1, 1)
ASKED = named(OF, 1, checksum(memoryview(start_weights())))
"""What the weights are called that it was sent."""
PAYLOAD = Payload(f"{ASKED}/{LIAR}/0", PART_BYTES_MIN, MODEL.specs)
EXAMPLES, DELTA = 10, learned(1, b"")[1]


def update(**changes: Any) -> Update:
    """What an honest worker in the liar's place would announce, with changes."""
    return dataclasses.replace(Update(OF, LIAR, 0, EXAMPLES, {}, PAYLOAD), **changes)


def parts(delta: bytes = DELTA) -> list[Part]:
    """What it would upload before that."""
    return list(split(PAYLOAD, memoryview(delta)))


def packed(message: Message, **changes: Any) -> bytes:
    """A message with some of its fields replaced, past all checks."""
    raw = msgpack.unpackb(encode(message))
    body: bytes = msgpack.packb({**raw, **changes})
    return body


def nested(depth: int) -> bytes:
    """A list in a list in a list …"""
    return b"\x91" * depth + b"\xc0"


def changed(part: Part, **changes: Any) -> Part:
    """The part with changes, and a checksum that fits unless one is given."""
    if "data" in changes:
        changes.setdefault("checksum", xxh3_64_intdigest(changes["data"]))
    return dataclasses.replace(part, **changes)


def delta_with(value: float) -> bytes:
    """A delta in which one number is this one."""
    delta = bytearray(MODEL.size_bytes)
    segment = next(s for s in MODEL.segments if s.dtype == "float32")
    view(memoryview(delta)[segment.start : segment.stop], "float32")[7] = np.float32(value)
    return bytes(delta)


@dataclass(slots=True)
class Liar:
    """Has the queues of a worker, and sends what a test tells it to."""

    fed: Federation
    link: MemoryLink

    async def say(self, body: bytes | Message, key: str = "", *, exchange: str = topology.UP) -> None:
        """Publish; unless a key is given, to the inbox, under the liar's own name."""
        key = key or topology.inbox_key(RUN, LIAR)
        await self.link.publish(Outgoing(exchange, (key,), body if isinstance(body, bytes) else encode(body)))

    async def hello(self, **changes: Any) -> None:
        """Be taken for a worker."""
        hello = dataclasses.replace(Hello(LIAR, "1", "lesson", True, 3000.0), **changes)
        await self.say(hello, topology.hello_key(hello.worker))

    async def upload(self, pieces: Iterable[Part | Message | bytes]) -> None:
        """Put these into the liar's upload queue."""
        await self.upload_of(LIAR, pieces)

    async def upload_of(self, worker: str, pieces: Iterable[Part | Message | bytes]) -> None:
        """Put these into anybody's."""
        for piece in pieces:
            await self.say(piece, topology.upload_key(worker), exchange=topology.upload_queue(worker))

    async def answer(self) -> Answer:
        """What the coordinator says next."""
        async with asyncio.timeout(BOUND_S), self.link.consume(topology.control_queue(LIAR)) as deliveries:
            async for delivery in deliveries:
                await delivery.ack()
                message = decode(delivery.body)
                if isinstance(message, Answer):
                    return message
        raise AssertionError("no answer came")

    async def left(self) -> dict[str, int]:
        """Queues in which something waits, but for those that only the liar could empty."""
        own = topology.down_queue(LIAR), topology.control_queue(LIAR)
        return {name: depth for name, depth in (await self.fed.depths()).items() if name not in own}

    async def leave(self) -> None:
        """Be waited for no longer, let the honest workers train, and see the run to its end."""
        await self.say(Goodbye(LIAR, "it has lied enough"), topology.hello_key(LIAR))
        for place in self.fed.places.values():
            place.lesson.gate.set()
        await self.fed.end()


@asynccontextmanager
async def a_voice(fed: Federation) -> AsyncIterator[Liar]:
    """A liar that is nobody yet."""
    link = MemoryLink(fed.broker)
    fed.names.add(LIAR)
    for each in (topology.FEDERATION, topology.of_worker(LIAR), topology.of_run(RUN)):
        await link.declare(each)
    try:
        yield Liar(fed, link)
    finally:
        await link.close()


@asynccontextmanager
async def a_liar_among_two(folder: Path, **settings: Any) -> AsyncIterator[tuple[Federation, Liar]]:
    """Two honest workers and a liar, all of them asked in round 1; the quorum is two."""
    usual = {"rounds": 2, "cohort": 3, "quorum": 2, "gather_s": 0.5, "round_s": 30.0}
    async with federation(folder, **{**usual, **settings}) as fed, a_voice(fed) as liar:
        await liar.hello()
        places = [fed.join(name) for name in HONEST]
        for place in places:
            place.lesson.gate.clear()
        await fed.until(lambda: all(place.worker._incarnation for place in places))
        fed.begin()
        for place in places:
            await place.lesson.began.wait()
        yield fed, liar
