"""Writes a student as files that others can use: eekd export RUN/students/NAME --out FOLDER [--to FORMAT ...]."""

import argparse
from pathlib import Path

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.export import FORMATS
from eekd.io.files import printable

PARSER = argparse.ArgumentParser(prog="eekd export", description="Writes a student as files that others can use.")
PARSER.add_argument("student", help="RUN/students/NAME, a RUN with one student, or an exported folder")
PARSER.add_argument("--out", required=True, help="the new folder to write")
PARSER.add_argument("--to", nargs="+", choices=FORMATS, default=["safetensors"], help="formats (default: safetensors)")
PARSER.add_argument(
    "--int8", action="store_true", help="with onnx: also write a file with 8-bit weights, and print its accuracy"
)
PARSER.add_argument("--data", help="images to check the files on (default: the run's own validation images)")
PARSER.add_argument("--root", help="the folder of a named dataset's files")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code; 2 for any mistake."""
    return command.answer(PARSER, argv, _export)


def _export(given: argparse.Namespace) -> int:
    from eekd.export import export, load_student
    from eekd.export.evaluation import batches, data_of, run_of
    from eekd.export.formats import INT8, ONNX
    from eekd.export.student import WEIGHTS

    student, images, labels, what = load_student(given.student), None, None, "noise"
    if given.data or run_of(Path(given.student)):
        data = data_of(student, given.student, given.data, given.root)
        split, what = ("val", "validation") if len(data.val) > 1 else ("test", "test")
        images, labels = next(batches(student, data, split, 256))
        what = f"{what} images of {Path(data.name).name}"
    checked = export(student, given.out, given.to, images=images, labels=labels, int8=given.int8, what=what)
    files, where = checked["files"], f"{checked['images']} {printable(what)}"
    for name in [name for name in files if name not in (WEIGHTS, INT8)]:
        print(f"{name}: logits within {files[name]['difference']:.2g} of the network's on {where}")
    if given.int8:
        small, whole = files[INT8], files[ONNX]
        why = ", for convolutions keep their fp32 weights" * (small["bytes"] > whole["bytes"] / 2)
        print(f"{INT8}: {small['bytes'] / 1e6:.3g} MB in place of {whole['bytes'] / 1e6:.3g} MB{why}")
        if "accuracy" in small:
            points = 100 * (small["accuracy"] - whole["accuracy"])
            print(f"{INT8}: accuracy {small['accuracy']:.2%} on {where}, {points:+.2f} points against fp32")
    print(f"wrote {printable(given.out)}")
    return 0


if __name__ == "__main__":
    command.run(main)
