"""Classifies images: eekd predict STUDENT IMAGE ... [--top 3] [--format text|json|csv]."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.io.files import printable

BATCH = 32

PARSER = argparse.ArgumentParser(prog="eekd predict", description="Classifies images.")
PARSER.add_argument("student", help="RUN/students/NAME, a RUN with one student, or an exported folder")
PARSER.add_argument("images", nargs="+", help="image files, or folders of them")
PARSER.add_argument("--top", type=int, default=1, help="how many classes to print (default: 1)")
PARSER.add_argument("--format", choices=("text", "json", "csv"), default="text", help="each prints one line per image")
PARSER.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; 0, 1 where an image could not be read, 2 for any other mistake."""
    return command.answer(PARSER, argv, _until_closed)


def _until_closed(given: argparse.Namespace) -> int:
    try:
        return _predict(given)
    except BrokenPipeError:  # as of `eekd predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _predict(given: argparse.Namespace) -> int:
    if given.top < 1:
        raise ValueError(f"top must be at least 1, got {given.top}")
    paths, code = list(_files(given.images)), 0
    if not paths:
        raise FileNotFoundError(f"images must be files or folders of images, and there is none in {given.images[0]}")
    import torch

    from eekd.export import load_student

    student = load_student(given.student, device=given.device)
    writer = csv.writer(sys.stdout)
    if given.format == "csv":
        writer.writerow(["image", *(f"{what}_{n + 1}" for n in range(given.top) for what in ("class", "probability"))])
    for start in range(0, len(paths), BATCH):
        inputs, read = [], []
        for path in paths[start : start + BATCH]:
            try:
                inputs.append(student.preprocess(path))
                read.append(path)
            except (OSError, ValueError) as error:
                command.refuse(error)
                code = 1
        rows = student.classify(torch.cat(inputs), given.top) if inputs else []
        for path, row in zip(read, rows, strict=True):
            if given.format == "json":
                predictions = [{"class": name, "probability": p} for name, p in row]
                print(json.dumps({"image": str(path), "predictions": predictions}))
            elif given.format == "csv":
                writer.writerow([path, *(value for name, p in row for value in (name, f"{p:.6f}"))])
            else:
                print(f"{printable(path)}  " + "  ".join(f"{printable(name)} {p:.1%}" for name, p in row))
    return code


def _files(words: list[str]) -> Iterator[Path]:
    """The images that were named, and those in folders that were, in the order of their names."""
    from eekd.data.walk import entries, is_image

    for path in map(Path, words):
        if not path.is_dir():
            yield path
            continue
        folders, files = entries(path)
        yield from (Path(file.path) for file in files if is_image(file.name))
        yield from _files([folder.path for folder in folders])


if __name__ == "__main__":
    command.run(main)
