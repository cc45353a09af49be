"""The numerics tag of a run: what can still change bytes when recipe and inputs are the same."""

from __future__ import annotations

from remelt.kernels import KERNEL_VERSION


def numerics_tag(device: str) -> str:
    """Kind of device and version of the kernels, such as `cpu-1`; one run uses one tag.

    `device` is `cpu`, `cuda` or `cuda:N`.
    """
    return f"{device.partition(':')[0]}-{KERNEL_VERSION}"
