"""Half precision by instructions of the processor, where the Core AI runtime computes it step by step.

On Linux the runtime's interpreter converts every number between half and single precision by two functions of
libswiftCore, of some twenty instructions each: two thirds of the time of a step. A processor has one instruction for
each. They are written over the start of the two functions, in the memory of this process alone, and give the same bits:
all 2**32 single and all 2**16 half numbers were compared, those that are none included. test_halves.py compares those
where rounding turns, and steps of a bundle. `make nightly` leaves the runtime as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import mmap
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

INSTRUCTIONS = {
    "__truncsfhf2": bytes.fromhex("c4e3791dc000 c3"),  # vcvtps2ph xmm0, xmm0, to nearest and even; ret
    "__extendhfsf2": bytes.fromhex("c4e27913c0 c3"),  # vcvtph2ps xmm0, xmm0; ret
}
"""By function: what it is to do, in the machine code of x86-64; argument and result are in xmm0."""

_READ, _WRITE, _EXECUTE = 1, 2, 4  # of mprotect


@functools.cache
def available() -> bool:
    """Whether this system's runtime has the functions and its processor the instructions, and memory may be changed."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not _path().is_file():
        return False
    if " f16c " not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"):
        return False
    try:
        _write(originals())
    except OSError:  # a system that lets no code be written
        return False
    return True


def use_instructions() -> None:
    """Have the runtime use them from now on, in forks too, where they are available."""
    if available():
        _write(INSTRUCTIONS)


@contextlib.contextmanager
def using(codes: Mapping[str, bytes]) -> Iterator[None]:
    """Within the block the functions begin with `codes`, by name. No other thread may be in one of them meanwhile.

    Args:
        codes: machine code by function, no longer than what `INSTRUCTIONS` has.
    """
    before = _written(codes)
    _write(codes)
    try:
        yield
    finally:
        _write(before)


@functools.cache
def originals() -> Mapping[str, bytes]:
    """What the library has in the place of `INSTRUCTIONS`."""
    return _written(INSTRUCTIONS)


@functools.cache
def library() -> ctypes.CDLL:
    """The library of the functions, which the runtime will find loaded."""
    return ctypes.CDLL(str(_path()))


def _path() -> Path:
    found = importlib.util.find_spec("coreai")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0], "runtime", "lib", "swift", "linux", "libswiftCore.so")


def _address(function: str) -> int:
    return ctypes.cast(library()[function], ctypes.c_void_p).value or 0


def _written(codes: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: ctypes.string_at(_address(name), len(code)) for name, code in codes.items()}


def _write(codes: Mapping[str, bytes]) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    for name, code in codes.items():
        address = _address(name)
        first, last = (at & -mmap.PAGESIZE for at in (address, address + len(code) - 1))
        pages = ctypes.c_void_p(first), ctypes.c_size_t(last - first + mmap.PAGESIZE)
        for rights in (_READ | _WRITE | _EXECUTE, _READ | _EXECUTE):
            if system.mprotect(*pages, rights):
                raise OSError(ctypes.get_errno(), f"{name} cannot be changed")
            if rights & _WRITE:
                ctypes.memmove(address, code, len(code))
