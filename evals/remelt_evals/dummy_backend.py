"""A model without weights: every answer is a hash of the digest and the request.

Loads in no time and needs neither torch nor a checkpoint, so schedules, journals and reports can be tested with the
real lm-eval. Two digests get different scores: a cache that forgets to key by model shows at once.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from remelt_evals.backends import LoadedModel


@functools.cache
def _dummy_class() -> type[Any]:
    from lm_eval.api.model import LM

    class DigestLM(LM):  # type: ignore[misc]
        """Answers lm-eval's three kinds of request."""

        def __init__(self, digest: str) -> None:
            super().__init__()
            self.digest = digest

        def _draw(self, *parts: str) -> float:
            """A number in [0, 1) from the digest and the request."""
            data = "\x00".join((self.digest, *parts)).encode()
            return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2.0**48

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-0.5 - 20 * self._draw(*request.args), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            # Between 0.5 and 1.5 nats a byte.
            return [-len(text.encode()) * (0.5 + self._draw(text)) for request in requests for text in request.args[:1]]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [f"{self._draw(request.args[0]):.6f}" for request in requests]

    return DigestLM


def load(digest: str) -> LoadedModel:
    """The dummy for one digest."""
    return LoadedModel(_dummy_class()(digest), "cpu", "none", None)
