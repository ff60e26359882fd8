"""Memory of a process as Linux counts it, read from /proc.

What a budget is about differs between systems: Linux and Android count everything resident, iOS only what is dirty. Both are here.
"""

from dataclasses import dataclass
from pathlib import Path

PEAK, RESIDENT, DIRTY, MAPPED = "VmHWM", "VmRSS", "RssAnon", "RssFile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a process holds, in MiB.

    Attributes:
        peak_mib: The most that was resident at once, since the process began or `reset_peak` was called.
        resident_mib: In memory now: dirty pages, mapped ones, and shared memory.
        dirty_mib: Anonymous pages: nothing but swap can take them away.
        mapped_mib: Pages of files, such as code and weights; clean ones cost the system nothing to drop.
    """

    peak_mib: float
    resident_mib: float
    dirty_mib: float
    mapped_mib: float


def is_measurable() -> bool:
    """Tells whether this system says what a process uses.

    Returns:
        Whether there is a /proc.
    """
    return Path("/proc/self/status").is_file()


def footprint(process_id: int | None = None) -> Footprint:
    """Reads what a process holds.

    Args:
        process_id: Whose memory; None for this process.

    Returns:
        Its footprint; zeros for a process that has ended.

    Example:
        >>> not is_measurable() or footprint().peak_mib >= footprint().dirty_mib > 0
        True
    """
    try:
        text = Path(f"/proc/{process_id or 'self'}/status").read_text(encoding="utf8")
    except (FileNotFoundError, ProcessLookupError):
        text = ""
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in text.splitlines()) if value.split()}
    peak, resident, dirty, mapped = (int(fields.get(name, "0")) / 1024 for name in (PEAK, RESIDENT, DIRTY, MAPPED))
    return Footprint(peak_mib=peak, resident_mib=resident, dirty_mib=dirty, mapped_mib=mapped)


def reset_peak() -> bool:
    """Lets the peak of this process begin anew at what is resident now.

    Returns:
        Whether the system allowed it; where not, peaks are those of all that came before.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
