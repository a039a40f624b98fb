"""A hub on the loopback that has one model: what huggingface_hub asks for, and no more."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
#: Bytes of a file that are sent before a pause, and the pause in seconds.
PIECE = 1 << 16


@contextlib.contextmanager
def hub(identifier: str, folder: Path, *, pause: float = 0.0) -> Iterator[str]:
    """Serve the files in `folder` as the model `identifier`; the address to put into HF_ENDPOINT."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{identifier}/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
                return self._send(json.dumps(listed).encode(), body, "application/json")
            if path.startswith(f"/api/models/{identifier}"):
                about = {"id": identifier, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self._send(json.dumps(about).encode(), body, "application/json")
            name = path.removeprefix(f"/{identifier}/resolve/").partition("/")[2]
            if name in files:
                return self._send(files[name], body, "application/octet-stream")
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()

        def _send(self, data: bytes, body: bool, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_digest(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            for start in range(0, len(data), PIECE) if body else ():
                self.wfile.write(data[start : start + PIECE])
                time.sleep(pause)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
