"""The fleet's certificate authority, the server's certificate, and the devices' keys."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedkn.errors import UserError
from fedkn.files import write_atomically
from server.deployment.fleet import Device, Fleet, write_secret

__all__ = [
    "check_device_key",
    "create_authority",
    "create_device_key",
    "create_signing_key",
    "expiry",
    "issue_certificate",
    "issue_device_certificate",
    "public_pem",
    "server_key",
]

AUTHORITY_LIFE = timedelta(days=3650)
CERTIFICATE_LIFE = timedelta(days=825)
# A device whose clock is behind must not find the certificate "not yet valid".
_LEEWAY = timedelta(days=1)


def create_authority(fleet: Fleet) -> None:
    """Make the fleet's certificate authority: a key on P-384, valid for ten years."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkn fleet authority")])
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_secret(fleet.authority_key, _pem(key))
    fleet.authority.write_bytes(certificate.public_bytes(Encoding.PEM))


def issue_certificate(fleet: Fleet, life: timedelta = CERTIFICATE_LIFE) -> None:
    """Make the server's key and certificate, valid for its host, localhost and 127.0.0.1.

    Raises UserError where the authority's key was moved away.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName(_names(fleet.host))
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    certificate = _issued(fleet, key, fleet.host[:64], life=life, usage=usage, names=names)
    write_secret(fleet.certificate_key, _pem(key))
    write_atomically(fleet.certificate, certificate)


def issue_device_certificate(fleet: Fleet, device: Device) -> None:
    """Make the certificate that `device` shows the proxy, and its key, in one file.

    It lasts as long as the authority: it opens the proxy's door alone, and who is let in is decided
    by the device's key, which can be unregistered.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = _issued(fleet, key, device.name, life=AUTHORITY_LIFE, usage=usage)
    write_secret(device.certificate, certificate + _pem(key))


def create_signing_key(fleet: Fleet) -> None:
    """Make the key with which the server signs what it asks of devices: Ed25519."""
    key = ed25519.Ed25519PrivateKey.generate()
    write_secret(
        fleet.signing_key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )


def server_key(fleet: Fleet) -> str:
    """Return the public key of `create_signing_key`, in hexadecimal digits.

    Raises UserError where the private one is not there, or another kind of key.
    """
    try:
        key = load_pem_private_key(fleet.signing_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"'{fleet.signing_key}' cannot be read: {error}") from None
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def expiry(fleet: Fleet) -> datetime:
    """Return when the server's certificate ends (UTC)."""
    certificate = x509.load_pem_x509_certificate(fleet.certificate.read_bytes())
    return certificate.not_valid_after_utc


def create_device_key(private: Path, public: Path, comment: str) -> None:
    """Make a device's key pair: OpenSSH files on P-384, as Flower's node authentication wants."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(line + f" {comment}\n".encode())


def public_pem(public: Path) -> bytes:
    """Return an OpenSSH public key as PEM, which is how the SuperLink keeps it."""
    try:
        key = load_ssh_public_key(public.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"'{public}' is not an OpenSSH public key: {error}") from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def check_device_key(private: Path, public: Path) -> None:
    """Raise UserError if a device's private key is not there, or not the one of the public key."""
    try:
        key = load_ssh_private_key(private.read_bytes(), password=None).public_key()
    except OSError as error:
        raise UserError(
            f"'{private}': {error.strerror}: bring it back, or start the device where it is"
        ) from None
    except (ValueError, TypeError) as error:
        # TypeError: it has a passphrase, which a device without a keyboard cannot give.
        raise UserError(f"'{private}' is not an OpenSSH private key: {error}") from None
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != public_pem(public):
        raise UserError(
            f"'{private}' is not the key that the server knows ('{public}'): bring back the pair "
            "that fedkn deploy init made"
        )


def _issued(
    fleet: Fleet,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    *,
    life: timedelta,
    usage: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName | None = None,
) -> bytes:
    """Return a certificate of the fleet's authority for `key`, in PEM."""
    if not fleet.authority_key.is_file():
        raise UserError(
            f"'{fleet.authority_key}' is not here: bring it back to make certificates with it"
        )
    authority = x509.load_pem_x509_certificate(fleet.authority.read_bytes())
    signer = load_pem_private_key(fleet.authority_key.read_bytes(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UserError(f"'{fleet.authority_key}' is not the key that fedkn deploy init made")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, authority.subject, key.public_key(), life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA384()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # A certificate made to be expired must still begin before it ends.
        .not_valid_before(min(now, now + life) - _LEEWAY)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "localhost", "127.0.0.1")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
