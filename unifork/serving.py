"""A small page on which a model draws, answers and chats: one process, one model, one request at a time.

It listens on this machine alone unless an address is given; then every request needs the token that is printed.
"""

import asyncio
import base64
import secrets
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import Field

from unifork.config import StrictModel, parse
from unifork.documents.prompts import Exchange
from unifork.errors import UniForkError
from unifork.images import png
from unifork.jobs import is_loopback
from unifork.library import Chat, Model

PAGE = Path(__file__).with_name("serving.html")
MOST_BYTES = 32 * 2**20
MOST_IMAGES = 16


class Draw(StrictModel):
    """A request for images of one prompt."""

    prompt: str
    seed: int = 0
    n: int = Field(default=4, ge=1, le=MOST_IMAGES)
    guidance: float | None = None
    temperature: float | None = None


class Ask(StrictModel):
    """A request for an answer: the dialogue so far, as questions and answers, and what is turn now."""

    question: str
    image: str | None = None
    """Base64 of the file, for the first question of the dialogue."""
    before: tuple[tuple[str, str], ...] = ()


def application(model: Model, token: str | None) -> web.Application:
    """The page and its two requests; with a token every request must name it, as `?token=` or as a bearer."""
    lock = asyncio.Lock()

    async def work(act: Callable[[], Any]) -> Any:
        async with lock:  # one request at a time: the network is one
            return await asyncio.to_thread(act)

    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        if not token and not is_loopback(request.url.host or ""):  # a name that somebody pointed at this machine
            return web.json_response({"error": f"this page is not {request.host}"}, status=403)
        given = request.query.get("token") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not secrets.compare_digest(given.encode(), token.encode()):
            return web.json_response({"error": "the token that `unifork serve` printed is missing"}, status=401)
        if request.method == "POST" and request.content_type != "application/json":
            # a page of another site cannot send this type without being turn first
            return web.json_response({"error": "the body must be application/json"}, status=415)
        try:
            return await handler(request)
        except (UniForkError, ValueError) as error:
            unread = "the request cannot be read: " * isinstance(error, ValueError)
            return web.json_response({"error": f"{unread}{error}"}, status=400)

    async def page(_: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE)

    async def draw(request: web.Request) -> web.StreamResponse:
        plain = parse(Draw, await request.json(), "request").model_dump(exclude_none=True)
        prompts = [plain.pop("prompt")] * plain.pop("n")
        images = await work(partial(model.generate_images, prompts, **plain))
        shown = [f"data:image/png;base64,{base64.b64encode(png(image)).decode()}" for image in images]
        return web.json_response({"images": shown})

    async def ask(request: web.Request) -> web.StreamResponse:
        turn = parse(Ask, await request.json(), "request")
        data = base64.b64decode(turn.image.rpartition(",")[2]) if turn.image else None

        def answer() -> str:
            chat = model.chat(data) if data else Chat(model, None)
            chat.exchanges += [
                Exchange(question, given, number == 0 and data is not None)
                for number, (question, given) in enumerate(turn.before)
            ]
            return chat.ask(turn.question)

        return web.json_response({"answer": await work(answer)})

    app = web.Application(middlewares=[guard], client_max_size=MOST_BYTES)
    app.add_routes([web.get("/", page), web.post("/draw", draw), web.post("/ask", ask)])
    return app


def run(model: Model, host: str, port: int) -> None:
    """Serve until interrupted or terminated."""
    token = None if is_loopback(host) else secrets.token_urlsafe(16)
    family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(place[:2], family=family) as listening:
        address, number, *_ = listening.getsockname()
        print(f"http://{address}:{number}/{f'?token={token}' if token else ''}  (ctrl-C ends it)", flush=True)
        web.run_app(application(model, token), sock=listening, print=None)
