"""Run every benchmark in turn and leave their tables in this folder: what `make bench` calls; two hours and a half.

    python benchmarks/run_all.py [--scratch DIR] [--skip vs_mergekit ...]

Machines are shared and noisy: run it on one that is idle. Each script can also be run by itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
MERGEKIT_ENVIRONMENT = FOLDER.parent / ".venv-mergekit"
SCRIPTS: dict[str, list[str]] = {
    "vs_mergekit": ["--setup", str(MERGEKIT_ENVIRONMENT)],
    "memory": [],
    "plan_scale": [],
    "same_bytes": [],
    "accuracy": [],
    "resident": [],
    "generation": [],
    "searcher_scale": [],
    "frank_wolfe": [],
    "idle_evaluators": [],
    "sample_efficiency": [],
    "recycling": [],
    "zoo_search": ["--seeds", "5"],
}
TAKES_SCRATCH = SCRIPTS.keys() - {"idle_evaluators", "sample_efficiency", "recycling", "zoo_search"}


def main() -> int:
    """Run the scripts; the exit status says whether all reached their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: temporary ones)")
    parser.add_argument("--skip", nargs="*", choices=SCRIPTS, default=[])
    arguments = parser.parse_args()
    failed = []
    for name, options in SCRIPTS.items():
        if name in arguments.skip:
            continue
        scratch = ["--scratch", str(arguments.scratch)] if arguments.scratch and name in TAKES_SCRATCH else []
        started = time.monotonic()
        print(f"== {name}", flush=True)
        status = subprocess.run([sys.executable, FOLDER / f"{name}.py", *options, *scratch], check=False).returncode
        print(f"== {name}: exit {status} after {time.monotonic() - started:.0f} s", flush=True)
        if status:
            failed.append(name)
    if failed:
        print(f"did not reach their figures: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
