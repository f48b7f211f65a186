"""The way to the server: TCP, TLS with the fleet's certificate, and the clocks."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from cryptography import x509

from clients.device.finding import Finding
from clients.device.settings import Device

__all__ = ["check_connection"]

_SECONDS = 5.0
# Node authentication refuses what was signed so many seconds ahead of the server's clock, or behind
# it: Flower's SYSTEM_TIME_TOLERANCE, and that with TIMESTAMP_TOLERANCE.
_AHEAD, _BEHIND = 5.0, 305.0
# Date is in whole seconds, of which servers take note once a second: by so much it misleads.
_BLUR = 1.0


def check_connection(device: Device) -> Iterator[Finding]:
    """Yield what is found on the way to the server; beyond the first failure there is nothing."""
    try:
        socket.create_connection((device.host, device.port), timeout=_SECONDS).close()
    except OSError as error:
        fix = "start the server (fedkn deploy up), or mend server in device.toml, DNS or firewall"
        yield Finding("server", "fail", f"{device.server}: {error.strerror or error}", fix)
        return
    yield Finding("server", "ok", f"{device.server} answers")
    try:
        context = ssl.create_default_context(cafile=str(device.ca))
        context.load_cert_chain(device.certificate)
    except OSError as error:
        message = f"cannot read '{device.ca}' or '{device.certificate}': {error.strerror or error}"
        yield Finding("TLS", "fail", message, "copy the fleet's folder of this device")
        return
    try:
        status, date, now = _answer(device, context)
    except ssl.SSLCertVerificationError as error:
        yield _unverified(device, error)
        return
    except ssl.SSLError as error:
        fix = "let the server speak TLS (fedkn deploy up); is it another service's port?"
        yield Finding("TLS", "fail", f"no TLS at {device.server}: {error.reason}", fix)
        return
    except (OSError, http.client.HTTPException) as error:
        fix = "is it the port of another service? See server in device.toml"
        yield Finding("TLS", "fail", f"no HTTPS at {device.server}: {error!r}", fix)
        return
    yield Finding("TLS", "ok", f"the certificate is {device.host}'s, signed by {device.ca.name}")
    if status == http.client.BAD_REQUEST:
        message = f"the server does not take '{device.certificate.name}'"
        yield Finding("certificate", "fail", message, "copy the fleet's folder of this device")
    yield _clock(date, now)


def _answer(device: Device, context: ssl.SSLContext) -> tuple[int, str | None, float]:
    """Return the status and the Date header of the server's answer, and this device's time then.

    The latter in seconds since 1970: halfway between question and answer.
    """
    connection = http.client.HTTPSConnection(
        device.host, device.port, timeout=_SECONDS, context=context
    )
    try:
        connection.connect()
        asked = time.time()
        connection.request("HEAD", "/")
        answer = connection.getresponse()
        return answer.status, answer.getheader("Date"), (asked + time.time()) / 2
    finally:
        connection.close()


def _clock(date: str | None, now: float) -> Finding:
    name = "clock"
    window = f"{_AHEAD:.0f} s ahead or {_BEHIND:.0f} s behind, messages are refused"
    if not date:
        fix = f"compare the clocks yourself: {window}"
        return Finding(name, "warn", "the server does not tell its time", fix)
    try:
        skew = now - parsedate_to_datetime(date).timestamp() - _BLUR
    except ValueError:
        return Finding(name, "warn", f"the server's time cannot be read: {date!r}")
    if abs(skew) <= _BLUR:
        return Finding(name, "ok", "as the server's, to a second")
    message = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    fix = f"set the clock (timedatectl set-ntp true): {window}"
    if not _BLUR - _BEHIND < skew < _AHEAD - _BLUR:
        return Finding(name, "fail", message, fix)
    if not -_BEHIND / 5 < skew < _AHEAD / 2:
        return Finding(name, "warn", message, fix)
    return Finding(name, "ok", message)


def _unverified(device: Device, error: ssl.SSLCertVerificationError) -> Finding:
    # OpenSSL's X509_V_ERR_…: CERT_NOT_YET_VALID, CERT_HAS_EXPIRED, HOSTNAME_MISMATCH and
    # IP_ADDRESS_MISMATCH.
    if error.verify_code in (9, 10):
        valid = _validity(device)
        if error.verify_code == 9:
            fix = "set this device's clock (timedatectl set-ntp true)"
            return Finding("TLS", "fail", f"the server's certificate is not valid yet{valid}", fix)
        fix = "renew it on the server (fedkn deploy up); is this device's clock right?"
        return Finding("TLS", "fail", f"the server's certificate has expired{valid}", fix)
    if error.verify_code in (62, 64):
        fix = "use the name given to fedkn deploy init --host in device.toml's server"
        return Finding("TLS", "fail", f"the certificate is not for '{device.host}'", fix)
    fix = f"copy the fleet's ca.crt to '{device.ca}'; if it is right, this is not your server"
    return Finding("TLS", "fail", f"not signed by '{device.ca.name}': {error.verify_message}", fix)


def _validity(device: Device) -> str:
    try:
        pem = ssl.get_server_certificate((device.host, device.port), timeout=_SECONDS)
    except OSError:
        return ""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f" (valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC)"
