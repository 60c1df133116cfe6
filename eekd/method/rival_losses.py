"""What the methods of others add to the cross-entropy, by their published formulas."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eekd.method.attention import SnapshotAttention
from eekd.method.losses import EEKDLoss, Measurements
from eekd.ops import ensemble_kd

EVEN = 1e-6  # numbers that differ by no more, relatively, are rounding's


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    beta: float,
    ignore_index: int = -100,
) -> Tensor:
    """TCKD + β NCKD, the two parts of distillation, of the label and of the other classes.

        TCKD = τ² KL(b(z) || b(s)),   b(x) = (softmax(x / τ)_y, 1 - softmax(x / τ)_y)
        NCKD = τ² KL(softmax(z / τ) || softmax(s / τ)), both over the classes other than y

    Logits (B, C), labels (B,) classes; the mean over the rows whose label is not `ignore_index`, float32, and 0 where
    there is none. ValueError for soft labels.
    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), with their α = 1.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be classes (B,) for DKD, got {tuple(labels.shape)} of {labels.dtype}")
    counted = labels != ignore_index
    own = labels.where(counted, 0)[:, None]

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float().where(counted[:, None], 0)  # what is not finite there would make the gradient NaN
        others = x.scatter(1, own, -math.inf)
        return torch.cat([x.gather(1, own), temperature * (others / temperature).logsumexp(1, keepdim=True)], 1), others

    def apart(s: Tensor, z: Tensor) -> Tensor:
        return ensemble_kd(s, z[None], temperature=temperature, reduction="none").loss

    tckd, nckd = map(apart, parts(student_logits), parts(teacher_logits))
    return (tckd + beta * nckd).where(counted, 0).sum() / counted.sum().clamp(min=1)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """τ² (1 - mean_b ρ(q_b, p_b)) + τ² (1 - mean_c ρ(q_c, p_c)), of rows b and of columns c of probabilities.

    q = softmax(s / τ), p = softmax(z / τ), both (B, C); ρ is Pearson's correlation. Rows and columns of q that are
    constant, as of a head that starts at 0, have no correlation, and so no gradient.
    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), with β = γ.
    """
    q, p = ((x.float() / temperature).softmax(1) for x in (student_logits, teacher_logits))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        constant = a.amax(1, keepdim=True) - a.amin(1, keepdim=True) <= EVEN * a.amax(1, keepdim=True)
        a, b = (x - x.mean(1, keepdim=True) for x in (torch.where(constant, a.detach(), a), b))
        return 1 - F.cosine_similarity(a, b, dim=1).mean()

    return temperature**2 * (apart(q, p) + apart(q.t(), p.t()))


def fused_logits(snapshot_logits: Tensor, weights: Tensor, temperature: float, fusion: str = "probability") -> Tensor:
    """Logits t of which softmax(t / τ) is the target p = Σ_m w_m softmax(z_m / τ), or softmax(Σ_m w_m z_m / τ).

    Snapshot logits (M, B, C), weights (B, M); `fusion` is "probability" or "logit"; (B, C), float32, detached.
    """
    z, w = snapshot_logits.detach().float(), weights.detach().t()[..., None]
    if fusion == "logit":
        return (w * z).sum(0)
    return temperature * ((z / temperature).log_softmax(2) + w.log()).logsumexp(0)


def attention_map(maps: Tensor) -> Tensor:
    """Where the activations (B, C, H, W) are large: mean_c x_c², a vector (B, H W) of length 1."""
    return F.normalize(maps.float().square().mean(1).flatten(1))


def at_loss(student_maps: Sequence[Tensor], teacher_attention: Sequence[Tensor]) -> Tensor:
    """Σ_j mean (Q(v_j) - Q(u_j))², where Q is `attention_map` and Q(u_j) is given.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), as Tian et al. (ICLR 2020)
    compute it.
    """
    pairs = zip(student_maps, teacher_attention, strict=True)
    return torch.stack([(attention_map(v) - q.float()).square().mean() for v, q in pairs]).sum()


