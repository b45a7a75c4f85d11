"""Tables: which addresses may be contacted, what robots.txt and headers deny, what a URL is taken for."""

import threading
import time
import urllib.request
from collections import Counter
from ipaddress import ip_network

import pytest

from unifork.errors import MachineError
from unifork.sources.url_lists import FetchRules
from unifork.sources.web.download import Places, fetch_all
from unifork.sources.web.guard import Network
from unifork.sources.web.permission import Refused, parse_robots, refusal, reservation, target_of

REFUSED = """
0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1
239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8 64:ff9b::7f00:1 64:ff9b::808:808
64:ff9b:1::1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 2002:7f00:1::1 2002:808:808::1
3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 4000::1
2606:4700::5efe:127.0.0.1 2606:4700::200:5efe:10.0.0.1 localhost 127.1
"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.215.14 172.15.0.1 172.32.0.1 192.0.1.1 2606:4700::1111 2a00:1450:4001:81b::200e"


@pytest.mark.parametrize("address", REFUSED.split())
def test_an_address_that_is_not_public_is_refused(address):
    assert refusal(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_a_public_address_may_be_contacted(address):
    assert refusal(address) is None


def test_only_the_networks_that_are_named_are_allowed():
    allowed = (ip_network("127.0.0.1/32"), ip_network("fd00::/8"))
    assert refusal("127.0.0.1", allowed) is None
    assert refusal("fd00::1", allowed) is None
    for other in ("127.0.0.2", "::ffff:127.0.0.1", "::1", "fc00::1"):
        assert refusal(other, allowed)


ROBOTS = """
User-agent: *       # everybody
Disallow: /private
Allow: /private/open
Disallow: /*.gif$
Disallow: /a*b*c

User-agent: UniFork
User-agent: other
Disallow: /only-for-us
Disallow:
"""


@pytest.mark.parametrize(
    ("agent", "path", "allowed"),
    [
        ("somebody", "/a.png", True),
        ("somebody", "/private/x.png", False),
        ("somebody", "/private/open/x.png", True),
        ("somebody", "/x/y.gif", False),
        ("somebody", "/x/y.gif?z", True),
        ("somebody", "/a1b2c3", False),
        ("somebody", "/a1c2b3", True),
        ("unifork", "/private/x.png", True),
        ("unifork", "/only-for-us.png", False),
        ("other", "/only-for-us.png", False),
    ],
)
def test_robots(agent, path, allowed):
    assert parse_robots(ROBOTS, agent).can_fetch(f"http://host{path}", agent) is allowed


@pytest.mark.parametrize(
    ("robots", "path", "allowed"),
    [
        ("User-agent: *\nDisallow: /für/", "/f%C3%BCr/a.png", False),
        ("User-agent: *\nDisallow: /f%c3%bcr/", "/f%C3%BCr/a.png", False),
        ("User-agent: *\nDisallow: /a%7Eb/", "/a~b/c.png", False),
        ("User-agent: *\nDisallow: /a%2Fb", "/a/b", True),
        ("User-agent: *\nDisallow: /x?y=1", "/x?y=12", False),
        ("\ufeffUser-agent: *\nDisallow: /", "/a.png", False),
        ("User-agent: unifork/1.0\nDisallow: /", "/a.png", False),
        ("user-agent:unifork/1.0 (images) # ours\rDisallow: /x\r\rUser-agent: *\rDisallow: /", "/a.png", True),
        ("User-agent: unifork/1.0 # ours\rDisallow: /x\r", "/x.png", False),
        ("User-agent: uni\nUser-agent: fork\nDisallow: /", "/a.png", True),
        ("User-agent: uniforks\nDisallow: /", "/a.png", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: unifork\nDisallow:", "/a.png", True),
        ("User-agent: *\nDisallow: /\nAllow: /", "/a.png", True),
        ("User-agent: Unifork/1.0\nDisallow: /", "/a.png", False),
        ("User-agent: *\nDisallow: /private/", "/%70rivate/a.png", False),
        ("User-agent: *\nDisallow: /%70rivate/", "/private/a.png", False),
        ("Disallow: /", "/a.png", True),
        ("User-agent: *\nDisallow: /" + "*a" * 30 + "$", "/" + "a" * 2000 + "b", True),
    ],
)
def test_robots_are_compared_as_the_standard_says(robots, path, allowed):
    assert parse_robots(robots, "unifork").can_fetch(f"http://host{path}", "unifork") is allowed


@pytest.mark.parametrize(
    ("name", "value", "denied"),
    [
        ("X-Robots-Tag", "noai", True),
        ("x-robots-tag", "nofollow, NoImageAI", True),
        ("X-Robots-Tag", "noai; noimageai", True),
        ("X-Robots-Tag", "nofollow; noimageai", True),
        ("X-Robots-Tag", "noai noimageai", True),
        ("X-Robots-Tag", "nofollow noimageai", True),
        ("X-Robots-Tag", "otherbot: nofollow; unifork: noai", True),
        ("X-Robots-Tag", "Unifork/1.0: NoAI", True),
        ("X-Robots-Tag", "*: noai", True),
        ("X-Robots-Tag", "noai otherbot: all", True),
        ("X-Robots-Tag", "unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai", True),
        ("X-Robots-Tag", "otherbot: all; noai", False),
        ("X-Robots-Tag", "unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT", False),
        ("X-Robots-Tag", "none", True),
        ("X-Robots-Tag", "unifork: noindex", True),
        ("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("X-Robots-Tag", "otherbot: noai, noindex", False),
        ("X-Robots-Tag", "nofollow, max-image-preview: large", False),
        ("TDM-Reservation", "1", True),
        ("TDM-Reservation", "0", False),
        ("Content-Type", "noai", False),
    ],
)
def test_reservations(name, value, denied):
    assert (reservation([(name, value)], "unifork") is not None) is denied


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://Example.com", "example.com", "/"),
        (" https://example.com:443/a b/ä.png?q=ü#part ", "example.com", "/a%20b/%C3%A4.png?q=%C3%BC"),
        ("http://user:pass@example.com:8080/%20", "example.com:8080", "/%20"),
        ("http://bücher.example/", "xn--bcher-kva.example", "/"),
        ("http://h/x/../private/%2e/%2E%2e/a.png?../b", "h", "/a.png?../b"),
        ("http://h/../..", "h", "/"),
        ("http://h/a//b/.", "h", "/a//b/"),
        ("http://[2606:4700::1]:81/", "[2606:4700::1]:81", "/"),
    ],
)
def test_a_url_is_asked_for_as_a_browser_would(url, authority, path):
    target = target_of(url)
    assert (target.authority, target.path) == (authority, path)


@pytest.mark.parametrize(
    "url", ["", "a.png", "//host/a", "gopher://host/", "http://h:99999/", "http://h:0/", "http://[x/"]
)
def test_anything_else_is_no_url(url):
    with pytest.raises(Refused) as refused:
        target_of(url)
    assert refused.value.reason == "bad_url"


class Cut:
    """A guard whose network works for the hosts in `alive`."""

    rules = FetchRules(attempts=1, backoff_seconds=0)

    def __init__(self, reason, alive=()):
        self.reason, self.alive = reason, alive

    def reach(self, url):
        host = target_of(url).host
        return None if host in self.alive else Refused(self.reason, url, host)

    def get(self, target):
        if refused := self.reach(target.url):
            raise refused
        return b""


def fetched(urls, guard, threads, connections=8):
    """Reason of every URL, None for an image."""
    outcomes = fetch_all(urls, guard, Network(guard), Places(connections, threads))
    assert list(outcomes) == urls
    return [getattr(outcome, "reason", None) for outcome in outcomes.values()]


URLS = [f"http://host{number}.example/a.png" for number in range(60)]


@pytest.mark.parametrize(
    ("reason", "diagnosis"),
    [
        ("dns_failure", "no name is resolved"),
        ("no_such_host", "no name"),
        ("connection_failed", "no connection leaves"),
    ],
)
def test_a_machine_without_a_network_stops_before_the_first_row(reason, diagnosis):
    message = rf"before the first row: this machine has no network: {diagnosis}.*None of 12 hosts.*host0\.example"
    with pytest.raises(MachineError, match=message) as error:
        fetched(URLS, Cut(reason), 4)
    assert "\n" not in str(error.value)


def test_one_dead_host_is_no_diagnosis_but_a_silent_resolver_is():
    assert fetched(URLS[:1], Cut("connection_failed"), 4) == ["connection_failed"]
    with pytest.raises(MachineError, match="no name is resolved"):
        fetched(URLS[:1], Cut("dns_failure"), 4)


def test_a_network_that_breaks_stops_the_shard_and_dead_links_do_not():
    alive = Cut("timeout", alive=["host0.example"])
    assert fetched(URLS, alive, 4) == ["empty"] + ["timeout"] * 59
    breaking = Cut("timeout", alive=["host0.example"])
    breaking.get = lambda target: breaking.alive.clear() or Cut.get(breaking, target)
    with pytest.raises(MachineError, match=r"after 2[5-9] hosts failed in a row: this machine has no network"):
        fetched(URLS, breaking, 4)


class Counting(Cut):
    """A guard whose hosts answer after a moment, or are silent; it counts what was asked, and how much at once."""

    def __init__(self, silent=(), seconds=0.02, **rules):
        super().__init__("timeout", alive=("a", "b", "good"))
        self.silent, self.seconds, self.rules = silent, seconds, FetchRules(backoff_seconds=0, **rules)
        self.requested, self.now, self.most, self.most_silent = [], Counter(), Counter(), 0
        self.lock = threading.Lock()

    def get(self, target):
        host = target.host
        with self.lock:
            self.requested.append(host)
            self.now[host] += 1
            self.most |= self.now
            self.most_silent = max(self.most_silent, sum(self.now[name] for name in self.silent))
        time.sleep(self.seconds if host not in self.silent else 5 * self.seconds)
        with self.lock:
            self.now[host] -= 1
        if host in self.silent:
            raise Refused("timeout", target.url, host)
        return b""


@pytest.mark.parametrize("threads", [2, 16])
def test_hosts_are_asked_in_turn_and_none_exceeds_its_connections(threads):
    guard = Counting()
    fetched(
        [f"http://a/{number}" for number in range(8)] + [f"http://b/{number}" for number in range(3)], guard, threads, 2
    )
    assert guard.most <= Counter({"a": 2, "b": 2})
    assert guard.most["a"] == 2
    assert guard.requested[:6].count("b") >= 2, "the rows of b do not wait for all of a, which came before them"
    assert Counter(guard.requested) == {"a": 8, "b": 3}


@pytest.mark.parametrize("silent", [0, 4, 6, 20])
@pytest.mark.slow
def test_silent_hosts_hold_back_no_other_and_are_given_up(silent):
    """Never more than half of the threads wait for hosts that do not answer; 16 failures in a row are enough."""
    names = [f"silent{number}" for number in range(silent)]
    guard = Counting(names, seconds=0.01)
    urls = [f"http://good/{number}" for number in range(200)] + [
        f"http://{name}/{n}" for name in names for n in range(30)
    ]
    reasons = Counter(fetched(urls, guard, 16))
    assert reasons["empty"] == 200
    last_good = len(guard.requested) - guard.requested[::-1].index("good")
    assert last_good < 200 + 3 * 16, "rows of silent hosts were fetched before the last row of a good host"
    assert guard.most_silent <= 8
    for name in names:
        assert 16 <= guard.requested.count(name) < 16 + 8
        assert guard.most[name] <= 2
    assert reasons["timeout"] + reasons["host_unreachable"] == 30 * silent
    assert reasons["host_unreachable"] >= 12 * silent


def test_a_host_that_was_given_up_is_left_alone_for_a_while_in_later_shards_too(monkeypatch):
    guard = Counting(["dead"], seconds=0.001, attempts=1)
    places, network = Places(8, 4), Network(guard)
    urls = [f"http://dead/{number}" for number in range(40)]
    fetch_all(urls, guard, network, places)
    before = guard.requested.count("dead")
    outcomes = fetch_all([*urls, "http://a/1"], guard, network, places)
    assert [outcomes[url].reason for url in urls] == ["host_unreachable"] * 40
    assert guard.requested.count("dead") == before < 20
    monkeypatch.setattr("unifork.sources.web.download.DEAD_SECONDS", 0.0)
    guard.silent = ()
    assert {outcome.reason for outcome in fetch_all(urls, guard, network, places).values()} == {"empty"}
    assert guard.requested.count("dead") == before + 40


def test_rows_that_keep_failing_are_no_dead_host():
    """What comes again are the rows that fail: of a host that answers others they say nothing."""
    guard = Counting(seconds=0.001, attempts=3)
    hangs = lambda target: int(target.path[1:]) % 10 == 0  # noqa: E731
    get = guard.get
    guard.get = lambda target: Cut("timeout").get(target) if hangs(target) else get(target)
    urls = [f"http://a/{number}" for number in range(300)]
    reasons = Counter(fetched(urls, guard, 8))
    assert reasons == {"empty": 270, "timeout": 30}


def test_rows_that_fail_for_now_come_again_in_further_passes():
    guard = Counting(["b"], attempts=3)
    assert fetched(["http://a/1", "http://b/1"], guard, 4) == ["empty", "timeout"]
    assert Counter(guard.requested) == {"a": 1, "b": 3}


def test_a_row_that_is_lost_on_the_way_through_img2dataset_is_no_silent_loss(monkeypatch):
    monkeypatch.setattr("unifork.sources.web.download._Shard.write", lambda *_: None)
    with pytest.raises(RuntimeError, match="2 rows went into img2dataset, 0 came out"):
        fetched(["http://a/1", "http://b/1"], Counting(), 4)


def test_pythons_own_opener_is_back_after_a_shard():
    fetched(["http://a/1"], Counting(), 4)
    assert urllib.request._opener is None
