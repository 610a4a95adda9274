"""What the trained modules are asked to do (method section 10; weights are ours, the paper names none)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from freres_cli.method.fusion import FreResModules

DISTILLATION_WEIGHT = 1.0
TEMPERATURE = 2.0
GATE_WEIGHT = 1e-3


def answer_loss(scores: Tensor, truth: int, length: int) -> Tensor:
    """Mean negative log-likelihood of the true answer's ``length`` tokens; ``scores`` (k,), one an answer (paper E.2)."""
    return -scores[truth] / length


def distillation_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """``tau^2 KL(teacher || student)`` over the options' probabilities (paper E.2), both (k,) log-likelihoods."""
    student = (scores / TEMPERATURE).log_softmax(-1)
    wanted = (teacher.to(scores.device) / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * F.kl_div(student, wanted, reduction="sum", log_target=True)


def gate_loss(modules: FreResModules) -> Tensor:
    """How far the branch gates are from leaving the tokens as they are (paper E.2 regularizes gates; the form is ours)."""
    return (modules.gates - 1).square().sum()


def total_loss(answers: Sequence[Tensor], distilled: Sequence[Tensor], modules: FreResModules) -> Tensor:
    """Their weighted sum, each a mean over questions."""
    loss = torch.stack(list(answers)).mean() + GATE_WEIGHT * gate_loss(modules)
    return loss + DISTILLATION_WEIGHT * torch.stack(list(distilled)).mean() if distilled else loss
