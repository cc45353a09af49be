"""Hold merged files against float64 references, element by element, for every operator and input dtype.

    python benchmarks/accuracy.py

For an output `out` and its float64 reference `ref`, K models and effective weights w:

    |out - ref| <= half an ulp of the output dtype at ref + (K + 4) 2^-23 (|base| + sum |w_i| (|x_i| + |base|))

with the base terms only where there is a base. Selecting operators may decide otherwise than float64 where a margin
(the sum that elects a sign, the distance from a magnitude threshold or the next magnitude of a ranked row) is below the
second term: such elements, where they miss the bound, are counted, and may be at most 1e-5 of all. A miss anywhere
else is an error, and the exit status is 1. The weights are the recipe's, divided by their sum where the operator does
so; where weights of both signs elect and normalise, by the smallest sum that any of them have.

The merges are the command's own, from files to files; the references are `tests/reference_operators.py`, the draws
`remelt.draws.draw_bits`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from measure import (
    REPORTS_DIR,
    markdown_table,
    remelt_command,
    run_measured,
    scratch_folder,
    versions,
    write_report,
)
from remelt.draws import draw_bits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference_operators as reference

Array: TypeAlias = NDArray[np.float64]

SEED = 7
NUM_TUNES = 4

# Task vectors of bfloat16 checkpoints are small multiples of one step, so round weights make votes cancel exactly in
# decimal (3 x 0.3 against 0.5 + 0.4) but not in any binary precision. The first weights have no such relation with
# whole numbers up to 6; the round ones are a case of their own, with such ties counted apart.
WEIGHTS = (0.4739, 0.49, 0.3431, 0.4596)
ROUND_WEIGHTS = (0.5, 0.4, 0.3, 0.25)
MIXED_WEIGHTS = (0.5, 0.4, 0.3, -0.25)
WEIGHT_NAMES: dict[tuple[float, ...], str] = {
    WEIGHTS: "",
    ROUND_WEIGHTS: "round weights",
    MIXED_WEIGHTS: "a negative weight",
}
WEIGHT_UNIT = 1e-4  # every weight is a whole number of these
ALLOWED_FRACTION = 1e-5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
LOWEST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126}

# Task vector over weight, rms: light fine-tuning, and checkpoints that have little in common.
SPREADS = {"fine": 1e-2, "wide": 0.7}

# Scalars, rows of one element, fused experts, convolutions, odd lengths, and one tensor of many leaves.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1200, 1003),
    "model.layers.0.self_attn.q_proj.weight": (257, 130),
    "model.layers.0.self_attn.k_proj.weight": (5, 300),
    "model.layers.0.self_attn.v_proj.weight": (3, 20_000),
    "model.layers.0.mlp.experts.gate_up_proj": (7, 33, 65),
    "model.layers.0.conv1d.weight": (48, 1, 4),
    "model.layers.0.mlp.gate.weight": (64, 1),
    "model.layers.0.input_layernorm.weight": (1000,),
    "model.layers.0.self_attn.q_proj.bias": (5,),
    "model.layers.0.one.weight": (1,),
    "model.layers.0.scalar": (),
}

ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")
RANKING = ("della", "della_linear")
DRAWING = ("dare_linear", "dare_ties", *RANKING)
BASELESS = ("linear", "slerp", "assembly_of_experts")
PAIRS = ("slerp", "nuslerp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One merge to hold against its reference."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = WEIGHTS
    is_extra: bool = False
    """A further form of an operator, tried on one spread only."""

    @property
    def label(self) -> str:
        words = [f"{key} {value}" for key, value in self.options.items()] + [WEIGHT_NAMES[self.weights]]
        shown = ", ".join(word for word in words if word)
        return f"{self.method} ({shown})" if shown else self.method


CASES = (
    Case(method="linear"),
    Case(method="linear", options={"normalize": False}, weights=MIXED_WEIGHTS, is_extra=True),
    Case(method="task_arithmetic"),
    Case(method="task_arithmetic", options={"lambda": 0.7, "normalize": True}, weights=MIXED_WEIGHTS, is_extra=True),
    Case(method="slerp", options={"t": 0.3}),
    Case(method="nuslerp"),
    Case(method="nuslerp", options={"nuslerp_flatten": False}, is_extra=True),
    Case(method="ties", options={"density": 0.5}),
    Case(method="ties", options={"density": 0.2, "elect": "unweighted", "lambda": 0.8}, is_extra=True),
    Case(method="ties", options={"density": 0.4, "normalize": False}, weights=MIXED_WEIGHTS, is_extra=True),
    Case(method="ties", options={"density": 0.5}, weights=MIXED_WEIGHTS, is_extra=True),
    Case(method="ties", options={"density": 0.5}, weights=ROUND_WEIGHTS, is_extra=True),
    Case(method="dare_linear", options={"density": 0.5}),
    Case(method="dare_ties", options={"density": 0.5}),
    Case(method="dare_ties", options={"density": 0.4, "normalize": True}, is_extra=True),
    Case(method="dare_ties", options={"density": 0.5}, weights=ROUND_WEIGHTS, is_extra=True),
    Case(method="della", options={"density": 0.5, "epsilon": 0.1}),
    Case(method="della", options={"density": 0.6, "epsilon": 0.3, "normalize": False}, is_extra=True),
    Case(method="della_linear", options={"density": 0.5, "epsilon": 0.1}),
    Case(method="breadcrumbs", options={"density": 0.5, "gamma": 0.01}),
    Case(method="breadcrumbs", options={"density": 0.9, "gamma": 0.2}, is_extra=True),
    Case(method="breadcrumbs_ties", options={"density": 0.5, "gamma": 0.01}),
    Case(method="model_stock"),
    Case(method="model_stock", options={"filter_wise": True}, is_extra=True),
    Case(method="assembly_of_experts"),
    Case(method="assembly_of_experts", options={"threshold": 0.005, "normaliser": "rms"}, is_extra=True),
)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path, dtype: str, spread: str) -> list[Path]:
    """Write a base and its fine-tunes; returns their folders, the base first."""
    folders = [folder / "base"] + [folder / f"tune-{number}" for number in range(1, NUM_TUNES + 1)]
    generator = torch.Generator().manual_seed(1)
    bases = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    bases = {name: base.to(DTYPES[dtype]) for name, base in bases.items()}
    for number, path in enumerate(folders):
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, base in bases.items():
            delta = 0.02 * SPREADS[spread] * torch.randn(base.shape, generator=generator)
            if base.numel() == 1 or base.shape[-1] == 1:
                # Single numbers that pull apart are Model Stock's pole, which is refused by design.
                delta = delta.abs()
            tensors[name] = (base.float() + delta).to(DTYPES[dtype]) if number else base
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": dtype}), "utf-8")
    return folders


def write_recipe(path: Path, case: Case, folders: Sequence[Path], out_dtype: str) -> Path:
    """Write the recipe of a case; JSON is YAML."""
    base, *tunes = folders
    recipe: dict[str, Any] = {"merge_method": case.method, "out_dtype": out_dtype, "seed": SEED}
    if case.method in PAIRS:
        tunes = tunes[:2]
    if case.method == "slerp":
        recipe["base_model"] = str(tunes[0])
    elif case.method not in BASELESS:
        recipe["base_model"] = str(base)
    has_weights = case.method not in ("slerp", "model_stock")
    recipe["models"] = [
        {"model": str(tune), **({"parameters": {"weight": weight}} if has_weights else {})}
        for tune, weight in zip(tunes, case.weights, strict=False)
    ]
    if case.options:
        recipe["parameters"] = dict(case.options)
    path.write_text(json.dumps(recipe, indent=1) + "\n", "utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reference, bound, margins; for one tensor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operands:
    """One tensor of the base and of the K models in float64, with what the case does to them."""

    case: Case
    base: Array
    tensors_K: list[Array]
    weights_K: list[float]
    bits_K: list[NDArray[np.uint32]]

    @property
    def has_base(self) -> bool:
        return self.case.method not in BASELESS

    @property
    def deltas(self) -> list[Array]:
        return [tensor - self.base for tensor in self.tensors_K]

    def option(self, name: str, default: Any) -> Any:
        return self.case.options.get(name, default)

    def reference(self) -> Array:
        """What should come out."""
        options = {"lambda_" if key == "lambda" else key: value for key, value in self.case.options.items()}
        if self.case.method in DRAWING:
            options["bits_K"] = self.bits_K
        function = reference.OPERATORS[self.case.method]
        base = self.base if self.has_base else None
        return np.asarray(function(base, self.tensors_K, self.weights_K, **options), np.float64)

    def effective_weights(self) -> Sequence[float | Array]:
        """The factors of checkpoints or task vectors, as the bound takes them."""
        method, weights_K = self.case.method, self.weights_K
        if method == "slerp":
            t = float(self.option("t", 0.5))
            v0, v1 = (tensor.reshape(-1) for tensor in self.tensors_K)
            cos = float(v0 @ v1) / float(np.linalg.norm(v0) * np.linalg.norm(v1))
            if abs(cos) > reference.SLERP_DOT_THRESHOLD:
                return [1 - t, t]
            omega = math.acos(cos)
            return [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]
        if method == "model_stock":
            return [self._stock_t() / len(self.tensors_K)] * len(self.tensors_K)
        if method in ("linear", "assembly_of_experts", "nuslerp") and self.option("normalize", True):
            return [weight / math.fsum(weights_K) for weight in weights_K]
        if method == "task_arithmetic" and self.option("normalize", False):
            weights_K = [weight / math.fsum(weights_K) for weight in weights_K]
        scale = float(self.option("lambda", 1.0))
        if method in ELECTING and min(weights_K) < 0 and self.option("normalize", method in ("ties", "della")):
            # Weights of both signs can leave a small divisor, which makes each of them count for more.
            scale = scale / self._smallest_divisor()
        return [weight * scale for weight in weights_K]

    def _smallest_divisor(self) -> float:
        """The smallest sum that any set of the weights has, in magnitude, zero excepted."""
        sums = {math.fsum(chosen) for size in range(1, 5) for chosen in combinations(self.weights_K, size)}
        return min(1.0, *(abs(total) for total in sums if total))

    def _stock_t(self) -> Array:
        """Model Stock's t, of the shape of the tensor."""
        count = len(self.tensors_K)
        if not self.option("filter_wise", False):
            cos = reference.mean_pairwise_cosine([delta.reshape(-1) for delta in self.deltas])
            return np.full(self.base.shape, reference.model_stock_t(cos, count))
        rows_KRC = [reference.as_rows(delta) for delta in self.deltas]
        t_R = [
            reference.model_stock_t(reference.mean_pairwise_cosine(rows_KC), count)
            for rows_KC in zip(*rows_KRC, strict=True)
        ]
        return np.asarray(np.broadcast_to(np.array(t_R)[:, None], rows_KRC[0].shape).reshape(self.base.shape))

    def arithmetic_bound(self) -> Array:
        """(K + 4) 2^-23 (|base| + sum |w_i| (|x_i| + |base|)), what float32 arithmetic may lose."""
        base = np.abs(self.base) if self.has_base else np.zeros_like(self.base)
        total = base.copy()
        for weight, tensor in zip(self.effective_weights(), self.tensors_K, strict=True):
            total += np.abs(weight) * (np.abs(tensor) + base)
        return (len(self.tensors_K) + 4) * 2.0**-23 * total

    def margins(self) -> Array:
        """The smallest distance of any decision about an element from going the other way; inf where there is none."""
        margin = np.full(self.base.shape, np.inf)
        method = self.case.method
        if method in TRIMMING:
            for delta in self.deltas:
                margin = np.minimum(margin, self._trim_margin(delta))
        if method in RANKING:
            for delta in self.deltas:
                margin = np.minimum(margin, _rank_margin(delta))
        if method in ELECTING:
            margin = np.minimum(margin, self._election_margin())
        return margin

    def _kept(self) -> list[Array]:
        """Task vectors after the operator's own thinning, before the election."""
        density = self.option("density", 1.0)
        if self.case.method in TRIMMING:
            gamma = self.option("gamma", 0.01) if self.case.method != "ties" else 0.0
            return [np.where(reference.keep_mask_middle(d, density, gamma), d, 0.0) for d in self.deltas]
        kept_K = []
        for delta, bits in zip(self.deltas, self.bits_K, strict=True):
            p = np.full(delta.shape, density)
            if self.case.method in RANKING:
                p = reference.keep_probabilities_della(delta, density, self.option("epsilon", 0.15))
            kept_K.append(np.where(reference.keep_by_bits(bits, p), delta / p, 0.0))
        return kept_K

    def _election_margin(self) -> Array:
        weights_K = [1.0] * len(self.weights_K) if self.option("elect", "weighted") == "unweighted" else self.weights_K
        votes_K = [weight * kept for weight, kept in zip(weights_K, self._kept(), strict=True)]
        # With one vote or none nothing is decided by rounding: the sum is that vote.
        num_votes = np.sum([vote != 0 for vote in votes_K], axis=0)
        return np.where(num_votes > 1, np.abs(np.sum(votes_K, axis=0)), np.inf)

    def decimal_ties(self) -> NDArray[np.bool_]:
        """Elements whose votes cancel exactly with the weights as the recipe writes them, in decimal.

        No binary arithmetic can see that, so the sign of the rounded sum is anyone's. DELLA's votes hold divisions and
        have no such ties.
        """
        if self.case.method not in ELECTING or self.case.method in RANKING:
            return np.zeros(self.base.shape, np.bool_)
        units_K = [round(weight / WEIGHT_UNIT) for weight in self.weights_K]
        # One density for all models: its reciprocal is a common factor. Whole numbers times deltas are exact here.
        kept_K = [np.where(kept != 0, delta, 0.0) for kept, delta in zip(self._kept(), self.deltas, strict=True)]
        total = np.sum([units * kept for units, kept in zip(units_K, kept_K, strict=True)], axis=0)
        return np.asarray((total == 0) & (np.sum([kept != 0 for kept in kept_K], axis=0) > 1))

    def _trim_margin(self, delta: Array) -> Array:
        density = self.option("density", 1.0)
        gamma = self.option("gamma", 0.01) if self.case.method != "ties" else 0.0
        mask = reference.keep_mask_middle(delta, density, gamma)
        magnitude = np.abs(delta)
        margin = np.full(delta.shape, np.inf)
        if mask.all():
            return margin
        low, high = float(magnitude[mask].min()), float(magnitude[mask].max())
        is_below = ~mask & (magnitude <= low)
        is_above = ~mask & (magnitude >= high) & ~is_below
        for is_outside, cut in ((is_below, low), (is_above, high)):
            if is_outside.any():
                edge = float(magnitude[is_outside].max() if cut == low else magnitude[is_outside].min())
                margin = np.minimum(margin, np.where(is_outside, np.abs(magnitude - cut), np.abs(magnitude - edge)))
        return margin


