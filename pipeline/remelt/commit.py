"""Commit last: work under `<output>/.remelt/`, then shards, companions, index and manifest into place, in that order.

Any prefix of a commit can be resumed, since a shard is looked for in both places and everything else is written whole.
The manifest is the marker: an output without one is unfinished. `--force` removes only files that our own manifest or
receipts list, and a finished output not before what replaces it is ready to move into place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from remelt import __version__
from remelt.checkpoint import CheckpointIndex
from remelt.companions import companion_files, output_config
from remelt.dtypes import tensor_bytes
from remelt.errors import BudgetError, NumericsError, OutputError
from remelt.fingerprints import checkpoint_digest, digest_line, digest_of_lines, file_sha256
from remelt.layout import INDEX_FILE, SINGLE_FILE
from remelt.model_card import model_card
from remelt.plan import MergePlan, OutputRecord, Unit, UnitReceipt
from remelt.receipts import (
    RECEIPTS,
    SHARDS,
    find_receipt,
    find_shard,
    receipt_path,
    write_file_durably,
)
from remelt.sinks import sync_directory, unwritable
from remelt.unit_runner import refuse_nonfinite

WORK_DIR = ".remelt"
MANIFEST_FILE = "remelt_manifest.json"
RECIPE_FILE = "remelt_recipe.yaml"
CARD_FILE = "README.md"
MANIFEST_SCHEMA = 1
REPLACED_FILE = "replaced.json"
"""The manifest of a finished output, moved here while its files are removed for another's commit."""
DISK_SLACK_BYTES = 64 * 1024 * 1024
"""For config, tokenizer, manifest and receipts."""


