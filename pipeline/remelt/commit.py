"""Commit last: work under `<output>/.remelt/`, then shards, companions, index and manifest into place, in that order.

Any prefix of a commit can be resumed, since a shard is looked for in both places and everything else is written whole.
The manifest is the marker: an output without one is unfinished. `--force` removes only files that our own manifest or
receipts list.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from remelt import __version__
from remelt.checkpoint import CheckpointIndex
from remelt.companions import companion_files, output_config
from remelt.dtypes import DTYPES
from remelt.errors import BudgetError, NumericsError, OutputError
from remelt.fingerprints import checkpoint_digest
from remelt.layout import INDEX_FILE, SINGLE_FILE
from remelt.model_card import model_card
from remelt.plan import MergePlan, OutputRecord, Unit, UnitReceipt
from remelt.receipts import RECEIPTS, SHARDS, find_receipt, find_shard, write_file_durably
from remelt.sinks import sync_directory, unwritable

WORK_DIR = ".remelt"
MANIFEST_FILE = "remelt_manifest.json"
RECIPE_FILE = "remelt_recipe.yaml"
MANIFEST_SCHEMA = 1
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
    if not isinstance(manifest, dict) or "run_id" not in manifest:
        raise OutputError(f"{path}: is no manifest of ours: it has no run_id; choose another --output")
    return manifest


def find_finished(plan: MergePlan, output: Path, set_number: int = 0) -> MergedCheckpoint | None:
    """The finished output of this very run, or None; the manifest and file sizes are all that is looked at."""
    manifest = read_manifest(output)
    if manifest is None or manifest["run_id"] != plan.run_id or manifest["coefficient_set"] != set_number:
        return None
    for file in manifest["files"]:
        path = output / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
            raise OutputError(
                f"{output}: its manifest lists {file['name']} with {file['bytes']:,} bytes, found {found}; "
                "the output was changed after it was finished: merge again with --force"
            )
    return _merged(output, manifest, is_reused=True)


def check_output(plan: MergePlan, output: Path, *, force: bool = False) -> None:
    """Refuse an output that belongs to something else, or a disk without room; writes nothing.

    Raises:
        OutputError: the directory holds another recipe's output, foreign files, or a checkpoint that is merged, or
            cannot be written.
        NumericsError: it holds an unfinished run of the same recipe with another numerics tag.
        BudgetError: not enough disk space.
    """
    home = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not home.is_dir():
        raise OutputError(f"--output {output}: {home} is a file, not a directory; choose another")
    if not os.access(home, os.W_OK):
        raise OutputError(f"--output {output}: {home} cannot be written; choose another or change its permissions")
    for model in plan.settings.models:
        # With --force our own files there would be removed, and then missed as input.
        if output.resolve() == Path(model.root).resolve():
            raise OutputError(f"--output {output}: is the checkpoint {model.source} that is merged; choose another")
    if not force:
        _check_ownership(plan, output)
    free = shutil.disk_usage(home).free
    work = output / WORK_DIR / SHARDS
    present = sum(path.stat().st_size for path in work.glob("*.safetensors")) if work.is_dir() else 0
    needed = plan.write_bytes // plan.settings.num_sets + DISK_SLACK_BYTES - present
    if needed > free:
        raise BudgetError(
            f"not enough disk: {output} needs {needed:,} more bytes, {home} has {free:,} free; "
            "free some, or choose an --output on another disk"
        )


def _check_ownership(plan: MergePlan, output: Path) -> None:
    manifest = read_manifest(output)
    if manifest is not None and manifest["run_id"] != plan.run_id:
        raise OutputError(
            f"{output} holds the finished output of another recipe or other inputs (run "
            f"{manifest['run_id'][:12]}, this is {plan.run_id[:12]}); choose another --output, "
            "or replace it with --force"
        )
    begun = _read_begun(output)
    if begun is not None and begun["run_id"] != plan.run_id:
        if begun.get("recipes") == list(plan.recipes) and begun["numerics"] != plan.settings.numerics:
            raise NumericsError(
                f"{output} holds an unfinished run with numerics {begun['numerics']}, this one computes with "
                f"{plan.settings.numerics}: their bytes may differ. Resume where it was begun, or start over with "
                "--force"
            )
        raise OutputError(
            f"{output} holds an unfinished run of another recipe or other inputs (run {begun['run_id'][:12]}, this is "
            f"{plan.run_id[:12]}); choose another --output, or replace it with --force"
        )
    if manifest is None and begun is None and output.is_dir() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty and holds no run of remelt; choose another --output")


def _read_begun(output: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        begun = json.loads((output / WORK_DIR / "run.json").read_text())
        if isinstance(begun, dict) and "run_id" in begun:
            return begun
    return None


class OutputRun:
    """An output directory that this process works on: begun, filled with receipts, committed."""

    def __init__(self, plan: MergePlan, output: Path, set_number: int = 0) -> None:
        self._plan, self._output, self._set = plan, output, set_number
        self.work_dir = output / WORK_DIR
        self._lock = -1

    def begin(self, *, force: bool = False) -> dict[str, UnitReceipt]:
        """Take the directory and return the receipts, by unit id, of what an earlier run left done.

        Raises OutputError where another process works on it.
        """
        check_output(self._plan, self._output, force=force)
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            if force:
                remove_ours(self._output, keep_run=self._plan.run_id)
            for name in (SHARDS, RECEIPTS):
                (self.work_dir / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._output, error) from error
        self._take_lock()
        for leftover in (self.work_dir / SHARDS).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        write_file_durably(
            self.work_dir / "run.json",
            json.dumps(
                {
                    "run_id": self._plan.run_id,
                    "numerics": self._plan.settings.numerics,
                    "recipes": list(self._plan.recipes),
                    "num_units": len(self._plan.units),
                }
            ).encode(),
        )
        receipts = {}
        for unit in self._plan.units:
            receipt = find_receipt(self.work_dir, self._output, unit, self._set)
            if receipt is not None:
                receipts[unit.unit_id] = receipt
        return receipts

    def _take_lock(self) -> None:
        self._lock = os.open(self.work_dir / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = -1
            raise OutputError(f"{self._output}: another process is merging into it; wait for it, or stop it") from error

    def release(self) -> None:
        """Let other processes have the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def commit(self, receipts: Sequence[UnitReceipt], layout: CheckpointIndex, seconds: float) -> MergedCheckpoint:
        """Publish: shards, companions, index, manifest, in that order; then clear the work directory."""
        plan, output = self._plan, self._output
        records = [receipt.outputs[self._set] for receipt in receipts]
        is_single = len(records) == 1 and records[0].file == SINGLE_FILE
        if not is_single:
            self._move_shards(records)
        for name, data in self._companions(layout):
            write_file_durably(output / name, data)
        if is_single:
            self._move_shards(records)
            (output / INDEX_FILE).unlink(missing_ok=True)
        else:
            write_file_durably(output / INDEX_FILE, _index_json(records))
        manifest = _manifest(plan, self._set, receipts, records, seconds)
        manifest["companions"] = sorted(name for name, _ in self._companions(layout))
        write_file_durably(output / MANIFEST_FILE, json.dumps(manifest, sort_keys=True, indent=1).encode())
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return _merged(output, manifest, is_reused=False)

    def _companions(self, layout: CheckpointIndex) -> list[tuple[str, bytes]]:
        from remelt.recipe_yaml import parse_recipe

        recipe = parse_recipe(self._plan.recipes[self._set])
        files = [(name, path.read_bytes()) for name, path in companion_files(Path(layout.root))]
        if layout.config:
            files.append(("config.json", output_config(layout.config, self._plan.output_dtype)))
        files.append((RECIPE_FILE, recipe.to_yaml().encode()))
        files.append(("README.md", model_card(self._plan, recipe).encode()))
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


