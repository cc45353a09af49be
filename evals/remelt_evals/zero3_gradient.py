"""Loss and gradient over several ranks with DeepSpeed's ZeRO-3, for a model that one device cannot hold.

Weights and gradients are spread over the ranks, a layer is gathered only while it computes. Rank 0 gathers gradients
layer by layer and writes them. Started by torchrun:

    python -m torch.distributed.run --nproc-per-node 2 -m remelt_evals.zero3_gradient REQUEST.json

On CPUs (`DS_ACCELERATOR=cpu`, gloo) it is slow, and shows that the numbers are those of one process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remelt.errors import EvaluationError, RemeltError
from remelt.formats import open_checkpoint
from remelt_evals.calibration import Blocks
from remelt_evals.loss_gradient import (
    LossOptions,
    LossReport,
    block_losses,
    load_model,
    make_report,
    refuse_not_finite,
    write_gradient,
)

if TYPE_CHECKING:
    import torch

_TAIL_LINES = 12


def measure_on_ranks(
    checkpoint: Path,
    blocks: Blocks,
    options: LossOptions,
    *,
    gradient: Path | None = None,
    held_out: Blocks | None = None,
) -> LossReport:
    """As `loss_gradient.measure`, in `options.ranks` processes of this machine, one for each device.

    Raises:
        EvaluationError: a rank failed; with its message, or the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="remelt-gradient-") as scratch:
        folder = Path(scratch)
        _write_blocks(folder / "blocks.npz", blocks)
        if held_out is not None:
            _write_blocks(folder / "held_out.npz", held_out)
        request = {
            "checkpoint": str(checkpoint.absolute()),
            "gradient": None if gradient is None else str(gradient.absolute()),
            "options": asdict(options),
        }
        (folder / "request.json").write_text(json.dumps(request))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command = [sys.executable, *launch, "-m", "remelt_evals.zero3_gradient", str(folder / "request.json")]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", str(options.threads or 1))
        if options.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        result = folder / "result.json"
        if not result.exists():
            refusal = folder / "refusal.txt"
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-_TAIL_LINES:])
            reason = refusal.read_text() if refusal.exists() else f"status {done.returncode}: {tail}"
            raise EvaluationError(f"the gradient of {checkpoint} on {options.ranks} ranks failed: {reason}")
        found = json.loads(result.read_text())
    return LossReport(**found | {"without_gradient": tuple(found["without_gradient"])})


def _write_blocks(path: Path, blocks: Blocks) -> None:
    tokens, counted, source, names, weights = blocks
    np.savez(path, tokens=tokens, counted=counted, source=source, names=names, weights=weights)


def _read_blocks(path: Path) -> Blocks:
    with np.load(path, allow_pickle=False) as found:
        names, weights = tuple(map(str, found["names"])), tuple(map(float, found["weights"]))
        return Blocks(found["tokens"], found["counted"], found["source"], names, weights)


