"""The columns of a row with a tile for each snapshot: what is summed over them, and the student's gradient.

Unlike a tile of all snapshots it pads nothing, keeps one line of targets in 32 bits, and needs the snapshots one after
the other. A long row's sums are of groups of columns that one thread holds, and are added up once.

Over 350 lines, for they are the parts of one computation, which Triton compiles into each kernel.
"""

import triton
import triton.language as tl

from .rows import LOG2E, PTX, finite, inverse, log2, powers, read_target, scaled, write_columns

LEAST = tl.constexpr(1.2e-38)  # of the probabilities that have a logarithm on a GPU


@triton.jit
def element(v, m, j: tl.constexpr):
    """The element j of v (R, M); of one row as what prescribes no layout to a tile."""
    out = tl.sum(tl.where((m == j)[None, :], v, 0.0), 1)
    if v.shape[0] == 1:
        out = tl.zeros([1], v.dtype) + tl.sum(out, 0)
    return out


@triton.jit
def _with(v, m, j: tl.constexpr, x):
    """v (R, M) with x (R) for its element j."""
    return tl.where((m == j)[None, :], x[:, None], v)


@triton.jit
def _elements(v, m, M: tl.constexpr):
    out = ()
    for j in tl.static_range(M):
        out = out + (element(v, m, j),)
    return out


@triton.jit
def _times(x, M: tl.constexpr):
    out = ()
    for _ in tl.static_range(M):
        out = out + (x,)
    return out