def remove_ours(output: Path, *, keep_run: str) -> None:
    """Remove what another run of ours left: files that its manifest or receipts list, and its work directory."""
    manifest = read_manifest(output)
    names: set[str] = set()
    if manifest is not None:
        names.update(file["name"] for file in manifest["files"])
        names.update(manifest.get("companions", ()))
        names.update((MANIFEST_FILE, INDEX_FILE))
        (output / MANIFEST_FILE).unlink()
    begun = _read_begun(output)
    if begun is not None and begun["run_id"] != keep_run:
        for path in (output / WORK_DIR / RECEIPTS).glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                names.update(record.file for record in UnitReceipt.from_json(path.read_text()).outputs)
        shutil.rmtree(output / WORK_DIR)
    for name in names:
        if Path(name).name == name:
            (output / name).unlink(missing_ok=True)


def _index_json(records: Sequence[OutputRecord]) -> bytes:
    weight_map = {tensor.name: record.file for record in records for tensor in record.tensors}
    total = sum(
        _num_elements(tensor.shape) * DTYPES[tensor.dtype].item_bits // 8
        for record in records
        for tensor in record.tensors
    )
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1
    ).encode()


def _num_elements(shape: Sequence[int]) -> int:
    num = 1
    for dim in shape:
        num *= dim
    return num


