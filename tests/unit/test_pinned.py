"""The operator's roster: what is signed, by whom, and what of a tampered one is noticed."""

import json
import secrets
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from broker import secure as securing
from broker.errors import UsageError
from broker.pinned import Roster, draw_identity, draw_keys, fingerprint, read_identity, read_roster
from fluffle import app
from tests.certificates import Authority
from workers.cli import _members as members


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return draw_keys(tmp_path / "keys", ["north", "south", "west"])


def run(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_roster_says_whose_keys_count_and_is_signed_by_the_operator(signed: Path) -> None:
    keys = read_roster(signed).workers
    assert sorted(keys) == ["north", "south", "west"]
    for name, key in keys.items():
        assert read_identity(signed.with_name(f"{name}.key")).public_key().public_bytes_raw() == key
    operator = read_identity(signed.with_name("operator.key")).public_key().public_bytes_raw()
    assert read_roster(signed, operator.hex()).workers == keys
    with pytest.raises(UsageError, match="signed by another operator"):
        read_roster(signed, Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex())


def test_a_change_of_any_byte_of_what_is_signed_is_noticed(signed: Path) -> None:
    whole = json.loads(signed.read_text())
    for part in ("operator", "signature", *whole["workers"]):
        for at in range(0, 64, 7):
            changed = json.loads(signed.read_text())
            place = changed["workers"] if part in changed["workers"] else changed
            place[part] = place[part][:at] + ("0" if place[part][at] != "0" else "1") + place[part][at + 1 :]
            signed.with_name("changed").write_text(json.dumps(changed))
            with pytest.raises(UsageError):
                read_roster(signed.with_name("changed"))
    for change in ({"version": 2}, {"workers": {"north": whole["workers"]["north"]}}, {"signature": ""}):
        signed.with_name("changed").write_text(json.dumps(whole | change))
        with pytest.raises(UsageError, match="signed"):
            read_roster(signed.with_name("changed"))


def test_names_that_are_none_and_keys_that_are_taken_are_refused(signed: Path) -> None:
    roster = Roster.read(signed)
    with pytest.raises(UsageError, match="is no worker's name"):
        roster.with_("../etc", secrets.token_bytes(32))
    with pytest.raises(UsageError, match="on the roster already"):
        roster.with_("north", secrets.token_bytes(32))
    with pytest.raises(UsageError, match="north has this key already"):
        roster.with_("east", roster.workers["north"])
    with pytest.raises(UsageError, match="is not a public key"):
        roster.with_("east", b"short")
    with pytest.raises(UsageError, match="east is not on the roster"):
        roster.without("east")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "version": 1, "workers": {}}', "\0", '{"format": 1}']
)
def test_what_is_no_roster_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "roster").write_text(text)
    with pytest.raises(UsageError, match=r"is not a roster: restore it, or ask the operator for it\."):
        Roster.read(tmp_path / "roster")


def test_a_secret_key_that_others_may_read_is_refused_and_none_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.key"
    draw_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="is there already"):
        draw_identity(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"others may read .*mine\.key, and it holds a secret: chmod 600"):
        read_identity(path)


def test_a_worker_starts_only_with_a_key_of_the_roster_and_the_roster_of_its_own_operator(
    signed: Path, tmp_path: Path
) -> None:
    north, other, file = signed.with_name("north.key"), draw_keys(tmp_path / "other", ["north"]), tmp_path / "north"
    for roster, key in ((other, north), (signed, other.with_name("north.key"))):
        with pytest.raises(UsageError, match="has another key for north, or none: ask the operator"):
            members(["north"], roster=roster, identity=key, file=None, trains=True)
    with pytest.raises(UsageError, match="take --identity, this worker's own key, too"):
        members(["north"], roster=signed, identity=None, file=None, trains=True)
    operator = read_identity(signed.with_name("operator.key")).public_key().public_bytes_raw()
    Authority().invite("north", "amqps://broker.example", operator=operator.hex()).write(file)
    assert (
        members(["north"], roster=signed, identity=north, file=file, trains=True)["north"].roster
        == read_roster(signed).workers
    )
    with pytest.raises(UsageError, match=f"signed by another operator: .* instead of {fingerprint(operator)}; ask"):
        members(["north"], roster=other, identity=other.with_name("north.key"), file=file, trains=True)


def test_a_roster_is_changed_by_one_command_at_a_time(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fluffle invite` is one of them: what either read before the other wrote would undo the other's."""
    monkeypatch.setattr(securing, "ALONE_S", 0.1)
    key = draw_identity(signed.with_name("east.key")).hex()
    before = signed.read_bytes()
    with securing.alone(signed.parent):
        for words in (
            ("add", "east", key),
            ("remove", "north"),
            ("sign", "--key", str(signed.with_name("operator.key"))),
        ):
            with pytest.raises(UsageError, match="another command is at work in"):
                run("roster", words[0], str(signed), *words[1:])
    assert signed.read_bytes() == before
    run("roster", "add", str(signed), "east", key)


def test_an_operator_makes_a_roster_on_the_command_line(tmp_path: Path) -> None:
    roster, operator = str(tmp_path / "roster.json"), str(tmp_path / "operator.key")
    run("keygen", operator)
    for name in ("north", "south"):
        said = run("keygen", str(tmp_path / f"{name}.key"))
        key = said.split()[2]
        assert fingerprint(bytes.fromhex(key)) in run("roster", "add", roster, name, key)
        assert fingerprint(bytes.fromhex(key)) in said
    with pytest.raises(UsageError, match="is not signed"):
        run("roster", "verify", roster)
    assert run("roster", "sign", roster, "--key", operator).startswith("version 1, 2 workers, operator ")
    run("roster", "remove", roster, "south")
    said = run("roster", "sign", roster, "--key", operator)
    assert said.startswith("version 2, 1 worker, operator ")
    said = run("roster", "verify", roster, "--operator", said.split()[-1])
    assert said.startswith("version 2, signed by ")
    assert f"north  {fingerprint(Roster.read(Path(roster)).workers['north'])}" in said
    run("keygen", str(tmp_path / "other.key"))
    with pytest.raises(UsageError, match="signed by another operator"):
        run("roster", "sign", roster, "--key", str(tmp_path / "other.key"))
