"""The guard alone: which address a name leads to, and whose certificate is taken."""

import shutil
import socket
import ssl
import subprocess
import time
import tracemalloc
from contextlib import contextmanager

import pytest
from loopback import FETCH, Web, drip, image

from unifork.sources.url_lists import FetchRules
from unifork.sources.web import guard as guard_module
from unifork.sources.web.guard import Guard
from unifork.sources.web.permission import Refused, target_of


@pytest.fixture
def names(monkeypatch):
    """Name -> addresses of the resolver, the next list at each question, the last for ever."""
    addresses: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def ask(host, port, *args, **options):
        if host not in addresses:
            return real(host, port, *args, **options)
        found = addresses[host].pop(0) if len(addresses[host]) > 1 else addresses[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    return addresses


@contextmanager
def refused(reason: str, detail: str | None = None):
    """Expect that a URL is refused."""
    with pytest.raises(Refused, match=detail) as caught:
        yield
    assert caught.value.reason == reason


def test_a_name_that_changes_its_address_is_met_at_the_one_that_was_checked(web, names, monkeypatch):
    other = Web("127.0.0.2", int(web.root.rpartition(":")[2]))
    web.pages["/a.png"] = other.pages["/a.png"] = image("PNG")
    names |= {"turning.example": [["127.0.0.1"], ["127.0.0.2"]], "mixed.example": [["127.0.0.2", "127.0.0.1"]]}
    names["bad.example"] = [["127.0.0.2", "10.0.0.1", "169.254.169.254"]]
    guard = Guard(FetchRules.model_validate(FETCH), 8)
    for host in ("turning", "mixed"):
        assert guard.get(target_of(web.root.replace("127.0.0.1", f"{host}.example") + "/a.png")) == web.pages["/a.png"]
    with refused("forbidden_address", r"bad\.example: 127\.0\.0\.2 is loopback, 10\.0\.0\.1 is private"):
        guard.get(target_of(web.root.replace("127.0.0.1", "bad.example") + "/a.png"))
    assert (web.hits["/a.png"], other.hits.total()) == (2, 0)
    monkeypatch.setattr("unifork.sources.web.guard.REMEMBERED_SECONDS", 0.0)  # asked again, and checked again
    with refused("forbidden_address"):
        guard.get(target_of(web.root.replace("127.0.0.1", "turning.example") + "/a.png"))
    other.shutdown()
    other.server_close()
    assert other.hits.total() == 0


@pytest.mark.parametrize("strict", [True, False])
def test_a_negative_chunk_of_gigabytes_is_not_read(web, monkeypatch, strict):
    """By the line that says -1; and, were that read as `http.client` does, by the bytes of the connection."""

    def endless(page):
        page.protocol_version = "HTTP/1.1"
        page.send_response(200)
        page.send_header("Transfer-Encoding", "chunked")
        page.end_headers()
        page.wfile.write(b"-1\r\n")
        for _ in range(3000):
            page.wfile.write(bytes(10**6))

    web.pages["/a.png"] = endless
    if not strict:
        monkeypatch.delattr(guard_module._Response, "_read_next_chunk_size")
    guard = Guard(FetchRules.model_validate({**FETCH, "timeout_seconds": 20}), 8)
    tracemalloc.start()
    with refused(*("bad_answer", "a chunk of size b'-1'") if strict else ("too_large",)):
        guard.get(target_of(web.root + "/a.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, f"{peak / 1e6:.0f} MB"


def test_a_connection_on_which_nothing_comes_ends_before_its_time(web, monkeypatch):
    monkeypatch.setattr(guard_module, "IDLE_SECONDS", 0.2)
    web.pages["/silent.png"] = lambda page: web.gate.wait(5)
    web.pages["/slow.png"] = lambda page: drip(page, b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\n", b"x")
    guard = Guard(FetchRules.model_validate({**FETCH, "timeout_seconds": 20}), 8)
    started = time.monotonic()
    with refused("timeout"):
        guard.get(target_of(web.root + "/silent.png"))
    assert time.monotonic() - started < 2
    assert guard.get(target_of(web.root + "/slow.png")) == b"x" * 8
    web.gate.set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_checked_for_the_name_and_not_for_the_address(web, names, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=good.example"
    alternative = ["-addext", "subjectAltName=DNS:good.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *alternative], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    web.pages["/a.png"] = image("PNG")
    names |= {"good.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    guard = Guard(FetchRules.model_validate({**FETCH, "timeout_seconds": 5}), 8)
    port = web.root.rpartition(":")[2]
    with refused("tls_failed", r"^good\.example.*self-signed"):
        guard.get(target_of(f"https://good.example:{port}/a.png"))
    guard.tls.load_verify_locations(certificate)
    assert guard.get(target_of(f"https://good.example:{port}/a.png")) == web.pages["/a.png"]
    with refused("tls_failed", r"^other\.example"):
        guard.get(target_of(f"https://other.example:{port}/a.png"))
