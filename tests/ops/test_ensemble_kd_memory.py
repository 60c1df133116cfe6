"""What ensemble_kd and sparse_ensemble_kd read and hold, wherever it lies, and that they give the same bits."""

import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
from cases import ATTENTIONS, DTYPES, INF, NAN, far, fusions, kd, part, readings, rows_first, sizes, spread, tensors
from numerics import assert_same_bits, assert_same_bits_in_threads, check, evaluate

from eekd import ensemble_kd
from eekd.kernels.timing import peak_extra_bytes


def layouts(x):
    """The same numbers in other memory, NaN or an index out of range wherever nothing must be read."""
    z = x["snapshot_logits"]

    def turned(name, *axes):
        return {name: x[name].transpose(*axes).contiguous().transpose(*axes)}

    by_row = turned("snapshot_logits", 0, 1)
    yield "rows apart", x | {name: spread(x[name]) for name in ("student_logits", "snapshot_logits")}
    yield "(B, M, C) memory", x | by_row
    yield "(B, M, C) memory, rows apart", x | {"snapshot_logits": spread(z.transpose(0, 1)).transpose(0, 1)}
    yield "a list", x | {"snapshot_logits": list(z)}
    yield "a tuple with strides of their own", x | {"snapshot_logits": (spread(z[0]), *by_row["snapshot_logits"][1:])}
    yield "student by columns", x | turned("student_logits", 0, 1)
    if "indices" in x:
        yield "tail and indices apart", x | {name: spread(x[name]) for name in ("snapshot_tail", "indices")}
        yield "(B, M) tail", x | by_row | turned("snapshot_tail", 0, 1)
        yield "indices by columns", x | turned("indices", 0, 1)
        yield "indices in 32 bits", x | {"indices": x["indices"].int()}
        yield "indices in 32 bits, apart", x | {"indices": spread(x["indices"].int())}
    if "scores" in x:
        yield "scores apart", x | {"scores": spread(x["scores"])}
        yield "scores by columns", x | turned("scores", 0, 1)
    if "query" in x:
        yield "query and keys apart", x | {"query": spread(x["query"]), "keys": spread(x["keys"])}
        yield "keys by rows", x | turned("keys", 0, 1)
        yield "keys by columns", x | turned("keys", 1, 2)
    if "labels" in x:
        yield "labels apart", x | {"labels": spread(x["labels"][:, None].double())[:, 0].nan_to_num(777).long()}
        yield "labels in 8 bits", x | {"labels": x["labels"].to(torch.uint8)}
        yield "labels strided", x | {"labels": x["labels"].repeat_interleave(2)[::2]}


@sizes((6, 3, 13), (6, 3, 1030), (6, 3, 40, 13), (6, 3, 60, 50), (6, 3, 1030, 50), (6, 3, 1030, 1027))
@pytest.mark.parametrize("attention", ["scores", "query"])
@readings
def test_any_layout_gives_the_same_bits(backend, device, size, attention, fusion, objective):
    x = tensors(*size, device=device, attention=attention)
    x["labels"] %= 128
    options = {"fusion": fusion, "attention_objective": objective}
    expected = evaluate(kd, x, **options)
    for layout, y in layouts(x):
        with pytest.MonkeyPatch.context() as patch:
            if backend != "reference":
                patch.setattr(torch, "stack", lambda *_: pytest.fail("snapshots were stacked"))
            got = evaluate(kd, y, **options)
        for name in expected:
            if backend in ("reference", "triton"):  # where columns lie decides the order in which these two sum
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(got[name], expected[name]), f"{layout}: {name}"


@sizes((6, 3, 40), (6, 3, 60, 10))
@fusions
def test_expanded_tensors_are_repeated_values(backend, device, size, fusion):
    x = tensors(*size, device=device)
    x |= {name: x[name][:1].expand_as(x[name]) for name in ("student_logits", "indices") if name in x}
    x |= {name: x[name][:1, :1].expand_as(x[name]) for name in ("snapshot_logits", "snapshot_tail") if name in x}
    for scores in (x["scores"][:1].expand(6, 3), x["scores"][:, :1].expand(6, 3)):
        x["scores"] = scores
        got = check(x, fusion=fusion)
        assert_same_bits(got, evaluate(kd, {k: v.contiguous() for k, v in x.items()}, fusion=fusion))


