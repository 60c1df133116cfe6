"""The CUDA kernels without a GPU: their sources as C++, threads as fibers (cuda_on_cpu/), under the ops' own suites.

Not seen here: races that the order of the fibers hides, the PTX of csrc/cuda/ptx.cuh, and speed.
"""

import ctypes
import itertools
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import READINGS, SIZES, kd, kept, readings, sizes, tensors
from numerics import assert_same_bits, check, evaluate, exact
from test_ensemble_kd import (  # noqa: F401  these run here once more
    test_a_label_of_no_probability_in_fp32,
    test_a_label_on_a_masked_column,
    test_a_row_of_nothing_but_masked_has_no_softmax,
    test_columns_masked_in_some_snapshots,
    test_equals_the_formulas_of_the_method,
    test_every_embedding_width,
    test_half_precision_is_fp32_arithmetic_rounded_once,
    test_logits_of_ten_thousand,
    test_padded_vocabulary,
    test_rows_that_rise_or_fall_far_from_their_start,
    test_scores_far_apart,
    test_student_and_snapshots_of_different_dtypes,
    test_temperature_and_alpha,
)
from test_ensemble_kd_gradients import test_upstream_gradients_scale  # noqa: F401  and these
from test_ensemble_kd_memory import (  # noqa: F401  and these
    test_a_nan_in_the_attention_is_never_a_finite_loss,
    test_a_nan_that_is_read_is_never_a_finite_loss,
    test_any_integer_may_be_the_ignored_label,
    test_any_layout_gives_the_same_bits,
    test_ignored_rows_count_for_nothing_and_are_not_read,
    test_offsets_beyond_32_bits,
    test_snapshots_of_no_weight_are_not_read,
)
from test_ensemble_kd_properties import test_any_call_is_accurate  # noqa: F401  and these
from test_soft_labels import (  # noqa: F401  and these
    test_a_nan_among_soft_labels_is_never_a_finite_loss,
    test_a_one_hot_row_is_its_hard_label,
    test_a_row_of_no_label_is_a_row,
    test_alpha_of_one_is_the_cross_entropy_of_torch,
    test_any_layout_of_soft_labels,
    test_equals_the_formulas_of_soft_labels,
    test_padded_vocabulary_of_soft_labels,
    test_soft_labels_do_not_read_snapshots_of_no_weight,
    test_soft_labels_of_every_dtype,
    test_soft_labels_of_logits_of_ten_thousand,
    test_soft_labels_of_no_probability_in_fp32,
    test_temperature_and_alpha_of_soft_labels,
    test_upstream_gradients_of_soft_labels,
    test_weight_on_a_masked_column,
)
from test_sparse_ensemble_kd import (  # noqa: F401  and these
    test_a_label_outside_counts_as_the_bucket,
    test_a_nan_inside_or_outside_is_never_a_finite_loss,
    test_a_tail_of_either_dtype,
    test_a_tail_of_no_probability_has_a_logarithm,
    test_a_tail_that_only_some_snapshots_or_the_student_have,
    test_all_classes_in_any_order_are_ensemble_kd,
    test_equals_the_columns_of_the_contract,
    test_nothing_but_masked_outside,
    test_padded_vocabulary_inside_and_outside,
)

from eekd.kernels.outputs import Call, allocate, call_of, wanted
from eekd.ops.checks import DTYPES, MAX_SNAPSHOTS

HERE = Path(__file__).parent / "cuda_on_cpu"
SOURCES = sorted((HERE.parents[2] / "csrc" / "cuda").glob("*.cu"))
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
COMPILE = [
    COMPILER,
    "-std=c++20",
    "-U_FORTIFY_SOURCE",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-include",
    HERE / "cuda_runtime.h",
]

pytestmark = pytest.mark.full

if not COMPILER:
    pytest.skip("no C++ compiler", allow_module_level=True)


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int)]