@dataclass(frozen=True, slots=True)
class MergedCheckpoint:
    """A published merge."""

    path: Path
    digest: str
    """Over all tensors: independent of shards and file names."""
    run_id: str
    candidate_id: str
    num_bytes: int
    is_reused: bool
    """Whether it was there already, and nothing was read."""
    num_nonfinite: int
    """NaN and Inf values in the output."""


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a finished output, or None where there is none. Raises OutputError where it is damaged."""
    path = output / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: cannot be read as a manifest ({error}); remove it if the output is not needed"
        ) from error
    keys = {"schema", "run_id", "candidate_id", "digest", "files", "tensors", "recipe"}
    if not isinstance(manifest, dict) or not keys <= manifest.keys():
        raise OutputError(f"{path}: is no manifest of ours, some of its keys are missing; choose another --output")
    if manifest["schema"] != MANIFEST_SCHEMA:
        raise OutputError(
            f"{path}: has schema {manifest['schema']}, this version of remelt reads {MANIFEST_SCHEMA}; use the version "
            f"that wrote it ({manifest.get('remelt_version')}), or choose another --output"
        )
    return manifest


def find_finished(
    plan: MergePlan, output: Path, set_number: int = 0, *, recheck: bool = False
) -> MergedCheckpoint | None:
    """The finished output of one coefficient set, or None; the manifest and file sizes are all that is looked at.

    It does not matter whether the set was merged alone or in what company. With `recheck` every file is hashed too.
    """
    manifest = read_manifest(output)
    if manifest is None or manifest["run_id"] != plan.run_ids[set_number]:
        return None
    for file in manifest["files"]:
        path = output / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
            raise OutputError(
                f"{output}: its manifest lists {file['name']} with {file['bytes']:,} bytes, found {found}; "
                "the output was changed after it was finished: merge again with --force"
            )
        if recheck and file_sha256(path) != file["sha256"]:
            raise OutputError(
                f"{path}: its bytes are not those that the manifest lists (sha256 {file['sha256'][:12]}...); the "
                "output was damaged or changed after it was finished: merge again with --force"
            )
    return _merged(output, manifest, is_reused=True)


def check_outputs(plan: MergePlan, outputs: Sequence[Path], *, force: bool = False) -> None:
    """Refuse outputs that belong to something else, or a disk without room for all; writes nothing.

    `force` lets another run of ours be replaced, never a folder of somebody else's.

    Raises:
        OutputError: a directory holds another recipe's output, foreign files, or a checkpoint that is merged, or
            cannot be written.
        NumericsError: it holds an unfinished run of the same recipe with another numerics tag.
        BudgetError: not enough disk space.
    """
    needed: dict[int, tuple[Path, int]] = {}
    for number, output in enumerate(outputs):
        if output.resolve() in {other.resolve() for other in outputs[:number]}:
            raise OutputError(f"{output} is asked for twice: each coefficient set needs an output of its own")
        home = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not home.is_dir():
            raise OutputError(f"--output {output}: {home} is a file, not a directory; choose another")
        if not os.access(home, os.W_OK):
            raise OutputError(f"--output {output}: {home} cannot be written; choose another or change its permissions")
        for model in plan.settings.models:
            # With --force our own files there would be removed, and then missed as input.
            if output.resolve() == Path(model.root).resolve():
                raise OutputError(f"--output {output}: is the checkpoint {model.source} that is merged; choose another")
        _check_ownership(plan, output, number, force=force)
        device = home.stat().st_dev
        _, before = needed.get(device, (home, 0))
        needed[device] = (home, before + _missing_bytes(plan, output))
    for home, size in needed.values():
        free = shutil.disk_usage(home).free
        if size > free:
            raise BudgetError(
                f"not enough disk: {', '.join(map(str, outputs))} needs {size:,} more bytes, {home} has {free:,} free; "
                "free some, or choose an --output on another disk"
            )


def _missing_bytes(plan: MergePlan, output: Path) -> int:
    """Bytes that an output still takes: shards of an earlier run count as there, among the work or in place.

    A finished output stays until what replaces it is whole, so that for a while there are both.
    """
    shards = output / WORK_DIR / SHARDS
    places = (shards,) if (output / MANIFEST_FILE).exists() else (shards, output)
    present = 0
    for unit in plan.units:
        for path in (place / unit.file for place in places):
            if path.is_file():
                present += path.stat().st_size
                break
    # What a killed run had begun is removed before anything is written.
    present += sum(path.stat().st_size for path in shards.glob(".*.tmp")) if shards.is_dir() else 0
    return max(0, sum(unit.write_bytes for unit in plan.units) - present) + DISK_SLACK_BYTES


def _check_ownership(plan: MergePlan, output: Path, set_number: int, *, force: bool) -> None:
    run_id = plan.run_ids[set_number]
    manifest = read_manifest(output)
    begun = _read_begun(output)
    if manifest is None and begun is None and output.is_dir():
        foreign = [path.name for path in output.iterdir() if path.name != WORK_DIR]
        if foreign:
            raise OutputError(
                f"{output} is not empty and holds no run of remelt (it has {foreign[0]}); choose another --output"
            )
    if force:
        return
    is_replacing = (
        manifest is not None
        and begun is not None
        and (begun["run_id"], begun.get("replaces")) == (run_id, manifest["run_id"])
    )
    if manifest is not None and manifest["run_id"] != run_id and not is_replacing:
        raise OutputError(
            f"{output} holds the finished output of another recipe or other inputs (run "
            f"{manifest['run_id'][:12]}, this is {run_id[:12]}); choose another --output, "
            "or replace it with --force"
        )
    if begun is not None and begun["run_id"] != run_id:
        if begun.get("recipe") == plan.recipes[set_number] and begun["numerics"] != plan.settings.numerics:
            raise NumericsError(
                f"{output} holds an unfinished run with numerics {begun['numerics']}, this one computes with "
                f"{plan.settings.numerics}: their bytes may differ. Resume where it was begun, or start over with "
                "--force"
            )
        raise OutputError(
            f"{output} holds an unfinished run of another recipe or other inputs (run {begun['run_id'][:12]}, this is "
            f"{run_id[:12]}); choose another --output, or replace it with --force"
        )


def _read_begun(output: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        begun = json.loads((output / WORK_DIR / "run.json").read_text())
        if isinstance(begun, dict) and "run_id" in begun:
            return begun
    return None


class OutputRun:
    """An output directory that this process works on: begun, filled with receipts, published, cleared."""

    def __init__(self, plan: MergePlan, output: Path, layout: CheckpointIndex, set_number: int = 0) -> None:
        self._plan, self._output, self._set = plan, output, set_number
        self._run_id = plan.run_ids[set_number]
        self._layout = layout
        self.work_dir = output / WORK_DIR
        self._lock = -1

    def begin(self, *, force: bool = False, recheck: bool = False) -> dict[str, UnitReceipt]:
        """Take the directory and return the receipts, by unit id, of what an earlier run left done.

        Raises OutputError where another process works on it.
        """
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if force:
                _remove_unfinished(self._output, keep_run=self._run_id)
            replaced = read_manifest(self._output)
            for name in (SHARDS, RECEIPTS):
                (self.work_dir / name).mkdir(exist_ok=True)
            for folder in (self._output, self.work_dir / SHARDS, self.work_dir / RECEIPTS):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self._output, error) from error
        write_file_durably(
            self.work_dir / "run.json",
            json.dumps(
                {
                    "run_id": self._run_id,
                    "numerics": self._plan.settings.numerics,
                    "recipe": self._plan.recipes[self._set],
                    "num_units": len(self._plan.units),
                    "replaces": None if replaced is None else replaced["run_id"],
                    "companions": self._companion_names(),
                }
            ).encode(),
        )
        receipts = {}
        # Shards of a finished output that is to be replaced may have the names and sizes of ours.
        place = self._output if replaced is None else self.work_dir
        for unit in self._plan.units:
            receipt = find_receipt(self.work_dir, place, unit, self._set, recheck=recheck)
            if receipt is not None:
                receipts[receipt.unit_id] = receipt.without_parents()
        return receipts

    def _take_lock(self) -> None:
        path = self.work_dir / "lock"
        self._lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that finishes removes the file: a lock on one that is gone keeps nobody out.
            is_current = path.stat().st_ino == os.fstat(self._lock).st_ino
        except OSError:
            is_current = False
        if not is_current:
            self.release()
            raise OutputError(f"{self._output}: another process is merging into it; wait for it, or stop it")

    def release(self) -> None:
        """Let other processes have the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def publish(self, receipts: Sequence[UnitReceipt], parents: Parents, seconds: float) -> MergedCheckpoint:
        """Move shards into place, then write companions, index and manifest, in that order.

        `receipts` are the coefficient set's, in plan order. The work directory stays until `clear`.
        """
        plan, output = self._plan, self._output
        self._remove_replaced()
        records = [receipt.outputs[0] for receipt in receipts]
        is_single = len(records) == 1 and records[0].file == SINGLE_FILE
        if not is_single:
            self._move_shards(records)
        for name, source in companion_files(Path(self._layout.root)):
            write_file_durably(output / name, source.read_bytes())
        for name, text in self._own_files(records):
            write_file_durably(output / name, text)
        if is_single:
            self._move_shards(records)
            (output / INDEX_FILE).unlink(missing_ok=True)
        else:
            write_file_durably(output / INDEX_FILE, _index_json(records))
        manifest = _manifest(plan, self._set, receipts, records, parents, seconds)
        manifest["companions"] = self._companion_names()
        write_file_durably(output / MANIFEST_FILE, json.dumps(manifest, sort_keys=True, indent=1).encode())
        return _merged(output, manifest, is_reused=False)

    def _remove_replaced(self) -> None:
        """Remove the finished output in our place; its manifest goes aside first, so that a kill can be resumed."""
        aside = self.work_dir / REPLACED_FILE
        if (self._output / MANIFEST_FILE).exists():
            (self._output / MANIFEST_FILE).rename(aside)
            sync_directory(self._output)
        if aside.exists():
            _remove_named(self._output, _names_of(json.loads(aside.read_text())))
            sync_directory(self._output)
            aside.unlink()

    def clear(self) -> None:
        """Forget the work: the output is published."""
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def _companion_names(self) -> list[str]:
        copied = [name for name, _ in companion_files(Path(self._layout.root))]
        return sorted({*copied, "config.json", RECIPE_FILE, CARD_FILE})

    def _own_files(self, records: Sequence[OutputRecord]) -> list[tuple[str, bytes]]:
        from remelt.recipe_yaml import parse_recipe

        recipe = parse_recipe(self._plan.recipes[self._set])
        files = [
            (RECIPE_FILE, recipe.to_yaml().encode()),
            (CARD_FILE, model_card(self._plan, recipe, self._run_id).encode()),
        ]
        if self._layout.config:
            dtypes = {tensor.dtype for record in records for tensor in record.tensors}
            is_scaled = any(dtype.startswith("F8") for dtype in dtypes)
            config = output_config(self._layout.config, self._plan.output_dtype, is_scaled=is_scaled)
            files.append(("config.json", config))
        return files

    def _move_shards(self, records: Iterable[OutputRecord]) -> None:
        for record in records:
            shard = find_shard(self.work_dir, self._output, record)
            if shard is None:
                raise OutputError(
                    f"{self._output}: shard {record.file} of {record.nbytes:,} bytes vanished before the commit; "
                    "merge again"
                )
            shard.rename(self._output / record.file)
        sync_directory(self._output)


