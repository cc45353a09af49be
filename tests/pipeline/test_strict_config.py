"""Strict configuration: what is refused names the file, the path in it and the nearest valid word."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remelt.errors import EvaluationError, RecipeError
from remelt.strict_config import Section, dump_yaml, load_yaml, nearest, parse_size, parse_yaml

WORDS = ["density", "epsilon", "weight"]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("40GB", 40_000_000_000),
        ("8GiB", 8 * 2**30),
        ("1.5 MB", 1_500_000),
        ("512kib", 512 * 1024),
        ("7", 7),
        (12, 12),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_become_bytes(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["8G", "GB", "-1GB", "1e3", 1.5, True, None, -1, "1.2.3GB", ""])
def test_what_is_no_size_is_refused_with_both_units(written: object) -> None:
    with pytest.raises(ValueError, match=r"40GB \(10\^9\) or 8GiB \(2\^30\)"):
        parse_size(written)


def test_an_unknown_key_names_file_path_and_nearest_key() -> None:
    section = Section({"densty": 1}, "r.yaml", "models[1].parameters")
    with pytest.raises(RecipeError, match=r"^r\.yaml: models\[1\]\.parameters: unknown key 'densty'; .*'density'"):
        section.allow(WORDS)
    assert nearest("Max-Shard-Size", ["max_shard_size", "seed"]) == "max_shard_size"
    assert nearest("zzz", WORDS) is None


def test_errors_are_of_the_class_that_the_reader_asks_for() -> None:
    outer = Section({"a": {"b": "x"}}, "s.yaml", error=EvaluationError)
    with pytest.raises(EvaluationError, match=r"s\.yaml: a\.b: expected a finite number, found the text 'x'"):
        outer.section("a").number("b")


def test_kinds_are_not_mixed_up() -> None:
    section = Section(
        {"flag": 1, "count": True, "number": float("nan"), "text": 5, "list": {}, "empty": None}, "c.yaml"
    )
    for read, key in (
        (section.flag, "flag"),
        (section.integer, "count"),
        (section.number, "number"),
        (section.text, "text"),
        (section.items, "list"),
        (section.text, "empty"),
    ):
        with pytest.raises(RecipeError, match=rf"c\.yaml: .*{key}"):
            read(key)
    assert section.text("absent", "default") == "default"
    assert section.texts("empty") == ()
    with pytest.raises(RecipeError, match=r"7 is outside \[0, 5\]"):
        Section({"n": 7}, "c").integer("n", low=0, high=5)


@pytest.mark.parametrize(("written", "value"), [("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+2", -250.0), (".5e1", 5.0)])
def test_exponents_without_a_dot_are_numbers(written: str, value: float) -> None:
    assert parse_yaml(f"a: {written}", where="r") == {"a": value}
    assert parse_yaml(f"a: '{written}'", where="r") == {"a": written}


def test_duplicate_keys_are_refused_with_their_line() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml: line 3: the key 'a' stands twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", where="r.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("a: [1", "no valid YAML"),
        ("a: !!python/object/apply:os.system [x]", "no valid YAML"),
        ("a: &x [*x]", "inside its own anchor"),
        ("a: 2020-13-45", "no valid YAML"),
        ("[" * 20_000, "no valid YAML"),
        ("a: 1\n---\nb: 2", "no valid YAML"),
    ],
)
def test_what_is_no_plain_document_is_refused(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        parse_yaml(text, where="r.yaml")


def test_aliases_that_stand_for_billions_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match="aliases stand for more"):
        parse_yaml("\n".join(lines), where="r.yaml")


def test_a_file_that_is_absent_too_large_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(RecipeError, match=r"1,000,001 bytes"):
        load_yaml(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match="no UTF-8"):
        load_yaml(tmp_path / "binary.yaml")


_SCALARS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**60), 2**60),
    st.booleans(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    st.sampled_from(["1e-3", "1E5", "yes", "null", "0x10", "1:30", "*", "~", ""]),
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.one_of(_SCALARS, st.lists(_SCALARS, max_size=4)), min_size=1)
)
def test_what_is_dumped_loads_to_the_same_values(document: dict[str, object]) -> None:
    loaded = parse_yaml(dump_yaml(document), where="r")
    assert loaded == document
    assert repr(loaded) == repr(document)
