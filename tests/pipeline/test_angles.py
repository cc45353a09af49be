"""Sine and arc cosine of our own: right to a few units in the last place, from exactly rounded operations alone."""

from __future__ import annotations

import ast
import inspect
import math

import numpy as np

from remelt.operators import angles
from remelt.operators.angles import arc_cosine, sine


def test_sine_and_arc_cosine_are_right_to_a_few_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-4 * math.pi, 4 * math.pi, 40_001), np.logspace(-12, 0, 1000)])
    expected = np.array([math.sin(value) for value in x])
    assert (np.abs(sine(x) - expected) <= 2e-15).all()
    d = np.concatenate([np.linspace(-1, 1, 20_001), 1 - np.logspace(-15, 0, 1000)])
    expected = np.array([math.acos(value) for value in d])
    assert (np.abs(arc_cosine(d) - expected) <= 1e-15 * np.maximum(expected, 0.3)).all()


def test_only_exactly_rounded_functions_are_called() -> None:
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(inspect.getsource(angles)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called <= {"asarray", "where", "zeros_like", "sqrt", "abs", "append", "float64", "rint", "floor"}