class Hint(nn.Module):
    """mean (r(v) - u)², where r is a 1×1 convolution with batch norm and ReLU, which is learned.

    Maps v (B, C, H, W) of the student, u (B, C', H, W) of the teacher.
    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the regressor of Tian et al. (2020).
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__()
        convolution = nn.Conv2d(student_channels, teacher_channels, 1)
        self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels), nn.ReLU())

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        return F.mse_loss(self.regressor(student_maps.float()), teacher_maps.float())


class Contrast(nn.Module):
    """Tells the teacher's features of an image from those of images of other classes, and the student's likewise.

    With a = v̂ and memory of û, then with a = û and memory of v̂, where x̂ is a linear map of features to `width`
    numbers, scaled to length 1:

        h(x) = P(x) / (P(x) + m / N),   P(x) = exp(a · x / τ) / Z
        loss = -mean_b (log h(x of the same image) + Σ log (1 - h(x of m others)))

    The memory holds what each of the N training images was mapped to when it was last seen, and moves by
    1 - `momentum`. The others are those of another class among `negatives` images, which are drawn once for a batch,
    or among all where N is no more. Z is N times the mean of exp(a · x / τ) in the first batch.

    Student's features (B, D), teacher's (B, D'), index (B,), places in `labels` (N,).
    Source: Tian et al., "Contrastive Representation Distillation" (ICLR 2020), which draws for each image.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    z: Tensor
    labels: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        labels: Tensor,
        width: int = 128,
        negatives: int = 16_384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        self.student, self.teacher = nn.Linear(student_dim, width), nn.Linear(teacher_dim, width)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = math.sqrt(3 / width)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(labels), width).uniform_(-bound, bound))
        self.register_buffer("z", torch.zeros(2))
        self.register_buffer("labels", labels.clone(), persistent=False)

    def forward(self, student_features: Tensor, teacher_features: Tensor, index: Tensor) -> Tensor:
        count = len(self.labels)
        v, u = F.normalize(self.student(student_features.float())), F.normalize(self.teacher(teacher_features.float()))
        drawn = torch.arange(count, device=index.device)
        if count > self.negatives:
            drawn = torch.randint(count, (self.negatives,), device=index.device)
        alike = self.labels[drawn] == self.labels[index][:, None]  # (B, K)
        noise = (len(drawn) - alike.sum(1)).clamp(min=1) / count
        loss = torch.zeros((), device=index.device)
        for i, (anchor, memory) in enumerate(((v, self.teacher_memory), (u, self.student_memory))):
            same = (anchor * memory[index]).sum(1) / self.temperature
            others = (anchor / self.temperature @ memory[drawn].t()).masked_fill(alike, -math.inf)
            if not self.z[i]:
                with torch.no_grad():
                    every = len(same) + others.isfinite().sum()
                    self.z[i] = (same.exp().sum() + others.exp().sum()) / every * count
            even = (self.z[i] * noise).log()  # where h is 1/2
            loss = loss + (F.softplus(even - same) + F.softplus(others - even[:, None]).sum(1)).mean()
        self._remember(index, v, u)
        return loss

    @torch.no_grad()
    def _remember(self, index: Tensor, v: Tensor, u: Tensor) -> None:
        for memory, x in ((self.student_memory, v), (self.teacher_memory, u)):
            memory[index] = F.normalize(self.momentum * memory[index] + (1 - self.momentum) * x)


class AttentionAtOne(nn.Module):
    """Weights w (B, M) that minimise -log Σ_m w_m softmax(z_m)_y, at temperature 1, instead of that at τ.

    The arguments are those of EEKDLoss's attention, and `fusion`. Called as EEKDLoss is, it returns that loss, whose
    gradient is for the attention alone, and w, detached.
    Source: this project's (docs/results/attention.md).
    """

    def __init__(self, **attention):
        super().__init__()
        self.loss = EEKDLoss("attention", temperature=1.0, **attention)

    def forward(self, student_logits, snapshot_logits, labels, student_features, snapshot_features):
        given = student_logits.detach(), snapshot_logits, labels, student_features, snapshot_features
        total, measured = self.loss(*given)
        return total - measured["loss"], measured.row_weights.detach()


