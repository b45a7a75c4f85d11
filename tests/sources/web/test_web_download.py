"""The download stage against a server that answers in every good and bad way."""

import socket
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import FETCH, Web, bomb, elsewhere, image, pages
from tiny import REPOSITORY, filter_here

from unifork import sources
from unifork.config import Card, WebAccess, load_card, parse
from unifork.config.card import Source as CardSource
from unifork.errors import ConfigError, DataError
from unifork.experiments.followed import followed
from unifork.sources import download_job
from unifork.sources.url_lists import FetchRules, UrlList
from unifork.sources.web.download import WEB_VERSION, Download


@pytest.fixture
def forbidden():
    server = Web("127.0.0.2")
    server.pages["/good.png"] = image("PNG")
    yield server
    assert not server.hits, "an address outside allow_addresses was contacted"
    server.shutdown()
    server.server_close()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The root of an experiment."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.2:9")  # would fail every row if it were read
    (tmp_path / "lists").mkdir()
    return tmp_path


def card(kept=(), **source) -> Card:
    return Card(
        name="weblist",
        title="Images of the loopback",
        homepage="",
        license="none",
        attribution="nobody",
        redistribute_codes=False,
        source={"kind": "url_list", "options": {"files": "lists", "fetch": FETCH, **source}},
        columns=kept,
        tasks={"generation": {"view": "crop", "texts": ["caption"]}},
    )


def write_laion(path: Path, urls: list[str | None], **columns) -> None:
    """In the shape of laion2B-en-joined, with the missing sizes that pandas makes NaN."""
    n = len(urls)
    pq.write_table(
        pa.table(
            {
                "URL": pa.array(urls, pa.string()),
                "TEXT": [f"text {i}" for i in range(n)],
                "WIDTH": [float("nan")] * n,
                "HEIGHT": [30.0] * n,
                "similarity": [0.3] * n,
                "hash": pa.array(range(-5, n - 5), pa.int64()),
                "punsafe": pa.array([0.25] * n, pa.float32()),
                "pwatermark": pa.array([0.5] * n, pa.float32()),
                **columns,
            }
        ),
        path,
        row_group_size=7,
    )


def write_coyo(path: Path, urls: list[str]) -> None:
    n = len(urls)
    sparse = pa.array([1 << 40 | i for i in range(n)], pa.int64())
    columns = {
        "id": sparse,
        "url": urls,
        "text": [f"text {i}" for i in range(n)],
        "width": [40] * n,
        "height": [30] * n,
    }
    pq.write_table(pa.table({**columns, "image_phash": ["0" * 16] * n, "watermark_score": [0.1] * n}), path)


def download(card: Card, folder, shard_rows=100, rows=None, threads=16, per_host=8, **web):
    tasks = []
    worker = Download(card, WebAccess(threads=threads, connections_per_host=per_host, **web), 1)
    job = download_job(card, rows, shard_rows, 0, Path(folder), WEB_VERSION)
    lines = []
    for task in job.missing():
        tasks.append(task)
        job.add(worker(task))
        lines.append(str(job))
    return job.finish(), tasks, lines


