"""The methods that can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eekd.compare.variants import parts, titled, written
from eekd.io.files import nearest
from eekd.method import weightings
from eekd.method.rivals import RIVALS, Rival
from eekd.train.checked import title_of
from eekd.train.config import Config, Student
from eekd.user_code import is_file_name, own_name

FORMAT = 1
KINDS = {
    "ordinary": "one training",
    "cyclic": "one training, cyclic schedule",
    "sed": "independent trainings",
    "soup": "one training, mean of its last weights",
}
NEWEST = 3  # snapshots that last-3 and soup take

# Which of the student's settings of distillation are read, by weighting; those of OTHERS are all that have no entry.
_KD, _TARGET = ("temperature", "alpha"), ("fusion", "embed_dim", "normalize", "scale")
READ = {
    **{name: _KD for name in ("last", "curriculum")},
    **{name: ("temperature", "beta") for name in ("dkd", "dist")},
    **{name: ("temperature", "beta", *_TARGET) for name in ("attention_dkd", "attention_dist")},
    **{name: ("beta",) for name in ("fitnet", "at", "crd")},
    "ce": (),
    "attention": (*_KD, *_TARGET, "attention_objective", "detach_query"),
    "attention_tau1": (*_KD, *_TARGET),
}
OTHERS = (*_KD, "fusion")


@dataclass(frozen=True)
class Method:
    """A way to teach: which snapshots of which teacher, and how they are put together."""

    title: str
    weighting: str  # or "ce", without a teacher
    teacher: Literal["ordinary", "cyclic", "sed", "soup"] = "ordinary"
    snapshots: int | Literal["half"] | None = None  # M, or the one at half-time; None: teacher.snapshots
    newest: int | None = None  # of these only so many, the last ones
    fusion: Literal["probability", "logit"] = "probability"
    objective: Literal["label", "kl"] = "label"  # of the attention
    online: bool = False  # the snapshots run in every step, in place of their logit bank
    settings: dict[str, Any] = field(default_factory=dict)  # of the student, in place of those that all share

    def student(self, config: Config) -> Student:
        """The settings of its student; ValueError where they do not go together."""
        settings = {"fusion": self.fusion, "attention_objective": self.objective} | self.settings
        return replace(config.student, **settings)

    @property
    def unread(self) -> list[str]:
        """The settings that it has in place of those that all share, but that change nothing."""
        known = READ.get(self.weighting, self.settings if is_file_name(self.weighting) else OTHERS)
        return [name for name in self.settings if name in (*READ["attention"], "beta") and name not in known]

    def own(self, config: Config) -> dict[str, float]:
        """τ and β of its student where they are neither in its name nor what all share: as published, or as given."""
        student, published = self.student(config), self.rival.settings if self.rival else {}
        used = {name: value for name, value in published.items() if getattr(student, name) is None}
        if "beta" in published and student.beta is not None and "beta" not in self.settings:
            used["beta"] = student.beta
        return used

    def epochs(self, config: Config) -> list[int]:
        """After which epochs of its teacher the snapshots were saved; [] where there is none."""
        from eekd.snapshots.manifest import stage_ends  # torch comes after the command line is read

        if self.weighting == "ce":
            return []
        total = config.teacher.epochs
        if self.snapshots == "half":
            return [max(1, total // 2)]
        m = self.snapshots or config.teacher.snapshots
        return [total] * m if self.teacher == "sed" else stage_ends(total, m)[-(self.newest or m) :]

    @property
    def rival(self) -> Rival | None:
        """Its entry in eekd.method.rivals."""
        return RIVALS.get(self.weighting)

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.weighting != "ce"

    @property
    def runs(self) -> bool:
        """Whether the snapshots run beside the student."""
        return self.online or (self.rival is not None and self.rival.maps)

    def banked(self, augmented: bool) -> bool:
        """Whether the student needs a bank, which says to all but -online which augmentation there is to see."""
        return self.taught and not self.runs or augmented and not self.online


SWEEP = 2, 3, 10  # values of M beside 1, which is `last`, and teacher.snapshots

# Those of the paper, by which its claims are judged.
METHODS: dict[str, Method] = {
    "ce": Method(title_of("ce"), "ce"),
    "last": Method(title_of("last"), "last", snapshots=1),
    "half": Method("KD (half-way)", "last", snapshots="half"),
    **{name: Method(title_of(name), name) for name in weightings.names() if name != "last"},
    "attention-kl": Method("EEKD, objective kl", "attention", objective="kl"),
    "attention-logit": Method("EEKD, logit fusion", "attention", fusion="logit"),
    "attention-kl-logit": Method("EEKD, objective kl, logit fusion", "attention", objective="kl", fusion="logit"),
    "uniform-logit": Method("uniform, logit fusion", "uniform", fusion="logit"),
    "sed": Method("SED: M teachers, uniform", "uniform", "sed"),
    "cyclic-uniform": Method("cyclic teacher, uniform", "uniform", "cyclic"),
    "cyclic-attention": Method("cyclic teacher, EEKD", "attention", "cyclic"),
    **{f"{name}-m{m}": Method(f"{title_of(name)}, M = {m}", name, snapshots=m)
       for m in SWEEP for name in ("uniform", "attention")},
}  # fmt: skip
PAPER = tuple(METHODS)

METHODS |= {
    "last-3": Method("uniform, last 3", "uniform", newest=NEWEST),
    "soup": Method("KD (soup of the last 3)", "last", "soup", snapshots=1),
    "ema": Method("KD (last), EMA of the student", "last", snapshots=1, settings={"ema": 0.99}),
    **{name.replace("_", "-"): Method(rival.title, name, snapshots=None if rival.all_snapshots else 1)
       for name, rival in RIVALS.items()},
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name, or path/to/file.py:NAME; with -online appended, taught by snapshots that run.

    NAME@SETTING=VALUE,… is a variant of it. A file is not run here. ValueError names the nearest, or what
    `eekd.compare.variants.parts` does.
    """
    name, settings = parts(name)
    base = name.removesuffix("-online")
    if base not in METHODS and base in weightings.names():  # registered since
        METHODS[base] = Method(title_of(base), base)
    if base not in METHODS and not is_file_name(base):
        raise ValueError(f"no method {name!r}{nearest(base, METHODS) or '; there are ' + ', '.join(METHODS)}")
    chosen = METHODS.get(base) or Method(title_of(base), base)
    if settings:
        chosen = replace(chosen, title=chosen.title + titled(settings), settings=chosen.settings | settings)
    return chosen if name == base else replace(chosen, title=f"{chosen.title}, online", online=True)


def spelled(name: str) -> str:
    """A method's name with - where eekd train has _, as in attention_dkd."""
    base, at, settings = name.partition("@")
    known = {other.replace("-", "_"): other for other in METHODS}
    return known.get(base, base) + at + settings


def folder_of(name: str) -> str:
    """The name of a method's folder: NAME of path/to/file.py:NAME, other names as they are, equal variants alike."""
    name, settings = parts(name)
    base = name.removesuffix("-online")
    return own_name(base) + name[len(base) :] + written(settings)


def base_of(folder: str) -> str:
    """The method that a folder's name is a variant of, or is."""
    return folder.partition("@")[0].removesuffix("-online")


def representatives(known: Mapping[str, tuple[int, float]]) -> dict[str, str]:
    """Which of these names, of each its number of seeds and mean accuracy, stands for each method.

    Itself, else its variant of most seeds, and of these that of the highest mean.
    """
    chosen = {}
    for name in sorted(known, key=lambda name: ("@" not in name, known[name]), reverse=True):
        chosen.setdefault(name.partition("@")[0], name)
    return chosen


def online(folder: str) -> str:
    """The folder of the same method without a bank."""
    base, at, settings = folder.partition("@")
    return f"{base}-online{at}{settings}"
