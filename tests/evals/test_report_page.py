"""The page: self-contained, well-formed, and saying what the tables say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from remelt.errors import EvaluationError
from remelt_evals.report_charts import Bar, Mark, bar_panels, front_chart, heat_map, progress_chart
from remelt_evals.report_coefficients import coefficient_grid
from remelt_evals.report_page import report_page
from remelt_evals.report_reading import read_evaluations, read_trials
from remelt_evals.report_tables import TrialRow, write_evaluation, write_trials
from study_reports import BEGAN, STUDY_ID, make_report, recipe_json, write_study


class _Page(HTMLParser):
    """Tags with their attributes, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "reports"
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def page(reports: Path) -> str:
    return report_page(reports, STUDY_ID)


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = _Page(page)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not [value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href")]
    assert "url(" not in page and "@import" not in page


def test_every_trial_is_drawn_with_its_score(page: str, reports: Path) -> None:
    evaluations = read_evaluations(reports, study_id=STUDY_ID)
    tips = [title.text or "" for svg in svgs(page) for title in svg.iter("title")]
    for trial in read_trials(reports, STUDY_ID, evaluations):
        expected = "the evaluator was killed" if trial.score is None else f"{trial.score:.4f}"
        assert any(tip.startswith(f"{trial.label}: {expected}") for tip in tips), trial.label


def test_the_page_says_what_the_tables_say(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    # 28 of 40 words right, and what that is worth against 18 of code, the better parent.
    assert "The published winner is trial 6" in text
    assert re.search(r"best merge \(trial 6\)\s+0\.700\s+± 0\.073", text)
    assert re.search(r"gain over best parent, code\s+\+0\.\d{3}\s+better: \[\+", text)
    assert "8 complete, 1 failed" in text
    assert STUDY_ID in text and "w6" + "d" * 62 in text and "lm-eval 0.4.13, torch 2.13.0" in text
    assert "merge_method: task_arithmetic" in text


def test_marks_of_a_chart_stay_inside_of_it(page: str) -> None:
    for svg in svgs(page):
        left, top, width, height = map(float, svg.attrib["viewBox"].split())
        for shape in svg.iter():
            for key, start, size in (("x", left, width), ("cx", left, width), ("y", top, height), ("cy", top, height)):
                if key in shape.attrib:
                    assert start - 1 <= float(shape.attrib[key]) <= start + size + 1, (shape.tag, shape.attrib)


def test_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    report = make_report("a" * 64, "report", 0.5, checkpoint=f"/pool/{hostile}", notes=(hostile,))
    write_evaluation(tmp_path, report)
    page = report_page(tmp_path, None)
    assert hostile not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_evaluations_outside_of_studies_have_a_page_of_bars(tmp_path: Path) -> None:
    for number in range(3):
        report = make_report(f"{number}" * 64, "report", 0.4 + 0.1 * number, checkpoint=f"/pool/step-{number}")
        write_evaluation(tmp_path, report)
    page = report_page(tmp_path, None)
    assert page.count('class="bar') == 6
    assert "step-2" in page and "Score of every trial" not in page


def test_a_study_that_has_only_begun_is_drawn_as_far_as_it_is(tmp_path: Path) -> None:
    rows = [TrialRow(trial_id="a-0", trial_number=0, state="RUNNING", label="uniform", started_at=BEGAN)]
    write_trials(tmp_path, "a", rows, study_started_at=BEGAN)
    with pytest.raises(EvaluationError, match="no evaluation that succeeded"):
        report_page(tmp_path, "a")


def test_coefficients_are_grouped_by_layers_as_the_recipe_resolves() -> None:
    grid = coefficient_grid(recipe_json({"w_math": 0.4, "w_code": 0.6}))
    assert grid is not None
    assert grid.rows == ("math", "code")
    assert [group.name for group in grid.groups][:2] == ["embedding", "layers 0–1"] or len(grid.groups) > 4
    math, code = zip(*(group.values for group in grid.groups), strict=True)
    assert set(math) == {0.4}
    layers = [value for group, value in zip(grid.groups, code, strict=True) if group.name.startswith("layers")]
    assert layers == sorted(layers) and layers[0] < 0.06 and layers[-1] > 0.54
    assert "assumed" in grid.note
    constant = coefficient_grid('{"merge_method": "linear", "models": [{"model": "a/x", "parameters": {"weight": 1}}]}')
    assert constant is not None
    assert [(group.name, group.values) for group in constant.groups] == [("all tensors", (1.0,))]


def test_rules_and_classes_are_columns_of_their_own() -> None:
    recipe = """{"merge_method": "linear",
        "models": [{"model": "o/a", "name": "a",
                    "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 2}]}},
                   {"model": "o/b", "name": "b", "parameters": {"weight": 1}}],
        "rules": [{"match": {"class": "head"}, "copy": "b"}, {"match": {"layers": [0, 3]}, "copy": "a"}]}"""
    grid = coefficient_grid(recipe)
    assert grid is not None
    found = {group.name: (group.method, group.values) for group in grid.groups}
    assert found["head"] == ("copy", (0.0, 1.0))
    assert found["mlp 0–3"] == ("copy", (1.0, 0.0))
    assert found["mlp 4–23"] == ("linear", (1.0, 1.0))
    assert found["attention 4–23"] == ("linear", (2.0, 1.0))
    assert coefficient_grid('{"merge_method": "from_elsewhere", "models": [{"model": "o/a"}]}') is None


@pytest.mark.parametrize("number", [1, 2, 400])
def test_charts_of_any_size_are_well_formed(number: int) -> None:
    marks = [
        Mark(x=place, y=0.5, kind="searcher", tip="<&>", label="<&>", error=0.1, is_winner=place == 0)
        for place in range(number)
    ]
    names = [f"a very long name of a checkpoint {place}" for place in range(min(number, 30))]
    charts = [
        progress_chart(marks, [("uniform", 0.5), ("best parent", 0.5)], "score"),
        progress_chart([marks[0]._replace(kind="failed")], [], "score"),
        front_chart([("a", "b", True, False, marks)]),
        heat_map(
            names, [str(place) for place in range(number)], [[-1.0] * number] * len(names), title="t", axis="trial"
        ),
        heat_map(names, ["all"], [[None]] * len(names), title="t"),
        bar_panels([("task", "acc", [Bar(name, "parent", 0.0, None) for name in names])], "t"),
    ]
    for chart in charts:
        assert "nan" not in chart
        ElementTree.fromstring(chart)
