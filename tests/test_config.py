"""Settings: what makes sense survives a trip through JSON, what does not is refused in one sentence."""

import dataclasses
import json
import string
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eekd.data import AUGMENTATIONS
from eekd.data.policies import POLICIES
from eekd.io.files import nearest
from eekd.method import weightings
from eekd.models import names
from eekd.train import StudentTrainer
from eekd.train.checked import student_names
from eekd.train.config import Config, Phase, Student, Teacher
from eekd.train.presets import PRESETS, preset

FINITE = st.floats(1e-6, 1e6)
TEXT = st.text(string.printable, min_size=1, max_size=20)


def _phase(**more):
    marks = st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted).map(tuple)
    common = dict(
        model=TEXT,
        batch_size=st.integers(1, 4096),
        optimizer=st.sampled_from(["sgd", "adamw"]),
        lr=FINITE,
        nesterov=st.booleans(),
        weight_decay=st.floats(0, 1),
        milestones=marks,
    )
    return common | more


SNAPSHOTS = st.shared(st.integers(1, 9), key="snapshots")
CONFIGS = st.builds(
    Config,
    data=TEXT,
    root=st.none() | TEXT,
    image_size=st.none() | st.integers(1, 512),
    train_limit=st.none() | st.integers(1),
    val_fraction=st.floats(0.01, 0.99),
    workers=st.integers(0, 64),
    seed=st.integers(0, 2**31 - 1),
    split_seed=st.integers(0),
    compile=st.booleans(),
    augment=st.sampled_from(["auto", *AUGMENTATIONS]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    students=st.lists(st.sampled_from(student_names()), unique=True).map(tuple),
    teacher=st.builds(
        Teacher,
        **_phase(
            snapshots=SNAPSHOTS,
            epochs=st.builds(lambda m, k: m * k, SNAPSHOTS, st.integers(1, 50)),
            schedule=st.sampled_from(["step", "cosine", "cyclic"]),
        ),
    ),
    student=st.builds(
        Student,
        **_phase(
            epochs=st.integers(1, 300),
            temperature=FINITE,
            alpha=st.floats(0, 1),
            scale=st.none() | FINITE,
            embed_dim=st.integers(1, 512),
            fusion=st.sampled_from(["probability", "logit"]),
        ),
    ),
)


@given(CONFIGS)
def test_json_round_trip(config):
    assert Config.from_json(config.to_json()) == config


@given(CONFIGS, st.data())
def test_one_wrong_value_anywhere_is_one_sentence(config, data):
    values = json.loads(config.to_json())
    section = data.draw(st.sampled_from([values, values["teacher"], values["student"]]))
    name = data.draw(st.sampled_from(sorted(section.keys() - {"teacher", "student"})))
    section[name] = data.draw(st.sampled_from([{}, [[]], float("nan"), -1.5, ""]))
    with pytest.raises(ValueError, match=name) as caught:
        Config.from_json(json.dumps(values))
    assert "\n" not in str(caught.value)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=5)


@given(JSON.filter(lambda value: value != {}))
@settings(max_examples=50)
def test_any_other_json_is_refused(value):
    with pytest.raises(ValueError):
        Config.from_json(json.dumps(value))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name)
    assert Config.from_json(config.to_json()) == config
    for phase in (config.teacher, config.student):
        assert phase.model in names() or phase.model.startswith("timm:")


def test_recipes_are_those_of_the_papers():
    crd = preset("cifar100-crd:vgg13-MobileNetV2")
    eekd = preset("cifar100-eekd:resnet56-resnet20")
    assert (crd.teacher.lr, crd.student.lr) == (0.05, 0.01)
    assert (crd.student.temperature, crd.student.alpha) == (4, 0.1)
    assert [m * crd.teacher.epochs for m in crd.teacher.milestones] == [150, 180, 210]
    assert [m * eekd.student.epochs for m in eekd.student.milestones] == pytest.approx([60, 120, 180])
    assert StudentTrainer.settings(eekd).temperature == 5 and (eekd.student.alpha, eekd.student.nesterov) == (0.5, True)
    resnets, deit = preset("imagenet-r34-r18"), preset("imagenet-deit-s").student
    for phase in (resnets.teacher, resnets.student):
        assert (phase.epochs, phase.batch_size, phase.lr, phase.weight_decay) == (100, 256, 0.1, 1e-4)
        assert [m * phase.epochs for m in phase.milestones] == [30, 60, 90] and not phase.nesterov
    assert (deit.mixup, deit.cutmix, deit.label_smoothing, deit.erasing, deit.ema) == (0.8, 1.0, 0.1, 0.25, 0.99996)
    assert (deit.lr, deit.epochs, deit.repeats, deit.arguments()) == (1e-3, 300, 3, {"drop_path_rate": 0.1})


def test_choices_agree_with_the_modules_that_take_them():
    assert student_names() == ("ce", *weightings.names())
    assert get_args(get_type_hints(Config)["augment"]) == ("auto", *AUGMENTATIONS)
    assert get_args(get_type_hints(Phase)["auto_augment"]) == POLICIES


def test_configs_are_frozen_and_hashable():
    config = Config()
    assert hash(config) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("kind", [Config, Teacher, Student])
def test_every_choice_is_accepted(kind):
    for name, annotation in get_type_hints(kind).items():
        if get_origin(annotation) is Literal:
            for choice in get_args(annotation):
                assert getattr(kind(**{name: choice}), name) == choice


