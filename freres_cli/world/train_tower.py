"""The bundled model's vision tower, trained on dense labels of generated frames: what is where, for every token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freres_cli.backbones.attention import PACKED_FRAMES, use_attention
from freres_cli.training.muon import Muon
from freres_cli.training.precision import mixed_precision
from freres_cli.training.state import put_back, read_state, save_state
from freres_cli.world.draw import draw_scenes
from freres_cli.world.labels import CLASSES, dense_labels, make_stills
from freres_cli.world.scene import TEXTURES

SCENES_A_STEP = 32  # of two frames each
LEVELS = (1, 3, 3)  # of the scenes, in turn
STEPS_A_SEED = 10**6
LEARNING_RATE = 2e-3
MUON_FACTOR = 4
WARM_UP_STEPS = 100
LOG_EVERY, SAVE_EVERY = 25, 200
NOISE = 4.0  # grey levels, about as much as a video encoder leaves


class DenseHead(nn.Module):
    """Reads the labels from each token. Discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1, 2, *CLASSES.values(), len(TEXTURES)]
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, tokens: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of ``tokens`` (n, rows, columns, D) on their ``dense_labels``, and the accuracy of each label."""
        present_logit, place, *logits = self.linear(tokens).split(self.sizes, dim=-1)
        present = labels["present"]
        loss = F.binary_cross_entropy_with_logits(present_logit[..., 0], present.float())
        loss = loss + 2 * F.smooth_l1_loss(place[present], labels["place"][present], beta=0.1)
        scores = {"present": ((present_logit[..., 0] > 0) == present).float().mean().item()}
        for name, logit in zip([*CLASSES, "texture"], logits, strict=True):
            # The texture is known everywhere, and easy.
            chosen, weight = (torch.ones_like(present), 0.3) if name == "texture" else (present, 1.0)
            target = labels[name][chosen]
            known = target >= 0
            if known.any():
                loss = loss + weight * F.cross_entropy(logit[chosen][known], target[known])
                scores[name] = (logit[chosen].argmax(-1)[known] == target[known]).float().mean().item()
        return loss, scores


def to_patches(frames: Tensor, patch_px: int, merge: int, steps: int) -> Tensor:
    """Return ``frames`` (n, h, w, 3) in 0..255 as the tower's rows in [-1, 1], in the order of ``qwen_vision.patches``.

    Frames may be floats, with noise. ``patch_px``: side of a patch. ``merge``: patches per side of a token. ``steps``:
    frames in a patch, here copies of a single frame.
    """
    n, h, w, _ = frames.shape
    rows, columns = h // (patch_px * merge), w // (patch_px * merge)
    cells = (frames.float() / 127.5 - 1).view(n, rows, merge, patch_px, columns, merge, patch_px, 3)
    values = cells.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * rows * columns * merge**2, 3, 1, patch_px, patch_px)
    return values.expand(-1, -1, steps, -1, -1).reshape(len(values), -1)


def run_tower(tower: Any, frames: Tensor) -> Tensor:
    """Return the latents of ``frames`` (n, h, w, 3) in 0..255: (n, rows, columns, D)."""
    config = tower.config
    patch, merge = config.patch_size, config.spatial_merge_size
    n, h, w, _ = frames.shape
    grid = torch.tensor([[n, h // patch, w // patch]], device=frames.device)
    out = tower(to_patches(frames, patch, merge, config.temporal_patch_size), grid_thw=grid, return_dict=True)
    latents: Tensor = out.pooler_output.view(n, h // (patch * merge), w // (patch * merge), -1)
    return latents


def train_tower(
    tower: Any,
    width: int,
    grid: int,
    num_steps: int,
    checkpoint: Path,
    device: torch.device,
    log: Callable[[str], None],
    seed: int = 0,
) -> None:
    """Train ``tower`` in place.

    ``width``: D. ``grid``: tokens per side of a frame. ``num_steps``: step to train up to. ``checkpoint``: state file,
    written every ``SAVE_EVERY`` steps; if it exists, training resumes from it. ``device``: of the tower. ``log``:
    receives lines of progress. ``seed``: another one gives other frames and another head.
    """
    use_attention(tower, PACKED_FRAMES)
    torch.manual_seed(seed)
    head = DenseHead(width).to(device)
    both = nn.ModuleDict({"tower": tower, "head": head})
    matrices = [p for name, p in tower.named_parameters() if p.ndim == 2 and "blocks" in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in both.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, MUON_FACTOR * LEARNING_RATE),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step = put_back(read_state(checkpoint), both, optimizers).get("step", 0)
    while step < num_steps:
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        frames, labels = _make_batch(seed * STEPS_A_SEED + step, grid, device)
        with mixed_precision(device):
            tokens = run_tower(tower, frames)
        loss, scores = head.loss(tokens.float(), labels)
        both.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % LOG_EVERY == 0:
            log(
                f"tower {step}/{num_steps} loss {loss.item():.3f} "
                + " ".join(f"{k} {v:.2f}" for k, v in scores.items())
            )
        if step % SAVE_EVERY == 0 or step == num_steps:
            save_state(checkpoint, both, optimizers, step=step)


def _make_batch(step: int, grid: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy frames (n, h, w, 3) and their labels, the same ones for the same step."""
    scenes = [make_stills(step * SCENES_A_STEP + i, LEVELS[i % len(LEVELS)]) for i in range(SCENES_A_STEP)]
    frames = torch.cat(draw_scenes(scenes, device=device)).float()
    generator = torch.Generator().manual_seed(step)
    level = NOISE * torch.rand(len(frames), 1, 1, 1, generator=generator)
    noise = torch.randn(frames.shape, generator=generator) * level
    parts = [dense_labels(scene, grid) for scene in scenes]
    labels = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
    return (frames + noise.to(device)).clamp(0, 255), labels
