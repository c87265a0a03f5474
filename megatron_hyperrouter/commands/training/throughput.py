"""The peak speed of known devices, for model FLOPs utilization."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

# Dense FLOP/s of matrix products in bfloat16, from the vendors' data sheets. The first name that a device's
# name contains counts, so longer ones come first.
_PEAK_BF16: Mapping[str, float] = MappingProxyType(
    {
        "B200": 2250e12,
        "B100": 1750e12,
        "H200": 989.4e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989.4e12,
        "GH200": 989.4e12,
        "A100": 312e12,
        "A800": 312e12,
        "H800": 989.4e12,
        "L40S": 362e12,
        "L40": 181e12,
        "A40": 149.7e12,
        "A10": 125e12,
        "L4": 121e12,
        "RTX 4090": 165.2e12,
        "RTX 3090": 71e12,
        "MI300X": 1307.4e12,
        "MI250X": 191.5e12,  # of one of its two dies, which a process sees as a device
    }
)


def peak_flops(*, bf16: bool) -> float | None:
    """FLOP/s of this rank's device in the precision of the run; None if they are not known.

    None in float32, where the speed of a GPU depends on settings of its libraries.
    """
    if not bf16 or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device_name: str) -> float | None:
    """The peak of the device with this name, as torch reports it."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)
