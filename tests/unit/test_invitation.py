"""The invitation's file, the URLs that may be used without one, and until when it holds."""

import errno
import logging
import ssl
import tempfile
from dataclasses import FrozenInstanceError, replace
from datetime import timedelta
from pathlib import Path

import pytest

from broker.errors import UsageError
from broker.invitation import Access, Invitation
from tests.certificates import Authority

AUTHORITY = Authority()
BROKER = "amqps://broker.example:5671/hospital"
SECRET = "pass/word"  # noqa: S105 - it opens nothing
ADA = AUTHORITY.invite("ada", BROKER, operator="ab" * 32, identity="cd" * 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ADA.write(tmp_path / "ada.fluffle")
    return tmp_path / "ada.fluffle"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_what_was_written_is_read_and_only_its_owner_reads_it(file: Path) -> None:
    assert Invitation.read(file) == ADA
    assert file.stat().st_mode & 0o777 == 0o600
    assert [other.name for other in file.parent.iterdir()] == [file.name]
    ADA.write(file)
    assert Invitation.read(file) == ADA


def test_it_cannot_be_changed_and_does_not_show_its_secrets(file: Path) -> None:
    with pytest.raises(FrozenInstanceError):
        ADA.name = "bob"  # type: ignore[misc]
    secret = replace(ADA, password=SECRET)
    secret.write(file)
    shown = repr(secret) + repr(Access.invited(file))
    assert not any(word in shown for word in (SECRET, "PRIVATE", ADA.identity))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("format = 1", "format = 2", "is no invitation of format 1"),
        ("format = 1\n", "", "is no invitation of format 1"),
        ("format = 1", "format =", "is not TOML"),
        ('name = "ada"', 'name = "Ada Lovelace"', "is no name: a name is"),
        ('name = "ada"', "", "damaged .name: "),
        ('role = "worker"', 'role = "king"', "damaged .role: "),
        ("amqps:", "amqp:", "broker must look like amqps://HOST:PORT/VHOST"),
        ("amqps://", "amqps://u:secret@", "broker must look like amqps://HOST:PORT/VHOST"),
        (":5671", ":99999", "broker must look like"),
        ("-----BEGIN CERT", "BEGIN CERT", "damaged .ca: "),
        ("abab", "xyz", "damaged .operator: "),
        ("format = 1", "format = 1\nmore = 2", "damaged .more: "),
    ],
)
def test_what_is_wrong_in_it_is_said_without_its_secrets(file: Path, old: str, new: str, said: str) -> None:
    change(file, old, new)
    with pytest.raises(UsageError, match=said) as told:
        Invitation.read(file)
    assert not any(word in str(told.value) for word in ("secret", "PRIVATE", ADA.identity))


def test_one_that_others_may_read_or_that_is_not_there_is_refused(file: Path) -> None:
    file.chmod(0o640)
    with pytest.raises(UsageError, match=f"others may read {file}, and it holds a secret: chmod 600"):
        Invitation.read(file)
    file.chmod(0o600)
    with pytest.raises(UsageError, match=r"cannot be read: No such file"):
        Invitation.read(file.with_name("bob.fluffle"))


def test_whoever_is_invited_logs_in_by_certificate_or_password_over_checked_tls(file: Path) -> None:
    access = Access.invited(file, "worker")
    assert (str(access.url), access.user, access.vouched) == (
        "amqps://ada@broker.example:5671/hospital?auth=EXTERNAL",
        "ada",
        True,
    )
    assert access.tls is not None
    assert access.tls.check_hostname
    assert access.tls.verify_mode is ssl.CERT_REQUIRED
    assert access.tls.minimum_version is ssl.TLSVersion.TLSv1_2
    assert all("PSK" not in each["name"] and "CBC" not in each["name"] for each in access.tls.get_ciphers())
    replace(ADA, password=SECRET).write(file)
    assert str(Access.invited(file).url) == "amqps://ada:pass%2Fword@broker.example:5671/hospital"


