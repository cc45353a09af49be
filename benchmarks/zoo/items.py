"""Makes the zoo's eval items, and writes those that a search may see: `python -m benchmarks.zoo.items`.

Each role (search, selection, report) reads its own part of the corpus, so the roles share no item with each other or
with training. The report items are written by `report_items.py` alone.

Two kinds of item. *Choices*: a context and four continuations, one of them true; in text the false ones
have one character altered, in answers they are near misses. *Passages*: text to be scored in
bits per byte.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.corpus import ABILITIES, PARTS, STRING_FUNCTIONS, draw_question, read_library

ZOO_DIR = Path(__file__).resolve().parents[2] / "evals" / "remelt_evals" / "zoo"
SEEDS = {"search": 101, "selection": 202}
NUM_CHOICE_ITEMS = {"search": 180, "selection": 220, "report": 500}
NUM_PASSAGES = {"search": 24, "selection": 40, "report": 150}
TEXT_ABILITIES = ("prose", "python")
NUM_CHOICES = 4
CONTEXT_LENGTH = 24
CONTINUATION_LENGTH = 8
ORDER = 3  # how many characters a false continuation agrees with
PASSAGE_LENGTH = 120

Item = dict[str, Any]


def _shuffle_choices(context: str, answer: str, wrong: Sequence[str], rng: random.Random) -> Item:
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "label": choices.index(answer)}


def _read_earlier_parts(ability: str, part: str) -> str:
    """Return the text of the parts that come before `part`, in which its items must not occur."""
    return "\n".join("\n".join(read_library()[ability][name]) for name in PARTS[: PARTS.index(part)])


def _count_followers(text: str) -> dict[str, tuple[list[str], list[int]]]:
    """Return {ORDER characters: (the characters seen behind them, how often)}."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for place in range(ORDER, len(text)):
        counts[text[place - ORDER : place]][text[place]] += 1
    return {before: (list(seen), list(seen.values())) for before, seen in counts.items()}


def make_text_choices(ability: str, part: str, num_items: int, rng: random.Random) -> list[Item]:
    """Ask which of four continuations is the true one, at random places in the part's text.

    In each false one a single character is altered, to one that often stands behind the characters before it. So the
    four are about equally likely a priori, and what decides is how well the language is known.
    """
    text = "\n".join(read_library()[ability][part])
    earlier = _read_earlier_parts(ability, part)
    followers = _count_followers(text)
    items: list[Item] = []
    seen: set[str] = set()
    while len(items) < num_items:
        place = rng.randrange(CONTEXT_LENGTH, len(text) - CONTINUATION_LENGTH)
        context, answer = text[place - CONTEXT_LENGTH : place], text[place : place + CONTINUATION_LENGTH]
        # Indentation carries nothing, and across a line break little can be known.
        if context in seen or "\n" in answer or "   " in answer or context.count(" ") > CONTEXT_LENGTH // 2:
            continue
        seen.add(context)
        if context + answer in earlier:
            continue  # boilerplate that modules share
        wrong: set[str] = set()
        for _ in range(60):
            i = rng.randrange(len(answer))
            (letter,) = rng.choices(*followers[(context + answer)[CONTEXT_LENGTH + i - ORDER : CONTEXT_LENGTH + i]])
            if letter not in (answer[i], "\n"):
                wrong.add(answer[:i] + letter + answer[i + 1 :])
            if len(wrong) == NUM_CHOICES - 1:
                items.append(_shuffle_choices(context, answer, sorted(wrong), rng))
                break
    return items


def _spoil_number(answer: str, rng: random.Random) -> str:
    """Return a near miss: off by one, two or ten, or with two digits exchanged."""
    if len(answer) > 1 and rng.random() < 0.25:
        return answer[1] + answer[0] + answer[2:]
    return str(abs(int(answer) + rng.choice((-10, 10, -1, 1, -2, 2))))


