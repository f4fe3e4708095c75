"""Certificates of a federation: its authority, and whoever that vouches for.

Knows X.509. Does not know who takes part, nor where keys are kept. Keys are on the curve P-256, signatures
ECDSA with SHA-256. A certificate is for one use: a party's cannot pass for a broker's, nor the other way round.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.invitation import address_of

AUTHORITY_DAYS, DAYS = 3650, 365
SLACK = timedelta(hours=1)
"""So far the clocks of those who check a certificate may be behind."""


class Issued(NamedTuple):
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str


def belong_together(issued: Issued) -> bool:
    """Whether these are a certificate and its key, and both undamaged."""
    try:
        public = x509.load_pem_x509_certificate(issued.certificate.encode()).public_key()
        return load_pem_private_key(issued.key.encode(), None).public_key() == public
    except (ValueError, TypeError):
        return False


def end_of(certificate: str) -> datetime:
    """When a certificate ends."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def hosts_of(certificate: str) -> set[str]:
    """The host names and addresses that a broker's certificate is for."""
    found = x509.load_pem_x509_certificate(certificate.encode()).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def _host(host: str) -> x509.GeneralName:
    address = address_of(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def issue(by: Issued | None, name: str, *, hosts: Sequence[str] = ()) -> Issued:
    """A certificate for a party called `name`; or, with host names and addresses, for a broker that answers there.

    It ends no later than the authority that it is `by`. By none it is an authority of its own, which vouches for
    others, and for no further authorities.
    """
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer, end_at = subject, key, now + timedelta(days=AUTHORITY_DAYS)
    if by is not None:
        above = x509.load_pem_x509_certificate(by.certificate.encode())
        above_key = load_pem_private_key(by.key.encode(), None)
        assert isinstance(above_key, ec.EllipticCurvePrivateKey)
        issuer, signer = above.subject, above_key
        end_at = min(now + timedelta(days=DAYS), above.not_valid_after_utc)
    usage = x509.KeyUsage(
        digital_signature=by is not None, key_cert_sign=by is None, crl_sign=by is None, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(end_at)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=0 if by is None else None), critical=True)
        .add_extension(usage, critical=True)
    )
    if by is not None:
        use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        whose = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        builder = builder.add_extension(whose, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    packed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Issued(builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM).decode(), packed)
