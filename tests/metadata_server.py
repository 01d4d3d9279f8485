"""A cloud's metadata server on loopback: AWS's, which wants tokens, and Google's, which wants its header."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Metadata:
    """What the server answers: by path; it takes no other token than `token`."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.token = "first"
        self.asked: list[tuple[str, str, int]] = []  # method, path and status
        self.host = ""


@contextmanager
def metadata_server() -> Iterator[Metadata]:
    """Serves for the time of the `with`."""
    metadata = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            good = self.path == "/latest/api/token" and seconds.isdigit() and 1 <= int(seconds) <= 21600
            self.answer(200 if good else 400, metadata.token)

        def do_GET(self) -> None:
            google = self.path.startswith("/computeMetadata/")
            token = self.headers.get("X-aws-ec2-metadata-token")
            if google and self.headers.get("Metadata-Flavor") != "Google":
                self.answer(403)
            elif not google and token != metadata.token:
                self.answer(401)
            elif self.path in metadata.pages:
                self.answer(200, metadata.pages[self.path])
            else:
                self.answer(404)

        def answer(self, status: int, text: str = "") -> None:
            metadata.asked.append((self.command, self.path, status))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Keeps quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    metadata.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield metadata
    finally:
        server.shutdown()
        server.server_close()
