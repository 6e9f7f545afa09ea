"""python -m lora_edu.lab list | run NAME [--jobs 2] | pretrain FOLDER"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads wait longer than they compute


def main(arguments: list[str] | None = None) -> int:
    from lora_edu.lab import runs

    parser = argparse.ArgumentParser(prog="python -m lora_edu.lab", description="The laboratory of lora-edu.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the names of the experiments")
    run = commands.add_parser("run", help="compute what is missing of the stored runs")
    run.add_argument("name", help="of an experiment, or of a chapter for all that it has: chapter05")
    run.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="rows at a time")
    pretrain = commands.add_parser("pretrain", help="make the base model again: base.safetensors and base.json")
    pretrain.add_argument("folder", type=Path, help="where to write; lora_edu/lab replaces the one that is shipped")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "list":
            print("\n".join(runs.names()))
        elif chosen.command == "run":
            for wanted in runs.of_chapter(chosen.name):
                runs.run(wanted, chosen.jobs)
        else:
            from lora_edu.lab.pretraining import pretrain as make

            made = make(chosen.folder)
            print(
                f"SHA-256 {made['sha256']}",
                *(f"{k:18} {v:.3f}" for k, v in made["bits_per_character"].items()),
                sep="\n",
            )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
