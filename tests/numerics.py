"""How exact an op must be: the one tolerance table.

Truth is the reference in fp64 on the same numbers. The error of an op may be twice the error of the reference in the
dtypes given, plus ATOL: of the largest true value, or of the terms that cancel in it. These are of order τ² log C in
the loss and τ² in gradients through the target, of the order of the logits and of weights in the attention's, τ times a
probability in the student's, 1 in the logarithm of a probability, and never rounded to 16 bits.
For 16 bits ATOL is one unit in the last place, since a gradient is rounded when it is written and when it is scaled.
"""

import re
from collections.abc import Callable
from math import log

import pytest
import torch
from cases import kd
from torch import Tensor

from eekd.ops import reference

ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DIFFERENTIABLE = ("student_logits", "scores", "query", "keys")


def evaluate(op: Callable, x: dict, *, upstream=(1.0, 1.0), wrt=DIFFERENTIABLE, **options) -> dict[str, Tensor]:
    """Outputs of op(**x, **options), and gradients of upstream[0] loss + upstream[1] attention_loss, as "d_NAME".

    A gradient that does not exist is a zero. The attention gets none where its objective has no labels.
    """
    if x.get("labels") is None and options.get("attention_objective", "label") == "label":
        wrt = ("student_logits",)
    leaves = {name: x[name].detach().requires_grad_() for name in wrt if x.get(name) is not None}
    loss, weights, attention_loss = op(**{**x, **leaves}, **options)
    total = (loss * upstream[0]).sum() + (attention_loss * upstream[1]).sum()
    grads = torch.autograd.grad(total, leaves.values(), allow_unused=True, materialize_grads=True)
    out = {"loss": loss.detach(), "attention_loss": attention_loss.detach(), "weights": weights}
    return out | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def double(x: dict) -> dict:
    """The same numbers in fp64."""

    def widen(value):
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return [widen(v) for v in value] if isinstance(value, list) else value

    return {name: widen(value) for name, value in x.items()}


def formula(**x):
    """The op whose arguments these are, as the reference has it."""
    return (reference.sparse_ensemble_kd if "indices" in x else reference.ensemble_kd)(**x)


def exact(x: dict, **options) -> dict[str, Tensor]:
    """What evaluate(kd, x, **options) should be, in fp64."""
    return evaluate(formula, double(x), **options)


def check(x: dict, **options) -> dict[str, Tensor]:
    """evaluate(kd, x, **options), which must be as exact as the reference."""
    got, truth, torchs = evaluate(kd, x, **options), exact(x, **options), evaluate(formula, x, **options)
    assert got.keys() == truth.keys()
    temperature, student = options.get("temperature", 5.0), x["student_logits"].double()
    squared = temperature**2
    probability = max([(row / temperature).softmax(0).nan_to_num(0).max().item() for row in student], default=0)
    labels, reduction = x.get("labels"), options.get("reduction", "mean")
    every = labels is None or labels.is_floating_point()
    counted = max(1, len(student) if every else int((labels != options.get("ignore_index", -100)).sum()))
    rows = counted if reduction == "mean" else 1
    logits = max([z.nan_to_num(0, 0, 0).abs().max().item() for z in x["snapshot_logits"] if z.numel()], default=0)
    mass = 1.0  # of soft labels
    if every and labels is not None:
        mass = max([1.0, *labels.double().nan_to_num(0).abs().sum(1).tolist()])
    for name, value in got.items():
        assert value.shape == truth[name].shape and value.dtype == torchs[name].dtype, name
        attention = name in ("d_scores", "d_query", "d_keys")
        through_target = name == "loss" or (attention and options.get("attention_objective") == "kl")
        logarithm = max(1, log(student.shape[1])) if name == "loss" else 1
        terms = max(0.01, through_target * squared * logarithm, attention * logits / 100, attention / rows)
        if name == "attention_loss":
            terms = mass
            if every and labels is not None:  # Σ y log p, a sum over all classes in as few lanes as SSE2 has
                finite = truth[name][truth[name].isfinite()]
                terms *= 2 * max([1.0, *finite.abs().flatten().tolist()])
        if name == "d_student_logits":
            terms = max(terms, temperature * probability / rows)
        if name in ("loss", "attention_loss") and reduction == "sum":
            terms *= counted
        upstream = 1.0
        if attention and every and labels is not None:  # a sum over all classes, whose rounding the upstream multiplies
            terms *= mass
            upstream = max(1.0, *(float(torch.as_tensor(g).abs().max()) for g in options.get("upstream", (1.0,))))
        floor = terms * upstream * ATOL[got["loss"].dtype]
        assert_close(name, value.double(), torchs[name].double(), truth[name].double(), ATOL[value.dtype], floor)
    return got


def check_by_differences(x: dict, checks: dict[str, list[str]], **options) -> None:
    """The gradients of each output, through the arguments that it names, are those of finite differences."""
    for output, names in checks.items():
        leaves = [x[name].clone().requires_grad_() for name in names]

        def f(*leaves, names=names, output=output):
            return getattr(kd(**x | dict(zip(names, leaves, strict=True)), **options), output)

        assert torch.autograd.gradcheck(f, leaves)


def assert_close(name: str, value: Tensor, torchs: Tensor, truth: Tensor, rtol: float, floor: float) -> None:
    finite = truth.isfinite()
    torch.testing.assert_close(value[~finite], truth[~finite], equal_nan=True, msg=lambda m: f"{name}: {m}")
    if finite.any():
        error, reference = ((x - truth)[finite].abs().max() for x in (value, torchs))
        largest = truth[finite].abs().max()
        bound = 2 * reference + max(rtol * largest, floor)
        assert error <= bound, (
            f"{name}: error {error:.3g} exceeds {bound:.3g}: the reference's is {reference:.3g}, the largest value is "
            f"{largest:.3g}, the floor {floor:.3g}"
        )


def assert_rounded_once(name: str, value: Tensor, full: Tensor) -> None:
    """The value is a rounding of what another order of fp32 sums could have made of `full`."""
    apart = 128 * torch.finfo(torch.float32).eps * full.abs().max()
    low, high = ((full + step).to(value.dtype) for step in (-apart, apart))
    wrong = ~((low <= value) & (value <= high))
    assert not wrong.any(), f"{name}: {value[wrong]} where fp32 has {full[wrong]}"


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_equals_formulas(x: dict, device, expected: dict[str, Tensor], fusion: str, objective: str) -> None:
    """The op gives what the formulas gave for the same numbers in fp64, at temperature 3 and alpha 0.3."""
    x = {name: value.to(device) for name, value in x.items()}
    options = {"temperature": 3.0, "alpha": 0.3, "fusion": fusion, "attention_objective": objective}
    got = evaluate(kd, x, reduction="sum", **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits_in_threads(threads: Callable[[int], object], x: dict, **options) -> None:
    """The op gives the same bits in one, two and four threads."""
    outs = []
    for count in (1, 2, 4):
        threads(count)
        outs.append(evaluate(kd, x, **options))
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


def refused(exception: type[Exception], says: str, **arguments) -> str:
    """The sentence, and one it is, by which the op refuses these arguments."""
    with pytest.raises(exception) as caught:
        kd(**arguments)
    sentence = str(caught.value)
    assert re.search(says, sentence) and "\n" not in sentence and len(sentence) < 200
    return sentence
