"""Which device a name means."""

from __future__ import annotations

import torch

from llm_mlp.config import ConfigError


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. A numbered GPU becomes the current one: kernels are launched there.

    Raises:
        ConfigError: a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()  # a device that cannot hold numbers (meta) fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
