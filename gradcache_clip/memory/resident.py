"""Memory of this process as the operating system sees it, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Physical memory that this process holds now, in bytes.

    VmRSS of /proc/self/status (reported in units of 1,024 bytes) on Linux, else psutil's rss.

    Example:
        >>> resident_bytes() > 1_000_000
        True
    """
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most physical memory that this process ever held, in bytes.

    On Linux this is VmHWM of /proc/self/status (reported in units of 1,024 bytes), which
    `reset_peak_resident_bytes` can set back. Elsewhere it is `ru_maxrss` of getrusage(2), which
    macOS gives in bytes and other systems in units of 1,024, or, where there is no getrusage,
    psutil's peak working set. Shared libraries count, so compare with a value from before.

    Example:
        >>> peak_resident_bytes() >= resident_bytes() - 1_000_000
        True
    """
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_resident_bytes() -> bool:
    """Set the peak back to the present resident memory; False where the system cannot.

    Linux does so when "5" is written to /proc/self/clear_refs (proc(5)). Where False comes back, a
    peak can only be trusted in a process that has done nothing larger before.

    Example:
        >>> reset_peak_resident_bytes() in (True, False)
        True
    """
    if not _CLEAR_REFS.exists():
        return False
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: expected a line {field}, got none; is /proc mounted?")
