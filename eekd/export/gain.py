"""What a user gains, in one line at the end of a run."""

from pathlib import Path

import torch

from eekd import models
from eekd.export.latency import latencies
from eekd.io.files import read_json


def gain(run: Path) -> str:
    """Size, speed and accuracy of a run's student against its teacher, in one sentence; "" where nobody was taught.

    The student is that of attention, else the last one that was taught. Accuracy is that on test images, over several
    seeds the mean. Speed is measured now, on the CPU, with 32 images at once. Of images larger than 64 x 64 it is with
    fewer, which have as many pixels together, for large networks would take minutes.
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
    count = min(32, max(1, 32 * 64**2 // size**2))
    images = torch.zeros(count, record["spec"]["in_channels"], size, size)
    times = latencies(networks, images, seconds=0.3, least=3)
    speed = times["teacher"]["p50"] / times["student"]["p50"]
    share = rows[name]["parameters"] / rows["teacher"]["parameters"]
    student, teacher = (row["test"]["mean"] if seeds else row["test_accuracy"] for row in (rows[name], rows["teacher"]))
    points = 100 * (student - teacher)
    accuracy = f"{abs(points):.2f} points {'more' if points > 0 else 'less'} accuracy" if points else "its accuracy"
    return (
        f"The student taught by {name} has {share:.{0 if share >= 0.1 else 1}%} of the teacher's parameters, "
        f"{speed:.1f} times its speed on this CPU, and {accuracy}."
    )
