"""README.md of an exported student, made from its config.json alone."""

import json

from eekd.io.files import printable

CARD = """\
---
library_name: eekd
pipeline_tag: image-classification
tags: [knowledge-distillation, eekd]
---

# {model}, a student of {method}

It tells {count} classes apart ({some}) in images of {size} x {size} pixels, {colour}.

```python
import eekd

student = eekd.load_student("path/to/this/folder")
print(student.predict("image.png", top=3))
```

{programs}To prepare an image, take the centred square of {zoom:g} times the shorter side, resize it by
{interpolation} interpolation to {size} x {size}, scale it to [0, 1], subtract mean {mean} and divide by std {std}.

## How good it is

{table}

Trained on `{data}`, {epochs} epochs, seed {seed}. {teacher}

{exported}## Where it comes from

```json
{provenance}
```
"""


def card(facts: dict) -> str:
    """The Markdown of a student's card; every number comes from `facts`, the content of config.json."""
    data, provenance = facts["preprocessing"], facts.get("provenance") or {}
    names, teacher = facts["classes"], provenance.get("teacher")
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    taught = "Nobody taught it." if not teacher else (
        f"It was taught by {len(teacher['snapshots'])} snapshots of a {teacher['model']['name']}."
    )  # fmt: skip
    return CARD.format(
        model=_plain(facts["model"]["name"]),
        method=_plain(provenance.get("method", "an unknown method")),
        count=len(names),
        some=_plain(some),
        size=data["image_size"],
        colour="grey" if data["channels"] == 1 else "in colour",
        zoom=data["zoom"],
        interpolation=data.get("interpolation", "bilinear"),
        mean=[round(x, 4) for x in data["mean"]],
        std=[round(x, 4) for x in data["std"]],
        table=_table(facts.get("results") or {}),
        data=_plain(provenance.get("data", "unknown data")),
        epochs=provenance.get("epochs", "?"),
        seed=provenance.get("seed", "?"),
        teacher=_plain(taught),
        provenance=json.dumps(provenance, indent=1),
        programs=_programs(facts),
        exported=_exported(facts.get("exported")),
    )


def _table(results: dict) -> str:
    lines = ["| network | parameters | validation accuracy | test accuracy |", "|---|--:|--:|--:|"]
    for row in results.get("run") or []:
        numbers = f"{row['parameters']:,} | {row['val_accuracy']:.2%} | {row['test_accuracy']:.2%}"
        lines.append(f"| {_plain(row['name'])} ({_plain(row['model'])}) | {numbers} |")
    if len(lines) == 2 and "test" in results:
        lines.append(f"| this student | | {results['val']['accuracy']:.2%} | {results['test']['accuracy']:.2%} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing was measured."


def _programs(facts: dict) -> str:
    """How the folder's files that need no eekd are called."""
    uses = {
        "model.pt2": '`torch.export.load("model.pt2").module()(images)` needs torch alone.',
        "model.onnx": "`model.onnx` runs in any ONNX runtime: input `images`, output `logits`.",
        "model.int8.onnx": "`model.int8.onnx` is the same with linear layers of 8 bits.",
    }
    sentences = [uses[name] for name in (facts.get("exported") or {"files": {}})["files"] if name in uses]
    if not sentences:
        return ""
    data = facts["preprocessing"]
    size = f"(B, {data['channels']}, {data['image_size']}, {data['image_size']})"
    return " ".join([*sentences, f"They take float32 images {size}, for any B, and give logits."]) + "\n\n"


def _exported(exported: dict | None) -> str:
    """The files as they were measured when they were written."""
    if not exported or len(exported["files"]) < 2:
        return ""
    lines = [
        f"The files here, on {exported['images']} {_plain(exported['what'])}:",
        "",
        "| file | MB | largest difference of a logit | accuracy |",
        "|---|--:|--:|--:|",
    ]
    for name, file in exported["files"].items():
        accuracy = f"{file['accuracy']:.2%}" if "accuracy" in file else ""
        lines.append(f"| `{name}` | {file['bytes'] / 1e6:.3g} | {file['difference']:.2g} | {accuracy} |")
    return "\n".join(lines) + "\n\n"


def _plain(text) -> str:
    """Text in which nothing is Markdown or HTML: names come from folders."""
    text = printable(text)
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
