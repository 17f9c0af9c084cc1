"""A TLS server in front of a plain one, made of Python's `ssl` alone: the other side of the
clients' TLS. Its context can be replaced while it runs, as when certificates are renewed."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

from etcdlite.certificates import Pair


def server_context(pair: Pair, client_ca: str = "") -> ssl.SSLContext:
    """`client_ca`: clients must show a certificate of this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    context.set_alpn_protocols(["etcdlite"])
    if client_ca:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class TlsFront:
    """Listens on a free port of 127.0.0.1 and passes plaintext on to `port`."""

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        self.context = context
        self.alpn: list[str | None] = []
        """The protocol of each connection."""
        self._port_behind = port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> TlsFront:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            outer = self.context.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
            return
        self.alpn.append(outer.selected_alpn_protocol())
        inner = socket.create_connection(("127.0.0.1", self._port_behind))
        self._open += [outer, inner]
        # One thread for both directions: an object of `ssl` is for one thread at a time.
        with outer, inner, contextlib.suppress(OSError):
            while True:
                readable = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
                for source, target in ((outer, inner), (inner, outer)):
                    if source in readable:
                        data = source.recv(65_536)
                        if not data:
                            return
                        target.sendall(data)
