"""Serves one page on 127.0.0.1, to whoever knows its address.

Every program and every web page that is open on this machine can send requests to 127.0.0.1. What keeps them out:

- the token: 128 random bits in the path, which only who reads the terminal knows;
- the Host header: a name of somebody else's that was made to lead to 127.0.0.1 ("DNS rebinding") would let a web page
  read answers as its own, and is refused, whatever the path;
- GET and HEAD alone: nothing that is sent here does anything.

The address and the token stay out of what is logged (nothing is) and of the Referer header.
"""

from __future__ import annotations

import hmac
import secrets
import socketserver
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mlxtune.errors import UserError
from mlxtune.report.live.fresh import Made

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # under which this machine is asked
IDLE_SECONDS = 10  # after which a connection without a request is closed
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NOTHING = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # a policy without allowances
)


def new_token() -> str:
    """128 random bits, as a part of an address."""
    return secrets.token_urlsafe(16)


class Server(ThreadingHTTPServer):
    """A thread for each request; none of them keeps the process alive."""

    daemon_threads = True
    allow_reuse_port = False  # newer versions of Python let two servers share a port, in silence

    def __init__(
        self, port: int, token: str, page: Callable[[], Made], policy: str, say: Callable[[str], None]
    ) -> None:
        """port: 0 for any that is free; page: the page as it is now, asked by several threads; policy: the page's
        content security policy; say: told once of each fault for which there is no page. Raises UserError for a port
        that cannot be had.
        """
        self.token, self.page, self.policy, self._say = token, page, policy, say
        self._told: set[str] = set()  # faults; the page asks each second
        try:
            super().__init__((HOST, port), _Request)
        except OSError as error:
            hint = "Name another --port, or leave it out: then a free one is taken."
            raise UserError(f"port {port} of {HOST} cannot be had ({error.strerror})", hint) from error

    def server_bind(self) -> None:
        """Without asking the network for a name of 127.0.0.1, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.socket.getsockname()[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def tell(self, fault: str) -> None:
        if fault not in self._told:
            self._told.add(fault)
            self._say(fault)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class _Request(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        if not self._is_for_us():
            self._send(403, b"refused\n")
            return
        try:
            made = self.server.page()
        except Exception as error:  # a file that is just being replaced, or a fault of ours: the page asks again
            if not isinstance(error, UserError | OSError):
                self.server.tell(f"the page cannot be made ({type(error).__name__}: {error})")
            self._send(503, b"the page cannot be made just now\n")
            return
        if self.headers.get("If-None-Match") == made.tag:
            self._send(304, b"", tag=made.tag)
        else:
            self._send(200, made.body, "text/html; charset=utf-8", made.tag)

    def _refuse(self) -> None:
        """A method that would change something."""
        if self._is_for_us():
            self._send(405, b"only GET and HEAD\n")
        else:
            self._send(403, b"refused\n")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _is_for_us(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        if hosts not in [[f"{name}:{self.server.server_port}"] for name in NAMES]:
            return False
        # Compared in a time that does not tell how much of it is right.
        return hmac.compare_digest(self.path.encode(), f"/{self.server.token}/".encode())

    def _send(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", tag: str = "") -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", self.server.policy if status == 200 else NOTHING)
        self.send_header("Content-Type", kind)
        if tag:
            self.send_header("ETag", tag)
        if status == 405:
            self.send_header("Allow", "GET, HEAD")
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is no request at all, or of no known method. Nothing of it is repeated."""
        self.close_connection = True
        self._send(code, b"refused\n")

    def version_string(self) -> str:
        return "mlxtune"

    def log_message(self, *_: Any) -> None:
        """Nothing: a terminal has better things to show, and the path holds the token."""
