"""The study of docs/results/study.md: which use of a teacher's experience helps a student.

python results/glyphs.py --size 28 --classes 94 --faces 8 --out runs/glyphs94    # the data of two of the settings
python results/study.py tune fashion-mlp --processes 2    # study/NAME-tuning.json
python results/study.py run fashion-mlp --processes 2     # study/NAME.json
python results/study.py time fashion-mlp                  # study/NAME-time.json, on a machine that does nothing else

The same command continues after a kill.

The rules, written before the first run:

1. Settings. Two datasets, Fashion-MNIST reduced to 10,000 training images and the 94 classes of docs/results/glyphs.md;
   for each a student of another family than the teacher's and one of the same. Images are not augmented, so that banks
   are exact.
2. Tuning. Every method has six trials (`eekd compare --tune`), τ with α or its own weight, over the seeds 100 and 101.
   The trial of the highest mean validation accuracy is taken. All trials are kept. Students of independent teachers
   take the trial of `uniform`, and those of other numbers of snapshots that of their weighting.
3. Seeds. Every method then has the seeds 0 to 9. A difference whose interval contains 0 stays undecided; no seeds are
   added for a single method. Test images are read once, after the last epoch.
4. Recipe. The recommended one is chosen by the validation accuracies of the tuning seeds and of the seeds 0 to 9, over
   all settings: of the methods whose interval over `last` lies below 0 in no setting, the one with the highest mean.
   Its test differences over `last` are reported whatever they are.
5. Added when two settings had been run and showed DKD ahead of EEKD: `attention-dkd` and `attention-dist`, which put
   EEKD's target into the losses of DKD and DIST. Validation images of the seeds 100 and 101 alone led to them, and to
   the six trials that each has.

Networks of one dataset share teachers: those of the other setting are copied. To take the time of a few methods' own
training, the seeds 0 and 1 are trained again, one after another, from the finished banks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from eekd.compare.__main__ import main as compare
from eekd.compare.__main__ import parse
from eekd.compare.methods import base_of, folder_of
from eekd.compare.runner import kept_settings
from eekd.io.files import read_json, write_json_atomic
from eekd.train.config import Config, differences, located, settled

KEPT, WORK = Path("results/study"), Path("runs/study")  # from the root of the project, so that records have no others
DATA = {"fashion": ["--data", "fashion-mnist", "--train-limit", "10000"], "glyphs": ["--data", "runs/glyphs94"]}
STUDENTS = {
    "mlp": ["--student.model", "mlp64", "--student.epochs", "20", "--student.lr", "0.1"],
    "resnet": ["--student.model", "resnet8_s2_w4", "--student.epochs", "20", "--student.lr", "0.1"],
}
ENDINGS = {"tune": "-tune", "run": "", "time": "-time"}  # of folders
SEEDS = {"tune": (100, 2), "run": (0, 10), "time": (0, 2)}  # the first, and how many
SETTINGS = [f"{data}-{student}" for data in DATA for student in STUDENTS]
ALL = ["--augment", "none", "--precision", "fp32", "--teacher.model", "resnet8_s2", "--teacher.epochs", "20"]
ALL += ["--teacher.batch-size", "128", "--teacher.schedule", "cosine"]
ALL += ["--student.batch-size", "128", "--student.schedule", "cosine", "--student.temperature", "5"]  # or as tuned
METHODS = [
    *("ce", "last", "half", "uniform", "linear_increase", "attention", "attention-tau1", "last-3", "soup"),
    *("curriculum", "ema", "dkd", "dist", "attention-dkd", "attention-dist", "cyclic-uniform", "cyclic-attention"),
]
UNTUNED = {f"{of}-m{m}": of for m in (2, 10) for of in ("uniform", "attention")} | {"sed": "uniform"}  # tuned as
TIMED = ["ce", "last", "uniform", "attention", "attention-dkd"]
OF_FEATURES = ["fitnet", "at", "crd"]  # a perceptron has no maps for fitnet and at; crd is compared with them


def methods(setting: str) -> list[str]:
    """All methods that are tuned."""
    return METHODS + OF_FEATURES * setting.endswith("resnet")


def chosen(setting: str) -> list[str]:
    """The trial of every method that the tuning chose."""
    trials = read_json(KEPT / f"{setting}-tuning.json")["chosen"]
    return [*trials.values(), *(trials[of].replace(of, name, 1) for name, of in UNTUNED.items())]


def folder(setting: str, what: str) -> Path:
    """Where `eekd compare` keeps a setting's networks."""
    return WORK / (setting + ENDINGS[what])


