"""Every mistake in a call of ensemble_kd ends in one sentence that names the argument."""

from math import inf, nan

import pytest
import torch
from cases import tensors
from numerics import refused

from eekd import ensemble_kd

B, M, C, D = 4, 3, 5, 2
VALUE, TYPE = ValueError, TypeError


def with_grad(x):
    return x.clone().requires_grad_()


def put(x, index, value):
    x = x.clone()
    x[index] = value
    return x


# (what is wrong, the exception, what its sentence names, the bad tensor from the good one)
STUDENT = [
    ("none", TYPE, "student_logits", lambda x: None),
    ("a list", TYPE, "student_logits", lambda x: x.tolist()),
    ("an array", TYPE, "student_logits", lambda x: x.numpy()),
    ("a string", TYPE, "student_logits", lambda x: "logits"),
    ("a number", TYPE, "student_logits", lambda x: 1.0),
    ("0 dimensions", VALUE, "student_logits", lambda x: x[0, 0]),
    ("1 dimension", VALUE, "student_logits", lambda x: x[0]),
    ("3 dimensions", VALUE, "snapshot_logits", lambda x: x[None]),
    ("no classes", VALUE, "student_logits", lambda x: x[:, :0]),
    ("int64", TYPE, "student_logits", lambda x: x.long()),
    ("bool", TYPE, "student_logits", lambda x: x > 0),
    ("complex", TYPE, "student_logits", lambda x: x.to(torch.complex64)),
    ("float8", TYPE, "student_logits", lambda x: x.to(torch.float8_e4m3fn)),
    ("another row", VALUE, "snapshot_logits", lambda x: x.repeat(2, 1)),
    ("another class", VALUE, "snapshot_logits", lambda x: x[:, :4]),
    ("transposed", VALUE, "snapshot_logits", lambda x: x.t()),
    ("on meta alone", VALUE, "snapshot_logits", lambda x: x.to("meta")),
]
SNAPSHOTS = [
    ("none", TYPE, "snapshot_logits", lambda z: None),
    ("a number", TYPE, "snapshot_logits", lambda z: 3),
    ("a string", TYPE, "snapshot_logits", lambda z: "teacher"),
    ("an array", TYPE, "snapshot_logits", lambda z: z.numpy()),
    ("a dict", TYPE, "snapshot_logits", lambda z: dict(enumerate(z))),
    ("a generator", TYPE, "snapshot_logits", lambda z: (part for part in z)),
    ("a list of arrays", TYPE, "snapshot_logits", lambda z: list(z.numpy())),
    ("a list with none", TYPE, "snapshot_logits", lambda z: [z[0], None, z[2]]),
    ("an empty list", VALUE, "snapshot_logits.* 1 to 64", lambda z: []),
    ("no snapshots", VALUE, "snapshot_logits.* 1 to 64", lambda z: z[:0]),
    ("65 snapshots", VALUE, "snapshot_logits.* 1 to 64.* 65", lambda z: z[:1].expand(65, B, C)),
    ("a list of 65", VALUE, "snapshot_logits.* 1 to 64.* 65", lambda z: [z[0]] * 65),
    ("2 dimensions", VALUE, "snapshot_logits", lambda z: z[0]),
    ("4 dimensions", VALUE, "snapshot_logits", lambda z: z[None]),
    ("(B, M, C)", VALUE, "snapshot_logits", lambda z: z.transpose(0, 1)),
    ("(M, C, B)", VALUE, "snapshot_logits", lambda z: z.transpose(1, 2)),
    ("another row", VALUE, "snapshot_logits", lambda z: z[:, :3]),
    ("another class", VALUE, "snapshot_logits", lambda z: z[:, :, :4]),
    ("no classes", VALUE, "snapshot_logits", lambda z: z[:, :, :0]),
    ("classes apart", VALUE, "snapshot_logits.* contiguous", lambda z: z.transpose(1, 2).contiguous().transpose(1, 2)),
    ("every other class", VALUE, "snapshot_logits.* contiguous", lambda z: z.repeat_interleave(2, 2)[:, :, ::2]),
    ("one value expanded", VALUE, "snapshot_logits.* contiguous", lambda z: z[:, :, :1].expand(M, B, C)),
    (
        "classes apart in a list",
        VALUE,
        "snapshot_logits.* contiguous",
        lambda z: [z[0], z[1].t().contiguous().t(), z[2]],
    ),
    ("a list of 1 dimension", VALUE, "snapshot_logits", lambda z: [part[0] for part in z]),
    ("a list of 3 dimensions", VALUE, "snapshot_logits", lambda z: [z, z]),
    ("a list of two shapes", VALUE, "snapshot_logits", lambda z: [z[0], z[1][:, :4], z[2]]),
    ("a list of two dtypes", TYPE, "snapshot_logits.* one dtype", lambda z: [z[0], z[1].double(), z[2]]),
    ("a list on two devices", VALUE, "snapshot_logits.* meta", lambda z: [z[0], z[1].to("meta"), z[2]]),
    ("on meta alone", VALUE, "snapshot_logits.* meta", lambda z: z.to("meta")),
    ("int64", TYPE, "snapshot_logits", lambda z: z.long()),
    ("bool", TYPE, "snapshot_logits", lambda z: z > 0),
    ("complex", TYPE, "snapshot_logits", lambda z: z.to(torch.complex64)),
    ("with gradient", VALUE, "snapshot_logits.* detach", with_grad),
    ("one with gradient", VALUE, "snapshot_logits.* detach", lambda z: [z[0], with_grad(z[1]), z[2]]),
    ("not a leaf, with gradient", VALUE, "snapshot_logits.* detach", lambda z: with_grad(z) * 2),
]
LABELS = [
    ("a list", TYPE, "labels", lambda y: y.tolist()),
    ("an array", TYPE, "labels", lambda y: y.numpy()),
    ("a number", TYPE, "labels", lambda y: 3),
    ("a string", TYPE, "labels", lambda y: "cat"),
    ("float", TYPE, "labels.* integer", lambda y: y.float()),
    ("half", TYPE, "labels.* integer", lambda y: y.half()),
    ("nan", TYPE, "labels.* integer", lambda y: torch.full((B,), torch.nan)),
    ("bool", TYPE, "labels.* integer", lambda y: y > 1),
    ("complex", TYPE, "labels.* integer", lambda y: y.to(torch.complex64)),
    ("a scalar", VALUE, "labels", lambda y: y[0]),
    ("a column", TYPE, "labels", lambda y: y[:, None]),
    ("one hot", TYPE, "labels.* floating", lambda y: torch.nn.functional.one_hot(y, C)),
    ("too few", VALUE, "labels", lambda y: y[:3]),
    ("too many", VALUE, "labels", lambda y: y.repeat(2)),
    ("none of them", VALUE, "labels", lambda y: y[:0]),
    ("on meta alone", VALUE, "labels.* meta", lambda y: y.to("meta")),
]
SCORES = [
    ("a list", TYPE, "scores", lambda e: e.tolist()),
    ("an array", TYPE, "scores", lambda e: e.numpy()),
    ("a string", TYPE, "scores", lambda e: "uniform"),
    ("a number", TYPE, "scores", lambda e: 1.0),
    ("int64", TYPE, "scores", lambda e: e.long()),
    ("complex", TYPE, "scores", lambda e: e.to(torch.complex64)),
    ("(M)", VALUE, "scores", lambda e: e[0]),
    ("(M, B)", VALUE, "scores", lambda e: e.t()),
    ("(1, M), not expanded", VALUE, "scores", lambda e: e[:1]),
    ("(B, M, 1)", VALUE, "scores", lambda e: e[:, :, None]),
    ("another row", VALUE, "scores", lambda e: e[:3]),
    ("another snapshot", VALUE, "scores", lambda e: e[:, :2]),
    ("on meta alone", VALUE, "scores.* meta", lambda e: e.to("meta")),
]
QUERY = [
    ("none", VALUE, "query and keys", lambda q: None),
    ("a list", TYPE, "query", lambda q: q.tolist()),
    ("an array", TYPE, "query", lambda q: q.numpy()),
    ("a string", TYPE, "query", lambda q: "query"),
    ("1 dimension", VALUE, "query", lambda q: q[:, 0]),
    ("3 dimensions", VALUE, "query", lambda q: q[None]),
    ("no width", VALUE, "query", lambda q: q[:, :0]),
    ("another row", VALUE, "query", lambda q: q[:3]),
    ("another width", VALUE, "keys", lambda q: q.repeat(1, 2)),
    ("int64", TYPE, "query", lambda q: q.long()),
    ("on meta alone", VALUE, "query.* meta", lambda q: q.to("meta")),
]
KEYS = [
    ("none", VALUE, "query and keys", lambda k: None),
    ("a list", TYPE, "keys", lambda k: list(k)),
    ("an array", TYPE, "keys", lambda k: k.numpy()),
    ("2 dimensions", VALUE, "keys", lambda k: k[0]),
    ("(B, M, D)", VALUE, "keys", lambda k: k.transpose(0, 1)),
    ("another snapshot", VALUE, "keys", lambda k: k[:2]),
    ("another row", VALUE, "keys", lambda k: k[:, :3]),
    ("another width", VALUE, "keys", lambda k: k[:, :, :1]),
    ("int64", TYPE, "keys", lambda k: k.long()),
    ("on meta alone", VALUE, "keys.* meta", lambda k: k.to("meta")),
]
OPTIONS = [
    *(("temperature", value, VALUE, "a positive number") for value in (0, 0.0, -1, -0.5, nan, inf, -inf)),
    *(("temperature", value, TYPE, "a number") for value in (None, "5", [5.0], torch.tensor(5.0), 5j)),
    *(("alpha", value, VALUE, "between 0 and 1") for value in (-0.01, 1.01, 2, nan, inf, -inf)),
    *(("alpha", value, TYPE, "a number") for value in (None, "0.5", (0.5,), torch.tensor(0.5))),
    *(("ignore_index", value, TYPE, "an integer") for value in (None, 1.5, "-100", [0], torch.tensor(0))),
    *(
        (name, value, VALUE, choices)
        for name, choices in (
            ("fusion", "'probability' or 'logit'"),
            ("attention_objective", "'label' or 'kl'"),
            ("reduction", "'mean' or 'sum' or 'none'"),
        )
        for value in (None, "", "Mean", "probabilities", "labels", "batchmean", 0, True, ["mean"])
    ),
]
TENSORS = [
    pytest.param(attention, name, *case[1:], id=f"{name}, {case[0]}")
    for attention, name, cases in (
        ("scores", "student_logits", STUDENT),
        ("scores", "snapshot_logits", SNAPSHOTS),
        ("scores", "labels", LABELS),
        ("scores", "scores", SCORES),
        ("query", "query", QUERY),
        ("query", "keys", KEYS),
    )
    for case in cases
]


