"""The page of `unifork serve`: its requests, who may send them, and the page itself in a real browser."""

import asyncio
import base64
import io
import itertools
import json
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import aiohttp
import pytest
from PIL import Image
from tiny import start

pytestmark = pytest.mark.slow  # starts the program
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def served(tiny_root, *words):
    """The address that `unifork serve` prints."""
    command = ("unifork.cli", "serve", "--model", "models/unifork-init", "--port", "0", *words)
    process = start(tiny_root, *command)
    try:
        yield process.stdout.readline().partition("  (")[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def address(tiny_root):
    with served(tiny_root) as found:
        yield found


def post(address, path, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def data_uri():
    stream = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def test_it_draws_and_answers(address):
    status, drawn = post(address, "draw", {"prompt": "a red circle", "n": 2, "seed": 3, "guidance": 2.0})
    assert status == 200
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in drawn["images"]]
    assert [image.size for image in images] == [(48, 48)] * 2
    status, answered = post(address, "ask", {"question": "What is it?", "image": data_uri()})
    assert status == 200
    before = [["What is it?", answered["answer"] or "nothing"]]
    status, again = post(address, "ask", {"question": "Sure?", "image": data_uri(), "before": before})
    assert (status, list(again)) == (200, ["answer"])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("draw", {"prompt": "red " * 600}, "max_position_embeddings"),
        ("draw", {"prompt": "a", "n": 99}, "n"),
        ("draw", {"promt": "a"}, "promt"),
        ("draw", b"{", "cannot be read"),
        ("ask", {"question": "a", "image": "data:image/png;base64,AAAA"}, "cannot be read"),
        ("ask", {"question": "a", "image": "data:image/png;base64,A"}, "cannot be read"),
    ],
)
def test_mistakes_are_one_line(address, path, body, message):
    status, answer = post(address, path, body)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_pages_of_other_sites_are_refused(address):
    assert post(address, "draw", {"prompt": "a"}, Host="evil.example")[0] == 403
    assert post(address, "draw", {"prompt": "a"}, **{"Content-Type": "text/plain"})[0] == 415


def test_beyond_this_machine_a_token_is_needed(tiny_root):
    with served(tiny_root, "--host", "0.0.0.0") as found:
        place, _, token = found.replace("0.0.0.0", "127.0.0.1").partition("?token=")
        assert len(token) > 20
        assert post(place, "draw", {"prompt": "a", "n": 1})[0] == 401
        assert post(place, "draw", {"prompt": "a", "n": 1}, Authorization="Bearer no")[0] == 401
        assert post(place, "draw", {"prompt": "a", "n": 1}, Authorization=f"Bearer {token}")[0] == 200


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(address, tmp_path):
    """Draws two images and chats for two turns by clicking, as people do."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={tmp_path}")
    with subprocess.Popen([CHROMIUM, *flags, address], stderr=subprocess.DEVNULL) as browser:
        try:
            port, waited = tmp_path / "DevToolsActivePort", itertools.count()
            while not (port.exists() and "\n" in port.read_text()):
                assert next(waited) < 600
                time.sleep(0.1)
            seen = asyncio.run(clicked(int(port.read_text().split()[0])))
        finally:
            browser.kill()
    assert seen["widths"] == [48, 48]
    assert [text for text, kind in seen["lines"] if kind == "asked"] == ["What is it?", "Sure?"]
    assert [kind for _, kind in seen["lines"]] == ["asked", "answered"] * 2, seen


async def clicked(port):
    """Drive the page by the browser's own protocol; what is on it in the end."""
    async with aiohttp.ClientSession() as session:
        found = None
        while not found:
            async with session.get(f"http://127.0.0.1:{port}/json") as response:
                pages = json.loads(await response.text())
            found = next((page["webSocketDebuggerUrl"] for page in pages if page["url"].startswith("http")), None)
        async with session.ws_connect(found) as socket:
            numbers = itertools.count(1)

            async def evaluate(code):
                number = next(numbers)
                parameters = {"expression": code, "awaitPromise": True, "returnByValue": True}
                await socket.send_json({"id": number, "method": "Runtime.evaluate", "params": parameters})
                while (message := await socket.receive_json(timeout=60)).get("id") != number:
                    pass
                assert "exceptionDetails" not in message["result"], message
                return message["result"]["result"].get("value")

            async def until(condition):
                for _ in range(600):
                    if await evaluate(condition):
                        return
                    await asyncio.sleep(0.1)
                raise AssertionError(condition)

            await until("typeof at === 'function'")
            await evaluate("at('prompt').value = 'a red circle'; at('n').value = 2; at('draw').requestSubmit()")
            await until("at('images').querySelectorAll('img').length === 2 || at('images').querySelector('.error')")
            await evaluate(f"image = '{data_uri()}'; at('question').value = 'What is it?'; at('ask').requestSubmit()")
            await until("at('log').children.length === 2")
            await evaluate("before[0][1] ||= 'nothing'; at('question').value = 'Sure?'; at('ask').requestSubmit()")
            await until("at('log').children.length === 4")
            lines = await evaluate("[...at('log').children].map(line => [line.textContent, line.className])")
            widths = await evaluate("[...at('images').querySelectorAll('img')].map(image => image.naturalWidth)")
            return {"widths": widths, "lines": lines}
