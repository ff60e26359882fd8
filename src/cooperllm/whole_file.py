"""A file that appears whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file in one step: readers see the old or the new one, never a part, whatever is cut off in between.

    Args:
        file: In a directory that exists.
        data: Its content.

    Raises:
        OSError: If it cannot be written; what was there is there still.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_whole(Path(directory) / "a", b"b")
        ...     [file.read_bytes() for file in Path(directory).iterdir()]
        [b'b']
    """
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        try:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
            part.close()
            Path(part.name).replace(file)
        except OSError:
            Path(part.name).unlink(missing_ok=True)
            raise
