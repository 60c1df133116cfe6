"""sparse_ensemble_kd in Triton: snapshots kept at K classes of a row, all else about the row as in ensemble_kd.

Traffic of a row in elements: reads C of the student and K of each snapshot, and writes C, where the student's row stays
on chip; reads the student twice where it is streamed. The K columns are gathered from cache, and read twice where they
do not fit a tile. Soft labels are one more line, read as often as the student's. The op
eekd_triton::sparse_ensemble_kd_fwd has the signature of eekd::sparse_ensemble_kd_fwd.

Over 350 lines, for a kernel and its launch are read together.
"""

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from . import launch
from .launch import alignment, define_forward, planned
from .outputs import Call
from .rows import (
    LN2,
    LOG2E,
    absorb,
    absorb_targets,
    attend,
    finish,
    finite,
    follow,
    inverse,
    log2,
    log2_softmax,
    powers,
    read_labels,
    read_target,
    scaled,
    snapshot_rows,
    softmax,
    visit,
    write_columns,
)

CHOSEN = 32  # numbers per thread where columns meet indices
TOP = 64  # numbers per thread of the tile of K columns
UNROLLED = 2  # blocks of indices that do not keep the student's row from being read ahead
FOR_THREE = 168  # registers with which an SM holds three programs of four warps; enough for 16 bits


@triton.jit
def _student(p_student, i, bound, shift, keep, C, SHIFTED: tl.constexpr, ACC: tl.constexpr):
    """The columns i of the rows' memory: s (R, N), and which of them are classes."""
    read = i[None, :] < bound[:, None]  # whole vectors, so that the mask leaves the loads wide
    s = tl.load(p_student[:, None] + i[None, :], mask=keep[:, None] & read, other=float("-inf")).to(ACC)
    classes = read
    if SHIFTED:
        classes = (i[None, :] >= shift[:, None]) & (i[None, :] < shift[:, None] + C)
        s = tl.where(classes, s, float("-inf"))
    return s, classes


@triton.jit
def _bits(p_indices, begin, offset, keep, K, N: tl.constexpr):
    """The word, of 32 columns each, and the bit in it, of N indices whose column 0 is at `offset` (R); both (N, R)."""
    j = begin + tl.arange(0, N)
    c = tl.load(p_indices[None, :] + j[:, None], mask=keep[None, :] & (j < K)[:, None], other=0).to(tl.int32)
    c = tl.where((j < K)[:, None], c + offset[None, :], -1)
    return c >> 5, tl.full(c.shape, 1, tl.int32) << (c & 31)


@triton.jit
def _mark(words, word, bit, begin, W: tl.constexpr):
    """Sets bits in words (R, W), which are those from `begin`."""
    here = word[:, :, None] == (begin + tl.arange(0, W))[None, None, :]
    return words + tl.sum(tl.where(here, bit[:, :, None], 0), 0)  # of distinct bits, and so their union


