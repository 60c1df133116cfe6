"""Measures a student: eekd evaluate STUDENT [--data DATA] [--split test] [--json FILE]."""

import argparse
from pathlib import Path

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.io.files import printable, write_json_atomic

SHOWN = 10  # classes and confusions

PARSER = argparse.ArgumentParser(
    prog="eekd evaluate", description="Measures a student, and its teacher if its run is there."
)
PARSER.add_argument("student", help="RUN/students/NAME, a RUN with one student, or an exported folder")
PARSER.add_argument("--data", help="a dataset, as for eekd train (default: the run's own)")
PARSER.add_argument("--root", help="the folder of a named dataset's files")
PARSER.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
PARSER.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
PARSER.add_argument("--json", type=Path, help="write all results to this file, with the whole confusion matrix")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code; 2 for any mistake."""
    return command.answer(PARSER, argv, _evaluate)


def _evaluate(given: argparse.Namespace) -> int:
    from eekd.export import load_student
    from eekd.export.evaluation import data_of, evaluate, teacher_of
    from eekd.info import environment

    student = load_student(given.student, device=given.device)
    data = data_of(student, given.student, given.data, given.root)
    results = evaluate(student, data, given.split, teacher=teacher_of(Path(given.student)))
    print(f"{results['images']:,} images of {printable(data.name)}, {given.split}\n")
    print(f"{'':8} {'accuracy':>9} {'nll':>7} {'ece':>7} {'parameters':>12} {'MB':>8} {'ms p50':>8} {'ms p95':>8}")
    for name in ("student", "teacher"):
        if row := results[name]:
            print(
                f"{name:8} {row['accuracy']:>9.2%} {row['nll']:>7.4f} {row['ece']:>7.4f} {row['parameters']:>12,} "
                f"{row['bytes'] / 1e6:>8.2f} {row['latency']['p50']:>8.3f} {row['latency']['p95']:>8.3f}"
            )
    there = {name: row for name, row in results["per_class"].items() if row["images"]}
    worst = sorted(there, key=lambda name: there[name]["accuracy"])[:SHOWN]
    print("\naccuracy by class" + f", the lowest {SHOWN} of {len(there)}" * (len(there) > SHOWN))
    for name in worst:
        print(f"  {there[name]['accuracy']:>7.2%} of {there[name]['images']:,}  {printable(name)}")
    mistakes = [
        (count, true, taken)
        for true, row in zip(student.classes, results["confusion"], strict=True)
        for taken, count in zip(student.classes, row, strict=True)
        if count and taken != true
    ]
    print("\nmost frequent mistakes")
    for count, true, taken in sorted(mistakes, key=lambda entry: -entry[0])[:SHOWN]:
        print(f"  {count:>6,}  {printable(true)} taken for {printable(taken)}")
    if given.json:
        facts = {"student": str(given.student), "data": data.name, "split": given.split}
        write_json_atomic(given.json, {"format": 1, "environment": environment(), **facts, "found": results})
        print(f"\nwrote {printable(given.json)}")
    return 0


if __name__ == "__main__":
    command.run(main)