class Arguments(ctypes.Structure):
    """csrc/eekd.h's EnsembleKD."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "snapshots", "classes", "width")),
        ("student", Matrix),
        ("snapshot", Matrix * MAX_SNAPSHOTS),
        ("labels", ctypes.c_void_p),
        ("label_weights", Matrix),
        ("scores", Matrix),
        ("query", Matrix),
        ("keys", Matrix * MAX_SNAPSHOTS),
        ("temperature", ctypes.c_double),
        ("alpha", ctypes.c_double),
        ("fusion", ctypes.c_int),
        ("objective", ctypes.c_int),
        ("ignore_index", ctypes.c_int64),
        ("row_scale", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in ("loss", "attention_loss", "weights", "d_student", "d_scores", "d_query", "d_keys")
        ),
    ]


class SparseArguments(ctypes.Structure):
    """csrc/eekd.h's SparseEnsembleKD."""

    _fields_ = [
        ("kd", Arguments), ("k", ctypes.c_int64), ("tail", ctypes.c_void_p), ("tail_stride", ctypes.c_int64 * 2),
        ("indices", ctypes.c_void_p), ("indices_stride", ctypes.c_int64),
    ]  # fmt: skip


class Scaled(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("numel", ctypes.c_int64), ("factor", ctypes.c_void_p), ("stride", ctypes.c_int64),
    ]  # fmt: skip


class Scale(ctypes.Structure):
    _fields_ = [
        ("grad", Scaled * 4), ("count", ctypes.c_int), ("wide", ctypes.c_bool), ("divisor", ctypes.c_void_p),
    ]  # fmt: skip


def matrix(x: torch.Tensor | None) -> Matrix:
    return Matrix() if x is None else Matrix(x.data_ptr(), x.stride(0), DTYPES.index(x.dtype))


def guarded(x: torch.Tensor, edge: str) -> torch.Tensor:
    """A copy whose end, or else its beginning, lies at a page that ends the process if it is touched."""
    page, size = mmap.PAGESIZE, x.element_size()
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    pages = -(-max(span, 1) * size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for at in (0, pages + page):
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.data_ptr() + at), page, 0)
    first = page if edge == "begin" else page + pages - span * size
    return whole[first : first + span * size].view(x.dtype).as_strided(x.shape, x.stride()).copy_(x)


