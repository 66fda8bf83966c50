"""A certificate for simulated providers, which signs itself: whoever sends to them is told to trust it, and nothing else does."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ops.dev.secretsfile import write_private

VALID_DAYS: Final = 365
"""It is made anew each time a stack starts."""

_NAME: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Seamark's simulated providers")])


def write_certificate(certificate_file: Path, key_file: Path, names: Sequence[str] = ()) -> None:
    """Make a certificate for this machine (`127.0.0.1`, `localhost`), and its key, which only its owner can read.

    `names`: what else this machine is called by those who trust it.
    """
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    called = x509.SubjectAlternativeName([*map(x509.DNSName, ("localhost", *names)), loopback])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_NAME)
        .issuer_name(_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a clock may be a little behind
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(called, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(key_file, pem.decode())
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))


def server_tls(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """TLS of a simulator with this certificate. Each needs a context of its own: faults change it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    return context
