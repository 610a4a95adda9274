"""What the parts of the benchmark measure with: a drawn clip of any length and size, and the tower of a released model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch

from freres_cli.baselines.registry import FRE_RES
from freres_cli.world.clip import draw_frame

if TYPE_CHECKING:
    from freres_cli.backbones.qwen2_vl import Qwen2VLVisionEncoder

# Qwen2-VL-7B: the tower that 2B, 7B and 72B share, and the width of its language model.
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 3584}
GRID = (24, 24)
# As in the committed results, which are older than the default method.
METHOD = FRE_RES
METHOD_FLAGS = ("--method", METHOD)


def make_tower(depth: int = TOWER["depth"]) -> Qwen2VLVisionEncoder:
    """Return the tower of Qwen2-VL with random weights. ``depth``: of its equal layers."""
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    from freres_cli.backbones.qwen2_vl import Qwen2VLVisionEncoder
    from freres_cli.backbones.qwen_vision import CLIP_PIXELS

    torch.manual_seed(0)
    config: Any = Qwen2VLConfig(vision_config={**TOWER, "depth": depth}).vision_config
    return Qwen2VLVisionEncoder(Qwen2VisionTransformerPretrainedModel(config), CLIP_PIXELS, {})


def write_video(path: Path, num_frames: int, side: tuple[int, int]) -> Path:
    """Write an H.264 file at 30 fps that repeats a drawn clip."""
    pictures = [av.VideoFrame.from_ndarray(draw_frame(i, 120), format="rgb24") for i in range(120)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            frame = pictures[index % len(pictures)].reformat(width=side[0], height=side[1], format="yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
