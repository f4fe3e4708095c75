"""What the operator's commands write, and what they refuse, before there is any broker."""

import contextlib
import json
import re
import stat
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner
from yarl import URL

from broker import secure as securing
from broker.certificates import Issued, end_of, hosts_of, issue
from broker.errors import LinkError, UsageError
from broker.federation import Federation, Party, configuration, definitions, hashed
from broker.folder import settle
from broker.invitation import Access, Invitation
from broker.management import Management, checked
from broker.pinned import Roster, draw_identity, identity_of, read_identity, read_roster
from fluffle import app


def made(folder: Path, *workers: str, **changes: object) -> Federation:
    assert "It will read" in securing.secure(folder, changes)
    for name in workers:
        securing.invite(folder, name)
    assert "It will read" in securing.apply(folder)
    return Federation.read(folder)


def test_all_there_is_to_know_is_written_and_secrets_are_the_operators_alone(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder, "ada")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("federation.json", "ca.key", "coordinator.fluffle", "ada.fluffle"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    for path in (folder / "broker").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    assert not list(folder.glob("broker/ca.key"))
    secrets = [party.password for party in Federation.read(folder).parties.values()]
    assert all(len(secret) >= 32 for secret in secrets)
    for path in (folder / "broker").iterdir():
        assert not [secret for secret in secrets if secret in path.read_text()]


def test_an_invitation_is_all_that_a_worker_needs(tmp_path: Path) -> None:
    now = made(tmp_path / "fed", "ada", hosts=("broker.example", "10.1.2.3"), port=5671)
    access = Access.invited(tmp_path / "fed" / "ada.fluffle", "worker")
    assert str(access.url.with_password(None)) == "amqps://ada@broker.example:5671/fluffle"
    assert (access.user, access.vouched, access.url.password) == ("ada", True, now.parties["ada"].password)
    assert Access.invited(tmp_path / "fed" / "coordinator.fluffle", "coordinator").user == "coordinator"


def test_by_certificate_alone_there_is_no_password(tmp_path: Path) -> None:
    now = made(tmp_path / "fed", "ada", external=True)
    assert Invitation.read(tmp_path / "fed" / "ada.fluffle").password == ""
    users = {user["name"]: user["password_hash"] for user in definitions(now)["users"]}
    assert (users["ada"], users["coordinator"]) == ("", "")
    assert users["operator"]
    conf = configuration(now, Path("/x"))
    assert re.findall(r"^auth_mechanisms\..*$", conf, re.MULTILINE) == ["auth_mechanisms.1 = EXTERNAL"]


def test_whoever_has_no_tls_or_no_certificate_is_not_let_in(tmp_path: Path) -> None:
    conf = configuration(made(tmp_path / "fed"), Path("/x")).splitlines()
    wanted = {
        "listeners.tcp = none", "ssl_options.verify = verify_peer", "ssl_options.fail_if_no_peer_cert = true",
        "ssl_options.versions.1 = tlsv1.3", "ssl_options.versions.2 = tlsv1.2", "management.ssl.ip = 127.0.0.1",
        "ssl_cert_login_from = common_name", "auth_mechanisms.1 = PLAIN",
    }  # fmt: skip
    assert wanted <= set(conf)
    assert not [line for line in conf if re.match(r"listeners\.tcp\.|management\.tcp|ssl_options\.versions\.3", line)]
    assert [line for line in conf if line.startswith("listeners.ssl.1 = 127.0.0.1:")]


def test_certificates_are_for_one_use_each_and_of_the_curve_p_256() -> None:
    above = issue(None, "the authority")
    server, worker = issue(above, "the broker of x", hosts=("localhost", "127.0.0.1")), issue(above, "ada")
    for issued, use in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (worker, ExtendedKeyUsageOID.CLIENT_AUTH)):
        found = x509.load_pem_x509_certificate(issued.certificate.encode())
        assert [*found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [use]
        assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        key = load_pem_private_key(issued.key.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp256r1"
    assert hosts_of(server.certificate) == {"localhost", "127.0.0.1"}
    assert end_of(worker.certificate) - datetime.now(UTC) < timedelta(days=366)


def test_the_same_commands_again_change_no_byte(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder, "ada")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made(folder, "ada")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_host_gives_another_server_certificate_and_the_invitations_say_it(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder, "ada")
    before = Invitation.read(folder / "ada.fluffle")
    made(folder, "ada", hosts=("there.example",))
    after = Invitation.read(folder / "ada.fluffle")
    assert "there.example" in hosts_of((folder / "broker" / "server.pem").read_text())
    assert (URL(after.broker).host, after.certificate, after.password) == (
        "there.example", before.certificate, before.password,
    )  # fmt: skip
    assert "listeners.ssl.1 = 127.0.0.1" not in (folder / "broker" / "rabbitmq.conf").read_text()


def test_a_new_certificate_keeps_the_password_and_what_others_put_into_the_invitation(tmp_path: Path) -> None:
    folder, file = tmp_path / "fed", tmp_path / "fed" / "ada.fluffle"
    made(folder, "ada")
    before = Invitation.read(file)
    text = file.read_text().replace('identity = ""', f'identity = "{"ab" * 32}"')
    file.write_text(text)
    securing.invite(folder, "ada", renew=True)
    after = Invitation.read(file)
    assert (after.password, after.identity) == (before.password, "ab" * 32)
    assert after.certificate != before.certificate


@pytest.mark.parametrize("name", ["", "Ada", "a b", "-a", "operator", "coordinator", "../x", "a" * 64])
def test_a_worker_has_a_workers_name(name: str, tmp_path: Path) -> None:
    made(tmp_path / "fed")
    with pytest.raises(UsageError, match="is no worker's name"):
        securing.invite(tmp_path / "fed", name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vhost": "a/b"}, "no name for a vhost"),
        ({"hosts": ("a\nb",)}, "--host takes"),
        ({"hosts": ("a b",)}, "--host takes"),
        ({"hosts": ("user@host",)}, "--host takes"),
        ({"hosts": ("abc:5671",)}, "--host takes"),
        ({"hosts": ("fe80::1%eth0",)}, "--host takes"),
        ({"port": 99999}, "--port takes"),
        ({"port": 0}, "--port takes"),
        ({"management": "ftp://x"}, "must look like https"),
        ({"management": "http://x.example:15672"}, "must not travel unsecured"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        securing.secure(tmp_path / "fed", changes)


def test_a_folder_of_other_things_and_one_without_a_federation_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="holds other things"):
        securing.secure(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for act in (securing.invite, securing.revoke):
        with pytest.raises(UsageError, match="broker secure"):
            act(tmp_path / "nowhere", "ada")


@pytest.mark.parametrize("name", ["it's", 'a"b', "a#b", "a\nb"])
def test_a_folder_that_rabbitmq_cannot_live_in_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    """It would hang at its start, or look for a file whose name ends before the #."""
    with pytest.raises(UsageError, match="choose a path without quotes, # and line breaks"):
        securing.secure(tmp_path / name, {})
    assert not (tmp_path / name).exists()


def test_a_node_is_not_given_a_port_that_there_is_none_of(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["broker", "start", "--dir", str(tmp_path / "node"), "--port", "99999"])
    assert done.exit_code == 2
    assert not (tmp_path / "node").exists()


def test_revoking_wants_the_broker_there_and_changes_nothing_without(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder, "ada")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(LinkError, match="do not answer"):
        securing.revoke(folder, "ada")
    with pytest.raises(UsageError, match="nobody called 'bob'"):
        securing.revoke(folder, "bob")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_somebody_elses_broker_must_answer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"do not answer at 127\.0\.0\.1:1 "):
        securing.secure(tmp_path / "fed", {"management": "https://root:secret@127.0.0.1:1"})


def test_a_name_that_was_revoked_is_not_given_again_while_its_certificate_would_be_let_in(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    now = made(folder, external=True)
    for until, refused in (("2999-01-01T00:00:00+00:00", True), ("2001-01-01T00:00:00+00:00", False)):
        values = json.loads(now.text) | {"revoked": {"ada": until}}
        (folder / "federation.json").write_text(json.dumps(values))
        if refused:
            with pytest.raises(UsageError, match="until 2999-01-01: choose another name"):
                securing.invite(folder, "ada", again=True)
        else:
            securing.invite(folder, "ada", again=True)
    assert "ada" in Federation.read(folder).parties


def test_a_month_before_its_end_every_certificate_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder, now = tmp_path / "fed", datetime.now(UTC)
    made(folder, "ada")
    assert securing.endings(folder) == []
    assert securing.endings(folder, now + timedelta(days=334)) == []
    said = securing.endings(folder, now + timedelta(days=336))
    assert len(said) == 3
    assert f"`fluffle invite ada --renew --dir {folder}` makes another" in "".join(said)
    assert len(securing.endings(folder, now + timedelta(days=3640))) == 4


def test_workers_have_exactly_their_own_rights(tmp_path: Path) -> None:
    wanted = definitions(made(tmp_path / "fed", "ada"))
    rights = {each["user"]: each for each in wanted["permissions"]}
    assert {key: rights["ada"][key] for key in ("configure", "write", "read")} == {
        "configure": "^$", "write": r"^fluffle\.(up|upload\.ada)$", "read": r"^fluffle\.(down|control)\.ada$",
    }  # fmt: skip
    (topic,) = [each for each in wanted["topic_permissions"] if each["user"] == "ada"]
    assert (topic["exchange"], topic["write"]) == ("fluffle.up", r"^(hello|inbox\.[a-z0-9-]+)\.{username}$")
    tags = {user["name"]: user["tags"] for user in wanted["users"]}
    assert tags == {"ada": [], "coordinator": [], "operator": ["administrator"]}


def test_passwords_are_kept_as_rabbitmq_keeps_them() -> None:
    assert hashed("") == ""
    assert hashed("x" * 32) == hashed("x" * 32) != hashed("y" * 32)
    assert len(hashed("x" * 32)) == 48  # 4 bytes of salt, 32 of SHA-256


def test_a_damaged_federation_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder)
    whole = json.loads((folder / "federation.json").read_text())
    parties = whole["parties"]
    for damage in (
        "{", "[]", '{"format": 2}', json.dumps(whole | {"port": "x"}), json.dumps(whole | {"parties": {}}),
        json.dumps(whole | {"parties": parties | {"../x": parties["operator"]}}),
    ):  # fmt: skip
        (folder / "federation.json").write_text(damage)
        with pytest.raises(UsageError, match=r"federation\.json (cannot be read|is damaged).*restore it") as told:
            Federation.read(folder)
        assert "\n" not in str(told.value)


class Killed(BaseException):
    """What comes in the place of a write."""


class Pages:
    """A broker that agrees to all."""

    def ask(self, *asked: str, **_: object) -> Any:
        return [] if asked == ("GET", "users") else {}


def act(folder: Path, what: str) -> None:
    if what.startswith("secure"):
        securing.secure(folder, {}, renew=what == "secure --renew")
    elif what == "revoke":
        securing.revoke(folder, "ada")
        securing.strike(folder, "ada")
    else:
        securing.invite(folder, "ada", renew=what == "invite --renew")


@pytest.mark.parametrize("again", ["the same", "secure"])
@pytest.mark.parametrize("what", ["secure", "secure --renew", "invite", "invite --renew", "revoke"])
def test_a_command_that_was_killed_at_any_write_is_finished_by_the_next(
    what: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace
    for left in range(30):
        folder, lives = tmp_path / f"fed{left}", left
        if what != "secure":
            operated(folder, "bob", *(["ada"] if what in ("invite --renew", "revoke") else []))

        def write(path: Path, target: Path) -> Path:
            nonlocal lives
            lives -= 1
            if lives < 0:
                raise Killed
            return rename(path, target)

        with monkeypatch.context() as answering:
            answering.setattr(securing, "Management", lambda *_, **__: Pages())
            with monkeypatch.context() as dying:
                dying.setattr(Path, "replace", write)
                with contextlib.suppress(Killed):
                    act(folder, what)
            act(folder, what if again == "the same" else again)
        fits_together(folder)
        if lives >= 0:
            break
    else:
        pytest.fail("there is no end of writes")
    assert left > 3


def fits_together(folder: Path) -> None:
    now, files_ = Federation.read(folder), folder / "broker"
    assert json.loads((files_ / "definitions.json").read_text()) == definitions(now)
    ca = Issued((files_ / "ca.pem").read_text(), (folder / "ca.key").read_text())
    above = x509.load_pem_x509_certificate(ca.certificate.encode())
    server = Issued((files_ / "server.pem").read_text(), (files_ / "server.key").read_text())
    for issued in (ca, server):
        public = x509.load_pem_x509_certificate(issued.certificate.encode()).public_key()
        assert public == load_pem_private_key(issued.key.encode(), None).public_key()
    x509.load_pem_x509_certificate(server.certificate.encode()).verify_directly_issued_by(above)
    for file in folder.glob("*.fluffle"):
        access = Access.invited(file)
        if access.user in now.parties:
            assert access.url.password == now.parties[access.user].password
    if (folder / "roster.json").exists():
        read_roster(folder / "roster.json")


def test_a_revoked_worker_is_not_among_those_whom_the_broker_reads_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revoking was killed between two files, and is done again."""
    folder = tmp_path / "fed"
    made(folder, "ada")
    monkeypatch.setattr(securing, "Management", lambda *_, **__: Pages())
    before = (folder / "broker" / "definitions.json").read_bytes()
    securing.revoke(folder, "ada")
    (folder / "broker" / "definitions.json").write_bytes(before)
    securing.revoke(folder, "ada")
    assert b"ada" not in (folder / "broker" / "definitions.json").read_bytes()


def test_what_another_operator_does_meanwhile_is_not_undone(tmp_path: Path) -> None:
    """Who waits for the other's lock looks at the federation when it is his turn, and not before."""
    folder = tmp_path / "fed"
    made(folder)
    with securing.alone(folder):
        late = threading.Thread(target=securing.secure, args=(folder, {"hosts": ("there.example",)}))
        late.start()
        time.sleep(0.3)
        assert late.is_alive()
        now = Federation.read(folder)
        (folder / "federation.json").write_text(replace(now, parties={**now.parties, "bob": Party("x")}).text)
    late.join(30)
    assert Federation.read(folder).hosts == ("there.example",)
    assert "bob" in Federation.read(folder).parties


def test_what_another_command_holds_for_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "fed")
    monkeypatch.setattr(securing, "ALONE_S", 0.1)
    with securing.alone(tmp_path / "fed"), pytest.raises(UsageError, match="another command is at work in"):
        securing.apply(tmp_path / "fed")


@pytest.mark.parametrize("damage", ["gone", "empty", "another's", "binary"])
def test_an_authority_that_is_lost_is_not_made_anew_in_silence(damage: str, tmp_path: Path) -> None:
    """Nobody who was invited would be let in any more."""
    folder = tmp_path / "fed"
    made(folder, "ada")
    if damage == "gone":
        (folder / "ca.key").unlink()
    else:
        said = {"empty": b"", "another's": issue(None, "x").key.encode(), "binary": b"\xff\xfe"}[damage]
        (folder / "ca.key").write_bytes(said)
    before = files(folder)
    for what in ("secure", "invite"):
        with pytest.raises(UsageError, match=r"ca\.key .*: restore "):
            act(folder, what)
    assert files(folder) == before


@pytest.mark.parametrize("what", ["server.pem", "server.key"])
def test_a_brokers_certificate_that_is_damaged_is_said_and_made_anew(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    made(folder)
    (folder / "broker" / what).write_text("")
    if what == "server.pem":
        with pytest.raises(UsageError, match="damaged: `fluffle broker secure"):
            securing.endings(folder)
    made(folder)
    assert securing.endings(folder) == []
    fits_together(folder)


def test_an_authority_that_has_ended_vouches_for_nobody_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.certificates.AUTHORITY_DAYS", 0)
    with pytest.raises(UsageError, match=r"has ended on .* clock says .*: `fluffle broker secure` in a new folder"):
        securing.secure(tmp_path / "fed", {})


def test_a_node_folder_that_is_there_becomes_the_federations(tmp_path: Path) -> None:
    address = settle(tmp_path / "fed", None)
    assert made(tmp_path / "fed").port == address.port


def test_pages_without_an_answer_are_said_without_the_password() -> None:
    pages = Management(checked("https://127.0.0.1:1"), ("ada", "secret"), issue(None, "x").certificate)
    with pytest.raises(LinkError, match=r"do not answer at 127\.0\.0\.1:1 ") as told:
        pages.ask("GET", "overview")
    assert "secret" not in str(told.value)


def test_a_party_without_certificate_is_the_operator(tmp_path: Path) -> None:
    parties = made(tmp_path / "fed", "ada").parties
    assert {name for name, party in parties.items() if not party.until} == {"operator"}
    assert isinstance(parties["ada"], Party)


# -- secret sums ----------------------------------------------------------------------------------------------------


def operated(folder: Path, *workers: str) -> bytes:
    """A federation whose operator has a key; that one's public half."""
    made(folder)
    key = draw_identity(folder / "operator.key")
    for name in workers:
        securing.invite(folder, name)
    return key


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_with_an_operators_key_an_invitation_holds_all_for_secret_sums_too(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    operator = operated(folder, "ada", "bob")
    roster = read_roster(folder / "roster.json", operator.hex())
    assert (sorted(roster.workers), roster.version) == (["ada", "bob"], 2)
    for name in ("ada", "bob"):
        invitation = Invitation.read(folder / f"{name}.fluffle")
        assert invitation.operator == operator.hex()
        roster.vouch(name, identity_of(invitation.identity))
    of_coordinator = Invitation.read(folder / "coordinator.fluffle")
    assert (of_coordinator.operator, of_coordinator.identity) == (operator.hex(), "")
    before = files(folder)
    securing.invite(folder, "ada")
    assert files(folder) == before
    securing.invite(folder, "ada", renew=True)
    assert Invitation.read(folder / "ada.fluffle").identity.encode() in before["ada.fluffle"]
    assert files(folder)["roster.json"] == before["roster.json"]


def test_who_was_invited_before_the_operator_had_a_key_is_put_on_the_roster_by_the_same_command(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "fed"
    made(folder, "ada")
    operator = draw_identity(tmp_path / "elsewhere.key")
    securing.invite(folder, "ada", operator=tmp_path / "elsewhere.key")
    assert list(read_roster(folder / "roster.json", operator.hex()).workers) == ["ada"]


def test_whose_own_key_is_on_the_roster_is_given_no_other(tmp_path: Path) -> None:
    """Be it there before the invitation, or in place of the one that was in there."""
    folder, file = tmp_path / "fed", tmp_path / "fed" / "roster.json"
    operator = operated(folder, "ada")
    keys = {name: draw_identity(tmp_path / f"{name}.key") for name in ("ada", "bob")}
    Roster.read(file).without("ada").with_("ada", keys["ada"]).with_("bob", keys["bob"]).write(file)
    for name in ("ada", "bob"):
        securing.invite(folder, name)
        invitation = Invitation.read(folder / f"{name}.fluffle")
        assert (invitation.operator, invitation.identity) == (operator.hex(), "")
    assert read_roster(file, operator.hex()).workers == keys


def test_a_name_that_nobody_has_does_not_keep_the_others_on_the_roster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fed"
    operated(folder, "ada", "bob", "carl")
    Roster.read(folder / "roster.json").with_("eve", draw_identity(tmp_path / "eve.key")).write(
        folder / "roster.json"
    )
    Roster.read(folder / "roster.json").signed(read_identity(folder / "operator.key")).write(folder / "roster.json")
    monkeypatch.setattr(securing, "Management", lambda *_, **__: Pages())
    done = CliRunner().invoke(app, ["revoke", "ada", "eve", "carl", "--dir", str(folder)])
    assert isinstance(done.exception, UsageError)
    assert "nobody called 'eve' has been invited" in str(done.exception)
    assert sorted(read_roster(folder / "roster.json").workers) == ["bob", "eve"]


def test_many_are_told_to_the_broker_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is told of all: a thousand names, one after the other, would take it an hour."""
    folder, told = tmp_path / "fed", list[Any]()
    made(folder)

    class Listening:
        def ask(self, *asked: str, body: Any = None) -> Any:
            told.extend([body] * (asked == ("POST", "definitions")))
            return []

    monkeypatch.setattr(securing, "Management", lambda *_, **__: Listening())
    done = CliRunner().invoke(app, ["invite", "ada", "bob", "No Name", "carl", "--dir", str(folder)])
    assert "'No Name' is no worker's name" in str(done.exception)
    assert [{user["name"] for user in each["users"]} for each in told] == [
        {"ada", "bob", "carl", "coordinator", "operator"}
    ]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another's", "the roster is signed by another operator: "),
        ("open", r"others may read .*operator\.key, and it holds a secret: chmod 600"),
        ("changed", "the roster is not what the operator has signed"),
        ("handed over", "ada.fluffle is there no longer, and ada not on the roster: --renew makes another"),
    ],
)
def test_nothing_is_changed_by_an_invitation_that_cannot_be_signed(how: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    operated(folder, "ada")
    if how == "another's":
        (folder / "operator.key").unlink()
        draw_identity(folder / "operator.key")
    elif how == "open":
        (folder / "operator.key").chmod(0o644)
    elif how == "changed":
        text = (folder / "roster.json").read_text()
        (folder / "roster.json").write_text(text.replace('"ada"', '"eve"'))
    else:
        (folder / "ada.fluffle").unlink()
        (folder / "roster.json").unlink()
    before = files(folder)
    with pytest.raises(UsageError, match=said):
        securing.invite(folder, "ada" if how == "handed over" else "bob")
    assert files(folder) == before


def test_who_is_revoked_is_struck_off_the_roster_once_there_is_the_key_that_signs_it(tmp_path: Path) -> None:
    folder, key = tmp_path / "fed", tmp_path / "operator.key"
    operator = operated(folder, "ada", "bob")
    (folder / "operator.key").rename(key)
    assert securing.strike(folder, "bob") == (
        f"bob is on {folder}/roster.json still: the same command with --operator KEY strikes it off."
    )
    assert securing.strike(folder, "bob", operator=key).startswith(f"bob is off {folder}/roster.json")
    assert list(read_roster(folder / "roster.json", operator.hex()).workers) == ["ada"]
    assert securing.strike(folder, "bob") == securing.strike(folder, "carl") == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), r"secure rounds take --identity, this worker's own key, too: `fluffle keygen` makes one\."),
        (("--identity", "ada.key", "--roster", "other.json"), "the roster is signed by another operator: "),
        (
            ("--identity", "eve.key", "--roster", "roster.json"),
            "the roster has another key for ada, or none: ask the",
        ),
    ],
)
def test_a_worker_whose_key_and_roster_do_not_go_with_its_invitation_does_not_begin(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "fed"
    operated(folder)
    draw_identity(folder / "eve.key")
    roster = Roster({"ada": draw_identity(folder / "ada.key")}, 0)
    roster.write(folder / "roster.json")
    roster.signed(identity_of("ab" * 32)).write(folder / "other.json")
    securing.invite(folder, "ada")
    given = [word if word.startswith("--") else str(folder / word) for word in options]
    words = ["worker", "toy", "--data", "x", "--invite", str(folder / "ada.fluffle"), *given]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UsageError)
    assert re.match(said, str(done.exception))
