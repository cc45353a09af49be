"""The loss and its gradient as a checkpoint: right by finite differences, in the names of the files, on ranks alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remelt.errors import EvaluationError
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader
from remelt.strict_config import Section
from remelt_evals import zoo
from remelt_evals.calibration import Blocks, Calibration, Source, make_blocks, parse_calibration, read_documents
from remelt_evals.loss_gradient import LossOptions, load_model, load_tokenizer, measure, write_gradient

OPTIONS = LossOptions(batch_size=4, threads=1)
PROSE = "the river runs over stone and the light falls on it\n"


def write_text(folder: Path) -> tuple[Path, Path]:
    """Plain prose, and sums as JSON lines."""
    (folder / "prose.txt").write_text(PROSE * 40)
    lines = [{"question": f"{a}+{b}=", "answer": str(a + b), "number": a} for a in range(12) for b in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "prose.txt", folder / "sums.jsonl"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    prose, sums = write_text(tmp_path_factory.mktemp("text"))
    sources = (
        Source(path=prose, name="prose", weight=3.0),
        Source(path=sums, name="sums", prompt=("question",), fields=("answer",)),
    )
    return Calibration(sources=sources, blocks=5, held_out=2, block_tokens=24)


@pytest.fixture(scope="module")
def blocks(calibration: Calibration) -> Blocks:
    return make_blocks(calibration, load_tokenizer(zoo.base()), seed=0)[0]


def read_float(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    index = open_checkpoint(str(folder))
    with RangeReader(index) as reader:
        stored = {name: reader.read(name) for name in index.tensors}
    return {
        name: bits if index.tensors[name].dtype == "F32" else (bits.astype(np.uint32) << 16).view(np.float32)
        for name, bits in stored.items()
    }


def write_moved(source: Path, target: Path, direction: dict[str, np.ndarray[Any, Any]], step: float) -> Path:
    """A copy of a checkpoint in float32, moved along a direction."""
    from safetensors.numpy import save_file

    shutil.copytree(source, target)
    moved = {
        name: values + np.float32(step) * direction.get(name, np.float32(0))
        for name, values in read_float(source).items()
    }
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_gradient_predicts_how_the_loss_moves(kind: str, blocks: Blocks, tmp_path: Path) -> None:
    checkpoint = zoo.base() if kind == "dense" else zoo.experts_base()
    report = measure(checkpoint, blocks, OPTIONS, gradient=tmp_path / "gradient")
    gradient = read_float(tmp_path / "gradient")
    index = open_checkpoint(str(checkpoint))
    assert {name: values.shape for name, values in gradient.items()}.items() <= {
        name: info.shape for name, info in index.tensors.items()
    }.items()
    rng = np.random.default_rng(0)
    # The correction bias of the router chooses experts and has no gradient.
    direction = {
        name: rng.standard_normal(values.shape).astype(np.float32) * np.float32(0.1 * np.abs(read).mean())
        for (name, values), read in ((pair, read_float(checkpoint)[pair[0]]) for pair in gradient.items())
        if kind == "dense" or "gate.weight" not in name
    }
    slope = sum(
        float(gradient[name].astype(np.float64).ravel() @ each.astype(np.float64).ravel())
        for name, each in direction.items()
    )
    step = 0.002
    ahead, behind = (
        measure(write_moved(checkpoint, tmp_path / f"moved{sign}", direction, sign * step), blocks, OPTIONS).loss
        for sign in (1, -1)
    )
    assert abs(slope) > 1e-3
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=0.02)
    assert measure(checkpoint, blocks, OPTIONS).loss == pytest.approx(report.loss, rel=1e-6)


def test_experts_get_gradients_under_the_names_of_the_files(blocks: Blocks, tmp_path: Path) -> None:
    report = measure(zoo.experts_base(), blocks, OPTIONS, gradient=tmp_path / "gradient")
    index = open_checkpoint(str(tmp_path / "gradient"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in index.tensors
    assert {info.dtype for info in index.tensors.values()} == {"F32"}
    assert all("bias" in name for name in report.without_gradient)
    names = set(open_checkpoint(str(zoo.experts_base())).tensors)
    assert set(index.tensors) == names - set(report.without_gradient)


def test_tensors_that_lead_nowhere_in_the_files_are_refused(tmp_path: Path) -> None:
    model = load_model(zoo.experts_base(), OPTIONS)
    gradients = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def gather(names: Sequence[str]) -> dict[str, Any]:
        return {name: gradients[name] for name in names}

    with pytest.raises(EvaluationError, match=r"does not lead back .*the checkpoint has it as"):
        write_gradient(model, gather, open_checkpoint(str(zoo.base())), tmp_path)


def test_batches_change_nothing_but_rounding(blocks: Blocks, tmp_path: Path) -> None:
    one = measure(zoo.base(), blocks, OPTIONS, gradient=tmp_path / "one")
    two = measure(zoo.base(), blocks, LossOptions(batch_size=3, threads=1), gradient=tmp_path / "two")
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    first, second = read_float(tmp_path / "one"), read_float(tmp_path / "two")
    for name, values in first.items():
        assert np.allclose(values, second[name], atol=1e-6 + 1e-4 * np.abs(values).max()), name


def test_sums_stay_in_float32_where_the_model_computes_in_bfloat16(blocks: Blocks, tmp_path: Path) -> None:
    options = LossOptions(dtype="bfloat16", batch_size=1, threads=1)
    measure(zoo.base(), blocks, options, gradient=tmp_path / "half")
    measure(zoo.base(), blocks, OPTIONS, gradient=tmp_path / "whole")
    half, whole = read_float(tmp_path / "half"), read_float(tmp_path / "whole")
    assert open_checkpoint(str(tmp_path / "half")).tensors["model.norm.weight"].dtype == "F32"
    # A sum of bfloat16 values that is one itself would have 16 empty bits.
    assert (half["model.norm.weight"].view(np.uint32) & 0xFFFF).any()
    a, b = (np.concatenate([each[name].ravel() for name in whole]).astype(np.float64) for each in (half, whole))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


def test_prompts_are_read_but_do_not_count(blocks: Blocks) -> None:
    tokenizer = load_tokenizer(zoo.base())
    for tokens, counted in zip(blocks.tokens_NL[5:], blocks.counted_NL[5:], strict=True):
        text = "".join(
            tokenizer.decode([token]) if counts else "?" for token, counts in zip(tokens, counted, strict=True)
        )
        assert "=" not in text
        assert "+" not in text
        assert any(character.isdigit() for character in text)
    assert blocks.counted_NL[:5, 1:].all()
    assert not blocks.counted_NL[:, 0].any()
    # What stands in a prompt decides what follows it, and nothing else.
    changed = blocks.tokens_NL.copy()
    changed[5:, -1] = 9
    same = blocks._replace(counted_NL=blocks.counted_NL & (np.arange(24) < 23))
    other = same._replace(tokens_NL=changed)
    assert measure(zoo.base(), same, OPTIONS).loss == pytest.approx(measure(zoo.base(), other, OPTIONS).loss, abs=1e-9)


def test_sources_count_by_weight_not_by_length(calibration: Calibration, blocks: Blocks) -> None:
    report = measure(zoo.base(), blocks, OPTIONS)
    assert report.loss == pytest.approx(0.75 * report.by_source["prose"] + 0.25 * report.by_source["sums"])
    assert blocks.shares.sum() == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_zero3_on_two_ranks_gives_the_gradient_of_one_process(kind: str, blocks: Blocks, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    checkpoint = zoo.base() if kind == "dense" else zoo.experts_base()
    held_out = blocks._replace(tokens_NL=blocks.tokens_NL[:, :12], counted_NL=blocks.counted_NL[:, :12])
    one = measure(checkpoint, blocks, OPTIONS, gradient=tmp_path / "one", held_out=held_out)
    # 10 blocks in batches of 2 over 2 ranks: three rounds, the last one with a rank that has nothing to do.
    options = LossOptions(batch_size=2, threads=1, ranks=2)
    two = measure(checkpoint, blocks, options, gradient=tmp_path / "two", held_out=held_out)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.held_out == pytest.approx(one.held_out, rel=1e-5)
    assert two.without_gradient == one.without_gradient
    first, second = read_float(tmp_path / "one"), read_float(tmp_path / "two")
    assert first.keys() == second.keys()
    largest = max(float(np.abs(values).max()) for values in first.values())
    for name, values in first.items():
        assert np.allclose(values, second[name], rtol=1e-4, atol=1e-5 * largest), name


def test_a_folder_with_other_files_is_not_cleared(blocks: Blocks, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(EvaluationError, match="no part of a gradient"):
        measure(zoo.base(), blocks, OPTIONS, gradient=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_a_model_without_finite_loss_has_no_gradient(blocks: Blocks, tmp_path: Path) -> None:
    nan = {"model.norm.weight": np.full(64, np.nan, np.float32)}
    broken = write_moved(zoo.base(), tmp_path / "broken", nan, 1.0)
    with pytest.raises(EvaluationError, match="10 of 10 calibration blocks is NaN"):
        measure(broken, blocks, OPTIONS, gradient=tmp_path / "gradient")
    assert not np.isfinite(measure(broken, blocks, OPTIONS).loss)


# Calibration text


def test_blocks_are_drawn_by_the_seed_and_held_out_ones_are_others(calibration: Calibration) -> None:
    tokenizer = load_tokenizer(zoo.base())
    kept, held = make_blocks(calibration, tokenizer, seed=0)
    again, _ = make_blocks(calibration, tokenizer, seed=0)
    other, _ = make_blocks(calibration, tokenizer, seed=1)
    assert kept.digest == again.digest != other.digest
    assert kept.tokens_NL.shape == (10, 24)
    assert held.tokens_NL.shape == (4, 24)
    sums = {row.tobytes() for row, source in zip(kept.tokens_NL, kept.source_N, strict=True) if source == 1}
    assert len(sums) == 5
    assert not sums & {row.tobytes() for row in held.tokens_NL[2:]}


def test_json_fields_are_joined_and_missing_ones_named(tmp_path: Path) -> None:
    _, sums = write_text(tmp_path)
    source = Source(path=sums, name="sums", fields=("question", "answer"))
    assert next(read_documents(source)) == ("", "0+0=0")
    asked = Source(path=sums, name="sums", prompt=("question",), fields=("answer",))
    assert next(read_documents(asked)) == ("0+0=", "0")
    for field, message in (
        ("anser", "lacks the field 'anser'; did you mean 'answer'"),
        ("number", "has no text under"),
    ):
        with pytest.raises(EvaluationError, match=f"line 1 {message}"):
            next(read_documents(Source(path=sums, name="sums", fields=(field,))))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{]", "line 1 is no JSON"), (b"[1]\n", "line 1 is no JSON object"), (b"\xff", "is no UTF-8")],
)
def test_broken_lines_are_refused_by_number(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        list(read_documents(Source(path=path, name="broken")))


def test_too_little_text_is_refused_with_what_there_is(calibration: Calibration) -> None:
    from dataclasses import replace

    with pytest.raises(EvaluationError, match=r"make \d+ blocks of 24; 500 blocks and 2 held out"):
        make_blocks(replace(calibration, blocks=500), load_tokenizer(zoo.base()), seed=0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"sources": []}, "no sources"),
        ({"sources": [{"path": "a.txt", "field": "text"}]}, "`field` goes with"),
        ({"sources": [{"path": "a.txt"}, {"path": "b/a.txt"}]}, "two sources have the name 'a'"),
        ({"sources": [{"path": "a.txt", "weight": 0}]}, "weights are all 0"),
        ({"sources": [{"path": "a.txt"}], "block_token": 5}, "did you mean 'block_tokens'"),
    ],
)
def test_bad_calibration_is_refused(document: dict[str, Any], message: str) -> None:
    from remelt.errors import RecipeError

    with pytest.raises(RecipeError, match=message):
        parse_calibration(Section(document, "file.yaml", "calibration"), Path())