def _remove_unfinished(output: Path, *, keep_run: str) -> None:
    """Remove what another run of ours left unfinished: what its receipts list, and its work but for the lock."""
    begun = _read_begun(output)
    if begun is None or begun["run_id"] == keep_run:
        return
    names = {*begun.get("companions", ()), INDEX_FILE}
    for path in (output / WORK_DIR / RECEIPTS).glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            names.update(record.file for record in UnitReceipt.from_json(path.read_text()).outputs)
    (output / WORK_DIR / "run.json").unlink()
    for name in (SHARDS, RECEIPTS):
        shutil.rmtree(output / WORK_DIR / name, ignore_errors=True)
    finished = read_manifest(output)
    _remove_named(output, names - (set() if finished is None else _names_of(finished)))


def _names_of(manifest: dict[str, Any]) -> set[str]:
    """The files of a finished output, but for its manifest."""
    return {*(file["name"] for file in manifest["files"]), *manifest.get("companions", ()), INDEX_FILE}


def _remove_named(output: Path, names: Iterable[str]) -> None:
    for name in names:
        if Path(name).name == name:
            (output / name).unlink(missing_ok=True)


class Parents:
    """What a run learned of its parents: their tensors' digests, and where they are not finite.

    Lines are kept as bytes, not as objects: a plan over sixteen parents of 92,000 tensors has 1.5 million of them.
    """

    def __init__(self, plan: MergePlan, work_dir: Path, set_number: int = 0) -> None:
        """Gather from the receipt files of a coefficient set, one at a time; all sets read the same."""
        self._sources = plan.settings.models
        self._lines = [bytearray() for _ in self._sources]
        self._nonfinite: list[dict[str, int]] = [{} for _ in self._sources]
        for unit in plan.units:
            receipt = UnitReceipt.from_json(receipt_path(work_dir, unit.set_ids[set_number]).read_text())
            if not plan.settings.allow_nonfinite:
                # A receipt of an earlier run may have been made when it was allowed.
                refuse_nonfinite(receipt.parents, plan.settings)
            for place, record in receipt.parents:
                self._lines[place] += digest_line(record.name, record.dtype, record.shape, record.digest)
                if record.num_nonfinite:
                    self._nonfinite[place][record.name] = record.num_nonfinite

    def to_json(self) -> list[dict[str, Any]]:
        """Each parent with its files' fingerprints, and the checkpoint digest over its tensors that were read."""
        return [
            {
                "source": model.source,
                "files": [
                    {"name": file.name, "bytes": file.size, "fingerprint": file.fingerprint} for file in model.files
                ],
                "tensors_read": lines.count(b"\n"),
                "digest_of_tensors_read": digest_of_lines(bytes(lines).splitlines(keepends=True)) if lines else None,
                "nonfinite": nonfinite,
            }
            for model, lines, nonfinite in zip(self._sources, self._lines, self._nonfinite, strict=True)
        ]


