"""`eekd VERB ...`, which is the same as `python -m eekd.VERB ...`."""

import importlib
import sys

from eekd import command
from eekd.io.files import nearest

VERBS = {
    "train": "trains a teacher, keeps its snapshots and distils students",
    "bank": "stores the outputs of a teacher's snapshots for its training images, for many students",
    "compare": "compares ways to teach the same student, over several seeds",
    "predict": "classifies images with a student",
    "evaluate": "measures a student: accuracy, calibration, confusion, size and speed",
    "export": "writes a student as safetensors, torch.export or ONNX, with a card",
    "report": "writes a run as one HTML page",
    "info": "prints versions, what was compiled, and the devices",
    "bench": "checks and times the kernels",
}
MODULES = {verb: f"eekd.{verb}" for verb in ("predict", "evaluate", "info")} | {"bench": "eekd.kernels.bench"}
HELP = "\n".join(
    [
        "usage: eekd VERB [--flag value ...]",
        "",
        *(f"  {verb:8} {what}" for verb, what in VERBS.items()),
        "",
        "  eekd VERB --help                     the flags of a verb",
        "  eekd --version                       the version",
        "  eekd --print-completion bash|zsh     a script that lets the shell complete verbs and flags",
    ]
)


def main(argv: list[str] | None = None) -> int | None:
    """Runs a verb and returns its exit code; 2 for an unknown verb."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in VERBS:
        if verb == "bench":
            from eekd.kernels import options

            options.parse(command.arguments(rest))  # before torch is imported
        return importlib.import_module(MODULES.get(verb, f"eekd.{verb}.__main__")).main(rest)
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if verb == "--print-completion" and rest in (["bash"], ["zsh"]):
        from eekd import completion

        print(completion.script(*rest))
        return 0
    command.arguments([verb])
    if verb == "--print-completion":
        print(f"error: --print-completion must be bash or zsh, got {' '.join(rest) or 'nothing'}", file=sys.stderr)
        return 2
    print(f"error: VERB must be one of {', '.join(VERBS)}, got {verb!r}{nearest(verb, VERBS)}", file=sys.stderr)
    return 2


def run() -> None:
    """The console command: `main` as a process."""
    command.start()
    command.run(main)


if __name__ == "__main__":
    run()
