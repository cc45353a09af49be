"""Digests: what they depend on and what not."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.fingerprints import TensorDigest, checkpoint_digest, tensor_digest


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 600), max_size=5))
def test_tensor_digest_does_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    array = np.arange(300, dtype="<u2").reshape(20, 15)
    digest = TensorDigest("BF16", array.shape)
    places = [0, *sorted(cuts), 600]
    for start, stop in pairwise(places):
        digest.update(memoryview(array.tobytes())[start:stop])
    assert digest.hexdigest() == tensor_digest("BF16", array)


def test_tensor_digest_is_xxh3_over_dtype_shape_and_bytes() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    assert tensor_digest("F32", array) == xxhash.xxh3_128_hexdigest(b"F32 [2,3]\n" + array.tobytes())
    assert len({tensor_digest("F32", array), tensor_digest("F32", array.T), tensor_digest("I32", array)}) == 3
    assert tensor_digest("F32", array.reshape(6)) != tensor_digest("F32", array)
    assert tensor_digest("F32", np.array(1, "<f4")) != tensor_digest("F32", np.array([1], "<f4"))
    assert tensor_digest("F32", np.zeros((0, 4), "<f4")) != tensor_digest("F32", np.zeros((4, 0), "<f4"))


def test_checkpoint_digest_ignores_order_and_sees_every_field() -> None:
    tensors = {"a": ("F32", (2, 3), "00"), "b": ("BF16", (), "11")}
    same = checkpoint_digest(dict(reversed(tensors.items())))
    assert checkpoint_digest(tensors) == same
    assert same == hashlib.sha256(b"a F32 [2,3] 00\nb BF16 [] 11\n").hexdigest()
    for change in [("F16", (2, 3), "00"), ("F32", (3, 2), "00"), ("F32", (2, 3), "01")]:
        assert checkpoint_digest(tensors | {"a": change}) != same
    assert checkpoint_digest({"c": tensors["a"], "b": tensors["b"]}) != same
