"""The host's side of the kernels: the launch table and its rule, and the way from an op's arguments to its launches.

Over 350 lines, for the rule and the table that overrules it are read together.
"""

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

from .outputs import Call, allocate, call_of, wanted
from .rows import COUNTS, SEPARATE, counted

# A tile of R rows is held in registers as fp32: M snapshots, rounded up to a power of two, and three lines of the
# student, all by a block of columns. These limits keep every variant all but free of spills on sm_80 to sm_120,
# which tests/test_triton_aot.py asserts.
PER_THREAD = 112  # numbers of a tile, of 255 registers
ON_CHIP = 32768  # numbers of a tile that is read once and kept
STREAMED = 11264  # numbers of a tile that is read, used and dropped, by STREAMING_WARPS
STREAMING_WARPS = 4
REGISTERS = 240  # of a thread for the columns of a row that is read once
ROW = 4096  # columns of such a row, of several snapshots
STREAMED_COLUMNS = 8  # of 32 bits per thread and block of a row that is read twice
PACKED = 512  # numbers below which a program takes several rows
READ_AHEAD = 88 * 1024  # bytes of shared memory for tiles on their way; sm_120 has 99 KB
TABLES = Path(__file__).with_name("launch")
SUMMED = 2**17  # bytes that a program sums at a time, in 32 warps of 64 registers
COUNT_IN_PROGRAM = 2048  # labels that every program counts for itself, which costs less than a launch
MEAN = 1  # of the codes of `reduction`: none, mean, sum


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
def launch_for(classes: int, snapshots: int, itemsize: int, architecture: str, again: bool = False) -> Launch:
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
    held = 2 ** int(math.log2(REGISTERS / column_registers(snapshots, itemsize, True)))  # and statistics of each thread
    held = min(held, max(16 // itemsize, 2 ** int(math.log2(STREAMED_COLUMNS / words))))
    block = min(block // 2, 32 * STREAMING_WARPS * held)
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


def planned(kernel, cut: Launch, call: Call, outputs: list, **more) -> Plan:
    """The launch of `kernel` cut like this, whose arguments are `more` and those that depend on the tensors here."""
    student, snapshots, labels, scores, query, keys = call[:6]
    loss, _, _, _, d_scores, d_query, _ = outputs
    mean, stacked, m = call.reduction == MEAN, call.stacked, call.count
    rows, classes = student.shape
    row_strides = [z.stride(-2) for z in snapshots]
    attends = d_scores is not None or d_query is not None
    counts = mean and labels is not None and not call.soft  # of soft labels every row counts
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
        temperature=call.temperature,
        alpha=call.alpha,
        row_scale=1.0 / rows if mean and not counts else 1.0,
        ignore_index=call.ignore_index,
        M=m,
        STACKED=stacked,
        LOGIT=call.logit_fusion,
        BY_KL=attends and call.kl_objective,
        BY_LABEL=attends and not call.kl_objective,
        CE=labels is not None and call.alpha > 0,
        SOFT=call.soft,
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


def forward(kernel, plan, call: Call, outputs: list) -> None:
    """Fills the outputs of a call by the launch that `plan` makes of it.

    A label that is neither a class nor `ignore_index`, and an index that is no class, give NaN: a GPU cannot raise.

    One launch for the rows; one more to add up a scalar loss, in a fixed order; and one before, to count the rows of a
    mean, where there are too many for every program to count them. Each of the small launches has all its loads under
    way at once, for their latency is most of its time.
    """
    student, snapshots, labels, scores, query, keys = call[:6]
    more = () if call.indices is None else (call.tail, call.indices)
    loss, attention_loss, _, d_student, d_scores, d_query, _ = outputs
    rows = student.shape[0]
    if rows == 0:
        loss.zero_()
        attention_loss.zero_()
        return
    device = student.device
    snapshots = tuple(snapshots)
    one, stacked = snapshots[0], call.stacked
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
        None if labels is None else (labels.dtype, labels.stride()),
        None if scores is None else (scores.stride(0), scores.dtype),
        None if query is None else (query.shape[1], query.stride(0), query.dtype, *keys.stride(), keys.dtype),
        call[6:12],
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
        found = plan(call, outputs)
        if aligned:
            if len(_plans) >= KEPT:
                _plans.clear()
            _plans[key] = found
    grid = found.grid
    count = parts = None
    o_loss, o_attention_loss = loss, attention_loss
    if call.reduction == MEAN and labels is not None and not call.soft and rows > COUNT_IN_PROGRAM:
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
            counting = (labels, count, rows, call.ignore_index, 1024)
            grid_of_counts = (COUNTS.value, 1, 1)
            start(count_kernel, grid_of_counts, counting, {"num_warps": 4}, ("count", device, *counting[2:]), aligned)
        start(kernel, grid, (*tensors, *found.numbers), found.options, key, aligned)
        if reduces:
            vector = 16 // loss.itemsize
            block = max(1024, min(SUMMED // loss.itemsize, next_power_of_2(grid[0])))
            warps = max(4, block * loss.itemsize // 4096)
            sums = (parts, loss, attention_loss, grid[0], parts.stride(0), block, vector, 32 * warps)
            start(sum_kernel, (2, 1, 1), sums, {"num_warps": warps}, ("sum", device, loss.dtype, grid[0]), aligned)


def define_forward(name: str, more: str, kernel, plan) -> None:
    """The op eekd_triton::`name`, whose tensors are also `more`: allocates its outputs, and fills them."""

    def op(*args):
        call = call_of(*args)
        outputs = allocate(call)
        forward(kernel, plan, call, outputs)
        return wanted(outputs)

    schema = (
        f"(Tensor student, Tensor[] snapshots, {more}Tensor? labels, Tensor? scores, Tensor? query, Tensor? keys, "
        "float temperature, float alpha, bool logit_fusion, bool kl_objective, int reduction, int ignore_index, "
        "bool wants_student, bool wants_attention) -> Tensor[]"
    )

    torch.library.define(f"eekd_triton::{name}", schema)
    torch.library.impl(f"eekd_triton::{name}", ("cpu", "cuda"))(op)
    torch.library.register_fake(f"eekd_triton::{name}")(lambda *args: wanted(allocate(call_of(*args))))


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
