"""The bundled model's vision tower, trained on dense labels of made frames."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freres_cli.backbones.attention import PACKED_FRAMES, use_attention
from freres_cli.workflows.muon import Muon
from freres_cli.world.draw import draw_scenes
from freres_cli.world.labels import CLASSES, STILLS, dense_labels, make_stills
from freres_cli.world.scene import TEXTURES


class DenseHead(nn.Module):
    """Reads the labels off each token; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1, 2, *CLASSES.values(), len(TEXTURES)]
        self.linear = nn.Linear(width, sum(self.sizes))

    def loss(self, tokens: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        present_logit, place, *logits = self.linear(tokens).split(self.sizes, dim=-1)
        present = labels["present"]
        loss = F.binary_cross_entropy_with_logits(present_logit[..., 0], present.float())
        loss = loss + F.smooth_l1_loss(place[present], labels["place"][present], beta=0.1) * 2
        scores = {"present": ((present_logit[..., 0] > 0) == present).float().mean().item()}
        scores["place_px"] = (place[present] - labels["place"][present]).abs().mean().item() * 16
        for name, logit in zip([*CLASSES, "texture"], logits, strict=True):
            chosen = torch.ones_like(present) if name == "texture" else present
            target = labels[name][chosen]
            loss = loss + F.cross_entropy(logit[chosen], target, ignore_index=-100) * (0.3 if name == "texture" else 1)
            known = target >= 0
            scores[name] = (logit[chosen].argmax(-1)[known] == target[known]).float().mean().item()
        return loss, scores


def to_patches(frames: Tensor, patch: int, merge: int, steps: int) -> Tensor:
    """(n, h, w, 3) uint8 -> the tower's rows, scaled to [-1, 1]; as ``qwen_vision.patches``, with gradients kept out."""
    n, h, w, _ = frames.shape
    rows, columns = h // (patch * merge), w // (patch * merge)
    cells = (frames.float() / 127.5 - 1).view(n, rows, merge, patch, columns, merge, patch, 3)
    values = cells.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * rows * columns * merge**2, 3, 1, patch, patch)
    return values.expand(-1, -1, steps, -1, -1).reshape(len(values), -1)


def run_tower(tower: Any, frames: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, rows, columns, D)."""
    config = tower.config
    patch, merge = config.patch_size, config.spatial_merge_size
    n, h, w, _ = frames.shape
    grid = torch.tensor([[n, h // patch, w // patch]], device=frames.device)
    out = tower(to_patches(frames, patch, merge, config.temporal_patch_size), grid_thw=grid, return_dict=True)
    return out.pooler_output.view(n, h // (patch * merge), w // (patch * merge), -1)


def train_tower(tower: Any, width: int, grid: int, minutes: float, out: Path, clips: int = 32, seed: int = 0, lr=2e-3) -> None:
    use_attention(tower, PACKED_FRAMES)
    head = DenseHead(width)
    params = [*tower.parameters(), *head.parameters()]
    matrices = [p for n, p in tower.named_parameters() if p.ndim == 2 and "blocks" in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in params if id(p) not in ids]
    optimizers = [
        Muon(matrices, 4 * lr),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    start, step = time.time(), 0
    while (spent := time.time() - start) < minutes * 60:
        share = spent / (minutes * 60)
        factor = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * share)).item()))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        scenes = [make_stills(seed * 10**6 + step * clips + i) for i in range(clips)]
        frames = torch.cat(draw_scenes(scenes))
        noise = torch.randn(frames.shape) * (4 * torch.rand(len(frames), 1, 1, 1))
        frames = (frames.float() + noise).clamp(0, 255)
        parts = [dense_labels(scene, grid) for scene in scenes]
        labels = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        loss, scores = head.loss(run_tower(tower, frames), labels)
        for p in params:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 25 == 0:
            print(f"{spent:6.0f}s step {step} loss {loss.item():.3f} "
                  + " ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
        if step % 200 == 0:
            torch.save({"tower": tower.state_dict(), "head": head.state_dict()}, out)
    torch.save({"tower": tower.state_dict(), "head": head.state_dict()}, out)