class _Weighed(nn.Module):
    """A loss with the weights of `AttentionAtOne`; called as EEKDLoss is, it returns the same."""

    def __init__(self, **attention):
        super().__init__()
        self.weigh = AttentionAtOne(**attention)
        self.options = {name: self.weigh.loss.options[name] for name in ("fusion", "ignore_index")}

    @property
    def attention(self) -> SnapshotAttention:
        return cast(SnapshotAttention, self.weigh.loss.attention)

    def forward(self, student_logits, snapshot_logits, labels, student_features, snapshot_features):
        if labels is None:
            raise ValueError("labels must be given, for the attention learns from them, got None")
        attention_loss, w = self.weigh(student_logits, snapshot_logits, labels, student_features, snapshot_features)
        loss = self._alone(student_logits, snapshot_logits, labels, w)
        measured = {"loss": loss.detach(), "attention_loss": attention_loss.detach()}
        return loss + attention_loss, Measurements(measured, w)

    def _alone(self, student_logits: Tensor, snapshot_logits: Tensor, labels: Tensor, w: Tensor) -> Tensor:
        """The loss without the attention's own."""
        raise NotImplementedError


class LearnedAtOne(_Weighed):
    """L of EEKD at `temperature` with the weights of `AttentionAtOne`; called as EEKDLoss is, and returns the same."""

    def __init__(self, temperature: float, alpha: float, **attention):
        super().__init__(**attention)
        self.options |= {"temperature": temperature, "alpha": alpha}

    def _alone(self, student_logits, snapshot_logits, labels, w):
        return ensemble_kd(student_logits, snapshot_logits, labels, scores=w.log(), **self.options).loss


class AttentionDISTLoss(_Weighed):
    """EEKD's fused prediction as the teacher of DIST.

        L = CE(s, y) + β dist_loss(s, t, τ),    t = fused_logits(z, w, τ)

    with the weights w of `AttentionAtOne`. It is called as EEKDLoss is, and returns the same: L plus the attention's
    loss, and the measurements. Its arguments are τ, β, and those of `AttentionAtOne`: optimise its parameters with the
    student's. Labels are classes (B,), which all count, or soft (B, C); logits are (B, C), those of the snapshots
    (M, B, C).
    Source: this project's (docs/results/study.md).
    """

    def __init__(self, temperature: float = 2.0, beta: float = 2.0, **attention):
        super().__init__(**attention)
        self.temperature, self.beta = temperature, beta

    def _alone(self, student_logits, snapshot_logits, labels, w):
        target = fused_logits(snapshot_logits, w, self.temperature, self.options["fusion"])
        ignored = self.options["ignore_index"]
        label = F.cross_entropy(student_logits.float(), labels, ignore_index=ignored, reduction="sum")
        rows = (labels != ignored).sum().clamp(min=1) if labels.ndim == 1 else len(labels)
        return label / rows + self._added(student_logits, target, labels)

    def _added(self, student_logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        return self.beta * dist_loss(student_logits, target, self.temperature)


class AttentionDKDLoss(AttentionDISTLoss):
    """EEKD's fused prediction as the teacher of DKD.

        L = CE(s, y) + r dkd_loss(s, t, y, τ, β),    t = fused_logits(z, w, τ)

    As AttentionDISTLoss, for labels that are classes. Rows with the label `ignore_index` do not count.

    Attributes:
        risen: r. `eekd train` raises it to 1 over the first twelfth of the training, as DKD does.
    """

    def __init__(self, temperature: float = 2.0, beta: float = 0.5, **attention):
        super().__init__(temperature, beta, **attention)
        self.risen = 1.0

    def _added(self, student_logits, target, labels):
        return self.risen * dkd_loss(
            student_logits, target, labels, self.temperature, self.beta, self.options["ignore_index"]
        )
