"""A file server on this machine."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A file server that can misbehave, and remembers the Range of every request."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[str | None] = []
        self.cut_after: list[int] = []
        """Bytes after which the first, second, ... answer stops."""
        self.honour_range = True
        self.shift = 0
        """Bytes by which a partial answer begins elsewhere than asked."""
        self.status: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                total, start = len(server.content), 0
                if server.status is not None:
                    return self.send_error(server.status)
                if asked and server.honour_range:
                    start = int(asked.removeprefix("bytes=").removesuffix("-")) + server.shift
                    if start >= total:
                        return self.send_error(416)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(total - start))
                self.end_headers()
                end = start + server.cut_after.pop(0) if server.cut_after else total
                self.wfile.write(server.content[start:end])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