def _work(folder: Path) -> None:
    """What every rank does."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    request = json.loads((folder / "request.json").read_text())
    options = LossOptions(**request["options"])
    if options.device == "cpu":
        # DeepSpeed would compile a C++ extension for shared memory while all ranks wait (minutes, and for ever after a
        # compilation that was killed); gloo does without. What it can compile is asked of this table.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False)
    rank, num_ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    blocks, held_path = _read_blocks(folder / "blocks.npz"), folder / "held_out.npz"
    num_rounds = _num_rounds(blocks, options, num_ranks)
    config = _config(options, num_rounds)
    # As long as this lives, transformers loads each weight into its rank's part of it.
    keep = HfDeepSpeedConfig(config)
    model = load_model(Path(request["checkpoint"]), options)
    engine = _engine(model, config)
    held_out = _read_blocks(held_path) if held_path.exists() else None
    held_losses = None if held_out is None else _losses(engine, held_out, options, rank, num_ranks)
    without: tuple[str, ...] = ()
    if request["gradient"] is None:
        losses = _losses(engine, blocks, options, rank, num_ranks)
    else:
        losses = _backward(engine, blocks, options, rank, num_ranks)
        refuse_not_finite(Path(request["checkpoint"]), losses)
        index = open_checkpoint(request["checkpoint"])
        without = write_gradient(
            model, lambda names: _gather(model, names, rank), index, Path(request["gradient"]), is_writer=rank == 0
        )
    del keep
    if rank == 0:
        report = make_report(blocks, losses, held_out, held_losses, without)
        (folder / "result.json").write_text(json.dumps(asdict(report)))
    deepspeed.comm.barrier()


def _num_rounds(blocks: Blocks, options: LossOptions, num_ranks: int) -> int:
    return math.ceil(len(blocks.tokens_NL) / (options.batch_size * num_ranks))


def _config(options: LossOptions, num_rounds: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": num_rounds,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": options.dtype == "bfloat16"},
        # Sums of gradients over batches, whatever the model computes in.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }


def _engine(model: Any, config: dict[str, Any]) -> Any:
    import deepspeed
    import torch

    # It never steps; ZeRO-3 keeps gradients only for an optimizer.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.eval()
    return engine


def _rounds(blocks: Blocks, options: LossOptions, rank: int, num_ranks: int) -> list[tuple[int, int]]:
    """[first, last) of this rank's blocks, round by round.

    Every rank has as many rounds, since layers are gathered together; it may have no blocks in the last one.
    """
    size, total = options.batch_size, len(blocks.tokens_NL)
    firsts = range(
        rank * size, rank * size + _num_rounds(blocks, options, num_ranks) * size * num_ranks, size * num_ranks
    )
    return [(min(first, total), min(first + size, total)) for first in firsts]


def _losses(engine: Any, blocks: Blocks, options: LossOptions, rank: int, num_ranks: int) -> list[float]:
    import torch

    found = torch.zeros(len(blocks.tokens_NL), dtype=torch.float64)
    with torch.no_grad():
        for first, last in _rounds(blocks, options, rank, num_ranks):
            has_blocks = last > first
            losses = block_losses(engine, blocks, *((first, last) if has_blocks else (0, 1)))
            if has_blocks:
                found[first:last] = losses.double().cpu()
    return _sum_over_ranks(engine, found)


def _backward(engine: Any, blocks: Blocks, options: LossOptions, rank: int, num_ranks: int) -> list[float]:
    """Losses of all blocks; afterwards each rank holds its part of the gradient."""
    import torch

    found = torch.zeros(len(blocks.tokens_NL), dtype=torch.float64)
    shares = torch.from_numpy(blocks.shares).float()
    rounds = _rounds(blocks, options, rank, num_ranks)
    # DeepSpeed takes the mean over ranks and rounds; the loss is a sum over blocks with their shares.
    scale = num_ranks * len(rounds)
    for number, (first, last) in enumerate(rounds):
        has_blocks = last > first
        losses = block_losses(engine, blocks, *((first, last) if has_blocks else (0, 1)))
        weights = shares[first:last] if has_blocks else torch.zeros(1)
        engine.backward((losses * weights.to(engine.device)).sum() * scale)
        if has_blocks:
            found[first:last] = losses.detach().double().cpu()
        if number + 1 < len(rounds):
            # Between two rounds this only counts; after the last one it would step and clear the gradient.
            engine.step()
    return _sum_over_ranks(engine, found)


def _sum_over_ranks(engine: Any, values: torch.Tensor) -> list[float]:
    import deepspeed

    values = values.to(engine.device)
    deepspeed.comm.all_reduce(values)
    return [float(value) for value in values.cpu()]


def _gather(model: Any, names: Sequence[str], rank: int) -> dict[str, torch.Tensor]:
    """Whole gradients on rank 0; every rank takes part in gathering each of them."""
    from deepspeed.utils import safe_get_full_grad

    parameters = dict(model.named_parameters())
    found = {}
    for name in names:
        gradient = safe_get_full_grad(parameters[name])
        if rank == 0 and gradient is not None:
            found[name] = gradient.float().cpu()
    return found


def main() -> None:
    """Entry point of each rank."""
    folder = Path(sys.argv[1]).parent
    try:
        _work(folder)
    except RemeltError as refusal:
        (folder / "refusal.txt").write_text(str(refusal))
        raise


if __name__ == "__main__":
    main()
