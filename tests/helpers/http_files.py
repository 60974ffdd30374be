"""An HTTP server on the loopback that serves a folder with ranges, and fails when told to."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Faults:
    """What goes wrong with each GET of a file, in order; when the list is used up, nothing does."""

    def __init__(self) -> None:
        self.coming: list[str | None] = []
        self.requests = 0
        self._lock = threading.Lock()

    def next(self) -> str | None:
        with self._lock:
            self.requests += 1
            return self.coming.pop(0) if self.coming else None


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, Faults]]:
    """Address of the folder, ending in a slash, and its faults."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if (folder / self.path[1:]).is_file():
                self._start(200, (folder / self.path[1:]).stat().st_size)
            else:
                self.send_error(404)

        def do_GET(self) -> None:
            fault = faults.next() if (folder / self.path[1:]).is_file() else "404"
            if fault in ("500", "503", "404"):
                self.send_error(int(fault))
                return
            data = (folder / self.path[1:]).read_bytes()
            first, last = 0, len(data) - 1
            if asked := self.headers.get("Range"):
                one, _, two = asked.removeprefix("bytes=").partition("-")
                first, last = int(one), int(two) if two else last
            part = data[first : last + 1]
            self._start(206 if asked else 200, len(part), f"bytes {first}-{last}/{len(data)}")
            if fault == "slow":
                time.sleep(0.5)
            with contextlib.suppress(OSError):
                self.wfile.write(part[: len(part) // 2] if fault == "drop" else part)
            if fault == "drop":
                self.close_connection = True

        def _start(self, status: int, length: int, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("Accept-Ranges", "bytes")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
