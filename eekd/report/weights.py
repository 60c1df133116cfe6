"""The parts of a page on the weights of snapshots: how they moved, and whether uniform ones would be better."""

import math

from eekd.method import weightings
from eekd.report.charts import NLL, Html, Line, grid, lines, missing, note, percent, tag
from eekd.report.run import Run


def attention(run: Run) -> list[Html]:
    shown, fixed = [], {entry.name for entry in weightings.registered() if not entry.per_sample}
    for net in run.students:
        rows = [row for row in net.rows if len(row.get("weights") or ()) > 1]
        if not rows or net.name in fixed:
            continue
        m, ends = len(rows[0]["weights"]), [rows[0]["epoch"], rows[-1]["epoch"]]
        each = []
        for i in range(m):
            colour = f"color-mix(in oklab, var(--late) {100 * i / max(m - 1, 1):.0f}%, var(--early))"
            points = [(row["epoch"], row["weights"][i]) for row in rows]
            each.append(Line(f"snapshot {i + 1}", colour, points))
        even, most = (
            [Line("uniform", "var(--quiet)", [(epoch, value) for epoch in ends], True)]
            for value in (1 / m, math.log(m))
        )
        entropy = [net.line("weight_entropy", name="weights")]
        shown += [
            tag("h3", net.title),
            grid(
                lines("Mean weight", "epoch", "weight", each + even, "in training"),
                lines("Entropy", "epoch", "entropy, nats", entropy + most, "mean over samples"),
            ),
        ]
    if not shown:
        return [missing("No student here has weights that depend on the sample.")]
    return [note("Low entropy under even mean weights says that samples follow different snapshots."), *shown]


def uniform(run: Run) -> list[Html]:
    ends = {net.name: net.known["test"]["accuracy"] for net in run.students if net.known}
    shown = []
    for net in run.students:
        rows = [row for row in net.rows if len(row.get("weights") or ()) > 1]
        pairs = [(row.get("val_target_nll"), row.get("val_target_nll_uniform")) for row in rows]
        pairs = [pair for pair in pairs if None not in pair]
        if net.name == "uniform" or not pairs:
            continue
        (own, even), lower = pairs[-1], sum(a < b for a, b in pairs)
        verdict = "no" if own < even else "yes" if own > even else "neither better nor worse"
        words = [
            f"For the target, {verdict}: in the last epoch its −log p of the true label is {own:.3f},",
            f"with uniform weights {even:.3f}; it was lower in {lower} of {len(pairs)} epochs.",
        ]
        if net.name == "confidence":
            words.append("These weights are computed from the true label, so this was to be expected.")
        if net.name in ends and "uniform" in ends:
            words += [
                f"For the student: it has {percent(ends[net.name])} % on test images,",
                f"the one trained with uniform weights {percent(ends['uniform'])} %.",
            ]

        def chart(title, y, key, *words, net=net, **log):
            even = net.line(f"{key}_uniform", name="uniform weights", colour="var(--uniform)")
            return lines(title, "epoch", y, [net.line(key, name="these weights"), even], *words, **log)

        shown += [
            tag("h3", net.title),
            tag("p", " ".join(words)),
            grid(
                chart("Is the target right?", NLL, "val_target_nll"),
                chart(
                    "How far is the student from it?",
                    "α CE + (1 − α) τ² KL, nats",
                    "val_kd_loss",
                    "log scale",
                    log=True,
                ),
            ),
        ]
    if not shown:
        return [missing("No student here weighs several snapshots other than uniformly.")]
    return [note("The same student before two targets, on validation images; lower is better."), *shown]
