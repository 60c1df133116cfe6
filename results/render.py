"""Writes the tables of README.md and docs/, and the plots, from the JSON files beside this script.

python results/render.py          # rewrites what stands between <!-- table:NAME --> and <!-- end -->,
                                  # and the plots beside the pages
python results/render.py --check  # changes nothing; exits 1 where a table is not what the JSON says

NAME is the name of a record, RECORD/PART for a part of it, or RECORD+RECORD for two runs of the kernel bench.
tables/ has a file for each page, with its tables and plots.
"""

import json
import re
import sys
from pathlib import Path

from tables import attention, demonstration, glyphs, kernels, language, study, training_speed

from eekd.train.seeds import sentence

HERE = Path(__file__).parent
TABLES = kernels.TABLES | training_speed.TABLES | demonstration.TABLES | glyphs.TABLES


def file_of(name: str) -> Path:
    """Of a record: here, or a launch table of the kernels."""
    file = HERE / f"{name}.json"
    return file if file.exists() else HERE.parent / "kernels" / "launch" / f"{name}.json"


def table(name: str) -> str:
    """What stands under <!-- table:NAME -->."""
    name, _, part = name.partition("/")
    if name == "study":
        return study.PARTS[part]()
    record, *more = (json.loads(file_of(one).read_text()) for one in name.split("+"))
    if more:
        return kernels.side_by_side([record, *more])
    if part == "sentence":
        return f"> {sentence(record['summary'])}"
    if part == "tried":
        return kernels.tried(record)
    if part in record.get("tasks", {}):
        return language.language(record, part)
    if part:
        return attention.attention(record, part)
    return next(TABLES[key] for key in TABLES if key in record)(record)


def fill(match: re.Match) -> str:
    """A table with its marks, made anew; as it is where the page says that it was not measured."""
    if "Not measured" in match[0] and not file_of(match[1]).exists():
        return match[0]
    return f"<!-- table:{match[1]} -->\n{table(match[1])}\n<!-- end -->"


def plots(docs: Path, shown: str) -> None:
    """Draws the plots that a page shows; `shown` is the text of all pages."""
    for path in HERE.rglob("*.json"):
        record, picture = json.loads(path.read_text()), docs / "results" / f"{path.stem}.svg"
        if picture.name not in shown:
            continue
        elif "runs" in record:
            demonstration.accuracy_plot(record, picture)
        elif record.get("memory_by_rows", {}).get("points"):
            kernels.memory_plot(record, picture)
        elif record.get("rows") and (why := kernels.bandwidth(record, picture)):
            print(f"{path.relative_to(HERE)} has no plot: {why}")
    if study.records():
        study.plot(docs / "results" / "study.svg")


def main(argv: list[str]) -> int:
    docs = HERE.parent / "docs"
    fresh = {}
    for page in [HERE.parent / "README.md", *sorted(docs.rglob("*.md"))]:
        fresh[page] = re.sub(r"<!-- table:(\S+) -->.*?<!-- end -->", fill, page.read_text(), flags=re.DOTALL)
    stale = [page for page, text in fresh.items() if page.read_text() != text]
    if "--check" in argv:
        print("\n".join(f"{page} is not what results/ says" for page in stale))
        return bool(stale)
    for page in stale:
        page.write_text(fresh[page])
    plots(docs, "".join(fresh.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