def _spoil_string(answer: str, word: str, rng: random.Random) -> str:
    """Return a near miss: two neighbours exchanged, one letter changed, or another function's result."""
    kind = rng.random()
    place = rng.randrange(len(answer) - 1)
    if kind < 0.5:
        return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
    if kind < 0.75:
        return answer[:place] + rng.choice(word) + answer[place + 1 :]
    return rng.choice(tuple(STRING_FUNCTIONS.values()))(word)


def make_question_choices(ability: str, part: str, num_items: int, rng: random.Random) -> list[Item]:
    """Ask generated questions, the false answers being near misses; a line break ends each answer."""
    items: list[Item] = []
    seen: set[str] = set()
    while len(items) < num_items:
        question, answer = draw_question(ability, part, rng)
        if question in seen:
            continue
        seen.add(question)
        word = question[question.find("(") + 1 : question.find(")")]
        wrong: dict[str, None] = {}
        for _ in range(40):
            miss = _spoil_number(answer, rng) if ability == "arithmetic" else _spoil_string(answer, word, rng)
            if miss != answer:
                wrong[miss] = None
            if len(wrong) == NUM_CHOICES - 1:
                items.append(_shuffle_choices(question, answer + "\n", [f"{w}\n" for w in wrong], rng))
                break
    return items


def make_passages(ability: str, part: str, num_items: int, rng: random.Random) -> list[Item]:
    """Cut passages that begin where a document or a line begins."""
    passages: set[str] = set()
    earlier = _read_earlier_parts(ability, part)
    documents = [d for d in read_library()[ability][part] if len(d) >= PASSAGE_LENGTH]
    while len(passages) < num_items:
        document = rng.choice(documents)
        start = 0 if ability == "prose" else document.find("\n", rng.randrange(len(document))) + 1
        passage = document[start : start + PASSAGE_LENGTH].strip()
        if len(passage) >= PASSAGE_LENGTH // 2 and passage not in earlier:
            passages.add(passage)
    return [{"text": passage} for passage in sorted(passages)]


def write_items(role: str, seed: int, folder: Path) -> None:
    """Write every item file of one role."""
    folder.mkdir(parents=True, exist_ok=True)
    for ability in ABILITIES:
        # One generator per file: a file does not change when another one's length does.
        rng = random.Random(f"{seed} {ability}")
        make = make_text_choices if ability in TEXT_ABILITIES else make_question_choices
        _write_lines(folder / f"{ability}_{role}.jsonl", make(ability, role, NUM_CHOICE_ITEMS[role], rng))
        if ability in TEXT_ABILITIES:
            passages = make_passages(ability, role, NUM_PASSAGES[role], rng)
            _write_lines(folder / f"{ability}_bits_{role}.jsonl", passages)


def _write_lines(path: Path, items: list[Item]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


CHOICE_TASK = """\
task: zoo_{name}_{role}
dataset_path: json
dataset_kwargs: {{data_files: {{test: ../items/{name}_{role}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
PASSAGE_TASK = """\
task: zoo_{name}_{role}
dataset_path: json
dataset_kwargs: {{data_files: {{test: ../items/{name}_{role}.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1}}
"""


def write_tasks(folder: Path) -> None:
    """Write one lm-eval task per ability and role; their data files are relative to the YAML's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in NUM_CHOICE_ITEMS:
        for name in ABILITIES:
            (folder / f"zoo_{name}_{role}.yaml").write_text(CHOICE_TASK.format(name=name, role=role))
        for name in (f"{ability}_bits" for ability in TEXT_ABILITIES):
            (folder / f"zoo_{name}_{role}.yaml").write_text(PASSAGE_TASK.format(name=name, role=role))


def main() -> None:
    """Write the tasks, and the items of the roles that a search may see."""
    write_tasks(ZOO_DIR / "tasks")
    for role, seed in SEEDS.items():
        write_items(role, seed, ZOO_DIR / "items")


if __name__ == "__main__":
    main()
