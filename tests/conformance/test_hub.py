"""Sources: local paths that never touch the network, and Hub ids out of a cache laid out as the Hub's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_files import sample_tensors, write_file
from remelt.errors import CheckpointError
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached_model(cache: Path) -> Path:
    """One model in a cache: snapshots/<revision>/ holds links to blobs/."""
    model = cache / "models--someone--tiny"
    blob = write_file(model / "blobs" / "f00d", sample_tensors())
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    return snapshot


@pytest.mark.parametrize("source", ["someone/tiny", "someone/tiny@main", f"someone/tiny@{REVISION}"])
def test_hub_id_is_read_through_the_links_of_the_cache(tmp_path: Path, source: str) -> None:
    snapshot = cached_model(tmp_path)
    index = open_checkpoint(source, cache_dir=str(tmp_path), local_files_only=True)
    assert (index.source, Path(index.root)) == (source, snapshot)
    with RangeReader(index) as reader:
        assert reader.read("half").tobytes() == sample_tensors()["half"][1].tobytes()


def test_link_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    snapshot = cached_model(tmp_path / "cache")
    elsewhere = write_file(tmp_path / "blobs" / "secret", sample_tensors())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="a link outside the folder"):
        open_checkpoint("someone/tiny", cache_dir=str(tmp_path / "cache"), local_files_only=True)


def test_hub_id_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("someone/typo", cache_dir=str(tmp_path), local_files_only=True)
    for words in ("someone/typo does not exist", "check the path", "revision", "hf auth login"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "./nope",
        "/nope/x",
        "~nobody-here/x",
        "./" + "x" * 300,
        "x" * 300 + "/" + "y" * 300 + "/z",
        "a/b/c",
        "a b",
        "",
        "org/name@rev@rev",
    ],
)
def test_path_that_does_not_exist_is_refused_without_the_hub(source: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(source)


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.safetensors", sample_tensors())
    with pytest.raises(CheckpointError, match="name the folder that holds it"):
        open_checkpoint(str(path))


def test_relative_path_that_looks_like_a_hub_id_is_local_if_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "tiny@rev"):
        write_file(tmp_path / "someone" / name / "model.safetensors", sample_tensors())
    monkeypatch.chdir(tmp_path)
    for source in ("someone/tiny", "someone/tiny@rev"):
        assert open_checkpoint(source).root == source


def test_local_path_opens_no_socket_and_loads_nothing_heavy(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", sample_tensors())
    program = """
import socket, sys
def refuse(*args, **options): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = refuse
from remelt.formats import open_checkpoint
from remelt.range_reader import RangeReader
import remelt.diff, remelt.inspection
with RangeReader(open_checkpoint(sys.argv[1])) as reader: reader.read("half")
heavy = {"huggingface_hub", "torch", "ray", "transformers", "numba", "yaml", "pydantic", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    source_root = str(Path(sys.modules["remelt"].__file__ or "").parents[1])
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={"PYTHONPATH": source_root})
