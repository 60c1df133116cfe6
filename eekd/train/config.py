"""The settings of a run: frozen dataclasses, which eekd.train.checked checks when they are made, stored as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from eekd.io.files import json_bytes, nearest
from eekd.method.rivals import RIVALS
from eekd.train.checked import Checked, StudentName
from eekd.user_code import is_file_name, own_name

MOST_BETA = 100  # of mixup and cutmix, beyond which a share is one half


@dataclass(frozen=True)
class Phase(Checked):
    """How one network is trained."""

    model: str = "resnet8"  # a name of eekd.models, timm:NAME or path/to/file.py:factory
    layer: str | None = None  # the layer whose input is the feature for the attention; none: the last linear layer
    # which of several outputs are the logits: a number in a tuple, or a name; none: .logits, ["logits"] or the first
    output: str | None = None
    # weights to start from: the file or folder of a checkpoint, or timm for timm's own weights; none: random weights
    weights: str | None = None
    # the normalisation of this network's images, after scaling to [0, 1]: a number for each channel; timm: as the timm
    # model was trained; data: mean and std of the data. None: that of the weights, if it is known, else data
    mean: tuple[float, ...] | Literal["timm", "data"] | None = None
    std: tuple[float, ...] | Literal["timm", "data"] | None = None
    epochs: int = 20
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd has momentum 0.9
    lr: float = 0.1
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)  # step: divide lr by 10 at these fractions of training
    warmup_epochs: float = 0.0  # step and cosine: lr rises linearly for this many epochs
    min_lr: float = 0.0  # cosine: the last learning rate
    clip_grad: float | None = None  # largest norm of all gradients together; none: no limit
    auto_augment: Literal["none", "trivial", "rand"] = "none"  # applied after --augment, by the workers; needs Pillow
    erasing: float = 0.0  # probability that a rectangle of an image takes the mean colour
    mixup: float = 0.0  # A: an image's share in its mixture with another is drawn from Beta(A, A); 0: no mixup
    cutmix: float = 0.0  # the same, with a box of the other image; with mixup each image takes one of the two
    label_smoothing: float = 0.0  # probability that is spread over all classes
    repeats: int = 1  # views of an image in a batch; an epoch then takes one of so many images
    ema: float = 0.0  # decay of a moving average of the weights, which is then validated and kept; 0: no average
    layer_decay: float = 1.0  # lr of a layer divided by the lr of the next layer; timm's models only
    grad_checkpointing: bool = False  # save memory: compute activations again in the backward, if the model supports it
    model_args: tuple[str, ...] = ()  # the model's own arguments, such as drop_path_rate=0.1

    def _rules(self):
        marks = self.milestones
        yield "epochs", self.epochs >= 1, "at least 1"
        yield "batch_size", self.batch_size >= 1, "at least 1"
        yield "lr", self.lr > 0, "above 0"
        yield "weight_decay", self.weight_decay >= 0, "at least 0"
        yield "warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"from 0 to below epochs ({self.epochs})"
        ramps = self.schedule in ("step", "cosine")
        yield "warmup_epochs", not self.warmup_epochs or ramps, f"0 with schedule {self.schedule}"
        yield "min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to lr ({self.lr})"
        yield "min_lr", not self.min_lr or self.schedule == "cosine", f"0 with schedule {self.schedule}"
        yield "clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"
        yield "erasing", 0 <= self.erasing <= 1, "from 0 to 1"
        yield "mixup", 0 <= self.mixup <= MOST_BETA, f"from 0 to {MOST_BETA}"
        yield "cutmix", 0 <= self.cutmix <= MOST_BETA, f"from 0 to {MOST_BETA}"
        yield "label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"
        yield "repeats", self.repeats >= 1, "at least 1"
        yield "repeats", self.batch_size % max(self.repeats, 1) == 0, f"a divisor of batch_size ({self.batch_size})"
        yield "ema", 0 <= self.ema < 1, "from 0 to below 1"
        yield "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1"
        named = [word.partition("=") for word in self.model_args]
        names = [name for name, *_ in named]
        good = all(name.isidentifier() and equals for name, equals, _ in named) and len({*names}) == len(names)
        yield "model_args", good, "words of the form name=value with different names"
        yield from self._rules_of_normalization()
        yield (
            "milestones",
            all(0 < m < 1 for m in marks) and list(marks) == sorted(set(marks)),
            "rising fractions of training between 0 and 1",
        )

    def _rules_of_normalization(self):
        mean, std, timm, scaled = self.mean, self.std, self.model.startswith("timm:"), "as images are scaled"
        if isinstance(mean, tuple):
            yield "mean", mean and all(0 <= x <= 1 for x in mean), f"numbers from 0 to 1, {scaled}"
        if isinstance(std, tuple):
            yield "std", all(0 < x <= 1 for x in std), f"numbers up to 1, {scaled}"
        if isinstance(mean, tuple) and isinstance(std, tuple):
            yield "std", len(std) == len(mean), f"{len(mean)} numbers, as many as mean"
        else:
            many = f"{len(mean)} numbers, as many as mean" if isinstance(mean, tuple) else None
            yield "std", std == mean, many or f"{mean or 'left out'}, as mean is"
        yield "mean", timm or mean != "timm", "numbers or data where model is no timm:NAME"
        yield "weights", timm or self.weights != "timm", "a file or a folder where model is no timm:NAME"

    def arguments(self) -> dict[str, Any]:
        """`model_args` by name: a value that is JSON is what it says, true and 0.1, and any other is text."""

        def read(text: str) -> Any:
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                return text

        return {name: read(value) for name, _, value in (word.partition("=") for word in self.model_args)}


@dataclass(frozen=True)
class Teacher(Phase):
    """The teacher: one ordinary training run that keeps snapshots."""

    _prefix = "teacher."

    schedule: Literal["step", "cosine", "one_cycle", "cyclic"] = "step"  # cyclic: one cosine cycle per snapshot
    snapshots: int = 5  # M; one at the end of each of M equal stages

    def _rules(self):
        yield from super()._rules()
        yield "snapshots", 1 <= self.snapshots <= self.epochs, f"from 1 to teacher.epochs ({self.epochs})"
        yield (
            "epochs",
            self.schedule != "cyclic" or self.epochs % self.snapshots == 0,
            f"a multiple of teacher.snapshots ({self.snapshots}) when teacher.schedule is cyclic",
        )


@dataclass(frozen=True)
class Student(Phase):
    """The students. All start from the same weights and see the same images; only the loss differs."""

    _prefix = "student."

    model: str = "resnet8_w4"
    temperature: float | None = None  # none: the method's own; 5 where it has no other
    alpha: float = 0.5  # loss = alpha CE + (1 - alpha) temperature^2 KL
    fusion: Literal["probability", "logit"] = "probability"
    attention_objective: Literal["label", "kl"] = "label"  # which loss trains the attention
    embed_dim: int = 8  # width of query and keys
    normalize: bool = True  # layer norm of the features before the attention's maps
    scale: float | None = None  # factor of query . key; none: 1/sqrt(embed_dim)
    detach_query: bool = True  # no gradient from the attention to the student's features
    beta: float | None = None  # weight of what the methods of others add to the loss; none: as published

    def _rules(self):
        yield from super()._rules()
        yield "temperature", self.temperature is None or self.temperature > 0, "above 0"
        yield "alpha", 0 <= self.alpha <= 1, "from 0 to 1"
        yield "embed_dim", self.embed_dim >= 1, "at least 1"
        yield "scale", self.scale is None or self.scale > 0, "above 0"
        yield "beta", self.beta is None or self.beta >= 0, "at least 0"


@dataclass(frozen=True)
class Config(Checked):
    """A whole run: the data, the teacher and the students."""

    # glyphs, digits, fashion-mnist, cifar10, cifar100, a folder, a table, path/to/file.py:NAME or a Hugging Face id
    data: str = "digits"
    root: str | None = None  # the folder of the data's files; none: the usual places
    # resize images to this; none: their own size if most are squares of up to 64, else 224
    image_size: int | None = None
    # how images are resized. auto: as the weights that networks start from were trained, else bilinear
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    channels: int | None = None  # 1: grey, 3: colour; none: 1 if all images of a sample are grey, else 3
    classes: str | None = None  # a file with the names of the classes in order, one per line; none: alphabetical order
    split: str | None = None  # names of the splits, if they are unusual: TRAIN or TRAIN,TEST or TRAIN,VAL,TEST
    image_column: str | None = None  # the column of images in a table, if its type does not tell
    label_column: str | None = None  # the column of labels in a table, if its type does not tell
    config_name: str | None = None  # the configuration of a Hugging Face dataset
    streaming: bool = False  # store nothing of a Hugging Face dataset on disk; needs train_limit
    bad_images: Literal["stop", "skip"] = "stop"  # what to do at an image that cannot be read; skip: take another
    bad_image_budget: int = 10  # images that may be skipped
    train_limit: int | None = None  # use only this many training images
    val_fraction: float = 0.1  # fraction of the training images that is held out for validation
    split_seed: int = 0  # which images are held out
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"  # auto: what suits the data
    workers: int = 0  # processes that decode images; 0: the training process decodes them
    teacher: Teacher = Teacher()  # one ordinary training run, which keeps snapshots
    teacher_run: str | None = None  # an earlier run whose teacher to use (--teacher RUN)
    # snapshots of a teacher that others trained, in the order of training, or folders of them; they fit teacher.model
    checkpoints: tuple[str, ...] = ()
    checkpoint_entry: str | None = None  # which weights to take if a checkpoint holds several, such as ema
    bank: str | None = None  # a logit bank of that teacher, read instead of running the teacher (--bank PATH)
    # where the snapshots' weights are. cpu: in host memory, two at a time on the GPU; ranks: spread over the processes
    snapshots_on: Literal["device", "cpu", "ranks"] = "device"
    student: Student = Student()  # all start from the same weights and see the same images; only the loss differs
    # one student is trained for each name; your own weighting or trainer is path/to/file.py:NAME.
    # none: ce, last and attention_dkd, or attention in its place where images are mixed or labels smoothed
    students: tuple[StudentName, ...] | None = None
    seed: int = 0  # of weights, order of images and augmentation
    seeds: int = 1  # run everything this many times, with seed, seed + 1, ...
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: replicas of a network, or shards (fully_shard)
    accumulate: int = 1  # run a batch in this many parts; batch_size is that of a whole step
    sync_batchnorm: bool = False  # batch norm over the images of all processes
    check_replicas: int = 0  # check every so many steps that all processes have the same weights; 0: at the end only
    # auto: bf16 where the hardware supports it, else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile the networks in training
    channels_last: Literal["auto", True, False] = "auto"  # auto: on a CPU, except with fsdp
    deterministic: bool = False  # the same bits in every run on the same machine; slower on a GPU
    tensorboard: bool = False  # write events for TensorBoard too
    wandb: bool = False  # log to Weights & Biases too
    mlflow: bool = False  # log to MLflow too
    save_every: float = 300.0  # seconds between checkpoints within an epoch; each epoch ends with one
    non_finite: Literal["stop", "skip"] = "stop"  # what to do at a step whose loss or gradients are NaN or infinite
    skip_budget: int = 10  # steps that may be skipped in a phase
    verify_loss: int = 1  # compare the loss of a student's first batches with its formula in fp64; 0: none

    def _rules(self):
        yield "image_size", self.image_size is None or self.image_size >= 1, "at least 1"
        yield "channels", self.channels in (None, 1, 3), "1 or 3"
        yield "streaming", not self.streaming or self.train_limit is not None, "false without train_limit"
        yield "bad_image_budget", self.bad_image_budget >= 0, "at least 0"
        yield "train_limit", self.train_limit is None or self.train_limit >= 1, "at least 1"
        yield "val_fraction", 0 < self.val_fraction < 1, "between 0 and 1"
        yield "split_seed", self.split_seed >= 0, "at least 0"
        yield "workers", self.workers >= 0, "at least 0"
        names = [own_name(name) for name in self.students or ()]  # which are those of their folders
        yield "students", len(set(names)) == len(names), "different from each other"
        with_beta = [name for name in self.students or () if name in RIVALS and "beta" in RIVALS[name].settings]
        alone = f"at most one of {', '.join(with_beta)} with student.beta {self.student.beta}, a weight for one loss"
        yield "students", self.student.beta is None or len(with_beta) < 2, alone
        yield "students", self.students != () or not self.teacher_run, "at least one when teacher_run is given"
        one_teacher = not (self.checkpoints and (self.teacher_run or self.bank))
        yield "checkpoints", one_teacher, "left out beside a teacher's run"
        yield "students", self.students != () or not self.checkpoints, "at least one when checkpoints are given"
        yield "checkpoints", not (self.checkpoints and self.teacher.weights), "left out beside teacher.weights"
        yield "accumulate", self.accumulate >= 1, "at least 1"
        yield "check_replicas", self.check_replicas >= 0, "at least 0"
        yield "parallel", self.parallel == "ddp" or self.precision != "fp16", "ddp when precision is fp16"
        yield "save_every", self.save_every > 0, "above 0"
        yield "skip_budget", self.skip_budget >= 0, "at least 0"
        yield "verify_loss", self.verify_loss >= 0, "at least 0"
        yield "seed", 0 <= self.seed < 2**31, "from 0 to 2**31 - 1"
        yield "seeds", 1 <= self.seeds <= 2**31 - self.seed, "at least 1"

    @property
    def data_name(self) -> str:
        """What folders and reports call the data: the last part of its path, or NAME of path/to/file.py:NAME."""
        return Path(own_name(self.data)).name or Path(self.data).absolute().name or "data"

    def source(self) -> dict:
        """The arguments of `eekd.data.load` that say what is read, besides name and root."""
        names = "image_size", "channels", "classes", "split", "image_column", "label_column", "config_name"
        return {name: getattr(self, name) for name in names}

    def reading(self) -> dict:
        """The arguments of `eekd.data.load`, besides name and root."""
        names = "val_fraction", "train_limit", "streaming", "bad_images", "bad_image_budget"
        kind = "bilinear" if self.interpolation == "auto" else self.interpolation
        more = {"seed": self.split_seed, "interpolation": kind}
        return self.source() | more | {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; absent fields keep their defaults, unknown ones are a ValueError."""
        try:
            return _read(cls, json.loads(text))
        except (json.JSONDecodeError, OverflowError, RecursionError) as e:
            raise ValueError(f"the config is not JSON: {e}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The config in a file; FileNotFoundError or a ValueError that names the file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no config file at {path}")
        data = json_bytes(path)
        try:
            return cls.from_json(data.decode())
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


