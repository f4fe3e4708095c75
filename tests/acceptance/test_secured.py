"""A federation whose parties do not trust each other: secured, joined, changed and left while it runs."""

import asyncio
import json
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aiormq.exceptions import AMQPError
from cryptography import x509

from broker import secure as securing
from broker.certificates import end_of
from broker.errors import UsageError
from broker.invitation import Access
from broker.pinned import Roster, draw_keys
from tests.acceptance.federation import Federation
from tests.acceptance.secured import Secured
from tests.node import Node

pytestmark = pytest.mark.timeout(240)

LEARNER = """
import time
from pathlib import Path
import torch

def model():
    return torch.nn.Linear(4, 1)

def data(source):
    return Path(source)

def train(model, data, settings):
    while data.exists():
        data.with_name("stalled").touch()
        time.sleep(0.02)
    with torch.no_grad():
        model.bias += 1.0
    return 10, {"loss": 1.0}

def evaluate(model, data):
    return {"loss": 1.0, "examples": 10}
"""
TOLD_S = 10.0
"""It takes a tenth of a second; a lease takes 15 s to end, and the round's deadline is minutes away."""


async def connected(access: Access) -> aio_pika.abc.AbstractConnection:
    return await aio_pika.connect(access.url, ssl_context=access.tls, timeout=20)


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path, "")
    del made.env["FLUFFLE_BROKER"]
    made.learner.write_text(LEARNER)
    yield made
    made.end()


def test_four_commands_and_two_invited_workers_train_until_one_is_revoked_in_the_midst_of_a_round(
    secured: Secured, parties: Federation, record_property: Callable[[str, object], None]
) -> None:
    """The first two commands are the fixture's: `broker secure DIR --start` and `invite ada bob --dir DIR`."""
    f, stall = parties, parties.folder / "stall"
    secured.fluffle("invite", "carl", "--dir", str(secured.folder))
    kept = shutil.copy(secured.folder / "carl.fluffle", f.folder)
    for name, source in (("ada", "nothing"), ("carl", "stall")):
        invitation = str(secured.folder / f"{name}.fluffle")
        f.start(name, "worker", str(f.learner), "--invite", invitation, "--data", str(f.folder / source))
    f.fluffle("init", str(f.learner), str(f.run))
    invitation = str(secured.folder / "coordinator.fluffle")
    f.coordinator("--invite", invitation, "--rounds", "5000", "--cohort", "2", "--quorum", "1", "--gather-s", "60")
    f.until(lambda: any(len(line["counted"]) == 2 for line in f.rounds()))
    wanted = {(name, f"CN={name}", True) for name in ("ada", "carl", "coordinator")}
    f.until(lambda: secured.connected() == wanted)
    upload, done = ("queues", secured.federation.vhost, "fluffle.upload.ada"), len(f.rounds())
    secured.pages.ask("DELETE", *upload)  # with its exchange; the coordinator makes them anew
    f.until(lambda: any(len(line["counted"]) == 2 for line in f.rounds()[done + 2 :]))
    assert secured.pages.ask("GET", *upload)

    stall.touch()
    f.until(stall.with_name("stalled").exists)  # a round before may still have waited for carl's update
    f.until(lambda: waits_for_carl_alone(f, len(f.rounds()) + 1))
    done = len(f.rounds())
    began_at = time.monotonic()
    secured.fluffle("revoke", "carl", "--dir", str(secured.folder))
    revoked_at = time.monotonic()
    f.until(lambda: len(f.rounds()) > done)
    took_s = time.monotonic() - revoked_at
    assert took_s < TOLD_S
    closed = f.rounds()[done]
    assert list(closed["counted"]) == ["ada"]
    assert closed["refused"] == {"carl": "its invitation was revoked"}
    record_property(
        "measured", f"revoke in a round: {revoked_at - began_at:.1f} s, then its round closes {took_s:.2f} s later"
    )
    f.until(lambda: len(f.rounds()) > done + 2)
    assert list(f.rounds()[-1]["cohort"]) == ["ada"]
    f.until(lambda: "carl" not in {user for user, *_ in secured.connected()})
    assert not secured.queue("fluffle.upload.carl")
    assert not (secured.folder / "carl.fluffle").exists()
    stall.unlink()
    for name in ("coordinator", "ada", "carl"):  # who is refused tries for as long as it may
        f.kill(name)
    former = Access.invited(Path(kept))
    with pytest.raises(AMQPError, match="Login was refused"):
        asyncio.run(connected(former))


