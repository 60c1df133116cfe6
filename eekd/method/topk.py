"""Logits kept at K of the C classes of a row, with what is needed of the others at any temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor

ATOMS = 6
TILT = 0.4  # 1 / τ, where the atoms are exact; of 0.3 … 0.7 the one whose largest error over τ in 1 … 20 is least
SELECT = 2.0  # τ of the choice of classes; of 1, 2, 4, 5, 8, 20 the one that leaves least out over τ in 1 … 20


@dataclass(frozen=True)
class TopKLogits:
    """The logits of M snapshots for B rows at K classes, and a summary of the other C - K classes.

    `EEKDLoss` and `log_weights` take it instead of logits (M, B, C). len(x) is M. x[1:] or x[[0, 2]] selects snapshots,
    as in a tensor.

    Attributes: `logits` (M, B, K); `indices` (B, K) int64, their classes in rising order, the same for all snapshots;
    `atoms` (M, B, 2, J) float32, x and a: quadrature node j stands for exp(a_j) classes of logit x_j; `classes` C.
    """

    logits: Tensor
    indices: Tensor
    atoms: Tensor
    classes: int

    def tail(self, temperature: float) -> Tensor:
        """log Σ_{c not in indices} exp(z_mc / τ), as log Σ_j exp(a_j + x_j / τ): (M, B) float32, -inf where K = C.

        It takes any τ > 0. It is exact at τ = 2.5, and if C - K <= 6. On the logits of tests/test_topk.py and for τ
        from 1 to 20, τ times the error is at most half a float16 unit in the last place of the largest logit left out.
        At other τ the error grows slowly.
        """
        x, a = self.atoms.unbind(2)
        return (a + x / temperature).logsumexp(-1)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, which) -> "TopKLogits":
        if not isinstance(which, (slice, list, Tensor)):
            raise TypeError(f"the index must be a slice, a list or a tensor, got {which!r}")
        return TopKLogits(self.logits[which], self.indices, self.atoms[which], self.classes)


@torch.no_grad()
def top_k_logits(logits: Tensor, k: int, labels: Tensor | None = None) -> TopKLogits:
    """TopKLogits of logits (M, B, C), at the k classes that are likeliest under the uniform mean at τ = 2.

    The class of `labels` (B,) is always among them; a label that is no class (an ignored row) adds none. The atoms are
    the nodes of the Gauss quadrature over the logits left out, with weights exp(z / 2.5). J nodes give the exact
    Σ_c exp(z_c / τ) and its first 2 J - 1 derivatives by 1 / τ at τ = 2.5.

    Raises TypeError, ValueError for other shapes, a k that is not from 1 to C, and logits that are +inf or NaN.
    Source: Golub and Welsch, "Calculation of Gauss quadrature rules" (1969); by Lanczos, in float64.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be floating-point of shape (M, B, C), got {got}")
    rows, classes = logits.shape[1:]
    if type(k) is not int or not 1 <= k <= classes:
        raise ValueError(f"k must be from 1 to {classes}, the number of classes, got {k!r}")
    if labels is not None and labels.shape != (rows,):
        raise ValueError(f"labels must have shape ({rows},), got {tuple(labels.shape)}")
    if not (logits < torch.inf).all():
        raise ValueError("logits must be below infinity and not NaN to keep the top k of them")
    likely = torch.zeros(rows, classes, device=logits.device)
    for z in logits:
        likely += (z.float() / SELECT).softmax(1)
    if labels is not None:
        named = torch.arange(classes, device=logits.device) == labels[:, None]
        likely = likely.masked_fill(named, torch.inf)
    indices = likely.topk(k, 1).indices.sort(1).values
    out = torch.ones_like(likely, dtype=torch.bool).scatter(1, indices, False).nonzero()[:, 1].view(rows, classes - k)
    kept = logits.gather(2, indices.expand(len(logits), rows, k))
    atoms = _atoms(logits.gather(2, out.expand(len(logits), rows, classes - k)).double())
    return TopKLogits(kept, indices, atoms.float(), classes)


def _atoms(z: Tensor) -> Tensor:
    """Nodes and logarithms of weights (…, 2, J) of the quadrature of z (…, n) float64."""
    n = z.shape[-1]
    if not n:
        return torch.stack((z, z), -2)
    tilted = (TILT * z).logsumexp(-1, keepdim=True)
    v = ((TILT * z - tilted) / 2).exp().nan_to_num(0)  # all of them -inf: no weight anywhere
    z = z.masked_fill(z == -torch.inf, 0)
    centre = (v * v * z).sum(-1, keepdim=True)
    z = z - centre
    tiny = 1e-10 * (v * z).norm(dim=-1, keepdim=True)  # fewer than J different logits: the rest is rounding
    basis, diagonal, beside = [v], [], []
    for _ in range(min(ATOMS, n)):
        u = z * basis[-1]
        diagonal.append((u * basis[-1]).sum(-1))
        for q in basis * 2:  # twice, or the basis is not orthogonal
            u = u - (u * q).sum(-1, keepdim=True) * q
        length = u.norm(dim=-1, keepdim=True)
        length = length.masked_fill(length <= tiny, 0)
        beside.append(length[..., 0])
        basis.append(torch.where(length > 0, u / length, 0))
    beside = torch.stack(beside[:-1], -1) if len(beside) > 1 else z[..., :0]
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    x, vectors = torch.linalg.eigh(matrix)
    x = x + centre
    a = 2 * vectors[..., 0, :].abs().log() + tilted - TILT * x
    return torch.stack((x, a), -2)


__all__ = ["TopKLogits", "top_k_logits"]
