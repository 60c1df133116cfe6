"""ensemble_kd in Triton: attention, fusion, KL, CE and all gradients of a row in one launch.

Traffic in accesses of B·C elements: reads M + 1 and writes 1 where a row's tile stays on chip, reads 2 (M + 1) and
writes 1 where it is streamed twice; kernels.launch.launch_for decides by M and C. Soft labels are one more line to
read. The op eekd_triton::ensemble_kd_fwd has the signature of eekd::ensemble_kd_fwd.

Over 350 lines, for a kernel and its launch are read together.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from . import launch
from .columns import columns
from .launch import alignment, define_forward, planned, start
from .outputs import Call
from .rows import (
    LN2,
    LOG2E,
    SEPARATE,
    absorb,
    absorb_targets,
    attend,
    finish,
    follow,
    log2,
    log2_softmax,
    read_labels,
    read_target,
    scaled,
    snapshot_rows,
    softmax,
    visit,
    write_columns,
)

SCALED = 2048  # elements of a gradient that a program of the backward scales at a time
SCALING_PROGRAMS = 1024  # enough to fill a GPU, and few enough to return at once
INTERPRETED = triton.knobs.runtime.interpret  # on CPU tensors, for tests


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
def _statistics(
    s, z, w, used, k, s_top, soft_sum, hard_top, hard_sum, z_top, z_sum, LOGIT: tl.constexpr, CE: tl.constexpr
):
    """Takes columns into the softmax statistics of the student, at τ and at 1, and of the targets."""
    if CE:
        hard_top, hard_sum = absorb(hard_top, hard_sum, s, LOG2E, 1)
    s_top, soft_sum = absorb(s_top, soft_sum, s, k, 1)
    z_top, z_sum = absorb_targets(z_top, z_sum, z, w, used, k, LOGIT)
    return s_top, soft_sum, hard_top, hard_sum, z_top, z_sum


@triton.jit
def _visit(
    s,
    z,
    target,
    label_sum,
    w,
    used,
    k,
    kd,
    ce,
    s_top,
    soft_sum,
    hard_top,
    hard_sum,
    z_top,
    z_sum,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    MEANS: tl.constexpr,
    MOVED: tl.constexpr,
):
    """The sums of kernels.rows.visit over columns, d loss / d s (R, N), and for SOFT those of kernels.rows.follow."""
    log_q = log2_softmax(s, s_top, soft_sum, k)
    q = softmax(s, s_top, soft_sum, k)
    kl, means, moved, p = visit(log_q, z, w, used, k, z_top, z_sum, LOGIT, MEANS, MOVED)
    d = kd * (q - p)
    if CE:
        if SOFT:
            d += ce * (label_sum[:, None] * softmax(s, hard_top, hard_sum, LOG2E) - target)
        else:
            d += ce * (softmax(s, hard_top, hard_sum, LOG2E) - target.to(s.dtype))
    log_q = tl.zeros_like(kl)
    log_p = tl.zeros_like(kl)
    shares = tl.zeros_like(w)
    if SOFT:
        log_q, log_p, shares = follow(s, z, target, w, used, k, hard_top, z_top, z_sum, LOGIT, CE, MEANS and not MOVED)
    return kl, means, moved, d, log_q, log_p, shares


@triton.jit
def _tile(
    p_student,
    p_snapshot,
    labels,
    o_d_student,
    row,
    m,
    y,
    w,
    used,
    inside,
    keep,
    shift,
    bound,
    k,
    d_kl,
    d_ce,
    C,
    label_stride,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    MEANS: tl.constexpr,
    MOVED: tl.constexpr,
    ON_CHIP: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    ACC: tl.constexpr,
):
    """As kernels.columns.columns, with one tile of all snapshots, for which there are too many to unroll them."""
    R: tl.constexpr = w.shape[0]
    MP: tl.constexpr = w.shape[1]
    # first visit: the statistics
    s_top = tl.full([R], float("-inf"), ACC)
    soft_sum = tl.zeros([R], ACC)
    hard_top = s_top
    hard_sum = tl.zeros([R], ACC)
    if LOGIT:
        z_top = s_top
        z_sum = soft_sum
    else:
        z_top = tl.full([R, MP], float("-inf"), ACC)
        z_sum = tl.zeros([R, MP], ACC)
    i = tl.arange(0, BLOCK)
    end = C
    if SHIFTED:
        end = C + VECTOR - 1
    y = (y + shift).to(tl.int32)
    label_sum = tl.zeros([R], ACC)
    if ON_CHIP:
        s, z, classes = _columns(p_student, p_snapshot, i, bound, shift, keep, used, C, SHIFTED, ACC)
        target = read_target(labels, y, row, 0, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
        if SOFT:
            label_sum = tl.sum(target, 1)
        s_top, soft_sum, hard_top, hard_sum, z_top, z_sum = _statistics(
            s, z, w, used, k, s_top, soft_sum, hard_top, hard_sum, z_top, z_sum, LOGIT, CE
        )
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, z, classes = _columns(p_student, p_snapshot, first + i, bound, shift, keep, used, C, SHIFTED, ACC)
            if SOFT:
                target = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
                label_sum += tl.sum(target, 1)
            s_top, soft_sum, hard_top, hard_sum, z_top, z_sum = _statistics(
                s, z, w, used, k, s_top, soft_sum, hard_top, hard_sum, z_top, z_sum, LOGIT, CE
            )

    # second visit: the sums, and the student's gradient
    kl = tl.zeros([R], ACC)
    means = tl.zeros([R, MP], ACC)
    moved = tl.zeros([R, MP], ACC)
    log_q = tl.zeros([R], ACC)
    log_p = tl.zeros([R], ACC)
    shares = tl.zeros([R, MP], ACC)
    if ON_CHIP:
        kl, means, moved, d, log_q, log_p, shares = _visit(
            s,
            z,
            target,
            label_sum,
            w,
            used,
            k,
            d_kl[:, None],
            d_ce[:, None],
            s_top,
            soft_sum,
            hard_top,
            hard_sum,
            z_top,
            z_sum,
            LOGIT,
            CE,
            SOFT,
            MEANS,
            MOVED,
        )
        if o_d_student is not None:
            d = tl.where(keep[:, None], d, 0.0)
            write_columns(o_d_student, d, row, i, shift, classes, inside, C, VECTOR, SHIFTED, False)
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, z, classes = _columns(p_student, p_snapshot, first + i, bound, shift, keep, used, C, SHIFTED, ACC)
            target = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
            more_kl, more_means, more_moved, d, more_log_q, more_log_p, more_shares = _visit(
                s,
                z,
                target,
                label_sum,
                w,
                used,
                k,
                d_kl[:, None],
                d_ce[:, None],
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                z_top,
                z_sum,
                LOGIT,
                CE,
                SOFT,
                MEANS,
                MOVED,
            )
            kl += more_kl
            means += more_means
            moved += more_moved
            log_q += more_log_q
            log_p += more_log_p
            shares += more_shares
            if o_d_student is not None:
                d = tl.where(keep[:, None], d, 0.0)
                write_columns(o_d_student, d, row, first + i, shift, classes, inside, C, VECTOR, SHIFTED, False)
    return kl, means, moved, hard_top, hard_sum, z_top, z_sum, label_sum, log_q, log_p, shares


@triton.jit(do_not_specialize=["snapshot_strides"])
def rows_kernel(
    student,
    snapshots,
    labels,
    scores,
    query,
    keys,
    count,
    o_loss,
    o_attention_loss,
    o_weights,
    o_d_student,
    o_d_scores,
    o_d_query,
    o_d_keys,
    B,
    C,
    D,
    student_stride,
    snapshot_stride,
    snapshot_strides,
    label_stride,
    scores_stride,
    query_stride,
    key_stride,
    key_row_stride,
    temperature: tl.float64,
    alpha: tl.float64,
    row_scale: tl.float64,
    ignore_index,
    M: tl.constexpr,
    STACKED: tl.constexpr,
    LOGIT: tl.constexpr,
    BY_KL: tl.constexpr,
    BY_LABEL: tl.constexpr,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    SUM: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    ON_CHIP: tl.constexpr,
    STAGES: tl.constexpr,
    R: tl.constexpr,
    MP: tl.constexpr,
    BLOCK: tl.constexpr,
    DBLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program takes R rows: all their columns at once if ON_CHIP, else in blocks, and those twice.

    `snapshots` is a tuple of M pointers with M `snapshot_strides` from row to row, or one pointer, `snapshot_stride`
    from snapshot to snapshot and `snapshot_strides` from row to row. VECTOR and SHIFTED are
    kernels.launch.alignment. `labels` are (B), or for SOFT (B, C).
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m = tl.arange(0, MP)
    inside = row < B
    tau = tl.full([], temperature, ACC)
    k = LOG2E / tau
    hard = labels
    if SOFT:
        hard = None
    keep, y, valid, scale = read_labels(hard, count, row, inside, row_scale, ignore_index, B, C, COUNT_BLOCK, ACC)
    ce = tl.full([], alpha, ACC)
    beta = 1.0 - ce
    if labels is None:
        beta = tl.full([], 1.0, ACC)
    alive, used, w = attend(
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
        M,
        DBLOCK,
        ACC,
    )
    at_student = row * student_stride
    shift = tl.zeros([R], tl.int32)
    bound = tl.zeros([R], tl.int32) + C // VECTOR * VECTOR
    if SHIFTED:
        shift = (at_student % VECTOR).to(tl.int32)
        bound = (shift + C + VECTOR - 1) // VECTOR * VECTOR
    p_student = student + at_student // VECTOR * VECTOR
    p_snapshot = snapshot_rows(snapshots, row, m, snapshot_stride, snapshot_strides, M, STACKED, VECTOR)

    counts = keep.to(ACC)  # an ignored row's gradients are 0
    d_kl = scale * beta * tau * counts
    d_ce = scale * ce * counts
    if M <= SEPARATE:
        kl, means, moved, hard_top, hard_sum, z_top, z_sum, label_sum, log_q, log_p, shares = columns(
            student,
            snapshots,
            labels,
            o_d_student,
            row,
            m,
            y,
            valid,
            w,
            inside,
            keep,
            shift,
            bound,
            k,
            d_kl,
            d_ce,
            C,
            student_stride,
            snapshot_stride,
            snapshot_strides,
            label_stride,
            M,
            STACKED,
            LOGIT,
            CE,
            SOFT,
            BY_KL or BY_LABEL,
            BY_KL,
            ON_CHIP,
            STAGES,
            BLOCK,
            VECTOR,
            SHIFTED,
            V,
            T,
            ACC,
        )
    else:
        kl, means, moved, hard_top, hard_sum, z_top, z_sum, label_sum, log_q, log_p, shares = _tile(
            p_student,
            p_snapshot,
            labels,
            o_d_student,
            row,
            m,
            y,
            w,
            used,
            inside,
            keep,
            shift,
            bound,
            k,
            d_kl,
            d_ce,
            C,
            label_stride,
            LOGIT,
            CE,
            SOFT,
            BY_KL or BY_LABEL,
            BY_KL,
            ON_CHIP,
            STAGES,
            BLOCK,
            VECTOR,
            SHIFTED,
            ACC,
        )

    z_y = tl.zeros([R, MP], ACC)
    ce_loss = tl.zeros([R], ACC)
    if SOFT:
        z_y = shares
        if CE:
            ce_loss = LN2 * (label_sum * log2(hard_sum) - log_q)
    elif labels is not None:
        z_y = tl.load(p_snapshot + (shift + y)[:, None], mask=used & valid[:, None], other=0.0).to(ACC)
        if CE:
            s_y = tl.load(p_student + shift + y, mask=valid, other=0.0).to(ACC)
            ce_loss = LN2 * (log2(hard_sum) - scaled(s_y, hard_top, LOG2E))
    finish(
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
        M,
        labels is not None,
        SOFT,
        LOGIT,
        BY_KL,
        SUM,
        DBLOCK,
        ACC,
    )


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
    d_loss,
    d_attention_loss,
    count,
    d_student,
    d_scores,
    d_query,
    d_keys,
    loss_stride,
    attention_stride,
    B,
    M,
    C,
    D,
    PER_ROW: tl.constexpr,
    ATTENTION_PER_ROW: tl.constexpr,
    MP: tl.constexpr,
    CP: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scales the gradients that the forward wrote for an upstream gradient of 1; where it is 1, touches nothing."""
    if d_student is not None:
        _scale(d_student, 1, C, d_loss, loss_stride, count, B, PER_ROW, CP, TILE)
    if d_scores is not None:
        _scale(d_scores, 1, M, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, MP, TILE)
    if d_query is not None:
        _scale(d_query, 1, D, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, DP, TILE)
    if d_keys is not None:
        _scale(d_keys, M, D, d_attention_loss, attention_stride, count, B, ATTENTION_PER_ROW, DP, TILE)


