"""What the kernels share: the launch table and its rule, the way to a launch, and the parts that their rows have."""

import functools
import json
import math
from math import gcd
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

# A tile of R rows is held in registers as fp32: M snapshots, rounded up to a power of two, and three lines of the
# student, all by a block of columns. These limits keep every variant all but free of spills on sm_80 to sm_120,
# which tests/test_triton_aot.py asserts.
PER_THREAD = 112  # numbers of a tile, of 255 registers
ON_CHIP = 32768  # numbers of a tile that is read once and kept
STREAMED = 11264  # numbers of a tile that is read, used and dropped, by STREAMING_WARPS
STREAMING_WARPS = 4
SEPARATE = tl.constexpr(8)  # snapshots up to which each has a tile of its own
REGISTERS = 240  # of a thread for the columns of a row that is read once
ROW = 4096  # columns of such a row, of several snapshots
STREAMED_COLUMNS = 8  # of 32 bits per thread and block of a row that is read twice
PACKED = 512  # numbers below which a program takes several rows
READ_AHEAD = 88 * 1024  # bytes of shared memory for tiles on their way; sm_120 has 99 KB
TABLES = Path(__file__).with_name("launch")
COUNTS = tl.constexpr(32)  # programs that count labels, each some
SUMMED = 2**17  # bytes that a program sums at a time, in 32 warps of 64 registers
COUNT_IN_PROGRAM = 2048  # labels that every program counts for itself, which costs less than a launch
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on CPU tensors, for tests
PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


class Launch(NamedTuple):
    """How the rows of one shape are cut: `rows` per program, tiles of `block` columns, read once if `on_chip`.

    Tiles that are not are read ahead of their use by `num_stages` - 1. Up to `maxnreg` registers are used per thread,
    whatever that costs in occupancy; None leaves it to the compiler, which would rather spill a few.
    """

    rows: int
    block: int
    on_chip: bool
    num_warps: int
    num_stages: int
    maxnreg: int | None

    @property
    def options(self) -> dict[str, int]:
        limits = {"maxnreg": self.maxnreg} if self.maxnreg and torch.version.hip is None else {}
        return {"num_warps": self.num_warps} | limits


def bucket(classes: int, snapshots: int, itemsize: int, again: bool = False) -> str:
    """The entry of the launch table that holds this shape."""
    if snapshots > SEPARATE.value:  # up to which each number is a program of its own
        snapshots = next_power_of_2(snapshots)
    columns = f"{next_power_of_2(classes)} classes, {snapshots} snapshots, {itemsize} bytes"
    return f"{columns}, needed again" if again else columns


