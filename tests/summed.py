"""What a rule makes of sums, in memory, for tests that have no file to put it into."""

from collections.abc import Iterable

from broker.formats import FORMATS
from broker.tensors import Layout
from coordinator.aggregation import MEAN, Rule, Sums


def mean_of(layout: Layout, weights: memoryview, updates: Iterable[tuple[int, bytes]]) -> bytearray:
    """The version that these updates, of so many examples each, make of the one before."""
    sums = MEAN.init(layout, FORMATS["float32"])
    for examples, delta in updates:
        MEAN.add(sums, examples, memoryview(delta))
    return finished(MEAN, sums, weights)


def finished(rule: Rule, sums: Sums, weights: memoryview) -> bytearray:
    version = bytearray(sums.layout.size_bytes)

    def put(start: int, piece: memoryview) -> None:
        version[start : start + len(piece)] = piece

    rule.finish(sums, weights, put)
    return version
