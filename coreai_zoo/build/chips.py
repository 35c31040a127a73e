"""Chips that a bundle could run on: published bandwidth, memory sizes and arithmetic, and how much of it decode gets.

Sources, read in November 2026. Bandwidth and memory: Apple's announcements of M4 Pro and M4 Max (October 2024), M4 Max
and M3 Ultra in the Mac Studio (March 2025), M5 (October 2025), M5 Pro and M5 Max (March 2026) and M5 Ultra (August
2026), as repeated by the press and by a collection of Apple's specification pages (rlindsey2/sunkcost,
data/hardware.json). GB/s are 10^9 bytes per second; Apple's GB of memory are 2^30 bytes. Arithmetic: `TFLOPS_SOURCE`.
"""

from __future__ import annotations

from attrs import frozen

GB = 10**9
GIB = 2**30


@frozen
class Chip:
    """A chip at one memory bandwidth.

    Attributes:
        name: as it is sold; of a chip that is sold with two bandwidths, the slower one is told by its GPU.
        bandwidth: published bandwidth of the memory, in GB/s.
        memory: sizes of memory that it is sold with, in GiB, ascending.
        tflops: 10^12 floating-point operations that its GPU does per second in half precision; None where no source
            says it.
    """

    name: str
    bandwidth: float
    memory: tuple[int, ...]
    tflops: float | None = None

    def smallest_memory(self, needed: int) -> int | None:
        """The smallest memory in GiB whose GPU share holds `needed` bytes, or None when none does."""
        return next((size for size in self.memory if gpu_bytes(size) >= needed), None)


SYSTEM = "macOS"
"""What machines with these chips run."""

CHIPS = (
    Chip("M4", 120, (16, 24, 32), 4.6),
    Chip("M4 Pro", 273, (24, 48, 64), 9.2),
    Chip("M4 Max, 32-core GPU", 410, (36,), 14.7),
    Chip("M4 Max", 546, (48, 64, 128), 18.4),
    Chip("M3 Ultra", 819, (96, 256, 512), 28.4),
    Chip("M5", 153, (16, 24, 32)),
    Chip("M5 Pro", 307, (24, 48, 64)),
    Chip("M5 Max, 32-core GPU", 460, (36,)),
    Chip("M5 Max", 614, (48, 64, 128)),
    Chip("M5 Ultra", 1200, (96, 256)),
)

TFLOPS_SOURCE = (
    "the list of hardware of huggingface.js (pull request 1044; of the M3 Ultra huggingface.co/hardware), in float32; "
    "other lists have up to 18 % less. float16 is neither faster nor slower on these GPUs "
    "(philipturner/metal-benchmarks, measured on an M1). 32 cores have 32/40 of what 40 have. Of GPUs from M5 on, "
    "which have matrix units beside, no source counts these."
)

MEASURED = ("M4 Pro", "M4 Max")
"""The chips that measurements of prompts have been published of."""

GPU_SHARE_SOURCE = (
    "macOS lets the GPU hold about two thirds of a memory of up to 32 GB and three quarters of a larger one "
    "(llama.cpp discussion 2182); `sysctl iogpu.wired_limit_mb` raises it."
)


def gpu_bytes(memory: int) -> int:
    """Bytes that the GPU may hold by default in a machine with `memory` GiB; see `GPU_SHARE_SOURCE`."""
    return memory * GIB * (2 if memory <= 32 else 3) // (3 if memory <= 32 else 4)


EFFICIENCY = 0.79
"""Share of the published bandwidth that decode reaches; see `EFFICIENCY_SOURCE`."""

EFFICIENCY_SOURCE = (
    "the published 15.9 tokens/s of a dense 27 B int8 bundle on an M4 Max (546 GB/s), at the 27.2 GB that a token "
    "reads; the 87 % that were published with it count the embedding table too, which a token does not read."
)


def tokens_per_second(bytes_per_token: int, bandwidth: float, efficiency: float = 1.0) -> float:
    """Tokens per second when `bytes_per_token` come from a memory of `bandwidth` GB/s and nothing else takes time."""
    return bandwidth * GB * efficiency / bytes_per_token
