"""ensemble_kd and sparse_ensemble_kd as torch ops: opcheck, torch.compile, autocast and modes."""

import pytest
import torch
import torch._dynamo.testing
from cases import ATTENTIONS, fusions, kd, readings, sizes, tensors
from compiled import assert_compiled_agrees, compiled
from numerics import assert_same_bits, evaluate

from eekd import ensemble_kd, use_backend


@sizes((4, 3, 5), (4, 3, 20, 5))
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("whole", [True, False], ids=["stacked", "list"])
def test_opcheck(device, size, attention, whole):
    x = tensors(*size, device=device, attention=attention, labels=whole)
    s, z = x["student_logits"], x["snapshot_logits"]
    kept = [x[name] for name in ("snapshot_tail", "indices") if name in x]
    given = [x.get(name) for name in ("labels", "scores", "query", "keys")]
    ops = torch.ops.eekd
    torch.library.opcheck(
        (ops.sparse_ensemble_kd_fwd if kept else ops.ensemble_kd_fwd).default,
        (
            s,
            [z] if whole else list(z),
            *kept,
            *given,
            5.0,
            0.5,
            False,
            True,
            int(whole),
            -100,
            whole,
            given[1] is not None or given[2] is not None,
        ),
    )


@sizes((4, 3, 5), (4, 3, 20, 5))
def test_meta_tensors_have_the_shapes_and_dtypes(size):
    x = tensors(*size, dtype=torch.bfloat16)
    expected = kd(**x, reduction="none")
    got = kd(**{name: value.to("meta") for name, value in x.items()}, reduction="none")
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "meta" and a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize(
    "sizes",
    [((7, 3, 20), (9, 4, 30), (12, 2, 10)), ((7, 3, 20, 5), (9, 4, 30, 8), (12, 2, 50, 40))],
    ids=["dense", "sparse"],
)
@readings
def test_compiles_whole_and_once_for_every_size(kernels, device, sizes, fusion, objective):
    step, fast, counter = compiled(dynamic=True)
    frames = set()
    for width, size in enumerate(sizes, 4):
        x = tensors(*size, device=device, attention="query", width=width)
        assert_compiled_agrees(step, fast, x, fusion=fusion, attention_objective=objective)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_compiles_again_only_until_a_size_is_a_variable(kernels, device):
    step, fast, counter = compiled()
    frames = []
    for rows, classes in ((7, 20), (9, 20), (12, 30), (5, 30), (33, 25)):
        assert_compiled_agrees(step, fast, tensors(rows, 3, classes, device=device))
        frames.append(counter.frame_count)
    assert frames[2] == frames[4] and frames[2] <= frames[0] + 2  # B becomes a variable, then C


def test_compiles_every_kind_of_argument(kernels, device):
    step, fast, _ = compiled()
    x = tensors(5, 3, 10, device=device)
    ignoring = x | {"labels": x["labels"].index_fill(0, torch.tensor([1], device=device), -100)}
    for y, options in (
        (x | {"snapshot_logits": list(x["snapshot_logits"])}, {}),
        ({k: v for k, v in x.items() if k not in ("labels", "scores")}, {}),
        (ignoring, {"reduction": "none", "upstream": (torch.arange(5.0, device=device), 1.0)}),
        ({k: v.half() if k.endswith("logits") else v for k, v in x.items()}, {}),
        (tensors(0, 3, 10, device=device), {}),
    ):
        assert_compiled_agrees(step, fast, y, **options)


def test_another_backend_is_another_graph(kernels, device):
    step, fast, counter = compiled()
    x = tensors(5, 3, 10, device=device)
    assert_compiled_agrees(step, fast, x)
    with use_backend("reference"):
        assert_compiled_agrees(step, fast, x)
    assert counter.frame_count == 2


@sizes((6, 3, 20), pytest.param((6, 3, 20, 5), marks=pytest.mark.full))
def test_inductor(kernels, device, size):
    step, fast, _ = compiled("inductor", dynamic=True)
    for rows in (size[0], 11):
        x = tensors(rows, *size[1:], device=device)
        x |= {"indices": x["indices"].int()} if "indices" in x else {}
        assert_compiled_agrees(step, fast, x)


@fusions
def test_autocast_changes_nothing_but_what_the_model_returns(backend, device, fusion):
    x = tensors(9, 3, 20, device=device, attention="query")
    model = torch.nn.Linear(20, 20, device=device)
    with torch.autocast(device, torch.bfloat16):
        inside = evaluate(ensemble_kd, x, fusion=fusion)
        logits = model(x["student_logits"])
        loss = ensemble_kd(**x | {"student_logits": logits}, fusion=fusion).loss
    assert_same_bits(inside, evaluate(ensemble_kd, x, fusion=fusion))
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.abs().sum() > 0


def test_inference_mode_and_no_grad(backend, device):
    x = tensors(9, 3, 20, device=device)
    expected = ensemble_kd(**x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = ensemble_kd(**x | {"student_logits": x["student_logits"].clone().requires_grad_()})
        assert not out.loss.requires_grad and torch.equal(out.loss, expected.loss)


@sizes((9, 3, 20), (9, 3, 60, 20))
def test_arguments_are_not_modified(backend, device, size):
    x = tensors(*size, device=device, attention="query")
    before = {k: v.clone() for k, v in x.items()}
    evaluate(kd, x)
    assert_same_bits(x, before)