class Emulator:
    """The library, with the op as csrc/bindings.cpp calls it."""

    edge = None  # of the tensors, at which memory is guarded

    def __init__(self, folder: Path):
        path = folder / "cuda_on_cpu.so"
        options = ["-O2", "-shared", "-Werror", "-o", path, "-x", "c++"]
        subprocess.run([*COMPILE, *options, HERE / "emulator.cpp", *SOURCES], check=True)
        self.load(path)

    def load(self, path: Path):
        self.library = ctypes.PyDLL(str(path))  # which holds the lock of the interpreter: one launch at a time
        for launcher in ("ensemble_kd_fwd", "sparse_ensemble_kd_fwd", "ensemble_kd_bwd"):
            getattr(self.library, launcher).restype = ctypes.c_char_p
        assert self.library.size_of_arguments() == ctypes.sizeof(Arguments)
        assert self.library.size_of_sparse_arguments() == ctypes.sizeof(SparseArguments)
        assert self.library.size_of_scale() == ctypes.sizeof(Scale)

    def launches(self) -> list[int]:
        """The launches since the last call, by the blocks in each cluster."""
        ranks = (ctypes.c_uint * 8)()
        return list(ranks[: self.library.launches(ranks, len(ranks))])

    def choose(self, name: str):
        facts = (list(DEVICES).index(name), *DEVICES[name])
        self.library.emulate(ctypes.byref((ctypes.c_int * len(facts))(*facts)))

    def ensemble_kd_fwd(self, *args):
        call = call_of(*args)
        outputs = allocate(call)
        self._forward(call, outputs)
        return wanted(outputs)

    sparse_ensemble_kd_fwd = ensemble_kd_fwd

    def _forward(self, call: Call, outputs: list):
        if not self.edge:
            return self._launch(call, outputs)
        copies = []

        def move(x):
            if isinstance(x, (list, tuple)):  # snapshots
                return [move(z) for z in x]
            if not isinstance(x, torch.Tensor):
                return x
            copies.append((x, guarded(x, self.edge)))
            return copies[-1][1]

        self._launch(Call(*map(move, call)), move(outputs))
        for x, copy in copies:
            x.copy_(copy)

    def _launch(self, call: Call, outputs: list):
        student, snapshots, labels, scores, query, keys = call[:6]
        loss, attention_loss, weights, d_student, d_scores, d_query, d_keys = outputs
        snapshots = snapshots[0] if call.stacked else snapshots
        rows, classes = student.shape
        hard, soft = (None, labels) if call.soft else (labels, None)
        pointers = {
            "labels": hard, "weights": weights, "d_student": d_student, "d_scores": d_scores, "d_query": d_query,
            "d_keys": d_keys,
        }  # fmt: skip
        per_row = loss.new_full((2, max(rows, 1)), torch.nan) if loss.dim() == 0 else torch.stack((loss, loss))
        args = Arguments(
            rows=rows,
            snapshots=len(snapshots),
            classes=classes,
            width=0 if query is None else query.shape[1],
            student=matrix(student),
            label_weights=matrix(soft),
            scores=matrix(scores),
            query=matrix(query),
            temperature=call.temperature,
            alpha=call.alpha,
            fusion=call.logit_fusion,
            objective=call.kl_objective,
            ignore_index=call.ignore_index,
            row_scale=1 / max(rows, 1) if call.reduction == 1 else 1,
            loss=per_row[0].data_ptr(),
            attention_loss=per_row[1].data_ptr(),
            **{name: value.data_ptr() for name, value in pointers.items() if value is not None},
        )
        for m, z in enumerate(snapshots):
            args.snapshot[m] = matrix(z)
            if keys is not None:
                args.keys[m] = matrix(keys[m])
        launcher = self.library.ensemble_kd_fwd
        if call.indices is not None:
            launcher = self.library.sparse_ensemble_kd_fwd
            args = SparseArguments(
                kd=args,
                k=call.indices.shape[1],
                tail=call.tail.data_ptr(),
                tail_stride=call.tail.stride(),
                indices=call.indices.data_ptr(),
                indices_stride=call.indices.stride(0),
            )
        scalars = (loss.data_ptr(), attention_loss.data_ptr()) if loss.dim() == 0 else (None, None)
        error = launcher(
            ctypes.byref(args),
            loss.dtype == torch.float64,
            call.reduction == 1,
            *map(ctypes.c_void_p, scalars),
            (ctypes.c_int * 32)(*[-1] * 32),
        )
        if error:
            raise RuntimeError(error.decode())
        if loss.dim():
            loss.copy_(per_row[0]), attention_loss.copy_(per_row[1])

    def ensemble_kd_bwd(self, grads: list[tuple[torch.Tensor, torch.Tensor]], divisor: int | None):
        args = Scale(count=len(grads), wide=grads[0][1].dtype == torch.float64)
        for i, (x, factor) in enumerate(grads):
            stride = factor.stride(0) if factor.dim() else 0
            args.grad[i] = Scaled(
                x.data_ptr(), DTYPES.index(x.dtype), x.shape[-2], x.shape[-1], x.numel(), factor.data_ptr(), stride
            )
        count = None if divisor is None else ctypes.c_int64(divisor)
        args.divisor = None if count is None else ctypes.addressof(count)
        assert not self.library.ensemble_kd_bwd(ctypes.byref(args))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("cuda_on_cpu"))


