"""The command line that draws a run: python -m eekd.report RUN writes RUN/report.html."""

import argparse
import sys

from eekd import command

if __name__ == "__main__":
    command.start()

from eekd.io.files import in_words, printable
from eekd.report.page import report

PARSER = argparse.ArgumentParser(prog="eekd report", description="Draws a run as an HTML page.")
PARSER.add_argument("run", help="a run folder of eekd train")
PARSER.add_argument("--out", help="the file to write (default: RUN/report.html)")


def main(argv: list[str] | None = None) -> int:
    given = PARSER.parse_args(command.arguments(argv))
    try:
        print(report(given.run, given.out))
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {printable(in_words(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command.run(main)
