"""Claim: `remelt status` says where a merge or a study stands from its directory alone, and changes nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from merge_fixtures import make_recipe, write_pool
from remelt.errors import StudyError
from remelt.merge import merge_recipe
from remelt.plan import MergePlan, UnitReceipt
from remelt_jobs.status import MergeStatus, StudyStatus, status_of
from remelt_jobs.study import run_study
from remelt_jobs.study_config import parse_study
from remelt_jobs.study_progress import StudyProgress
from study_fixtures import make_document


class Stopped(Exception):  # noqa: N818 - not an error, a driver's end
    pass


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_in_the_middle_and_at_its_end(
    cluster: str, parents: dict[str, Path], suite_file: Path, tmp_path: Path
) -> None:
    config = parse_study(make_document(parents, suite_file, budget={"trials": 7}))

    def stop_after_five(step: StudyProgress) -> None:
        if step.num_done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(config, tmp_path / "study", progress=stop_after_five)
    before = tree(tmp_path)
    halfway = status_of(tmp_path / "study")
    assert tree(tmp_path) == before
    assert isinstance(halfway, StudyStatus)
    assert (halfway.phase, halfway.trials["COMPLETE"], halfway.winner) == ("search", 5, None)
    assert halfway.driver.startswith("nobody: lease 1 was released")
    result = run_study(config, tmp_path / "study")
    done = status_of(tmp_path / "study")
    assert isinstance(done, StudyStatus)
    assert (done.phase, done.trials, done.winner) == ("done", {"COMPLETE": 7}, result.winner)
    assert done.published == str(result.best_path)
    assert done.wall_seconds > halfway.wall_seconds > 0


def test_a_merge_in_the_middle_and_at_its_end(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", 2)
    recipe = make_recipe(pool, max_shard_size=2000)

    class Interrupt(Exception):  # noqa: N818
        pass

    class StopAfterAShard:
        def start(self, plan: MergePlan, total_bytes: int, num_units_done: int) -> None: ...

        def advance(self, num_bytes: int) -> None: ...

        def finish_unit(self, receipt: UnitReceipt) -> None:
            raise Interrupt

    with pytest.raises(Interrupt):
        merge_recipe(recipe, tmp_path / "out", progress=StopAfterAShard())
    before = tree(tmp_path / "out")
    halfway = status_of(tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert isinstance(halfway, MergeStatus)
    assert halfway.phase == "merging"
    assert 0 < halfway.num_done < halfway.num_units
    merged = merge_recipe(recipe, tmp_path / "out")
    done = status_of(tmp_path / "out")
    assert isinstance(done, MergeStatus)
    assert (done.phase, done.digest, done.num_done) == ("done", merged.digest, halfway.num_units)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds neither a study nor a merge"):
        status_of(tmp_path)
    with pytest.raises(StudyError, match="does not exist"):
        status_of(tmp_path / "nothing")


def test_the_command_prints_lines_or_json(tmp_path: Path) -> None:
    merged = merge_recipe(make_recipe(write_pool(tmp_path / "pool", 2)), tmp_path / "out")
    command = [sys.executable, "-m", "remelt_jobs.cli", "status", str(tmp_path / "out")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert merged.digest in shown.stdout
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout)["digest"] == merged.digest
    refused = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "holds neither" in refused.stderr
