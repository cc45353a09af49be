"""The command line from end to end, on small checkpoints and on models that transformers made."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from command import Command, the_line
from merge_fixtures import parent_tensors, write_pool
from remelt.operators import OPERATORS

Pool = Mapping[str, Path]


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pool(tmp_path_factory.mktemp("pool"), 2)


def write_recipe(path: Path, pool: Pool, method: str = "ties", **changes: Any) -> Path:
    document = {
        "merge_method": method,
        "base_model": str(pool["base"]),
        "models": [
            {"model": str(folder), "name": name, "parameters": {"weight": 0.5}}
            for name, folder in pool.items()
            if name != "base"
        ],
        **changes,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def recipe(pool: Pool, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", pool, parameters={"density": 0.5})


def manifest_of(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "remelt_manifest.json").read_text())
    return manifest


def test_plan_says_what_a_merge_would_do_and_reads_and_writes_nothing(
    remelt: Command, recipe: Path, tmp_path: Path
) -> None:
    rules = [{"match": {"class": "norm"}, "copy": "p1"}, {"match": {"name": "lm_head.*"}, "drop": True}]
    document = json.loads(recipe.read_text()) | {"rules": rules, "max_shard_size": "100kB"}
    recipe.write_text(json.dumps(document))
    run = remelt("plan", recipe, "--output", tmp_path / "out", "--memory", "200MB", "--threads", 3)
    assert (run.status, run.err, run.num_reads) == (0, "", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    rows = {tuple(line.split()[:3]) for line in run.out.splitlines()}
    assert {("mlp", "ties", "4"), ("norm", "copy", "3"), ("embedding", "ties", "1"), ("other", "copy", "1")} <= rows
    assert not any(row[:1] == ("head",) for row in rows)
    assert re.search(r"memory +[\d.]+ MB projected of 200\.0 MB allowed", run.out)
    assert "source blocks of 3 threads" in run.out
    assert "dropped 1 tensors by rule" in run.out
    assert "note: 1 integer tensors are copied from the base" in run.out


def test_the_plan_in_json_is_the_plan_in_words_and_its_full_form_adds_the_units(
    remelt: Command, recipe: Path, tmp_path: Path
) -> None:
    words = remelt("plan", recipe, "--max-shard-size", "100kB").out
    summary = json.loads(remelt("plan", recipe, "--max-shard-size", "100kB", "--json").out)
    full = json.loads(remelt("plan", recipe, "--max-shard-size", "100kB", "--json", "--full").out)
    assert full == summary | {"units": full["units"], "dropped_tensors": []}
    assert f"run {summary['run_id'][:16]}" in words
    assert re.search(rf"units +{summary['num_units']} ", words)
    assert sum(unit["bytes_written"] for unit in full["units"]) == summary["bytes_written"]
    assert sum(summary["memory"]["terms"].values()) == summary["memory"]["projected_bytes"]
    names = [tensor["name"] for unit in full["units"] for tensor in unit["tensors"]]
    assert sorted(names) == sorted(parent_tensors(0)) and len(names) == summary["num_tensors"]
    (norm,) = (t for unit in full["units"] for t in unit["tensors"] if t["name"] == "model.norm.weight")
    assert norm["treatment"]["operator"] == "ties" and norm["treatment"]["coefficients"] == [0.5, 0.5]


def test_ranges_are_planned_at_their_starting_values(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    density = {"search": [0.2, 0.9], "init": 0.3}
    recipe = write_recipe(tmp_path / "recipe.yaml", pool, parameters={"density": density})
    run = remelt("plan", recipe, "--json")
    assert run.status == 0 and run.err == "note: ranges are planned at their starting values\n"
    bound = write_recipe(tmp_path / "bound.yaml", pool, parameters={"density": 0.3})
    assert json.loads(run.out)["run_id"] == json.loads(remelt("plan", bound, "--json").out)["run_id"]


def test_merge_prints_one_line_and_finished_it_prints_one_line_and_reads_nothing(
    remelt: Command, pool: Pool, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", pool, "dare_ties", parameters={"density": 0.5})
    output = tmp_path / "out"
    planned = json.loads(remelt("plan", recipe, "--json").out)
    first = remelt("merge", recipe, "--output", output)
    manifest = manifest_of(output)
    assert first.status == 0 and first.num_reads > 0
    assert re.fullmatch(rf"{output}: [\d.]+ kB in 0:\d\d \([\d.]+ s\), digest {manifest['digest']}\n", first.out)
    assert manifest["run_id"] == planned["run_id"]
    # mergekit's numbers differ here by default, and that is said once.
    assert len(re.findall("rescale: l1", first.err)) == 1
    again = remelt("merge", recipe, "--output", output, "--threads", 1)
    assert again == (0, f"{output}: finished already, digest {manifest['digest']}; nothing was read\n", "", 0)


def test_flags_override_the_recipe(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", pool, "dare_ties", parameters={"density": 0.5})
    runs = {}
    for name, flags in {
        "plain": (),
        "sharded": ("--max-shard-size", "100kB", "--threads", 2, "--memory", "64MB"),
        "compat": ("--compat", "mergekit"),
    }.items():
        run = remelt("merge", recipe, "--output", tmp_path / name, *flags)
        assert run.status == 0, run.err
        runs[name] = (manifest_of(tmp_path / name), run.err)
    assert runs["plain"][0]["digest"] == runs["sharded"][0]["digest"] != runs["compat"][0]["digest"]
    assert all(file["bytes"] <= 101_000 for file in runs["sharded"][0]["files"])
    assert "rescale: l1" in runs["plain"][1] and "rescale: l1" not in runs["compat"][1]


def test_force_replaces_the_output_of_another_recipe(remelt: Command, pool: Pool, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert remelt("merge", recipe, "--output", output, "--max-shard-size", "100kB").status == 0
    other = write_recipe(tmp_path / "other.yaml", pool, "task_arithmetic")
    assert remelt("merge", other, "--output", output, "--force").status == 0
    assert [path.name for path in output.glob("*.safetensors*")] == ["model.safetensors"]
    assert remelt("verify", output, "--no-loading").status == 0


def test_verify_passes_what_is_whole_and_names_what_is_not(remelt: Command, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    remelt("merge", recipe, "--output", output, "--max-shard-size", "100kB")
    sound = remelt("verify", output, "--no-loading")
    digest = manifest_of(output)["digest"]
    assert (sound.status, sound.err) == (0, "")
    assert re.fullmatch(rf"{output}: 12 tensors, .*; bytes and values verified, digest {digest}\n", sound.out)
    shard = sorted(output.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    damaged = remelt("verify", output, "--no-loading")
    assert (damaged.status, damaged.out) == (2, "")
    assert f"problem: {shard.name}: " in damaged.err and "sha256" in damaged.err
    assert re.search(r"problem: lm_head\.weight: its bytes differ", damaged.err)
    shard.unlink()
    assert remelt("verify", output, "--no-loading").status == 2
    (output / "remelt_manifest.json").unlink()
    assert "it is no output of remelt" in the_line(remelt("verify", output))


def test_verify_of_an_unfinished_output_says_how_to_go_on(remelt: Command, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / ".remelt").mkdir(parents=True)
    assert "unfinished: merge again to resume" in the_line(remelt("verify", output))


def test_a_model_that_transformers_cannot_load_does_not_verify(remelt: Command, recipe: Path, tmp_path: Path) -> None:
    """The small checkpoints are no whole Llama, although every byte is as the manifest says."""
    output = tmp_path / "out"
    remelt("merge", recipe, "--output", output)
    run = remelt("verify", output)
    assert run.status == 2 and re.search(r"problem: .*missing.*k_proj", run.err)


def test_inspect_counts_tensors_by_dtype_and_class(remelt: Command, pool: Pool) -> None:
    found = json.loads(remelt("inspect", pool["base"], "--json").out)
    assert (found["tensors"], found["layers"], found["tied_head"]) == (12, 2, False)
    assert found["classes"]["mlp"] == {"BF16": {"tensors": 4, "parameters": 134_400, "bytes": 268_800}}
    run = remelt("inspect", pool["base"])
    assert (run.status, run.err, run.num_reads) == (0, "", 0)
    rows = [line.split() for line in run.out.splitlines()]
    assert ["I64", "1", "3", "24"] in rows and ["mlp", "BF16", "4", "134,400", "268,800"] in rows
    assert "{" not in run.out


def test_diff_prints_its_table_and_writes_its_rows(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "tables" / "diff.parquet"
    run = remelt("diff", pool["base"], pool["p1"], "--parquet", path, "--tensors", 3)
    assert run.status == 0 and run.out.endswith(f"wrote {path}\n")
    rows = pq.read_table(path).to_pylist()
    tensors = {row["name"]: row for row in rows if row["level"] == "tensor"}
    assert tensors.keys() == parent_tensors(0).keys()
    assert tensors["model.position_offset"]["num_changed"] == 0
    lines = run.out.splitlines()
    shown = lines[lines.index(next(line for line in lines if line.startswith("tensor "))) + 1 : -1]
    furthest = sorted(tensors.values(), key=lambda row: -row["relative"])[:3]
    assert [line.split()[0] for line in shown] == [row["name"] for row in furthest]
    (whole,) = (row for row in rows if row["level"] not in ("tensor", "class"))
    assert f"{whole['num_elements']:,}" == "143,955"
    same = remelt("diff", pool["base"], pool["base"])
    assert re.search(r"^all +143,955 +0 +0 +0 +0 +1$", same.out, re.MULTILINE)


def test_diff_of_checkpoints_that_do_not_match_names_what_differs(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    from checkpoint_files import write_file

    tensors = parent_tensors(1, vocabulary=60)
    del tensors["model.norm.weight"]
    write_file(tmp_path / "model.safetensors", tensors)
    run = remelt("diff", pool["base"], tmp_path)
    assert run.status == 0
    assert "model.norm.weight" in run.out and "lm_head.weight is [50, 48] in a, [60, 48] in b" in run.out


def test_operators_lists_every_operator_with_its_options(remelt: Command) -> None:
    rows = json.loads(remelt("operators", "--json").out)
    assert [row["operator"] for row in rows] == list(OPERATORS)
    text = remelt("operators").out
    for row in rows:
        assert f"{row['operator']}: {row['summary']}" in text
        assert row["options"].keys() == OPERATORS[row["operator"]].options.keys()
    assert re.search(r"^ties: .*(\n    .*)*\n    density = 1\.0  \(0, 1\], for each model$", text, re.MULTILINE)


HEAVY = ("ray", "lm_eval", "transformers", "deepspeed", "pyarrow", "optuna", "torch", "pandas", "datasets")


@pytest.mark.parametrize("words", ["merge RECIPE --output OUT --executor local", "plan RECIPE", "inspect BASE"])
def test_local_commands_import_nothing_heavy(words: str, recipe: Path, pool: Pool, tmp_path: Path) -> None:
    places = {"RECIPE": str(recipe), "OUT": str(tmp_path / "out"), "BASE": str(pool["base"])}
    arguments = ["remelt", *(places.get(word, word) for word in words.split())]
    script = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from remelt_jobs.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "remelt_jobs" in loaded
    assert not loaded & set(HEAVY)
    if words.startswith("merge"):
        assert "numba" in loaded and (tmp_path / "out" / "remelt_manifest.json").is_file()
    else:
        assert "numba" not in loaded


# Models that transformers made, and that it loads again.

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "tied llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "deepseek v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
MTP_LAYER = 61
"""What DeepSeek-V3's own class leaves aside when it loads: the layer that predicts a second token."""


