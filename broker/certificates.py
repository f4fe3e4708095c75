"""Certificates of a federation: its authority, and whoever that vouches for.

Knows X.509. Does not know who takes part, nor where keys are kept. Keys are on the curve P-256, signatures
ECDSA with SHA-256. A certificate is for one use: a party's cannot pass for a broker's, nor the other way round.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS, DAYS = 3650, 365
SLACK = timedelta(hours=1)
"""So far the clocks of those who check a certificate may be behind."""


class Issued(NamedTuple):
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str


def authority(name: str) -> Issued:
    """An authority of its own, which vouches for others and for no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(name)
    builder = (
        _begun(subject, subject, key.public_key(), datetime.now(UTC) + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return _sealed(builder, key, key)


def issue(by: Issued, name: str, *, hosts: Sequence[str] = ()) -> Issued:
    """A certificate for a party called `name`; or, with host names and addresses, for a broker that answers there.

    It ends no later than the authority.
    """
    above = x509.load_pem_x509_certificate(by.certificate.encode())
    above_key = load_pem_private_key(by.key.encode(), None)
    assert isinstance(above_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    end_at = min(datetime.now(UTC) + timedelta(days=DAYS), above.not_valid_after_utc)
    builder = (
        _begun(_named(name), above.subject, key.public_key(), end_at)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above_key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return _sealed(builder, key, above_key)


def end_of(certificate: str) -> datetime:
    """When a certificate ends."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def hosts_of(certificate: str) -> set[str]:
    """The host names and addresses that a broker's certificate is for."""
    found = x509.load_pem_x509_certificate(certificate.encode()).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end_at: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - SLACK)
        .not_valid_after(end_at)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _sealed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey
) -> Issued:
    packed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Issued(builder.sign(by, hashes.SHA256()).public_bytes(Encoding.PEM).decode(), packed)