@pytest.mark.bad_input
@pytest.mark.parametrize(("kind", "name", "value", "wanted"), [
    *[(kind, "epochs", value, "must be") for kind in (Teacher, Student) for value in (0, -1, 1.5, "3", True)],
    *[(kind, "batch_size", value, "must be") for kind in (Teacher, Student) for value in (0, 2.0, None)],
    *[(kind, "lr", value, "must be") for kind in (Teacher, Student)
      for value in (0, -0.1, float("nan"), float("inf"), "0.1", None)],
    (Teacher, "weight_decay", -1e-4, "at least 0"),
    (Teacher, "optimizer", "adam", "one of sgd, adamw, got 'adam'; did you mean 'adamw'"),
    (Teacher, "schedule", "cosin", "did you mean 'cosine'"),
    (Student, "schedule", "cyclic", "one of step, cosine, one_cycle"),
    (Student, "warmup_epochs", 20, "from 0 to below epochs (20)"),
    (Student, "warmup_epochs", -1, "from 0 to below epochs (20)"),
    (Student, "min_lr", 0.2, "from 0 to lr (0.1)"),
    (Student, "min_lr", 0.01, "0 with schedule step"),
    (Student, "clip_grad", 0, "above 0"),
    (Teacher, "milestones", (0.5, 0.4), "rising fractions"),
    (Teacher, "milestones", (0.5, 0.5), "rising fractions"),
    (Teacher, "milestones", (0.0,), "rising fractions"),
    (Teacher, "milestones", (60, 120), "rising fractions"),
    (Teacher, "milestones", 0.5, "a list"),
    (Teacher, "milestones", ("a",), "a finite number"),
    (Teacher, "snapshots", 0, "from 1 to teacher.epochs"),
    (Teacher, "snapshots", 21, "from 1 to teacher.epochs (20)"),
    (Teacher, "model", "", "some text"),
    (Teacher, "model", None, "some text"),
    (Teacher, "nesterov", 1, "true or false"),
    (Student, "temperature", 0, "above 0"),
    (Student, "temperature", float("inf"), "finite"),
    (Student, "alpha", 1.01, "from 0 to 1"),
    (Student, "alpha", -0.01, "from 0 to 1"),
    (Student, "fusion", "logits", "did you mean 'logit'"),
    (Student, "attention_objective", "labels", "did you mean 'label'"),
    (Student, "embed_dim", 0, "at least 1"),
    (Student, "scale", 0.0, "above 0"),
    (Student, "normalize", None, "true or false"),
    (Student, "detach_query", "no", "true or false"),
    (Config, "data", 7, "some text"),
    (Config, "root", "", "some text or nothing"),
    (Config, "image_size", 0, "at least 1"),
    (Config, "train_limit", 0, "at least 1"),
    (Config, "train_limit", 1e4, "a whole number or nothing"),
    *[(Config, "val_fraction", value, "val_fraction must be") for value in (0, 1, -1, float("nan"))],
    (Config, "split_seed", -1, "at least 0"),
    (Config, "augment", "flip", "one of auto, none, crop, crop-flip"),
    (Config, "workers", -1, "at least 0"),
    (Config, "teacher", {"epochs": 3}, "a Teacher"),
    (Config, "student", Teacher(), "a Student"),
    (Config, "teacher_run", 3, "some text or nothing"),
    (Config, "students", ["ce"], "a list"),
    (Config, "students", ("ce", "ce"), "different"),
    (Config, "students", ("ce", "kd"), "one of ce, last"),
    (Config, "students", ("atention",), "did you mean 'attention'"),
    (Config, "students", "ce", "a list"),
    *[(Config, "seed", value, "seed must be") for value in (-1, 2**31, 0.5)],
    (Config, "device", "", "some text"),
    (Config, "precision", "BF16", "did you mean 'bf16'"),
    (Config, "compile", "yes", "true or false"),
])  # fmt: skip
def test_bad_values(kind, name, value, wanted):
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert wanted in message and name in message and "\n" not in message


@pytest.mark.bad_input
@pytest.mark.parametrize(("make", "wanted"), [
    (lambda: Teacher(schedule="cyclic", epochs=11), "a multiple of teacher.snapshots (5)"),
    (lambda: Config(student=Student(beta=1.0), students=("dkd", "ce", "fitnet")), "at most one of dkd, fitnet with st"),
    (lambda: Config(teacher_run="runs/x", students=()), "at least one when teacher_run"),
    (lambda: preset("digit"), "did you mean 'digits'"),
    (lambda: preset("cifar100-crd:resnet56-resnet21"), "did you mean 'cifar100-crd:resnet56-resnet20'"),
    (lambda: preset("zzz"), "preset must be one of glyphs, digits"),
    (lambda: Config.from_json("{"), "not JSON"),
    (lambda: Config.from_json("[]"), "must be an object"),
    (lambda: Config.from_json('{"teacher": 3}'), "teacher must be an object"),
    (lambda: Config.from_json('{"epochs": 3}'), "epochs is not a setting"),
    (lambda: Config.from_json('{"teacher": {"epoch": 3}}'), "did you mean 'epochs'"),
    (lambda: Config.from_json('{"teacher": {"_prefix": "x"}}'), "not a setting"),
    (lambda: Config.from_json('{"seed": NaN}'), "seed must be a whole number"),
])  # fmt: skip
def test_bad_configs(make, wanted):
    with pytest.raises(ValueError) as caught:
        make()
    assert wanted in str(caught.value)


@pytest.mark.bad_input
def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Config.load(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text('{"sed": 1}')
    with pytest.raises(ValueError, match=r"config.json: sed is not a setting; did you mean 'seed'"):
        Config.load(tmp_path / "config.json")


def test_nearest():
    assert nearest("RESNET20", ("resnet20", "resnet32")) == "; did you mean 'resnet20'?"
    assert nearest("zzz", ("resnet20",)) == ""
