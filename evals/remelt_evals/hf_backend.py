"""The Hugging Face backend: a checkpoint folder, loaded by transformers, behind lm-eval's HFLM."""

from __future__ import annotations

import os
from typing import Any

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions, LoadedModel
from remelt_evals.loading_check import loading_problems

_PROBE_TEXT = "The sum of 1 and 2 is 3."


def load(checkpoint: str, batch_size: int, options: BackendOptions) -> LoadedModel:
    """Load model and tokenizer from a folder, and make them ready for lm-eval; raises as `load_model`."""
    return wrap(*load_model(checkpoint, options), batch_size)


def wrap(model: Any, tokenizer: Any, batch_size: int) -> LoadedModel:
    """A loaded model behind lm-eval's HFLM, with what is wrong with it."""
    import torch

    lm = _wrap(model, tokenizer, batch_size)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return LoadedModel(lm, device, str(model.dtype).removeprefix("torch."), _find_problem(lm))


def load_model(checkpoint: str, options: BackendOptions) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder; the model on the options' device, in evaluation mode.

    Nothing is fetched and no code of the folder runs unless `options.trust_remote_code`. A checkpoint that leaves
    parameters at their random initial values is refused: it would get a score.

    Raises:
        EvaluationError: the folder cannot be loaded, or not completely.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _make_deterministic(options)
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype is None:
        raise EvaluationError(f"dtype {options.dtype!r} is no dtype of torch; give auto, float32, bfloat16 or float16")
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True, **common)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **common)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EvaluationError(f"cannot load {checkpoint}: {' '.join(str(error).split())[:500]}") from error
    problems = loading_problems(info)
    if problems:
        raise EvaluationError(
            f"{checkpoint} does not load completely, so its scores mean nothing: {'; '.join(problems)}"
        )
    if options.device != "cpu" and not torch.cuda.is_available():
        raise EvaluationError(f"device {options.device} was asked for, but torch sees no GPU here; use cpu")
    return model.to(options.device).eval(), tokenizer


def _make_deterministic(options: BackendOptions) -> None:
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device != "cpu":
        # cuBLAS gives the same sums again only with a fixed workspace; read when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _wrap(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _find_problem(lm: Any) -> str | None:
    """A sentence where the model's logits are no numbers.

    argmax over NaN is the first choice, so that a broken model would score like a constant answer. One short text
    finds what is wrong with a merge as a whole; NaN that needs other inputs is found in the item log-likelihoods.
    """
    import torch

    tokens = lm.tok_encode(_PROBE_TEXT)[: lm.max_length] or [lm.prefix_token_id]
    with torch.inference_mode():
        logits = lm.model(torch.tensor([tokens], device=lm.device)).logits.float()
        is_number = bool(torch.log_softmax(logits, dim=-1).isnan().logical_not().all())
    return None if is_number else f"the model's logits for {_PROBE_TEXT!r} are not numbers (NaN or Inf in its weights?)"
