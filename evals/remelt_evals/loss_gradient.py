"""The loss of a checkpoint on calibration blocks, and the gradient of that loss as a checkpoint of its own.

The gradient is summed in float32 whatever the model computes in, and is written under the names of the checkpoint that
it was taken at, so that everything that reads checkpoints reads it. transformers holds some tensors in another form
than the file (the experts of a mixture are one tensor); its own conversion mapping is asked to turn gradients back.
That is right for conversions that only rearrange elements, which is checked: they keep the gradient's norm.

One process by default; `ranks` spreads the model over several with DeepSpeed's ZeRO-3 (`remelt_evals.zero3_gradient`).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remelt.checkpoint import CheckpointIndex
from remelt.errors import EvaluationError
from remelt.formats import open_checkpoint
from remelt.sinks import sync_directory
from remelt.tensor_classes import classify
from remelt_evals.calibration import Blocks
from remelt_evals.loading_check import loading_problems

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 512_000_000
"""A shard of the gradient is written once it holds so much: what one process gathers beside its model."""
NORM_TOLERANCE = 1e-6
"""By how much, relatively, a conversion may change the squared norm of a gradient that it only rearranges."""

Gather = Callable[[Sequence[str]], "dict[str, torch.Tensor]"]
"""Gradients of the parameters with these names, whole, in float32 on the CPU; empty on a rank that does not write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """How losses and gradients are computed."""

    device: str = "cpu"
    dtype: str = "float32"
    """Of the model's weights and activations; sums of gradients are float32 in any case."""
    batch_size: int = 8
    """Blocks that go through the model at once."""
    threads: int | None = None
    ranks: int = 0
    """0 is this process alone; else processes under torchrun, over which ZeRO-3 spreads weights and gradients."""
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """A loss in nats for each token."""

    loss: float
    """Weighted mean over sources; NaN or infinity where the model's logits are."""
    by_source: Mapping[str, float]
    held_out: float | None = None
    held_out_by_source: Mapping[str, float] | None = None
    without_gradient: tuple[str, ...] = ()
    """Floating tensors of the checkpoint that the loss does not depend on as transformers computes it: a tied head,
    buffers, tensors that the model class ignores."""


def measure(
    checkpoint: Path,
    blocks: Blocks,
    options: LossOptions,
    *,
    gradient: Path | None = None,
    held_out: Blocks | None = None,
) -> LossReport:
    """Load a checkpoint, take its loss and, where `gradient` names a folder, write the gradient there.

    Args:
        gradient: a new folder, or one with an earlier gradient, which is replaced.
        held_out: blocks for a second loss, without a gradient.

    Raises:
        EvaluationError: the checkpoint cannot be loaded completely, a loss with a gradient is not finite, or the
            model's tensors cannot be turned back into the checkpoint's.
    """
    if gradient is not None:
        _clear(gradient)
    if options.ranks:
        from remelt_evals.zero3_gradient import measure_on_ranks

        return measure_on_ranks(checkpoint, blocks, options, gradient=gradient, held_out=held_out)
    model = load_model(checkpoint, options)
    model.to(options.device)
    held_losses = None if held_out is None else _losses(model, held_out, options.batch_size)
    if gradient is None:
        return make_report(blocks, _losses(model, blocks, options.batch_size), held_out, held_losses)
    losses, sums = _losses_and_gradient(model, blocks, options.batch_size)
    refuse_not_finite(checkpoint, losses)

    def gather(names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: sums.pop(name).cpu() for name in names if name in sums}

    without = write_gradient(model, gather, open_checkpoint(str(checkpoint)), gradient)
    return make_report(blocks, losses, held_out, held_losses, without)