def plan(call: Call, outputs: list, cut: launch.Launch | None = None):
    """The launch for a call, as `cut` or else as the launch table has it."""
    student, snapshots, labels = call[:3]
    loss, _, _, _, d_scores, d_query, _ = outputs
    rows, classes = student.shape
    wide = loss.dtype == torch.float64
    sizes = student.element_size(), snapshots[0].element_size()
    lines = (student, *snapshots, labels) if call.soft else (student, *snapshots)
    vector, shifted = alignment(
        classes,
        min(x.element_size() for x in lines),
        [x.data_ptr() // x.element_size() for x in lines],
        [x.stride(-2) for x in lines] if rows > 1 else [classes],
        [snapshots[0].stride(0)] if call.stacked and call.count > 1 else [],
    )
    attends = d_scores is not None or d_query is not None
    # M pointers, or the selection of an unaligned row's classes, take the registers that M lines would.
    again = call.soft or call.logit_fusion or not call.stacked or shifted or (call.kl_objective and attends)
    cut = cut or launch.launch_for(
        classes + (vector - 1 if shifted else 0),
        call.count,
        8 if wide else max(sizes),
        launch.architecture(student.device),
        again,
    )
    held = min(16 // (8 if wide else max(sizes)), cut.block)  # columns next to each other that a thread has
    return planned(
        rows_kernel,
        cut,
        call,
        outputs,
        label_stride=labels.stride(0) if call.soft else 0,
        VECTOR=vector,
        SHIFTED=shifted,
        V=held,
        T=max(1, min(32 * cut.num_warps, cut.block // held)),
    )


BWD_SCHEMA = (
    "(Tensor? d_loss, Tensor? d_attention_loss, Tensor? count, Tensor(a!)? d_student, Tensor(b!)? d_scores, "
    "Tensor(c!)? d_query, Tensor(d!)? d_keys) -> ()"
)


@functools.lru_cache(launch.KEPT)
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


define_forward("ensemble_kd_fwd", "", rows_kernel, plan)
torch.library.define("eekd_triton::ensemble_kd_bwd", BWD_SCHEMA)
torch.library.impl("eekd_triton::ensemble_kd_bwd", ("cpu", "cuda"))(ensemble_kd_bwd)
torch.library.register_fake("eekd_triton::ensemble_kd_bwd")(lambda *args: None)
