"""Bad input through the command: exit status 2, one line, no tensor data read, nothing written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import bf16, header_of, write_file, write_raw, write_sharded
from command import Command, Run, the_line
from merge_fixtures import CONFIG, parent_tensors, write_pool

Document = dict[str, Any]
Pool = Mapping[str, Path]


@pytest.fixture
def remelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two parents that merge."""
    return write_pool(tmp_path_factory.mktemp("sound"), 2)


@pytest.fixture
def pool(sound: Pool, tmp_path: Path) -> dict[str, Path]:
    """The same with p1 as a copy of its own, to be damaged."""
    return {**sound, "p1": Path(shutil.copytree(sound["p1"], tmp_path / "p1"))}


def document_of(pool: Pool, method: str = "ties", **changes: Any) -> Document:
    """A recipe over a pool; a change to None takes a key out."""
    document: Document = {
        "merge_method": method,
        "base_model": str(pool.get("base")),
        "models": [
            {"model": str(path), "name": name, "parameters": {"weight": 0.5}}
            for name, path in pool.items()
            if name != "base"
        ],
        **changes,
    }
    return {key: value for key, value in document.items() if value is not None}


def write_recipe(folder: Path, document: Document) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder below `root`."""
    return {str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


def refuse(remelt: Command, folder: Path, document: Document, pattern: str, *options: object) -> str:
    """Merge and plan are both refused in the same words; nothing is read or written."""
    recipe = write_recipe(folder, document)
    before = tree(folder)
    merged = remelt("merge", recipe, "--output", folder / "out", *options)
    line = the_line(merged)
    assert re.search(pattern, line), line
    planned = remelt("plan", recipe, *options)
    assert the_line(planned) == line
    assert (merged.num_reads, planned.num_reads) == (0, 0)
    assert tree(folder) == before
    return line


# Damage to the files of a parent; each takes its folder, which holds one sound shard.


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def split(folder: Path, **changes: object) -> None:
    """The parent in two shards with an index; `changes` go to its weight_map."""
    tensors = parent_tensors(1)
    names = list(tensors)
    shard(folder).unlink()
    shards = {
        f"model-0000{number}-of-00002.safetensors": {name: tensors[name] for name in part}
        for number, part in ((1, names[:5]), (2, names[5:]))
    }
    write_sharded(folder, shards, **changes)


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 1000)


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def name_a_missing_file(folder: Path) -> None:
    split(folder, **{"lm_head.weight": "model-00003-of-00003.safetensors"})


def name_an_absolute_path(folder: Path) -> None:
    split(folder, **{"lm_head.weight": str((folder / "model-00002-of-00002.safetensors").absolute())})


def name_a_path_outside(folder: Path) -> None:
    shutil.copy(shard(folder), folder.parent / "outside.safetensors")
    split(folder, **{"lm_head.weight": "../outside.safetensors"})


def link_outside(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    target = shard(folder).rename(folder.parent / "elsewhere" / "model.safetensors")
    shard(folder).symlink_to(target)


def link_config_outside(folder: Path) -> None:
    target = (folder / "config.json").rename(folder.parent / "secret.json")
    (folder / "config.json").symlink_to(target)


def change_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = parent_tensors(1)
    header = header_of(tensors)
    change(header)
    write_raw(shard(folder), header, b"".join(array.tobytes() for _, array in tensors.values()))


def overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = list(header)
        header[names[1]]["data_offsets"] = [offset - 96 for offset in header[names[1]]["data_offsets"]]

    change_header(folder, change)


def contradict_a_shape(folder: Path) -> None:
    change_header(folder, lambda header: header["model.norm.weight"].update(shape=[49]))


def announce_too_much(folder: Path) -> None:
    write_raw(shard(folder), header_of(parent_tensors(1)), b"", announced=1 << 40)


def quantise(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))


def quantise_in_silence(folder: Path) -> None:
    write_file(shard(folder), {**parent_tensors(1), "model.layers.0.q_proj.qweight": ("I32", np.ones(8, np.int32))})


def pickle_instead(folder: Path) -> None:
    shard(folder).rename(folder / "pytorch_model.bin")


def make_deepspeed(folder: Path) -> None:
    shard(folder).unlink()
    (folder / "latest").write_text("global_step10")
    (folder / "global_step10").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (truncate, r"model\.safetensors: truncated file: .* needs [\d,]+ bytes, found [\d,]+"),
    "missing shard": (lose_a_shard, r"missing file model-00002-of-00002\.safetensors"),
    "index naming a missing file": (name_a_missing_file, r"missing file model-00003-of-00003\.safetensors"),
    "index naming an absolute path": (name_an_absolute_path, r"absolute path"),
    "index naming a path outside": (name_a_path_outside, r"'\.\./outside\.safetensors', which is outside the folder"),
    "link to outside the folder": (link_outside, r"link outside the folder"),
    "config linked to outside": (link_config_outside, r"config\.json: is a link outside the folder"),
    "overlapping offsets": (overlap, r"tensor '.*': overlapping offsets"),
    "size against shape": (contradict_a_shape, r"'model\.norm\.weight': size against shape: .* 96 bytes.* 98"),
    "header larger than the file": (announce_too_much, r"header larger than the file: .*1,099,511,627,776"),
    "declared quantisation": (quantise, r"quantised checkpoint of unknown kind: .*gptq.*dequantise"),
    "undeclared quantisation": (quantise_in_silence, r"quantised checkpoint of unknown kind: .*qweight"),
    "pickle files": (pickle_instead, r"pickle files are not read yet.*safetensors"),
    "DeepSpeed directory": (make_deepspeed, r"DeepSpeed.*not read yet"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, remelt: Command, pool: Pool, tmp_path: Path) -> None:
    apply, pattern = DAMAGES[damage]
    apply(pool["p1"])
    line = refuse(remelt, tmp_path, document_of(pool), pattern)
    assert str(pool["p1"]) in line
    inspected = remelt("inspect", pool["p1"])
    assert the_line(inspected) == line


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = parent_tensors(1)
    change(tensors)
    write_file(shard(folder), tensors)


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing tensor": (
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        r"p1 lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight.* rule: .*copy: base",
    ),
    "shape": (
        lambda tensors: tensors.update({"model.norm.weight": bf16(np.ones(50, np.float32))}),
        r"shape mismatch: model\.norm\.weight is \[48\] in .* and \[50\] in ",
    ),
    "dtype": (
        lambda tensors: tensors.update({"model.norm.weight": ("F16", np.ones(48, np.float16))}),
        r"dtype mismatch: model\.norm\.weight is BF16 in .* and F16 in .*dtype: bfloat16",
    ),
    "vocabulary": (
        lambda tensors: tensors.update(
            {name: bf16(np.ones((57, 48), np.float32)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
        r"vocabulary mismatch: .*\[50, 48\] in .* and \[57, 48\] in .*\(50 against 57 tokens\)",
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_parents_that_disagree_are_refused(kind: str, remelt: Command, pool: Pool, tmp_path: Path) -> None:
    change, pattern = MISMATCHES[kind]
    change_tensors(pool["p1"], lambda tensors: (change(tensors), None)[1])
    refuse(remelt, tmp_path, document_of(pool), pattern)


def test_the_rule_that_a_vocabulary_mismatch_proposes_settles_it(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    import yaml

    change_tensors(pool["p1"], lambda tensors: tensors.update(parent_tensors(1, vocabulary=57)))
    line = refuse(remelt, tmp_path, document_of(pool), "under `rules:`")
    rule = yaml.safe_load(line[line.index("{match") :])
    assert remelt("plan", write_recipe(tmp_path, document_of(pool, rules=[rule]))).status == 0


REFUSED_RECIPES: dict[str, tuple[Document, str]] = {
    "unknown operator": ({"merge_method": "tise"}, r"merge_method: unknown operator 'tise'; did you mean 'ties'\?"),
    "unknown option": ({"parameters": {"densty": 0.5}}, r"parameters: .*'densty'; did you mean 'density'\?"),
    "unknown key": ({"parametres": {"density": 0.5}}, r"unknown key 'parametres'; did you mean 'parameters'\?"),
    "unknown key of a rule": (
        {"rules": [{"match": {"nmae": "*"}, "copy": "base"}]},
        r"rules\[0\]\.match: unknown key 'nmae'; did you mean 'name'\?",
    ),
    "unknown tensor class": (
        {"rules": [{"match": {"class": "atention"}, "copy": "base"}]},
        r"unknown tensor class 'atention'; did you mean 'attention'\?",
    ),
    "unknown model of a rule": (
        {"rules": [{"match": {"class": "head"}, "copy": "bsae"}]},
        r"no model 'bsae' in the recipe; did you mean 'base'\?",
    ),
    "unknown dtype": ({"dtype": "bflot16"}, r"unknown value 'bflot16'; did you mean 'bfloat16'\?"),
    "option out of its interval": ({"parameters": {"density": 1.5}}, r"density takes a number in \(0, 1\].*1\.5"),
    "option of another kind": ({"parameters": {"density": "half"}}, r"density.*(number|half)"),
    "no models": ({"models": []}, r"no models"),
    "no base": ({"base_model": None}, r"ties needs a `base_model`"),
    "stacked slices": ({"models": None, "slices": [{}, {}]}, r"2 slices stack layers"),
    "every tensor dropped": ({"rules": [{"match": {"name": "*"}, "drop": True}]}, r"rules drop every tensor"),
}


@pytest.mark.parametrize("kind", REFUSED_RECIPES)
def test_a_recipe_that_cannot_be_done_is_refused(kind: str, remelt: Command, sound: Pool, tmp_path: Path) -> None:
    changes, pattern = REFUSED_RECIPES[kind]
    refuse(remelt, tmp_path, document_of(sound, **changes), pattern)


def test_a_range_to_search_is_not_merged(remelt: Command, sound: Pool, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, document_of(sound, parameters={"density": {"search": [0.2, 0.9]}}))
    run = remelt("merge", recipe, "--output", tmp_path / "out")
    assert "ranges to search" in the_line(run)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_exist_is_refused(remelt: Command, sound: Pool, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    refuse(remelt, tmp_path, document_of({**sound, "p1": gone}), rf"checkpoint {gone} does not exist")


def test_a_file_where_a_checkpoint_folder_belongs_is_refused(remelt: Command, sound: Pool, tmp_path: Path) -> None:
    refuse(remelt, tmp_path, document_of({**sound, "p1": shard(sound["p1"])}), r"it is a file: name the folder")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("merge_method: [ties\nmodels: }", r"is no valid YAML"),
        ("merge_method: ties\nmerge_method: linear\n", r"the key 'merge_method' stands twice"),
        ("- a\n- b\n", r"expected a mapping"),
        ("", r"is empty"),
    ],
)
def test_a_recipe_that_is_no_yaml_mapping_is_refused(text: str, pattern: str, remelt: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    line = the_line(remelt("merge", recipe, "--output", tmp_path / "out"))
    assert line.startswith(f"{recipe}: ") and re.search(pattern, line), line
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_cannot_be_read_is_refused(remelt: Command, tmp_path: Path) -> None:
    assert "No such file" in the_line(remelt("plan", tmp_path / "none.yaml"))
    assert "Is a directory" in the_line(remelt("plan", tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00models")
    assert "UTF-8" in the_line(remelt("plan", binary))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--memory", "8XB"), r"'8XB' is no size; .*40GB"),
        (("--memory", "lots"), r"'lots' is no size"),
        (("--memory", "-1"), r"is no size"),
        (("--memory", "0"), r"--memory: '0' .* above 0"),
        (("--max-shard-size", "0"), r"--max-shard-size: '0' .* above 0"),
        (("--max-shard-size", "5 gallons"), r"'5 gallons' is no size"),
        (("--threads", "0"), r"--threads.*1"),
        (("--threads", "two"), r"--threads"),
        (("--memry", "8GB"), r"--memry.*--memory"),
        (("--compat", "mergkit"), r"--compat.*mergekit"),
        (("--device", "tpu"), r"--device.*cuda"),
    ],
)
def test_a_wrong_option_of_the_command_is_refused(
    options: tuple[str, ...], pattern: str, remelt: Command, sound: Pool, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, document_of(sound))
    run = remelt("merge", recipe, "--output", tmp_path / "out", *options)
    assert re.search(pattern, the_line(run)), run.err
    assert run.num_reads == 0 and not (tmp_path / "out").exists()


def test_an_unknown_command_names_the_nearest(remelt: Command) -> None:
    assert "merge" in the_line(remelt("merg"))


def test_a_memory_budget_too_small_says_what_would_do_and_that_does(
    remelt: Command, sound: Pool, tmp_path: Path
) -> None:
    line = refuse(
        remelt, tmp_path, document_of(sound), r"stay within 10 MiB.* needs \d+ MiB", "--memory", "10MiB", "--threads", 1
    )
    enough = re.search(r"give --memory (\d+MiB)", line)
    assert enough is not None
    recipe = tmp_path / "recipe.yaml"
    merged = remelt("merge", recipe, "--output", tmp_path / "out", "--memory", enough[1], "--threads", 1)
    assert merged.status == 0, merged.err


def test_too_little_disk_is_refused_where_an_output_is_named(remelt: Command, tmp_path: Path) -> None:
    """The parents are sparse files larger than the disk has room."""
    rows = shutil.disk_usage(tmp_path).free // 2000 + 100_000
    header = {"model.w.weight": {"dtype": "BF16", "shape": [rows, 1000], "data_offsets": [0, rows * 2000]}}
    pool = {name: tmp_path / name for name in ("base", "p1")}
    for folder in pool.values():
        write_raw(shard(folder), header, b"")
        os.truncate(shard(folder), shard(folder).stat().st_size + rows * 2000)
    recipe = write_recipe(tmp_path, document_of(pool, "task_arithmetic"))
    assert remelt("plan", recipe).status == 0
    for command in ("plan", "merge"):
        run = remelt(command, recipe, "--output", tmp_path / "new" / "out")
        assert re.search(r"not enough disk: .* needs [\d,]+ more bytes, .* has [\d,]+ free", the_line(run)), run.err
        assert run.num_reads == 0
    assert not (tmp_path / "new").exists()


def test_the_output_of_another_recipe_is_refused_and_left_as_it_is(
    remelt: Command, sound: Pool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert remelt("merge", write_recipe(tmp_path, document_of(sound)), "--output", output).status == 0
    other = write_recipe(tmp_path, document_of(sound, "task_arithmetic"))
    before = tree(tmp_path)
    for command in ("merge", "plan"):
        run = remelt(command, other, "--output", output)
        assert re.search(r"out holds the finished output of another recipe.*--output.*--force", the_line(run))
        assert run.num_reads == 0 and tree(tmp_path) == before


def test_an_unfinished_output_of_another_recipe_is_refused_and_left_as_it_is(
    remelt: Command, pool: Pool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    change_tensors(pool["p1"], lambda tensors: tensors["model.norm.weight"][1].fill(0x7FC0))
    recipe = write_recipe(tmp_path, document_of(pool, max_shard_size="100kB"))
    assert remelt("merge", recipe, "--output", output).status == 2
    assert (output / ".remelt").is_dir()
    other = write_recipe(tmp_path, document_of(pool, "task_arithmetic"))
    before = tree(tmp_path)
    run = remelt("merge", other, "--output", output)
    assert "unfinished run of another recipe" in the_line(run)
    assert run.num_reads == 0 and tree(tmp_path) == before


def test_an_output_that_cannot_be_a_directory_of_ours_is_refused(remelt: Command, sound: Pool, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, document_of(sound))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    before = tree(tmp_path)
    cases = {
        tmp_path / "file": "is a file",
        tmp_path / "file" / "out": r"/file is a file",
        tmp_path / "full": "is not empty",
    }
    for output, pattern in cases.items():
        for command in ("merge", "plan"):
            run = remelt(command, recipe, "--output", output)
            assert re.search(pattern, the_line(run)), run.err
            assert run.num_reads == 0 and tree(tmp_path) == before
    for output in (tmp_path / "dangling", tmp_path / ("x" * 300)):
        run = remelt("merge", recipe, "--output", output)
        assert str(output) in the_line(run)
        assert run.num_reads == 0 and tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written_is_refused(remelt: Command, sound: Pool, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    run = remelt("merge", write_recipe(tmp_path, document_of(sound)), "--output", closed / "out")
    assert re.search(r"closed cannot be written", the_line(run))
    assert run.num_reads == 0


@pytest.mark.parametrize("force", [False, True])
def test_a_parent_is_never_taken_as_output(force: bool, remelt: Command, sound: Pool, tmp_path: Path) -> None:
    """Least of all one that remelt made, whose files --force would remove."""
    parent = tmp_path / "merged"
    first = write_recipe(tmp_path, document_of(sound))
    assert remelt("merge", first, "--output", parent).status == 0
    (tmp_path / "link").symlink_to(parent)
    recipe = write_recipe(tmp_path, document_of({**sound, "p1": parent}))
    before = tree(parent)
    for output in (parent, tmp_path / "link"):
        run = remelt("merge", recipe, "--output", output, *(("--force",) if force else ()))
        assert re.search("is the checkpoint .* that is merged", the_line(run))
        assert run.num_reads == 0 and tree(parent) == before


def fp8_pool(root: Path) -> dict[str, Path]:
    """A base and a parent with one block-scaled fp8 weight."""
    pool = {}
    for number, name in enumerate(("base", "p1")):
        rng = np.random.default_rng(number)
        tensors: dict[str, Any] = parent_tensors(number)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = ("F8_E4M3", rng.integers(0, 120, (700, 48)).astype(np.uint8))
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = ("F32", rng.random((6, 1)).astype(np.float32))
        pool[name] = root / name
        write_file(shard(pool[name]), tensors)
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (pool[name] / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    return pool


def test_arithmetic_on_fp8_is_planned_with_a_warning_and_refused_by_merge(remelt: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, document_of(fp8_pool(tmp_path)))
    planned = remelt("plan", recipe)
    assert planned.status == 0
    (warning,) = (line for line in planned.out.splitlines() if line.startswith("warning: "))
    assert re.search(r"1 tensors are fp8 .*mlp\.up_proj\.weight.*rule", warning)
    assert json.loads(remelt("plan", recipe, "--json").out)["warnings"] == [warning.removeprefix("warning: ")]
    before = tree(tmp_path)
    run = remelt("merge", recipe, "--output", tmp_path / "out")
    assert re.search(r"cannot be merged: 1 tensors are fp8", the_line(run))
    assert run.num_reads == 0 and tree(tmp_path) == before


def test_a_copy_rule_moves_an_fp8_pair_bit_for_bit(remelt: Command, tmp_path: Path) -> None:
    from remelt.formats import open_checkpoint
    from remelt.range_reader import RangeReader

    pool = fp8_pool(tmp_path)
    rules = [{"match": {"name": "model.layers.1.mlp.up_proj.*"}, "copy": "p1"}]
    recipe = write_recipe(tmp_path, document_of(pool, rules=rules))
    run = remelt("merge", recipe, "--output", tmp_path / "out")
    assert run.status == 0, run.err
    parts = []
    for folder in (pool["p1"], tmp_path / "out"):
        index = open_checkpoint(str(folder))
        with RangeReader(index) as reader:
            pair = index.tensors["model.layers.1.mlp.up_proj.weight"]
            assert pair.codec == "fp8_block" and len(pair.pieces) == 2
            parts.append([reader.read_piece(piece).tobytes() for piece in pair.pieces])
    assert parts[0] == parts[1]


def test_nan_in_a_parent_is_refused_per_tensor_and_published_only_where_allowed(
    remelt: Command, pool: Pool, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][1][:3] = 0x7FC0
        tensors["lm_head.weight"][1][0, :2] = 0xFF80

    change_tensors(pool["p1"], spoil)
    recipe = write_recipe(tmp_path, document_of(pool, "linear", base_model=None))
    output = tmp_path / "out"
    line = the_line(remelt("merge", recipe, "--output", output), was_begun=True)
    assert re.search(r"model\.norm\.weight of .*p1 \(3 values\)", line)
    assert re.search(r"lm_head\.weight of .*p1 \(2 values\)", line)
    assert "allow_nonfinite" in line
    assert [path.name for path in output.iterdir()] == [".remelt"]
    assert not list(output.rglob("*.safetensors*"))
    allowed = remelt("merge", recipe, "--output", output, "--allow-nonfinite")
    assert allowed.status == 0, allowed.err
    assert "5 values of the output are NaN or Inf" in allowed.err
    assert remelt("verify", output, "--no-loading").status == 0


def test_links_out_of_a_parents_folder_are_not_published(remelt: Command, pool: Pool, tmp_path: Path) -> None:
    """A stranger's checkpoint could name any file of ours as its licence."""
    (tmp_path / "secret").write_text("mine")
    (pool["p1"] / "LICENSE").symlink_to(tmp_path / "secret")
    (pool["p1"] / "tokenizer_config.json").write_text("{}")
    (pool["p1"] / "tokenizer.model").symlink_to(pool["p1"] / "tokenizer_config.json")
    document = document_of({"p1": pool["p1"], "p2": pool["p2"]}, "linear", base_model=None)
    run = remelt("merge", write_recipe(tmp_path, document), "--output", tmp_path / "out")
    assert run.status == 0
    assert re.search(r"note: .*not carried over, being links outside the folder: LICENSE\n", run.err)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer.model"} <= names and "LICENSE" not in names