def load_model(checkpoint: Path, options: LossOptions) -> Any:
    """The model in evaluation mode, on the CPU (on its rank's device under ZeRO-3); nothing is fetched."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EvaluationError(f"dtype {options.dtype!r} is no floating dtype of torch; give float32 or bfloat16")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise EvaluationError(f"device {options.device} was asked for, but torch sees no GPU here; use cpu")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(checkpoint),
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EvaluationError(f"cannot load {checkpoint}: {' '.join(str(error).split())[:500]}") from error
    if problems := loading_problems(info):
        raise EvaluationError(f"{checkpoint} does not load completely, so it has no loss: {'; '.join(problems)}")
    return model.eval()


def load_tokenizer(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a checkpoint."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EvaluationError(f"no tokenizer in {checkpoint}: {' '.join(str(error).split())[:300]}") from error
    # Whole documents are tokenised before they are cut; a warning about their length would mislead.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def block_losses(model: Any, blocks: Blocks, first: int, last: int) -> torch.Tensor:
    """Mean negative log-likelihood of what counts in blocks [first, last), from float32 logits; 0 where nothing does.

    `model` may be DeepSpeed's engine around one.
    """
    import torch

    tokens_NL = torch.from_numpy(blocks.tokens_NL[first:last]).to(model.device)
    counted_NL = torch.from_numpy(blocks.counted_NL[first:last, 1:]).to(model.device)
    logits = model(input_ids=tokens_NL, use_cache=False).logits[:, :-1].float()
    losses_NL = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens_NL[:, 1:].long(), reduction="none")
    return (losses_NL * counted_NL).sum(dim=1) / counted_NL.sum(dim=1).clamp(min=1)


def batches(blocks: Blocks, batch_size: int) -> Iterator[tuple[int, int]]:
    """[first, last) of the blocks that go through the model together."""
    for first in range(0, len(blocks.tokens_NL), batch_size):
        yield first, min(first + batch_size, len(blocks.tokens_NL))


def _losses(model: Any, blocks: Blocks, batch_size: int) -> list[float]:
    import torch

    found: list[float] = []
    with torch.inference_mode():
        for first, last in batches(blocks, batch_size):
            found += block_losses(model, blocks, first, last).tolist()
    return found


def _losses_and_gradient(model: Any, blocks: Blocks, batch_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the blocks, and for each parameter the float32 sum over batches of its gradient."""
    import torch

    sums: dict[str, torch.Tensor] = {}

    def keep(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        found, parameter.grad = parameter.grad.float(), None
        if name in sums:
            sums[name] += found
        else:
            sums[name] = found

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda each, name=name: keep(name, each))
        for name, parameter in model.named_parameters()
    ]
    shares = torch.from_numpy(blocks.shares).float()
    losses: list[float] = []
    try:
        for first, last in batches(blocks, batch_size):
            found = block_losses(model, blocks, first, last)
            weighted: Any = found * shares[first:last].to(model.device)
            weighted.sum().backward()
            losses += found.detach().tolist()
    finally:
        for handle in handles:
            handle.remove()
    return losses, sums


def make_report(
    blocks: Blocks,
    losses: Sequence[float],
    held_out: Blocks | None = None,
    held_losses: Sequence[float] | None = None,
    without_gradient: Sequence[str] = (),
) -> LossReport:
    """Losses of blocks as a report."""
    loss, by_source = _weigh(blocks, losses)
    held, held_by_source = (None, None) if held_out is None else _weigh(held_out, held_losses or ())
    return LossReport(
        loss=loss,
        by_source=by_source,
        held_out=held,
        held_out_by_source=held_by_source,
        without_gradient=tuple(without_gradient),
    )


def _weigh(blocks: Blocks, losses: Sequence[float]) -> tuple[float, dict[str, float]]:
    counts_N = blocks.counted_NL.sum(axis=1)
    by_source = {}
    for number, name in enumerate(blocks.names):
        own = np.flatnonzero(blocks.source_N == number)
        by_source[name] = math.fsum(np.array(losses)[own] * counts_N[own]) / float(counts_N[own].sum())
    weighted = [weight * by_source[name] for name, weight in zip(blocks.names, blocks.weights, strict=True)]
    return math.fsum(weighted), by_source


