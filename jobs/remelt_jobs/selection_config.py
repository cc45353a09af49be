"""The selection file: which pool, on which calibration text, how to walk.

    pool:                         # the vertices of the hull
      - {model: ./math, name: math}
      - {model: ./code, name: code, parameters: {density: 0.5}}
    base_model: ./base            # layout, config, tokenizer, and what task vectors are taken from
    base_in_hull: false           # whether the base is a vertex, too
    merge: {merge_method: linear} # or any operator with coefficients: {merge_method: ties, parameters: {density: 0.5}}
    calibration:
      sources: [{path: text.jsonl, field: text}, {path: chat.jsonl, prompt: question, field: answer}]
      blocks: 32
      held_out: 16
      block_tokens: 512
      end_of_text: true
    variant: pairwise             # vanilla, away
    granularity: model            # layer, tensor
    oracle: {score: inner, target: deltas}       # or cosine; or weights
    soft: {vertices: 4, steps: 3} # left out, a step goes to one vertex
    start: uniform                # or the name of a vertex
    steps: {rule: line_search, scale: 1, losses: 4, iterations: 10, gap: 0, gain: 0, patience: 3}
    backend: {device: cpu, dtype: float32, batch_size: 8, threads: 2, ranks: 0}
    executor: {name: local, threads: 2, workers: 4, memory: 8GB}
    seed: 0

Paths of calibration text are relative to the selection file; checkpoints are named as in recipes. What only says where
and how fast (`executor`, the backend's device, batches, threads and ranks) and when to stop is no part of what a
selection is: it may change between one run of it and the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from remelt.errors import RecipeError
from remelt.frank_wolfe import STEP_RULES, VARIANTS, Options
from remelt.hull import Hull, Member
from remelt.oracle import GRANULARITIES, ORACLES, Granularity, Oracle
from remelt.strict_config import Section, load_yaml
from remelt_evals.calibration import Calibration, parse_calibration
from remelt_evals.loss_gradient import LossOptions

_KEYS = (
    "pool",
    "base_model",
    "base_in_hull",
    "merge",
    "calibration",
    "variant",
    "granularity",
    "oracle",
    "soft",
    "start",
    "steps",
    "backend",
    "executor",
    "seed",
)
_MERGE_KEYS = ("merge_method", "parameters", "rules", "dtype", "out_dtype", "compat", "max_shard_size", "layout")

Target = Literal["deltas", "weights"]
TARGETS: tuple[Target, ...] = ("deltas", "weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where merges and inner products run."""

    name: Literal["local", "ray"] = "local"
    threads: int | None = None
    workers: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """A selection, read and checked."""

    hull: Hull
    calibration: Calibration
    granularity: Granularity = "model"
    oracle: Oracle = "inner"
    target: Target = "deltas"
    options: Options = field(default_factory=Options)
    start: str = "uniform"
    loss: LossOptions = field(default_factory=LossOptions)
    place: Place = field(default_factory=Place)
    seed: int = 0

    def canonical(self) -> dict[str, Any]:
        """What the selection is, as JSON values: all that changes an iterate, and nothing that does not."""
        options = asdict(self.options)
        for key in ("iterations", "gap_tolerance", "min_gain", "patience"):
            del options[key]
        hull = self.hull
        return {
            "pool": [[member.source, member.name, dict(member.parameters)] for member in hull.pool],
            "base_model": [hull.base, hull.with_base],
            "merge": [hull.merge_method, dict(hull.parameters), [dict(rule) for rule in hull.rules], dict(hull.more)],
            "calibration": [
                [
                    [source.name, list(source.prompt), list(source.fields), source.weight]
                    for source in self.calibration.sources
                ],
                self.calibration.blocks,
                self.calibration.held_out,
                self.calibration.block_tokens,
                self.calibration.end_of_text,
            ],
            "oracle": [self.oracle, self.target],
            "granularity": self.granularity,
            "start": self.start,
            "steps": options,
            "backend": {"dtype": self.loss.dtype, "trust_remote_code": self.loss.trust_remote_code},
            "seed": self.seed,
        }

    @property
    def selection_id(self) -> str:
        """sha256 of the canonical form."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_selection(path: Path) -> SelectionConfig:
    """Read a selection file.

    Raises:
        RecipeError, EvaluationError: it cannot be read or done; the message names the file and the place in it.
    """
    return parse_selection(load_yaml(path), where=str(path), folder=path.parent)


def parse_selection(document: Mapping[str, Any], *, where: str = "selection", folder: Path = Path()) -> SelectionConfig:
    """Read a selection from plain values; `folder` is what paths of calibration text are relative to."""
    top = Section(document, where)
    top.allow(_KEYS)
    seed = top.integer("seed", 0, low=0, high=2**63 - 1)
    hull = _read_hull(top, where, seed)
    oracle = top.section("oracle")
    oracle.allow(("score", "target"))
    target = oracle.choice("target", TARGETS, "weights" if hull.base is None else "deltas")
    if target == "deltas" and hull.base is None:
        oracle.refuse("task vectors need a `base_model`; name one, or write `weights`", "target")
    config = SelectionConfig(
        hull=hull,
        calibration=parse_calibration(top.section("calibration"), folder),
        granularity=cast(Granularity, top.choice("granularity", GRANULARITIES, "model")),
        oracle=cast(Oracle, oracle.choice("score", ORACLES, "inner")),
        target=cast(Target, target),
        options=_read_options(top),
        start=top.text("start", "uniform"),
        loss=_read_backend(top.section("backend")),
        place=_read_place(top.section("executor")),
        seed=seed,
    )
    hull.start(config.start, 1)
    return config


def _read_hull(top: Section, where: str, seed: int) -> Hull:
    members = []
    for place, item in enumerate(top.items("pool")):
        section = Section({"model": item} if isinstance(item, str) else item, where, top.at(f"pool[{place}]"))
        section.allow(("model", "name", "parameters"))
        source = section.text("model")
        name = section.text("name", source.rstrip("/").rpartition("/")[2].partition("@")[0])
        members.append(Member(source, name, section.section("parameters").values))
    if len(members) < 2:
        top.refuse(f"{len(members)} checkpoints; there is something to select from two on", "pool")
    for kind, values in (("name", [each.name for each in members]), ("model", [each.source for each in members])):
        if twice := [value for number, value in enumerate(values) if value in values[:number]]:
            top.refuse(f"two checkpoints have the {kind} {twice[0]!r}; give each its own", "pool")
    merge = top.section("merge")
    merge.allow(_MERGE_KEYS)
    given = ("merge_method", "parameters", "rules")
    more = {key: value for key, value in merge.values.items() if key not in given and merge.has(key)}
    return Hull(
        pool=tuple(members),
        merge_method=merge.text("merge_method", "linear"),
        base=top.text("base_model") if top.has("base_model") else None,
        with_base=top.flag("base_in_hull", False),
        parameters=merge.section("parameters").values,
        rules=tuple(rule.values for rule in merge.sections("rules")),
        more={**more, "seed": seed},
        where=where,
    )


def _read_options(top: Section) -> Options:
    steps, soft, default = top.section("steps"), top.section("soft"), Options()
    steps.allow(("rule", "scale", "losses", "iterations", "gap", "gain", "patience"))
    soft.allow(("vertices", "steps"))
    is_soft = top.has("soft")
    try:
        return Options(
            variant=cast(Any, top.choice("variant", VARIANTS, "vanilla" if is_soft else default.variant)),
            step=cast(Any, steps.choice("rule", STEP_RULES, default.step)),
            scale=steps.number("scale", default.scale),
            soft_vertices=soft.integer("vertices", low=1) if is_soft else None,
            soft_steps=soft.integer("steps", default.soft_steps, low=1),
            search_losses=steps.integer("losses", default.search_losses, low=1),
            iterations=steps.integer("iterations", default.iterations, low=1),
            gap_tolerance=steps.number("gap", default.gap_tolerance, low=0),
            min_gain=steps.number("gain", default.min_gain, low=0),
            patience=steps.integer("patience", default.patience, low=1),
        )
    except RecipeError as problem:
        if str(problem).startswith(top.where):
            raise
        raise RecipeError(f"{top.where}: steps: {problem}") from None


def _read_backend(section: Section) -> LossOptions:
    section.allow(("device", "dtype", "batch_size", "threads", "ranks", "trust_remote_code"))
    default = LossOptions()
    return LossOptions(
        device=section.text("device", default.device),
        dtype=section.choice("dtype", ("float32", "bfloat16", "float16"), default.dtype),
        batch_size=section.integer("batch_size", default.batch_size, low=1),
        threads=section.integer("threads", low=1) if section.has("threads") else None,
        ranks=section.integer("ranks", default.ranks, low=0),
        trust_remote_code=section.flag("trust_remote_code", False),
    )


def _read_place(section: Section) -> Place:
    section.allow(("name", "threads", "workers", "memory"))
    memory = section.size_bytes("memory") if section.has("memory") else None
    if memory == 0:
        section.refuse("give a size above 0, such as 8GB", "memory")
    return Place(
        name=cast(Any, section.choice("name", ("local", "ray"), "local")),
        threads=section.integer("threads", low=1) if section.has("threads") else None,
        workers=section.integer("workers", low=1) if section.has("workers") else None,
        memory_bytes=memory,
    )
