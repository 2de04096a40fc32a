"""Tables and figures say what was found, over how many seeds, and what is missing."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from small_studies import SMALL, pretend, small_study

from mirl.errors import UserError
from mirl.studies.definition import Cell
from mirl.studies.estimate import cost, estimate
from mirl.studies.figure import _caption, draw_figure
from mirl.studies.results import Result, find_results
from mirl.studies.running import publish
from mirl.studies.stages import stages_of
from mirl.studies.table import write_table


def test_a_table_has_means_over_seeds_and_names_what_is_missing(tmp_path):
    study = small_study(tmp_path)
    for seed, top1 in enumerate((0.40, 0.44)):
        pretend(study, Cell("mae", 2, 0, seed), top1)
        pretend(study, Cell("truncated_mae", 4, 2, seed), top1 + 0.1)
    pretend(study, Cell("mae", 4, 0, 0), 0.5)
    pretend(study, Cell("mae", 4, 2, 0), 0.525)
    table = write_table(find_results(study))
    assert "6 of 14 cells are finished. Top-1 in %, mean over 2 seeds ± half their range" in table
    assert "400 test images leave up to ± 4.9 open beside that (95 %)" in table
    rows = [
        "## by depth (Figure 5)", "| fine-tuned | depth 2 | depth 4 |", "| mae | 42.0 ± 2.0 | 50.0 (1 of 2 seeds) |",
        "| mirl | missing | missing |", "| fine-tuned, depth 4 | 0 replaced | 2 replaced |",
        "| mae | 50.0 (1 of 2 seeds) | 52.5 (1 of 2 seeds) |",
        "| truncated_mae | 50.0 (1 of 2 seeds) | 52.0 ± 2.0 |",  # nothing left out is MAE
        "| mae | 2 | 0.500 ± 0.000 | 42.0 ± 2.0 | 42.0 ± 2.0 | 50 s |",
        "| truncated_mae, without the last 2 | 4 | 0.500 ± 0.000 | 52.0 ± 2.0 | 52.0 ± 2.0 | 50 s |",
        f"| mae, depth 4 | mae, depth 2 (1 of 2 seeds){3 * ' | +10.0 (+3.1 to +16.8)'} |",
        "| mae, depth 4, 2 replaced | mae, depth 4 (1 of 2 seeds) | +2.5 (-4.4 to +9.4) | - | - |",
        f"| truncated_mae, depth 4, 2 replaced | mae, depth 4 (1 of 2 seeds){3 * ' | +0.0 (-6.9 to +6.9)'} |",
    ]  # fmt: skip
    assert [row for row in rows if row not in table.splitlines()] == []


@pytest.mark.parametrize(
    ("first", "second", "interval"),  # Newcombe 1998, table II, two examples, method 10
    [((56, 70), (48, 80), "+20.0 (+5.2 to +33.4)"), ((10, 10), (0, 10), "+100.0 (+60.8 to +100.0)")],
)
def test_differences_have_the_interval_of_newcombe(tmp_path, first, second, interval):
    study = small_study(tmp_path, seeds=[0])
    for method, (right, images) in {"mirl": first, "mae": second}.items():
        pretend(study, Cell(method, 2, 0, 0), right / images, images=images)
    rows = write_table(find_results(study)).splitlines()
    assert f"| mirl, depth 2 | mae, depth 2 | {interval} | {interval} | {interval} |" in rows


def test_a_truncated_mae_without_mae_beside_it_has_no_first_point(tmp_path):
    study = small_study(tmp_path, panels=[SMALL["panels"][2] | {"methods": ["truncated_mae"]}])
    assert "| truncated_mae | - | missing |" in write_table(find_results(study))


def test_a_result_of_another_definition_is_missing_and_said_to_be_there(tmp_path):
    study = small_study(tmp_path)
    pretend(study, Cell("mae", 2, 0, 0), 0.4)
    pretend(study, Cell("mirl", 2, 0, 0), 0.4)
    changed = small_study(tmp_path, methods=SMALL["methods"] | {"mirl": {"context": "none"}})
    found = find_results(changed)
    assert Cell("mirl", 2, 0, 0) in found.missing and found.other == {Cell("mirl", 2, 0, 0)}
    table = write_table(found)
    assert "1 of 14 cells are finished, 1 have a result of another definition." in table
    assert "| mirl | missing (of another definition) | missing |" in table


def test_a_file_that_is_no_result_is_one_line(tmp_path):
    study = small_study(tmp_path)
    path = study.results / "mae_2_seed0.json"
    path.parent.mkdir(parents=True)
    # Every name is there, and what tables need is not.
    hollow = {field.name: {} for field in dataclasses.fields(Result)} | {"cell": dataclasses.asdict(study.cells()[0])}
    for text in ("{", "[]", "{}", json.dumps({"cell": {"method": "mae"}}), json.dumps(hollow)):
        path.write_text(text)
        with pytest.raises(UserError, match="mae_2_seed0.json cannot be read .*; remove it to run the cell again"):
            find_results(study)


def test_the_figure_is_drawn_of_whatever_is_there(tmp_path):
    study, path = small_study(tmp_path), tmp_path / "figure.png"
    draw_figure(find_results(study), path)
    with Image.open(path) as picture:
        empty = np.asarray(picture.convert("L")).std()
    for number, cell in enumerate(study.cells()[:-2]):
        pretend(study, cell, 0.4 + 0.01 * number)
    found = find_results(study)
    draw_figure(found, path)
    with Image.open(path) as picture:
        assert picture.width > 1500 and np.asarray(picture.convert("L")).std() > empty
    caption = _caption(found)
    assert "bars: from the lowest to the highest seed" in caption and "400 test images" in caption
    assert "Missing: 2 of 14 cells: mae_4_replaced2_seed1, truncated_mae_4_replaced2_seed1." in caption
    written = publish(found)
    assert written == study.results.parent / "small.md" and written.with_suffix(".png").exists()


def test_a_time_comes_from_the_file_until_a_cell_was_timed_here(tmp_path):
    study = small_study(tmp_path)
    first, deep = Cell("mae", 2, 0, 0), Cell("mae", 4, 0, 0)
    expected = estimate(find_results(study))
    assert (
        "no cell was timed on this machine yet; the file expects 0.2 min for a cell of depth 4 on a machine"
        in expected.words
    )
    assert expected.seconds(deep) == pytest.approx(12) and expected.seconds(first) < 12
    pretend(study, first, 0.4, seconds=70.0, device="another machine")
    assert estimate(find_results(study)).words == expected.words
    pretend(study, first, 0.4, seconds=2.0)
    known = estimate(find_results(study))
    assert known.words.startswith("from 1 cell timed on ")
    pairs = [zip(stages_of(study, cell), [cell] * 5, strict=True) for cell in (first, deep)]
    costs = [[cost(study, cell, stage) for stage, cell in pair] for pair in pairs]
    assert known.seconds(first) == pytest.approx(10)
    assert known.seconds(deep) == pytest.approx(sum(2 * d / f for f, d in zip(*costs, strict=True)))
    fresh = Cell("mae", 4, 2, 0)
    assert known.seconds(deep, fresh) == pytest.approx(known.seconds(deep) + 2 * costs[1][1] / costs[0][1])