def _rank_margin(delta: Array) -> Array:
    """Distance of each magnitude to the nearest other one of its row."""
    rows_RC = reference.as_rows(np.abs(delta))
    if rows_RC.shape[1] < 2:
        return np.full(delta.shape, np.inf)
    order_RC = np.argsort(rows_RC, axis=1, kind="stable")
    gaps_RC = np.diff(np.take_along_axis(rows_RC, order_RC, axis=1), axis=1)
    edge_R1 = np.full((rows_RC.shape[0], 1), np.inf)
    nearest_RC = np.minimum(np.hstack([edge_R1, gaps_RC]), np.hstack([gaps_RC, edge_R1]))
    margin_RC = np.empty_like(rows_RC)
    np.put_along_axis(margin_RC, order_RC, nearest_RC, axis=1)
    return np.asarray(margin_RC.reshape(delta.shape))


def half_ulp(values: Array, dtype: str) -> Array:
    """Half the distance between neighbours of the dtype, in the binade of each value."""
    _, exponents = np.frexp(np.abs(values))
    lowest = LOWEST_EXPONENT[dtype]
    return np.asarray(np.ldexp(0.5, np.maximum(exponents - 1, lowest) - MANTISSA_BITS[dtype]))


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Finding:
    """What one merge came to, over all its tensors."""

    label: str
    dtype: str
    out_dtype: str
    spread: str
    elements: int = 0
    near: int = 0
    """A margin below the bound, and not exactly zero."""
    excused: int = 0
    """Beyond the bound, and near or tied."""
    tied: int = 0
    """Beyond the bound, and tied in decimal."""
    wrong: int = 0
    worst: float = 0.0
    """Largest |out - ref| / bound of the elements that are not excused."""

    @property
    def holds(self) -> bool:
        return not self.wrong and self.excused <= ALLOWED_FRACTION * self.elements


