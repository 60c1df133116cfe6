"""ensemble_kd in Triton: attention, fusion, KL, CE and all gradients of a row in one launch.

Traffic in accesses of B·C elements: reads M + 1 and writes 1 where a row's tile stays on chip, reads 2 (M + 1) and
writes 1 where it is streamed twice; kernels.common.launch decides by M and C. The op fills outputs that the caller
allocated, with the arguments of eekd::ensemble_kd_fwd, under the name eekd_triton::ensemble_kd_fwd.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from . import common
from .common import absorb, alignment, counted, finite, powers, softmax_grad, start

COUNT_IN_PROGRAM = 2048  # labels that every program counts for itself, which costs less than a launch
SCALED = 2048  # elements of a gradient that a program of the backward scales at a time
SCALING_PROGRAMS = 1024  # enough to fill a GPU, and few enough to return at once
INTERPRETED = triton.knobs.runtime.interpret  # on CPU tensors, for tests
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _spread(values, m, M: tl.constexpr):
    """The tuple `values` as an int64 vector over m."""
    out = tl.zeros_like(m).to(tl.int64)
    for i in tl.static_range(M):
        out = tl.where(m == i, values[i].to(tl.int64), out)
    return out


@triton.jit
def _columns(p_student, p_snapshot, i, bound, shift, keep, used, C, SHIFTED: tl.constexpr, ACC: tl.constexpr):
    """The columns i of the rows' memory: s (R, N), z (R, M, N), which of them are classes (R, N)."""
    read = i[None, :] < bound[:, None]  # whole vectors, so that the mask leaves the loads wide
    s = tl.load(p_student[:, None] + i[None, :], mask=keep[:, None] & read, other=float("-inf")).to(ACC)
    mask = used[:, :, None] & read[:, None, :]
    z = tl.load(p_snapshot[:, :, None] + i[None, None, :], mask=mask, other=float("-inf")).to(ACC)
    classes = read
    if SHIFTED:
        classes = (i[None, :] >= shift[:, None]) & (i[None, :] < shift[:, None] + C)
        s = tl.where(classes, s, float("-inf"))
        z = tl.where(classes[:, None, :], z, float("-inf"))
    return s, z, classes


@triton.jit
def _mix(z, w, used):
    """Σ_m w_m z_m (R, N); what is not used was not read."""
    return tl.sum(tl.where(used[:, :, None], w[:, :, None] * z, 0.0), 1)


@triton.jit
def _statistics(s, z, w, used, k, s_max, soft_sum, hard_sum, z_max, z_sum, LOGIT: tl.constexpr, CE: tl.constexpr):
    """Takes columns into the softmax statistics of the student, at τ and at 1, and of the targets.

    The targets: z (R, M), or for LOGIT their mixture (R).
    """
    if CE:
        _, hard_sum = absorb(s_max, hard_sum, s, LOG2E, 1)
    s_max, soft_sum = absorb(s_max, soft_sum, s, k, 1)
    if LOGIT:
        z_max, z_sum = absorb(z_max, z_sum, _mix(z, w, used), k, 1)
    else:
        z_max, z_sum = absorb(z_max, z_sum, z, k, 2)
    return s_max, soft_sum, hard_sum, z_max, z_sum


