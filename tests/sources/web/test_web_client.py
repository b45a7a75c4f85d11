"""The client alone: which address a name leads to, and whose certificate is taken."""

import shutil
import socket
import ssl
import subprocess

import pytest
from loopback import FETCH, Web, image

from unifork.sources.url_lists import FetchRules
from unifork.sources.web.client import Client, Refused


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


def test_a_name_that_changes_its_address_is_met_at_the_one_that_was_checked(web, names, monkeypatch):
    other = Web("127.0.0.2", int(web.root.rpartition(":")[2]))
    web.pages["/a.png"] = other.pages["/a.png"] = image("PNG")
    names |= {"turning.example": [["127.0.0.1"], ["127.0.0.2"]], "mixed.example": [["127.0.0.2", "127.0.0.1"]]}
    names["bad.example"] = [["127.0.0.2", "10.0.0.1", "169.254.169.254"]]
    client = Client(FetchRules.model_validate(FETCH), 8)
    for host in ("turning", "mixed"):
        assert client.get(web.root.replace("127.0.0.1", f"{host}.example") + "/a.png") == web.pages["/a.png"]
    with pytest.raises(Refused, match=r"bad\.example: 127\.0\.0\.2 is loopback, 10\.0\.0\.1 is private"):
        client.get(web.root.replace("127.0.0.1", "bad.example") + "/a.png")
    assert (web.hits["/a.png"], other.hits.total()) == (2, 0)
    monkeypatch.setattr("unifork.sources.web.client.REMEMBERED_SECONDS", 0.0)  # asked again, and checked again
    with pytest.raises(Refused, match="forbidden_address"):
        client.get(web.root.replace("127.0.0.1", "turning.example") + "/a.png")
    other.shutdown()
    other.server_close()
    assert other.hits.total() == 0


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
    client = Client(FetchRules.model_validate({**FETCH, "timeout_seconds": 5}), 8)
    port = web.root.rpartition(":")[2]
    with pytest.raises(Refused, match=r"tls_failed: good\.example.*self-signed"):
        client.get(f"https://good.example:{port}/a.png")
    client.tls.load_verify_locations(certificate)
    assert client.get(f"https://good.example:{port}/a.png") == web.pages["/a.png"]
    with pytest.raises(Refused, match=r"tls_failed: other\.example"):
        client.get(f"https://other.example:{port}/a.png")
