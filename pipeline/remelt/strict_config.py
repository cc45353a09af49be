"""Strict reading of YAML configuration: recipes, suites, studies.

A document is read through `Section`s, one for each mapping in it. A section knows its file and its path in it, so that
every refusal names both; an unknown key names the nearest valid one. Units are converted here, once, at the edge.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from remelt.errors import RecipeError, RemeltError

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 1_000_000
MAX_EXPANDED_NODES = 200_000
"""Nodes of a document with its aliases written out: a few lines of nested aliases can stand for billions."""

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*")

# YAML 1.1 reads `1e-3` as text, since its floats need a dot; YAML 1.2 and every user read it as a number.
_FLOAT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+")


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word closest to `word`, or None where none is close."""
    candidates = list(valid)
    lowered = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def suggestion(word: str, valid: Collection[str]) -> str:
    """The end of a refusal: the nearest valid word where there is one, and all of them where they are few."""
    near = nearest(word, valid)
    listed = ", ".join(sorted(valid))
    return f"did you mean {near!r}? Valid: {listed}" if near else f"valid: {listed}"


def parse_size(value: object) -> int:
    """Bytes of a size such as `5000000`, "40GB" (10^9) or "8GiB" (2^30).

    Raises:
        ValueError: with the whole sentence, where it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (found := _SIZE.fullmatch(value)):
        unit = found[2].upper()
        if unit in _UNITS:
            return int(float(found[1]) * _UNITS[unit]) if "." in found[1] else int(found[1]) * _UNITS[unit]
    raise ValueError(f"{value!r} is no size; write bytes, or a number with a unit such as 40GB (10^9) or 8GiB (2^30)")


class Section:
    """One mapping of a document, read strictly.

    `where` names the document (its file), `path` the mapping's place in it, such as `models[1].parameters`.
    Every method raises the section's error class with both.
    """

    def __init__(self, value: object, where: str, path: str = "", *, error: type[RemeltError] = RecipeError) -> None:
        self.where = where
        self.path = path
        self.error = error
        if not isinstance(value, Mapping):
            self.refuse(f"expected a mapping of keys to values, found {kind_of(value)}")
        for key in value:
            if not isinstance(key, str):
                self.refuse(f"expected text as a key, found {key!r}")
        self.values: Mapping[str, Any] = value

    def at(self, key: str | int | None = None) -> str:
        """The path of a key of this section (of an item, for a number)."""
        if key is None:
            return self.path
        if isinstance(key, int):
            return f"{self.path}[{key}]"
        return f"{self.path}.{key}" if self.path else key

    def refuse(self, message: str, key: str | None = None) -> NoReturn:
        """Raise the section's error: file, path, message."""
        path = self.at(key)
        raise self.error(f"{self.where}: {path}: {message}" if path else f"{self.where}: {message}")

    def allow(self, keys: Collection[str]) -> None:
        """Refuse every key that is not among `keys`, with the nearest that is."""
        for key in self.values:
            if key not in keys:
                self.refuse(f"unknown key {key!r}; {suggestion(key, keys)}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; an empty value (YAML's null) counts as absent."""
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """Text, not empty; required without a default."""
        if not self.has(key):
            return self._default(key, default)
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            self.refuse(f"expected text, found {kind_of(value)}; put it in quotes if it is meant as text", key)
        return value.strip()

    def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """One of `choices`."""
        value = self.text(key, default)
        if value not in choices:
            self.refuse(f"unknown value {value!r}; {suggestion(value, choices)}", key)
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        if not self.has(key):
            return self._default(key, default)
        value = self.values[key]
        if not isinstance(value, bool):
            self.refuse(f"expected true or false, found {kind_of(value)}", key)
        return value

    def integer(self, key: str, default: int | None = None, *, low: int | None = None, high: int | None = None) -> int:
        """A whole number in [low, high]."""
        if not self.has(key):
            return self._default(key, default)
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(f"expected a whole number, found {kind_of(value)}", key)
        self._check_range(key, value, low, high)
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float | None = None, high: float | None = None
    ) -> float:
        """A finite number in [low, high]."""
        if not self.has(key):
            return self._default(key, default)
        value = self.values[key]
        if not is_number(value):
            self.refuse(f"expected a finite number, found {kind_of(value)}", key)
        self._check_range(key, value, low, high)
        return float(value)

    def size_bytes(self, key: str, default: int | None = None) -> int:
        """A size as `parse_size` reads it, in bytes."""
        if not self.has(key):
            return self._default(key, default)
        try:
            return parse_size(self.values[key])
        except ValueError as problem:
            self.refuse(str(problem), key)

    def section(self, key: str) -> Section:
        """The mapping under a key; an empty one where the key is absent."""
        return Section(self.values[key] if self.has(key) else {}, self.where, self.at(key), error=self.error)

    def items(self, key: str) -> Sequence[Any]:
        """The list under a key; an empty one where the key is absent."""
        value = self.values[key] if self.has(key) else []
        if not isinstance(value, list | tuple):
            self.refuse(f"expected a list, found {kind_of(value)}", key)
        return value

    def sections(self, key: str) -> list[Section]:
        """The list of mappings under a key."""
        return [
            Section(item, self.where, f"{self.at(key)}[{place}]", error=self.error)
            for place, item in enumerate(self.items(key))
        ]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of text; one text stands for a list of one."""
        if isinstance(self.values.get(key), str):
            return (self.text(key),)
        for place, item in enumerate(self.items(key)):
            if not isinstance(item, str):
                self.refuse(f"expected text, found {kind_of(item)}", f"{key}[{place}]")
        return tuple(self.items(key))

    def _default(self, key: str, default: T | None) -> T:
        if default is None:
            self.refuse(f"the key {key!r} is missing")
        return default

    def _check_range(self, key: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            left = "(-inf" if low is None else f"[{low:g}"
            right = "inf)" if high is None else f"{high:g}]"
            self.refuse(f"{value!r} is outside {left}, {right}", key)


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def kind_of(value: object) -> str:
    """A value as a refusal shows it: its kind, and itself where that is short."""
    if value is None:
        return "nothing"
    kinds = {bool: "the truth value", str: "the text", int: "the number", float: "the number"}
    if type(value) in kinds:
        return f"{kinds[type(value)]} {value!r:.80}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}"[:120] if value else "an empty mapping"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def load_yaml(path: Path, *, error: type[RemeltError] = RecipeError) -> Any:
    """The document in a YAML file of at most 1 MB, as plain values.

    Raises:
        error: where the file cannot be read, is too large, is no YAML, or has a key twice in one mapping.
    """
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise error(f"{path}: {size:,} bytes; a document of at most {MAX_DOCUMENT_BYTES:,} is read")
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is no UTF-8 text ({problem.reason} at byte {problem.start})") from problem
    return parse_yaml(text, where=str(path), error=error)


def parse_yaml(text: str, *, where: str, error: type[RemeltError] = RecipeError) -> Any:
    """The document in a YAML text. `where` names it in refusals."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe loading with numbers as YAML 1.2 has them."""

    _add_float(Loader)
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise error(f"{where}: is empty")
        _check_node(node, where, error)
        return loader.construct_document(node)
    except yaml.YAMLError as problem:
        raise error(f"{where}: is no valid YAML: {' '.join(str(problem).split())}") from problem
    except (RecursionError, ValueError) as problem:  # ValueError: dates and numbers that cannot exist
        raise error(f"{where}: is no valid YAML: {problem}") from problem
    finally:
        loader.dispose()


def dump_yaml(document: Mapping[str, Any]) -> str:
    """A document as YAML that `parse_yaml` reads back to the same values; keys stay in their order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Safe dumping that puts text in quotes where our loader would read a number."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    _add_float(Dumper)
    text: str = yaml.dump(dict(document), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _add_float(resolver: Any) -> None:
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"{_FLOAT.pattern}$"), list("-+.0123456789"))


def _check_node(root: Any, where: str, error: type[RemeltError]) -> None:
    """Refuse duplicate keys, nodes that hold themselves, and aliases that stand for too much."""
    import yaml

    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size_of(node: Any) -> int:
        if id(node) in open_nodes:
            raise error(f"{where}: line {node.start_mark.line + 1}: an alias stands inside its own anchor")
        if id(node) in sizes:
            return sizes[id(node)]
        open_nodes.add(id(node))
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise error(f"{where}: line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
                if isinstance(key, yaml.ScalarNode):
                    seen.add(key.value)
                children += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(size_of(child) for child in children)
        open_nodes.discard(id(node))
        if sizes[id(node)] > MAX_EXPANDED_NODES:
            raise error(f"{where}: its aliases stand for more than {MAX_EXPANDED_NODES:,} values")
        return sizes[id(node)]

    size_of(root)