def refuse_not_finite(checkpoint: Path, losses: Sequence[float]) -> None:
    """Raise EvaluationError where a loss is no number: its gradient says nothing."""
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise EvaluationError(
            f"{checkpoint}: the loss of {len(bad)} of {len(losses)} calibration blocks is NaN or infinite, so there is "
            "no gradient to follow; begin at another start, or look for a broken checkpoint in the pool"
        )


# From parameters to a checkpoint


def write_gradient(
    model: Any, gather: Gather, index: CheckpointIndex, output: Path, *, is_writer: bool = True
) -> tuple[str, ...]:
    """Write gradients under the checkpoint's names, layer by layer, the index last.

    Args:
        gather: called with each layer's parameters in turn, on every rank alike.
        index: of the checkpoint that the model was loaded from.
        is_writer: False on ranks that only help to gather.

    Returns:
        Floating tensors of the checkpoint that have no gradient.
    """
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        from safetensors.torch import save_file

        if shard:
            name = f"gradient-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, output / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

    for names in _layers(model):
        gathered = gather(names)
        if not is_writer:
            continue
        shard.update(_as_stored(model, gathered, index))
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    if not is_writer:
        return ()
    flush()
    config = Path(index.root) / "config.json"
    if config.exists():
        shutil.copyfile(config, output / "config.json")
    (output / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sync_directory(output)
    return tuple(name for name, info in index.tensors.items() if info.is_mergeable and name not in weight_map)


def _layers(model: Any) -> list[list[str]]:
    """Names of parameters in groups of one layer: conversions work inside a layer, so a group can be turned back."""
    groups: dict[int | None, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(classify(name).layer, []).append(name)
    return list(groups.values())


def _as_stored(model: Any, gradients: dict[str, torch.Tensor], index: CheckpointIndex) -> dict[str, torch.Tensor]:
    """Gradients of parameters as gradients of the checkpoint's tensors."""
    if not gradients:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    known = {name: info.shape for name, info in index.tensors.items()}
    if all(known.get(name) == tuple(tensor.shape) for name, tensor in gradients.items()):
        return {name: tensor.contiguous() for name, tensor in gradients.items()}
    try:
        stored = revert_weight_conversion(model, gradients)
    except (ValueError, RuntimeError, KeyError, IndexError, NotImplementedError) as error:
        raise _not_convertible(model, index, " ".join(str(error).split())[:300]) from error
    for name, tensor in stored.items():
        if known.get(name) != tuple(tensor.shape):
            found = "has none of that name" if name not in known else f"has it as {list(known[name])}"
            raise _not_convertible(model, index, f"it gives {name} of {list(tensor.shape)}, and the checkpoint {found}")
    before, after = _squared_norm(gradients), _squared_norm(stored)
    if abs(before - after) > NORM_TOLERANCE * before:
        raise _not_convertible(
            model, index, f"it does more than rearrange elements: squared norms are {before:.6g} and {after:.6g}"
        )
    return {name: tensor.contiguous().clone() for name, tensor in stored.items()}


def _squared_norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.fsum(float(tensor.double().square().sum()) for tensor in tensors.values())


def _not_convertible(model: Any, index: CheckpointIndex, reason: str) -> EvaluationError:
    return EvaluationError(
        f"the gradient of {type(model).__name__} cannot be written under the names of {index.source}: transformers' "
        f"conversion mapping does not lead back ({reason}); select with a checkpoint that is stored as transformers "
        "saves it"
    )


def _clear(folder: Path) -> None:
    """Make room for a gradient: removes an earlier one, and refuses a folder with anything else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if not (path.name in (INDEX_FILE, "config.json") or path.match("gradient-*.safetensors")):
            raise EvaluationError(f"{folder} holds {path.name}, which is no part of a gradient; give an empty folder")
        with suppress(FileNotFoundError):
            path.unlink()