def rows_of(folder) -> list[dict]:
    return [row for path in sorted(Path(folder).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejects(folder) -> list[dict]:
    return [row for path in sorted(Path(folder, "quarantine").glob("*")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_every_row_is_in_its_class_and_good_images_arrive_as_they_are(root, web, forbidden):
    cases = pages(web, forbidden.root)
    web.pages |= {path: page for path, (_, page) in cases.items() if page is not None}
    expected = {web.root + path: reason for path, (reason, _) in cases.items()} | elsewhere(forbidden.root)
    expected[web.root.replace("http", "https") + "/good.png"] = "tls_failed"
    write_laion(root / "lists/laion.parquet", [*expected, None, web.root + "/good.png"])
    started = time.monotonic()
    spelled = {"width_in_list": "width", "height_in_list": "HEIGHT"}
    manifest, _, lines = download(card(("punsafe", "width_in_list", "height_in_list"), columns=spelled), "out")
    assert time.monotonic() - started < 10
    kept, rejected = rows_of("out"), rejects("out")
    found = {row["url"]: "ok" for row in kept} | {row["url"]: row["reason"] for row in rejected}
    assert found == {**expected, "": "no_url"}
    assert len(kept) + len(rejected) == len(expected) + 2
    assert manifest.dropped == dict(Counter(row["reason"] for row in rejected).most_common())
    served = {web.root + path: page for path, page in web.pages.items() if isinstance(page, bytes)}
    for row in kept:
        if row["url"] in served:
            assert row["image"] == served[row["url"]]
        assert (row["width"], row["height"], row["license"]) == (40, 30, "none")
        assert (row["punsafe"], row["width_in_list"], row["height_in_list"]) == ("0.25", None, "30.0")
        assert row["caption"] == f"text {int(row['key'].removeprefix('laion/'))}"
    assert web.hits["/robots.txt"] == 1
    assert web.hits["/private/a.png"] == 0
    assert web.hits["/good.png"] == 2  # once for two rows, once for the redirect
    assert (web.hits["/busy.png"], web.hits["/gone.png"], web.hits["/page.png"]) == (2, 1, 1)
    assert web.most <= 8 + sum(reason == "timeout" for reason, _ in cases.values())  # whose pages outlive their reader
    assert f"{len(expected) + 2}/{len(expected) + 2} rows" in lines[-1]
    assert "1 http_503" in lines[-1]


def test_a_list_in_the_shape_of_coyo_with_its_own_keys(root, web):
    web.pages["/a.png"] = image("PNG")
    write_coyo(root / "lists/coyo.parquet", [web.root + "/a.png", web.root + "/gone.png"])
    manifest, _, _ = download(card(("pwatermark",), columns={"key": "id"}), "out")
    (row,) = rows_of("out")
    assert (row["key"], row["caption"], row["pwatermark"]) == (str(1 << 40), "text 0", "0.1")
    assert rejects("out")[0]["key"] == str(1 << 40 | 1)
    assert manifest.dropped == {"http_404": 1}


def test_a_list_in_the_shape_of_unsplash(root, web):
    web.pages["/a?fm=jpg"] = image("JPEG")
    lines = ["photo_id photo_image_url photo_description ai_description", f"x {web.root}/a?fm=jpg NONE a_cat", "y  b c"]
    text = "\n".join("\t".join(line.replace("NONE", "").split(" ")) for line in lines)
    (root / "lists/photos.tsv000").write_text(text + "\nbroken\n")
    manifest, _, _ = download(card(("id",), files="lists/photos.?sv*"), "out")
    (row,) = rows_of("out")
    assert (row["key"], row["id"], row["caption"]) == ("photos.tsv000/000000000", "x", "a_cat")
    assert manifest.dropped == {"no_url": 1, "broken_line": 1}


def test_the_cards_of_lists_say_what_is_known():
    cards = [load_card(path.stem, REPOSITORY / "datasets") for path in (REPOSITORY / "datasets").glob("*.yaml")]
    lists = [card for card in cards if card.source.kind == "url_list"]
    assert {card.name for card in lists} >= {"laion_en", "coyo", "unsplash"}
    for list_card in lists:
        assert parse(UrlList, list_card.source.options, list_card.name).fetch == FetchRules()
        assert not list_card.redistribute_codes


@pytest.mark.parametrize(
    ("change", "requests"),
    [({}, 0), ({"robots": False}, 4), ({"max_redirects": 9}, 4), ({"user_agent": "unifork/2 (me@example.org)"}, 4)],
)
def test_other_rules_never_mix_with_old_shards(root, web, change, requests):
    web.pages |= {f"/{i}.png": image("PNG", i) for i in range(4)}
    write_laion(root / "lists/a.parquet", [f"{web.root}/{i}.png" for i in range(4)])
    download(card(), "out", shard_rows=2)
    web.hits.clear()
    manifest, tasks, _ = download(card(fetch={**FETCH, **change}), "out", shard_rows=2)
    assert (len(tasks), manifest.rows) == (requests // 2, 4)
    assert sum(web.hits[f"/{i}.png"] for i in range(4)) == requests


def test_another_list_adds_shards_and_changes_none(root, web):
    web.pages |= {f"/{i}.png": image("PNG", i) for i in range(4)}
    write_laion(root / "lists/a.parquet", [f"{web.root}/{i}.png" for i in range(3)])
    download(card(), "out", shard_rows=2)
    write_laion(root / "lists/b.parquet", [f"{web.root}/3.png"])
    manifest, tasks, _ = download(card(), "out", shard_rows=2)
    assert [(task.piece.file, task.piece.start, task.piece.stop) for task in tasks] == [("b.parquet", 0, 1)]
    assert [shard.rows for shard in manifest.shards] == [2, 1, 1]
    write_laion(root / "lists/b.parquet", [f"{web.root}/2.png"])
    _, tasks, _ = download(card(), "out", shard_rows=2, rows=4)
    assert [task.piece.file for task in tasks] == ["b.parquet"]


def test_what_a_list_lacks_is_said(root):
    write_laion(root / "lists/a.parquet", ["http://x.example/"])
    with pytest.raises(ConfigError, match=r"no column for 'aesthetic'.*pwatermark.*source\.options\.columns"):
        download(card(("aesthetic",)), "out")
    with pytest.raises(ConfigError, match="no column 'TXT' for 'caption'; found: HEIGHT"):
        download(card(columns={"caption": "TXT"}), "out")
    with pytest.raises(ConfigError, match="'list': no such file"):
        download(card(files="list"), "out")
    with pytest.raises(ConfigError, match=r"allow_addresses.*127\.0\.0\.300"):
        download(card(fetch={"allow_addresses": ["127.0.0.300"]}), "out")


def test_without_img2dataset_it_is_said_before_anything_starts(root, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    write_laion(root / "lists/a.parquet", ["http://x.example/"])
    message = r"card weblist: its images are fetched by img2dataset, .* not installed; .*'unifork\[web\]'$"
    for check in (lambda: download_job(card(), None, 5, 0, root / "out"), lambda: followed(card(), "card")):
        with pytest.raises(ConfigError, match=message):
            check()
    shapes = load_card("shapes", REPOSITORY / "datasets")
    assert download_job(shapes, 5, 5, 0, root / "out").tasks
    assert not (root / "out").exists()


def test_a_table_with_a_column_of_addresses_is_fetched(root, web):
    web.pages |= {"/a.png": image("PNG", 1)}
    (root / "lists/a.csv").write_text(f"name,link,text\na,{web.root}/a.png,x\nb,{web.root}/gone.png,y\nc,,z\n")
    options = {"files": "lists", "image": "link", "texts": {"caption": "text"}, "key": "name", "fetch": FETCH}
    table = card().model_copy(update={"source": CardSource(kind="table", options=options)})
    manifest, _, _ = download(table, "out")
    (row,) = rows_of("out")
    assert (row["key"], row["caption"], row["image"]) == ("a", "x", image("PNG", 1))
    assert (row["url"], manifest.dropped) == (f"{web.root}/a.png", {"http_404": 1, "no_url": 1})


def test_the_check_of_images_may_be_left_to_the_filter(root, web):
    """With `decode: header` what has a whole header is kept, and the filter says what is wrong with it."""
    png, jpeg = image("PNG", 1), image("JPEG", 2)
    web.pages |= {"/a.png": png, "/cut.png": png[:-500], "/cut.jpg": jpeg[: len(jpeg) // 2]}
    web.pages |= {"/page.png": b"<html>", "/bomb.png": bomb(), "/empty.png": b""}
    write_laion(root / "lists/a.parquet", [web.root + path for path in web.pages if path != "/robots.txt"])
    full, _, _ = download(card(), "full")
    refused = {"not_an_image": 1, "too_many_pixels": 1, "empty": 1}
    assert (full.rows, full.dropped) == (1, {"undecodable": 2, **refused})
    header, _, _ = download(card(fetch={**FETCH, "decode": "header"}), "header")
    assert (header.rows, header.dropped) == (3, refused)
    assert [row["image"] for row in rows_of("header")] == [
        web.pages[path] for path in ("/a.png", "/cut.png", "/cut.jpg")
    ]
    kept = filter_here(card(), root / "header", root / "measured", root / "filtered")
    assert (kept.rows, kept.dropped) == (1, {"undecodable": 2})


DEAD = ("localhost", "127.0.0.1")


def test_a_dead_host_is_tried_a_bounded_number_of_times(root, web):
    """Two names at which nobody listens: the rest of their rows is not tried any more."""
    contacts = Counter()
    write_laion(root / "lists/a.parquet", [f"http://{name}:1/{i}.png" for i in range(40) for name in DEAD])
    original = socket.create_connection

    def counted(address, *rest, **options):
        contacts[address] += 1
        return original(address, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", counted)
        with pytest.raises(DataError, match="none of 80 rows is kept"):
            download(card(fetch={**FETCH, "allow_addresses": ["127.0.0.0/8", "::1/128"]}), "out")
    reasons = Counter(row["reason"] for row in rejects("out"))
    assert reasons.total() == 80
    assert reasons["host_unreachable"] >= 40
    assert 32 <= contacts.total() <= 2 * (16 + 8) * 2


def test_a_key_that_repeats_is_counted(root, web):
    web.pages["/a.png"] = image("PNG")
    write_laion(root / "lists/a.parquet", [web.root + "/a.png"] * 3, code=["x", "y", "x"])
    manifest, _, _ = download(card(columns={"key": "code"}), "out")
    assert [row["key"] for row in rows_of("out")] == ["x", "y"]
    assert manifest.dropped == {"duplicate_key": 1}


@pytest.mark.slow
def test_a_host_has_at_most_its_connections_and_the_tail_of_a_shard_ends(root, web):
    def slow(page):
        time.sleep(0.03)
        page.answer(200, image("PNG"))

    def never(page):
        web.gate.wait(5)

    web.pages |= {f"/{i}.png": slow for i in range(24)} | {"/never.png": never}
    urls = [f"{web.root}/never.png", *(f"{web.root}/{i}.png" for i in range(24))]
    write_laion(root / "lists/a.parquet", urls)
    fetch = {**FETCH, "timeout_seconds": 3, "attempts": 9, "backoff_seconds": 30, "tail_seconds": 0.2}
    started = time.monotonic()
    manifest, _, _ = download(card(fetch=fetch), "out", per_host=3)
    assert time.monotonic() - started < 6
    assert manifest.dropped == {"timeout": 1}
    assert web.most == 3
    web.gate.set()


def test_a_shard_ends_and_rows_that_were_not_tried_are_counted(root, web):
    def slow(page):
        time.sleep(0.1)
        page.answer(200, image("PNG"))

    web.pages |= {f"/{i}.png": slow for i in range(20)}
    write_laion(root / "lists/a.parquet", [f"{web.root}/{i}.png" for i in range(20)])
    manifest, _, _ = download(card(fetch={**FETCH, "shard_seconds": 0.25}), "out", per_host=2)
    assert set(manifest.dropped) == {"deadline"}
    assert 2 <= manifest.rows == 20 - manifest.dropped["deadline"] <= 10


@pytest.mark.parametrize(
    ("status", "body", "dropped", "hits"),
    [
        (404, b"", {}, 1),
        (503, b"", {"http_503": 2}, 4),
        (200, b"User-agent: *\nDisallow: /\n" + b"#" * 600_000, {"robots_denied": 2}, 1),
        (200, b"User-agent: unifork\nAllow: /\n\nUser-agent: *\nDisallow: /\n", {}, 1),
    ],
)
def test_robots_txt_is_asked_for_once_and_a_server_in_trouble_allows_nothing(root, web, status, body, dropped, hits):
    web.pages |= {"/robots.txt": lambda page: page.answer(status, body), "/a.png": image("PNG")}
    write_laion(root / "lists/a.parquet", [web.root + "/a.png", web.root + "/a.png?again"])
    web.pages["/a.png?again"] = image("PNG")
    if dropped:
        ((reason, count),) = dropped.items()
        with pytest.raises(DataError, match=f"none of 2 rows is kept: {count} {reason}, the first 'a/000000000'"):
            download(card(), "out")
        assert [row["reason"] for row in rejects("out")] == [reason] * count
    else:
        assert download(card(), "out")[0].dropped == {}
    assert web.hits["/robots.txt"] == hits
    assert web.hits["/a.png"] == (0 if dropped else 1)


def test_a_proxy_is_used_when_configured_and_asked_for_the_checked_address(root, web):
    lines = []
    web.pages["/a.png"] = image("PNG")
    proxy = Web("127.0.0.1")

    class Tunnel(proxy.RequestHandlerClass):
        def do_CONNECT(self):
            lines.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            self.path = self.rfile.readline().split()[1].decode()
            while self.rfile.readline().strip():
                pass
            self.server = web
            self.do_GET()
            self.close_connection = True

    proxy.RequestHandlerClass = Tunnel
    name = web.root.replace("127.0.0.1", "localhost")
    write_laion(root / "lists/a.parquet", [name + "/a.png"])
    manifest, _, _ = download(card(), "out", proxy=proxy.root)
    assert manifest.rows == 1
    assert set(lines) == {web.root.removeprefix("http://")}
    proxy.shutdown()
    proxy.server_close()