def compare(case: Case, folders: Sequence[Path], output: Path, finding: Finding) -> None:
    """Add every tensor of a merged output to a finding."""
    merged: dict[str, torch.Tensor] = {}
    for path in sorted(output.glob("*.safetensors")):
        merged |= load_file(path)
    base_tensors, *tune_tensors = (load_file(folder / "model.safetensors") for folder in folders)
    tune_tensors = tune_tensors[:2] if case.method in PAIRS else tune_tensors
    for name, shape in SHAPES.items():
        assert merged[name].dtype == DTYPES[finding.out_dtype], (name, merged[name].dtype)
        count = math.prod(shape)
        streams = range(len(tune_tensors)) if case.method in DRAWING else ()
        operands = Operands(
            case,
            base_tensors[name].double().numpy(),
            [tensors[name].double().numpy() for tensors in tune_tensors],
            list(case.weights[: len(tune_tensors)]),
            [draw_bits(SEED, stream, name, 0, count) for stream in streams],
        )
        expected = operands.reference()
        arithmetic = operands.arithmetic_bound()
        bound = half_ulp(expected, finding.out_dtype) + arithmetic
        error = np.abs(merged[name].double().numpy() - expected)
        margins = operands.margins()
        is_close_call = margins <= arithmetic
        is_over = error > bound
        is_tied = is_over & operands.decimal_ties()
        is_excused = is_over & is_close_call & ~is_tied
        is_wrong = is_over & ~is_close_call & ~is_tied
        ratio = np.where(is_tied | is_excused, 0.0, error / bound)
        finding.elements += count
        finding.near += int((is_close_call & (margins > 0)).sum())
        finding.tied += int(is_tied.sum())
        finding.excused += int(is_excused.sum())
        finding.wrong += int(is_wrong.sum())
        finding.worst = max(finding.worst, float(ratio.max()))
        if is_wrong.any():
            place = int(np.argmax(np.where(is_wrong, ratio, 0.0)))
            print(
                f"  WRONG {finding.label} {finding.dtype} {name}[{place}]: {float(merged[name].reshape(-1)[place])!r}"
                f" for {float(expected.reshape(-1)[place])!r}, {int(is_wrong.sum())} of {count}"
            )


