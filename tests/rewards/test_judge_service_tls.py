"""srpo.rewards.judge_service against a real TLS server with a certificate that nobody has signed, and the key over plain http."""

from __future__ import annotations

import ipaddress
import ssl
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from judge_calls import KEY, SETTINGS
from judge_server import chat, serving

from srpo.rewards.judge_service import JudgeService, JudgeServiceError


def write_certificate(path: Path) -> None:
    """A self-signed certificate for the loopback address, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[tuple[int, list[str]]]:
    """(port of a TLS server that nobody vouches for, the keys that it was given)"""
    write_certificate(tmp_path / "server.pem")
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given.append(self.headers.get("Authorization", ""))
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None: ...

    class Server(HTTPServer):
        def handle_error(self, request: object, client_address: object) -> None: ...  # the client ends the handshake

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server.server_address[1], given
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("scheme", ["https", "HTTPS", "Https", "hTTPs"])
def test_a_certificate_that_nobody_signed_is_refused(scheme: str, stranger: tuple[int, list[str]]) -> None:
    port, given = stranger
    service = JudgeService(replace(SETTINGS, judge_url=f"{scheme}://127.0.0.1:{port}/v1", judge_retries=0), api_key=KEY)
    try:
        with pytest.raises(JudgeServiceError, match=r"(?i)certificate") as caught:
            service.start()
        assert KEY not in str(caught.value) and not given
    finally:
        service.close()


def test_a_key_over_plain_http_to_another_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(url: str, key: str) -> None:
        service = JudgeService(replace(SETTINGS, judge_url=url), api_key=key)
        try:
            service.start()
        finally:
            service.close()

    with serving(lambda request: chat("yes")) as server:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            started(server.url, KEY)  # this machine
        monkeypatch.setattr("srpo.rewards.judge_service.is_loopback", lambda url: False)
        with pytest.warns(RuntimeWarning, match="sent over http, which others on the way can read"):
            started(server.url, KEY)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            started(server.url, "")
