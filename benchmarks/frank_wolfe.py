"""Frank-Wolfe selection on the zoo: what irrelevant checkpoints in the pool do to it, and to the uniform merge.

    python benchmarks/frank_wolfe.py

Two pools: the four specialists, and the same with irrelevant checkpoints: each specialist's task vector with its
elements shuffled inside every tensor, and normal noise of the same norm in every tensor. Both are as far from the base
as the specialists are, and mean nothing. Calibration text are the zoo's search and selection items, answered; the
figure and the tables show the loss on blocks of it that nothing was optimised on. With --score, accuracies on the zoo's
report items.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from measure import REPORTS_DIR, markdown_table, scratch_folder, versions, write_report
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader
from remelt.strict_config import dump_yaml
from remelt_evals import zoo
from remelt_jobs.selection import run_selection
from remelt_jobs.selection_config import parse_selection
from remelt_jobs.selection_result import SelectionResult

PACKAGES = ("torch", "transformers", "numba")
KINDS = ("shuffled", "noise")
WALKS: dict[str, dict[str, Any]] = {
    "vanilla, 2/(t+2)": {"variant": "vanilla", "steps": {"rule": "open_loop"}},
    "vanilla, line search": {"variant": "vanilla"},
    "away, line search": {"variant": "away"},
    "pairwise, line search": {"variant": "pairwise"},
    "soft, 4 vertices": {"soft": {"vertices": 4, "steps": 3}},
    "pairwise by layer": {"variant": "pairwise", "granularity": "layer"},
    "pairwise by tensor": {"variant": "pairwise", "granularity": "tensor"},
    "pairwise, base in the hull": {"variant": "pairwise", "base_in_hull": True},
}
SHOWN = "pairwise, line search"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--irrelevant", type=int, default=12, help="irrelevant checkpoints in the larger pool")
    parser.add_argument("--score", action="store_true", help="also score with lm-eval on report items")
    parser.add_argument("--scratch", type=Path, help="keep the selections here, and go on with those that are there")
    parser.add_argument("--reports", type=Path, default=REPORTS_DIR, help="where the report and its figure go")
    options = parser.parse_args()
    with scratch_folder(options.scratch) as folder:
        write_texts(folder)
        relevant = {name: str(path) for name, path in zoo.parents().items()}
        pools = {"relevant": relevant, "with irrelevant": relevant | make_irrelevant(folder, options.irrelevant)}
        walks = {
            pool: {name: run(folder, pool, members, name, options.iterations) for name in WALKS}
            for pool, members in pools.items()
        }
        scores = score(walks) if options.score else {}
    report(walks, scores, options.reports)


def write_texts(folder: Path) -> None:
    """The search and selection items of each ability, answered, one a line."""
    for ability in zoo.ABILITIES:
        lines = []
        for role in ("search", "selection"):
            items = (zoo.zoo_dir() / "items" / f"{ability}_{role}.jsonl").read_text().splitlines()
            for item in map(json.loads, items):
                answer = item["choices"][item["label"]].rstrip("\n") + "\n"
                lines.append(json.dumps({"context": item["context"], "answer": answer}))
        (folder / f"{ability}.jsonl").write_text("\n".join(lines) + "\n")


def make_irrelevant(folder: Path, count: int) -> dict[str, str]:
    """Checkpoints whose task vectors have a specialist's norm in each tensor, and no meaning."""
    made = {}
    parents = list(zoo.parents().items())
    for number in range(count):
        kind, (ability, parent) = KINDS[number // len(parents) % len(KINDS)], parents[number % len(parents)]
        name = f"{kind} {ability} {number // (len(parents) * len(KINDS))}"
        made[name] = str(write_irrelevant(folder / name.replace(" ", "-"), parent, kind, number))
    return made


def write_irrelevant(target: Path, parent: Path, kind: str, seed: int) -> Path:
    """The base plus the parent's task vector, shuffled or replaced by noise of its norm, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    rng = np.random.default_rng(seed)
    base, own = read_float(zoo.base()), read_float(parent)
    tensors = {}
    for name, values in base.items():
        delta = (own[name] - values).ravel()
        if kind == "shuffled":
            moved = rng.permutation(delta)
        else:
            drawn = rng.standard_normal(delta.size)
            moved = drawn * (np.linalg.norm(delta) / np.linalg.norm(drawn))
        tensors[name] = torch.from_numpy(values + moved.reshape(values.shape).astype(np.float32)).bfloat16()
    if not target.exists():
        shutil.copytree(zoo.base(), target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def read_float(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a checkpoint in bfloat16, as float32."""
    index = open_checkpoint(str(path))
    with RangeReader(index) as reader:
        return {name: (reader.read(name).astype(np.uint32) << 16).view(np.float32) for name in index.tensors}


def run(folder: Path, pool: str, members: dict[str, str], name: str, iterations: int) -> SelectionResult:
    """One selection over one pool."""
    changes = WALKS[name]
    document = {
        "pool": [{"model": source, "name": member} for member, source in members.items()],
        "base_model": str(zoo.base()),
        "calibration": {
            "sources": [source_of(folder, ability) for ability in zoo.ABILITIES],
            "blocks": 26,
            "held_out": 14,
            "block_tokens": 96,
            "end_of_text": False,
        },
        # Rounding to bfloat16 would be a step of its own, as large as the last steps of a walk.
        "merge": {"out_dtype": "float32"},
        "backend": {"batch_size": 16, "threads": 1},
        "executor": {"threads": 1, "memory": "500MB"},
        **changes,
        "steps": {"iterations": iterations, "patience": 4, **changes.get("steps", {})},
    }
    slug = "".join(character if character.isalnum() else "-" for character in f"{pool} {name}")
    (folder / f"{slug}.yaml").write_text(dump_yaml(document))
    result = run_selection(parse_selection(document), folder / slug)
    print(f"{pool}: {name}: {held_out(result, 0):.4f} -> {held_out(result, result.best):.4f}", flush=True)
    return result


def source_of(folder: Path, ability: str) -> dict[str, Any]:
    """Passages count whole; of questions, as in the zoo's training, the answer alone."""
    path = str(folder / f"{ability}.jsonl")
    if ability in ("prose", "python"):
        return {"path": path, "field": ["context", "answer"]}
    return {"path": path, "prompt": "context", "field": "answer"}


def held_out(result: SelectionResult, number: int) -> float:
    """The held-out loss of an iterate."""
    return float(result.rows[number].held_out or float("nan"))


def on_irrelevant(result: SelectionResult) -> float:
    """The best iterate's coefficients on irrelevant checkpoints, in all."""
    return sum(
        weight for name, weight in zip(result.names_V, result.weights_V, strict=True) if name.partition(" ")[0] in KINDS
    )


def score(walks: dict[str, dict[str, SelectionResult]]) -> dict[str, dict[str, list[float]]]:
    """Accuracies on report items of the uniform merges and of what the shown walk found."""
    from remelt.merge import merge_recipe
    from remelt.recipe_yaml import load_recipe

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.zoo.score import score_checkpoint

    found: dict[str, dict[str, list[float]]] = {}
    for pool, by_name in walks.items():
        output = by_name[SHOWN].output
        uniform = output.with_name(f"{output.name}-uniform")
        merge_recipe(load_recipe(output / "iterates" / "0000" / "recipe.yaml"), uniform, threads=1)
        found[pool] = {
            "uniform merge": score_checkpoint(uniform, "report")[0],
            SHOWN: score_checkpoint(output / "best", "report")[0],
        }
        for name in ("pairwise by layer",):
            found[pool][name] = score_checkpoint(by_name[name].output / "best", "report")[0]
    return found


def report(
    walks: dict[str, dict[str, SelectionResult]], scores: dict[str, dict[str, list[float]]], folder: Path
) -> None:
    """Figure and tables."""
    draw(walks, folder / "frank_wolfe.svg")
    pools = list(walks)
    counts = {pool: len(walks[pool][SHOWN].names_V) for pool in pools}
    uniform = {pool: held_out(walks[pool][SHOWN], 0) for pool in pools}
    rows = [["uniform merge (the start)", *(f"{uniform[pool]:.4f}" for pool in pools), "", "", ""]]
    for name in WALKS:
        few, many = (walks[pool][name] for pool in pools)
        rows.append(
            [
                name,
                *(f"{held_out(walk, walk.best):.4f}" for walk in (few, many)),
                f"{on_irrelevant(many):.3f}",
                f"{many.rows[-1].gap:.2g}",
                f"{many.num_gradients} + {many.num_losses}",
            ]
        )
    num_steps = max(len(result.rows) for each in walks.values() for result in each.values()) - 1
    with_base = walks[pools[0]]["pairwise, base in the hull"]
    on_base = dict(zip(with_base.names_V, with_base.weights_V, strict=True))["base"]
    sections = [
        f"Pools of {counts[pools[0]]} specialists, and of {counts[pools[1]]} checkpoints: the same and "
        f"{counts[pools[1]] - counts[pools[0]]} irrelevant ones (task vectors shuffled, or noise of their norm). The "
        f"loss is in nats for each token, the mean over four abilities, on held-out blocks; {num_steps} "
        "steps at most. "
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions(sys.executable, PACKAGES).items()) + ".",
        "![Loss by iterate, and coefficients, with and without irrelevant checkpoints](frank_wolfe.svg)",
        "## Held-out loss of the best iterate",
        markdown_table(
            [
                "walk",
                "specialists",
                "with irrelevant",
                "coefficient on irrelevant",
                "last gap",
                "gradients + losses",
            ],
            rows,
        ),
        "What is left on irrelevant checkpoints does what the base would: their task vectors are nearly orthogonal to "
        "everything and cancel each other, so that weight on them shortens the others'. Where the base is a vertex, "
        f"the specialists alone leave it {on_base:.2f}. A pairwise step empties one checkpoint at most, so that a walk "
        "from the uniform merge of the larger pool has not arrived after so few steps, as its gap says.",
        f"## Coefficients ({SHOWN})",
        markdown_table(
            ["checkpoint", *pools],
            [
                [
                    name,
                    *(f"{dict(zip(w.names_V, w.weights_V, strict=True)).get(name, 0):.3f}" for w in shown),
                ]
                for shown in [[walks[pool][SHOWN] for pool in pools]]
                for name in walks[pools[1]][SHOWN].names_V
            ],
        ),
        f"## Loss and gap by iterate ({SHOWN})",
        markdown_table(
            ["iterate", *(f"{pool}: {what}" for pool in pools for what in ("loss", "held out", "gap", "active"))],
            _iterate_rows([walks[pool][SHOWN] for pool in pools]),
        ),
    ]
    if scores:
        sections += [
            "## Accuracy on report items",
            markdown_table(
                ["merge", *zoo.ABILITIES, "mean"],
                [
                    [f"{pool}: {name}", *(f"{value:.3f}" for value in values[:5])]
                    for pool, by_name in scores.items()
                    for name, values in by_name.items()
                ],
            ),
            "The standard error of a mean is about 0.01.",
        ]
    data = {
        "walks": {
            pool: {name: json.loads(walk.to_json()) | {"output": "", "notes": []} for name, walk in each.items()}
            for pool, each in walks.items()
        },
        "scores": scores,
    }
    write_report(
        "frank_wolfe", "Frank-Wolfe selection with irrelevant checkpoints in the pool", sections, data, folder=folder
    )


