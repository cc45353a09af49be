"""The model card of a merge: what it was made of and how, readable by people and by the Hub."""

from __future__ import annotations

import re

from remelt import __version__
from remelt.plan import MergePlan
from remelt.recipe import Recipe

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def model_card(plan: MergePlan, recipe: Recipe, run_id: str) -> str:
    """README.md in the Hub's form: front matter with the parents that have Hub ids, then the recipe."""
    hub_ids = [c.source.split("@")[0] for c in recipe.checkpoints if _HUB_ID.match(c.source)]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- remelt"]
    if hub_ids:
        front += ["base_model:", *(f"- {hub_id}" for hub_id in hub_ids), "base_model_relation: merge"]
    front.append("---")
    rows = [f"| {kind} | {operator} | {tensors} |" for kind, operator, tensors, _ in plan.operators_by_class]
    parents = [
        f"- `{checkpoint.name}`: {checkpoint.source}" + (" (base)" if place == recipe.base else "")
        for place, checkpoint in enumerate(recipe.checkpoints)
    ]
    return "\n".join(
        [
            *front,
            "",
            f"# {recipe.name or 'A merge'}",
            "",
            f"Merged with remelt {__version__} by `{recipe.merge_method}`. Run `{run_id[:16]}`, numerics "
            f"`{plan.settings.numerics}`; digests of every tensor and file are in `remelt_manifest.json`, and "
            "`remelt verify` checks them.",
            "",
            "## Parents",
            "",
            *parents,
            "",
            "## What was done",
            "",
            "| tensors | operator | number |",
            "|---|---|---|",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
        ]
    )
