"""What a server tells Flower's official SuperNode: which app to start, and whose word there is for it.

A SuperNode pulls an app (a FAB, a zip file) before its first message. Ours has no code in it: one line names a module of the installed
package. It is the same bytes in every deployment, so that a key which has signed it once can be thrown away; a device that was given the
public half (`--trusted-entities`) then starts this app and no other, whatever its server sends.
"""

import hashlib
import io
import json
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

from cooperllm.errors import ConfigError

APP = "cooperllm.deployment.supernode_app:app"
PUBLISHER, NAME, VERSION = "cooperllm", "pointer", "1.0.0"
SIGNER = "fpk_cooperllm"
"""What Flower calls the key that the app is signed with."""

_PROJECT = f"""[project]
name = "{NAME}"
version = "{VERSION}"

[tool.flwr.app]
publisher = "{PUBLISHER}"

[tool.flwr.app.components]
clientapp = "{APP}"
serverapp = "{APP}"  # Flower demands one; nobody starts it
"""


def pointer() -> bytes:
    """Makes the app that a SuperNode pulls: a name of what is installed, always the same bytes, which is what devices trust.

    Returns:
        A FAB.

    Example:
        >>> hashlib.sha256(pointer()).hexdigest()[:16]
        'f0e5ab21fe2a2253'
    """
    project = _PROJECT.encode()
    content = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{8 * len(project)}\n".encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", project), (".info/CONTENT", content)):
            entry = zipfile.ZipInfo(name)  # of 1980, as Flower's own
            entry.create_system = 3  # not the one that this happens to run on
            archive.writestr(entry, data)
    return packed.getvalue()


def sign(signed_at_s: int) -> tuple[bytes, bytes]:
    """Signs the pointer with a key that nobody has before or afterwards.

    Args:
        signed_at_s: Seconds since 1970, part of what is signed.

    Returns:
        What the server shows (JSON), and what a device is given to trust it by (YAML).
    """
    key = ed25519.Ed25519PrivateKey.generate()
    signature = key.sign(create_message_to_sign(hashlib.sha256(pointer()).digest(), signed_at_s))
    entry = {"signed_at": signed_at_s, "signature": urlsafe_b64encode(signature).decode()}
    # Flower's hub says here whether an app's licence is valid; a SuperNode that checks signatures wants a word there.
    shown = {"valid_license": "Valid", SIGNER: json.dumps(entry)}
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return json.dumps(shown).encode(), f'{SIGNER}: "{public.decode()}"\n'.encode()


def signed_pointer(file: Path) -> Fab:
    """Puts the pointer beside its signature.

    Args:
        file: The signature, as `cooperllm admit-supernodes` writes it.

    Returns:
        What a server hands out.

    Raises:
        ConfigError: If the file is missing or is something else.
    """
    try:
        shown = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: found no signature ({error}); `cooperllm admit-supernodes` writes one") from error
    if not isinstance(shown, dict) or not all(isinstance(value, str) for value in shown.values()):
        raise ConfigError(f"{file}: found something else than a signature; `cooperllm admit-supernodes` writes one")
    return Fab("", pointer(), shown)
