"""How fast a device is: a table of published peaks with an assumed part of them, or a rate measured here.

The peaks are the makers' dense figures (no sparsity) for matrix products with float32 accumulation, in TFLOP/s, and the
memory in GB. The assumed part is what well-filled batches of a model of a billion parameters and more reach in forward
and backward passes; models of a few hundred million reach less, so measure when it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from tamis.errors import InvalidSettings
from tamis.values import nearest

__all__ = ["ASSUMED_UTILISATION", "DEVICES", "Device", "Rate", "assumed_rate"]

ASSUMED_UTILISATION = 0.35


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator's published figures."""

    title: str
    half_tflops: float  # bfloat16 (float16 where there is no bfloat16)
    float32_tflops: float  # without TF32
    memory_gb: float


DEVICES: dict[str, Device] = {
    "b200": Device(title="NVIDIA B200", half_tflops=2250, float32_tflops=75, memory_gb=180),
    "h200": Device(title="NVIDIA H200 SXM", half_tflops=989, float32_tflops=67, memory_gb=141),
    "h100": Device(title="NVIDIA H100 SXM", half_tflops=989, float32_tflops=67, memory_gb=80),
    "a100": Device(title="NVIDIA A100", half_tflops=312, float32_tflops=19.5, memory_gb=80),
    "l40s": Device(title="NVIDIA L40S", half_tflops=362, float32_tflops=91.6, memory_gb=48),
    "l4": Device(title="NVIDIA L4", half_tflops=121, float32_tflops=30.3, memory_gb=24),
    "a10": Device(title="NVIDIA A10", half_tflops=125, float32_tflops=31.2, memory_gb=24),
    "v100": Device(title="NVIDIA V100 SXM", half_tflops=125, float32_tflops=15.7, memory_gb=32),
    "t4": Device(title="NVIDIA T4", half_tflops=65, float32_tflops=8.1, memory_gb=16),
    "rtx4090": Device(title="NVIDIA RTX 4090", half_tflops=165, float32_tflops=82.6, memory_gb=24),
    "rtx3090": Device(title="NVIDIA RTX 3090", half_tflops=71, float32_tflops=35.6, memory_gb=24),
    "mi300x": Device(title="AMD MI300X", half_tflops=1307, float32_tflops=163, memory_gb=192),
}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Operations per second that passes reach, and where the figure comes from."""

    device: str
    forward: float  # FLOP/s of forward passes
    gradient: float  # FLOP/s of forward and backward passes, features included
    origin: str  # a sentence: assumed from what, or measured how
    memory_bytes: int | None = None
    is_cpu: bool = False
    is_assumed: bool = False  # of a device of the table, not measured where the plan is made


def assumed_rate(name: str, dtype: str, *, utilisation: float | None) -> Rate:
    """The rate of a device of the table.

    Raises:
        InvalidSettings: the table has no such device.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        raise InvalidSettings(
            f"assume_device: unknown device {name!r}{nearest(name, DEVICES)} (devices: {', '.join(DEVICES)}); "
            "or measure this machine with --measure"
        )
    peak = device.float32_tflops if dtype == "float32" else device.half_tflops
    part = ASSUMED_UTILISATION if utilisation is None else utilisation
    rate = peak * part * 1e12
    return Rate(
        device=device.title,
        forward=rate,
        gradient=rate,
        origin=f"assumed: {part:.0%} of a peak of {peak:g} TFLOP/s in {dtype}",
        memory_bytes=int(device.memory_gb * 1e9),
        is_assumed=True,
    )
