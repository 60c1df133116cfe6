"""The methods that can be compared."""

from dataclasses import dataclass, replace
from typing import Literal

from eekd.method import weightings
from eekd.train.checked import nearest, title_of
from eekd.train.config import Config
from eekd.user_code import is_file_name, own_name

FORMAT = 1
KINDS = {"ordinary": "one training", "cyclic": "one training, cyclic schedule", "sed": "independent trainings"}


@dataclass(frozen=True)
class Method:
    """A way to teach: which snapshots of which teacher, and how they are put together."""

    title: str
    weighting: str  # or "ce", without a teacher
    teacher: Literal["ordinary", "cyclic", "sed"] = "ordinary"
    snapshots: int | Literal["half"] | None = None  # M, or the one at half-time; None: teacher.snapshots
    fusion: Literal["probability", "logit"] = "probability"
    objective: Literal["label", "kl"] = "label"  # of the attention
    online: bool = False  # the snapshots run in every step, in place of their logit bank

    def epochs(self, config: Config) -> list[int]:
        """After which epochs of its teacher the snapshots were saved; [] where there is none."""
        from eekd.snapshots.manifest import stage_ends  # torch comes after the command line is read

        if self.weighting == "ce":
            return []
        total = config.teacher.epochs
        if self.snapshots == "half":
            return [max(1, total // 2)]
        m = self.snapshots or config.teacher.snapshots
        return [total] * m if self.teacher == "sed" else stage_ends(total, m)


SWEEP = 2, 3, 10  # values of M beside 1, which is `last`, and teacher.snapshots

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


def method(name: str) -> Method:
    """The method of that name, or path/to/file.py:NAME; with -online appended, taught by snapshots that run.

    A file is not run here. ValueError names the nearest.
    """
    base = name.removesuffix("-online")
    if base not in METHODS and base in weightings.names():  # registered since
        METHODS[base] = Method(title_of(base), base)
    if base not in METHODS and not is_file_name(base):
        raise ValueError(f"no method {name!r}{nearest(base, METHODS) or '; there are ' + ', '.join(METHODS)}")
    found = METHODS.get(base) or Method(title_of(base), base)
    return found if name == base else replace(found, title=f"{found.title}, online", online=True)


def folder_of(name: str) -> str:
    """The name of a method's folder: NAME of path/to/file.py:NAME, any other name as it is."""
    base = name.removesuffix("-online")
    return own_name(base) + name[len(base) :]