def _index_json(records: Sequence[OutputRecord]) -> bytes:
    weight_map = {tensor.name: record.file for record in records for tensor in record.tensors}
    total = sum(tensor_bytes(tensor.dtype, tensor.shape) for record in records for tensor in record.tensors)
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1
    ).encode()


def _manifest(
    plan: MergePlan,
    set_number: int,
    receipts: Sequence[UnitReceipt],
    records: Sequence[OutputRecord],
    parents: Parents,
    seconds: float,
) -> dict[str, Any]:
    tensors = {tensor.name: tensor for record in records for tensor in record.tensors}
    return {
        "schema": MANIFEST_SCHEMA,
        "remelt_version": __version__,
        "run_id": plan.run_ids[set_number],
        "candidate_id": plan.candidate_ids[set_number],
        "numerics": plan.settings.numerics,
        "recipe": plan.recipes[set_number],
        "digest": checkpoint_digest({name: (t.dtype, t.shape, t.digest) for name, t in tensors.items()}),
        "files": [{"name": record.file, "bytes": record.nbytes, "sha256": record.sha256} for record in records],
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "digest": t.digest, "nonfinite": t.num_nonfinite}
            for name, t in sorted(tensors.items())
        },
        "dropped": list(plan.dropped),
        "parents": parents.to_json(),
        "execution": {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "bytes_read": sum(receipt.read_bytes for receipt in receipts),
            "bytes_written": sum(record.nbytes for record in records),
            "peak_memory_bytes": max((receipt.peak_memory_bytes for receipt in receipts), default=0),
        },
    }


def _merged(output: Path, manifest: dict[str, Any], *, is_reused: bool) -> MergedCheckpoint:
    return MergedCheckpoint(
        output,
        manifest["digest"],
        manifest["run_id"],
        manifest["candidate_id"],
        sum(file["bytes"] for file in manifest["files"]),
        is_reused,
        sum(tensor["nonfinite"] for tensor in manifest["tensors"].values()),
    )


def units_to_do(plan: MergePlan, done: Mapping[int, Mapping[str, UnitReceipt]]) -> dict[tuple[int, ...], list[Unit]]:
    """Units that lack receipts, by the coefficient sets that lack them, in plan order.

    `done` has the receipts of each set that is not finished. Sets that are resumed together have mostly the same units
    left; those that were begun apart are merged apart until they are level.
    """
    todo: dict[tuple[int, ...], list[Unit]] = {}
    for unit in plan.units:
        missing = tuple(number for number, receipts in done.items() if unit.set_ids[number] not in receipts)
        if missing:
            todo.setdefault(missing, []).append(unit)
    return todo
