"""The tables of docs/results/training-speed.md."""

from statistics import median

from eekd.compare import page as comparison
from tables import head, provenance, spread, table_row


def precisions(record: dict) -> str:
    """Seconds of an epoch by settings, on a processor as it is and limited."""
    lines = ["| preset | trained | settings | s | s, limited to AVX2 | × |", "|---|---|---|--:|--:|--:|"]
    for row in record["settings"]:
        names = [row["preset"], row["phase"], row["setting"]]
        if row["setting"] == "preset":
            words = dict.fromkeys(row["computed"].values())
            names[2] = "the preset's: " + (" and ".join(words) if len(words) > 1 else [*words][0])
        whole, limited = row["seconds"].values()
        lines.append(table_row(*names, f"{whole:.2f}", f"{limited:.2f}", f"{limited / whole:.1f}"))
    note = (
        f"An epoch of {record['images']:,} images in one thread. One machine, as it is and limited by "
        "`EEKD_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`, not two machines"
    )
    return "\n".join([*lines, "", f"{note}; {record['note']}. {provenance(record)}"])


def waiting(record: dict) -> str:
    """Seconds of an epoch by how long threads spin, alone and beside a busy process."""
    lines = ["| teacher of | turns | alone | beside a busy process |", "|---|--:|--:|--:|"]
    whose = {"300000": "300,000, libgomp's", "3000": "3,000, eekd's", "0": "0, `OMP_WAIT_POLICY=passive`"}
    for row in record["spins"]:
        cells = (f"{row['seconds'][busy]:.2f}" if busy in row["seconds"] else "" for busy in ("0", "1"))
        lines.append(table_row(row["preset"], whose[row["spins"]], *cells))
    note = (
        f"Seconds of an epoch of {record['images']:,} images in two threads, which have two cores for themselves, or "
        "share them with a process that is always busy and the machine's other work"
    )
    return "\n".join([*lines, "", f"{note}; {record['note']}. {provenance(record)}"])


def beside(record: dict) -> str:
    """Seconds and accuracy of plain distillation by others' losses, and by eekd."""
    lines, config = head("", "s per epoch", "test accuracy, %"), record["config"]
    for name, runs in record["beside"].items():
        seconds = median(second for run in runs for second in run["seconds"])
        lines.append(table_row(name, f"{seconds:.2f}", spread([run["test"] for run in runs], 100)))
    size = f"{config['train_limit']:,} images, {config['student']['epochs']} epochs"
    words = f"{len(runs)} seeds of preset `{record['preset']}`, with {size}, fp32"
    return "\n".join([*lines, "", f"{words}. {provenance(record)}"])


def throughput(record: dict) -> str:
    """Images a second of eekd's loader and torchvision's."""
    lines = head("transforms", "workers", "eekd", "torchvision", "×")
    for row in record["loaders"]:
        rates = [f"{median(row['images per second'][name]):.0f}" for name in ("eekd", "torchvision")]
        lines.append(table_row(row["transforms"], str(row["workers"]), *rates, f"{row['ratio']:.2f}"))
    words = f"Images a second, JPEGs of 500 × 375 to {record['size']} × {record['size']}, medians"
    return "\n".join([*lines, "", f"{words}. {provenance(record)}"])


def cost(record: dict) -> str:
    """Seconds of an epoch and the whole cost of a student, for each pair."""
    epochs, views, m = (record[key] for key in ("epochs", "views", "snapshots"))
    lines = []
    for pair in record["pairs"]:
        seconds, total, counts = pair["seconds"], pair["computed_total"], pair["forwards"]
        title = pair["pair"].replace("-", " → ")
        lines += [
            f"| {title} | s per epoch | × CE | wait for the bank | teacher forwards per image | hours in all |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for name, s in seconds.items():
            wait = f"{100 * pair['wait'][name]:.2f} %" if name in pair["wait"] else ""
            hours = f"{total[name] / 3600:.2f}"
            lines.append(f"| {name} | {s:.2f} | {s / seconds['CE']:.2f} | {wait} | {counts[name]:,} | {hours} |")
        lines += [
            "",
            f"{pair['images']:,} images of {pair['image_size']} × {pair['image_size']}, batch {pair['batch']}, "
            f"{pair['precision']}; the teacher's epoch {pair['teacher_epoch']:.2f} s, the bank {pair['bank']:.1f} s.",
            "",
        ]
    note = (
        f"Medians. The last two columns are computed: {epochs} epochs of the teacher (three forwards a training step), "
        f"the bank of {views} views of {m} snapshots where there is one, {epochs} epochs of the student"
    )
    return "\n".join([*lines, f"{note}. {provenance(record)}"])


def online(record: dict) -> str:
    """Students from a bank against the same ones beside running snapshots."""
    config = record["config"]
    what = f"{record['images']:,} images, augment {config['augment']}, {config['student']['epochs']} epochs"
    table = comparison.online(record)[2:-1]
    return "\n".join(
        [
            *table,
            "",
            f"{what}, {len(record['seeds'])} seeds; in brackets Student's 95 % interval of "
            f"paired differences. {provenance(record, record['commits'])}",
        ]
    )


def forwards(record: dict) -> str:
    """Milliseconds and ratio to one by one of every way in which M snapshots see a batch."""
    short = {"float32": "fp32", "bfloat16": "bf16"}
    cases = record["forwards"]
    names = [f"{c['model']}, {c['batch']}, {short[c['dtype']]}" for c in cases]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(cases)}"]
    for way in dict.fromkeys(way for case in cases for way in case["ways"]):
        cells = [case["ways"].get(way, {}) for case in cases]
        cells = [f"{c['ms']:,.1f} ({c['ratio']:.2f})" if "ms" in c else "failed" if c else "" for c in cells]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    note = f"Milliseconds for {record['snapshots']} snapshots; in brackets, how many times as fast as one by one"
    return "\n".join([*lines, "", f"{note}. {provenance(record)}"])


def scaling(record: dict) -> str:
    """Seconds of an epoch by the number of processes, and what of the ideal that is."""
    lines = head("student", "s, 1 process", "s, 2 processes", "images/s, 1", "images/s, 2", "efficiency, %")
    for way in record["ways"]:
        one, two = (way["seconds"][n] for n in ("1", "2"))
        speeds = (f"{record['images'] / s:,.0f}" for s in (one, two))
        lines.append(table_row(way["name"], f"{one:.2f}", f"{two:.2f}", *speeds, f"{100 * one / (2 * two):.0f}"))
    note = (
        f"An epoch of {record['model']} on {record['images']:,} images of {record['image_size']} × "
        f"{record['image_size']}, {record['batch']} a step, medians; one core for each process."
    )
    return "\n".join([*lines, "", f"{note} {provenance(record)}"])


def since(record: dict) -> str:
    """Seconds of epochs and imports at an older commit and now."""
    lines = head("seconds", f"commit {record['commit'][:9]}", "now", "×")
    for row in record["since"]:
        cells = f"{row['before']:.2f}", f"{row['now']:.2f}", f"{row['now'] / row['before']:.2f}"
        lines.append(table_row(row["what"], *cells))
    note = "An epoch of the digits at 28 x 28, resnet8 and resnet8_w4, and a whole process that imports; medians"
    return "\n".join([*lines, "", f"{note}. {provenance(record)}"])


TABLES = {
    "since": since,
    "settings": precisions,
    "spins": waiting,
    "beside": beside,
    "loaders": throughput,
    "pairs": cost,
    "claims": online,
    "forwards": forwards,
    "ways": scaling,
}
