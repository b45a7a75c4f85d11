"""A web of two hosts on the loopback: 127.0.0.1 answers in every good and bad way, nobody may contact 127.0.0.2."""

import gzip
import io
import struct
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

FETCH = {
    "allow_addresses": ["127.0.0.1/32"],
    "timeout_seconds": 1.0,
    "attempts": 2,
    "backoff_seconds": 0.05,
    "max_bytes": 300_000,
    "max_pixels": 1_000_000,
}
"""Rules of a card under which the loopback may be fetched from, quickly."""
ROBOTS = b"User-agent: *\nDisallow: /private/\nDisallow: /*.secret$\n"


def image(form: str, seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded image of noise, about as large as its pixels."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(out, form, **({"lossless": True} if form == "WEBP" else {}))
    return out.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A small PNG that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side))) + chunk(b"IEND", b"")
    )


class Web(ThreadingHTTPServer):
    """Serves `pages`: path -> bytes, or a function that writes the answer by itself."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str, port: int = 0) -> None:
        super().__init__((address, port), Page)
        self.root = f"http://{address}:{self.server_address[1]}"
        self.pages: dict[str, object] = {}
        self.hits: Counter[str] = Counter()
        self.now: Counter[str] = Counter()
        self.most = 0
        self.gate = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients hang up on purpose."""


class Page(BaseHTTPRequestHandler):
    """One request."""

    server: Web

    def do_GET(self) -> None:
        server, page = self.server, self.server.pages.get(self.path)
        with server.lock:
            server.hits[self.path] += 1
            server.now["all"] += 1
            server.most = max(server.most, server.now["all"])
        self.inside = True
        try:
            if callable(page):
                page(self)
            else:
                self.answer(200 if page is not None else 404, page or b"")
        finally:
            self.leave()

    def leave(self) -> None:
        """Count this request as over: before its client can know, who may send the next at once."""
        with self.server.lock:
            self.server.now["all"] -= self.inside
            self.inside = False

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer; underscores of header names become dashes."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.leave()
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def drip(page: Page, first: bytes, drop: bytes) -> None:
    """Write without end, a little every twentieth of a second."""
    page.wfile.write(first)
    for _ in range(400):
        page.wfile.write(drop)
        page.wfile.flush()
        time.sleep(0.05)


