"""Memory of this process as the operating system sees it, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return the physical memory of this process in bytes.

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
    """Return the peak physical memory of this process in bytes.

    On Linux this is VmHWM of /proc/self/status (in units of 1,024 bytes), which
    `reset_peak_resident_bytes` can reset. Elsewhere it is `ru_maxrss` of getrusage(2), in bytes on
    macOS and in units of 1,024 on other systems, or psutil's peak working set on Windows. Shared
    libraries count, so compare with an earlier value.

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
    """Reset the peak to the current resident memory; returns False if the system cannot.

    On Linux, writes "5" to /proc/self/clear_refs (proc(5)). If False, trust a peak only in a fresh
    process.

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
