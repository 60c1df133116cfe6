"""Every op as a formula in plain torch: the specification for tests, benchmarks and `use_backend("reference")`."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ensemble_kd(
    student_logits: Tensor,
    snapshot_logits: Tensor | list[Tensor],
    labels: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    query: Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 5.0,
    alpha: float = 0.5,
    fusion: str = "probability",
    attention_objective: str = "label",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eekd.ensemble_kd` by autograd; any dtype, computed in fp32, or in fp64 where an input is fp64."""
    return _ensemble_kd(
        lambda s, z, y, counted: (s, z, y),
        student_logits,
        snapshot_logits,
        labels,
        scores,
        query,
        keys,
        temperature,
        alpha,
        fusion,
        attention_objective,
        reduction,
        ignore_index,
    )


def sparse_ensemble_kd(
    student_logits: Tensor,
    snapshot_logits: Tensor | list[Tensor],
    snapshot_tail: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    query: Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 5.0,
    alpha: float = 0.5,
    fusion: str = "probability",
    attention_objective: str = "label",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eekd.sparse_ensemble_kd` by autograd: `ensemble_kd` with the classes outside `indices` as one more column."""

    def columns(s, z, y, counted):
        chosen = counted(indices, torch.long)
        tail = counted(snapshot_tail[:, :, None])
        rest = s.scatter(1, chosen, -torch.inf) / temperature
        empty = (rest == -torch.inf).all(1, keepdim=True)
        rest = torch.where(empty, -torch.inf, torch.where(empty, 0, rest).logsumexp(1, keepdim=True))
        s = torch.cat((s.gather(1, chosen), temperature * rest), 1)
        z = torch.cat((z, temperature * tail), 2)
        if y.dim() == 2:
            return s, z, torch.cat((y.gather(1, chosen), y.scatter(1, chosen, 0).sum(1, keepdim=True)), 1)
        found = chosen == y[:, None]
        return s, z, torch.where(found.any(1), found.byte().argmax(1), chosen.shape[1])

    return _ensemble_kd(
        columns,
        student_logits,
        snapshot_logits,
        labels,
        scores,
        query,
        keys,
        temperature,
        alpha,
        fusion,
        attention_objective,
        reduction,
        ignore_index,
    )


def linear_ensemble_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    snapshot_hidden: Tensor | list[Tensor],
    snapshot_weights: Tensor | list[Tensor],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    snapshot_biases: Tensor | list[Tensor] | None = None,
    scores: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    fusion: str = "probability",
    attention_objective: str = "label",
    reduction: str = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eekd.linear_ensemble_kd` by autograd: all logits, and `ensemble_kd`."""
    hidden, count = list(snapshot_hidden), len(snapshot_hidden)
    heads = [snapshot_weights] if isinstance(snapshot_weights, Tensor) else list(snapshot_weights)
    biases = [None] if snapshot_biases is None or not len(snapshot_biases) else snapshot_biases
    biases = [biases] if isinstance(biases, Tensor) and biases.dim() == 1 else list(biases)
    heads, biases = (x * count if len(x) == 1 else x for x in (heads, biases))
    classes = min(len(weight) for weight in (student_weight, *heads))  # pyright: ignore[reportArgumentType]
    given = (student_hidden, student_weight, student_bias, scores, *hidden, *heads)
    wide = any(x is not None and x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if wide else torch.float32

    def logits(h, weight, bias):
        x = h.to(dtype) @ weight[:classes].to(dtype).t()
        x = logit_scale * (x if bias is None else x + bias[:classes].to(dtype))
        return x if softcap is None else softcap * (x / softcap).tanh()

    loss, weights, attention_loss = ensemble_kd(
        logits(student_hidden, student_weight, student_bias),
        [logits(*each) for each in zip(hidden, heads, biases, strict=True)],
        labels,
        scores=scores,
        temperature=temperature,
        alpha=alpha,
        fusion=fusion,
        attention_objective=attention_objective,
        reduction=reduction if denominator is None else "sum",
        ignore_index=ignore_index,
    )
    if denominator is None:
        return loss, weights, attention_loss
    return loss / denominator, weights, attention_loss / denominator


def _ensemble_kd(
    columns,
    student,
    z,
    labels,
    scores,
    query,
    keys,
    temperature,
    alpha,
    fusion,
    attention_objective,
    reduction,
    ignore_index,
):
    """Distils through columns(student, z, labels, counted) of the classes, their labels; CE is of the classes.

    Hard labels are (B), soft ones (B, C).
    """
    if not isinstance(z, Tensor):
        z = torch.stack(tuple(z))
    dtype = torch.float64 if torch.float64 in (student.dtype, z.dtype) else torch.float32
    rows, snapshots, device = student.shape[0], z.shape[0], student.device
    soft = labels is not None and labels.is_floating_point()
    if labels is None or soft:
        y = labels.to(dtype) if soft else torch.zeros(rows, dtype=torch.long, device=device)
        keep = torch.ones(rows, dtype=torch.bool, device=device)
    else:
        keep = labels != ignore_index
        y = torch.where(keep, labels, 0).long()

    def counted(x, dtype=dtype):  # (…, B, n) in the computing dtype; ignored rows are neither read nor given a gradient
        return torch.where(keep[:, None], x, 0).to(dtype)

    student = counted(student)
    s, z, target = columns(student, counted(z), y, counted)
    if query is not None:
        e = (counted(query) * counted(keys)).sum(2).t()  # not as a matrix product, which autocast would round
    else:
        e = s.new_zeros(rows, snapshots) if scores is None else counted(scores)

    # A snapshot of weight 0 is not read, so its logits may be anything, and -inf columns never meet a product.
    log_w = F.log_softmax(e, dim=1).t()  # (M, B)
    w = log_w.exp()
    used = (w != 0)[:, :, None]
    floor = torch.finfo(dtype).min / 4  # stands for log 0 where autograd would meet inf - inf
    if fusion == "logit":
        masked = used & (z == -torch.inf)
        t = (w[:, :, None] * torch.where(used & ~masked, z, 0)).sum(0) / temperature
        log_p = F.log_softmax(t.masked_fill(masked.any(0), -torch.inf), dim=1)
    else:
        terms = log_w[:, :, None] + F.log_softmax(z / temperature, dim=2)
        log_p = torch.where(used & (terms != -torch.inf), terms, floor).logsumexp(0)
    log_p = log_p.clamp(min=floor)  # (B, C)

    if soft:
        impossible = ((target != 0) & (log_p <= floor)).any(1)
        attention_loss = torch.where(impossible, torch.inf, _cross_entropy(log_p, target))
    else:
        log_p_y = log_p.gather(1, target[:, None]).squeeze(1)
        attention_loss = torch.where(log_p_y <= floor, torch.inf, -log_p_y)
    if attention_objective == "label":
        log_p = log_p.detach()
    else:
        attention_loss = attention_loss.detach()
    p = log_p.exp()
    log_q = F.log_softmax(s / temperature, dim=1)
    loss = temperature**2 * (p * (log_p - torch.where(p == 0, 0, log_q))).sum(1)
    if labels is None:
        attention_loss = torch.zeros_like(loss)
    else:
        ce = _cross_entropy(F.log_softmax(student, 1), y) if soft else F.cross_entropy(student, y, reduction="none")
        loss = ce if alpha == 1 else loss if alpha == 0 else alpha * ce + (1 - alpha) * loss

    def reduce(x):
        x = torch.where(keep, x, 0)
        return x if reduction == "none" else x.sum() if reduction == "sum" else x.sum() / keep.sum().clamp(min=1)

    weights = torch.where(keep, w, 0).t().detach().float()
    return reduce(loss), weights, reduce(attention_loss)


def _cross_entropy(log_p: Tensor, y: Tensor) -> Tensor:
    """-Σ_c y_c log p_c of soft labels, in which 0 times -inf is 0."""
    return -torch.where(y == 0, 0, y * log_p).sum(1)
