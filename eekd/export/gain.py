"""What a user gains, in one line at the end of a run."""

from pathlib import Path

import torch

from eekd import models
from eekd.export.latency import latencies
from eekd.io.files import read_json


def gain(run: Path) -> str:
    """Size, speed and accuracy of a run's student against its teacher, in one sentence; "" where nobody was taught.

    The student is that of attention, else the last one that was taught. Speed is measured now, on the CPU, with 32
    images at once; accuracy is that on test images, over several seeds the mean.
    """
    summary = read_json(run / "summary.json")
    rows = {row["name"]: row for row in summary["rows"] if row["kind"] in ("teacher", "student")}
    names = [name for name in rows if name not in ("teacher", "ce")]
    if not names or "teacher" not in rows:
        return ""
    name, seeds = "attention" if "attention" in names else names[-1], summary.get("seeds")
    record = read_json((run / f"seed-{seeds[0]}" if seeds else run) / "students" / name / "student.json")
    specs = {"student": record["spec"], "teacher": record["teacher"]["spec"]}
    networks = {kind: models.build(**spec).eval() for kind, spec in specs.items()}
    size = record["spec"]["image_size"]
    times = latencies(networks, torch.zeros(32, record["spec"]["in_channels"], size, size), seconds=0.3)
    speed = times["teacher"]["p50"] / times["student"]["p50"]
    share = rows[name]["parameters"] / rows["teacher"]["parameters"]
    student, teacher = (row["test"]["mean"] if seeds else row["test_accuracy"] for row in (rows[name], rows["teacher"]))
    return (
        f"The student taught by {name} has {share:.0%} of the teacher's parameters, {speed:.1f} times its speed on "
        f"this CPU, and {100 * abs(student - teacher):.2f} points {'more' if student > teacher else 'less'} accuracy."
    )