@triton.jit
def _chosen(
    s, word, bit, p_indices, first, shift, keep, K, MARKED: tl.constexpr, KP: tl.constexpr, UNROLLED: tl.constexpr
):
    """Which of the columns s (R, N) of the row's memory from `first` are of its indices.

    Each index sets one bit of N / 32 words, which costs K / 32 comparisons a column instead of K. The bits of the first
    MARKED indices are given. A loop over more of them would keep s from being read ahead, unless it is unrolled.
    """
    R: tl.constexpr = s.shape[0]
    W: tl.constexpr = s.shape[1] // 32
    words = _mark(tl.zeros([R, W], tl.int32), word, bit, first // 32, W)
    if KP <= UNROLLED:
        for begin in tl.static_range(MARKED, KP, MARKED):
            word, bit = _bits(p_indices, begin, shift - first, keep, K, MARKED)
            words = _mark(words, word, bit, 0, W)
    else:
        for begin in range(MARKED, K, MARKED):
            word, bit = _bits(p_indices, begin, shift - first, keep, K, MARKED)
            words = _mark(words, word, bit, 0, W)
    chosen = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(chosen, s.shape) != 0


@triton.jit
def _top(p_student, p_snapshot, p_indices, j, y, keep, used, C, K, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The columns j < K: s (R, N), z (R, M, N), their classes, which of these exist (R, N).

    And of each row the label's column, or -1, and whether a class does not exist.
    """
    asked = keep[:, None] & (j < K)[None, :]
    c = tl.load(p_indices[:, None] + j[None, :], mask=asked, other=0)
    exists = asked & (c >= 0) & (c < C)
    s = tl.load(p_student[:, None] + c, mask=exists, other=float("-inf")).to(ACC)
    mask = used[:, :, None] & (j < K // VECTOR * VECTOR)[None, None, :]
    z = tl.load(p_snapshot[:, :, None] + j[None, None, :], mask=mask, other=float("-inf")).to(ACC)
    place = tl.max(tl.where(exists & (c == y[:, None]), j[None, :], -1), 1)
    wrong = tl.max((asked & (exists == 0)).to(tl.int32), 1)
    return s, z, c, exists, place, wrong


@triton.jit
def _follow_student(s, target, hard_top):
    """Σ y log2 softmax(s) (R), less what the logarithm of its sum takes off."""
    return tl.sum(tl.where(target != 0, target * scaled(s, hard_top[:, None], LOG2E), 0.0), 1)


@triton.jit
def _visit_top(
    o_d_student,
    s,
    z,
    c,
    exists,
    labels,
    row,
    y,
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
    C,
    label_stride,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    MEANS: tl.constexpr,
    MOVED: tl.constexpr,
):
    """The sums of kernels.rows.visit over these of the K columns; writes their part of d_student.

    For SOFT also Σ y log p and the shares of kernels.rows.follow.
    """
    log_q = log2_softmax(s, s_top, soft_sum, k)
    kl, means, moved, p = visit(log_q, z, w, used, k, z_top, z_sum, LOGIT, MEANS, MOVED)
    log_p = tl.zeros_like(kl)
    shares = tl.zeros_like(w)
    if SOFT:
        target = tl.load((labels + row * label_stride)[:, None] + c, mask=exists, other=0.0).to(s.dtype)
        _, log_p, shares = follow(s, z, target, w, used, k, hard_top, z_top, z_sum, LOGIT, False, MEANS and not MOVED)
    else:
        target = (c == y[:, None]).to(s.dtype)
    if o_d_student is not None:
        d = kd * (softmax(s, s_top, soft_sum, k) - p)
        if CE:
            every = softmax(s, hard_top, hard_sum, LOG2E)
            if SOFT:
                every *= label_sum[:, None]
            d += ce * (every - target)
        tl.store((o_d_student + row * C)[:, None] + c, d.to(o_d_student.dtype.element_ty), mask=exists)
    return kl, means, moved, log_p, shares


@triton.jit
def _visit_rest(log_q, z, w, used, k, z_top, z_sum, LOGIT: tl.constexpr, MEANS: tl.constexpr, MOVED: tl.constexpr):
    """kernels.rows.visit of one column: log_q (R), z (R, M), and p (R).

    Written out, for of tiles of one column Triton 3.6 makes programs that it then refuses.
    """
    if LOGIT:
        log_p = scaled(tl.sum(tl.where(used, w * z, 0.0), 1), z_top, k)
        p = tl.exp2(log_p) * (1.0 / z_sum)
        log_p -= log2(z_sum)
    else:
        each = tl.exp2(scaled(z, z_top, k))
        p = tl.sum(tl.where(used, w / z_sum, 0.0) * each, 1)
        log_p = log2(tl.where(p > 0, p, 1.0))
    r = tl.where(p > 0, log_p - log_q, 0.0)
    means = tl.zeros_like(w)
    moved = tl.zeros_like(w)
    if LOGIT and MEANS:
        means = p[:, None] * tl.where(used & (p > 0)[:, None], z, 0.0)
        if MOVED:
            moved = r[:, None] * means
    if MOVED and not LOGIT:
        moved = tl.where(used, each * r[:, None] / z_sum, 0.0)
    return p * r, means, moved, p


@triton.jit
def _follow_rest(z, target, w, used, k, z_top, z_sum, LOGIT: tl.constexpr, SHARES: tl.constexpr):
    """kernels.rows.follow of one column: z (R, M), target (R). Written out, as `_visit_rest` is."""
    if LOGIT:
        log_p = scaled(tl.sum(tl.where(used, w * z, 0.0), 1), z_top, k)
        share = z
    else:
        line = scaled(z, z_top, k) + tl.where(used, log2(w * inverse(z_sum)), float("-inf"))
        most = tl.max(line, 1)
        each = tl.exp2(line - finite(most)[:, None])
        total = tl.sum(each, 1)
        log_p = most + log2(total)
        share = w - each * inverse(total)[:, None]
    shares = tl.zeros_like(w)
    if SHARES:
        follows = used & ((target != 0) & (log_p != float("-inf")))[:, None]
        shares = tl.where(follows, target[:, None] * share, 0.0)
    return tl.where(target != 0, target * log_p, 0.0), shares


@triton.jit(do_not_specialize=["snapshot_strides"])
def sparse_rows_kernel(
    student,
    snapshots,
    tail,
    indices,
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
    K,
    D,
    student_stride,
    snapshot_stride,
    snapshot_strides,
    tail_stride,
    tail_row_stride,
    indices_stride,
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
    KVECTOR: tl.constexpr,
    KP: tl.constexpr,
    KBLOCK: tl.constexpr,
    MARKED: tl.constexpr,
    UNROLLED: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program takes R rows: the student's C columns, then the K columns and the bucket of the rest.

    The student's columns are taken at once if ON_CHIP, else in blocks of BLOCK, and those twice; the K columns at once
    if KP <= KBLOCK. Membership is found for MARKED indices at a time. KVECTOR is the alignment of the snapshots; all
    else is as in kernels.ensemble_kd.rows_kernel.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m = tl.arange(0, MP)
    inside = row < B
    tau = tl.full([], temperature, ACC)
    k = LOG2E / tau
    by_class = labels
    if SOFT:
        by_class = None
    keep, y, valid, scale = read_labels(by_class, count, row, inside, row_scale, ignore_index, B, C, COUNT_BLOCK, ACC)
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
    p_vectors = student + at_student // VECTOR * VECTOR
    p_student = p_vectors + shift
    p_snapshot = snapshot_rows(snapshots, row, m, snapshot_stride, snapshot_strides, M, STACKED, KVECTOR)
    p_indices = indices + row * indices_stride
    at_tail = (m.to(tl.int64) * tail_stride)[None, :] + (row * tail_row_stride)[:, None]
    z_rest = tau * tl.load(tail + at_tail, mask=used, other=float("-inf")).to(ACC)

    j = tl.arange(0, KBLOCK)
    WHOLE: tl.constexpr = ON_CHIP and KP <= KBLOCK
    if WHOLE:  # before the student's columns, whose layout is then the one that the compiler spreads
        top, z, c, exists, place, wrong = _top(p_student, p_snapshot, p_indices, j, y, keep, used, C, K, KVECTOR, ACC)
    if CE and not SOFT:
        s_y = tl.load(p_student + y, mask=valid, other=0.0).to(ACC)

    # statistics of the student: of all its columns at 1, and at τ of those in the bucket; sums of soft labels likewise
    hard_top = tl.full([R], float("-inf"), ACC)
    hard_sum = tl.zeros([R], ACC)
    rest_top = hard_top
    rest_sum = hard_sum
    label_sum = hard_sum
    label_rest = hard_sum
    label_log_q = hard_sum
    i = tl.arange(0, BLOCK)
    end = C
    if SHIFTED:
        end = C + VECTOR - 1
    word, bit = _bits(p_indices, 0, shift, keep, K, MARKED)
    if ON_CHIP:
        s, classes = _student(p_vectors, i, bound, shift, keep, C, SHIFTED, ACC)
        if CE:
            hard_top, hard_sum = absorb(hard_top, hard_sum, s, LOG2E, 1)
        chosen = _chosen(s, word, bit, p_indices, 0, shift, keep, K, MARKED, KP, UNROLLED)
        if SOFT:
            target = read_target(labels, y, row, 0, i, classes, inside, label_stride, VECTOR, False, True, ACC)
            label_sum = tl.sum(target, 1)
            label_rest = tl.sum(tl.where(chosen, 0.0, target), 1)
            if CE:
                label_log_q = _follow_student(s, target, hard_top)
        rest = tl.where(chosen, float("-inf"), s)
        rest_top, rest_sum = absorb(rest_top, rest_sum, rest, k, 1)
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, classes = _student(p_vectors, first + i, bound, shift, keep, C, SHIFTED, ACC)
            if CE:
                hard_top, hard_sum = absorb(hard_top, hard_sum, s, LOG2E, 1)
            chosen = _chosen(s, word, bit, p_indices, first, shift, keep, K, MARKED, KP, UNROLLED)
            if SOFT:
                target = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, True, ACC)
                label_sum += tl.sum(target, 1)
                label_rest += tl.sum(tl.where(chosen, 0.0, target), 1)
            rest = tl.where(chosen, float("-inf"), s)
            rest_top, rest_sum = absorb(rest_top, rest_sum, rest, k, 1)

    # statistics of the K columns, to which the bucket's are added: its logarithm is nowhere rounded as a logit
    s_top = rest_top
    soft_sum = rest_sum
    if LOGIT:
        z_top = tl.full([R], float("-inf"), ACC)
        z_sum = tl.zeros([R], ACC)
    else:
        z_top = tl.full([R, MP], float("-inf"), ACC)
        z_sum = tl.zeros([R, MP], ACC)
    z_top, z_sum = absorb_targets(z_top, z_sum, z_rest[:, :, None], w, used, k, LOGIT)
    if WHOLE:
        s_top, soft_sum = absorb(s_top, soft_sum, top, k, 1)
        z_top, z_sum = absorb_targets(z_top, z_sum, z, w, used, k, LOGIT)
    else:
        place = tl.full([R], -1, tl.int32)
        wrong = tl.zeros([R], tl.int32)
        for first in range(0, K, KBLOCK):
            top, z, c, exists, more_place, more_wrong = _top(
                p_student, p_snapshot, p_indices, first + j, y, keep, used, C, K, KVECTOR, ACC
            )
            s_top, soft_sum = absorb(s_top, soft_sum, top, k, 1)
            z_top, z_sum = absorb_targets(z_top, z_sum, z, w, used, k, LOGIT)
            place = tl.maximum(place, more_place)
            wrong = tl.maximum(wrong, more_wrong)
    scale = tl.where(wrong > 0, float("nan"), scale)

    # the bucket as a column
    d_kl = (scale * beta * tau)[:, None]
    d_ce = (scale * ce)[:, None]
    log_q = rest_top - finite(s_top) + log2(rest_sum) - log2(soft_sum)
    q = tl.exp2(rest_top - finite(s_top)) * rest_sum / soft_sum
    kl, means, moved, p = _visit_rest(log_q, z_rest, w, used, k, z_top, z_sum, LOGIT, BY_KL or BY_LABEL, BY_KL)
    log_p = tl.zeros([R], ACC)
    shares = tl.zeros([R, MP], ACC)
    if SOFT:
        log_p, shares = _follow_rest(z_rest, label_rest, w, used, k, z_top, z_sum, LOGIT, BY_LABEL)

    WRITES: tl.constexpr = o_d_student is not None
    if WRITES or (SOFT and CE and not ON_CHIP):
        # The columns of the bucket, in wide stores that pass over others: the K columns and the label's are written
        # after a barrier.
        soft = tl.where(rest_sum == 0, 0.0, scale * beta * tau * (q - p) / rest_sum)[:, None]
        hard = d_ce / hard_sum[:, None]
        if SOFT:
            hard *= label_sum[:, None]
        if ON_CHIP:
            d = soft * powers(rest, rest_top, k, 1)
            if CE:
                d += hard * powers(s, hard_top, LOG2E, 1)
                if SOFT:
                    d -= d_ce * target
            d = tl.where(keep[:, None], d, 0.0)
            write_columns(o_d_student, d, row, i, shift, classes, inside, C, VECTOR, SHIFTED, False)
        else:
            for first in tl.range(0, end, BLOCK, num_stages=STAGES):
                s, classes = _student(p_vectors, first + i, bound, shift, keep, C, SHIFTED, ACC)
                d = soft * powers(s, rest_top, k, 1)
                if CE:
                    d += hard * powers(s, hard_top, LOG2E, 1)
                    if SOFT:
                        target = read_target(
                            labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, True, ACC
                        )
                        label_log_q += _follow_student(s, target, hard_top)
                        d -= d_ce * target
                if WRITES:
                    d = tl.where(keep[:, None], d, 0.0)
                    write_columns(o_d_student, d, row, first + i, shift, classes, inside, C, VECTOR, SHIFTED, False)
        tl.debug_barrier()
        if CE and not SOFT:
            d = soft * powers(s_y[:, None], rest_top, k, 1) + hard * powers(s_y[:, None], hard_top, LOG2E, 1) - d_ce
            at = (o_d_student + row * C + y)[:, None]
            tl.store(at, d.to(o_d_student.dtype.element_ty), mask=(valid & (place < 0))[:, None])

    # the K columns
    if WHOLE:
        more_kl, more_means, more_moved, more_log_p, more_shares = _visit_top(
            o_d_student,
            top,
            z,
            c,
            exists,
            labels,
            row,
            y,
            label_sum,
            w,
            used,
            k,
            d_kl,
            d_ce,
            s_top,
            soft_sum,
            hard_top,
            hard_sum,
            z_top,
            z_sum,
            C,
            label_stride,
            LOGIT,
            CE,
            SOFT,
            BY_KL or BY_LABEL,
            BY_KL,
        )
        kl += more_kl
        means += more_means
        moved += more_moved
        log_p += more_log_p
        shares += more_shares
    else:
        for first in range(0, K, KBLOCK):
            top, z, c, exists, _, _ = _top(
                p_student, p_snapshot, p_indices, first + j, y, keep, used, C, K, KVECTOR, ACC
            )
            more_kl, more_means, more_moved, more_log_p, more_shares = _visit_top(
                o_d_student,
                top,
                z,
                c,
                exists,
                labels,
                row,
                y,
                label_sum,
                w,
                used,
                k,
                d_kl,
                d_ce,
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                z_top,
                z_sum,
                C,
                label_stride,
                LOGIT,
                CE,
                SOFT,
                BY_KL or BY_LABEL,
                BY_KL,
            )
            kl += more_kl
            means += more_means
            moved += more_moved
            log_p += more_log_p
            shares += more_shares

    z_y = tl.zeros([R, MP], ACC)
    ce_loss = tl.zeros([R], ACC)
    if SOFT:
        z_y = shares
        if CE:
            ce_loss = LN2 * (label_sum * log2(hard_sum) - label_log_q)
    elif labels is not None:
        kept = (place >= 0)[:, None]
        z_y = tl.load(p_snapshot + place[:, None], mask=used & kept, other=0.0).to(ACC)
        z_y = tl.where(used & (kept == 0), z_rest, z_y)
        if CE:
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


def by_rule(classes: int, kept: int, itemsize: int, soft: bool = False) -> launch.Launch:
    """How the student's rows are cut: as the dense op's of one snapshot, for as many numbers are kept of a column.

    Soft labels are one number more.
    """
    cut = launch.by_rule_of_tiles(classes, 2 if soft else 1, itemsize)
    if cut.on_chip:
        return cut._replace(rows=min(cut.rows, max(1, 512 // cut.block)), block=max(cut.block, 32))
    return cut._replace(maxnreg=FOR_THREE if kept <= 64 and itemsize == 2 else cut.maxnreg)


def plan(call: Call, outputs: list, cut: launch.Launch | None = None):
    """The launch for a call, as `cut` or else as the rule has it."""
    student, snapshots, labels = call[:3]
    rows, classes = student.shape
    kept = call.indices.shape[1]
    size, wide = student.element_size(), outputs[0].dtype == torch.float64
    lines = (student, labels) if call.soft else (student,)
    vector, shifted = alignment(
        classes,
        min(x.element_size() for x in lines),
        [x.data_ptr() // x.element_size() for x in lines],
        [x.stride(0) for x in lines] if rows > 1 else [classes],
        [],
    )
    strides = [z.stride(-2) for z in snapshots] if rows > 1 else [kept]
    if call.stacked and call.count > 1:
        strides.append(snapshots[0].stride(0))
    size_kept = snapshots[0].element_size()
    pointers = [z.data_ptr() // size_kept for z in snapshots]
    kvector = alignment(kept, size_kept, pointers, [], strides).vector
    cut = cut or by_rule(classes + (vector - 1 if shifted else 0), kept, 8 if wide else size, call.soft)
    threads, whole, padded = 32 * cut.num_warps, next_power_of_2(kept), next_power_of_2(call.count)

    def at_most(numbers):
        return min(whole, next_power_of_2(max(1, numbers // cut.rows) + 1) // 2)

    marked = at_most(CHOSEN * threads * 32 // cut.block)
    return planned(
        sparse_rows_kernel,
        cut,
        call,
        outputs,
        K=kept,
        tail_stride=call.tail.stride(0),
        tail_row_stride=call.tail.stride(1),
        indices_stride=call.indices.stride(0),
        label_stride=labels.stride(0) if call.soft else 0,
        VECTOR=vector,
        SHIFTED=shifted,
        KVECTOR=kvector,
        KP=whole,
        KBLOCK=at_most(TOP * threads // ((padded + 3) * (2 if wide else 1))),
        MARKED=marked,
        UNROLLED=UNROLLED * marked,
    )


define_forward("sparse_ensemble_kd_fwd", "Tensor tail, Tensor indices, ", sparse_rows_kernel, plan)
