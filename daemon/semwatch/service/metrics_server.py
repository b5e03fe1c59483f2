"""The HTTP server of the metrics: however many connect, it holds few connections, and each for a short time.

Every open connection is a descriptor and a thread of the daemon. Where all places are taken, the oldest connection
makes way: idle ones cannot keep Prometheus out.
"""

import socket
import socketserver
import threading
import time
from contextlib import suppress
from http.server import HTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

MAX_CONNECTIONS = 16
REQUEST_S = 10.0
"""Longest time of one connection, from its begin to its end."""
CLOSE_TIMEOUT_S = 5.0


class MetricsServer(socketserver.ThreadingMixIn, HTTPServer):
    """Serves one registry, in a thread of its own, from its construction until ``close``.

    Args:
        host: name or address to listen on.
        port: 0 lets the system choose.

    Raises:
        OSError, OverflowError: the address cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        family, _, _, _, (address, _, *more) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self._open: dict[socket.socket, float] = {}  # oldest first
        self._lock = threading.Lock()
        handler = type("Handler", (MetricsHandler,), {"registry": registry, "timeout": REQUEST_S})
        super().__init__((address, port, *more), handler)  # type: ignore[arg-type]  # IPv6 has four parts
        self._thread = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as ``HTTPServer`` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, for a thread to answer."""
        with self._lock:
            while len(self._open) >= MAX_CONNECTIONS:
                self._hang_up(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection that was answered."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: hang up on who takes too long."""
        with self._lock:
            for request, since in list(self._open.items()):
                if time.monotonic() - since > REQUEST_S:
                    self._hang_up(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: whoever hangs up early, or talks nonsense, is no news of ours."""

    def close(self) -> None:
        """Stop, and free the port."""
        self.shutdown()
        self.server_close()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _hang_up(self, request: socket.socket) -> None:
        self._open.pop(request, None)
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # its thread wakes, and closes it
