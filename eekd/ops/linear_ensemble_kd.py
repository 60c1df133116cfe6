"""Hidden states and heads of M snapshots and a student become a loss, without logits of all rows in memory.

Over 350 lines, for the op, its chunks and their gradients are one computation.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from eekd.ops import checks, reference
from eekd.ops.backend import backend_for, namespace
from eekd.ops.fused import EnsembleKD

TILE = 4096  # classes of a head that are converted at once, where its dtype is not the one that is computed in
# Of a chunk by default: rows from which on products are about as fast as of all rows, and bytes of its logits at most.
ROWS = defaultdict(lambda: 128, cuda=1024)
BUDGET = defaultdict(lambda: 256 << 20, cuda=1 << 30)
LEAST_ROWS = 16  # whatever the budget


def linear_ensemble_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    snapshot_hidden: Tensor | Sequence[Tensor],
    snapshot_weights: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    snapshot_biases: Tensor | Sequence[Tensor] | None = None,
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
) -> EnsembleKD:
    """`ensemble_kd` for logits that heads compute from hidden states, chunk by chunk, with all gradients.

        s   = cap(logit_scale (student_hidden student_weightᵀ + student_bias))         cap(x) = c tanh(x / c), or x
        z_m = cap(logit_scale (snapshot_hidden_m snapshot_weights_mᵀ + snapshot_biases_m))
        loss, weights, attention_loss = ensemble_kd(s, z, labels, scores=scores, ...)

    Rows are tokens or samples. Rows whose label is `ignore_index` are dropped first. Logits and sums are float32, or
    float64 if an input is, for any dtypes of the inputs. M + 2 chunks of logits are in memory at once. If these are too
    large, the snapshots' probabilities are mixed one after another, in 3 chunks. If all snapshots share one head and
    logits are fused, Σ_m w_m W h_m = W Σ_m w_m h_m is one product for all M.

    Args:
        student_hidden: (N, H), float64, float32, bfloat16 or float16, as every tensor of numbers here.
        student_weight: (V, H).
        snapshot_hidden: (M, N, H_m), or M tensors (N, H_m) of any widths; 1 <= M <= 64. No gradient.
        snapshot_weights: M heads (V, H_m), or one (V, H_m) that all share. No gradient. If heads have different numbers
            of classes, all are cut to the smallest number V, so that padded vocabularies agree.
        labels: (N) integers below V; or (N, V) soft labels, read a chunk at a time and never copied whole; or None for
            pure distillation.
        student_bias: (V).
        snapshot_biases: M tensors (V), or one (V) that all share. No gradient.
        scores: (N, M) attention scores, or log-weights; None gives all snapshots the same weight.
        temperature, alpha, fusion, attention_objective, ignore_index: as in `ensemble_kd`. Language models are mostly
            distilled at temperature 1.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N).
        logit_scale: a factor of all logits.
        softcap: c > 0 bounds all logits to (-c, c); None does not.
        denominator: the divisor of "mean" instead of the number of rows, such as the number of labelled tokens in a
            whole batch of which this is a part. A number, or a tensor with one element.
        memory_budget: bytes of logits in memory at once. None: those of 128 rows and at most 256 MiB on a CPU, of 1024
            rows and at most 1 GiB on a GPU. At least 16 rows are computed at once.

    Returns:
        `loss` and `attention_loss` (0 without labels), float32, or float64 where an input is; `weights` (N, M) float32,
        without gradient. Gradients go to student_hidden, student_weight, student_bias and scores.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: a label that is neither a class nor `ignore_index`, or a backend that is not available.

    Without gradients (`torch.no_grad()`) none are computed. Second derivatives are refused.

    Source: arXiv 2202.12488; chunks of rows with gradients in the forward as in Hsu et al., "Liger Kernel",
    arXiv 2410.10989; the shared head is this project's.
    """
    shared = isinstance(snapshot_weights, Tensor)
    hidden = _listed("snapshot_hidden", snapshot_hidden, 3)
    heads = [snapshot_weights] if shared else _listed("snapshot_weights", snapshot_weights, 3)
    if isinstance(snapshot_biases, Tensor) and snapshot_biases.dim() == 1:
        biases = [snapshot_biases]
    else:
        biases = [] if snapshot_biases is None else _listed("snapshot_biases", snapshot_biases, 2)
    options = checks.checked_options(temperature, alpha, fusion, attention_objective, reduction, ignore_index)
    temperature, alpha, fusion, attention_objective, reduction, ignore_index = options
    classes = _check(student_hidden, student_weight, student_bias, hidden, heads, biases, scores)
    _check_numbers(logit_scale, softcap, memory_budget)
    device, rows = student_hidden.device, len(student_hidden)
    if labels is not None:
        labels = checks.checked_hard_or_soft_labels(labels, rows, classes, device)
    denominator = _checked_denominator(denominator, reduction, device)

    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in (student_hidden, student_weight, student_bias, scores)]
    if wants[3] and labels is None and attention_objective == "label":
        raise ValueError('labels must be given for attention_objective="label", got None; give labels or use "kl"')
    if backend_for(device) == "reference":
        return EnsembleKD(
            *reference.linear_ensemble_kd(
                student_hidden, student_weight, hidden, heads, labels, student_bias=student_bias,
                snapshot_biases=biases, scores=scores, temperature=temperature, alpha=alpha, fusion=fusion,
                attention_objective=attention_objective, reduction=reduction, ignore_index=ignore_index,
                logit_scale=logit_scale, softcap=softcap, denominator=denominator,
            )
        )  # fmt: skip
    loss, weights, attention_loss, *_ = torch.ops.eekd.linear_ensemble_kd_fwd(
        student_hidden, student_weight, student_bias, scores, hidden, heads, biases, labels, denominator, None, None,
        classes, float(temperature), float(alpha), fusion == "logit", attention_objective == "kl", reduction,
        ignore_index, float(logit_scale), None if softcap is None else float(softcap), memory_budget, wants,
    )  # fmt: skip
    return EnsembleKD(loss, weights, attention_loss)


torch.library.define(
    "eekd::linear_ensemble_kd_fwd",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? scores, Tensor[] snapshot_hidden, "
    "Tensor[] snapshot_weights, Tensor[] snapshot_biases, Tensor? labels, Tensor? denominator, Tensor? row_factor, "
    "Tensor? attention_factor, SymInt classes, float temperature, float alpha, bool logit_fusion, bool kl_objective, "
    "str reduction, int ignore_index, float logit_scale, float? softcap, int? memory_budget, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("eekd::linear_ensemble_kd_fwd", "CompositeExplicitAutograd")
def _forward(
    student_hidden, student_weight, student_bias, scores, snapshot_hidden, snapshot_weights, snapshot_biases, labels,
    denominator, row_factor, attention_factor, classes, temperature, alpha, logit_fusion, kl_objective, reduction,
    ignore_index, logit_scale, softcap, memory_budget, wants,
):  # fmt: skip
    """loss, weights, attention_loss, and the gradients that are wanted: of the reduced loss for an upstream of 1.

    With the factors (N), which reduction "none" gets from upstream, the gradients are those of their sums over rows.
    """
    inputs = [student_hidden, student_weight, student_bias, scores, *snapshot_hidden, *snapshot_weights]
    dtype = _computing(inputs)
    device, rows, count = student_hidden.device, len(student_hidden), len(snapshot_hidden)
    wants_hidden, wants_weight, wants_bias, wants_scores = wants
    if reduction == "none" and row_factor is None:  # gradients come when upstream is known
        wants_hidden = wants_weight = wants_bias = wants_scores = False
    wants_student = wants_hidden or wants_weight or wants_bias

    soft = checks.is_soft(labels)
    kept = None if labels is None or soft else (labels != ignore_index).nonzero()[:, 0]
    if kept is not None and len(kept) == rows:
        kept = None
    counted = rows if kept is None else len(kept)
    one_head = len(snapshot_weights) == 1 and len(snapshot_biases) <= 1
    fused = one_head and logit_fusion and softcap is None and count > 1
    # Probabilities can be mixed one snapshot after another, unless the attention needs all logits again.
    mixed = not fused and not logit_fusion and count > 1 and not ((kl_objective or soft) and wants_scores)
    row_bytes = classes * dtype.itemsize
    held = 1 if fused else count
    size = _chunk(counted, row_bytes * (held + 2), memory_budget, device.type)
    if mixed := mixed and size < min(counted, ROWS[device.type]):  # slower than all at once
        size, held = _chunk(counted, row_bytes * 3, memory_budget, device.type), 1
    chunks = [*range(0, counted, size)]

    student_head = Head(student_weight[:classes], student_bias, dtype, logit_scale)
    distinct = 1 if one_head else count
    each = (_for_each(x, distinct) for x in (snapshot_weights, snapshot_biases or [None]))
    heads = _for_each([Head(w[:classes], b, dtype, logit_scale) for w, b in zip(*each, strict=True)], count)

    loss, attention_loss = (torch.zeros(rows, dtype=dtype, device=device) for _ in range(2))
    weights = torch.zeros(rows, count, dtype=torch.float32, device=device)
    d_hidden = torch.zeros(rows if wants_hidden else 0, student_hidden.shape[1], dtype=dtype, device=device)
    d_bias = torch.zeros(len(student_bias) if wants_bias else 0, dtype=dtype, device=device)
    d_scores = torch.zeros((rows, count) if wants_scores else (0,), dtype=dtype, device=device)
    few = len(chunks) == 1 or counted < student_hidden.shape[1]  # rows, of whose gradients (N, V) is less than (V, H)
    gradient = WeightGradient(student_weight, classes, dtype, few) if wants_weight else None
    factor = attention = None
    if reduction == "mean":
        factor = attention = 1 / (denominator if denominator is not None else torch.full((), max(counted, 1))).to(
            device, dtype
        )
    logits = torch.empty(held + 1, min(size, counted), classes, dtype=dtype, device=device)
    op = namespace(device).ensemble_kd_fwd

    for start in chunks:
        index = slice(start, start + size) if kept is None else kept[start : start + size]
        take = (lambda x, index=index: x[index]) if kept is None else (lambda x, index=index: x.index_select(0, index))
        part, y = take(student_hidden).to(dtype), None if labels is None else checks.unit_stride(take(labels))
        e = None if scores is None else take(scores)
        n = len(part)
        s, z = logits[0, :n], logits[1:, :n]
        student_head(part, softcap, out=s)
        hidden = (take(x).to(dtype) for x in snapshot_hidden)
        if fused or mixed:
            w = _weights(e, n, count, dtype, device)
        if fused:
            hidden = _read(w, hidden)
            heads[0](sum(w[:, m, None] * x for m, x in enumerate(hidden)), None, out=z[0])  # pyright: ignore[reportArgumentType]
        elif mixed:
            log_p_y = _mix(w, _read(w, hidden), heads, softcap, temperature, y, out=z[0])
        else:
            for m, x in enumerate(hidden):
                heads[m](x, softcap, out=z[m])
        own, attends = (None, False) if fused or mixed else (e, wants_scores)
        part_loss, part_attention, part_weights, *gradients = op(
            s, (z,), y, own, None, None, temperature, alpha, logit_fusion, kl_objective, 0, ignore_index,
            wants_student, attends,
        )  # fmt: skip
        if mixed and y is not None and not soft:
            part_attention = -log_p_y.logsumexp(1)
        loss[index], attention_loss[index] = part_loss, part_attention
        weights[index] = w.float() if fused or mixed else part_weights
        f = factor if row_factor is None else take(row_factor).to(dtype)[:, None]
        f_attention = attention if attention_factor is None else take(attention_factor).to(dtype)[:, None]
        if wants_scores:
            if fused:
                upstream = _through_target(s, z[0], y, temperature, alpha, kl_objective)
                unit = heads[0].transposed(upstream)
                unit = torch.stack([(unit * x).sum(1) for x in hidden], 1)
                unit = w * (unit - (w * unit).sum(1, keepdim=True))
            elif mixed:
                unit = w - log_p_y.softmax(1)
            else:
                unit = gradients[-1]
            by = f if kl_objective else f_attention
            d_scores[index] = (unit if by is None else unit * by).to(dtype)
        if not wants_student:
            continue
        g = gradients[0]
        if softcap is not None:  # the derivative of the cap; s holds capped logits
            g.mul_(1 - (s / softcap).square_())
        if wants_hidden:
            back = student_head.transposed(g)
            d_hidden[index] = back if f is None else back * f
        if wants_weight:
            gradient.add(g, part * (logit_scale if f is None else logit_scale * f))
        if wants_bias:
            ones = torch.full((n, 1), logit_scale, dtype=dtype, device=device)
            d_bias[:classes] += (g.t() @ (ones if f is None else ones * f))[:, 0]

    if reduction == "sum":
        loss, attention_loss = loss.sum(), attention_loss.sum()
    elif reduction == "mean":
        loss, attention_loss = loss.sum() * factor, attention_loss.sum() * attention  # pyright: ignore[reportOperatorIssue]
    logits = s = z = None  # whose memory the gradient of the weight needs
    d_weight = gradient.result() if gradient else torch.zeros(0, dtype=dtype, device=device)
    return loss, weights, attention_loss, d_hidden, d_weight, d_bias, d_scores


class Head:
    """logits = scale (hidden weightᵀ + bias), in the dtype that is computed in, and hidden's gradient.

    A weight of another dtype is converted a tile of classes at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float):
        self.weight, self.dtype, self.scale = weight, dtype, scale
        self.bias = None if bias is None else bias[: len(weight)].to(dtype) * scale
        tile = len(weight) if weight.dtype == dtype else TILE
        self.tiles = [slice(start, start + tile) for start in range(0, len(weight), tile)]

    def __call__(self, hidden: Tensor, softcap: float | None, out: Tensor) -> None:
        hidden = hidden if self.scale == 1 else hidden * self.scale
        for tile in self.tiles:
            torch.mm(hidden, self.weight[tile].to(self.dtype).t(), out=out[:, tile])
        if self.bias is not None:
            out += self.bias
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)

    def transposed(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden, (N, H), from that of the logits (N, V)."""
        if len(self.tiles) == 1:
            back = gradient @ self.weight.to(self.dtype)
        else:
            back = gradient.new_zeros(len(gradient), self.weight.shape[1])
            for tile in self.tiles:
                back.addmm_(gradient[:, tile], self.weight[tile].to(self.dtype))
        return back if self.scale == 1 else back.mul_(self.scale)


class WeightGradient:
    """Σ over chunks of gradientᵀ hidden, (V, H): summed in the computing dtype, rounded once at the end.

    A sum (V, H) of another dtype than the weight's is memory beyond the output. Gradients of `few` rows take less: they
    are kept, and each tile of classes is rounded where it is made.
    """

    def __init__(self, weight: Tensor, classes: int, dtype: torch.dtype, few: bool):
        # A fp16 gradient stays as it was summed until upstream, a loss scale mostly, is known: it might underflow.
        self.dtype = dtype if weight.dtype == torch.float16 else weight.dtype
        self.chunks = [] if few and self.dtype != dtype else None
        self.sum = torch.zeros(weight.shape, dtype=dtype if self.chunks is None else self.dtype, device=weight.device)
        self.classes = classes

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.chunks is None:
            self.sum[: self.classes].addmm_(gradient.t(), hidden)
        else:
            self.chunks.append((gradient, hidden))

    def result(self) -> Tensor:
        for start in range(0, self.classes if self.chunks else 0, TILE):
            tile = slice(start, min(start + TILE, self.classes))
            gradient, hidden = (torch.cat(x) for x in zip(*((g[:, tile], h) for g, h in self.chunks), strict=True))
            self.sum[tile] = gradient.t() @ hidden
        return self.sum.to(self.dtype)


@torch.library.register_fake("eekd::linear_ensemble_kd_fwd")
def _fake(
    student_hidden, student_weight, student_bias, scores, snapshot_hidden, snapshot_weights, snapshot_biases, labels,
    denominator, row_factor, attention_factor, classes, temperature, alpha, logit_fusion, kl_objective, reduction,
    ignore_index, logit_scale, softcap, memory_budget, wants,
):  # fmt: skip
    dtype = _computing([student_hidden, student_weight, student_bias, scores, *snapshot_hidden, *snapshot_weights])
    rows, count = student_hidden.shape[0], len(snapshot_hidden)
    ready = reduction != "none" or row_factor is not None
    hidden, weight, bias, of_scores = (want and ready for want in wants)
    new = student_hidden.new_empty
    kept = dtype if student_weight.dtype == torch.float16 else student_weight.dtype
    return (
        new((rows,) if reduction == "none" else (), dtype=dtype),
        new((rows, count), dtype=torch.float32),
        new((rows,) if reduction == "none" else (), dtype=dtype),
        new((rows if hidden else 0, student_hidden.shape[1]), dtype=dtype),
        new(student_weight.shape, dtype=kept) if weight else new((0,), dtype=dtype),
        new((student_bias.shape[0] if bias else 0,), dtype=dtype),
        new((rows, count) if of_scores else (0,), dtype=dtype),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.reduction, ctx.kl_objective, ctx.wants = inputs[16], inputs[15], inputs[21]
    ctx.counts = len(inputs[4]), len(inputs[5]), len(inputs[6])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:4]]
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.others = inputs[11:]
        tensors = [*inputs[:4], *inputs[4], *inputs[5], *inputs[6], inputs[7]]
    else:
        tensors = [x if want else None for x, want in zip(output[3:], ctx.wants, strict=True)]
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_loss, _, d_attention_loss, *__):
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError("linear_ensemble_kd has no second derivative; backpropagate without create_graph=True")
    if ctx.kl_objective:
        d_attention_loss = d_loss
    upstream = [d_loss] * 3 + [d_attention_loss]
    if ctx.reduction == "none":
        units = _recomputed(ctx, d_loss, d_attention_loss)
        found = [None if u is None else u.to(t) for u, t in zip(units, ctx.dtypes, strict=True)]
    else:
        units = ctx.saved_tensors
        found = [_times(*each) for each in zip(units, upstream, ctx.dtypes, strict=True)]
    lists = [[None] * count for count in ctx.counts]
    return (*found, *lists, *[None] * 15)


def _recomputed(ctx, d_loss, d_attention_loss):
    hidden, weight, bias, scores, *rest, labels = ctx.saved_tensors
    a, b, _ = ctx.counts
    lists = rest[:a], rest[a : a + b], rest[a + b :]
    zero = torch.zeros(len(hidden), dtype=hidden.dtype, device=hidden.device)
    factors = [zero if x is None else x for x in (d_loss, d_attention_loss)]
    output = torch.ops.eekd.linear_ensemble_kd_fwd(
        hidden, weight, bias, scores, *lists, labels, None, *factors, *ctx.others
    )
    return [unit if want else None for unit, want in zip(output[3:], ctx.wants, strict=True)]


def _times(unit: Tensor | None, upstream: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if unit is None or upstream is None:
        return None
    if upstream.is_cpu and not torch.compiler.is_compiling() and type(upstream) is Tensor and upstream.item() == 1:
        return unit.to(dtype)  # reading a CPU scalar costs less than a pass over the gradient
    return (unit * upstream.to(unit.dtype)).to(dtype)


torch.library.register_autograd("eekd::linear_ensemble_kd_fwd", _backward, setup_context=_setup)


def _computing(inputs) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


def _chunk(rows: int, row_bytes: int, budget: int | None, device: str) -> int:
    """How many rows are computed at once."""
    size = min(BUDGET[device] // row_bytes, ROWS[device]) if budget is None else budget // row_bytes
    pieces = -(-rows // max(size, LEAST_ROWS))
    return -(-rows // pieces) if pieces else 1  # equal chunks


def _for_each(values: list, count: int) -> list:
    """One value of a list stands for all."""
    return values * count if len(values) == 1 else values


def _weights(scores: Tensor | None, rows: int, count: int, dtype: torch.dtype, device) -> Tensor:
    if scores is None:
        return torch.full((rows, count), 1 / count, dtype=dtype, device=device)
    return scores.to(dtype).softmax(1)


def _read(w: Tensor, hidden: Iterable[Tensor]) -> list[Tensor]:
    """The hidden states, 0 where a snapshot has weight 0: it may hold anything there."""
    return [torch.where(w[:, m, None] == 0, 0, x) for m, x in enumerate(hidden)]


def _mix(w: Tensor, hidden, heads, softcap, temperature: float, y: Tensor | None, out: Tensor) -> Tensor | None:
    """Logits whose softmax at τ is p, in `out`: τ log Σ_m w_m softmax(z_m / τ). Returns log(w_m p_m(y)), (N, M).

    For soft labels, of which every class may have weight, the sum is one of logarithms, and nothing is returned.
    """
    z, log_w, found = torch.empty_like(out), w.log(), []
    soft = checks.is_soft(y)
    for m, x in enumerate(hidden):
        heads[m](x, softcap, out=z)
        if temperature != 1:
            z.div_(temperature)
        if soft:
            z.sub_(z.logsumexp(1, keepdim=True) - log_w[:, m, None])
            torch.logaddexp(out, z, out=out) if m else out.copy_(z)
            continue
        z.sub_(z.amax(1, keepdim=True))
        at_label = None if y is None else z.gather(1, y[:, None])[:, 0]
        total = z.exp_().sum(1)
        if at_label is not None:
            found.append(at_label - total.log() + log_w[:, m])
        share = (w[:, m] / total)[:, None]
        out.addcmul_(z, share) if m else torch.mul(z, share, out=out)
    if not soft:
        out.log_()
    out.mul_(temperature)
    return torch.stack(found, 1) if found else None


def _through_target(s: Tensor, z: Tensor, y, temperature: float, alpha: float, kl_objective: bool) -> Tensor:
    """The gradient that the attention gets through the fused logits z (N, V), written over them; s is kept."""
    log_p = z.div_(temperature).log_softmax(1)
    p = log_p.exp()
    if not kl_objective and checks.is_soft(y):
        return p.mul_(y.sum(1, keepdim=True, dtype=p.dtype)).sub_(y).div_(temperature)
    if not kl_objective:
        return p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1)).div_(temperature)
    difference = torch.where(p == 0, 0, log_p - (s / temperature).log_softmax(1))
    divergence = (p * difference).sum(1, keepdim=True)
    return p.mul_(difference - divergence).mul_((1 if y is None else 1 - alpha) * temperature)


def _listed(name: str, value, dims: int) -> list[Tensor]:
    if isinstance(value, Tensor):
        if value.dim() != dims:
            raise ValueError(
                f"{name} must be {dims}-dimensional, or a list of M tensors, got shape {tuple(value.shape)}"
            )
        return list(value.unbind())
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, Tensor) for x in value):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(value).__name__}")
    return list(value)


def _check(hidden, weight, bias, snapshots, heads, biases, scores) -> int:
    """V, the number of classes that all heads have; one sentence for what does not fit."""
    for name, x in (("student_hidden", hidden), ("student_weight", weight)):
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise (ValueError if isinstance(x, Tensor) else TypeError)(
                f"{name} must be a tensor of 2 dimensions, got {got}"
            )
    rows, device, count = len(hidden), hidden.device, len(snapshots)
    if not 1 <= count <= checks.MAX_SNAPSHOTS:
        raise ValueError(f"snapshot_hidden must hold 1 to {checks.MAX_SNAPSHOTS} snapshots, got {count}")
    if len(heads) not in (1, count):
        raise ValueError(f"snapshot_weights must hold a head for each of {count} snapshots, or one, got {len(heads)}")
    if len(biases) not in (0, 1, count):
        raise ValueError(f"snapshot_biases must hold a bias for each of {count} snapshots, or one, got {len(biases)}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"student_weight must be (V, {hidden.shape[1]}), as student_hidden is wide, got {tuple(weight.shape)}"
        )
    for m, x in enumerate(snapshots):
        head = heads[min(m, len(heads) - 1)]
        if x.dim() != 2 or len(x) != rows:
            raise ValueError(
                f"snapshot_hidden must be ({rows}, H_m) for each snapshot, got {tuple(x.shape)} for snapshot {m}"
            )
        if head.dim() != 2 or head.shape[1] != x.shape[1]:
            raise ValueError(f"snapshot_weights must be (V, {x.shape[1]}) for snapshot {m}, got {tuple(head.shape)}")
    classes = min(len(x) for x in (weight, *heads))
    if not classes:
        raise ValueError("student_weight and snapshot_weights must have at least one class, got 0")
    named = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias, "scores": scores}
    named |= {f"snapshot_hidden[{m}]": x for m, x in enumerate(snapshots)}
    named |= {f"snapshot_weights[{m}]": x for m, x in enumerate(heads)}
    named |= {f"snapshot_biases[{m}]": x for m, x in enumerate(biases)}
    for name, x in named.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        checks.check_floating(name, x)
        if x.device != device:
            raise ValueError(f"{name} must be on {device} as student_hidden is, got {x.device}")
        if name.startswith("snapshot") and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require gradients, for snapshots are frozen; detach it")
    if scores is not None and scores.shape != (rows, count):
        raise ValueError(f"scores must have shape ({rows}, {count}), got {tuple(scores.shape)}")
    for name, x, head in [("student_bias", bias, weight)] + [
        (f"snapshot_biases[{m}]", x, heads[min(m, len(heads) - 1)]) for m, x in enumerate(biases)
    ]:
        if x is not None and x.shape != head.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(head)},), as its head has classes, got {tuple(x.shape)}")
    return classes


def _check_numbers(logit_scale, softcap, memory_budget) -> None:
    if not isinstance(logit_scale, (float, int)) or not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be a number other than 0, got {logit_scale!r}")
    if softcap is not None and (not isinstance(softcap, (float, int)) or not 0 < softcap < float("inf")):
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
        raise ValueError(f"memory_budget must be a positive number of bytes or None, got {memory_budget!r}")


def _checked_denominator(denominator, reduction: str, device) -> Tensor | None:
    if denominator is None:
        return None
    if reduction != "mean":
        raise ValueError(f'denominator must be None unless reduction is "mean", got it with reduction {reduction!r}')
    if not isinstance(denominator, Tensor):
        if not isinstance(denominator, (float, int)) or not 0 < denominator < float("inf"):
            raise ValueError(f"denominator must be a positive number, got {denominator!r}")
        return torch.tensor(float(denominator), device=device)
    if denominator.numel() != 1:
        raise ValueError(f"denominator must be a tensor of one number, got shape {tuple(denominator.shape)}")
    return denominator.detach().reshape(())
