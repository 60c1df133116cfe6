"""A loss of your own: distillation, and a hint from the snapshots' features.

    eekd train --students ce uniform examples/own_loss.py:Hint
    eekd compare --methods ce uniform examples/own_loss.py:Hint --seeds 3

It runs as eekd's own students do: with --resume, from a logit bank that keeps features, under torchrun.
"""

import torch.nn.functional as F
from torch import nn

from eekd.train import StudentTrainer


class HintLoss(nn.Module):
    """L + 0.1 |A v - ū|², where L distils, v are the student's features, ū the snapshots' mean and A is learned.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), here on last features.
    """

    def __init__(self, distil: nn.Module, student_dim: int, teacher_dim: int):
        super().__init__()
        self.distil, self.map = distil, nn.Linear(student_dim, teacher_dim)

    def forward(self, logits, features, labels, teacher_logits, teacher_features):
        loss, measured = self.distil(logits, teacher_logits, labels)
        hint = F.mse_loss(self.map(features.float()), teacher_features.float().mean(0))
        return loss + 0.1 * hint, measured | {"hint": hint}


class Hint(StudentTrainer):
    """All snapshots weigh alike."""

    weighting = "uniform"
    needs_features = True

    def build_criterion(self):
        return HintLoss(super().build_criterion(), self.student_dim, self.teacher_dim)  # pyright: ignore

    def compute_loss(self, batch):
        logits, features = self.forward_features(batch.images)
        return self.criterion(logits, features, batch.labels, *batch.teacher)