@triton.jit
def _lines(
    snapshots,
    w,
    row,
    i,
    read,
    snapshot_stride,
    snapshot_strides,
    M: tl.constexpr,
    STACKED: tl.constexpr,
    VECTOR: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The columns i of each snapshot with a weight, as they are in memory; elsewhere 0, which needs no selection."""
    z = ()
    for j in tl.static_range(M):
        if STACKED:
            begin = snapshots + tl.full([], j, tl.int64) * snapshot_stride // VECTOR * VECTOR
            stride = snapshot_strides
        else:
            begin = snapshots[j]
            stride = snapshot_strides[j]
        at = begin + row * stride // VECTOR * VECTOR
        mask = (w[j] != 0)[:, None]
        if not INSIDE:
            mask = mask & read
        z = z + (tl.load(at[:, None] + i[None, :], mask=mask, other=0.0),)
    return z


@triton.jit
def _widened(x, ACC: tl.constexpr):
    """x in ACC; two bf16 in two instructions, where the compiler takes three."""
    if PTX and x.dtype == tl.bfloat16 and tl.float32 == ACC and x.numel >= 256:
        out = tl.inline_asm_elementwise(
            "{.reg .b32 a, b; shl.b32 a, $2, 16; and.b32 b, $2, 0xffff0000; mov.b32 $0, a; mov.b32 $1, b;}",
            "=f,=f,r",
            [x],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        out = x.to(ACC)
    return out


@triton.jit
def _line(z, classes, INSIDE: tl.constexpr, ACC: tl.constexpr):
    x = z if z.dtype == ACC else _widened(z, ACC)
    if not INSIDE:
        x = tl.where(classes, x, float("-inf"))
    return x


@triton.jit
def _mixed(z, w, classes, M: tl.constexpr, INSIDE: tl.constexpr, ACC: tl.constexpr):
    t = w[0][:, None] * _widened(z[0], ACC)
    for j in tl.static_range(1, M):
        t += w[j][:, None] * _widened(z[j], ACC)
    return _line(t, classes, INSIDE, ACC)


@triton.jit
def _read(
    student,
    snapshots,
    w,
    i,
    row,
    student_stride,
    snapshot_stride,
    snapshot_strides,
    shift,
    bound,
    keep,
    C,
    M: tl.constexpr,
    STACKED: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    INSIDE: tl.constexpr,
    ACC,
):
    """The columns i of the student (R, N), of the snapshots as they are in memory, and which are classes.

    All are if INSIDE; else whole vectors are read, so that the mask leaves the loads wide.
    """
    read = i[None, :] < bound[:, None]
    classes = read
    mask = keep[:, None]
    if not INSIDE:
        mask = mask & read
        if SHIFTED:
            classes = (i[None, :] >= shift[:, None]) & (i[None, :] < shift[:, None] + C)
    begin = student + row * student_stride // VECTOR * VECTOR
    s = _line(tl.load(begin[:, None] + i[None, :], mask=mask, other=0.0), classes, INSIDE, ACC)
    z = _lines(snapshots, w, row, i, read, snapshot_stride, snapshot_strides, M, STACKED, VECTOR, INSIDE)
    return s, z, classes


@triton.jit
def _grouped(x, V: tl.constexpr, T: tl.constexpr):
    """x (R, N) as (R, N / TV, T, V): a thread of T has V columns next to each other, and again T V further."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // (T * V), T, V))


@triton.jit
def _sum(x, V: tl.constexpr, T: tl.constexpr):
    return tl.sum(tl.sum(_grouped(x, V, T), 3), 1)


@triton.jit
def _absorb(top, total, x, k, V: tl.constexpr, T: tl.constexpr):
    """As kernels.rows.absorb, for the T groups of columns x (R, N)."""
    x = _grouped(x, V, T)
    new = tl.maximum(top, tl.max(tl.max(x, 3), 1) * k)
    each = tl.exp2(scaled(x, new[:, None, :, None], k))
    return new, total * tl.exp2(top - finite(new)) + tl.sum(tl.sum(each, 3), 1)


@triton.jit
def _total(top, total):
    """Softmax statistics of a row of those of its groups (1, T), as (1), which do not prescribe a tile's layout."""
    nil = tl.zeros([1], top.dtype)
    largest = tl.max(tl.max(top, 1), 0)
    return nil + largest, nil + tl.sum(tl.sum(total * tl.exp2(top - finite(largest)), 1), 0)


@triton.jit
def _statistics(
    s,
    z,
    classes,
    w,
    k,
    s_top,
    soft_sum,
    hard_top,
    hard_sum,
    z_tops,
    z_sums,
    t_top,
    t_sum,
    V: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    INSIDE: tl.constexpr,
    ACC,
):
    """Takes columns into the groups' softmax statistics of the student, at τ and at 1, and of the targets."""
    s_top, soft_sum = _absorb(s_top, soft_sum, s, k, V, T)
    if CE:
        hard_top, hard_sum = _absorb(hard_top, hard_sum, s, LOG2E, V, T)
    if LOGIT:
        t_top, t_sum = _absorb(t_top, t_sum, _mixed(z, w, classes, M, INSIDE, ACC), k, V, T)
    else:
        tops = ()
        sums = ()
        for j in tl.static_range(M):
            top, total = _absorb(z_tops[j], z_sums[j], _line(z[j], classes, INSIDE, ACC), k, V, T)
            tops = tops + (top,)
            sums = sums + (total,)
        z_tops = tops
        z_sums = sums
    return s_top, soft_sum, hard_top, hard_sum, z_tops, z_sums, t_top, t_sum


@triton.jit
def _visit(
    s,
    z,
    p,
    t,
    classes,
    target,
    label_sum,
    w,
    k,
    kd,
    ce,
    s_top,
    soft_sum,
    hard_top,
    hard_sum,
    z_tops,
    z_sums,
    t_top,
    t_sum,
    V: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    SOFT: tl.constexpr,
    MEANS: tl.constexpr,
    MOVED: tl.constexpr,
    INSIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What kernels.rows.visit sums over columns, of each column, and d loss / d s; all (R, N).

    For SOFT also what `_follow` sums; else nothing.
    """
    a = scaled(s, s_top[:, None], k)
    if LOGIT:
        b = scaled(t, t_top[:, None], k)
        p = tl.exp2(b) * inverse(t_sum)[:, None]
        r = (b - a) - (log2(t_sum) - log2(soft_sum))[:, None]
    else:
        r = log2(p) - (a - log2(soft_sum)[:, None])
    r = tl.where(p > LEAST, r, 0.0)
    moment = p * r
    kl = _sum(moment, V, T)
    means = ()
    moved = ()
    for j in tl.static_range(M):
        if LOGIT and MEANS:
            x = tl.where(p > LEAST, _widened(z[j], ACC), 0.0)
            means = means + (_sum(p * x, V, T),)
            if MOVED:
                moved = moved + (_sum(moment * x, V, T),)
        if MOVED and not LOGIT:
            # Half of what it was before: another number, or the compiler would keep all lines in 32 bits for it.
            half = powers(_line(z[j], classes, INSIDE, ACC), finite(z_tops[j]) + 1.0, k, 1)
            moved = moved + (_sum(half * r, V, T),)
    d = tl.exp2(a) * (kd * inverse(soft_sum))[:, None] - p * kd[:, None]
    if CE:
        if SOFT:
            d += powers(s, hard_top, LOG2E, 1) * (ce * label_sum * inverse(hard_sum))[:, None]
            d -= ce[:, None] * target
        else:
            d += powers(s, hard_top, LOG2E, 1) * (ce * inverse(hard_sum))[:, None]
            d = tl.where(target, d - ce[:, None], d)
    followed = ()
    if SOFT:
        followed = _follow(
            s, z, t, classes, target, w, k, hard_top, z_tops, z_sums, t_top, V, T, M, LOGIT, CE, MEANS and not MOVED,
            INSIDE, ACC,
        )  # fmt: skip
    return kl, means, moved, d, followed


@triton.jit
def _follow(
    s,
    z,
    t,
    classes,
    target,
    w,
    k,
    hard_top,
    z_tops,
    z_sums,
    t_top,
    V: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    LOGIT: tl.constexpr,
    CE: tl.constexpr,
    SHARES: tl.constexpr,
    INSIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What soft labels y add up over columns: kernels.rows.follow has the sums, here in a tuple."""
    given = target != 0
    log_q = tl.zeros_like(s)
    if CE:
        log_q = tl.where(given, target * scaled(s, hard_top[:, None], LOG2E), 0.0)
    followed = (_sum(log_q, V, T),)
    if LOGIT:
        followed = followed + (_sum(tl.where(given, target * scaled(t, t_top[:, None], k), 0.0), V, T),)
        for j in tl.static_range(M if SHARES else 0):
            followed = followed + (_sum(tl.where(given, target * _widened(z[j], ACC), 0.0), V, T),)
    else:
        lines = ()
        most = tl.full(s.shape, float("-inf"), ACC)
        for j in tl.static_range(M):  # log2 of w_m p_m, of which p may be too small to be a number
            line = scaled(_line(z[j], classes, INSIDE, ACC), z_tops[j][:, None], k)
            lines = lines + (line + log2(w[j] * inverse(z_sums[j]))[:, None],)
            most = tl.maximum(most, lines[j])
        shares = ()
        total = tl.zeros_like(s)
        for j in tl.static_range(M):
            shares = shares + (tl.exp2(lines[j] - finite(most)),)
            total += shares[j]
        log_p = most + log2(total)
        followed = followed + (_sum(tl.where(given, target * log_p, 0.0), V, T),)
        given = given & (log_p != float("-inf"))
        ratio = target * inverse(total)
        for j in tl.static_range(M if SHARES else 0):
            moved = target * w[j][:, None] - ratio * shares[j]
            followed = followed + (_sum(tl.where(given, moved, 0.0), V, T),)
    return followed


@triton.jit
def _mix(z, p, shares, tops, classes, k, M: tl.constexpr, INSIDE: tl.constexpr, ACC: tl.constexpr):
    """The probabilities of the targets, where the snapshots' statistics are known."""
    for j in tl.static_range(M):
        p += shares[j][:, None] * powers(_line(z[j], classes, INSIDE, ACC), tops[j], k, 1)
    return p


@triton.jit
def columns(
    student,
    snapshots,
    labels,
    o_d_student,
    row,
    m,
    y,
    valid,
    w_all,
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
    M: tl.constexpr,
    STACKED: tl.constexpr,
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
    V: tl.constexpr,
    T: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums kl (R), means and moved (R, M) of kernels.rows.visit; hard_top, hard_sum; z_top, z_sum of finish.

    For SOFT also the sum of the labels (R) and what kernels.rows.follow sums; else zeros.
    """
    w = _elements(w_all, m, M)
    i = tl.arange(0, BLOCK)
    y = tl.where(valid, y + shift, -1).to(tl.int32)
    FOLLOWED: tl.constexpr = (M + 2 if MEANS and not MOVED else 2) if SOFT else 0
    R: tl.constexpr = row.shape[0]
    nothing = tl.full([R], float("-inf"), ACC)
    zero = tl.zeros([R], ACC)
    zeros = tl.zeros([R, T], ACC)
    tops = _times(nothing, M)
    sums = _times(zero, M)
    t_top = nothing
    t_sum = zero
    nil = tl.zeros([R, BLOCK], ACC)
    label_sum = zero

    if ON_CHIP:
        s, z, classes = _read(
            student,
            snapshots,
            w,
            i,
            row,
            student_stride,
            snapshot_stride,
            snapshot_strides,
            shift,
            bound,
            keep,
            C,
            M,
            STACKED,
            VECTOR,
            SHIFTED,
            False,
            ACC,
        )
        if SOFT:
            target = read_target(labels, y, row, 0, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
            label_sum = tl.sum(target, 1)
        largest = tl.max(s, 1)
        s_top = largest * k
        hard_top = largest * LOG2E
        soft_sum = tl.sum(powers(s, s_top, k, 1), 1)
        hard_sum = zero
        if CE:
            hard_sum = tl.sum(powers(s, hard_top, LOG2E, 1), 1)
        p = nil
        t = nil
        if LOGIT:
            t = _mixed(z, w, classes, M, False, ACC)
            t_top = tl.max(t, 1) * k
            t_sum = tl.sum(powers(t, t_top, k, 1), 1)
        else:
            tops = ()
            sums = ()
            for j in tl.static_range(M):
                x = _line(z[j], classes, False, ACC)
                top = tl.max(x, 1) * k
                each = powers(x, top, k, 1)
                total = tl.sum(each, 1)
                p += tl.where(w[j] != 0, w[j] * inverse(total), 0.0)[:, None] * each
                tops = tops + (top,)
                sums = sums + (total,)
        if not SOFT:  # later than that of soft labels, for the registers
            target = i[None, :] == y[:, None]
        kl, means, moved, d, followed = _visit(
            s,
            z,
            p,
            t,
            classes,
            target,
            label_sum,
            w,
            k,
            d_kl,
            d_ce,
            s_top,
            soft_sum,
            hard_top,
            hard_sum,
            tops,
            sums,
            t_top,
            t_sum,
            V,
            T,
            M,
            LOGIT,
            CE,
            SOFT,
            MEANS,
            MOVED,
            False,
            ACC,
        )
        if o_d_student is not None:
            write_columns(o_d_student, d, row, i, shift, classes, inside, C, VECTOR, SHIFTED, False)
    else:
        # Blocks of nothing but classes need no selection of them. The others are the last, and the first if SHIFTED.
        whole = C // BLOCK * BLOCK
        begin = BLOCK if SHIFTED else 0
        edges = 1 + (whole < C).to(tl.int32)
        if SHIFTED:
            edges = 2
        nothings = tl.full([R, T], float("-inf"), ACC)
        s_top = nothings
        soft_sum = zeros
        hard_top = nothings
        hard_sum = zeros
        t_tops = nothings
        t_sums = zeros
        z_tops = _times(nothings, M)
        z_sums = _times(zeros, M)
        label_sums = zeros
        for first in tl.range(begin, whole, BLOCK, num_stages=STAGES):
            s, z, classes = _read(
                student,
                snapshots,
                w,
                first + i,
                row,
                student_stride,
                snapshot_stride,
                snapshot_strides,
                shift,
                bound,
                keep,
                C,
                M,
                STACKED,
                VECTOR,
                SHIFTED,
                True,
                ACC,
            )
            if SOFT:
                y_c = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, True, SOFT, ACC)
                label_sums += _sum(y_c, V, T)
            s_top, soft_sum, hard_top, hard_sum, z_tops, z_sums, t_tops, t_sums = _statistics(
                s,
                z,
                classes,
                w,
                k,
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                z_tops,
                z_sums,
                t_tops,
                t_sums,
                V,
                T,
                M,
                LOGIT,
                CE,
                True,
                ACC,
            )
        for edge in range(1 - (begin > 0), edges):
            first = edge * whole
            s, z, classes = _read(
                student,
                snapshots,
                w,
                first + i,
                row,
                student_stride,
                snapshot_stride,
                snapshot_strides,
                shift,
                bound,
                keep,
                C,
                M,
                STACKED,
                VECTOR,
                SHIFTED,
                False,
                ACC,
            )
            if SOFT:
                y_c = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
                label_sums += _sum(y_c, V, T)
            s_top, soft_sum, hard_top, hard_sum, z_tops, z_sums, t_tops, t_sums = _statistics(
                s,
                z,
                classes,
                w,
                k,
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                z_tops,
                z_sums,
                t_tops,
                t_sums,
                V,
                T,
                M,
                LOGIT,
                CE,
                False,
                ACC,
            )
        if SOFT:
            label_sum += tl.sum(tl.sum(label_sums, 1), 0)
        s_top, soft_sum = _total(s_top, soft_sum)
        hard_top, hard_sum = _total(hard_top, hard_sum)
        shares = _times(zero, M)
        if LOGIT:
            t_top, t_sum = _total(t_tops, t_sums)
        else:
            tops = ()
            sums = ()
            shares = ()
            for j in tl.static_range(M):
                top, total = _total(z_tops[j], z_sums[j])
                tops = tops + (top,)
                sums = sums + (total,)
                shares = shares + (tl.where(w[j] != 0, w[j] * inverse(total), 0.0),)
        kl = zeros
        means = _times(zeros, M if LOGIT and MEANS else 0)
        moved = _times(zeros, M if MOVED else 0)
        followed = _times(zeros, FOLLOWED)
        for first in tl.range(begin, whole, BLOCK, num_stages=STAGES):
            s, z, classes = _read(
                student,
                snapshots,
                w,
                first + i,
                row,
                student_stride,
                snapshot_stride,
                snapshot_strides,
                shift,
                bound,
                keep,
                C,
                M,
                STACKED,
                VECTOR,
                SHIFTED,
                True,
                ACC,
            )
            p = nil
            t = nil
            if LOGIT:
                t = _mixed(z, w, classes, M, True, ACC)
            else:
                p = _mix(z, p, shares, tops, classes, k, M, True, ACC)
            target = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, True, SOFT, ACC)
            more_kl, more_means, more_moved, d, more = _visit(
                s,
                z,
                p,
                t,
                classes,
                target,
                label_sum,
                w,
                k,
                d_kl,
                d_ce,
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                tops,
                sums,
                t_top,
                t_sum,
                V,
                T,
                M,
                LOGIT,
                CE,
                SOFT,
                MEANS,
                MOVED,
                True,
                ACC,
            )
            kl += more_kl
            means = _plus(means, more_means, M if LOGIT and MEANS else 0)
            moved = _plus(moved, more_moved, M if MOVED else 0)
            followed = _plus(followed, more, FOLLOWED)
            if o_d_student is not None:
                write_columns(o_d_student, d, row, first + i, shift, classes, inside, C, VECTOR, SHIFTED, True)
        for edge in range(1 - (begin > 0), edges):
            first = edge * whole
            s, z, classes = _read(
                student,
                snapshots,
                w,
                first + i,
                row,
                student_stride,
                snapshot_stride,
                snapshot_strides,
                shift,
                bound,
                keep,
                C,
                M,
                STACKED,
                VECTOR,
                SHIFTED,
                False,
                ACC,
            )
            p = nil
            t = nil
            if LOGIT:
                t = _mixed(z, w, classes, M, False, ACC)
            else:
                p = _mix(z, p, shares, tops, classes, k, M, False, ACC)
            target = read_target(labels, y, row, first, i, classes, inside, label_stride, VECTOR, False, SOFT, ACC)
            more_kl, more_means, more_moved, d, more = _visit(
                s,
                z,
                p,
                t,
                classes,
                target,
                label_sum,
                w,
                k,
                d_kl,
                d_ce,
                s_top,
                soft_sum,
                hard_top,
                hard_sum,
                tops,
                sums,
                t_top,
                t_sum,
                V,
                T,
                M,
                LOGIT,
                CE,
                SOFT,
                MEANS,
                MOVED,
                False,
                ACC,
            )
            kl += more_kl
            means = _plus(means, more_means, M if LOGIT and MEANS else 0)
            moved = _plus(moved, more_moved, M if MOVED else 0)
            followed = _plus(followed, more, FOLLOWED)
            if o_d_student is not None:
                write_columns(o_d_student, d, row, first + i, shift, classes, inside, C, VECTOR, SHIFTED, False)
    all_means = tl.zeros_like(w_all)
    all_moved = tl.zeros_like(w_all)
    shares = tl.zeros_like(w_all)
    log_q = zero
    log_p = zero
    if SOFT:
        log_q = tl.sum(followed[0], 1)
        log_p = tl.sum(followed[1], 1)
        for j in tl.static_range(FOLLOWED - 2):
            shares = _with(shares, m, j, tl.sum(followed[2 + j], 1))
    z_top = t_top
    z_sum = t_sum
    if not LOGIT:
        z_top = tl.full(w_all.shape, float("-inf"), ACC)
        z_sum = tl.zeros_like(w_all)
    for j in tl.static_range(M):
        if LOGIT and MEANS:
            all_means = _with(all_means, m, j, tl.sum(means[j], 1))
            if MOVED:
                all_moved = _with(all_moved, m, j, tl.sum(moved[j], 1))
        if not LOGIT:
            z_top = _with(z_top, m, j, tops[j])
            z_sum = _with(z_sum, m, j, sums[j])
            if MOVED:
                share = tl.where(w[j] != 0, 2.0 * inverse(sums[j]), 0.0)
                all_moved = _with(all_moved, m, j, share * tl.sum(moved[j], 1))
    kl = tl.sum(kl, 1)
    return kl, all_means, all_moved, hard_top, hard_sum, z_top, z_sum, label_sum, log_q, log_p, shares


@triton.jit
def _plus(a, b, M: tl.constexpr):
    out = ()
    for j in tl.static_range(M):
        out = out + (a[j] + b[j],)
    return out