KIB = 1024
# By what of a row fits on chip: shared memory of a block and of a multiprocessor, multiprocessors, capability, the
# largest cluster. With the least shared memory, the rows of a hundred classes and more are split or read twice.
DEVICES = {
    "H100": (227 * KIB, 228 * KIB, 132, 9, 8),
    "clusters": (24 * KIB, 50 * KIB, 132, 9, 8),
    "streaming": (24 * KIB, 50 * KIB, 108, 8, 1),
}


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(params=DEVICES)
def backend(request, emulator, monkeypatch):
    emulator.choose(request.param)
    monkeypatch.setattr(sys.modules["eekd.ops.fused"], "namespace", lambda device, backend: emulator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference's tensors are small: more threads cost more than they give
    yield "native"
    torch.set_num_threads(threads)


@pytest.fixture
def kernels(backend):
    return backend


@sizes(*SIZES)
def test_every_shape(backend, size):
    rows = min(size[0], 5) if size[2] > 10 else size[0]
    for attention, (fusion, objective) in itertools.product(("uniform", "scores"), READINGS):
        x = tensors(rows, *size[1:], attention=attention)
        check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1000, 1001, 3000, 20000])
@readings
def test_every_dtype_on_and_off_chip(backend, dtype, classes, fusion, objective):
    for attention in ("uniform", "query"):
        x = tensors(2, 3, classes, dtype=dtype, attention=attention)
        check(x, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize("k", [None, 20], ids=["dense", "sparse"])
@pytest.mark.parametrize("classes", [100, 3000])
def test_shares_of_a_tiny_probability_keep_their_digits(backend, classes, k):
    """They are of differences of logits, which fp32 has, and not of logarithms of thousands, which it rounds."""
    x = tensors(3, 4, classes)
    x["labels"] = torch.nn.functional.one_hot(torch.full((3,), 7), classes).float()
    x["snapshot_logits"][:, :, 7] -= 20000
    if k:
        x |= kept(x["snapshot_logits"], torch.arange(k).expand(3, k), 1.0)
    got, truth = evaluate(kd, x, temperature=1.0), exact(x, temperature=1.0)
    torch.testing.assert_close(got["d_scores"].double(), truth["d_scores"].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["attention_loss"].double(), truth["attention_loss"])


@sizes((3, 3, 16), (3, 3, 1000), (3, 3, 3000), (2, 2, 1000, 50), (2, 2, 4104, 50), (2, 2, 20000, 50))
@readings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_alignment(backend, size, dtype, fusion, objective):
    for attention in ("uniform", "scores"):
        x = tensors(*size, dtype=dtype, attention=attention)
        options = {"fusion": fusion, "attention_objective": objective}
        expected = evaluate(kd, x, **options)
        for name, first in ("student_logits", 3), ("snapshot_logits", 5):
            *rows, columns = x[name].shape
            wide = torch.full((*rows, columns + 16), torch.nan, dtype=dtype)
            moved = x | {name: wide[..., first : first + columns].copy_(x[name])}
            assert_same_bits(evaluate(kd, moved, **options), expected)


def ranks_of_rows(emulator, x, **options):
    emulator.launches()
    kd(**x, reduction="none", **options)
    (ranks,) = emulator.launches()
    return ranks


def test_a_row_too_long_for_a_block_is_split_over_a_cluster(emulator, backend, request):
    device = request.node.callspec.params["backend"]
    expected = {"H100": (1, 1, 1, 4, 8), "clusters": (1, 1, 4, 2, 8), "streaming": (1,) * 5}[device]
    sizes = ((9, 100), (9, 1000), (200, 3000), (9, 15000), (1, 40000))
    found = [ranks_of_rows(emulator, tensors(rows, 3, classes)) for rows, classes in sizes]
    assert tuple(found) == expected


@sizes((9, 2, 4), (9, 2, 4, 2))
def test_launches(emulator, backend, size):
    for rows, reduction, expected in ((9, "none", 1), (9, "mean", 2), (2100, "sum", 2), (2100, "mean", 3)):
        x = tensors(rows, *size[1:])
        emulator.launches()
        check(x, reduction=reduction)
        assert len(emulator.launches()) == expected


@readings
def test_sparse_row_of_more_classes_than_there_are_bits(emulator, fusion, objective, backend, request):
    if request.node.callspec.params["backend"] != "streaming":
        pytest.skip("their bits fit")
    x = tensors(1, 2, 200003)
    # Among them the first class of every segment: a thread has 8 classes of it at a time, a block 256 threads.
    indices = torch.cat([torch.arange(0, 200003, 256 * 8), torch.arange(1, 200003, 250)])
    x |= kept(x["snapshot_logits"], indices[None], 5.0)
    check(x, fusion=fusion, attention_objective=objective)


def test_sparse_index_that_is_no_class_makes_its_row_nan(backend):
    for classes, wrong in itertools.product((10, 1500), ("C", -1, 2**32, -(2**62))):
        x = tensors(5, 2, classes, 4)
        expected = evaluate(kd, x, reduction="none")
        x["indices"][2, 1] = classes if wrong == "C" else wrong
        got = evaluate(kd, x, reduction="none")
        for name in ("loss", "attention_loss", "d_student_logits", "d_scores"):
            assert got[name][2].isnan().all()
            assert torch.equal(got[name][[0, 1, 3, 4]], expected[name][[0, 1, 3, 4]])


def test_sparse_label_that_is_no_class_makes_its_row_nan(backend):
    for wrong in (10, -1, 2**40):
        x = tensors(5, 2, 10, 4)
        x["labels"][2] = wrong
        loss, _, attention_loss = kd(**x, reduction="none")
        assert loss.isnan().tolist() == attention_loss.isnan().tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("edge", ["begin", "end"])
def test_no_memory_beside_a_tensor_is_touched(emulator, backend, edge, monkeypatch):
    monkeypatch.setattr(emulator, "edge", edge)
    for size in ((2, 5, 10), (2, 5, 1000), (2, 5, 1001), (2, 64, 1601), (2, 2, 20003), (2, 5, 1001, 20)):
        child = os.fork()  # which touching it ends
        if not child:
            try:
                for fusion, _ in READINGS[::2]:
                    kd(**tensors(*size), fusion=fusion)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, size


def test_more_rows_than_a_grid_has_blocks(emulator, backend):
    rows = 4 * (2**32 + 1)  # whose blocks, of 4 rows each, are one when counted in 32 bits
    x = torch.zeros(4, 8)
    out = [torch.zeros(4) for _ in range(3)]
    student = Matrix(x.data_ptr(), 0, 1)
    args = Arguments(rows=rows, snapshots=1, classes=8, student=student, temperature=5.0, row_scale=1)
    args.snapshot[0] = Matrix(x.data_ptr(), 0, 1)
    args.loss, args.attention_loss, args.weights = (t.data_ptr() for t in out)
    error = emulator.library.ensemble_kd_fwd(
        ctypes.byref(args), False, False, None, None, (ctypes.c_int * 32)(*[-1] * 32)
    )
    assert error


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("divisor", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_scales_in_place(emulator, backend, dtype, divisor, per_row):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for first in (0, 1):  # 16 bytes or an element from an aligned address
        student = torch.randn(9 * 1001 + 1).to(dtype)[first : first + 9 * 1001].view(9, 1001)
        keys = torch.randn(3, 9, 6).to(dtype)
        factor = torch.rand(9 if per_row else (), dtype=wide)
        expected = [
            (x.to(wide) * (factor[:, None] if per_row else factor) / (divisor or 1)).to(dtype) for x in (student, keys)
        ]
        emulator.ensemble_kd_bwd([(student, factor), (keys, factor)], divisor)
        for x, y in zip((student, keys), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_backward_writes_nothing_where_the_factor_is_one(emulator, backend):
    x = torch.full((9, 16), torch.nan).view(torch.int32).fill_(0x7F800001).view(torch.float32)  # would become quiet
    for factor in (torch.ones(()), torch.ones(9)):
        emulator.ensemble_kd_bwd([(x, factor)], None)
        assert (x.view(torch.int32) == 0x7F800001).all()