def _manifest(
    plan: MergePlan,
    set_number: int,
    receipts: Sequence[UnitReceipt],
    records: Sequence[OutputRecord],
    seconds: float,
) -> dict[str, Any]:
    tensors = {tensor.name: tensor for record in records for tensor in record.tensors}
    return {
        "schema": MANIFEST_SCHEMA,
        "remelt_version": __version__,
        "run_id": plan.run_id,
        "candidate_id": plan.candidate_ids[set_number],
        "coefficient_set": set_number,
        "numerics": plan.settings.numerics,
        "recipe": plan.recipes[set_number],
        "digest": checkpoint_digest({name: (t.dtype, t.shape, t.digest) for name, t in tensors.items()}),
        "files": [{"name": record.file, "bytes": record.nbytes, "sha256": record.sha256} for record in records],
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "digest": t.digest, "nonfinite": t.num_nonfinite}
            for name, t in sorted(tensors.items())
        },
        "dropped": list(plan.dropped),
        "parents": _parents(plan, receipts),
        "execution": {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "bytes_read": sum(receipt.read_bytes for receipt in receipts),
            "bytes_written": sum(record.nbytes for record in records),
            "peak_memory_bytes": max((receipt.peak_memory_bytes for receipt in receipts), default=0),
        },
    }


def _parents(plan: MergePlan, receipts: Sequence[UnitReceipt]) -> list[dict[str, Any]]:
    """Each parent with its fingerprints; with its digest where every tensor of it that was planned was read whole."""
    seen: list[dict[str, tuple[str, tuple[int, ...], str]]] = [{} for _ in plan.settings.models]
    nonfinite: list[dict[str, int]] = [{} for _ in plan.settings.models]
    for receipt in receipts:
        for place, record in receipt.parents:
            seen[place][record.name] = (record.dtype, record.shape, record.digest)
            if record.num_nonfinite:
                nonfinite[place][record.name] = record.num_nonfinite
    return [
        {
            "source": model.source,
            "files": [{"name": file.name, "bytes": file.size, "fingerprint": file.fingerprint} for file in model.files],
            "tensors_read": len(tensors),
            "digest_of_tensors_read": checkpoint_digest(tensors) if tensors else None,
            "nonfinite": bad,
        }
        for model, tensors, bad in zip(plan.settings.models, seen, nonfinite, strict=True)
    ]


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


def units_to_do(plan: MergePlan, done: Sequence[dict[str, UnitReceipt]]) -> list[Unit]:
    """Units that lack a receipt in any of the outputs, in plan order."""
    return [unit for unit in plan.units if not all(unit.unit_id in receipts for receipts in done)]