def waits_for_carl_alone(f: Federation, number: int) -> bool:
    now = now_of(f)
    return (now.get("round"), [*now.get("waiting", ())], now.get("counted")) == (number, ["carl"], ["ada"])


def now_of(f: Federation) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((f.run / "now.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


@pytest.mark.chaos
def test_a_secret_federation_is_joined_by_one_file_or_with_a_key_of_ones_own(
    secured: Secured, parties: Federation, record_property: Callable[[str, object], None]
) -> None:
    """As the README says; `broker secure` is the fixture's. Three workers, each by mutual TLS."""
    f, names, began_at = parties, ("north", "south", "west"), time.monotonic()
    key, own, roster = f.folder / "operator.key", f.folder / "north.key", str(secured.folder / "roster.json")
    secured.fluffle("keygen", str(key))
    secured.fluffle("roster", "add", roster, "north", secured.fluffle("keygen", str(own)).split()[2])
    secured.fluffle("invite", *names, "--dir", str(secured.folder), "--operator", str(key))
    assert [bool(secured.invitation(name).identity) for name in names] == [False, True, True]
    for name in names:
        invited = ("--invite", str(secured.folder / f"{name}.fluffle"), "--data", str(f.folder / "nothing"))
        f.start(name, "worker", str(f.learner), *invited, *(("--identity", str(own)) if name == "north" else ()))
    f.fluffle("init", str(f.learner), str(f.run))
    invitation = ("--invite", str(secured.folder / "coordinator.fluffle"), "--privacy", "secure", "--cohort", "3")
    options = (*invitation, "--rounds", "2", "--clip", "8", "--examples-max", "64", "--gather-s", "60")
    other = str(draw_keys(f.folder / "others", [*names]))
    said = f.fluffle("coordinator", str(f.run), *options, "--roster", other, status=2)
    assert "the roster is signed by another operator: " in said
    f.coordinator(*options, "--roster", roster)
    f.until(lambda: {(name, f"CN={name}", True) for name in names} <= secured.connected())
    assert f.wait("coordinator") == 0
    took_s = time.monotonic() - began_at
    assert [line["secure"]["of"] for line in f.rounds()] == [[*names]] * 2
    assert [line["secure"]["revealed"] for line in f.rounds()] == ["their sum alone"] * 2
    record_property("measured", f"from an operator's key to two secret rounds of three: {took_s:.1f} s")
    for name in names:
        f.kill(name, signal.SIGTERM)
    assert "west is off" in secured.fluffle("revoke", "west", "--dir", str(secured.folder), "--operator", str(key))
    assert sorted(Roster.read(Path(roster)).workers) == ["north", "south"]
    secured.fluffle("revoke", "north", "south", "--dir", str(secured.folder), "--operator", str(key))


async def test_who_is_revoked_is_out_at_once_and_comes_in_again_only_with_another_invitation(
    secured: Secured,
) -> None:
    folder = secured.folder
    securing.invite(folder, "fay")
    securing.apply(folder)
    former = secured.access("fay")
    connection = await connected(former)
    assert securing.revoke(folder, "fay")
    await secured.until(lambda: connection.is_closed or not connection.connected.is_set())
    with pytest.raises(AMQPError, match="Login was refused"):
        await connected(former)
    files, exported = secured.files(), secured.exported()
    assert not securing.revoke(folder, "fay")
    assert (secured.files(), secured.exported()) == (files, exported)
    with pytest.raises(UsageError, match="fay has been revoked: --again invites it"):
        securing.invite(folder, "fay")
    securing.invite(folder, "fay", again=True)
    securing.apply(folder)
    await (await connected(secured.access("fay"))).close()
    with pytest.raises(AMQPError, match="Login was refused"):
        await connected(former)
    securing.revoke(folder, "fay")


def test_the_same_commands_again_change_nothing(secured: Secured) -> None:
    files, exported = secured.files(), secured.exported()
    assert not securing.secure(secured.folder, {})
    assert not securing.secure(secured.folder, {"hosts": ("localhost",), "vhost": "fluffle", "external": False})
    for name in ("ada", "bob"):
        securing.invite(secured.folder, name)
    secured.fluffle("broker", "start", "--dir", str(secured.folder))
    assert secured.files() == files
    assert secured.exported() == exported
    assert {user["name"] for user in json.loads(exported)["users"]}.isdisjoint({"guest", "fluffle"})


async def test_certificates_are_renewed_while_everyone_stays_connected(secured: Secured) -> None:
    before = secured.invitation("ada")
    connection = await connected(secured.access("ada"))
    serial = served(secured)
    securing.secure(secured.folder, {}, renew=True)
    securing.invite(secured.folder, "ada", renew=True)
    Node(secured.folder).ctl("eval", "ssl:clear_pem_cache().")  # which happens by itself every ten seconds
    assert served(secured) != serial
    after = secured.invitation("ada")
    assert (after.ca, after.password, after.broker) == (before.ca, before.password, before.broker)
    assert after.certificate != before.certificate
    assert end_of(after.certificate) >= end_of(before.certificate)
    await (await connected(secured.access("ada"))).close()
    channel = await connection.channel()
    await channel.close()
    await connection.close()


def served(secured: Secured) -> int:
    """The number of the certificate that the broker shows."""
    access = secured.access("bob")
    assert access.tls
    assert access.url.port
    with (
        socket.create_connection(("localhost", access.url.port), timeout=20) as plain,
        access.tls.wrap_socket(plain, server_hostname="localhost") as talk,
    ):
        shown = talk.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


def test_a_broker_that_has_others_of_these_names_is_left_alone(secured: Secured, tmp_path: Path) -> None:
    """Names are the broker's, not a vhost's: two federations of one broker would share their coordinator's login."""
    now, exported = secured.federation, secured.exported()
    pages = now.management.replace("//", f"//operator:{now.parties['operator'].password}@")
    trust = tmp_path / "ca.pem"
    trust.write_text(secured.ca)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(trust))
        with pytest.raises(UsageError, match="users already who are called coordinator, operator"):
            securing.secure(tmp_path / "other", {"vhost": "other", "management": pages})
    assert secured.exported() == exported


@pytest.mark.chaos
async def test_by_certificate_alone_and_another_brokers_pages(tmp_path: Path) -> None:
    """EXTERNAL: no password is anywhere; a revoked certificate, which still holds, is nobody's."""
    first, second = Secured(tmp_path / "first"), Secured(tmp_path / "second")
    try:
        first.fluffle("broker", "secure", str(first.folder), "--external", "--start")
        first.fluffle("invite", "ada", "bob", "--dir", str(first.folder))
        ada = first.access("ada")
        assert first.invitation("ada").password == ""
        assert ada.url.query["auth"] == "EXTERNAL"
        connection = await connected(ada)
        server = [(first.folder / "broker" / f"server.{kind}").read_text() for kind in ("pem", "key")]
        for name, login in (("ada", ada), ("bob", first.access("bob"))):
            with pytest.raises(AMQPError):  # the password of nobody is no password
                await aio_pika.connect(
                    ada.url.with_query("").with_user(name).with_password("x"), ssl_context=login.tls
                )
        first.fluffle("revoke", "ada", "--dir", str(first.folder))
        await first.until(lambda: connection.is_closed or not connection.connected.is_set())
        broker = replace(first.invitation("bob"), certificate=server[0], key=server[1])
        for context in (ada.tls, broker.context()):
            with pytest.raises((AMQPError, ssl.SSLError, OSError)):
                await aio_pika.connect(ada.url, ssl_context=context, timeout=10)
        assert "choose another name" in first.fluffle(
            "invite", "ada", "--again", "--dir", str(first.folder), status=2
        )

        # the same broker, as if it were somebody else's, whose administrator is called root
        first.pages.ask("PUT", "users", "root", body={"password": "a-secret", "tags": "administrator"})
        pages = first.federation.management.replace("//", "//root:a-secret@")
        admin = first.pages
        for name in ("coordinator", "bob"):
            admin.ask("DELETE", "users", name)
        admin.ask("DELETE", "users", "operator")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(first.folder / "broker" / "ca.pem"))
            words = ("--vhost", "second", "--management", pages, "--port", "5671", "--external")
            for _ in range(2):
                second.fluffle("broker", "secure", str(second.folder), *words)
                second.fluffle("invite", "bob", "--dir", str(second.folder))
                exported = second.foreign(pages).ask("GET", "definitions")
            assert {each["name"] for each in exported["users"]} == {"root", "operator", "coordinator", "bob"}
            assert "fluffle.upload.bob" in {each["name"] for each in exported["queues"] if each["vhost"] == "second"}
            second.fluffle("revoke", "bob", "--dir", str(second.folder))
            exported = second.foreign(pages).ask("GET", "definitions")
            assert {each["name"] for each in exported["users"]} == {"root", "operator", "coordinator"}
            assert {each["name"] for each in exported["queues"] if each["vhost"] == "second"} == {"fluffle.dead"}
    finally:
        first.fluffle("broker", "stop", "--dir", str(first.folder))