def save_models(folder: Path, kind: str) -> dict[str, Path]:
    """Two random bfloat16 models of one kind, as `save_pretrained` writes them; DeepSeek's with an MTP layer."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    config_class, changes = MODELS[kind]
    config = getattr(transformers, config_class)(**SHAPE | changes)
    paths = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        path = paths[f"p{seed}"] = folder / f"p{seed}"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path)
        if kind == "deepseek v3":
            tensors = load_file(path / "model.safetensors")
            tensors[f"model.layers.{MTP_LAYER}.eh_proj.weight"] = torch.randn(32, 64, dtype=torch.bfloat16)
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return paths


def linear_recipe(path: Path, parents: Pool, **changes: Any) -> Path:
    """A quarter of the first and three quarters of the second: coefficients that float32 has exactly."""
    models = [
        {"model": str(folder), "name": name, "parameters": {"weight": weight}}
        for (name, folder), weight in zip(parents.items(), (0.25, 0.75), strict=True)
    ]
    path.write_text(json.dumps({"merge_method": "linear", "models": models, **changes}))
    return path


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_of_transformers_models_verifies_and_is_their_average(
    kind: str, remelt: Command, tmp_path: Path
) -> None:
    import torch

    parents = save_models(tmp_path, kind)
    recipe = linear_recipe(tmp_path / "recipe.yaml", parents)
    assert remelt("merge", recipe, "--output", tmp_path / "out").status == 0
    verified = remelt("verify", tmp_path / "out")
    assert verified.status == 0, verified.err
    assert "bytes, values and loading verified" in verified.out
    merged, first, second = (load(path) for path in (tmp_path / "out", *parents.values()))
    # All parameters, those of the fused experts included, are the float32 average rounded once.
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    average = {name: (a.float() * 0.25 + b.float() * 0.75).to(a.dtype) for (name, a), b in pairs}
    for name, value in merged.state_dict().items():
        assert torch.equal(value, average[name]), name
    first.load_state_dict(average)
    tokens = torch.arange(24).reshape(2, 12) % SHAPE["vocab_size"]
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, first(tokens).logits)
        assert not torch.equal(merged(tokens).logits, second(tokens).logits)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek v3"])
def test_experts_are_grafted_by_a_copy_rule(kind: str, remelt: Command, tmp_path: Path) -> None:
    import torch

    parents = save_models(tmp_path, kind)
    rules: list[dict[str, Any]] = [{"match": {"class": ["routed_experts"], "layers": [1, 1]}, "copy": "p2"}]
    rules.append({"match": {"class": "mtp"}, "drop": True})
    recipe = linear_recipe(tmp_path / "recipe.yaml", parents, rules=rules)
    assert remelt("merge", recipe, "--output", tmp_path / "out").status == 0
    verified = remelt("verify", tmp_path / "out")
    assert verified.status == 0, verified.err
    merged, donor = load(tmp_path / "out"), load(parents["p2"])
    num_grafted = 0
    for (name, value), theirs in zip(merged.state_dict().items(), donor.state_dict().values(), strict=True):
        if "layers.1.mlp.experts." in name and "bias" not in name:
            num_grafted += 1
            assert torch.equal(value, theirs), name
        elif value.dtype == torch.bfloat16:
            assert not torch.equal(value, theirs), name
    assert num_grafted == 2