@pytest.mark.bad_input
@pytest.mark.parametrize("attention, name, exception, says, bad", TENSORS)
def test_a_bad_tensor(attention, name, exception, says, bad):
    x = tensors(B, M, C, attention=attention, width=D)
    sentence = refused(exception, says, **x | {name: bad(x[name])})
    assert ", got " in sentence or "must not require" in sentence  # what it was; and before it, what is wanted


@pytest.mark.bad_input
@pytest.mark.parametrize("name, value, exception, wanted", OPTIONS)
def test_a_bad_option(name, value, exception, wanted):
    sentence = refused(exception, "", **tensors(B, M, C), **{name: value})
    assert sentence == f"{name} must be {wanted}, got {value!r}"


@pytest.mark.bad_input
@pytest.mark.parametrize("names", [("scores", "query", "keys"), ("scores", "keys"), ("scores", "query")])
def test_attention_given_twice(names):
    both = tensors(B, M, C, attention="query", width=D) | tensors(B, M, C)
    given = ("student_logits", "snapshot_logits", "labels", *names)
    refused(ValueError, "scores, or query and keys, got both", **{name: both[name] for name in given})


@pytest.mark.bad_input
@pytest.mark.parametrize("attention", ["scores", "query", "keys"])
def test_the_label_objective_needs_labels_to_train_the_attention(backend, attention):
    x = tensors(B, M, C, attention="scores" if attention == "scores" else "query", labels=False)
    trained = x | {attention: with_grad(x[attention])}
    assert "labels" in refused(ValueError, 'attention_objective="label"', **trained)
    ensemble_kd(**trained, attention_objective="kl")
    ensemble_kd(**x)
    with torch.no_grad():
        ensemble_kd(**trained)