def check_same(was: dict, now: dict, where: Path) -> None:
    """ValueError, one sentence, where settings are not those with which something was made."""
    for name, (old, new) in differences(was, now).items():
        raise ValueError(f"{name} must be {old!r}, with which {where} was made, got {new!r}")


def share(setting: str, what: str, config: Config) -> None:
    """Copies finished teachers and banks; ValueError where `config` has others.

    They are those of the dataset's other setting, or, to take the time, those that were compared.
    """
    data, _, student = setting.partition("-")
    others = next(name for name in STUDENTS if name != student)
    other = folder(setting, "run") if what == "time" else folder(f"{data}-{others}", what)
    if (other / "settings.json").exists():
        kept = kept_settings(other)
        own = dict(student=kept.student, seed=kept.seed, seeds=kept.seeds)
        check_same(asdict(kept), asdict(replace(located(settled(config, kept)), **own)), other)
    for found in other.glob("seed-*/*/teacher.json"):
        to = folder(setting, what) / found.parent.relative_to(other)
        if not to.exists():
            shutil.copytree(found.parent, to)


def asked_for(record: dict) -> dict:
    """A record's seeds and settings, apart from the students, which the methods decide."""
    config = Config.from_json(json.dumps(record["config"] | {"students": []}))
    return {"seeds": record["seeds"], "config": asdict(config)}


def with_others(new: dict, path: Path) -> dict:
    """A tuning's record, and the trials of other methods that `path` has; ValueError for other seeds or settings."""
    if path.exists():
        old = read_json(path)
        was, now = map(asked_for, (old, new))
        check_same(was, now, path)
        new["trials"] = [trial for trial in old["trials"] if trial["of"] not in new["chosen"]] + new["trials"]
        new["chosen"] = {**old["chosen"], **new["chosen"]}
        new["commits"] = sorted({*old["commits"], *new["commits"]})
    return new


def with_seeds(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the seeds of rules 2 and 3, or those to take the time of, where none are given."""
    first, number = SEEDS[args.what]
    args.first_seed = first if args.first_seed is None else args.first_seed
    args.seeds = number if args.seeds is None else args.seeds
    return args


def in_parts(args: argparse.Namespace) -> int:
    """Makes every seed in a process of its own, and returns the first exit status that is not 0."""
    own = [sys.executable, __file__, args.what, args.setting, "--part", "--seeds", "1"]
    only = ["--only", *args.only] if args.only else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def make(seed: int) -> int:
        return subprocess.run([*own, "--first-seed", str(seed), *only], env=environment).returncode

    with ThreadPoolExecutor(args.processes) as pool:
        codes = pool.map(make, range(args.first_seed, args.first_seed + args.seeds))
        return next((code for code in codes if code), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SEEDS)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--first-seed", type=int, help="0, or 100 to tune")
    parser.add_argument("--seeds", type=int, help="10, or 2 to tune or time")
    parser.add_argument("--processes", type=int, default=1, help="so many seeds beside each other")
    parser.add_argument("--part", action="store_true", help="keep no record: the other seeds are made elsewhere")
    parser.add_argument("--only", nargs="+", help="of the methods only these")
    args = with_seeds(parser.parse_args())
    os.chdir(Path(__file__).parent.parent)
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # a seventh faster for convolutions of so few channels
    data, _, student = args.setting.partition("-")
    tune = args.what == "tune"
    only = args.only or TIMED * (args.what == "time")
    names = methods(args.setting) if tune else chosen(args.setting)
    names = [name for name in names if not only or base_of(folder_of(name)) in only]
    out = folder(args.setting, args.what)
    flags = [*DATA[data], *ALL, *STUDENTS[student], "--first-seed", str(args.first_seed), "--seeds", str(args.seeds)]
    flags += ["--tune"] * tune + ["--out", str(out), "--methods", *names]
    if not args.part:
        share(args.setting, args.what, parse(flags).settings)
    if args.processes > 1 and (code := in_parts(args)):
        return code
    if (code := compare(flags)) or args.part:
        return code
    KEPT.mkdir(exist_ok=True)
    record = read_json(out / ("tuning.json" if tune else "study.json"))
    record["config"]["data"] = DATA[data][1]  # and not where it is on this machine
    kept = KEPT / f"{args.setting}{'-tuning' if tune else ENDINGS[args.what]}.json"
    write_json_atomic(kept, with_others(record, kept) if tune else record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
