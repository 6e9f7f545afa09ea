"""python -m lora_edu lab | fresh CHAPTER"""

from __future__ import annotations

import argparse
import sys

from lora_edu import course


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_edu", description="The lora-edu course.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "lab", help="open your copy of the chapters (work/) in JupyterLab; other options are JupyterLab's"
    )
    fresh = commands.add_parser("fresh", help="give a new copy of one chapter; your old one is kept")
    fresh.add_argument("chapter", help="its number, for example 01")
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "lab":
        parser.error(f"unknown option {rest[0]}")
    try:
        if known.command == "lab":
            return course.lab(rest)
        print(course.fresh(known.chapter))
        return 0
    except course.CourseError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