def pages(web: Web, forbidden: str) -> dict[str, tuple[str, object]]:
    """Every kind of answer: path -> (class of its row, page)."""
    png, jpeg, webp = image("PNG", 1), image("JPEG", 2), image("WEBP", 3)

    def second_time(page: Page) -> None:
        page.answer(*((503,) if web.hits[page.path] < 2 else (200, png)))

    def huge(page: Page) -> None:
        page.send_response(200)
        page.end_headers()
        for _ in range(64):
            page.wfile.write(bytes(16 * 1024))

    def chunked(page: Page, data: bytes) -> None:
        page.protocol_version = "HTTP/1.1"
        page.send_response(200)
        page.send_header("Transfer-Encoding", "chunked")
        page.end_headers()
        page.wfile.write(data)

    def hinted(page: Page) -> None:
        for status in (102, 103, 103):
            page.send_response_only(status)
            page.send_header("Link", "</style.css>; rel=preload")
            page.end_headers()
        page.answer(200, png)

    def zipped(body: bytes):
        return lambda page: page.answer(200, body, Content_Encoding="gzip")

    def cut(page: Page) -> None:
        page.answer(200, png[:200], Content_Length=str(len(png)))

    def to(place: str):
        return lambda page: page.answer(302, Location=place)

    return {
        "/good.png": ("ok", png),
        "/good.jpg": ("ok", jpeg),
        "/good.webp": ("ok", webp),
        "/gray%20%C3%A4.png": ("ok", png),
        "/moved.png": ("ok", to("/good.png")),
        "/second-time.png": ("ok", second_time),
        "/for-others.png": ("ok", lambda page: page.answer(200, png, X_Robots_Tag="otherbot: noai")),
        "/gone.png": ("http_404", None),
        "/busy.png": ("http_503", lambda page: page.answer(503)),
        "/page.png": ("not_an_image", b"<!doctype html><html><body>not found</body></html>"),
        "/empty.png": ("empty", b""),
        "/cut-file.png": ("undecodable", png[:-500]),
        "/cut-file.jpg": ("undecodable", jpeg[: len(jpeg) // 2]),
        "/cut-line.png": ("truncated", cut),
        "/chunks.png": ("ok", lambda page: chunked(page, b"%x\r\n%s\r\n0\r\n\r\n" % (len(png), png))),
        "/cut-chunk.png": ("truncated", lambda page: chunked(page, b"%x\r\n%s" % (len(png), png[:500]))),
        "/no-last-chunk.png": ("truncated", lambda page: chunked(page, b"%x\r\n%s\r\n" % (len(png), png))),
        **{
            f"/chunk{number}.png": ("bad_answer", lambda page, size=size: chunked(page, size + b"\r\n" + png))
            for number, size in enumerate((b"size", b"-5", b"-1", b"0x%x" % len(png), b"+5", b"1_0", b"", b"f" * 99))
        },
        "/endless-chunk.png": ("bad_answer", lambda page: chunked(page, b"-1\r\n" + bytes(10**6))),
        "/large-chunk.png": ("too_large", lambda page: chunked(page, b"%x\r\n" % 10**15 + bytes(10**6))),
        "/early-hints.png": ("ok", hinted),
        "/zipped.png": ("ok", zipped(gzip.compress(png))),
        "/zipped-cut.png": ("truncated", zipped(gzip.compress(png)[:-30])),
        "/zipped-bomb.png": ("too_large", zipped(gzip.compress(bytes(10**8)))),
        "/not-zipped.png": ("bad_answer", zipped(png)),
        "/huge.png": ("too_large", huge),
        "/announced.png": ("too_large", lambda page: page.answer(200, b"x", Content_Length=str(10**12))),
        "/bomb.png": ("too_many_pixels", bomb()),
        "/here.png": ("forbidden_address", to(f"{forbidden}/a")),
        "/metadata.png": ("forbidden_address", to("http://169.254.169.254/latest/meta-data/")),
        "/inside.png": ("forbidden_address", to(f"{forbidden}/good.png")),
        "/mapped.png": ("forbidden_address", to(f"http://[::ffff:127.0.0.1]:{web.server_address[1]}/good.png")),
        "/file.png": ("bad_url", to("file:///etc/passwd")),
        "/broken.png": ("bad_url", to("http://[bad")),
        "/loop.png": ("too_many_redirects", to("/loop.png")),
        "/reserved.png": ("opted_out", lambda page: page.answer(200, png, X_Robots_Tag="noai, noimageai")),
        "/reserved-twice.png": (
            "opted_out",
            lambda page: page.answer(200, png, **{"X-Robots-Tag": "all", "x-robots-tag": "unifork: noai"}),
        ),
        "/tdm.png": ("opted_out", lambda page: page.answer(200, png, TDM_Reservation="1")),
        "/private/a.png": ("robots_denied", png),
        "/b.secret": ("robots_denied", png),
        "/x/../private/a.png": ("robots_denied", png),
        "/%70rivate/a.png": ("robots_denied", png),
        "/to-private.png": ("robots_denied", to("/private/a.png")),
        "/slow-body.png": ("timeout", lambda page: drip(page, b"HTTP/1.0 200 OK\r\n\r\n" + png[:100], b"x")),
        "/slow-headers.png": ("timeout", lambda page: drip(page, b"HTTP/1.0 200 OK\r\n", b"X-A: b\r\n")),
        "/slow-line.png": ("timeout", lambda page: drip(page, b"HTTP/1.0 200 OK\r\nX-A: ", b"b")),
        "/not-http.png": ("bad_answer", lambda page: page.wfile.write(b"SSH-2.0-OpenSSH\r\n")),
        "/hangs-up.png": ("connection_failed", lambda page: None),
    }


def elsewhere(forbidden: str) -> dict[str, str]:
    """URLs that never lead to a request: URL -> class of its row."""
    port = forbidden.rpartition(":")[2]
    return {
        f"{forbidden}/good.png": "forbidden_address",
        f"http://2130706434:{port}/good.png": "forbidden_address",
        f"http://0x7f.0.0.2:{port}/good.png": "forbidden_address",
        f"http://[::1]:{port}/good.png": "forbidden_address",
        f"http://[::ffff:127.0.0.2]:{port}/good.png": "forbidden_address",
        "http://169.254.169.254/latest/meta-data/": "forbidden_address",
        "https://10.0.0.1/a.png": "forbidden_address",
        "file:///etc/passwd": "bad_url",
        "ftp://127.0.0.1/a.png": "bad_url",
        "data:image/png;base64,AAAA": "bad_url",
        "not a url": "bad_url",
        "http://": "bad_url",
        "http://a\x00b/c.png": "bad_url",
    }
