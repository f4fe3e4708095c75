"""Certificates for tests: an authority that is made in a moment, and whoever it vouches for."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.invitation import Invitation


class Issued(NamedTuple):
    """A certificate and its private key, as PEM."""

    certificate: str
    key: str


CONF = """
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/broker.pem
ssl_options.keyfile = {folder}/broker.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2
auth_mechanisms.1 = EXTERNAL
auth_mechanisms.2 = PLAIN
ssl_cert_login_from = common_name
"""


def secured(folder: Path, authority: "Authority", port: int) -> str:
    """More lines for a node's rabbitmq.conf: it listens by TLS, for those who have a certificate of the authority."""
    own = authority.issue("localhost", server=True)
    for name, text in (("ca.pem", authority.pem), ("broker.pem", own.certificate), ("broker.key", own.key)):
        (folder / name).write_text(text)
    return CONF.format(port=port, folder=folder)


class Authority:
    """Vouches for a broker and for whoever may come in."""

    def __init__(self, *, days: float = 3650) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the tests' authority")])
        self._days = days
        self.pem = self._signed(self._name, self._key.public_key(), days, ca=True).certificate

    def issue(self, name: str, *, days: float = 365, server: bool = False) -> Issued:
        """A certificate for a party, or for a broker on this machine; it ends in so many days."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key.public_key(), days, server=server).certificate
        packed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Issued(certificate, packed)

    def invite(self, name: str, broker: str, *, days: float = 365, **more: str) -> Invitation:
        """An invitation to `amqps://…`; as a worker, and by certificate, unless `more` says otherwise."""
        issued = self.issue(name, days=days)
        return Invitation(**{  # type: ignore[arg-type]  # what `more` holds is the test's affair
            "name": name, "role": "worker", "broker": broker, "ca": self.pem, "certificate": issued.certificate,
            "key": issued.key, **more,
        })  # fmt: skip

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        days: float,
        *,
        ca: bool = False,
        server: bool = False,
    ) -> Issued:
        use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=7))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
                key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        else:
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if server:
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName("localhost"), here]), critical=False
            )
        return Issued(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode(), "")