def switched(argv: list[str]) -> list[str]:
    """The flags with a value for --channels-last and --no-channels-last where they stand alone."""
    flags = []
    for flag, after in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = flag.partition("=")
        name = name.replace("_", "-")
        if name == "--no-channels-last":
            flags += ["--channels-last", "False"]
        elif name == "--channels-last" and (equals or after.startswith("--")):
            flags += [name, value.capitalize() if value in ("true", "false") else value or "True"]
        else:
            flags.append(flag.capitalize() if flag in ("true", "false") and flags[-1:] == ["--channels-last"] else flag)
    return flags


def settled(config: Config, by: Config) -> Config:
    """The settings with those of `by` wherever they are "auto", or students None, and so leave the choice to others."""
    names = "precision", "channels_last", "interpolation", "students"
    left = [name for name in names if getattr(config, name) in ("auto", None)]
    return dataclasses.replace(config, **{name: getattr(by, name) for name in left})


def located(config: Config) -> Config:
    """The settings with absolute paths, of files of code too: the run can be gone on with from any folder."""
    from eekd.data import names  # torch, and what needs it, comes after the command line is read

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    def code(name: str) -> str:
        return f"{absolute(name.rpartition(':')[0])}:{own_name(name)}" if is_file_name(name) else name

    data, root = code(config.data), absolute(config.root)
    if not is_file_name(data) and root is None and data not in names() and Path(data).expanduser().exists():
        data = absolute(data)

    def phase_located(phase):
        weights = phase.weights if phase.weights == "timm" else absolute(phase.weights)
        return dataclasses.replace(phase, model=code(phase.model), weights=weights)

    paths = {name: absolute(getattr(config, name)) for name in ("classes", "teacher_run", "bank")}
    phases = {name: phase_located(getattr(config, name)) for name in ("teacher", "student")}
    students = config.students and tuple(map(code, config.students))
    return dataclasses.replace(config, data=data, root=root, students=students, **paths, **phases)


def _read(cls: type, values: Any, prefix: str = "") -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the config'} must be an object, got {values!r}")
    kinds = get_type_hints(cls)
    read = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{prefix}{name} is not a setting{nearest(name, kinds)}")
        if dataclasses.is_dataclass(kinds[name]):
            value = _read(kinds[name], value, f"{prefix}{name}.")
        read[name] = tuple(value) if isinstance(value, list) else value
    return cls(**read)


def differences(one: dict, other: dict, prefix: str = "") -> dict[str, tuple]:
    """Where two nested dicts differ: {dotted name: (value in one, value in the other)}, None for what is absent."""
    changed = {}
    for name in one | other:
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed[prefix + name] = a, b
    return changed
