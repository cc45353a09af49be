"""Any model type that lm-eval knows by name: vllm, sglang, local-completions for a server that speaks OpenAI's API.

What the type is given comes from the study or the command line; the checkpoint's folder goes in as `pretrained`, unless
an argument says `{checkpoint}` itself or names another model, as a server does. Whether log-likelihoods are comparable
between two types is not known: BOS and rounding differ; so the type and its arguments are in every evaluation id.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from remelt.errors import EvaluationError
from remelt_evals.backends import BackendOptions, LoadedModel

PLACEHOLDER = "{checkpoint}"
_NAMES_A_MODEL = ("pretrained", "model", "base_url")


def load(checkpoint: str, batch_size: int, options: BackendOptions) -> LoadedModel:
    """Make the model type's `LM` for a checkpoint folder.

    Raises:
        EvaluationError: lm-eval has no such type, or it cannot be made with these arguments.
    """
    import lm_eval.models  # noqa: F401 - registers lm-eval's own types
    from lm_eval.api.registry import get_model

    if options.model is None:
        raise EvaluationError("backend lm_eval needs the name of a model type: give `model`, such as vllm")
    try:
        model_class: Any = get_model(options.model)
    except (ValueError, KeyError, ImportError) as error:
        raise EvaluationError(
            f"lm-eval cannot provide model type {options.model!r} here: {' '.join(str(error).split())[:300]}; "
            "give another `model`, or the `interpreter` of an environment that has it"
        ) from error
    arguments = model_arguments(options.model_args, checkpoint)
    common = {"batch_size": batch_size, "device": options.device}
    common = {name: value for name, value in common.items() if name not in arguments}
    try:
        lm = model_class.create_from_arg_obj(arguments, common)
    except (TypeError, ValueError, OSError, RuntimeError, ImportError, AssertionError) as error:
        known = ", ".join(name for name in inspect.signature(model_class).parameters if name not in ("self", "kwargs"))
        raise EvaluationError(
            f"lm-eval's model type {options.model} cannot be made with {sorted(arguments)}: "
            f"{' '.join(str(error).split())[:300]}; it takes {known[:500]}"
        ) from error
    return LoadedModel(lm, f"{options.model} on {options.device}", str(arguments.get("dtype", options.dtype)), None)


def names_one_model(model_args: Mapping[str, Any]) -> bool:
    """Whether the arguments name a model of their own, so that every checkpoint would get its scores."""
    names = [name for name in _NAMES_A_MODEL if name in model_args]
    return bool(names) and not any(PLACEHOLDER in str(model_args[name]) for name in names)


def model_arguments(model_args: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The model type's arguments for one checkpoint."""
    arguments = {
        name: value.replace(PLACEHOLDER, checkpoint) if isinstance(value, str) else value
        for name, value in model_args.items()
    }
    if not any(name in model_args for name in _NAMES_A_MODEL):
        arguments["pretrained"] = checkpoint
    return arguments
