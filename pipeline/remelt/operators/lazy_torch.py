"""`torch`, imported when something is first asked of it: 1.8 seconds that a plan or a local CPU merge never pays.

Operator modules write `from remelt.operators.lazy_torch import torch` and annotations as strings.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    """Stands for a module without entering `sys.modules`, so that nobody takes it for the imported one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect and doctest look for dunder names; they are no reason to import
            raise AttributeError(name)
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyModule("torch")

__all__ = ["torch"]