# Through the console script itself.


def console(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("remelt")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_the_installed_command_ends_with_status_2_and_one_line(pool: Pool, tmp_path: Path) -> None:
    truncate(pool["p1"])
    done = console("merge", write_recipe(tmp_path, document_of(pool)), "--output", tmp_path / "out")
    assert "truncated file" in the_line(Run(done.returncode, done.stdout, done.stderr))
    assert not (tmp_path / "out").exists()


def test_a_hub_id_that_the_hub_does_not_give_is_refused(sound: Pool, tmp_path: Path) -> None:
    document = document_of(sound)
    document["models"][0]["model"] = "nobody/nothing"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = console("plan", write_recipe(tmp_path, document), env=environment)
    line = the_line(Run(done.returncode, done.stdout, done.stderr))
    assert re.search(r"checkpoint nobody/nothing does not exist here, and the Hub did not give it", line)


def test_a_disk_that_fills_up_during_the_merge_is_one_line_and_the_merge_resumes(sound: Pool, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the same call."""
    recipe = write_recipe(tmp_path, document_of(sound))
    output = tmp_path / "out"
    limit = shard(sound["p1"]).stat().st_size // 2
    done = console(
        "merge",
        recipe,
        "--output",
        output,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    line = the_line(Run(done.returncode, done.stdout, done.stderr), was_begun=True)
    assert re.search(r"cannot be written: File too large.*resume", line)
    assert not list(output.glob("*.json"))
    assert console("merge", recipe, "--output", output).returncode == 0
