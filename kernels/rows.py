"""The device functions that the kernels share: from scores to weights, softmax sums, gradients of a row, its writing.

Over 350 lines, for they are the parts of one computation, which Triton compiles into each kernel.
"""

import torch
import triton
import triton.language as tl

SEPARATE = tl.constexpr(8)  # snapshots up to which each has a tile of its own
COUNTS = tl.constexpr(32)  # programs that count labels, each some
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on CPU tensors, for tests
PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


@triton.jit
def finite(x):
    """x, or 0 for -inf: the maximum to subtract from a row of nothing but -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def scaled(x, top, k):
    """k x - top, rounded once. `top` is k times the largest x, rounded, wherever it is used, so that it cancels."""
    if INTERPRETED and x.dtype == tl.float32:  # Triton's interpreter rounds twice
        out = (x.to(tl.float64) * k - finite(top)).to(tl.float32)
    else:
        out = tl.fma(x, k + tl.zeros_like(x), -finite(top) + tl.zeros_like(x))
    return out


@triton.jit
def log2(x):
    """log2 as a GPU has it, -inf of what is less than 2^-126; Triton's own takes 20 instructions."""
    if PTX and x.dtype == tl.float32:
        out = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        out = tl.log2(x)
    return out


@triton.jit
def inverse(x):
    """1 / x as a GPU has it, wrong by a rounding; a division takes 8 instructions and a jump."""
    if PTX and x.dtype == tl.float32:
        out = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        out = 1.0 / x
    return out


@triton.jit
def powers(x, top, k, AXIS: tl.constexpr):
    """2^(k x - top) with `top` per row of x. The same words twice are computed once while x stays on chip."""
    return tl.exp2(scaled(x, tl.expand_dims(top, AXIS), k))


@triton.jit
def absorb(top, total, x, k, AXIS: tl.constexpr):
    """Takes columns x into softmax statistics: `top`, k times their maximum, and Σ 2^(k x - top)."""
    new = tl.maximum(top, tl.max(x, AXIS) * k)
    return new, total * tl.exp2(top - finite(new)) + tl.sum(powers(x, new, k, AXIS), AXIS)


@triton.jit
def softmax_grad(w, g):
    """(R, M): a gradient through softmax weights becomes one through the scores."""
    return w * (g - tl.sum(w * g, 1)[:, None])


@triton.jit
def counted(labels, B, ignore_index, begin, step, BLOCK: tl.constexpr):
    """How many of the B labels are not `ignore_index`, in the blocks from `begin` on, `step` apart."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, B, step):
        at = first + tl.arange(0, BLOCK)
        count += (tl.load(labels + at, mask=at < B, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def read_labels(labels, count, row, inside, row_scale, ignore_index, B, C, COUNT_BLOCK: tl.constexpr, ACC):
    """Which rows count, their labels, which of these are classes, and what a row's loss is multiplied by; all (R)."""
    scale = tl.full(row.shape, row_scale, ACC)
    if COUNT_BLOCK > 0:
        scale = scale / tl.maximum(counted(labels, B, ignore_index, 0, COUNT_BLOCK, COUNT_BLOCK), 1)
    elif count is not None:
        scale = scale / tl.maximum(tl.sum(tl.load(count + tl.arange(0, COUNTS)), 0), 1)
    if labels is None:
        keep = inside
        valid = inside
        y = row
    else:
        y = tl.load(labels + row, mask=inside, other=ignore_index)
        keep = y != ignore_index
        valid = keep & (y >= 0) & (y < C)
        scale = tl.where(keep & (valid == 0), float("nan"), scale)  # a GPU cannot raise: loss and gradients are NaN
    return keep, y, valid, scale