@functools.lru_cache
def tuned(architecture: str) -> dict[str, Launch]:
    """The frozen table of a GPU architecture, which eekd.kernels.tune measured; empty where nobody did."""
    path = TABLES / f"{architecture}.json"
    launches = json.loads(path.read_text())["launches"] if path.is_file() else {}
    return {name: Launch(**entry["launch"]) for name, entry in launches.items()}


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """What launches depend on: sm_90, gfx942; the device's type where it is not a GPU."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.lru_cache
def launch(classes: int, snapshots: int, itemsize: int, architecture: str, again: bool = False) -> Launch:
    """The launch of a shape, the same every time so that the bits are: the tuned one, or else the rule's.

    `again`: the snapshots' columns are needed again when p is known, for logit fusion or the KL objective.
    """
    found = tuned(architecture).get(bucket(classes, snapshots, itemsize, again))
    return found or by_rule(classes, snapshots, itemsize, again)


def column_registers(snapshots: int, itemsize: int, again: bool) -> float:
    """Of a thread for a column: what is kept of it in 32 bits, and the snapshots, as they are or widened too."""
    words = itemsize / 4
    return (6 + snapshots * (words + 1) if again else 5 + snapshots * words) * max(1, words)


def by_rule(classes: int, snapshots: int, itemsize: int, again: bool = False) -> Launch:
    if snapshots > SEPARATE.value:
        return by_rule_of_tiles(classes, snapshots, itemsize)
    block, words = next_power_of_2(classes), itemsize / 4
    held = 2 ** int(math.log2(REGISTERS / column_registers(snapshots, itemsize, again)))
    rows = max(1, PACKED // ((next_power_of_2(snapshots) + 3) * block)) if itemsize < 8 else 1
    rows = next_power_of_2(rows)
    warps = next_power_of_2(-(-rows * block // (32 * held)))
    if block <= ROW * (2 if snapshots == 1 else 1) and warps <= 8:
        return Launch(rows, block, True, warps, 1, None)
    block = min(block // 2, 32 * STREAMING_WARPS * max(16 // itemsize, 2 ** int(math.log2(STREAMED_COLUMNS / words))))
    while block * itemsize * (snapshots + 1) > READ_AHEAD and block > 256:
        block //= 2
    ahead = READ_AHEAD // ((snapshots + 1) * block * itemsize)
    return Launch(1, block, False, STREAMING_WARPS, min(3, 1 + ahead), 255)


def by_rule_of_tiles(classes: int, snapshots: int, itemsize: int) -> Launch:
    padded, block = next_power_of_2(snapshots), next_power_of_2(classes)
    lines = (padded + 3) * (2 if itemsize == 8 else 1)
    if lines * block <= ON_CHIP:
        rows = next_power_of_2(max(1, PACKED // (lines * block)))
        warps = next_power_of_2(-(-rows * lines * block // (32 * PER_THREAD)))
        return Launch(rows, block, True, warps, 1, None)
    while lines * block > STREAMED:
        block //= 2
    ahead = READ_AHEAD // ((padded + 1) * block * itemsize)
    return Launch(1, block, False, STREAMING_WARPS, min(3, 1 + ahead), 255)


class Alignment(NamedTuple):
    """Rows begin at multiples of `vector` elements, or, if `shifted`, all equally far beyond one."""

    vector: int
    shifted: bool


def alignment(columns: int, itemsize: int, pointers: list[int], row_strides: list[int], other_strides: list[int]):
    """How 16-byte accesses meet the rows of tensors; pointers and strides are counted in elements.

    Rows of an odd length begin anywhere, and a tile of them would be read element by element. Where all tensors are
    equally far off in each row, the tile begins at the multiple of 16 bytes before the row, and its first columns and
    last are dropped. A 16-byte piece that holds an element of the tensor lies in its page, so nothing can fault.
    """
    vector = 16 // itemsize
    common = gcd(vector, columns, *pointers, *row_strides, *other_strides)
    alike = len({stride % vector for stride in row_strides}) == 1
    if common < vector and alike and all(x % vector == 0 for x in (*pointers, *other_strides)):
        return Alignment(vector, True)
    return Alignment(common, False)


KEPT = 1024  # compiled kernels by key
_compiled = {}


def start(kernel, grid: tuple[int, int, int], arguments: tuple, options: dict, key: tuple, aligned: bool) -> None:
    """kernel[grid](*arguments, **options), past Triton's examination of every argument where the key was met before.

    The key determines all that Triton compiles for, but for the pointers: these are multiples of 16 bytes if `aligned`.
    """
    compiled = _compiled.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*arguments)
        return
    compiled = kernel[grid](*arguments, **options)  # None in the interpreter
    if aligned and compiled is not None:
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = compiled


class Plan(NamedTuple):
    """A launch over rows: its grid, what follows the tensors among its arguments, and the compiler's options."""

    grid: tuple[int, int, int]
    numbers: tuple
    options: dict


