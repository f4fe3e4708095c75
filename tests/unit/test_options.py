"""Settings given on a command line, and where state is kept."""

from pathlib import Path

import pytest

from broker.errors import UsageError
from broker.options import parse_settings, state_folder


def test_numbers_and_truth_values_are_taken_as_such_and_all_else_is_text() -> None:
    given = [
        "lr=0.1",
        "epochs=3",
        "small=1e-9",
        "warm=true",
        "cold=False",
        "name=x",
        "empty=",
        "also=a=b",
        "minus=-2",
    ]
    found = parse_settings(given)
    assert found == {
        "lr": 0.1, "epochs": 3, "small": 1e-9, "warm": True, "cold": False, "name": "x", "empty": "", "also": "a=b",
        "minus": -2,
    }  # fmt: skip
    assert type(found["epochs"]) is int
    assert type(found["warm"]) is bool


def test_the_last_of_several_values_counts_and_none_is_fine() -> None:
    assert parse_settings(["lr=1", "lr=2"]) == {"lr": 2}
    assert parse_settings([]) == parse_settings(None) == {}


@pytest.mark.parametrize("pair", ["lr", "", "=1", "="])
def test_what_is_not_a_pair_is_refused(pair: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(["a=1", pair])
    assert str(caught.value) == f"--set takes NAME=VALUE, not {pair!r}."


def test_state_is_kept_where_the_user_wants_it_or_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state_folder("workers", "ada") == Path("/home/ada/.local/state/fluffle/workers/ada")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert state_folder() == Path("/home/ada/.local/state/fluffle")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_folder("node") == Path("/state/fluffle/node")
