"""Selection from end to end on the zoo: resumable, every iterate a recipe, bad input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import Command, the_line
from remelt.errors import EvaluationError, RecipeError, StudyError
from remelt.executor import LocalExecutor
from remelt.formats import open_checkpoint
from remelt.hull import Hull, Member
from remelt.inner_products import collect, measure_products, plan_products
from remelt.merge import merge_recipe
from remelt.oracle import group_tensors
from remelt.recipe_yaml import load_recipe
from remelt.resolve import resolve
from remelt.strict_config import dump_yaml
from remelt.treatment import Apply
from remelt_evals import zoo
from remelt_jobs.selection import run_selection
from remelt_jobs.selection_config import SelectionConfig, parse_selection


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answered items of the zoo as calibration text."""
    folder = tmp_path_factory.mktemp("texts")
    for ability in ("prose", "arithmetic"):
        items = (zoo.zoo_dir() / "items" / f"{ability}_search.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in items]
        lines = [
            {"prompt": item["context"], "text": item["choices"][item["label"]].rstrip() + "\n"} for item in records
        ]
        (folder / f"{ability}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_document(texts: Path, **changes: Any) -> dict[str, Any]:
    parents = zoo.parents()
    document = {
        "pool": [{"model": str(parents[name]), "name": name} for name in ("prose", "python", "arithmetic")],
        "base_model": str(zoo.base()),
        "calibration": {
            "sources": [
                {"path": str(texts / "prose.jsonl"), "field": ["prompt", "text"]},
                {"path": str(texts / "arithmetic.jsonl"), "prompt": "prompt"},
            ],
            "blocks": 4,
            "held_out": 2,
            "block_tokens": 48,
            "end_of_text": False,
        },
        "merge": {"out_dtype": "float32"},
        "steps": {"iterations": 3},
        "backend": {"threads": 1},
        "executor": {"threads": 1, "memory": "200MB"},
    }
    return {**document, **changes}


def make_config(texts: Path, **changes: Any) -> SelectionConfig:
    return parse_selection(make_document(texts, **changes))


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished selection of one row of coefficients."""
    output = tmp_path_factory.mktemp("selection") / "out"
    run_selection(make_config(texts), output)
    return output


def coefficients(output: Path, number: int) -> np.ndarray:
    return np.array(
        json.loads((output / "iterates" / f"{number:04}" / "coefficients.json").read_text())["coefficients"]
    )


def test_the_loss_falls_the_gap_is_reported_and_the_best_is_merged(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    losses = [row["loss"] for row in result["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert all(row["gap"] > 0 and row["held_out"] > 0 for row in result["rows"])
    # The gap at the start bounds what was gained since, up to the loss's own curvature.
    assert losses[0] - losses[-1] <= result["rows"][0]["gap"] * 1.05
    assert sum(result["weights_V"]) == pytest.approx(1.0)
    assert (finished / "best" / "remelt_manifest.json").exists()
    assert not (finished / "work").exists()


def test_every_iterate_is_a_recipe_that_merge_takes_unchanged(finished: Path, remelt: Command, tmp_path: Path) -> None:
    number = json.loads((finished / "result.json").read_text())["best"]
    run = remelt("merge", finished / "iterates" / f"{number:04}" / "recipe.yaml", "--output", tmp_path / "out")
    assert run.status == 0, run.err
    manifests = [
        json.loads((folder / "remelt_manifest.json").read_text()) for folder in (finished / "best", tmp_path / "out")
    ]
    assert manifests[0]["digest"] == manifests[1]["digest"]


def test_a_finished_selection_says_so_and_measures_nothing(texts: Path, finished: Path, remelt: Command) -> None:
    config = finished.parent / "selection.yaml"
    config.write_text(dump_yaml(make_document(texts)))
    before = sorted((finished / "journal").glob("*"))[0].read_text()
    run = remelt("select", config, "--output", finished)
    assert run.status == 0
    assert "finished with 4 iterates, nothing done" in run.out
    assert sorted((finished / "journal").glob("*"))[0].read_text() == before


@pytest.mark.slow
def test_a_killed_selection_goes_on_to_the_same_end(
    texts: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remelt_jobs import selection

    measure, calls = selection.measure, []

    def dying(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(selection, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        run_selection(make_config(texts), tmp_path / "out")
    result = run_selection(make_config(texts), tmp_path / "out")
    expected = json.loads((finished / "result.json").read_text())
    assert result.digest == expected["digest"]
    assert [row.loss for row in result.rows] == [row["loss"] for row in expected["rows"]]
    # Of what was measured before the end nothing was measured again.
    assert len(calls) == 1 + expected["num_gradients"] + expected["num_losses"]


@pytest.mark.slow
def test_more_iterations_go_on_from_where_it_ended(texts: Path, tmp_path: Path) -> None:
    short = run_selection(make_config(texts, steps={"iterations": 1}), tmp_path / "out")
    longer = run_selection(make_config(texts, steps={"iterations": 3}), tmp_path / "out")
    assert [row.loss for row in longer.rows[:2]] == [row.loss for row in short.rows]
    assert len(longer.rows) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        ("layer", {"variant": "away", "oracle": {"score": "cosine"}}),
        ("tensor", {"merge": {"merge_method": "task_arithmetic"}, "base_in_hull": True, "start": "base"}),
        ("layer", {"merge": {"merge_method": "ties", "parameters": {"density": 0.6}}, "variant": "vanilla"}),
        ("model", {"soft": {"vertices": 2, "steps": 2}}),
    ],
)
def test_granularities_variants_and_operators_lower_the_loss(
    granularity: str, changes: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    config = make_config(texts, granularity=granularity, **{"steps": {"iterations": 2}, **changes})
    result = run_selection(config, tmp_path / "out")
    assert result.rows[result.best].loss < result.rows[0].loss
    found = coefficients(tmp_path / "out", result.best)
    assert found.shape == ({"model": 1, "layer": 5, "tensor": 29}[granularity], 3 + ("base_in_hull" in changes))
    assert np.allclose(found.sum(axis=1), 1.0)
    assert (found >= 0).all()


def test_a_mixture_of_experts_is_selected_from_by_the_names_of_its_files(texts: Path, tmp_path: Path) -> None:
    pool = [{"model": str(path), "name": name} for name, path in zoo.experts_parents().items()]
    changes = {"pool": pool, "base_model": str(zoo.experts_base()), "granularity": "tensor", "steps": {"iterations": 1}}
    result = run_selection(make_config(texts, **changes), tmp_path / "out")
    assert result.rows[1].loss < result.rows[0].loss
    found = json.loads((tmp_path / "out" / "iterates" / "0001" / "coefficients.json").read_text())
    moved = [label for label, row in zip(found["blocks"], found["coefficients"], strict=True) if row != [0.5, 0.5]]
    assert any(".experts.3." in label for label in moved)
    # It has no gradient, and keeps what it began with.
    assert not any("e_score_correction_bias" in label for label in moved)


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_a_recipe_gives_every_tensor_the_coefficients_of_its_block(granularity: Any) -> None:
    names = list(open_checkpoint(str(zoo.base())).tensors)
    blocks = group_tensors(names, granularity)
    pool = tuple(Member(str(path), name, {}) for name, path in zoo.parents().items())
    hull = Hull(pool=pool, merge_method="task_arithmetic", base=str(zoo.base()), with_base=True)
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.ones(5), blocks.num_blocks)
    matrix[rng.random(matrix.shape) < 0.3] = 0.0
    matrix[1] = [0, 0, 0, 0, 1]  # the base alone: a copy
    recipe = hull.recipe(matrix, blocks)
    for name, block, treatment in zip(names, blocks.of_T, resolve(recipe, names), strict=True):
        if block == 1:
            assert not isinstance(treatment, Apply), name
            continue
        assert isinstance(treatment, Apply)
        by_name = {
            recipe.checkpoints[place].name: weight
            for place, weight in zip(treatment.models, treatment.coefficients, strict=True)
        }
        expected = {member.name: weight for member, weight in zip(pool, matrix[block], strict=False) if weight > 0}
        assert by_name == expected, name


def test_rules_leave_tensors_out_of_the_selection(texts: Path, tmp_path: Path) -> None:
    rules = [{"match": {"class": ["embedding", "norm"]}, "copy": str(zoo.base())}]
    config = make_config(texts, granularity="layer", merge={"rules": rules}, steps={"iterations": 1})
    run_selection(config, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "iterates" / "0001" / "coefficients.json").read_text())
    assert found["blocks"] == ["layer 0", "layer 1", "layer 2"]
    recipe = load_recipe(tmp_path / "out" / "iterates" / "0001" / "recipe.yaml")
    merged = merge_recipe(recipe, tmp_path / "merged", threads=1)
    assert merged.digest


@pytest.mark.ray
def test_both_executors_take_the_same_products_to_the_bit(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remelt import inner_products
    from remelt_jobs.ray_executor import RayExecutor

    monkeypatch.setattr(inner_products, "UNIT_BYTES", (50_000, 50_000))
    pool = [open_checkpoint(str(path)) for path in zoo.parents().values()]
    base = open_checkpoint(str(zoo.base()))
    found = []
    for executor in (
        LocalExecutor(threads=2, memory_bytes=200_000_000),
        RayExecutor(num_workers=2, threads=1, memory_bytes=200_000_000),
    ):
        # A specialist stands for the gradient: to the pass it is a checkpoint like any other.
        plan = plan_products(pool[0], pool, base=base, with_squares=True, budget=executor.budget())
        assert len(plan.units) > 3
        units = list(executor.gather(measure_products, plan.settings, plan.units, plan.projection.total_bytes))
        found.append(collect(plan, units))
    assert found[0].names_T == found[1].names_T
    for one, two in zip(found[0][1:], found[1][1:], strict=True):
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": "away"}, "unknown key 'variants'.*did you mean 'variant'"),
        ({"variant": "away", "soft": {"vertices": 2}}, "soft steps move towards several vertices"),
        ({"steps": {"scale": 2}}, r"step scale 2 is outside \(0, 1\]"),
        ({"steps": {"rule": "backtrack"}}, "unknown value 'backtrack'"),
        ({"merge": {"merge_method": "slerp"}}, "slerp does not take a coefficient for each"),
        ({"merge": {"merge_method": "tees"}}, "unknown operator 'tees'; did you mean 'ties'"),
        ({"merge": {"merge_method": "linear", "parameters": {"weight": 1}}}, "weights are what is selected"),
        ({"start": "pros"}, "no start 'pros'; did you mean 'prose'"),
        ({"pool": []}, "0 checkpoints; there is something to select from two on"),
        ({"pool": ["./a", "./b/a"]}, "two checkpoints have the name 'a'"),
        ({"base_model": None, "base_in_hull": True}, "no `base_model`"),
        ({"base_model": None, "oracle": {"target": "deltas"}}, "task vectors need a `base_model`"),
        (
            {"merge": {"rules": [{"match": {"class": "norm"}, "merge_method": "linear"}]}},
            "`rules` copy or drop here|weight",
        ),
        ({"executor": {"name": "slurm"}}, "unknown value 'slurm'"),
    ],
)
def test_a_bad_file_is_refused_in_words(change: dict[str, Any], message: str, texts: Path) -> None:
    document = {key: value for key, value in make_document(texts, **change).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        parse_selection(document, where="selection.yaml")


def test_bad_input_ends_with_one_line_and_status_2(
    texts: Path, finished: Path, remelt: Command, tmp_path: Path
) -> None:
    path = tmp_path / "selection.yaml"

    def line(output: Path, **changes: Any) -> str:
        path.write_text(dump_yaml(make_document(texts, **changes)))
        return the_line(remelt("select", path, "--output", output))

    assert "they differ in: variant" not in line(finished, variant="away")
    assert "they differ in: steps" in line(finished, variant="away")
    assert "no such" in line(tmp_path / "a", pool=["./nowhere", str(zoo.base())]).lower()
    sources = [{"path": str(texts / "prose.jsonl")}]
    assert "knows 128 positions" in line(tmp_path / "b", calibration={"sources": sources, "block_tokens": 1000})
    calibration = {"sources": sources, "block_tokens": 128, "blocks": 500}
    assert "500 blocks and 16 held out were asked for" in line(tmp_path / "b", calibration=calibration)
    (tmp_path / "c" / "best").mkdir(parents=True)
    assert "no selection of ours" in line(tmp_path / "c")


def test_a_pool_that_changed_is_refused(texts: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(zoo.parents()["python"], mine)
    pool = [str(zoo.parents()["prose"]), str(mine)]
    run_selection(make_config(texts, pool=pool, steps={"iterations": 1}), tmp_path / "out")
    other = (zoo.parents()["strings"] / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(other)
    with pytest.raises(StudyError, match="mine changed since"):
        run_selection(make_config(texts, pool=pool, steps={"iterations": 1}), tmp_path / "out")


def test_two_drivers_do_not_meet(texts: Path, tmp_path: Path) -> None:
    from remelt_jobs.lease import Holder, take_lease

    (tmp_path / "out" / "journal").mkdir(parents=True)
    take_lease(tmp_path / "out", holder=Holder("elsewhere", 1, "x", "y"))
    with pytest.raises(StudyError, match="is driven by process 1 on elsewhere"):
        run_selection(make_config(texts), tmp_path / "out")


def test_text_without_the_field_is_refused_before_anything_is_merged(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="lacks the field 'body'"):
        sources = [{"path": str(texts / "prose.jsonl"), "field": "body"}]
        run_selection(make_config(texts, calibration={"sources": sources, "block_tokens": 48}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