def planned(
    kernel,
    cut,
    student,
    snapshots,
    labels,
    scores,
    query,
    keys,
    temperature,
    alpha,
    logit_fusion,
    kl_objective,
    mean,
    ignore_index,
    loss,
    d_scores,
    d_query,
    **more,
) -> Plan:
    """The launch of `kernel` cut like this, whose arguments are `more` and those that depend on the tensors here."""
    rows, classes = student.shape
    stacked = snapshots[0].dim() == 3
    m = snapshots[0].shape[0] if stacked else len(snapshots)
    row_strides = [z.stride(-2) for z in snapshots]
    attends = d_scores is not None or d_query is not None
    counts = mean and labels is not None
    padded = next_power_of_2(m)
    width = 0 if query is None else query.shape[1]
    numbers = more | dict(
        B=rows,
        C=classes,
        D=width,
        student_stride=student.stride(0),
        snapshot_stride=snapshots[0].stride(0) if stacked else 0,
        snapshot_strides=row_strides[0] if stacked else tuple(row_strides),
        scores_stride=0 if scores is None else scores.stride(0),
        query_stride=0 if query is None else query.stride(0),
        key_stride=0 if keys is None else keys.stride(0),
        key_row_stride=0 if keys is None else keys.stride(1),
        temperature=temperature,
        alpha=alpha,
        row_scale=1.0 / rows if mean and not counts else 1.0,
        ignore_index=ignore_index,
        M=m,
        STACKED=stacked,
        LOGIT=logit_fusion,
        BY_KL=attends and kl_objective,
        BY_LABEL=attends and not kl_objective,
        CE=labels is not None and alpha > 0,
        SUM=loss.dim() == 0,
        COUNT_BLOCK=next_power_of_2(rows) if counts and rows <= COUNT_IN_PROGRAM else 0,
        ON_CHIP=cut.on_chip,
        STAGES=cut.num_stages,
        R=cut.rows,
        MP=padded,
        BLOCK=cut.block,
        DBLOCK=min(next_power_of_2(max(width, 1)), max(16, 1024 // padded)),
        ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32,
    )
    names = kernel.arg_names[-len(numbers) :]
    assert set(names) == numbers.keys()
    return Plan((triton.cdiv(rows, cut.rows), 1, 1), tuple(numbers[name] for name in names), cut.options)


_plans = {}  # of tensors that begin at multiples of 16 bytes


def forward(kernel, plan, student, snapshots, more, labels, scores, query, keys, options, outputs) -> None:
    """Fills the outputs of a forward, whose other inputs are `more`, by the launch that `plan` makes of its arguments.

    One launch for the rows; one more to add up a scalar loss, in a fixed order; and one before, to count the rows of a
    mean, where there are too many for every program to count them. Each of the small launches has all its loads under
    way at once, for their latency is most of its time.
    """
    loss, attention_loss, weights, d_student, d_scores, d_query, d_keys = outputs
    mean, ignore_index = options[-2:]
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
    key = (
        kernel.__name__,
        device,
        student.shape,
        student.stride(0),
        student.dtype,
        one.shape,
        one.dtype,
        one.stride() if stacked else tuple(z.stride(0) for z in snapshots),
        *((x.stride(), x.dtype) for x in more),
        labels is None,
        None if scores is None else (scores.stride(0), scores.dtype),
        None if query is None else (query.shape[1], query.stride(0), query.dtype, *keys.stride(), keys.dtype),
        options,
        reduces,
        d_student is None,
        d_scores is None,
        d_query is None,
    )
    pointers = 0
    for x in (student, *snapshots, *more, labels, scores, query, keys, *outputs):
        if x is not None:
            pointers |= x.data_ptr()
    aligned = pointers % 16 == 0
    found = _plans.get(key) if aligned else None
    if found is None:
        found = plan(
            student, snapshots, *more, labels, scores, query, keys, *options, loss, d_student, d_scores, d_query
        )
        if aligned:
            if len(_plans) >= KEPT:
                _plans.clear()
            _plans[key] = found
    grid = found.grid
    count = parts = None
    o_loss, o_attention_loss = loss, attention_loss
    if mean and labels is not None and rows > COUNT_IN_PROGRAM:
        count = student.new_empty(COUNTS.value, dtype=torch.int32)
    if reduces:
        parts = loss.new_empty((2, -(-grid[0] // 4) * 4))  # both rows at multiples of 16 bytes
        o_loss, o_attention_loss = parts.unbind()
    tensors = (
        student,
        one if stacked else snapshots,
        *more,
        labels,
        scores,
        query,
        keys,
        count,
        o_loss,
        o_attention_loss,
        *outputs[2:],
    )
    with torch.cuda.device_of(student):
        if count is not None:
            counting = (labels, count, rows, ignore_index, 1024)
            grid_of_counts = (COUNTS.value, 1, 1)
            start(count_kernel, grid_of_counts, counting, {"num_warps": 4}, ("count", device, *counting[2:]), aligned)
        start(kernel, grid, (*tensors, *found.numbers), found.options, key, aligned)
        if reduces:
            vector = 16 // loss.itemsize
            block = max(1024, min(SUMMED // loss.itemsize, next_power_of_2(grid[0])))
            warps = max(4, block * loss.itemsize // 4096)
            sums = (parts, loss, attention_loss, grid[0], parts.stride(0), block, vector, 32 * warps)
            start(sum_kernel, (2, 1, 1), sums, {"num_warps": warps}, ("sum", device, loss.dtype, grid[0]), aligned)


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
def _mix(z, w, used):
    """Σ_m w_m z_m (R, N); what is not used was not read."""
    return tl.sum(tl.where(used[:, :, None], w[:, :, None] * z, 0.0), 1)


@triton.jit
def absorb_targets(top, total, z, w, used, k, LOGIT: tl.constexpr):
    """Takes columns of z (R, M, N) into softmax statistics (R, M), or for LOGIT those of their mixture (R)."""
    if LOGIT:
        top, total = absorb(top, total, _mix(z, w, used), k, 1)
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
        t = _mix(z, w, used)
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
    LOGIT: tl.constexpr,
    BY_KL: tl.constexpr,
    SUM: tl.constexpr,
    DBLOCK: tl.constexpr,
    ACC,
):
    """What is O(M) per row, of the sums of its columns and of the snapshots' logits z_y (R, M) at its label."""
    inverse_tau = 1.0 / tau
    kl = kl * LN2  # the sums are of log2
    moved = moved * LN2
    loss = tl.where(beta == 0, 0.0, beta * tau * tau * kl) + ce * ce_loss
    attention_loss = tl.zeros_like(kl)
    de = tl.zeros_like(w)
    if LABELS:
        if LOGIT:
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


@triton.jit
def count_kernel(labels, o_counts, B, ignore_index, BLOCK: tl.constexpr):
    """Each program's count of its labels; what is to be divided by is the sum of these."""
    begin = tl.program_id(0) * BLOCK
    tl.store(o_counts + tl.program_id(0), counted(labels, B, ignore_index, begin, COUNTS * BLOCK, BLOCK))


@triton.jit
def sum_kernel(parts, o_first, o_second, n, stride, BLOCK: tl.constexpr, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """The sums of the two rows of parts (2, n), by a program each and in one fixed order."""
    row = parts + tl.program_id(0) * stride // VECTOR * VECTOR
    read = (n + VECTOR - 1) // VECTOR * VECTOR  # whole vectors, which `stride` has
    total = tl.zeros([THREADS], parts.dtype.element_ty)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.where(at < n, tl.load(row + at, mask=at < read, other=0.0), 0.0)
        total += tl.sum(tl.sum(tl.reshape(x, (BLOCK // (THREADS * VECTOR), THREADS, VECTOR)), 2), 0)
    if tl.program_id(0) == 0:
        tl.store(o_first, tl.sum(total, 0))
    else:
        tl.store(o_second, tl.sum(total, 0))
