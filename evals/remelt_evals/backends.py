"""What runs the model: an explicit table of backends, and the options that they share.

A backend makes of a checkpoint folder an lm-eval `LM`. It is named in a run's options, never found by import.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from remelt.errors import EvaluationError


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """Which backend, and how it runs."""

    name: str = "hf"
    device: str = "cpu"
    """As torch names it."""
    dtype: str = "auto"
    """`auto` computes in the dtype that the checkpoint's config declares; else `float32`, `bfloat16` or `float16`."""
    threads: int | None = None
    """CPU threads of torch; None leaves its default. No part of the evaluation id."""
    trust_remote_code: bool = False
    model: str | None = None
    """For the backend `lm_eval`: its name of a model type, such as `vllm` or `local-completions`."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """For the backend `lm_eval`: what the model type is given; `{checkpoint}` in a text stands for the folder."""
    interpreter: str | None = None
    """Python of the environment that evaluates, with remelt installed in it; None is this one. Its versions count."""


class LoadedModel(NamedTuple):
    """A model ready to answer lm-eval's requests."""

    lm: Any
    """An `lm_eval.api.model.LM`."""
    device: str
    """What it runs on, as a reader of the report would name it."""
    dtype: str
    problem: str | None
    """Why no score of it would mean anything (logits that are not finite), or None."""


class Backend(NamedTuple):
    """An entry of the table."""

    load: Callable[[str, str, int, BackendOptions], LoadedModel]
    """(checkpoint folder, digest, batch size, options) -> model. Raises EvaluationError where it cannot be loaded."""
    distributions: tuple[str, ...]
    """Distributions whose versions can change a score."""
    needs_checkpoint: bool = True


def _load_hf(checkpoint: str, digest: str, batch_size: int, options: BackendOptions) -> LoadedModel:
    from remelt_evals.hf_backend import load

    return load(checkpoint, batch_size, options)


def _load_dummy(checkpoint: str, digest: str, batch_size: int, options: BackendOptions) -> LoadedModel:
    from remelt_evals.dummy_backend import load

    return load(digest)


def _load_lm_eval(checkpoint: str, digest: str, batch_size: int, options: BackendOptions) -> LoadedModel:
    from remelt_evals.lm_eval_backend import load

    return load(checkpoint, batch_size, options)


BACKENDS: Mapping[str, Backend] = {
    "hf": Backend(_load_hf, ("lm-eval", "transformers", "torch", "datasets", "tokenizers")),
    "dummy": Backend(_load_dummy, ("lm-eval", "datasets"), needs_checkpoint=False),
    "lm_eval": Backend(_load_lm_eval, ("lm-eval", "datasets", "transformers", "torch", "vllm")),
}


def find_backend(options: BackendOptions) -> Backend:
    """The backend that the options name.

    Raises:
        EvaluationError: there is none of this name.
    """
    if options.name not in BACKENDS:
        raise EvaluationError(f"no eval backend is called {options.name!r}: there are {', '.join(BACKENDS)}")
    return BACKENDS[options.name]


def backend_identity(options: BackendOptions) -> dict[str, Any]:
    """What of the backend enters the evaluation id: what decides the numbers, and the versions of what computes them.

    Threads and the number of a device are left out: they say where it runs, and move a log-likelihood by rounding at
    most, as another machine of the same kind would.
    """
    identity = {
        "name": options.name,
        "device": options.device.partition(":")[0],
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "versions": {name: version for name in find_backend(options).distributions if (version := _version(name))},
    }
    if options.model is not None:
        identity |= {"model": options.model, "model_args": dict(options.model_args)}
    return identity


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
