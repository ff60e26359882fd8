"""What both ends of a connection show each other and believe, before a request is read.

Python's server ends a connection that it refuses without a word, and TLS 1.3 has a client's part of the handshake over by then: a node
that was refused sees a server that has gone.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cooperllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What a server shows, and what it wants to be shown.

    Attributes:
        chain: File of the certificate.
        key: File of its private key.
        node_authority: File with the certificate that every node's is signed by: whoever shows none is refused in the handshake. None
            asks nodes for no certificate.
    """

    chain: Path
    key: Path
    node_authority: Path | None = None

    def options(self) -> dict[str, Any]:
        """Returns what uvicorn calls all this."""
        shown = {"ssl_certfile": self.chain, "ssl_keyfile": self.key}
        return shown if self.node_authority is None else shown | {"ssl_ca_certs": self.node_authority, "ssl_cert_reqs": ssl.CERT_REQUIRED}


def node_context(authority: Path, certificate: Path | None, key: Path) -> ssl.SSLContext:
    """Makes what a node connects with.

    Args:
        authority: File with the certificate that the server's is signed by; the server's host is checked, too.
        certificate: File of the node's own, or None to show none.
        key: File of the private key that it is for.

    Returns:
        The context.

    Raises:
        ConfigError: If a file is missing or is something else.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(authority)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ConfigError(
            f"{authority}, {certificate}: found no certificate in one, or one that is not for {key} ({error}); "
            "`cooperllm enroll` writes them"
        ) from error
    return context


def is_about_tls(error: BaseException | None) -> bool:
    """Tells a server that is not who it should be from one that has gone in the middle of a handshake, or was never behind its proxy.

    Args:
        error: Of a connection.

    Returns:
        Whether the server has shown something wrong.

    Example:
        >>> is_about_tls(ssl.SSLCertVerificationError()), is_about_tls(ssl.SSLEOFError()), is_about_tls(ConnectionResetError())
        (True, False, False)
    """
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