def runs(chosen: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[Case, str, str, str]]:
    """Every (case, input dtype, output dtype, spread) to try."""
    for dtype in dtypes:
        for spread in SPREADS:
            for case in CASES:
                if case.method not in chosen or (case.is_extra and spread != "fine"):
                    continue
                yield case, dtype, dtype, spread
                if dtype != "float32" and spread == "fine" and not case.is_extra:
                    # The output's rounding hides the arithmetic; wide outputs show it.
                    yield case, dtype, "float32", spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, merge and compare, write the report; 1 where a bound was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = list(dict.fromkeys(case.method for case in CASES))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--scratch", type=Path, help="folder for inputs and outputs, kept (default: a temporary one)")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR)
    options = parser.parse_args(arguments)
    findings = []
    with scratch_folder(options.scratch) as scratch:
        inputs: dict[tuple[str, str], list[Path]] = {}
        for case, dtype, out_dtype, spread in runs(options.methods, options.dtypes):
            if (dtype, spread) not in inputs:
                inputs[dtype, spread] = write_inputs(scratch / f"accuracy-{dtype}-{spread}", dtype, spread)
            folders = inputs[dtype, spread]
            recipe = write_recipe(scratch / "accuracy.yaml", case, folders, out_dtype)
            output = scratch / "out-accuracy"
            shutil.rmtree(output, ignore_errors=True)
            run_measured([remelt_command(), "merge", recipe, "--output", output], poll_tree=False).check()
            finding = Finding(case.label, dtype, out_dtype, spread)
            compare(case, folders, output, finding)
            findings.append(finding)
            print(
                f"{'ok ' if finding.holds else 'BAD'} {finding.label:50} {dtype:>8} -> {out_dtype:8} {spread:4}"
                f" worst {finding.worst:.3f} of the bound, near {finding.near}, tied {finding.tied},"
                f" excused {finding.excused}, wrong {finding.wrong} of {finding.elements}",
                flush=True,
            )
        shutil.rmtree(scratch / "out-accuracy", ignore_errors=True)
    rows = [
        (
            finding.label,
            f"{finding.dtype} to {finding.out_dtype}",
            finding.spread,
            f"{finding.worst:.3f}",
            finding.near,
            finding.tied,
            finding.excused,
            finding.wrong,
            "yes" if finding.holds else "**no**",
        )
        for finding in findings
    ]
    head = ("operator", "dtypes", "spread", "worst / bound", "near", "tied", "excused", "wrong", "holds")
    num_elements = findings[0].elements if findings else 0
    intro = (
        f"{len(findings)} merges of {num_elements:,} elements in {len(SHAPES)} tensors of zero to three dimensions,"
        " each element held against a float64 reference. *worst* is the largest error in units of its bound. *near*"
        " counts elements with a margin (election, threshold, rank) below the arithmetic part of the bound, exact ties"
        " not counted. Of the elements that miss the bound, *tied* are those whose votes cancel exactly with the"
        " weights as written in decimal, which no binary arithmetic can see; *excused* are the others that are near, at"
        f" most {ALLOWED_FRACTION:g} of all; *wrong* is any other miss. Spread: task vectors of"
        f" {SPREADS['fine']:g} (fine) or {SPREADS['wide']:g} (wide) of the weights' rms."
    )
    numbers = versions(sys.executable, ("remelt", "torch", "numpy", "numba"))
    data = {
        "versions": numbers,
        "findings": [
            {name: getattr(finding, name) for name in Finding.__slots__} | {"holds": finding.holds}
            for finding in findings
        ],
    }
    version_line = ", ".join(f"{name} {number}" for name, number in numbers.items()) + "."
    sections = [intro, version_line, markdown_table(head, rows)]
    write_report("accuracy", "Accuracy of every operator", sections, data, folder=options.reports)
    return 0 if all(finding.holds for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
