"""Commands that plan, merge and look at checkpoints. Nothing heavy is imported before it is known to be needed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remelt.errors import RecipeError
from remelt_jobs.progress import TerminalProgress, human_bytes, human_seconds

if TYPE_CHECKING:
    from remelt.executor import Executor
    from remelt.recipe import Recipe


class ExecutorName(StrEnum):
    """Where a merge runs."""

    LOCAL = "local"
    RAY = "ray"


class Device(StrEnum):
    """What computes."""

    CPU = "cpu"
    CUDA = "cuda"


class Compat(StrEnum):
    """Whose numbers to follow where tools differ."""

    REMELT = "remelt"
    MERGEKIT = "mergekit"


RecipeArgument = Annotated[Path, typer.Argument(help="Recipe in YAML; mergekit recipes in `models:` form as they are.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="What one process may hold, such as 8GB. Default: half the machine's."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of one process. Default: all cores.")
]
ShardOption = Annotated[
    str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard, such as 5GB.")
]
CompatOption = Annotated[
    Compat | None, typer.Option("--compat", help="mergekit: its rescale and norm floors where they differ from ours.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="cuda: one device, cuda:0 of those visible.")]


def plan(
    recipe: RecipeArgument,
    output: Annotated[Path | None, typer.Option("--output", help="Check this output and its disk too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    full: Annotated[bool, typer.Option("--full", help="With --json: add every unit and tensor.")] = False,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    max_shard_size: ShardOption = None,
    compat: CompatOption = None,
    device: DeviceOption = Device.CPU,
) -> None:
    """Say what a merge would do, from headers alone; writes nothing."""
    from remelt.commit import check_outputs
    from remelt.executor import LocalExecutor
    from remelt.merge import open_checkpoints
    from remelt.planner import build_plan, plan_summary

    loaded = _load(recipe, compat, max_shard_size)
    if not loaded.is_bound:
        loaded = loaded.bind({variable.name: variable.init for variable in loaded.variables})
        print("note: ranges are planned at their starting values", file=sys.stderr)
    executor = LocalExecutor(threads=threads, memory_bytes=_size("--memory", memory), device=device.value)
    made = build_plan(loaded, open_checkpoints(loaded), executor.budget())
    if output is not None:
        check_outputs(made, [output])
    if as_json:
        print(json.dumps(plan_summary(made, full=full), indent=1))
        return
    print(f"{loaded.merge_method} of {len(made.settings.models)} checkpoints, run {made.run_id[:16]}")
    for number, model in enumerate(made.settings.models):
        is_base = " (base)" if number == loaded.base else ""
        print(f"  {loaded.checkpoints[number].name}: {model.source}{is_base}, {len(model.files)} files")
    print(f"\n{'tensors of class':<18}{'operator':<22}{'number':>8}{'output':>12}")
    for kind, operator, tensors, size in made.operators_by_class:
        print(f"{kind:<18}{operator:<22}{tensors:>8}{human_bytes(size):>12}")
    print(f"\nreads   {human_bytes(made.read_bytes):>10}\nwrites  {human_bytes(made.write_bytes):>10}")
    print(f"units   {len(made.units):>10} (one output shard each)")
    projection = made.projection
    print(
        f"memory  {human_bytes(projection.total_bytes):>10} projected of "
        f"{human_bytes(projection.allowed_bytes)} allowed"
    )
    for name, size in projection.terms:
        print(f"        {human_bytes(size):>10} {name}")
    if made.dropped:
        print(f"dropped {len(made.dropped)} tensors by rule")
    for note in made.notes:
        print(f"note: {note}")
    for warning in made.warnings:
        print(f"warning: {warning}")


def merge(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", help="Directory of the merged checkpoint.")],
    executor: Annotated[ExecutorName, typer.Option("--executor", help="ray: RAY_ADDRESS, else on the spot.")] = (
        ExecutorName.LOCAL
    ),
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="With ray: units at work at once.")] = None,
    device: DeviceOption = Device.CPU,
    max_shard_size: ShardOption = None,
    compat: CompatOption = None,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Merge parents with NaN or Inf.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what another recipe left; removes only our files.")
    ] = (False),
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Hash the shards that an earlier run left before trusting them.")
    ] = False,
) -> None:
    """Merge checkpoints by a recipe. Run it again to resume; finished, it says so and reads nothing."""
    import time

    from remelt.merge import merge_recipe

    loaded = _load(recipe, compat, max_shard_size)
    if allow_nonfinite:
        loaded = replace(loaded, allow_nonfinite=True)
    chosen = _executor(executor, threads, _size("--memory", memory), device, workers)
    started = time.perf_counter()
    with TerminalProgress() as progress:
        merged = merge_recipe(loaded, output, executor=chosen, progress=progress, force=force, recheck=recheck)
    if merged.is_reused:
        what = "all of its files hashed" if recheck else "nothing was read"
        print(f"{output}: finished already, digest {merged.digest}; {what}")
        return
    seconds = time.perf_counter() - started
    print(
        f"{output}: {human_bytes(merged.num_bytes)} in {human_seconds(seconds)} ({seconds:.1f} s), "
        f"digest {merged.digest}"
    )
    if merged.num_nonfinite:
        print(f"warning: {merged.num_nonfinite} values of the output are NaN or Inf", file=sys.stderr)


def verify(
    output: Annotated[Path, typer.Argument(help="A merged checkpoint.")],
    threads: ThreadsOption = None,
    loading: Annotated[bool, typer.Option(help="Also ask transformers whether it loads, on the meta device.")] = True,
) -> None:
    """Check a merged checkpoint: every byte against its manifest, finite values, and that transformers loads it."""
    from remelt.verify import verify_merge

    result = verify_merge(output, threads=threads or 2)
    problems = list(result.problems)
    if loading and not problems:
        from remelt_evals.loading_check import check_loading

        problems += check_loading(output).problems
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        print(f"{output}: {len(problems)} problems", file=sys.stderr)
        raise typer.Exit(2)
    checked = "bytes, values and loading" if loading else "bytes and values"
    print(
        f"{output}: {result.num_tensors} tensors, {human_bytes(result.num_bytes)}; {checked} verified, "
        f"digest {result.digest}"
    )


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A path or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds, from its metadata alone."""
    from remelt.formats import open_checkpoint
    from remelt.inspection import inspect as look
    from remelt_jobs.tables import print_inspection

    found = look(open_checkpoint(checkpoint))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_inspection(found)


