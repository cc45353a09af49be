"""The zoo: small checkpoints, eval tasks and items that ship with remelt, for its demo and its tests.

What each checkpoint is and how it was trained stands in README.md beside this file. Importing this loads nothing.
"""

from __future__ import annotations

from pathlib import Path

ABILITIES = ("prose", "python", "arithmetic", "strings")


def zoo_dir() -> Path:
    """The folder that holds everything."""
    return Path(__file__).resolve().parent


def base() -> Path:
    """The pre-trained checkpoint that all specialists were fine-tuned from."""
    return zoo_dir() / "base"


def parents() -> dict[str, Path]:
    """The specialists by ability, without the base."""
    return {ability: zoo_dir() / ability for ability in ABILITIES}


def run_steps() -> tuple[Path, ...]:
    """Sixteen saved steps of one training run, in order."""
    return tuple(sorted((zoo_dir() / "run").glob("step-*")))


def experts_base() -> Path:
    """The mixture of experts, in DeepSeek-V3's layout, that its two specialists were fine-tuned from."""
    return zoo_dir() / "experts" / "base"


def experts_parents() -> dict[str, Path]:
    """The two specialists with routed and shared experts: `text` and `symbols`."""
    return {name: zoo_dir() / "experts" / name for name in ("text", "symbols")}


def suite_path() -> Path:
    """The suite that scores the four abilities by accuracy."""
    return zoo_dir() / "suite.yaml"


def bits_suite_path() -> Path:
    """The suite that scores prose and python in bits per byte."""
    return zoo_dir() / "bits.yaml"
