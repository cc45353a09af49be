"""The zoo is whole, small, loads cleanly, and no report item was within reach of training or search."""

from __future__ import annotations

import ast
import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from remelt_evals import zoo
from remelt_evals.suite import load_suite

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "zoo"
ROLES = ("search", "selection", "report")
CHECKPOINTS = tuple(sorted(path.parent for path in zoo.zoo_dir().rglob("model.safetensors")))
DENSE = (zoo.base(), *zoo.parents().values())

needs_scripts = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="the zoo's scripts are not part of the wheel")


def read_items(name: str, role: str) -> list[dict[str, Any]]:
    lines = (zoo.zoo_dir() / "items" / f"{name}_{role}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def true_text(item: dict[str, Any]) -> str:
    """What an item shows as true: its passage, or its context and the right choice."""
    return str(item["text"] if "text" in item else item["context"] + item["choices"][item["label"]])


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.zoo.corpus")


def test_everything_fits_into_eight_megabytes() -> None:
    files = [p for p in zoo.zoo_dir().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_every_checkpoint_is_reachable_by_name() -> None:
    named = {*DENSE, *zoo.run_steps(), zoo.experts_base(), *zoo.experts_parents().values()}
    assert named == set(CHECKPOINTS)
    assert len(zoo.run_steps()) == 16


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.relative_to(zoo.zoo_dir()).as_posix())
def test_checkpoint_loads_without_a_missing_key_and_is_finite(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x + 1  # 12*3=36\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert (folder / "generation_config.json").is_file()


def test_experts_are_stored_under_the_names_of_released_checkpoints() -> None:
    from safetensors import safe_open

    with safe_open(zoo.experts_base() / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("model.layers.1.mlp.gate.e_score_correction_bias").get_dtype() == "F32"
    assert {f"model.layers.2.mlp.experts.{i}.down_proj.weight" for i in range(8)} <= names
    assert "model.layers.2.mlp.shared_experts.up_proj.weight" in names


@pytest.mark.parametrize("path", [zoo.suite_path(), zoo.bits_suite_path()], ids=lambda path: path.stem)
def test_suites_serve_all_three_roles(path: Path) -> None:
    suite = load_suite(path)
    assert suite.is_local
    assert set(suite.roles) == set(ROLES)


@pytest.mark.parametrize("name", [*zoo.ABILITIES, "prose_bits", "python_bits"])
def test_roles_share_no_item(name: str) -> None:
    seen: set[str] = set()
    for role in ROLES:
        items = read_items(name, role)
        # Neither the question nor its right answer turns up elsewhere, whatever the false choices are.
        keys = {item.get("text", item.get("context")) for item in items}
        assert len(keys) == len(items)
        assert not keys & seen
        seen |= keys
        for item in items:
            if "choices" in item:
                assert len(set(item["choices"])) == 4
                assert 0 <= item["label"] < 4


@pytest.mark.slow
@needs_scripts
@pytest.mark.parametrize("ability", ["prose", "python"])
def test_no_item_of_text_occurs_in_the_training_text(ability: str, corpus: ModuleType) -> None:
    training = corpus.write_training_text(ability, 0)
    items = [item for name in (ability, f"{ability}_bits") for role in ROLES for item in read_items(name, role)]
    assert [text for text in map(true_text, items) if text in training] == []


@needs_scripts
@pytest.mark.parametrize("ability", ["arithmetic", "strings"])
def test_every_question_belongs_to_its_role_and_is_answered_right(ability: str, corpus: ModuleType) -> None:
    for role in ROLES:
        for item in read_items(ability, role):
            assert corpus.choose_part(item["context"]) == role
            answer = item["choices"][item["label"]].strip()
            question = item["context"].removesuffix("=")
            if ability == "arithmetic":
                assert answer == str(eval(question, {"min": min, "max": max}))
            else:
                name, word = question.removesuffix(")").split("(")
                assert answer == corpus.STRING_FUNCTIONS[name](word)
    rng = random.Random(0)
    drawn = {corpus.choose_part(corpus.draw_question(ability, "train", rng)[0]) for _ in range(500)}
    assert drawn == {"train"}


@needs_scripts
def test_only_one_script_knows_the_report_seed(corpus: ModuleType) -> None:
    sys.modules.pop("benchmarks.zoo.report_items", None)
    seed = importlib.import_module("benchmarks.zoo.report_items").REPORT_SEED
    folders = ("benchmarks", "evals", "jobs", "pipeline")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in sources:
        if path == SCRIPTS / "report_items.py":
            continue
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            assert not (isinstance(node, ast.Constant) and node.value == seed), path
        assert not any("report_items" in name for name in imported), path


@needs_scripts
def test_training_reads_nothing_but_its_own_part(corpus: ModuleType) -> None:
    library = corpus.read_library()
    for ability in ("prose", "python"):
        expected = sorted("\n".join(library[ability]["train"]).split("\n"))
        assert sorted(corpus.write_training_text(ability, 0).removesuffix("\n").split("\n")) == expected
    tree = ast.parse((SCRIPTS / "train.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("benchmarks")
        for alias in node.names
    }
    assert imported == {"ABILITIES", "ALPHABET", "write_training_text", "TEXT_ABILITIES", "ZOO_DIR"}


@pytest.mark.slow
def test_each_specialist_leads_at_its_own_ability() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.base())

    @torch.no_grad()
    def accuracy(model: Any, ability: str) -> float:
        items = read_items(ability, "selection")
        pairs = [(item["context"], choice) for item in items for choice in item["choices"]]
        rows = [torch.tensor(tokenizer(context + choice)["input_ids"]) for context, choice in pairs]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logs = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        spans = [(len(context) - 1, len(row) - 1) for (context, _), row in zip(pairs, rows, strict=True)]
        totals = torch.stack([line[first:last].sum() for line, (first, last) in zip(logs, spans, strict=True)])
        labels = torch.tensor([item["label"] for item in items])
        return float((totals.view(-1, 4).argmax(1) == labels).float().mean())

    scores = {}
    for name, folder in {"base": zoo.base(), **zoo.parents()}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        scores[name] = {ability: accuracy(model, ability) for ability in zoo.ABILITIES}
    for ability in zoo.ABILITIES:
        assert scores[ability][ability] > scores["base"][ability]
        others = [scores[name][ability] for name in zoo.ABILITIES if name != ability]
        assert scores[ability][ability] > max(others)
        # Each pays for it elsewhere, and leaves room for a merge.
        assert min(scores[ability].values()) < 0.7
