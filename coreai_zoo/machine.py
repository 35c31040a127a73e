"""What this machine has."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that programs may still take without swapping, where Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