@sizes((7, 3, 10), (7, 3, 1500), (7, 3, 30, 8), (7, 3, 100, 50), (7, 3, 1500, 8), (7, 3, 1500, 50))
@readings
def test_ignored_rows_count_for_nothing_and_are_not_read(backend, device, size, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    for attention, reduction in itertools.product(ATTENTIONS, ("mean", "sum", "none")):
        x = tensors(*size, device=device, attention=attention)
        ignored = torch.tensor([1, 0, 0, 1, 0, 1, 0], dtype=torch.bool, device=device)
        without = part(x, ~ignored)
        for name, value in x.items():
            unread = NAN if value.is_floating_point() else 2**40 if name == "indices" else -100
            rows_first(name, value)[ignored] = unread
        got = evaluate(kd, x, reduction=reduction, **options)
        expected = evaluate(kd, without, reduction=reduction, **options)
        for name, value in got.items():
            if value.dim():
                assert (rows_first(name, value)[ignored] == 0).all(), name
                value = part({name: value}, ~ignored)[name]
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@sizes((60, 3, 4), (60, 3, 50, 3), (60, 3, 50, 40))
def test_any_integer_may_be_the_ignored_label(backend, device, size):
    x = tensors(*size, device=device)
    for ignored in (0, 2, size[-1]):  # also the number of a column, and one that no column has
        x["labels"][:10] = ignored
        got = check(x, ignore_index=ignored, reduction="none")
        assert torch.equal(got["loss"] == 0, x["labels"] == ignored)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_but_ignored_rows(backend, device, reduction):
    x = tensors(3, 2, 10, device=device)
    x["labels"][:] = -100
    for name, value in evaluate(ensemble_kd, x, reduction=reduction).items():
        assert (value == 0).all(), name


@sizes((4, 3, 10), (4, 3, 1500), (4, 3, 50, 10), (4, 3, 1500, 40))
@readings
def test_snapshots_of_no_weight_are_not_read(backend, device, size, fusion, objective):
    x = tensors(*size, device=device)
    x["scores"][:, 1] = x["scores"][2, 0] = -INF
    without = evaluate(kd, x, fusion=fusion, attention_objective=objective)
    of_snapshots = [name for name in x if name.startswith("snapshot")]
    for name in of_snapshots:
        x[name][1] = x[name][0, 2] = NAN
    got = evaluate(kd, x, fusion=fusion, attention_objective=objective)
    assert_same_bits(got, without)
    assert (got["d_scores"][:, 1] == 0).all() and (got["weights"][:, 1] == 0).all()
    check(x | {name: x[name][[0, 2]] for name in of_snapshots} | {"scores": x["scores"][:, [0, 2]]})


NANS = {"quiet": 0x7FC00000, "negative": -0x400000, "payload": 0x7FC00001, "all ones": -1, "signalling": 0x7F800001}


@pytest.mark.parametrize("who", ["student_logits", "snapshot_logits"])
@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
@fusions
def test_a_nan_that_is_read_is_never_a_finite_loss(backend, device, who, bits, fusion):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for classes, column, rest in itertools.product((10, 1000, 2500), (0, 3, -1), (None, -INF)):
        x = tensors(3, 2, classes, device=device)
        row = x[who].view(-1, 3, classes)[-1, 1]
        if rest is not None:
            row[classes // 2 :] = rest
        row[column] = nan
        out = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")
        assert out["loss"].isnan().tolist() == [False, True, False], (classes, column, rest)
        assert out["d_student_logits"][1].isnan().any() and not out["d_student_logits"][0].isnan().any()
        if who == "snapshot_logits":
            assert out["attention_loss"].isnan().tolist() == [False, True, False], (classes, column, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@fusions
def test_every_instruction_set_keeps_nans(isa, dtype, fusion):
    ints, patterns = {
        torch.float32: (torch.int32, NANS.values()),
        torch.bfloat16: (torch.int16, (0x7FC0, 0x7F81, -1)),
        torch.float16: (torch.int16, (0x7E00, 0x7C01, -1)),
    }[dtype]
    for bits, who, column in itertools.product(patterns, ("student_logits", "snapshot_logits"), (0, 60, -1)):
        x = tensors(2, 2, 100, dtype=dtype)
        x[who].view(-1, 2, 100)[-1, 0, column] = torch.tensor(bits, dtype=ints).view(dtype)
        loss = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")["loss"]
        assert loss.isnan().tolist() == [True, False], (hex(bits), who, column)


@pytest.mark.parametrize("who", ["scores", "query", "keys"])
@fusions
def test_a_nan_in_the_attention_is_never_a_finite_loss(backend, device, who, fusion):
    x = tensors(3, 2, 10, device=device, attention="scores" if who == "scores" else "query")
    x[who].view(-1, 3, x[who].shape[-1])[-1, 1, 0] = NAN
    out = evaluate(ensemble_kd, x, fusion=fusion, reduction="none")
    assert out["loss"].isnan().tolist() == out["attention_loss"].isnan().tolist() == [False, True, False]


@sizes((3, 2, 10), (3, 2, 32, 16))  # the latter of whole vectors either way
@pytest.mark.parametrize("attention", ["scores", "query"])
def test_offsets_beyond_32_bits(backend, device, size, attention):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("a GPU's memory is taken when it is asked for")
    x = tensors(*size, device=device, dtype=torch.float16, attention=attention)
    y = {name: value if name == "labels" else far(value) for name, value in x.items()}
    assert_same_bits(evaluate(kd, y), evaluate(kd, x))


@fusions
def test_memory_is_the_gradient_and_a_few_tiles(device, threads, fusion):
    if device != "cpu":
        pytest.skip("reads the resident set of the process")
    threads(2)
    rows, snapshots, classes = 32, 8, 65536
    x = tensors(rows, snapshots, classes)
    x["student_logits"].requires_grad_()
    x["scores"].requires_grad_()

    def run():
        x["student_logits"].grad = x["scores"].grad = None
        out = ensemble_kd(**x, fusion=fusion)
        return out.loss + out.attention_loss

    run().backward()
    x["student_logits"].grad = None
    extra = peak_extra_bytes(run, torch.device("cpu"))
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    gradient = 4 * rows * classes
    assert extra < gradient + 2 * 4 * classes + 2**20, f"{extra / gradient:.2f} times the gradient"


# Bits


@sizes((5, 3, 1500), (5, 3, 1001), (5, 3, 1500, 50), (5, 3, 1001, 20))  # the rows of 1001 begin at any element
@readings
def test_the_same_inputs_give_the_same_bits(backend, device, size, fusion, objective):
    options = {"fusion": fusion, "attention_objective": objective}
    x = tensors(*size, device=device, attention="query")
    first = evaluate(kd, x, **options)
    for _ in range(3):
        x = {name: value.clone() for name, value in x.items()}
        assert_same_bits(evaluate(kd, x, **options), first)


@sizes((64, 3, 1000), (3, 3, 5000), (1, 2, 100000), (129, 3, 1000, 20), (67, 3, 5000, 60), (1, 2, 100000, 60))
@readings
def test_threads_do_not_change_the_bits(kernels, threads, size, fusion, objective):
    x = tensors(*size)
    assert_same_bits_in_threads(threads, x, fusion=fusion, attention_objective=objective)


@sizes((8, 3, 5000), (40, 3, 1100, 10), (40, 3, 1100, 60))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@readings
def test_a_few_rows_are_the_same_rows(kernels, device, threads, size, dtype, fusion, objective):
    threads(4)
    x = tensors(*size, device=device, dtype=dtype, attention="query")
    x["labels"][1] = -100
    options = {"fusion": fusion, "attention_objective": objective, "reduction": "none"}
    few = evaluate(kd, part(x, slice(3)), **options)
    assert_same_bits(few, part(evaluate(kd, x, **options), slice(3)))


def test_callers_in_several_threads(backend, device):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter runs in one thread")
    sizes = (20, 3, 10), (20, 3, 1000), (20, 3, 3000), (20, 3, 40, 10), (20, 3, 1000, 50), (20, 3, 3000, 10)
    xs = [tensors(*size, device=device) for size in sizes] * 2
    expected = [evaluate(kd, x) for x in xs]
    got = [None] * len(xs)

    def work(i):
        for _ in range(20):
            got[i] = evaluate(kd, xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b) if backend != "reference" else torch.testing.assert_close(a, b)
