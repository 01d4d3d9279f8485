"""A cloud's metadata server: AWS's, which wants tokens, and Google's, which wants its header.

As a program it serves on its argument, `ADDRESS:PORT`, as long as it can read pages from stdin: lines of JSON, by path.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SPOT = "/latest/meta-data/spot/instance-action"


def in_s(seconds: float) -> datetime:
    """So many seconds from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


def spot(seconds: float) -> str:
    """What AWS has at SPOT when it takes the machine away in so many seconds."""
    return json.dumps({"action": "terminate", "time": in_s(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")})


class Metadata:
    """What the server answers: by path; it takes no other token than `token`."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.token = "first"
        self.asked: list[tuple[str, str, int]] = []  # method, path and status
        self.host = ""


@contextmanager
def metadata_server(host: str = "127.0.0.1", port: int = 0) -> Iterator[Metadata]:
    """Serves for the time of the `with`, on any free port if none is said."""
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

    server = ThreadingHTTPServer((host, port), Handler)
    metadata.host = f"{host}:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield metadata
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    address, _, number = sys.argv[1].partition(":")
    with metadata_server(address, int(number)) as served:
        for line in sys.stdin:
            served.pages |= json.loads(line)
