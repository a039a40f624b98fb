"""Serving the page to this machine's browser, and to nobody and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abliterate.config import MeasureSettings
from abliterate.errors import UsageError
from abliterate.lab.bench import Bench
from abliterate.lab.opening import open_bench
from abliterate.lab.shelf import MOST_BYTES
from abliterate.lab.ui import build, library, look
from abliterate.monitor import Monitor

HOST = "127.0.0.1"
FIRST_PORT, _PORTS, _LOWEST_PORT = 7860, 100, 1024

#: The page's own scripts and styles are inline and some are compiled in the browser; nothing comes from elsewhere.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self' data:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)


def serve(
    target: str,
    measuring: MeasureSettings = MeasureSettings(),
    *,
    direction: Path | None = None,
    port: int | None = None,
    open_browser: bool = True,
    monitor: Monitor | None = None,
) -> None:
    """Open `target` (see `open_bench`) and serve the lab on 127.0.0.1 until it is interrupted.

    `port` None is the first free one from 7860. The URL is a note of the monitor. Raises `UsageError` when the extra
    is missing or the port is taken, and what `open_bench` raises.
    """
    monitor = monitor or Monitor()
    _lonely()
    library()
    free_port(port)  # before minutes of work
    bench = open_bench(target, measuring, direction=direction, monitor=monitor)
    with running(bench, port) as url:
        monitor.note(f"lab: {url} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextlib.contextmanager
def running(bench: Bench, port: int | None = None) -> Iterator[str]:
    """The lab served while inside; yields its URL."""
    _lonely()
    library()
    from starlette.middleware import Middleware

    number = free_port(port)
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build(bench)
        try:
            page.launch(
                server_name=HOST,
                server_port=number,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                allowed_paths=[],
                max_file_size=MOST_BYTES,
                enable_monitoring=False,
                strict_cors=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                app_kwargs={"middleware": [Middleware(OnlyHere, port=number)]},
                **look(),
            )
            yield f"http://{HOST}:{number}/"
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR", None)


def free_port(port: int | None) -> int:
    """`port`, or the first from 7860 that nobody listens on; raises `UsageError` where there is none."""
    if port is not None and port < _LOWEST_PORT:
        raise UsageError(
            f"--port {port}: expected one from {_LOWEST_PORT} up; lower ones need rights, and browsers leave 80 out of "
            "the address that the lab answers to"
        )
    for number in range(FIRST_PORT, FIRST_PORT + _PORTS) if port is None else (port,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError:
                continue
            return number
    wanted = f"{FIRST_PORT} to {FIRST_PORT + _PORTS - 1}" if port is None else str(port)
    raise UsageError(f"--port {wanted}: expected a free port, found it taken; give another --port")


def _lonely() -> None:
    """Before Gradio is imported: no telemetry, and nothing from the environment that would open the page to others."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


class OnlyHere:
    """ASGI middleware: answers only what names this server, from a page of this server, and ties the page down.

    Another site that has its name resolve to 127.0.0.1 sends its own name as Host; one that posts across sends itself
    as Origin. Both are refused with 403. The policy forbids the page any request to elsewhere.
    """

    def __init__(self, app: Any, port: int) -> None:
        """Wrap `app`, which is served at `port`."""
        self.app = app
        self.hosts = {f"{name}:{port}".encode() for name in (HOST, "localhost")}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        host = [value for name, value in headers if name == b"host"]
        origins = [value for name, value in headers if name == b"origin"]
        if len(host) != 1 or host[0] not in self.hosts or not set(origins) <= self.origins:
            await _refuse(scope, send)
            return

        async def tied(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, tied)


async def _refuse(scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"only for a browser on this machine"})