@pytest.mark.bad_input
@pytest.mark.parametrize("label", [C, C + 1, -1, -99, 2**40, -(2**62)])
@pytest.mark.parametrize("row", [0, 2, B - 1])
def test_a_label_out_of_range_names_its_row(label, row):
    x = tensors(B, M, C)
    x["labels"][row] = label
    assert refused(RuntimeError, f"class below {C}.* ignore_index", **x).startswith(f"labels[{row}] is {label},")


@pytest.mark.bad_input
@pytest.mark.parametrize("label", [C, -1])
def test_a_label_out_of_range_is_an_error_on_every_backend(backend, device, label):
    if device != "cpu":
        pytest.skip("an assertion on the device ends its context")
    x = tensors(B, M, C)
    x["labels"][1] = label
    for options in ({}, {"alpha": 0.0}, {"alpha": 1.0}, {"ignore_index": 2}):
        with pytest.raises((RuntimeError, IndexError)):
            ensemble_kd(**x, **options)


@pytest.mark.bad_input
def test_an_unknown_argument():
    with pytest.raises(TypeError, match="weights"):
        ensemble_kd(**tensors(B, M, C), weights=torch.ones(M))


@pytest.mark.bad_input
def test_options_are_given_by_name():
    x = tensors(B, M, C)
    with pytest.raises(TypeError, match="positional"):
        ensemble_kd(x["student_logits"], x["snapshot_logits"], x["labels"], x["scores"])


def test_a_refused_call_leaves_nothing_behind(backend):
    x = tensors(B, M, C)
    expected = ensemble_kd(**x).loss
    with pytest.raises(RuntimeError):
        ensemble_kd(**x | {"labels": put(x["labels"], 1, C)})
    assert torch.equal(ensemble_kd(**x).loss, expected)
