"""The evaluator with the real lm-eval: right numbers, no memory of other checkpoints, failures as findings."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions
from remelt_evals.eval_report import (
    EvalReport,
    EvalRequest,
    join_reports,
    objective,
    report_from_json,
    report_to_json,
)
from remelt_evals.evaluator import Evaluator

HF = BackendOptions(name="hf", threads=1)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(HF)


@pytest.fixture(scope="module")
def dummy() -> Evaluator:
    return Evaluator(BackendOptions(name="dummy"))


@pytest.fixture(scope="module")
def first(evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path) -> EvalReport:
    return evaluator.evaluate(request(checkpoints["first"], suite_path))


def request(checkpoint: Path | str, suite: Path, **changes: object) -> EvalRequest:
    fields = {"checkpoint": str(checkpoint), "digest": str(checkpoint), "suite": str(suite), "role": "search"}
    return EvalRequest(**fields | changes)  # type: ignore[arg-type]


def log_probabilities(checkpoint: Path, tokens: list[int]) -> NDArray[np.float64]:
    """Of each next token, by transformers alone; shape (len(tokens) - 1,)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[:-1]
    return rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()  # type: ignore[no-any-return]


def encode(checkpoint: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"])


def test_log_likelihoods_are_those_of_transformers(
    first: EvalReport, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    words, prose = first.tasks
    sample = words.samples[0]
    for choice, loglik in zip(("alpha", "beta", "gamma"), sample.loglik, strict=True):
        context = encode(checkpoints["first"], "item 0:")
        tokens = context + encode(checkpoints["first"], f" {choice}")
        expected = log_probabilities(checkpoints["first"], tokens)[len(context) - 1 :].sum()
        assert loglik == pytest.approx(expected, abs=1e-3)
    text = json.loads(prose.samples[0].doc_json)["text"]
    expected = log_probabilities(checkpoints["first"], [0, *encode(checkpoints["first"], text)]).sum()
    assert prose.samples[0].loglik == (pytest.approx(expected, abs=1e-3),)
    assert prose.samples[0].score == pytest.approx(-expected / len(text.encode()) / math.log(2), abs=1e-5)


def test_values_follow_from_the_samples(first: EvalReport) -> None:
    words, prose = first.tasks
    assert (words.n, words.n_total, words.aggregation, words.num_fewshot) == (12, 12, "mean", 0)
    assert words.value == np.mean([sample.correct for sample in words.samples])
    best = [int(np.argmax(np.array(sample.loglik, float))) for sample in words.samples]
    assert [str(choice) == sample.target for choice, sample in zip(best, words.samples, strict=True)] == [
        sample.correct for sample in words.samples
    ]
    weights = [sample.weight for sample in prose.samples]
    assert weights == [len(json.loads(sample.doc_json)["text"].encode()) for sample in prose.samples]
    assert prose.value == pytest.approx(np.average([sample.score or 0.0 for sample in prose.samples], weights=weights))
    assert not prose.higher_is_better


def test_every_task_has_a_standard_error(first: EvalReport) -> None:
    words, prose = first.tasks
    assert words.stderr == pytest.approx(np.std([s.score or 0.0 for s in words.samples], ddof=1) / math.sqrt(12))
    # lm-eval gives none for rates; the delta method for a ratio of means is the reference.
    scores = np.array([sample.score for sample in prose.samples], float)
    weights = np.array([sample.weight for sample in prose.samples])
    delta = np.sqrt(np.sum((weights * (scores - prose.value)) ** 2)) / weights.sum()
    assert prose.stderr == pytest.approx(delta, rel=0.2)


def test_the_objective_negates_what_is_better_when_lower(first: EvalReport) -> None:
    words, prose = first.tasks
    assert objective(first) == pytest.approx((words.value - 0.5 * prose.value) / 1.5)


def test_a_report_survives_json_and_pickle(first: EvalReport) -> None:
    assert report_from_json(report_to_json(first)) == first
    assert pickle.loads(pickle.dumps(first)) == first
    assert json.loads(report_to_json(first))["backend"] == "hf"
    assert first.versions["lm-eval"]


def test_another_checkpoint_gets_its_own_answers_and_the_first_gets_the_same_again(
    evaluator: Evaluator, first: EvalReport, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    second = evaluator.evaluate(request(checkpoints["second"], suite_path))
    again = evaluator.evaluate(request(checkpoints["first"], suite_path))
    assert again.tasks == first.tasks
    assert again.evaluation_id == first.evaluation_id != second.evaluation_id
    for mine, other in zip(first.tasks, second.tasks, strict=True):
        assert all(a.loglik != b.loglik for a, b in zip(mine.samples, other.samples, strict=True))
    assert [sample.doc_hash for sample in first.tasks[0].samples] == [s.doc_hash for s in second.tasks[0].samples]


def test_a_model_of_nan_is_a_failed_evaluation_and_not_a_score(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path
) -> None:
    report = evaluator.evaluate(request(checkpoints["broken"], suite_path))
    assert (report.status, report.tasks) == ("failed", ())
    assert "are not numbers" in str(report.error)
    with pytest.raises(EvaluationError, match="failed and has no objective"):
        objective(report)


def test_a_checkpoint_that_loads_incompletely_is_refused(
    evaluator: Evaluator, checkpoints: dict[str, Path], suite_path: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoints["first"], tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"1 tensor is missing .*model\.layers\.0\.mlp\.up_proj\.weight"):
        evaluator.evaluate(request(folder, suite_path))


def test_lm_eval_caches_stay_empty(first: EvalReport, evaluator: Evaluator) -> None:
    import lm_eval.caching.cache as request_cache

    assert not list(Path(request_cache.PATH).rglob("*.pickle"))


def test_roles_that_share_items_are_refused_with_names_and_counts(
    dummy: Evaluator, make_suite: Callable[..., Path]
) -> None:
    # The report's items are numbered from 200, too.
    path = make_suite(selection_first=200)
    with pytest.raises(EvaluationError, match=r"selection and report share 12 items \(12 in words_selection, 12 in"):
        dummy.evaluate(request("x", path))
    path.write_text(path.read_text() + "allow_overlap: true\n")
    report = dummy.evaluate(request("x", path))
    assert report.is_ok
    assert len(report.notes) == 2
    assert "selection and report share 12 items" in report.notes[0]


def test_a_limit_takes_the_first_items_and_another_id(dummy: Evaluator, suite_path: Path) -> None:
    full = dummy.evaluate(request("x", suite_path))
    short = dummy.evaluate(request("x", suite_path, limit=5))
    assert short.fidelity == "first-5"
    assert short.evaluation_id != full.evaluation_id
    for task, all_items in zip(short.tasks, full.tasks, strict=True):
        assert (task.n, task.n_total) == (5, 12)
        assert task.samples == all_items.samples[:5]


def test_each_role_is_scored_on_its_own_items(dummy: Evaluator, suite_path: Path) -> None:
    hashes = [
        {
            sample.doc_hash
            for task in dummy.evaluate(request("x", suite_path, role=role)).tasks
            for sample in task.samples
        }
        for role in ("search", "selection", "report")
    ]
    assert all(len(each) == 24 for each in hashes)
    assert len(set().union(*hashes)) == 72


def test_files_changed_under_a_study_are_noticed(dummy: Evaluator, make_suite: Callable[..., Path]) -> None:
    path = make_suite()
    digest = dummy.evaluate(request("x", path)).suite_digest
    data = path.parent / "tasks" / "prose_search.jsonl"
    data.write_text(data.read_text().replace("river", "rover"))
    with pytest.raises(EvaluationError, match="were changed: the study began with suite digest"):
        dummy.evaluate(request("x", path, suite_digest=digest))
    # Without a digest to hold to, the new items are read, not the ones that were read before.
    assert any("rover" in sample.doc_json for sample in dummy.evaluate(request("x", path)).tasks[1].samples)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: acc,", "metric: accuracy,", "has no metric 'accuracy': it has acc, acc_norm"),
        ("metric: bits_per_byte", "metric: acc", "has no metric 'acc': it has bits_per_byte, byte_perplexity"),
    ],
)
def test_a_metric_that_a_task_lacks_is_named(
    old: str, new: str, message: str, dummy: Evaluator, make_suite: Callable[..., Path]
) -> None:
    path = make_suite()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(EvaluationError, match=message):
        dummy.evaluate(request("x", path))


def test_a_folder_without_a_checkpoint_is_refused(evaluator: Evaluator, suite_path: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is no checkpoint folder"):
        evaluator.evaluate(request(tmp_path, suite_path))


def test_perplexity_is_the_exponential_of_a_weighted_mean(dummy: Evaluator, make_suite: Callable[..., Path]) -> None:
    path = make_suite()
    path.write_text(path.read_text().replace("bits_per_byte", "byte_perplexity"))
    task = dummy.evaluate(request("x", path)).tasks[1]
    weights = [sample.weight for sample in task.samples]
    mean = np.average([sample.score or 0.0 for sample in task.samples], weights=weights)
    assert task.aggregation == "exp_weighted_mean"
    assert task.value == pytest.approx(math.exp(mean))
    assert task.stderr is not None
    assert 0 < task.stderr < task.value


def test_generated_text_is_scored_by_the_named_filter(dummy: Evaluator, make_suite: Callable[..., Path]) -> None:
    path = make_suite()
    folder = path.parent / "tasks"
    (folder / "number.yaml").write_text(
        "task: number\ndataset_path: json\ndataset_kwargs: {data_files: {test: words_search.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '0'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
        "filter_list:\n"
        "  - {name: whole, filter: [{function: take_first}]}\n"
        "  - {name: integer, filter: [{function: regex, regex_pattern: '^(\\d+)'}, {function: take_first}]}\n"
    )
    path.write_text(
        "name: text\ntasks_dir: tasks\ntasks:\n  - {ability: numbers, metric: exact_match, search: number}\n"
    )
    with pytest.raises(EvaluationError, match="several filters: say exact_match,whole or exact_match,integer"):
        dummy.evaluate(request("x", path))
    path.write_text(path.read_text().replace("exact_match", '"exact_match,integer"'))
    (task,) = dummy.evaluate(request("x", path)).tasks
    # The dummy says a number below one, so its integer part is 0.
    assert (task.value, task.stderr, task.filter) == (1.0, 0.0, "integer")
    assert task.samples[0].response == "0"
    assert task.samples[0].loglik == ()


def test_parts_of_a_suite_join_to_the_whole(checkpoints: dict[str, Path], suite_path: Path) -> None:
    evaluator = Evaluator(HF)
    asked = request(str(checkpoints["first"]), suite_path)
    whole = evaluator.evaluate(asked)
    parts = {entries: evaluator.evaluate(replace(asked, entries=entries)) for entries in ((1,), (0,))}
    joined = join_reports(parts)
    assert [task.task for task in joined.tasks] == [task.task for task in whole.tasks]
    for one, other in zip(joined.tasks, whole.tasks, strict=True):
        assert (one.value, one.stderr, one.n) == pytest.approx((other.value, other.stderr, other.n), rel=1e-5)
    assert len({report.evaluation_id for report in (joined, whole, *parts.values())}) == 4
    assert evaluator.evaluation_id(replace(asked, entries=(1,))) == parts[1,].evaluation_id
    with pytest.raises(EvaluationError, match="has 2 entries"):
        evaluator.evaluate(replace(asked, entries=(2,)))
    evaluator.close()


def test_code_of_the_model_runs_only_where_the_suite_allows_it_by_name(
    dummy: Evaluator, make_suite: Callable[..., Path]
) -> None:
    path = make_suite()
    (path.parent / "tasks" / "run.py").write_text(
        "def runs(references, predictions):\n    return float(eval(predictions[0]) >= 0)\n"
    )
    (path.parent / "tasks" / "program.yaml").write_text(
        "task: program\ndataset_path: json\ndataset_kwargs: {data_files: {test: words_search.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '0'\n"
        "unsafe_code: true\ngeneration_kwargs: {until: ['x'], max_gen_toks: 4}\n"
        "metric_list:\n  - {metric: !function run.runs, aggregation: mean, higher_is_better: true}\n"
    )
    path.write_text("name: code\ntasks_dir: tasks\ntasks:\n  - {ability: python, metric: runs, search: program}\n")
    with pytest.raises(EvaluationError, match=r"task program runs code .* execute_code: \[program\]"):
        dummy.evaluate(request("x", path))
    path.write_text(path.read_text() + "execute_code: [program]\n")
    (task,) = dummy.evaluate(request("x", path)).tasks
    assert task.value == 1.0
    path.write_text(path.read_text().replace("[program]", "[programs]"))
    with pytest.raises(EvaluationError, match=r"no lm-eval task 'programs'.*program"):
        dummy.evaluate(request("x", path))


def test_the_evaluation_id_follows_what_decides_the_numbers_and_not_where_it_runs(suite_path: Path) -> None:
    asked = request("x", suite_path)
    plain = Evaluator(HF).evaluation_id(asked)
    same = [BackendOptions(threads=2), BackendOptions(), BackendOptions(name="hf")]
    assert {Evaluator(options).evaluation_id(asked) for options in same} == {plain}
    others = [BackendOptions(dtype="float32"), BackendOptions(device="cuda"), BackendOptions(name="dummy")]
    assert len({plain} | {Evaluator(options).evaluation_id(asked) for options in others}) == 4
    elsewhere = Evaluator(BackendOptions(device="cuda:1")).evaluation_id(asked)
    assert elsewhere == Evaluator(BackendOptions(device="cuda")).evaluation_id(asked)
