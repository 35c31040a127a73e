"""The runtime computes the same with the instructions of `halves` as without, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import pytest

import halves
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle

pytestmark = pytest.mark.skipif(not halves.available(), reason="the processor or the system has none")

TRUNCATING = {"__truncsfhf2": bytes.fromhex("c4e3791dc003 c3")}  # rounds towards zero
TOKENS = (5, 17, 900)
HALVES = np.arange(2**16, dtype=np.uint16)


def converted(function: str, bits: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """What a function of the library makes of numbers, both as the lowest bits of a register."""
    call = halves.library()[function]
    call.argtypes, call.restype = [ctypes.c_float], ctypes.c_float
    given = np.fromiter(bits, np.uint32).view(np.float32)
    return np.array([call(number) for number in given.tolist()], np.float32).view(np.uint32)


def narrowed(bits: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    return converted("__truncsfhf2", bits).astype(np.uint16)


def near_every_half() -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Every tenth half number, the middle between it and the next one, and what is beside both."""
    exact = HALVES[::10].view(np.float16).astype(np.float32).view(np.uint32).astype(np.int64)
    middles = exact + (1 << 12)
    return np.concatenate([each + by for each in (exact, middles) for by in (-1, 0, 1)]).astype(np.uint32)


def test_numbers_are_narrowed_to_the_same_bits_as_by_the_library_and_by_numpy() -> None:
    beyond = np.array([65519.996, 65520, 1e9, np.inf, 6e-8, 2.98e-8, 2.99e-8, 1e-30, 0], np.float32)
    numbers = np.concatenate([near_every_half(), beyond.view(np.uint32), (-beyond).view(np.uint32)])
    values = numbers.view(np.float32)
    numbers = numbers[~np.isnan(values)]  # which Python's own floats do not leave as they are
    with np.errstate(over="ignore"):
        expected = numbers.view(np.float32).astype(np.float16).view(np.uint16)
    assert len(numbers) > 35_000 and len(np.unique(expected)) > 10_000
    with halves.using(halves.INSTRUCTIONS):
        found = narrowed(numbers)
    with halves.using(halves.originals()):
        original = narrowed(numbers)
    assert np.array_equal(found, expected)
    assert np.array_equal(original, expected)


def test_every_half_number_is_widened_to_the_same_bits_as_by_the_library_and_by_numpy() -> None:
    expected = HALVES.view(np.float16).astype(np.float32)
    with halves.using(halves.INSTRUCTIONS):
        found = converted("__extendhfsf2", HALVES)
    with halves.using(halves.originals()):
        original = converted("__extendhfsf2", HALVES)
    assert np.array_equal(found, original)
    assert np.array_equal(found.view(np.float32), expected, equal_nan=True)


def test_a_bundle_gives_the_same_logits_with_the_instructions_and_without(
    built: Callable[[str, str], Bundle],
) -> None:
    bundle = built("qwen3.6-27b", "int8hu")
    with CoreAIBackend().stepper(bundle.asset, bundle.functions, 8) as stepper:
        with halves.using(halves.INSTRUCTIONS):
            found = [stepper.step(token).tobytes() for token in TOKENS]
        stepper.reset()
        with halves.using(halves.originals()):
            assert [stepper.step(token).tobytes() for token in TOKENS] == found
    assert len(set(found)) == len(TOKENS)


def test_the_runtime_converts_by_these_functions(built: Callable[[str, str], Bundle]) -> None:
    bundle = built("qwen3.6-27b", "int8hu")
    with CoreAIBackend().stepper(bundle.asset, bundle.functions, 8) as stepper:
        right = stepper.step(5)
        stepper.reset()
        with halves.using(TRUNCATING):
            assert not np.array_equal(stepper.step(5), right)


def test_the_library_is_left_as_it_was() -> None:
    with halves.using(halves.originals()):
        with halves.using(TRUNCATING):
            assert narrowed([0x3F801FFF]) == [0x3C00]
        assert narrowed([0x3F801FFF]) == [0x3C01]
