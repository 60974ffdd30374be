"""Numbers that the host knows, on a device that is not waited for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device_of(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """``values`` as a tensor beside ``like``, of its dtype unless another is named.

    ``new_tensor`` and ``torch.tensor(..., device=...)`` copy from pageable memory, and so wait until a GPU has done all
    that it was asked for before.
    """
    on_host = torch.tensor(values, dtype=dtype or like.dtype, pin_memory=like.device.type == "cuda")
    return on_host.to(like.device, non_blocking=True)