@triton.jit
def _visit(
    s, z, is_label, w, used, k, inverse_tau, kd, ce, s_max, soft_sum, hard_sum, z_max, z_sum,
    LOGIT: tl.constexpr, CE: tl.constexpr, MEANS: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """With the statistics known: the columns' shares of KL (R), Σ p z_m and Σ p r z_m (R, M), and d loss / d s (R, N).

    r is log p - log q. For probability fusion the third is Σ p_m r, and there is no second.
    """
    log_q = (s - finite(s_max)[:, None]) * inverse_tau - tl.log(soft_sum)[:, None]
    q = powers(s, s_max, k, 1) * (1.0 / soft_sum)[:, None]
    if LOGIT:
        t = _mix(z, w, used)
        p = powers(t, z_max, k, 1) * (1.0 / z_sum)[:, None]
        log_p = (t - finite(z_max)[:, None]) * inverse_tau - tl.log(z_sum)[:, None]
    else:
        each = powers(z, z_max, k, 2)
        p = tl.sum(tl.where(used, w / z_sum, 0.0)[:, :, None] * each, 1)
        log_p = tl.log(tl.where(p > 0, p, 1.0))
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
        moved = tl.where(used, tl.sum(each * r[:, None, :], 2) / z_sum, 0.0)
    d = kd * (q - p)
    if CE:
        d += ce * (powers(s, s_max, LOG2E, 1) * (1.0 / hard_sum)[:, None] - is_label.to(s.dtype))
    return kl, means, moved, d


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


@triton.jit(do_not_specialize=["snapshot_strides"])
def rows_kernel(
    student, snapshots, labels, scores, query, keys, count,
    o_loss, o_attention_loss, o_weights, o_d_student, o_d_scores, o_d_query, o_d_keys,
    B, C, D, student_stride, snapshot_stride, snapshot_strides, scores_stride,
    query_stride, key_stride, key_row_stride,
    temperature: tl.float64, alpha: tl.float64, row_scale: tl.float64, ignore_index,
    M: tl.constexpr, STACKED: tl.constexpr, LOGIT: tl.constexpr, BY_KL: tl.constexpr, BY_LABEL: tl.constexpr,
    CE: tl.constexpr, SUM: tl.constexpr, COUNT_BLOCK: tl.constexpr, ON_CHIP: tl.constexpr, STAGES: tl.constexpr,
    R: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr, DBLOCK: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program takes R rows: all their columns at once if ON_CHIP, else in blocks, and those twice.

    `snapshots` is a tuple of M pointers with M `snapshot_strides` from row to row, or one pointer, `snapshot_stride`
    from snapshot to snapshot and `snapshot_strides` from row to row. VECTOR and SHIFTED are kernels.common.alignment.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m = tl.arange(0, MP)
    inside = row < B
    keep = inside
    tau = tl.full([], temperature, ACC)
    k = LOG2E / tau
    scale = tl.full([R], row_scale, ACC)
    if COUNT_BLOCK > 0:
        scale = scale / counted(labels, B, ignore_index, COUNT_BLOCK)
    elif count is not None:
        scale = scale / tl.load(count)
    ce = tl.full([], alpha, ACC)
    beta = 1.0 - ce
    if labels is None:
        beta = tl.full([], 1.0, ACC)
    else:
        y = tl.load(labels + row, mask=inside, other=ignore_index)
        keep = y != ignore_index
        valid = keep & (y >= 0) & (y < C)
        scale = tl.where(keep & (valid == 0), float("nan"), scale)  # a GPU cannot raise: loss and gradients are NaN

    # softmax over the snapshots
    alive = keep[:, None] & (m < M)[None, :]
    if query is not None:
        e = _products(query, keys, row, m, alive, D, query_stride, key_stride, key_row_stride, ACC, DBLOCK)
        e = tl.where(alive, e, float("-inf"))
    elif scores is not None:
        at = scores + (row * scores_stride)[:, None] + m[None, :]
        e = tl.load(at, mask=alive, other=float("-inf")).to(ACC)
    else:
        e = tl.where(alive, tl.zeros([R, MP], ACC), float("-inf"))
    w = tl.exp2((e - tl.max(e, 1)[:, None]) * LOG2E)
    w = w / tl.sum(w, 1)[:, None]
    used = alive & (w != 0)  # a snapshot of weight 0 is not read
    w = tl.where(used, w, 0.0)
    tl.store(o_weights + (row * M)[:, None] + m[None, :], w.to(tl.float32), mask=inside[:, None] & (m < M)[None, :])

    # where the rows begin, at whole vectors
    if not STACKED:
        p_snapshot = snapshots[0]
        bits: tl.constexpr = p_snapshot.dtype.element_ty.primitive_bitwidth
        begin = tl.zeros([MP], tl.int64)
        for i in tl.static_range(1, M):
            begin = tl.where(m == i, (snapshots[i].to(tl.int64) - p_snapshot.to(tl.int64)) // (bits // 8), begin)
        at_row = row[:, None] * _spread(snapshot_strides, m, M)[None, :]
    else:
        p_snapshot = snapshots
        begin = m.to(tl.int64) * snapshot_stride
        at_row = (row * snapshot_strides)[:, None]
    at = (begin // VECTOR * VECTOR)[None, :] + at_row // VECTOR * VECTOR  # begin may be negative, and // truncates
    at_student = row * student_stride
    shift = tl.zeros([R], tl.int32)
    bound = tl.zeros([R], tl.int32) + C // VECTOR * VECTOR
    if SHIFTED:
        shift = (at_student % VECTOR).to(tl.int32)
        bound = (shift + C + VECTOR - 1) // VECTOR * VECTOR
    p_student = student + at_student // VECTOR * VECTOR
    p_snapshot = p_snapshot + at

    # first visit: the statistics
    s_max = tl.full([R], float("-inf"), ACC)
    soft_sum = tl.zeros([R], ACC)
    hard_sum = tl.zeros([R], ACC)
    if LOGIT:
        z_max = s_max
        z_sum = soft_sum
    else:
        z_max = tl.full([R, MP], float("-inf"), ACC)
        z_sum = tl.zeros([R, MP], ACC)
    i = tl.arange(0, BLOCK)
    end = C
    if SHIFTED:
        end = C + VECTOR - 1
    if ON_CHIP:
        s, z, classes = _columns(p_student, p_snapshot, i, bound, shift, keep, used, C, SHIFTED, ACC)
        s_max, soft_sum, hard_sum, z_max, z_sum = _statistics(
            s, z, w, used, k, s_max, soft_sum, hard_sum, z_max, z_sum, LOGIT, CE
        )
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, z, classes = _columns(p_student, p_snapshot, first + i, bound, shift, keep, used, C, SHIFTED, ACC)
            s_max, soft_sum, hard_sum, z_max, z_sum = _statistics(
                s, z, w, used, k, s_max, soft_sum, hard_sum, z_max, z_sum, LOGIT, CE
            )

    # second visit: the sums, and the student's gradient
    kl = tl.zeros([R], ACC)
    means = tl.zeros([R, MP], ACC)
    moved = tl.zeros([R, MP], ACC)
    inverse_tau = 1.0 / tau
    d_kl = (scale * beta * tau)[:, None]
    d_ce = (scale * ce)[:, None]
    if ON_CHIP:
        is_label = classes
        if CE:
            is_label = (i[None, :] - shift[:, None]) == y[:, None]
        kl, means, moved, d = _visit(
            s, z, is_label, w, used, k, inverse_tau, d_kl, d_ce, s_max, soft_sum, hard_sum, z_max, z_sum,
            LOGIT, CE, BY_KL or BY_LABEL, BY_KL,
        )  # fmt: skip
        if o_d_student is not None:
            _write(o_d_student, d, row, i, shift, classes, inside, keep, C, VECTOR, SHIFTED)
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, z, classes = _columns(p_student, p_snapshot, first + i, bound, shift, keep, used, C, SHIFTED, ACC)
            is_label = classes
            if CE:
                is_label = (first + i[None, :] - shift[:, None]) == y[:, None]
            more_kl, more_means, more_moved, d = _visit(
                s, z, is_label, w, used, k, inverse_tau, d_kl, d_ce, s_max, soft_sum, hard_sum, z_max, z_sum,
                LOGIT, CE, BY_KL or BY_LABEL, BY_KL,
            )  # fmt: skip
            kl += more_kl
            means += more_means
            moved += more_moved
            if o_d_student is not None:
                _write(o_d_student, d, row, first + i, shift, classes, inside, keep, C, VECTOR, SHIFTED)

    # what is O(M) per row
    loss = tl.where(beta == 0, 0.0, beta * tau * tau * kl)
    attention_loss = tl.zeros([R], ACC)
    de = tl.zeros([R, MP], ACC)
    if labels is not None:
        z_y = tl.load(p_snapshot + (shift + y)[:, None], mask=used & valid[:, None], other=0.0).to(ACC)
        if LOGIT:
            z_y_mixed = tl.sum(w * z_y, 1)
            attention_loss = tl.log(z_sum) - (z_y_mixed - finite(z_max)) * inverse_tau
            de = softmax_grad(w, (means - z_y) * inverse_tau)
        else:
            log_share = tl.log2(w / z_sum) + (z_y - finite(z_max)) * k
            log_share = tl.where(used, log_share, float("-inf"))
            most = tl.max(log_share, 1)
            share = tl.exp2(log_share - finite(most)[:, None])
            total = tl.sum(share, 1)
            attention_loss = -LN2 * (most + tl.log2(total))
            de = w - share / total[:, None]
        de = tl.where((attention_loss == float("inf"))[:, None], 0.0, de)  # the label is masked: nothing to follow
        if CE:
            s_y = tl.load(p_student + shift + y, mask=valid, other=0.0).to(ACC)
            loss -= ce * (s_y - finite(s_max) - tl.log(hard_sum))
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
            query, keys, o_d_query, o_d_keys, de, row, m, inside, alive, each, B, D,
            query_stride, key_stride, key_row_stride, ACC, DBLOCK,
        )  # fmt: skip


@triton.jit
def _write(o_d_student, d, row, i, shift, classes, inside, keep, C, VECTOR: tl.constexpr, SHIFTED: tl.constexpr):
    """The columns i of d_student (R, N), zeros where the row is ignored."""
    d = tl.where(keep[:, None], d, 0.0).to(o_d_student.dtype.element_ty)
    begin = row * C
    if SHIFTED:
        begin -= shift
    else:
        begin = begin // VECTOR * VECTOR
    tl.store((o_d_student + begin)[:, None] + i[None, :], d, mask=inside[:, None] & classes)


@triton.jit
def _write_embeddings(
    query, keys, o_d_query, o_d_keys, de, row, m, inside, alive, each, B, D,
    query_stride, key_stride, key_row_stride, ACC, DBLOCK: tl.constexpr,
):  # fmt: skip
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
def _scale(x, times, columns, factor, stride, count, B, PER_ROW: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """x (times, B, columns) times factor / count, in place: one factor, or one for each of the B."""
    one = tl.full([], 1, tl.int64)
    rows = one * times * B
    columns = one * columns
    n: tl.constexpr = N if PER_ROW else TILE
    r: tl.constexpr = TILE // n
    divisor = tl.full([], 1.0, factor.dtype.element_ty)
    if count is not None:
        divisor = tl.load(count).to(divisor.dtype)
    if not PER_ROW:
        columns = rows * columns
        rows = one
    across = tl.cdiv(columns, n)
    tiles = tl.cdiv(rows, r) * across
    if not PER_ROW:
        tiles = tl.where(tl.load(factor) / divisor == 1, 0, tiles)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        row = tile // across * r + tl.arange(0, r)
        i = tile % across * n + tl.arange(0, n)
        f = tl.load(factor + row % B * stride, mask=row < rows, other=1.0) / divisor
        mask = ((row < rows) & (f != 1))[:, None] & (i < columns)[None, :]
        at = x + (row * columns)[:, None] + i[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(f.dtype) * f[:, None]
        tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    d_loss, d_attention_loss, count, d_student, d_scores, d_query, d_keys, loss_stride, attention_stride, B, M, C, D,
    PER_ROW: tl.constexpr, ATTENTION_PER_ROW: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Scales the gradients that the forward wrote for an upstream gradient of 1; where it is 1, touches nothing."""
    if d_student is not None:
        _scale(d_student, 1, C, d_loss, loss_stride, count, B, PER_ROW, CP, TILE)
    if d_scores is not None:
        _scale(d_scores, 1, M, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, MP, TILE)
    if d_query is not None:
        _scale(d_query, 1, D, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, DP, TILE)
    if d_keys is not None:
        _scale(d_keys, M, D, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, DP, TILE)


SCHEMA = (
    "(Tensor student, Tensor[] snapshots, Tensor? labels, Tensor? scores, Tensor? query, "
    "Tensor? keys, float temperature, float alpha, bool logit_fusion, bool kl_objective, bool mean, "
    "int ignore_index, Tensor(a!) loss, Tensor(b!) attention_loss, Tensor(c!) weights, Tensor(d!)? d_student, "
    "Tensor(e!)? d_scores, Tensor(f!)? d_query, Tensor(g!)? d_keys) -> ()"
)


class Plan(NamedTuple):
    """A launch of `rows_kernel`: its grid, what follows the tensors among its arguments, and the compiler's options."""

    grid: tuple[int, int, int]
    numbers: tuple
    options: dict


def plan(
    student, snapshots, labels, scores, query, keys, temperature, alpha, logit_fusion, kl_objective, mean, ignore_index,
    loss, d_student, d_scores, d_query, cut=None,
):  # fmt: skip
    """The launch for these tensors, as `cut` or else as the launch table has it."""
    rows, classes = student.shape
    stacked = snapshots[0].dim() == 3
    m = snapshots[0].shape[0] if stacked else len(snapshots)
    row_strides = [z.stride(-2) for z in snapshots]
    wide = loss.dtype == torch.float64
    sizes = student.element_size(), snapshots[0].element_size()
    vector, shifted = alignment(
        classes,
        min(sizes),
        [x.data_ptr() // x.element_size() for x in (student, *snapshots)],
        [student.stride(0), *row_strides] if rows > 1 else [classes],
        [snapshots[0].stride(0)] if stacked and m > 1 else [],
    )
    cut = cut or common.launch(
        classes + (vector - 1 if shifted else 0), m, 8 if wide else max(sizes), common.architecture(student.device)
    )
    attends = d_scores is not None or d_query is not None
    counts = mean and labels is not None
    padded = next_power_of_2(m)
    width = 0 if query is None else query.shape[1]
    numbers = dict(
        B=rows, C=classes, D=width, student_stride=student.stride(0),
        snapshot_stride=snapshots[0].stride(0) if stacked else 0,
        snapshot_strides=row_strides[0] if stacked else tuple(row_strides),
        scores_stride=0 if scores is None else scores.stride(0),
        query_stride=0 if query is None else query.stride(0),
        key_stride=0 if keys is None else keys.stride(0),
        key_row_stride=0 if keys is None else keys.stride(1),
        temperature=temperature, alpha=alpha, row_scale=1.0 / rows if mean and not counts else 1.0,
        ignore_index=ignore_index,
        M=m, STACKED=stacked, LOGIT=logit_fusion, BY_KL=attends and kl_objective, BY_LABEL=attends and not kl_objective,
        CE=labels is not None and alpha > 0, SUM=loss.dim() == 0,
        COUNT_BLOCK=next_power_of_2(rows) if counts and rows <= COUNT_IN_PROGRAM else 0,
        ON_CHIP=cut.on_chip, STAGES=cut.num_stages, R=cut.rows, MP=padded, BLOCK=cut.block,
        DBLOCK=min(next_power_of_2(max(width, 1)), max(16, 1024 // padded)), VECTOR=vector, SHIFTED=shifted,
        ACC=tl.float64 if wide else tl.float32,
    )  # fmt: skip
    assert list(numbers) == rows_kernel.arg_names[-len(numbers) :]
    return Plan((triton.cdiv(rows, cut.rows), 1, 1), tuple(numbers.values()), cut.options)


_plans = {}  # of tensors that begin at multiples of 16 bytes


def ensemble_kd_fwd(
    student, snapshots, labels, scores, query, keys, temperature, alpha, logit_fusion, kl_objective, mean, ignore_index,
    loss, attention_loss, weights, d_student, d_scores, d_query, d_keys,
):  # fmt: skip
    """Fills the outputs. A label that is neither a class nor `ignore_index` gives NaN, for a GPU cannot raise.

    One launch for the rows; one more to add up a scalar loss, in a fixed order; and one before, to count the rows of a
    mean, where there are too many for every program to count them.
    """
    rows = student.shape[0]
    if rows == 0:
        loss.zero_()
        attention_loss.zero_()
        return
    device = student.device
    snapshots = tuple(snapshots)
    one = snapshots[0]
    stacked = one.dim() == 3
    reduces = loss.dim() == 0
    options = temperature, alpha, logit_fusion, kl_objective, mean, ignore_index
    key = (
        device, student.shape, student.stride(0), student.dtype,
        one.shape, one.dtype, one.stride() if stacked else tuple(z.stride(0) for z in snapshots),
        labels is None, None if scores is None else (scores.stride(0), scores.dtype),
        None if query is None else (query.shape[1], query.stride(0), query.dtype, *keys.stride(), keys.dtype),
        options, reduces, d_student is None, d_scores is None, d_query is None,
    )  # fmt: skip
    pointers = 0
    for x in (
        student, *snapshots, labels, scores, query, keys, loss, attention_loss, weights,
        d_student, d_scores, d_query, d_keys,
    ):  # fmt: skip
        if x is not None:
            pointers |= x.data_ptr()
    aligned = pointers % 16 == 0
    planned = _plans.get(key) if aligned else None
    if planned is None:
        planned = plan(
            student, snapshots, labels, scores, query, keys, *options, loss, d_student, d_scores, d_query
        )  # fmt: skip
        if aligned:
            if len(_plans) >= common.KEPT:
                _plans.clear()
            _plans[key] = planned
    grid = planned.grid
    count = parts = None
    o_loss, o_attention_loss = loss, attention_loss
    if mean and labels is not None and rows > COUNT_IN_PROGRAM:
        count = student.new_empty((), dtype=torch.int32)
    if reduces:
        parts = loss.new_empty((2, -(-grid[0] // 4) * 4))  # both rows at multiples of 16 bytes
        o_loss, o_attention_loss = parts.unbind()
    tensors = (
        student, one if stacked else snapshots, labels, scores, query, keys, count, o_loss, o_attention_loss, weights,
        d_student, d_scores, d_query, d_keys,
    )  # fmt: skip
    with torch.cuda.device_of(student):
        if count is not None:
            counting = (labels, count, rows, ignore_index, 4096)
            start(common.count_kernel, (1, 1, 1), counting, {"num_warps": 8}, ("count", device, *counting[2:]), aligned)
        start(rows_kernel, grid, (*tensors, *planned.numbers), planned.options, key, aligned)
        if reduces:
            sums = (parts, loss, attention_loss, grid[0], parts.stride(0), 1024)
            start(common.sum_kernel, (1, 1, 1), sums, {"num_warps": 4}, ("sum", device, loss.dtype, grid[0]), aligned)


BWD_SCHEMA = (
    "(Tensor? d_loss, Tensor? d_attention_loss, Tensor? count, Tensor(a!)? d_student, Tensor(b!)? d_scores, "
    "Tensor(c!)? d_query, Tensor(d!)? d_keys) -> ()"
)


@functools.lru_cache(common.KEPT)
def _scaling(rows: int, snapshots: int, classes: int, width: int, strides: tuple[int, int], most: int):
    """The grid of `scale_kernel`, and what follows the tensors among its arguments."""
    padded = (min(next_power_of_2(n), SCALED) for n in (snapshots, classes, width))
    numbers = (*strides, rows, snapshots, classes, width, strides[0] != 0, strides[1] != 0, *padded, SCALED)
    return (min(triton.cdiv(most, SCALED), SCALING_PROGRAMS), 1, 1), numbers


def ensemble_kd_bwd(d_loss, d_attention_loss, count, d_student, d_scores, d_query, d_keys):
    """Multiplies the gradients in place by the upstream gradients over `count`, () or (B), in one launch.

    Where these are 1 the launch reads them and nothing else.
    """
    rows = snapshots = classes = width = 1
    most = pointers = 0
    if d_student is not None:
        rows, classes = d_student.shape
        most = rows * classes
    if d_scores is not None:
        rows, snapshots = d_scores.shape
        most = max(most, rows * snapshots)
    if d_query is not None:
        rows, width = d_query.shape
        most = max(most, rows * width)
    if d_keys is not None:
        snapshots, rows, width = d_keys.shape
        most = max(most, snapshots * rows * width)
    if most == 0:
        return
    strides = tuple(  # an expanded scalar is one factor too
        x.stride(0) if x is not None and x.dim() and rows > 1 else 0 for x in (d_loss, d_attention_loss)
    )
    tensors = d_loss, d_attention_loss, count, d_student, d_scores, d_query, d_keys
    dtypes = []
    for x in tensors:
        dtypes.append(None if x is None else x.dtype)
        pointers |= 0 if x is None else x.data_ptr()
    grid, numbers = _scaling(rows, snapshots, classes, width, strides, most)
    like = d_loss if d_loss is not None else d_attention_loss
    key = ("bwd", like.device, numbers, *dtypes)
    with torch.cuda.device_of(like):
        start(scale_kernel, grid, (*tensors, *numbers), {"num_warps": 4}, key, pointers % 16 == 0)


for _name, _schema, _op in (
    ("ensemble_kd_fwd", SCHEMA, ensemble_kd_fwd),
    ("ensemble_kd_bwd", BWD_SCHEMA, ensemble_kd_bwd),
):
    torch.library.define(f"eekd_triton::{_name}", _schema)
    torch.library.impl(f"eekd_triton::{_name}", ("cpu", "cuda"))(_op)
    torch.library.register_fake(f"eekd_triton::{_name}")(lambda *args: None)
