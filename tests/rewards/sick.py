"""A small HTTP server on loopback whose answers a test writes: honest, sick or hostile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler, dict], None]):
    """Serves ``answer(handler, parsed body)`` for every POST; yields its address. GET gives 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                answer(self, body)
            except (BrokenPipeError, ConnectionResetError):  # the client has left, as it should
                pass

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    httpd = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/score"
    finally:
        httpd.shutdown()
        httpd.server_close()


def send(handler: BaseHTTPRequestHandler, content, status: int = 200, **headers: str) -> None:
    """content: bytes as they are, anything else as JSON. headers: with _ for -."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def brightness(body: dict) -> list[dict]:
    """The right answer: each picture's grey value, read from the PNG that arrived."""
    import base64
    import io

    from PIL import Image

    def one(picture: dict) -> float:
        return Image.open(io.BytesIO(base64.b64decode(picture["png"])), formats=("PNG",)).getpixel((0, 0))[0]

    return [{"id": picture["id"], "score": one(picture)} for picture in body["pictures"]]
