"""What the README says that can be checked by machine."""

from __future__ import annotations

import re
from pathlib import Path

from remelt.recipe_yaml import parse_recipe
from remelt.strict_config import parse_yaml
from remelt_jobs.tables import operator_markdown

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_operator_table_is_what_the_operators_declare() -> None:
    assert operator_markdown() in README


def test_its_recipes_parse() -> None:
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "merge_method" in block]
    recipes = [parse_yaml(block, where="README.md") for block in blocks]
    assert len(recipes) >= 3
    for document in recipes:
        parse_recipe(document.get("recipe", document))


def test_files_that_it_names_exist() -> None:
    root = Path(__file__).parents[1]
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).exists(), link
