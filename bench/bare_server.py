#!/usr/bin/env python3
"""The yardstick of claims: the standard library's threading server, answering a constant of so many bytes (0: a 204).

It prints its port. One argument: the bytes. Each answer is one packet, as the scheduler's is.
"""

from __future__ import annotations

import http.server
import sys

SIZE = int(sys.argv[1])
BODY = b'{"padding": "' + b"x" * (SIZE - 15) + b'"}' if SIZE else b""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self.send_response(200 if BODY else 204)
        if BODY:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer.request_queue_size = 1024  # with 5, a crowd's connections wait for a second
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        print(server.server_address[1], flush=True)
        server.serve_forever()
