"""What a rule makes of sums, in memory, for tests that have no file to put it into."""

from coordinator.aggregation import Rule, Sums


def finished(rule: Rule, sums: Sums, weights: memoryview) -> bytearray:
    version = bytearray(sums.layout.size_bytes)

    def put(start: int, piece: memoryview) -> None:
        version[start : start + len(piece)] = piece

    rule.finish(sums, weights, put)
    return version
