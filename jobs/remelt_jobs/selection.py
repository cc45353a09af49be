"""A Frank-Wolfe selection from end to end: merge an iterate, take its loss and gradient, ask the pool, step, repeat.

The journal holds what was measured: losses and inner products of each point. The walk itself is a function of those
(`remelt.frank_wolfe.walk`), so a selection that is run again walks through what is there without touching a model, and
goes on where it stopped. Each iterate's recipe lies in `iterates/<number>/recipe.yaml`; `remelt merge` takes it as it
is.

    <output>/journal, lease       what was measured; who drives
    <output>/iterates/0003/       recipe.yaml and coefficients.json
    <output>/work/                the merge and the gradient of the moment
    <output>/best/                the iterate of the least loss, merged and verified
    <output>/result.json          the tables
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from remelt.errors import OutputError, StudyError
from remelt.executor import Executor, LocalExecutor
from remelt.formats import open_checkpoint
from remelt.frank_wolfe import Evaluation, Iterate, best_of, walk
from remelt.inner_products import collect, measure_products, plan_products
from remelt.merge import merge_recipe
from remelt.oracle import Matrix, block_products, oracle_scores
from remelt.receipts import write_file_durably
from remelt.recipe import Recipe
from remelt.verify import verify_merge
from remelt_evals.loss_gradient import LossReport, measure
from remelt_jobs.candidates import with_absolute_paths
from remelt_jobs.journal import Journal, Record, read_journal
from remelt_jobs.lease import Lease, take_lease
from remelt_jobs.ray_session import ray_session
from remelt_jobs.selection_config import SelectionConfig
from remelt_jobs.selection_ground import Ground, survey_ground
from remelt_jobs.selection_result import BEST, Row, SelectionResult

ITERATES, WORK, RESULT = "iterates", "work", "result.json"
OnStep = Callable[[str], None]
"""Told what just happened, in a sentence."""


def run_selection(
    config: SelectionConfig,
    output: Path,
    *,
    takeover: bool = False,
    executor: Executor | None = None,
    progress: OnStep | None = None,
) -> SelectionResult:
    """Run a selection in `output`, go on with it, or, where it is finished, say what came of it.

    Args:
        executor: merges and takes inner products; by default the config's.
        progress: told of every step, in this thread.

    Raises:
        StudyError: another selection or another driver has the directory.
        RecipeError, CheckpointError, MismatchError, BudgetError, EvaluationError: before anything is merged.
    """
    _refuse_foreign(output)
    records = read_journal(output)
    _check_identity(config, records, output)
    executor = executor or _executor(config)
    ground = survey_ground(config, executor)
    with ExitStack() as stack:
        lease = stack.enter_context(take_lease(output, takeover=takeover).kept_alive())
        journal = stack.enter_context(Journal(output, lease))
        _check_identity(config, journal.records, output)
        if config.place.name == "ray":
            # One connection for all merges and passes; each would otherwise start a cluster of its own.
            stack.enter_context(ray_session())
        run = _Selection(config, output, lease, journal, executor, ground, progress or (lambda sentence: None))
        return run.run()


def _executor(config: SelectionConfig) -> Executor:
    place = config.place
    if place.name == "local":
        return LocalExecutor(threads=place.threads, memory_bytes=place.memory_bytes)
    from remelt_jobs.ray_executor import RayExecutor

    return RayExecutor(num_workers=place.workers, threads=place.threads, memory_bytes=place.memory_bytes)


def _refuse_foreign(output: Path) -> None:
    if (output / "journal").is_dir():
        return
    taken = [name for name in (BEST, ITERATES, WORK, "lease") if (output / name).exists()]
    if taken:
        raise StudyError(f"{output} holds {', '.join(taken)}, and no selection of ours; choose another --output")


def _check_identity(config: SelectionConfig, records: Sequence[Record], output: Path) -> None:
    if not records:
        return
    known = records[0]
    if known.get("type") != "selection":
        raise StudyError(f"{output} holds a journal of another kind ({known.get('type')}); choose another --output")
    if known["selection_id"] != config.selection_id:
        asked = config.canonical()
        changed = ", ".join(key for key in asked if asked[key] != known["canonical"].get(key)) or "its form"
        raise StudyError(
            f"{output} holds another selection ({known['selection_id'][:12]}, this one is {config.selection_id[:12]}; "
            f"they differ in: {changed}); choose another --output"
        )


class _Selection:
    """One driver's run, under its lease. It is the `Problem` that the walk asks."""

    def __init__(
        self,
        config: SelectionConfig,
        output: Path,
        lease: Lease,
        journal: Journal,
        executor: Executor,
        ground: Ground,
        progress: OnStep,
    ) -> None:
        self.config, self.output, self.lease, self.journal = config, output, lease, journal
        self.executor, self.ground, self.progress = executor, ground, progress
        self.measured: dict[str, Record] = {}
        self.num_gradients = self.num_losses = 0
        self.published: Record | None = None
        for record in journal.records:
            self._take(record)
        self.num_known = len(self.measured)

    def run(self) -> SelectionResult:
        self._begin()
        iterates: list[Iterate] = []
        start = self.config.hull.start(self.config.start, self.ground.blocks.num_blocks)
        for iterate in walk(self, start, self.config.options):
            iterates.append(iterate)
            self._keep(iterate)
        best = best_of(iterates)
        was_published = self.published is not None and self.published["iterate"] == best.number
        is_reused = was_published and len(self.measured) == self.num_known
        if not was_published:
            self._publish(best)
        assert self.published is not None
        result = self._result(iterates, best, is_reused=is_reused)
        if not is_reused:
            write_file_durably(self.output / RESULT, result.to_json().encode())
            shutil.rmtree(self.output / WORK, ignore_errors=True)
        return result

    def _begin(self) -> None:
        """Write what is selected from, or compare it with what was."""
        if not self.journal.records:
            self._record(self.ground.identity)
            return
        known = self.journal.records[0]
        changed = [
            name for name, identity in self.ground.identity["inputs"].items() if known["inputs"].get(name) != identity
        ]
        changed += ["the base"] if known["layout"] != self.ground.identity["layout"] else []
        changed += ["the calibration text"] if known["calibration"] != self.ground.identity["calibration"] else []
        changed += ["the kernels' numerics"] if known["numerics"] != self.ground.identity["numerics"] else []
        if changed:
            raise StudyError(
                f"{', '.join(changed)} changed since the selection in {self.output} began, so what it measured no "
                "longer holds; put back what was there, or choose another --output"
            )

    def _record(self, record: Record) -> None:
        record = {**record, "at": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self.journal.append(record)
        self._take(record)

    def _take(self, record: Record) -> None:
        if record["type"] == "measured":
            # A point whose loss was known may get its gradient later.
            if "products" in record or record["point"] not in self.measured:
                self.measured[record["point"]] = record
            self.num_gradients += "products" in record
            self.num_losses += "products" not in record
        elif record["type"] == "published":
            self.published = record

    # What the walk asks

    def loss(self, coefficients_BV: Matrix) -> float:
        record = self.measured.get(_point(coefficients_BV))
        if record is None:
            record = self._measure(coefficients_BV, with_gradient=False)
        return math.inf if record["loss"] is None else float(record["loss"])

    def evaluate(self, coefficients_BV: Matrix) -> Evaluation:
        record = self.measured.get(_point(coefficients_BV))
        if record is None or "products" not in record:
            record = self._measure(coefficients_BV, with_gradient=True)
        return Evaluation(float(record["loss"]), np.array(record["products"]), np.array(record["scores"]))

    def _measure(self, coefficients_BV: Matrix, *, with_gradient: bool) -> Record:
        """Merge a point, run the model on it and, with a gradient, the pool against that."""
        self.lease.check()
        started = time.monotonic()
        merged, gradient = self.output / WORK / "merge", self.output / WORK / "gradient"
        recipe = with_absolute_paths(self._recipe(coefficients_BV))
        digest = merge_recipe(recipe, merged, executor=self.executor, force=True).digest
        merge_seconds = time.monotonic() - started
        report = measure(
            merged,
            self.ground.tokens,
            self.config.loss,
            gradient=gradient if with_gradient else None,
            held_out=self.ground.held_out if with_gradient else None,
        )
        record: Record = {
            "type": "measured",
            "point": _point(coefficients_BV),
            "digest": digest,
            **_losses(report),
            "merge_seconds": merge_seconds,
        }
        if with_gradient:
            record |= self._ask_pool(gradient)
        record["seconds"] = time.monotonic() - started
        self._record(record)
        what = "loss and gradient" if with_gradient else "a loss on the line"
        self.progress(f"{what}: {report.loss:.5f} in {record['seconds']:.1f} s")
        return record

    def _ask_pool(self, gradient: Path) -> Record:
        ground = self.ground
        plan = plan_products(
            open_checkpoint(str(gradient.absolute())),
            ground.vertices_V,
            base=ground.base,
            names=set(ground.blocks.names_T),
            with_squares=self.config.oracle == "cosine",
            budget=self.executor.budget(),
        )
        found = collect(
            plan,
            list(self.executor.gather(measure_products, plan.settings, plan.units, plan.projection.total_bytes)),
        )
        # A coefficient moves the merge by the operator's scale times the vertex.
        products_BV = self.config.hull.scale * block_products(found, ground.blocks)
        is_inner = self.config.oracle == "inner"
        scores_BV = products_BV if is_inner else oracle_scores(found, ground.blocks, self.config.oracle)
        return {"products": products_BV.tolist(), "scores": scores_BV.tolist(), "read_bytes": plan.read_bytes}

    def _recipe(self, coefficients_BV: Matrix) -> Recipe:
        return self.config.hull.recipe(coefficients_BV, self.ground.blocks)

    # What is written

    def _keep(self, iterate: Iterate) -> None:
        """The iterate as a recipe and as numbers."""
        self.lease.check()
        folder = self.output / ITERATES / f"{iterate.number:04}"
        if not (folder / "coefficients.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            text = self._recipe(iterate.coefficients_BV).to_yaml()
            write_file_durably(folder / "recipe.yaml", text.encode())
            document = {
                "number": iterate.number,
                "loss": iterate.loss,
                "gap": iterate.gap,
                "vertices": self.config.hull.vertices,
                "blocks": self.ground.blocks.labels_B,
                "coefficients": iterate.coefficients_BV.tolist(),
            }
            write_file_durably(folder / "coefficients.json", json.dumps(document).encode())
        ending = f"; stopped: {iterate.stopped}" if iterate.stopped else ""
        limit = self.config.options.iterations
        self.progress(f"iterate {iterate.number} of {limit}: loss {iterate.loss:.5f}, gap {iterate.gap:.3g}{ending}")

    def _publish(self, best: Iterate) -> None:
        """Merge the best iterate for real, verify it, and see that it is what was measured."""
        self.lease.check()
        self.progress(f"merging iterate {best.number}")
        path = self.output / BEST
        merged = merge_recipe(
            self._recipe(best.coefficients_BV), path, executor=self.executor, force=self.published is not None
        )
        problems = list(verify_merge(path).problems)
        from remelt_evals.loading_check import check_loading

        problems += check_loading(path).problems
        measured = self.measured[_point(best.coefficients_BV)]["digest"]
        if merged.digest != measured:
            problems.append(f"its digest is {merged.digest[:12]}, that of the merge that was measured {measured[:12]}")
        if problems:
            raise OutputError(f"{path} does not verify: {'; '.join(problems[:5])}")
        self._record({"type": "published", "iterate": best.number, "digest": merged.digest, "run_id": merged.run_id})

    def _result(self, iterates: Sequence[Iterate], best: Iterate, *, is_reused: bool) -> SelectionResult:
        assert self.published is not None
        return SelectionResult(
            output=self.output,
            names_V=self.config.hull.vertices,
            rows=tuple(self._row(iterate) for iterate in iterates),
            best=best.number,
            weights_V=tuple(float(value) for value in best.coefficients_BV.mean(axis=0)),
            stopped=str(iterates[-1].stopped),
            digest=self.published["digest"],
            num_gradients=self.num_gradients,
            num_losses=self.num_losses,
            notes=self.ground.notes,
            is_reused=is_reused,
        )

    def _row(self, iterate: Iterate) -> Row:
        kinds = list(iterate.kinds_B)
        return Row(
            iterate.number,
            iterate.loss,
            self.measured[_point(iterate.coefficients_BV)]["held_out"],
            iterate.gap,
            {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} if not iterate.stopped else {},
            max(iterate.steps_B),
            int((iterate.coefficients_BV > 0).any(axis=0).sum()),
        )


def _losses(report: LossReport) -> Record:
    """Losses as JSON has them: none for NaN and infinity."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def each(values: Iterable[tuple[str, float]]) -> dict[str, float | None]:
        return {name: finite(value) for name, value in values}

    return {
        "loss": finite(report.loss),
        "by_source": each(report.by_source.items()),
        "held_out": finite(report.held_out),
        "held_out_by_source": each((report.held_out_by_source or {}).items()),
    }


def _point(coefficients_BV: Matrix) -> str:
    """What identifies a point: every bit of its coefficients."""
    return hashlib.sha256(np.ascontiguousarray(coefficients_BV, "<f8").tobytes()).hexdigest()
