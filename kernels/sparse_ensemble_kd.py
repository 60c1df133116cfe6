"""sparse_ensemble_kd in Triton: snapshots kept at K classes of a row, all else about the row as in ensemble_kd.

Traffic of a row in elements: reads C of the student and K of each snapshot, and writes C, where the student's row stays
on chip; reads the student twice where it is streamed. The K columns are gathered from cache, and read twice where they
do not fit a tile. The op fills outputs that the caller allocated, with the arguments of eekd::sparse_ensemble_kd_fwd,
under the name eekd_triton::sparse_ensemble_kd_fwd.
"""

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from . import common
from .common import (
    LOG2E,
    absorb,
    absorb_targets,
    alignment,
    attend,
    finish,
    finite,
    forward,
    log_softmax,
    planned,
    powers,
    read_labels,
    snapshot_rows,
    softmax,
    visit,
    write_columns,
)

WORD = tl.constexpr(32)  # columns whose membership one integer holds
CHOSEN = 32  # numbers per thread where columns meet indices
TOP = 64  # numbers per thread of the tile of K columns
UNROLLED = 8  # blocks of indices that do not keep the student's row from being read ahead


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
def _mark(words, p_indices, begin, offset, keep, K, N: tl.constexpr, W: tl.constexpr):
    """Sets the bits of N indices in words (R, W), of which word 0 begins at column -offset (R)."""
    j = begin + tl.arange(0, N)
    c = tl.load(p_indices[None, :] + j[:, None], mask=keep[None, :] & (j < K)[:, None], other=0).to(tl.int32)
    c = tl.where((j < K)[:, None], c + offset[None, :], -1)  # (N, R)
    bit = tl.full(c.shape, 1, tl.int32) << (c & (WORD - 1))
    here = (c >> 5)[:, :, None] == tl.arange(0, W)[None, None, :]
    return words + tl.sum(tl.where(here, bit[:, :, None], 0), 0)  # of distinct bits, and so their union