def _iterate_rows(results: list[SelectionResult]) -> list[list[str]]:
    rows = []
    for number in range(max(len(result.rows) for result in results)):
        cells = [str(number)]
        for result in results:
            if number >= len(result.rows):
                cells += [""] * 4
                continue
            row = result.rows[number]
            cells += [f"{row.loss:.4f}", f"{held_out(result, number):.4f}", f"{row.gap:.2g}", str(row.num_active)]
        rows.append(cells)
    return rows


def draw(walks: dict[str, dict[str, SelectionResult]], path: Path) -> None:
    """Held-out loss by iterate on the left, coefficients on the right."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "remelt"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = dict(zip(WALKS, plt.get_cmap("tab10").colors, strict=False))
    for pool, line in zip(walks, ("-", "--"), strict=True):
        for name in (SHOWN, "vanilla, 2/(t+2)", "vanilla, line search", "pairwise by layer"):
            result = walks[pool][name]
            losses = [row.held_out for row in result.rows]
            left.plot(losses, line, color=colours[name], label=f"{name}, {pool}", marker=".", linewidth=1.2)
    left.set(xlabel="iterate (0 is the uniform merge)", ylabel="held-out loss, nats for each token")
    left.legend(fontsize=7)
    many = walks[list(walks)[1]][SHOWN]
    few = walks[next(iter(walks))][SHOWN]
    places = np.arange(len(many.names_V))
    alone = dict(zip(few.names_V, few.weights_V, strict=True))
    right.barh(places - 0.2, [alone.get(name, 0.0) for name in many.names_V], 0.4, label="specialists alone")
    right.barh(places + 0.2, many.weights_V, 0.4, label="with irrelevant")
    right.set_yticks(places, many.names_V, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel=f"coefficient ({SHOWN})")
    right.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
