"""Small file systems, where this machine lets one mount them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disks(mount: Path) -> Iterator[Callable[[str], Path]]:
    """Within the block, mounts a file system of a size at `mount`, or gives the one that is there another size.

    The test is skipped where that is not allowed.
    """

    def make(size: str) -> Path:
        again = mount.is_mount()
        mount.mkdir(exist_ok=True)
        options = f"remount,size={size}" if again else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
        return mount

    try:
        yield make
    finally:
        if mount.is_mount():
            subprocess.run(["umount", mount], check=True)
