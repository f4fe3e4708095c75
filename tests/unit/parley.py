"""A secure round in memory, stage by stage, with dice that can be thrown again; whoever likes may lie in between."""

import random
from collections.abc import Collection
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker import pact
from broker.masks import Words
from broker.pact import Dealt, Finishers, Opened, Reveal, Settled
from broker.ring import Form, ring_of
from broker.tensors import Layout, TensorSpec
from coordinator.unmasking import Unmasking
from workers.masking import Masking, Member

MODEL = Layout.of(
    [TensorSpec("w", "float32", (5,)), TensorSpec("count", "int64", ()), TensorSpec("on", "bool", (2,))]
)
NOBODY: frozenset[str] = frozenset()


class Parley:
    """A coordinator and `count` workers, each with words that are not masked yet.

    Whoever is in `bits_of` has words of so many bits; all others have 32.
    """

    def __init__(self, count: int, *, seed: int = 0, bits: int = 32, model: bytes = bytes(32), **own: Any) -> None:
        self.dice = random.Random(seed)
        self.names = [f"w-{number:03d}" for number in range(count)]
        self.identities = {n: Ed25519PrivateKey.from_private_bytes(self.dice.randbytes(32)) for n in self.names}
        self.roster = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.context = self.bound(model=model)
        self.own = own
        self.core = Unmasking(self.context, self.roster)
        self.workers = {name: self.worker(name) for name in self.names}
        self.form = Form(ring_of(bits, clip=1.0, examples_max=100, cohort=count), MODEL, ("loss",))
        dice = np.random.default_rng(seed)
        self.plain: dict[str, Words] = {
            name: dice.integers(0, 2**bits, self.form.words, dtype=self.form.ring.dtype.type) for name in self.names
        }
        self.words = {name: words.copy() for name, words in self.plain.items()}

    def bound(self, *, model: bytes = bytes(32), attempt: int = 1, plan: bytes = b"the plan") -> bytes:
        return pact.context("run", 7, attempt, model=model, plan=plan, roster=self.roster)

    def worker(self, name: str, *, context: bytes = b"", answered: str = "") -> Masking:
        member = Member(name, self.identities[name], self.roster, **self.own)
        return Masking(member, context or self.context, self.dice.randbytes, answered=answered)

    # -- the stages, as they go where nobody lies; each without some ---------------------------------------------

    def settle(self, *, without: Collection[str] = NOBODY) -> Settled:
        for name in self.names:
            if name not in without:
                assert self.core.advert(self.workers[name].advert)
        return self.core.settle(["loss"])

    def deal(self, settled: Settled, *, without: Collection[str] = NOBODY) -> dict[str, Dealt]:
        for name in sorted(self.core.waiting - set(without)):
            assert self.core.shares(name, self.workers[name].shares(settled, ["loss"]))
        return self.core.deal(self.form)

    def add(self, dealt: dict[str, Dealt], *, without: Collection[str] = NOBODY) -> Finishers:
        for name in sorted(self.core.waiting - set(without)):
            masked = self.workers[name].mask(dealt[name], self.words[name])
            assert self.core.masked(name, self.words[name], masked)
        return self.core.finishers()

    def vow(self, finishers: Finishers, *, without: Collection[str] = NOBODY) -> Reveal:
        for name in sorted(self.core.waiting - set(without)):
            assert self.core.vow(name, self.workers[name].vow(finishers))
        return self.core.reveal()

    def open(self, reveal: Reveal, *, without: Collection[str] = NOBODY) -> None:
        for name in sorted(self.core.waiting - set(without)):
            assert self.core.opened(name, self.opened(name, reveal))

    def opened(self, name: str, reveal: Reveal) -> Opened:
        return self.workers[name].answer(reveal).opened

    def until_vows(self) -> Finishers:
        return self.add(self.deal(self.settle()))

    def sum_of(self, names: Collection[str]) -> Words:
        total: Words = np.zeros(self.form.words, self.form.ring.dtype)
        for name in names:
            total += self.plain[name]
        return total
