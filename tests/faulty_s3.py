"""A real S3 server (moto's) on loopback, behind a proxy that counts requests and injects faults."""

import contextlib
import http.client
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

from domainshuttle.pipelines.storage.retry import Limits

QUICK = Limits(
    attempts=4, total_seconds=20, first_wait=0.01, longest_wait=0.02, connect_seconds=2, stall_seconds=1
)  # fmt: skip
HOP = ("connection", "content-length", "expect", "transfer-encoding")


@dataclass
class Proxy:
    """Stands before the S3 server; each request of a method takes the next of its `faults`."""

    upstream: tuple[str, int]
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    faults: dict[str, deque[Any]] = field(default_factory=dict)
    always: Any = None
    port: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def uri(self, path: str, keys: str = "") -> str:
        return f"s3://{keys}bucket/{path}?endpoint_override=http://127.0.0.1:{self.port}"

    def fail(self, method: str, *faults: Any) -> None:
        self.faults[method] = deque(faults)

    def forget(self) -> None:
        """What is under way of a slow answer ends too: pyarrow makes no file system while a request is under way."""
        self.over.set()
        self.over = threading.Event()
        self.requests.clear()
        self.faults.clear()
        self.always = None

    def count(self, method: str) -> int:
        return sum(one[0] == method for one in self.requests)

    def ranges(self) -> list[tuple[int, int]]:
        """First and last byte of each range that was asked for."""
        spans = [one[2].removeprefix("bytes=").split("-") for one in self.requests if one[2]]
        return [(int(first), int(last)) for first, last in spans]

    def handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                proxy.requests.append((self.command, self.path, self.headers.get("Range", "")))
                body = self.body()
                waiting = proxy.faults.get(self.command)
                fault = waiting.popleft() if waiting else proxy.always
                self.close_connection = True  # curl tries again by itself when a connection that it kept breaks
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # where the client gave up
                    self.forward(body, fault)

            def handle_expect_100(self) -> bool:
                self.send_response_only(100)
                self.end_headers()
                self.wfile.flush()
                return True

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                content = b""
                while length := int(self.rfile.readline(), 16):
                    content += self.rfile.read(length)
                    self.rfile.readline()
                self.rfile.readline()
                return content

            def forward(self, body: bytes, fault: Any) -> None:
                if isinstance(fault, tuple):
                    status, code = fault
                    text = f"<Error><Code>{code}</Code><Message>{'as told, ' * 60}</Message></Error>".encode()
                    self.respond(status, [("Content-Type", "application/xml")], len(text), text)
                    return
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    return
                over = proxy.over
                if isinstance(fault, float) and over.wait(fault):
                    return
                if isinstance(fault, threading.Barrier):
                    fault.wait(10)
                connection = http.client.HTTPConnection(*proxy.upstream)
                passed = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
                connection.request(self.command, self.path, body, passed)
                response = connection.getresponse()
                data = response.read()
                length = int(response.headers.get("Content-Length", len(data)))
                headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP]
                if fault == "cut":
                    data = data[: len(data) // 2]
                if fault == "trickle":
                    self.respond(response.status, headers, length, b"")
                    for byte in data[:300]:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        if over.wait(0.05):
                            break
                    return
                self.respond(response.status, headers, length, data)

            def respond(self, status: int, headers: list[tuple[str, str]], length: int, data: bytes) -> None:
                self.send_response_only(status)
                for name, value in [*headers, ("Content-Length", str(length)), ("Connection", "close")]:
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                self.wfile.flush()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        return Handler


class Front(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up, as many tests want

    request_queue_size = 64  # a connection more than that would be taken up a second later


@contextlib.contextmanager
def serve_s3(bucket: str = "bucket") -> Iterator[Proxy]:
    """The proxy before a server that has a bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    connection = http.client.HTTPConnection(*server.get_host_and_port())
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    proxy = Proxy(server.get_host_and_port())
    front = Front(("127.0.0.1", 0), proxy.handler())
    proxy.port = front.server_port
    threading.Thread(target=front.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        front.shutdown()
        server.stop()
