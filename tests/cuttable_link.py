"""A TCP link in this process that a test can cut: a node connects here in the place of its server."""

import contextlib
import enum
import socket
import threading


class Cut(enum.Enum):
    """What becomes of a link that is cut."""

    SILENT = "silent"
    """Nothing arrives and nobody is told, as when a cable is pulled; what was under way arrives when it is healed."""

    RESET = "reset"
    """Connections end at once and no new one is made, as when a router is switched off."""


class CuttableLink:
    """Forwards bytes both ways between whoever connects and a server; a context, which ends with every connection closed.

    Attributes:
        port: Where to connect, on this machine.
    """

    def __init__(self, port_of_server):
        self._server, self._port_of_server = socket.create_server(("127.0.0.1", 0)), port_of_server
        self.port = self._server.getsockname()[1]
        self._whole, self._is_reset, self._open = threading.Event(), False, set()
        self._whole.set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self._close(self._server)
        self._close_all()
        self.heal()

    def cut(self, how):
        """From here on nothing gets through."""
        self._whole.clear()
        if how is Cut.RESET:
            self._is_reset = True
            self._close_all()

    def heal(self):
        """From here on everything does, again."""
        self._is_reset = False
        self._whole.set()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                near, _ = self._server.accept()
                if self._is_reset:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._port_of_server))
                except OSError:
                    near.close()
                    continue
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source, sink):
        with contextlib.suppress(OSError):  # one of both has gone: so goes the other
            while data := source.recv(1 << 16):
                self._whole.wait()
                sink.sendall(data)
        self._close(source, sink)

    def _close_all(self):
        self._close(*self._open)

    def _close(self, *sockets):
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open -= set(sockets)
