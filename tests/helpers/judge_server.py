"""A judge server on a loopback port, for tests: a function of the test answers, and all requests are recorded."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request."""

    number: int  # from 0
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"] if "messages" in self.body else self.body["prompt"]


@dataclass(frozen=True)
class Answer:
    """A reply. `data` is sent in two halves with `pause_s` between them; None closes the connection without a reply."""

    data: bytes | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0


def chat(text: Any) -> Answer:
    """A valid reply of the chat API."""
    return Answer(json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode())


def completion(text: Any) -> Answer:
    """A valid reply of the completions API."""
    return Answer(json.dumps({"choices": [{"index": 0, "text": text}]}).encode())


def models(*names: str) -> Answer:
    """A valid reply to /models."""
    return Answer(json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode())


class JudgeServer:
    """Serves until `close`. `asked`: all requests so far; `most_at_once`: largest number of simultaneously open requests."""

    def __init__(self, answer: Callable[[Asked], Answer], port: int = 0) -> None:
        self.answer, self.asked, self.most_at_once, self._open = answer, list[Asked](), 0, 0
        self._lock, self._over = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with server._lock:
                    request = Asked(
                        len(server.asked), self.command, self.path, dict(self.headers), json.loads(body) if body else {}
                    )
                    server.asked.append(request)
                    server._open += 1
                    server.most_at_once = max(server.most_at_once, server._open)
                try:
                    self._reply(server.answer(request))
                finally:
                    with server._lock:
                        server._open -= 1

            do_GET = do_POST = _handle

            def _reply(self, answer: Answer) -> None:
                if answer.data is None:
                    self.close_connection = True
                    return
                with suppress(OSError):  # the client may have disconnected
                    self.send_response(answer.status)
                    for name, value in {"Content-Length": str(len(answer.data)), **answer.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    half = len(answer.data) // 2
                    self.wfile.write(answer.data[:half])
                    self.wfile.flush()
                    if answer.pause_s:
                        server._over.wait(answer.pause_s)
                    self.wfile.write(answer.data[half:])

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(answer: Callable[[Asked], Answer], port: int = 0) -> Iterator[JudgeServer]:
    """Run a `JudgeServer` inside a with block."""
    server = JudgeServer(answer, port)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A free loopback port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def takes(seconds: float, answer: Answer) -> Answer:
    """Wait, then return the answer."""
    time.sleep(seconds)
    return answer
