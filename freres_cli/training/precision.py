"""Mixed precision where the machine is fast at it."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context in which matrix products run in bfloat16, on ``device``; it changes nothing on a CPU that has no
    such instructions, where bfloat16 is many times slower than float32."""
    is_fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_fast)
