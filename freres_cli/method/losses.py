"""The losses that train the modules (method section 10; the weights are ours, the paper gives none)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from freres_cli.method.fusion import FreResModules
from freres_cli.method.stretch_modules import StretchModules

DISTILLATION_WEIGHT = 1.0
TEMPERATURE = 2.0
GATE_WEIGHT = 1e-3


def answer_loss(scores: Tensor, truth: int, length: int) -> Tensor:
    """Return the mean negative log-likelihood of the true answer's ``length`` tokens (paper E.2).

    ``scores``: (k,) log-likelihood of each answer. ``truth``: index of the true one.
    """
    return -scores[truth] / length


def distillation_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return ``tau^2 KL(teacher || student)`` over the option probabilities (paper E.2); both (k,) log-likelihoods."""
    student = (scores / TEMPERATURE).log_softmax(-1)
    wanted = (teacher.to(scores.device) / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * F.kl_div(student, wanted, reduction="sum", log_target=True)


def gate_loss(modules: FreResModules | StretchModules) -> Tensor:
    """Return how far the gates are from 1, where they do nothing (paper E.2 regularizes them; the form is ours)."""
    return (modules.gates - 1).square().sum()


def total_loss(
    answers: Sequence[Tensor], distilled: Sequence[Tensor], modules: FreResModules | StretchModules
) -> Tensor:
    """Return the weighted sum of the losses, each averaged over questions."""
    loss = torch.stack(list(answers)).mean() + GATE_WEIGHT * gate_loss(modules)
    return loss + DISTILLATION_WEIGHT * torch.stack(list(distilled)).mean() if distilled else loss
