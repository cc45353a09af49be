"""The text that the zoo is trained on, cut into parts that never meet.

Four abilities. *prose* and *python* come from the interpreter's own standard library (PSF licence): paragraphs of
`pydoc_data.topics` and of docstrings, and module sources without comments and docstrings. *arithmetic* and *strings*
are generated. Every source of text (a help topic, a module) and every question falls into exactly one part by a hash
of its name, so the split holds on any machine and needs no seed: training reads `train`, and the three roles of eval
items read one part each.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

ABILITIES = ("prose", "python", "arithmetic", "strings")
PARTS = ("train", "search", "selection", "report")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_LETTERS = frozenset(ALPHABET)

# Tests and encoding tables are repetitive; the help topics are prose and are read as such.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "encodings",
    "site-packages",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
    "turtledemo",
}
SHORTEST_PARAGRAPH = 60


def choose_part(name: str) -> str:
    """Return the part that a source or a question belongs to: 70 % train, 10 % each role."""
    bucket = hashlib.blake2b(name.encode(), digest_size=2).digest()
    return PARTS[max(0, int.from_bytes(bucket, "big") % 10 - 6)]


def _ascii(text: str) -> str:
    """Replace typographic quotes, then drop what the alphabet does not hold."""
    for fancy, plain in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\t", "    ")):
        text = text.replace(fancy, plain)
    return "".join(c for c in text if c in _LETTERS)


def _is_prose(paragraph: str) -> bool:
    """Tell sentences from tables, grammars, signatures and code."""
    letters = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return len(paragraph) >= SHORTEST_PARAGRAPH and letters >= 0.94 * len(paragraph) and paragraph.count(" ") >= 8


def _split_paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs of running English, each on one line."""
    for block in re.split(r"\n\s*\n", _ascii(text)):
        paragraph = " ".join(block.split())
        if _is_prose(paragraph):
            yield paragraph


def _module_paths() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # Files named _sysconfigdata_*, config-* and the like are generated per build.
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts) and "config" not in name:
            yield name, path


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _strip_docstrings(tree: ast.Module) -> list[str]:
    """Remove every docstring from the tree in place and return them."""
    docs: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            doc = ast.get_docstring(node)
            if doc is not None:
                docs.append(doc)
                node.body = node.body[1:] or [ast.Pass()]
    return docs


@functools.cache
def read_library() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return {ability: {part: documents}} for the two abilities that are read from the standard library.

    A prose document is a paragraph, a python document a module. A paragraph that several sources share goes to the
    first part in the order of PARTS, so that training text never turns up among the items.
    """
    from pydoc_data.topics import topics

    prose: dict[str, list[str]] = {part: [] for part in PARTS}
    python: dict[str, list[str]] = {part: [] for part in PARTS}
    for topic, text in sorted(topics.items()):
        prose[choose_part(f"topic {topic}")].extend(_split_paragraphs(text))
    for name, path in _module_paths():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library hold bad syntax on purpose
        part = choose_part(f"module {name}")
        for doc in _strip_docstrings(tree):
            prose[part].extend(_split_paragraphs(doc))
        source = _ascii(ast.unparse(tree))
        if len(source) > 400:
            python[part].append(source)

    seen: set[str] = set()
    for part in PARTS:
        prose[part] = [p for p in dict.fromkeys(prose[part]) if p not in seen]
        seen.update(prose[part])
    return {
        "prose": {part: tuple(prose[part]) for part in PARTS},
        "python": {part: tuple(python[part]) for part in PARTS},
    }


def _ask_sum(rng: random.Random) -> tuple[str, str]:
    operation = rng.choice("++--*<>")
    a, b = rng.randrange(100), rng.randrange(100)
    if operation == "<":
        return f"min({a},{b})=", str(min(a, b))
    if operation == ">":
        return f"max({a},{b})=", str(max(a, b))
    if operation == "*":
        a, b = a % 20, b % 10
        return f"{a}*{b}=", str(a * b)
    if operation == "-":
        a, b = max(a, b), min(a, b)
        return f"{a}-{b}=", str(a - b)
    return f"{a}+{b}=", str(a + b)


STRING_FUNCTIONS: dict[str, Callable[[str], str]] = {
    "rev": lambda s: s[::-1],
    "rot": lambda s: s[1:] + s[0],
    "swap": lambda s: s[-1] + s[1:-1] + s[0],
    "sort": lambda s: "".join(sorted(s)),
    "fold": lambda s: s[::2] + s[1::2],
    "half": lambda s: s[len(s) // 2 :] + s[: len(s) // 2],
    "pair": lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
    "next": lambda s: "".join(chr((ord(c) - 96) % 26 + 97) for c in s),
    "prev": lambda s: "".join(chr((ord(c) - 98) % 26 + 97) for c in s),
}


def _ask_string(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(tuple(STRING_FUNCTIONS))
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(5, 8)))
    return f"{name}({word})=", STRING_FUNCTIONS[name](word)


def draw_question(ability: str, part: str, rng: random.Random) -> tuple[str, str]:
    """Return a generated (question, answer) whose question belongs to the part."""
    ask = {"arithmetic": _ask_sum, "strings": _ask_string}[ability]
    while True:
        question, answer = ask(rng)
        if choose_part(question) == part:
            return question, answer


def write_training_text(ability: str, seed: int, num_questions: int = 60_000) -> str:
    """Return the whole training text of one ability, documents in a seeded order."""
    rng = random.Random(seed)
    if ability in ("arithmetic", "strings"):
        pairs = (draw_question(ability, "train", rng) for _ in range(num_questions))
        return "".join(f"{question}{answer}\n" for question, answer in pairs)
    documents = list(read_library()[ability]["train"])
    rng.shuffle(documents)
    return "\n".join(documents) + "\n"
