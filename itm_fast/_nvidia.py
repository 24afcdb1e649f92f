"""What the Triton and the CUDA kernels both need of a device and a dtype."""

from __future__ import annotations

import torch

NO_FLOAT64 = "its kernels compute in float32 at best and so take no float64; torch and reference do"


def why_not(device: torch.device, least: tuple[int, int]) -> str | None:
    """None if the device is an NVIDIA GPU of this compute capability or more, else one sentence."""
    if torch.version.hip:
        return "its kernels are written for NVIDIA GPUs, and this torch is built for ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < least:
        name = torch.cuda.get_device_name(device)
        wanted = ".".join(map(str, least))
        return f"needs a GPU of compute capability {wanted} or more, and {name} has {'.'.join(map(str, found))}"
    return None