def diff(
    a: Annotated[str, typer.Argument(help="A path or Hub id.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    parquet: Annotated[Path | None, typer.Option("--parquet", help="Write the rows here as well.")] = None,
    tensors: Annotated[int, typer.Option("--tensors", min=0, help="Show so many tensors, most different first.")] = 20,
) -> None:
    """Compare two checkpoints: per class and per tensor, absolute, rms and relative distance, and cosine."""
    from remelt.diff import diff as compare
    from remelt.formats import open_checkpoint
    from remelt_jobs.tables import print_diff

    report = compare(open_checkpoint(a), open_checkpoint(b))
    print_diff(report, tensors)
    if parquet is not None:
        from remelt_evals.report_tables import write_diff

        write_diff(report.to_table(), parquet)
        print(f"wrote {parquet}")


def operators(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the merge operators with their options, defaults and intervals."""
    from remelt_jobs.tables import operator_markdown, operator_rows, print_operators

    if markdown:
        print(operator_markdown())
    elif as_json:
        print(json.dumps(operator_rows(), indent=1))
    else:
        print_operators()


def _load(path: Path, compat: Compat | None, max_shard_size: str | None) -> Recipe:
    from remelt.recipe_yaml import load_recipe

    loaded = load_recipe(path, compat=None if compat is None else compat.value)
    if max_shard_size is not None:
        loaded = replace(loaded, max_shard_bytes=_size("--max-shard-size", max_shard_size))
    return loaded


def _size(option: str, text: str | None) -> int | None:
    """Bytes of a size that the command line gives; above 0, since 0 would pass for "not given" further down."""
    if text is None:
        return None
    from remelt.strict_config import parse_size

    try:
        size = parse_size(text)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from error
    if size <= 0:
        raise RecipeError(f"{option}: {text!r} is no size to work with; give one above 0, such as 8GB")
    return size


def _executor(
    name: ExecutorName, threads: int | None, memory_bytes: int | None, device: Device, workers: int | None
) -> Executor:
    if name is ExecutorName.LOCAL:
        from remelt.executor import LocalExecutor

        return LocalExecutor(threads=threads, memory_bytes=memory_bytes, device=device.value)
    from remelt_jobs.ray_executor import RayExecutor

    return RayExecutor(num_workers=workers, threads=threads, memory_bytes=memory_bytes, device=device.value)