@triton.jit
def read_target(
    labels,
    y,
    row,
    first,
    i,
    classes,
    inside,
    label_stride,
    VECTOR: tl.constexpr,
    INSIDE: tl.constexpr,
    SOFT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of the columns first + i (R, N) which is the label's, or for SOFT the weights that soft labels give them."""
    if SOFT:
        begin = labels + row * label_stride // VECTOR * VECTOR
        mask = inside[:, None]
        if not INSIDE:
            mask = mask & classes
        target = tl.load(begin[:, None] + (first + i)[None, :], mask=mask, other=0.0).to(ACC)
    else:
        target = i[None, :] == (y - first)[:, None]
    return target


@triton.jit
def _embeddings(query, keys, row, m, alive, d, D, query_stride, key_stride, key_row_stride, ACC):
    """The elements d of query (R, D) and keys (R, M, D)."""
    here = d < D
    keep = tl.max(alive.to(tl.int32), 1) > 0
    q = tl.load((query + row * query_stride)[:, None] + d[None, :], mask=keep[:, None] & here[None, :], other=0.0)
    at = keys + m[None, :].to(tl.int64) * key_stride + row[:, None] * key_row_stride
    key = tl.load(at[:, :, None] + d[None, None, :], mask=alive[:, :, None] & here[None, None, :], other=0.0)
    return q.to(ACC), key.to(ACC)


@triton.jit
def _products(query, keys, row, m, alive, D, query_stride, key_stride, key_row_stride, ACC, DBLOCK: tl.constexpr):
    """query . keys_m (R, M)"""
    e = tl.zeros(alive.shape, ACC)
    for first in range(0, D, DBLOCK):
        d = first + tl.arange(0, DBLOCK)
        q, key = _embeddings(query, keys, row, m, alive, d, D, query_stride, key_stride, key_row_stride, ACC)
        e += tl.sum(q[:, None, :] * key, 2)
    return e


@triton.jit
def attend(
    scores,
    query,
    keys,
    o_weights,
    row,
    m,
    inside,
    keep,
    D,
    scores_stride,
    query_stride,
    key_stride,
    key_row_stride,
    M: tl.constexpr,
    DBLOCK: tl.constexpr,
    ACC,
):
    """Softmax over the snapshots: which are asked (R, M), which have a weight, and the weights."""
    alive = keep[:, None] & (m < M)[None, :]
    if query is not None:
        e = _products(query, keys, row, m, alive, D, query_stride, key_stride, key_row_stride, ACC, DBLOCK)
        e = tl.where(alive, e, float("-inf"))
    elif scores is not None:
        at = scores + (row * scores_stride)[:, None] + m[None, :]
        e = tl.load(at, mask=alive, other=float("-inf")).to(ACC)
    else:
        e = tl.where(alive, tl.zeros(alive.shape, ACC), float("-inf"))
    w = tl.exp2((e - tl.max(e, 1)[:, None]) * LOG2E)
    w = w * inverse(tl.sum(w, 1))[:, None]
    used = alive & (w != 0)  # a snapshot of weight 0 is not read
    w = tl.where(used, w, 0.0)
    tl.store(o_weights + (row * M)[:, None] + m[None, :], w.to(tl.float32), mask=inside[:, None] & (m < M)[None, :])
    return alive, used, w


@triton.jit
def _spread(values, m, M: tl.constexpr):
    """The tuple `values` as an int64 vector over m."""
    out = tl.zeros_like(m).to(tl.int64)
    for i in tl.static_range(M):
        out = tl.where(m == i, values[i].to(tl.int64), out)
    return out


@triton.jit
def snapshot_rows(
    snapshots, row, m, snapshot_stride, snapshot_strides, M: tl.constexpr, STACKED: tl.constexpr, VECTOR: tl.constexpr
):
    """Where the rows of the snapshots begin (R, M), at whole vectors."""
    if not STACKED:
        p_snapshot = snapshots[0]
        bits: tl.constexpr = p_snapshot.dtype.element_ty.primitive_bitwidth
        begin = tl.zeros(m.shape, tl.int64)
        for i in tl.static_range(1, M):
            begin = tl.where(m == i, (snapshots[i].to(tl.int64) - p_snapshot.to(tl.int64)) // (bits // 8), begin)
        at_row = row[:, None] * _spread(snapshot_strides, m, M)[None, :]
    else:
        p_snapshot = snapshots
        begin = m.to(tl.int64) * snapshot_stride
        at_row = (row * snapshot_strides)[:, None]
    at = (begin // VECTOR * VECTOR)[None, :] + at_row // VECTOR * VECTOR  # begin may be negative, and // truncates
    return p_snapshot + at


@triton.jit
def mixture(z, w, used):
    """Σ_m w_m z_m (R, N); what is not used was not read."""
    return tl.sum(tl.where(used[:, :, None], w[:, :, None] * z, 0.0), 1)


@triton.jit
def absorb_targets(top, total, z, w, used, k, LOGIT: tl.constexpr):
    """Takes columns of z (R, M, N) into softmax statistics (R, M), or for LOGIT those of their mixture (R)."""
    if LOGIT:
        top, total = absorb(top, total, mixture(z, w, used), k, 1)
    else:
        top, total = absorb(top, total, z, k, 2)
    return top, total


@triton.jit
def log2_softmax(s, top, total, k):
    """log2 softmax(s / τ) of columns (R, N), whose statistics are known."""
    return scaled(s, top[:, None], k) - log2(total)[:, None]


@triton.jit
def softmax(s, top, total, k):
    """Its softmax, 2^(k s) over the sum of them."""
    return powers(s, top, k, 1) * inverse(total)[:, None]


@triton.jit
def visit(log_q, z, w, used, k, z_top, z_sum, LOGIT: tl.constexpr, MEANS: tl.constexpr, MOVED: tl.constexpr):
    """With the statistics known: the columns' shares of KL (R), Σ p z_m and Σ p r z_m (R, M), and p (R, N).

    r is log2 p - log2 q, and KL in units of ln 2. For probability fusion the third is Σ p_m r, and there is no second.
    """
    if LOGIT:
        t = mixture(z, w, used)
        p = softmax(t, z_top, z_sum, k)
        log_p = log2_softmax(t, z_top, z_sum, k)
    else:
        each = powers(z, z_top, k, 2)
        p = tl.sum(tl.where(used, w * inverse(z_sum), 0.0)[:, :, None] * each, 1)
        log_p = log2(tl.where(p > 0, p, 1.0))
    r = tl.where(p > 0, log_p - log_q, 0.0)
    kl = tl.sum(p * r, 1)
    means = tl.zeros_like(w)
    moved = tl.zeros_like(w)
    if LOGIT and MEANS:
        z = tl.where(used[:, :, None] & (p > 0)[:, None, :], z, 0.0)
        means = tl.sum(p[:, None, :] * z, 2)
        if MOVED:
            moved = tl.sum((p * r)[:, None, :] * z, 2)
    if MOVED and not LOGIT:
        moved = tl.where(used, tl.sum(each * r[:, None, :], 2) * inverse(z_sum), 0.0)
    return kl, means, moved, p


@triton.jit
def follow(
    s, z, target, w, used, k, hard_top, z_top, z_sum, LOGIT: tl.constexpr, CE: tl.constexpr, SHARES: tl.constexpr
):
    """What soft labels y add up over columns, in log2: Σ y log softmax(s) and Σ y log p (R), and shares (R, M).

    The first, and of a mixture the second, lacks what their sums take off. The shares are Σ y w_m (1 - p_m / p), of a
    mixture Σ y z_m.
    """
    given = target != 0
    log_q = tl.zeros_like(hard_top)
    if CE:
        log_q = tl.sum(tl.where(given, target * scaled(s, hard_top[:, None], LOG2E), 0.0), 1)
    if LOGIT:
        log_p = scaled(mixture(z, w, used), z_top[:, None], k)
        share = z
    else:
        line = scaled(z, z_top[:, :, None], k) + tl.where(used, log2(w * inverse(z_sum)), float("-inf"))[:, :, None]
        most = tl.max(line, 1)
        each = tl.exp2(line - finite(most)[:, None, :])
        total = tl.sum(each, 1)
        log_p = most + log2(total)
        share = w[:, :, None] - each * inverse(total)[:, None, :]
    shares = tl.zeros_like(w)
    if SHARES:
        follows = used[:, :, None] & (given & (log_p != float("-inf")))[:, None, :]
        shares = tl.sum(tl.where(follows, target[:, None, :] * share, 0.0), 2)
    return log_q, tl.sum(tl.where(given, target * log_p, 0.0), 1), shares


@triton.jit
def write_columns(
    o_d_student, d, row, i, shift, classes, inside, C, VECTOR: tl.constexpr, SHIFTED: tl.constexpr, INSIDE: tl.constexpr
):
    """The columns i of d_student (R, N); all are classes if INSIDE."""
    d = d.to(o_d_student.dtype.element_ty)
    begin = row * C
    if SHIFTED:
        begin -= shift
    else:
        begin = begin // VECTOR * VECTOR
    mask = inside[:, None]
    if not INSIDE:
        mask = mask & classes
    tl.store((o_d_student + begin)[:, None] + i[None, :], d, mask=mask)


@triton.jit
def _write_embeddings(
    query,
    keys,
    o_d_query,
    o_d_keys,
    de,
    row,
    m,
    inside,
    alive,
    each,
    B,
    D,
    query_stride,
    key_stride,
    key_row_stride,
    ACC,
    DBLOCK: tl.constexpr,
):
    """d_query = Σ_m de_m key_m,  d_key_m = de_m query."""
    for first in range(0, D, DBLOCK):
        d = first + tl.arange(0, DBLOCK)
        q, key = _embeddings(query, keys, row, m, alive, d, D, query_stride, key_stride, key_row_stride, ACC)
        d_query = tl.sum(tl.where(alive, de, 0.0)[:, :, None] * key, 1)
        at = (o_d_query + row * D)[:, None] + d[None, :]
        tl.store(at, d_query.to(o_d_query.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        d_key = (de[:, :, None] * q[:, None, :]).to(o_d_keys.dtype.element_ty)
        at = (o_d_keys + (m[None, :].to(tl.int64) * B + row[:, None]) * D)[:, :, None] + d[None, None, :]
        tl.store(at, d_key, mask=each[:, :, None] & (d < D)[None, None, :])


@triton.jit
def finish(
    query,
    keys,
    o_loss,
    o_attention_loss,
    o_d_scores,
    o_d_query,
    o_d_keys,
    kl,
    means,
    moved,
    z_y,
    label_sum,
    log_p,
    ce_loss,
    w,
    used,
    alive,
    keep,
    inside,
    row,
    m,
    scale,
    ce,
    beta,
    tau,
    k,
    z_top,
    z_sum,
    B,
    D,
    query_stride,
    key_stride,
    key_row_stride,
    M: tl.constexpr,
    LABELS: tl.constexpr,
    SOFT: tl.constexpr,
    LOGIT: tl.constexpr,
    BY_KL: tl.constexpr,
    SUM: tl.constexpr,
    DBLOCK: tl.constexpr,
    ACC,
):
    """What is O(M) per row, of the sums of its columns and of the snapshots' logits z_y (R, M) at its label.

    For SOFT z_y are the shares of `follow`, which has label_sum and log_p (R) too.
    """
    inverse_tau = 1.0 / tau
    kl = kl * LN2  # the sums are of log2
    moved = moved * LN2
    loss = tl.where(beta == 0, 0.0, beta * tau * tau * kl) + ce * ce_loss
    attention_loss = tl.zeros_like(kl)
    de = tl.zeros_like(w)
    if LABELS:
        if SOFT:
            if LOGIT:
                attention_loss = LN2 * (label_sum * log2(z_sum) - log_p)
                de = softmax_grad(w, (label_sum[:, None] * means - z_y) * inverse_tau)
            else:
                attention_loss = -LN2 * log_p
                de = z_y
        elif LOGIT:
            z_y_mixed = tl.sum(w * z_y, 1)
            attention_loss = LN2 * (log2(z_sum) - scaled(z_y_mixed, z_top, k))
            de = softmax_grad(w, (means - z_y) * inverse_tau)
        else:
            log_share = log2(w / z_sum) + scaled(z_y, z_top, k)
            log_share = tl.where(used, log_share, float("-inf"))
            most = tl.max(log_share, 1)
            share = tl.exp2(log_share - finite(most)[:, None])
            total = tl.sum(share, 1)
            attention_loss = -LN2 * (most + log2(total))
            de = w - share / total[:, None]
        de = tl.where((attention_loss == float("inf"))[:, None], 0.0, de)  # the label is masked: nothing to follow
    if BY_KL:
        if LOGIT:
            moved = (moved - kl[:, None] * means) * inverse_tau
        de = tl.where(beta == 0, 0.0, beta * softmax_grad(w, tau * tau * moved))
    loss = tl.where(keep, scale * loss, 0.0)
    attention_loss = tl.where(keep, scale * attention_loss, 0.0)
    if SUM:
        tl.store(o_loss + tl.program_id(0), tl.sum(loss, 0))
        tl.store(o_attention_loss + tl.program_id(0), tl.sum(attention_loss, 0))
    else:
        tl.store(o_loss + row, loss, mask=inside)
        tl.store(o_attention_loss + row, attention_loss, mask=inside)
    de = tl.where(used, scale[:, None] * de, 0.0)
    each = inside[:, None] & (m < M)[None, :]
    if o_d_scores is not None:
        tl.store(o_d_scores + (row * M)[:, None] + m[None, :], de.to(o_d_scores.dtype.element_ty), mask=each)
    if o_d_query is not None:
        _write_embeddings(
            query,
            keys,
            o_d_query,
            o_d_keys,
            de,
            row,
            m,
            inside,
            alive,
            each,
            B,
            D,
            query_stride,
            key_stride,
            key_row_stride,
            ACC,
            DBLOCK,
        )
