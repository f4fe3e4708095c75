"""The bare pump: what this machine and this RabbitMQ move with plain aio-pika and nothing of ours. And a memcpy.

One connection publishes messages of 1 MiB with confirms, a few unconfirmed at a time; another, in a process of its
own, consumes and acks them. The queue is classic, the messages are not persistent, the loops are uvloop's. On two
cores two processes are a sixth faster than one: each has a core to encode or decode on.

Run as a program it is the consumer. Knows nothing of Fluffle.
"""

import asyncio
import statistics
import subprocess
import sys
import time

import aio_pika
import numpy as np
import uvloop
from aio_pika.abc import AbstractIncomingMessage

QUEUE = "bare-pump"
MESSAGE_BYTES = 1 << 20
MESSAGES = 256
WINDOW = 8
"""Messages on their way to the broker and not yet confirmed: more make it no faster."""
PREFETCH = 16
TIMES = 3
PUMP_S = 120.0


def pump(url: str, messages: int = MESSAGES, times: int = TIMES) -> float:
    """Bytes a second through the broker, each counted once; the median of so many times.

    Raises:
        TimeoutError: nothing came out of it for too long.
    """
    return statistics.median(uvloop.run(_once(url, messages)) for _ in range(times))


async def _once(url: str, messages: int) -> float:
    async with asyncio.timeout(PUMP_S), await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(QUEUE)
        words = (sys.executable, __file__, url, str(messages))
        consumer = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        assert consumer.stdout is not None
        try:
            await consumer.stdout.readline()  # it is ready
            began = time.monotonic()
            await _publish(channel, messages)
            ended = float(await consumer.stdout.readline())
            await consumer.wait()
        finally:
            if consumer.returncode is None:
                consumer.kill()
                await consumer.wait()
        await queue.delete(if_unused=False, if_empty=False)
    return messages * MESSAGE_BYTES / (ended - began)


async def _publish(channel: aio_pika.abc.AbstractChannel, messages: int) -> None:
    room = asyncio.Semaphore(WINDOW)
    message = aio_pika.Message(bytes(MESSAGE_BYTES), delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT)

    async def one() -> None:
        try:
            await channel.default_exchange.publish(message, QUEUE)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for _ in range(messages):
            await room.acquire()
            group.create_task(one())


async def _consume(url: str, messages: int) -> None:
    """Say when it begins, take so many, and say on the machine's monotonic clock when the last one was acked."""
    done, left = asyncio.Event(), messages

    async def take(message: AbstractIncomingMessage) -> None:
        nonlocal left
        await message.ack()
        left -= 1
        if not left:
            done.set()

    async with asyncio.timeout(PUMP_S), await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=PREFETCH)
        await (await channel.get_queue(QUEUE, ensure=False)).consume(take)
        tell("ready")
        await done.wait()
        tell(str(time.monotonic()))


def tell(words: str) -> None:
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def memcpy() -> float:
    """Bytes a second that this machine copies from memory to memory; both places are mapped already."""
    source = np.ones(MESSAGES * MESSAGE_BYTES // 8)
    target = source.copy()
    began = time.perf_counter()
    for _ in range(4):
        np.copyto(target, source)
    return 4 * source.nbytes / (time.perf_counter() - began)


if __name__ == "__main__":
    uvloop.run(_consume(sys.argv[1], int(sys.argv[2])))