def test_one_that_does_not_fit_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="invites ada as a worker, not as a coordinator"):
        Access.invited(file, "coordinator")
    replace(ADA, key=AUTHORITY.issue("ada").key).write(file)
    with pytest.raises(UsageError, match=r"cannot be used .KEY_VALUES_MISMATCH"):
        Access.invited(file)
    replace(ADA, certificate="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").write(file)
    with pytest.raises(UsageError, match=r"cannot be used .no PEM"):
        Access.invited(file)
    AUTHORITY.invite("ada", BROKER, days=-1).write(file)
    with pytest.raises(
        UsageError,
        match=r"has ended on 2.*, and this machine's clock says 2.*: ask whoever runs the federation for a new one",
    ):
        Access.invited(file)


def test_a_disk_without_room_for_a_certificate_does_not_end_whoever_renews_it(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access.invited(file)
    ADA.write(file)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert access.renewed().tls is access.tls
    assert "going on with the invitation as it was: " in caplog.text
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("days", [20, 365])
def test_its_end_is_told_a_month_before_and_may_be_the_authoritys(file: Path, days: int) -> None:
    Authority(days=days).invite("ada", BROKER, days=400).write(file)
    access = Access.invited(file)
    assert access.until is not None
    assert not access.expiry(access.until - timedelta(days=31))
    said = access.expiry(access.until - timedelta(days=12, seconds=-1))
    assert f"ends on {access.until:%Y-%m-%d}, in 11 days" in said
    assert bool(access.expiry()) is (days < 30)
    assert not Access.at("amqp://localhost").expiry()


def test_a_file_that_has_changed_is_read_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    access = Access.invited(file)
    assert access.renewed() is access
    AUTHORITY.invite("ada", BROKER, days=500).write(file)
    fresh = access.renewed()
    assert fresh.until is not None
    assert access.until is not None
    assert fresh.until - access.until > timedelta(days=100)
    assert fresh.tls is not access.tls
    assert "is another one by now, until" in caplog.text


@pytest.mark.parametrize("how", ["broken", "gone", "someone else's", "ended"])
def test_a_change_for_the_worse_is_said_once_and_the_former_stays(
    file: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access.invited(file)
    if how == "broken":
        file.write_text("format =")
    elif how == "gone":
        file.unlink()
    else:
        AUTHORITY.invite("ada" if how == "ended" else "bob", BROKER, days=-1 if how == "ended" else 9).write(file)
    kept = access.renewed().renewed()
    assert (kept.user, kept.tls, kept.until) == ("ada", access.tls, access.until)
    assert sum("going on with the invitation as it was" in each.message for each in caplog.records) == 1
    ADA.write(file)
    assert kept.renewed().tls is not access.tls


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.5.4.3:99", "[::1]"])
def test_this_machine_may_be_reached_in_the_open(host: str) -> None:
    access = Access.at(f"amqp://u:p@{host}/v")
    assert (access.user, access.tls, access.vouched, access.file) == ("u", None, False, None)
    assert access.url.port == (99 if ":99" in host else 5672)


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.1", "localhost.example", "[2001:db8::1]"])
def test_another_machine_is_reached_by_tls_unless_one_insists(host: str) -> None:
    for url in (f"amqp://u:secret@{host}/", f"amqps://u:secret@{host}/?no_verify_ssl=1"):
        with pytest.raises(
            UsageError, match=r"is another machine, .*: use an amqps:// URL or an invitation, or"
        ) as told:
            Access.at(url)
        assert "secret" not in str(told.value)
        assert Access.at(url, insecure=True).url.host
    access = Access.at(f"amqps://u:secret@{host}/")
    assert access.url.port == 5671
    assert access.tls is not None
    assert access.tls.check_hostname


def test_certificates_in_a_url_are_used_or_said_to_be_unusable(tmp_path: Path) -> None:
    ca, own = tmp_path / "ca.pem", tmp_path / "ada.pem"
    ca.write_text(AUTHORITY.pem)
    own.write_text(ADA.certificate + ADA.key)
    access = Access.at(f"amqps://broker.example/?cafile={ca}&certfile={own}")
    assert access.tls is not None
    assert len(access.tls.get_ca_certs()) == 1
    with pytest.raises(UsageError, match="the certificates that --broker names cannot be used: No such file"):
        Access.at(f"amqps://broker.example/?cafile={ca}.none")