@triton.jit
def _rest(
    s, p_indices, offset, keep, K,
    R: tl.constexpr, BLOCK: tl.constexpr, MARKED: tl.constexpr, KP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The columns s (R, BLOCK), those of the row's indices replaced by -inf.

    Each index sets one bit of BLOCK / 32 words, which costs K / 32 comparisons a column instead of K.
    """
    W: tl.constexpr = BLOCK // WORD
    words = tl.zeros([R, W], tl.int32)
    if UNROLL:
        for begin in tl.static_range(0, KP, MARKED):
            words = _mark(words, p_indices, begin, offset, keep, K, MARKED, W)
    else:
        for begin in range(0, K, MARKED):
            words = _mark(words, p_indices, begin, offset, keep, K, MARKED, W)
    chosen = (words[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1
    return tl.where(tl.reshape(chosen, [R, BLOCK]) != 0, float("-inf"), s)


@triton.jit
def _top(p_student, p_snapshot, p_indices, j, y, keep, used, C, K, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The columns j < K: s (R, N), z (R, M, N), their classes (R, N), which of these exist, and which do not."""
    asked = keep[:, None] & (j < K)[None, :]
    c = tl.load(p_indices[:, None] + j[None, :], mask=asked, other=0)
    exists = asked & (c >= 0) & (c < C)
    s = tl.load(p_student[:, None] + c, mask=exists, other=float("-inf")).to(ACC)
    mask = used[:, :, None] & (j < K // VECTOR * VECTOR)[None, None, :]
    z = tl.load(p_snapshot[:, :, None] + j[None, None, :], mask=mask, other=float("-inf")).to(ACC)
    return s, z, c, exists, asked & (exists == 0)


@triton.jit
def _place(c, exists, j, y):
    """The label's column among these, or -1 (R)."""
    return tl.max(tl.where(exists & (c == y[:, None]), j[None, :], -1), 1)


@triton.jit
def _write_top(
    o_d_student, s, p, c, exists, row, y, k, kd, ce, s_max, soft_sum, hard_max, hard_sum, keep, C, CE: tl.constexpr
):
    """d_student at the classes c (R, N)."""
    d = kd * (softmax(s, s_max, soft_sum, k) - p)
    if CE:
        d += ce * (softmax(s, hard_max, hard_sum, LOG2E) - (c == y[:, None]).to(s.dtype))
    tl.store((o_d_student + row * C)[:, None] + c, d.to(o_d_student.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["snapshot_strides"])
def sparse_rows_kernel(
    student, snapshots, tail, indices, labels, scores, query, keys, count,
    o_loss, o_attention_loss, o_weights, o_d_student, o_d_scores, o_d_query, o_d_keys,
    B, C, K, D, student_stride, snapshot_stride, snapshot_strides, tail_stride, tail_row_stride, indices_stride,
    scores_stride, query_stride, key_stride, key_row_stride,
    temperature: tl.float64, alpha: tl.float64, row_scale: tl.float64, ignore_index,
    M: tl.constexpr, STACKED: tl.constexpr, LOGIT: tl.constexpr, BY_KL: tl.constexpr, BY_LABEL: tl.constexpr,
    CE: tl.constexpr, SUM: tl.constexpr, COUNT_BLOCK: tl.constexpr, ON_CHIP: tl.constexpr, STAGES: tl.constexpr,
    R: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr, DBLOCK: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, KVECTOR: tl.constexpr, KP: tl.constexpr, KBLOCK: tl.constexpr, MARKED: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
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
    keep, y, valid, scale = read_labels(
        labels, count, row, inside, row_scale, ignore_index, B, C, COUNT_BLOCK, ACC
    )  # fmt: skip
    ce = tl.full([], alpha, ACC)
    beta = 1.0 - ce
    if labels is None:
        beta = tl.full([], 1.0, ACC)
    alive, used, w = attend(
        scores, query, keys, o_weights, row, m, inside, keep, D, scores_stride, query_stride, key_stride,
        key_row_stride, M, DBLOCK, ACC,
    )  # fmt: skip
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

    # statistics of the student: of all its columns at 1, and at τ of those in the bucket
    hard_max = tl.full([R], float("-inf"), ACC)
    hard_sum = tl.zeros([R], ACC)
    rest_max = hard_max
    rest_sum = hard_sum
    i = tl.arange(0, BLOCK)
    end = C
    if SHIFTED:
        end = C + VECTOR - 1
    if ON_CHIP:
        s, classes = _student(p_vectors, i, bound, shift, keep, C, SHIFTED, ACC)
        if CE:
            hard_max, hard_sum = absorb(hard_max, hard_sum, s, LOG2E, 1)
        rest = _rest(s, p_indices, shift, keep, K, R, BLOCK, MARKED, KP, UNROLL)
        rest_max, rest_sum = absorb(rest_max, rest_sum, rest, k, 1)
    else:
        for first in tl.range(0, end, BLOCK, num_stages=STAGES):
            s, classes = _student(p_vectors, first + i, bound, shift, keep, C, SHIFTED, ACC)
            if CE:
                hard_max, hard_sum = absorb(hard_max, hard_sum, s, LOG2E, 1)
            rest = _rest(s, p_indices, shift - first, keep, K, R, BLOCK, MARKED, KP, UNROLL)
            rest_max, rest_sum = absorb(rest_max, rest_sum, rest, k, 1)

    # statistics of the K columns, to which the bucket's are added: its logarithm is nowhere rounded as a logit
    s_max = rest_max
    soft_sum = rest_sum
    if LOGIT:
        z_max = tl.full([R], float("-inf"), ACC)
        z_sum = tl.zeros([R], ACC)
    else:
        z_max = tl.full([R, MP], float("-inf"), ACC)
        z_sum = tl.zeros([R, MP], ACC)
    z_max, z_sum = absorb_targets(z_max, z_sum, z_rest[:, :, None], w, used, k, LOGIT)
    j = tl.arange(0, KBLOCK)
    WHOLE: tl.constexpr = KP <= KBLOCK
    if WHOLE:
        top, z, c, exists, wrong = _top(p_student, p_snapshot, p_indices, j, y, keep, used, C, K, KVECTOR, ACC)
        s_max, soft_sum = absorb(s_max, soft_sum, top, k, 1)
        z_max, z_sum = absorb_targets(z_max, z_sum, z, w, used, k, LOGIT)
        place = _place(c, exists, j, y)
        any_wrong = tl.max(wrong.to(tl.int32), 1)
    else:
        place = tl.full([R], -1, tl.int32)
        any_wrong = tl.zeros([R], tl.int32)
        for first in range(0, K, KBLOCK):
            top, z, c, exists, wrong = _top(
                p_student, p_snapshot, p_indices, first + j, y, keep, used, C, K, KVECTOR, ACC
            )  # fmt: skip
            s_max, soft_sum = absorb(s_max, soft_sum, top, k, 1)
            z_max, z_sum = absorb_targets(z_max, z_sum, z, w, used, k, LOGIT)
            place = tl.maximum(place, _place(c, exists, first + j, y))
            any_wrong = tl.maximum(any_wrong, tl.max(wrong.to(tl.int32), 1))
    scale = tl.where(any_wrong > 0, float("nan"), scale)

    # the bucket as a column
    inverse_tau = 1.0 / tau
    d_kl = (scale * beta * tau)[:, None]
    d_ce = (scale * ce)[:, None]
    log_q = log_softmax(rest_max[:, None], s_max, soft_sum, inverse_tau) + tl.log(rest_sum)[:, None]
    q = softmax(rest_max[:, None], s_max, soft_sum, k) * rest_sum[:, None]
    kl, means, moved, p = visit(
        log_q, z_rest[:, :, None], w, used, k, inverse_tau, z_max, z_sum, LOGIT, BY_KL or BY_LABEL, BY_KL
    )  # fmt: skip

    if o_d_student is not None:
        # The columns of the bucket, in wide stores that pass over the K columns too: those are written after a barrier.
        share = tl.where(rest_sum[:, None] == 0, 0.0, d_kl * (q - p) / rest_sum[:, None])
        if ON_CHIP:
            d = share * powers(rest, rest_max, k, 1)
            if CE:
                is_label = (i[None, :] - shift[:, None]) == y[:, None]
                d += d_ce * (softmax(s, hard_max, hard_sum, LOG2E) - is_label.to(ACC))
            write_columns(o_d_student, d, row, i, shift, classes, inside, keep, C, VECTOR, SHIFTED)
        else:
            for first in tl.range(0, end, BLOCK, num_stages=STAGES):
                s, classes = _student(p_vectors, first + i, bound, shift, keep, C, SHIFTED, ACC)
                d = share * powers(s, rest_max, k, 1)
                if CE:
                    is_label = (first + i[None, :] - shift[:, None]) == y[:, None]
                    d += d_ce * (softmax(s, hard_max, hard_sum, LOG2E) - is_label.to(ACC))
                write_columns(o_d_student, d, row, first + i, shift, classes, inside, keep, C, VECTOR, SHIFTED)
        tl.debug_barrier()

    # the K columns
    if WHOLE:
        log_q = log_softmax(top, s_max, soft_sum, inverse_tau)
        more_kl, more_means, more_moved, p = visit(
            log_q, z, w, used, k, inverse_tau, z_max, z_sum, LOGIT, BY_KL or BY_LABEL, BY_KL
        )  # fmt: skip
        kl += more_kl
        means += more_means
        moved += more_moved
        if o_d_student is not None:
            _write_top(
                o_d_student, top, p, c, exists, row, y, k, d_kl, d_ce, s_max, soft_sum, hard_max, hard_sum, keep, C, CE
            )  # fmt: skip
    else:
        for first in range(0, K, KBLOCK):
            top, z, c, exists, wrong = _top(
                p_student, p_snapshot, p_indices, first + j, y, keep, used, C, K, KVECTOR, ACC
            )  # fmt: skip
            log_q = log_softmax(top, s_max, soft_sum, inverse_tau)
            more_kl, more_means, more_moved, p = visit(
                log_q, z, w, used, k, inverse_tau, z_max, z_sum, LOGIT, BY_KL or BY_LABEL, BY_KL
            )  # fmt: skip
            kl += more_kl
            means += more_means
            moved += more_moved
            if o_d_student is not None:
                _write_top(
                    o_d_student, top, p, c, exists, row, y, k, d_kl, d_ce, s_max, soft_sum, hard_max, hard_sum, keep,
                    C, CE,
                )  # fmt: skip

    z_y = tl.zeros([R, MP], ACC)
    ce_loss = tl.zeros([R], ACC)
    if labels is not None:
        chosen = (place >= 0)[:, None]
        z_y = tl.load(p_snapshot + place[:, None], mask=used & chosen, other=0.0).to(ACC)
        z_y = tl.where(used & (chosen == 0), z_rest, z_y)
        if CE:
            s_y = tl.load(p_student + y, mask=valid, other=0.0).to(ACC)
            ce_loss = tl.log(hard_sum) - (s_y - finite(hard_max))
    finish(
        query, keys, o_loss, o_attention_loss, o_d_scores, o_d_query, o_d_keys,
        kl, means, moved, z_y, ce_loss, w, used, alive, keep, inside, row, m, scale, ce, beta, tau, k, z_max, z_sum,
        B, D, query_stride, key_stride, key_row_stride, M, labels is not None, LOGIT, BY_KL, SUM, DBLOCK, ACC,
    )  # fmt: skip


SCHEMA = (
    "(Tensor student, Tensor[] snapshots, Tensor tail, Tensor indices, Tensor? labels, Tensor? scores, Tensor? query, "
    "Tensor? keys, float temperature, float alpha, bool logit_fusion, bool kl_objective, bool mean, "
    "int ignore_index, Tensor(a!) loss, Tensor(b!) attention_loss, Tensor(c!) weights, Tensor(d!)? d_student, "
    "Tensor(e!)? d_scores, Tensor(f!)? d_query, Tensor(g!)? d_keys) -> ()"
)


def by_rule(classes: int, itemsize: int) -> common.Launch:
    """How the student's rows are cut: as the dense op's of one snapshot, for as many numbers are kept of a column."""
    cut = common.by_rule(classes, 1, itemsize)
    return cut._replace(rows=min(cut.rows, max(1, 512 // cut.block)), block=max(cut.block, 32))


def plan(
    student, snapshots, tail, indices, labels, scores, query, keys, temperature, alpha, logit_fusion, kl_objective,
    mean, ignore_index, loss, d_student, d_scores, d_query, cut=None,
):  # fmt: skip
    """The launch for these tensors, as `cut` or else as the rule has it."""
    rows, classes = student.shape
    kept = indices.shape[1]
    stacked = snapshots[0].dim() == 3
    m = snapshots[0].shape[0] if stacked else len(snapshots)
    size, wide = student.element_size(), loss.dtype == torch.float64
    vector, shifted = alignment(
        classes, size, [student.data_ptr() // size], [student.stride(0)] if rows > 1 else [classes], []
    )  # fmt: skip
    strides = [z.stride(-2) for z in snapshots] if rows > 1 else [kept]
    if stacked and m > 1:
        strides.append(snapshots[0].stride(0))
    size_kept = snapshots[0].element_size()
    pointers = [z.data_ptr() // size_kept for z in snapshots]
    kvector = alignment(kept, size_kept, pointers, [], strides).vector
    cut = cut or by_rule(classes + (vector - 1 if shifted else 0), 8 if wide else size)
    threads, whole, padded = 32 * cut.num_warps, next_power_of_2(kept), next_power_of_2(m)

    def at_most(numbers):
        return min(whole, next_power_of_2(max(1, numbers // cut.rows) + 1) // 2)

    marked = at_most(CHOSEN * threads * 32 // cut.block)
    return planned(
        sparse_rows_kernel, cut, student, snapshots, labels, scores, query, keys, temperature, alpha, logit_fusion,
        kl_objective, mean, ignore_index, loss, d_scores, d_query, K=kept, tail_stride=tail.stride(0),
        tail_row_stride=tail.stride(1), indices_stride=indices.stride(0), VECTOR=vector, SHIFTED=shifted,
        KVECTOR=kvector, KP=whole, KBLOCK=at_most(TOP * threads // ((padded + 3) * (2 if wide else 1))), MARKED=marked,
        UNROLL=whole <= UNROLLED * marked,
    )  # fmt: skip


def sparse_ensemble_kd_fwd(
    student, snapshots, tail, indices, labels, scores, query, keys, temperature, alpha, logit_fusion, kl_objective,
    mean, ignore_index, loss, attention_loss, weights, d_student, d_scores, d_query, d_keys,
):  # fmt: skip
    """Fills the outputs. An index or a label that is not a class gives NaN, for a GPU cannot raise."""
    options = temperature, alpha, logit_fusion, kl_objective, mean, ignore_index
    more = tail, indices
    outputs = loss, attention_loss, weights, d_student, d_scores, d_query, d_keys
    forward(sparse_rows_kernel, plan, student, snapshots, more, labels, scores, query, keys, options, outputs)


torch.library.define("eekd_triton::sparse_ensemble_kd_fwd", SCHEMA)
torch.library.impl("eekd_triton::sparse_ensemble_kd_fwd", ("cpu", "cuda"))(sparse_ensemble_kd_fwd)
torch.library.register_fake("eekd_triton::sparse_ensemble_kd_fwd")(lambda *args: None)
