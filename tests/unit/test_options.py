"""Settings given on a command line, and where state is kept."""

from pathlib import Path

import pytest

from broker.errors import UsageError
from broker.options import parse_settings, state_folder, way_in
from tests.certificates import Authority


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


@pytest.mark.parametrize("name", ["seed", "round", "private"])
def test_what_every_task_brings_itself_cannot_be_set(name: str) -> None:
    with pytest.raises(UsageError, match=f"--set cannot set {name}, which every task brings itself"):
        parse_settings(["lr=1", f"{name}=3"])


def test_state_is_kept_where_the_user_wants_it_or_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert state_folder("workers", "ada") == Path("/home/ada/.local/state/fluffle/workers/ada")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert state_folder() == Path("/home/ada/.local/state/fluffle")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert state_folder("node") == Path("/state/fluffle/node")


def test_the_broker_is_said_by_an_invitation_or_a_url_and_what_was_typed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite, url = tmp_path / "ada.fluffle", "amqp://127.0.0.1/"
    Authority().invite("ada", "amqps://broker.example/").write(invite)
    monkeypatch.delenv("FLUFFLE_BROKER", raising=False)
    monkeypatch.delenv("FLUFFLE_INVITE", raising=False)

    def way(broker: str | None, file: Path | None) -> str:
        return way_in("worker", broker, invite=file, insecure=False).user

    assert (way(url, None), way(None, invite)) == ("guest", "ada")
    with pytest.raises(UsageError, match="--broker and --invite both say where the broker is: leave one out"):
        way(url, invite)
    with pytest.raises(UsageError, match="where the broker is must be said: --invite FILE, or --broker URL"):
        way(None, None)
    monkeypatch.setenv("FLUFFLE_INVITE", str(invite))
    assert way(url, invite) == "guest"
    monkeypatch.setenv("FLUFFLE_BROKER", url)
    assert way(url, invite) == "ada"
    assert way("amqp://bob@localhost/", None) == "bob"
    with pytest.raises(UsageError, match="say --insecure"):
        way("amqp://broker.example/", None)
    assert way_in("worker", "amqp://bob@broker.example/", invite=None, insecure=True).user == "bob"
    with pytest.raises(UsageError, match="as a worker, not as a coordinator"):
        way_in("coordinator", None, invite=invite, insecure=False)
