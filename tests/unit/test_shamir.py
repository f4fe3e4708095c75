"""Shares of a secret: a threshold of them gives it back, and one fewer fits every secret as well as any other."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import shamir
from broker.shamir import PRIME, SHARE_BYTES, combine, split


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 20), st.randoms(use_true_random=False), st.data())
def test_any_threshold_of_the_shares_gives_the_secret(
    secret: bytes, count: int, dice: random.Random, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = split(secret, count, threshold, dice.randbytes)
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    assert {len(share) for share in shares} == {SHARE_BYTES}
    assert combine({at + 1: shares[at] for at in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_greatest_of_32_bytes_are_secrets_too(secret: bytes) -> None:
    shares = split(secret, 5, 3, random.Random(0).randbytes)
    assert combine({1: shares[0], 3: shares[2], 5: shares[4]}) == secret


def test_the_field_is_that_of_the_smallest_prime_above_32_bytes() -> None:
    def is_prime(number: int) -> bool:  # Miller and Rabin, with enough witnesses that none of these passes by luck
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for witness in range(2, 42):
            power = pow(witness, odd, number)
            if power not in (1, number - 1) and not any(
                (power := power * power % number) == number - 1 for _ in range(twos - 1)
            ):
                return False
        return True

    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))


def test_one_share_fewer_than_the_threshold_says_nothing_in_a_field_small_enough_to_try_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def throwing(*numbers: int) -> Callable[[int], bytes]:
        return lambda size: b"".join(number.to_bytes(size // len(numbers), "big") for number in numbers)

    monkeypatch.setattr(shamir, "PRIME", 7)
    monkeypatch.setattr(shamir, "_factors", shamir._factors.__wrapped__)  # those of this field are not to be kept
    for seen in combinations(range(4), 2):
        views = []
        for secret in range(7):
            throws = Counter(
                tuple(split(secret.to_bytes(32, "big"), 4, 3, throwing(*two))[at] for at in seen)
                for two in product(range(7), repeat=2)
            )
            views.append(throws)
        assert all(view == views[0] for view in views), "the shares would tell secrets apart"
        assert len(views[0]) == 49


def test_fewer_shares_than_the_threshold_fit_any_secret() -> None:
    secret, other = b"s" * 32, b"o" * 32
    shares = split(secret, 9, 5, random.Random(1).randbytes)
    four = {at + 1: int.from_bytes(shares[at], "big") for at in range(4)}
    # the one polynomial through four shares and another secret: it has a fifth share to go with it
    points = {0: int.from_bytes(other, "big"), **four}
    fifth = 0
    for x, y in points.items():
        above = below = 1
        for z in points:
            if z != x:
                above, below = above * (9 - z) % PRIME, below * (x - z) % PRIME
        fifth += y * above * pow(below, -1, PRIME)
    told = {x: y.to_bytes(SHARE_BYTES, "big") for x, y in four.items()}
    assert combine({**told, 9: (fifth % PRIME).to_bytes(SHARE_BYTES, "big")}) == other
    assert combine({**told, 9: shares[8]}) == secret


def test_shares_that_do_not_belong_together_give_another_secret_or_none() -> None:
    shares = split(b"s" * 32, 5, 3, random.Random(2).randbytes)
    assert combine({1: shares[0], 2: shares[1], 3: shares[3]}) != b"s" * 32
    assert combine({1: (2**256).to_bytes(33, "big")}) is None
