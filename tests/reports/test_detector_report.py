"""The report of a run of mirl detect: alone, unfinished, beside another, beside one of pre-training."""

import html
from dataclasses import replace

import pytest
from test_page import anchors, data_of, words
from written_runs import write_detector, write_precisions, write_results, write_rows, write_run

from mirl.reports.charts import draw
from mirl.reports.contents import read_run, read_runs
from mirl.reports.curves import curves
from mirl.reports.judged import judgements
from mirl.reports.page import LIMIT, report
from mirl.reports.panels import SHEET_BYTES
from mirl.reports.sections import sections
from mirl.reports.tables import key_figures, results, side_by_side, status
from mirl.training.pictures import draw_curves


def section(runs, anchor):
    return next(part for part in sections(runs) if part.anchor == anchor)


def lines_of(runs, name):
    return next(chart for chart in curves(runs) if chart.name == name).lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, moved since it was written; not to be changed."""
    return write_detector(tmp_path_factory.mktemp("detector") / "first").rename(
        tmp_path_factory.mktemp("moved") / "b c"
    )


def test_a_finished_run(folder, tmp_path):
    path = report([str(folder)], out=str(tmp_path / "page.html"))
    assert path.stat().st_size < LIMIT and "&lt;b&gt;dog" in path.read_text() and "<b>dog" not in path.read_text()
    assert anchors(path) == [
        *("overview", "curves", "pictures", "gradients", "evaluation", "use", "options", "skipped", "incidents")
    ]
    text = words(path)
    for part in ("finished after 20 steps", "protocol coco_1x", "box AP 40.0 %", "mask AP 35.0 %", "Use the detector"):
        assert part in text
    assert "The figures to look at first." in text and "held-out loss" not in text and "mirl diagnose" not in text
    assert "mirl detect --config" in text
    assert {"detector_losses", "box_ap_all", "mask_ap_small_all", "gradients_mean"} <= set(data_of(path)["charts"])


def test_lines_to_paste_name_the_place_where_the_run_is(folder):
    code = section([read_run(folder)], "use").code.splitlines()
    assert code == [
        f"mirl detect '{folder}' --predict IMAGES",
        f"mirl evaluate --weights '{folder}' --data OTHER_ANNOTATIONS",
        "",
        f'detector, categories = mirl.load_detector("{folder}")',
    ]


def test_curves_of_one_run(folder):
    run = read_run(folder)
    parts = lines_of([run], "detector_losses")
    assert [line.label for line in parts] == ["proposal", "proposal's box", "class", "box", "mask"]
    assert all(line.style != "faint" for line in parts)
    assert [line.y[-1] for line in parts] == pytest.approx([0.03, 0.0005, 0.05, 0.045, 0.15])
    assert {line.label: line.y.tolist() for line in lines_of([run], "box_ap_all")} == {
        "boxes": [0, 20, 40], "masks": [0, 17.5, 35]
    }  # fmt: skip
    assert [line.label for line in lines_of([run], "mask_ap_small_all")] == ["small", "medium"]  # no large object


def test_nothing_is_below_a_precision_of_zero(folder):
    (chart,) = (chart for chart in curves([read_run(folder)]) if chart.name == "box_ap_all")
    flat = replace(chart, lines=tuple(replace(line, y=0 * line.y) for line in chart.lines))
    assert '"start":-0.08' in draw(flat) and '"start":-0.08' not in draw(chart)


def test_tables_of_average_precision(folder, tmp_path):
    assert not results([read_run(folder)])  # they are no accuracies
    moved = write_detector(tmp_path / "run")
    write_precisions(moved / "evaluations/other/results.json", "other")
    table, *classes = judgements([read_run(moved)], "detect")
    assert table.head == ("data", "of", "AP", "AP50", "AP75", "small", "medium", "large")
    assert [row[:4] for row in table.rows] == [
        ("coco, held out, 5,000 images", "boxes", "40.0 %", "61.0 %"),
        ("coco, held out, 5,000 images", "masks", "35.0 %", "58.0 %"),
        ("other, 5,000 images", "boxes", "40.0 %", "61.0 %"),
        ("other, 5,000 images", "masks", "35.0 %", "58.0 %"),
    ]
    assert {row[-1] for row in table.rows} == {"–"}
    assert [found.folded for found in classes] == [True, True]
    assert classes[0].rows == (("<b>dog", "7", "25.0 %", "–"), ("cat", "7", "50.0 %", "40.0 %"))
    assert not section([read_run(moved)], "evaluation").lines  # detections.json is no result


def test_of_many_classes_the_hardest_are_listed(tmp_path):
    folder = write_detector(tmp_path / "run")
    write_precisions(folder / "results.json", "lvis", classes=[(f"c{i}", 1 - i / 1203, None) for i in range(1203)])
    _, classes = judgements([read_run(folder)], "detect")
    assert classes.caption.startswith("100 of 1,203 classes") and len(classes.rows) == 100
    assert classes.rows[0][0] == "c1202"


def test_results_that_cannot_be_read_are_named(tmp_path):
    folder = write_detector(tmp_path / "run")
    (folder / "results.json").write_text('{"data": "co')
    part = section([read_run(folder)], "evaluation")
    assert part.lines == ("results.json of run could not be read.",) and not part.tables


def test_a_run_that_has_just_begun(tmp_path):
    folder = write_detector(tmp_path / "run", finished=False, evaluations=1)
    run = read_run(folder)
    assert not run.finished and status(run).startswith("still running or stopped at step 20 of 20")
    use, evaluation = section([run], "use"), section([run], "evaluation")
    assert use.empty and use.missing == "There is no detector yet: it is written at the end of the run."
    assert evaluation.empty and evaluation.missing == "No evaluation yet: results.json is written at the end."


@pytest.mark.parametrize("runs", [1, 2])
def test_pictures_stay_large_enough_to_read(tmp_path, runs):
    """The names of what is found are 12 pixels high."""
    folders = [write_detector(tmp_path / str(i), picture=(968, 1500)) for i in range(runs)]
    part = section(read_runs(folders), "pictures")
    assert part.title == "Pictures" and "on the right what the detector finds" in part.reading
    assert [(sheet.width >= 800, sheet.height / sheet.width > 1.5) for sheet in part.sheets] == [(True, True)] * runs
    assert sum(len(sheet.source) for sheet in part.sheets) <= SHEET_BYTES


def test_two_detectors(folder, tmp_path):
    other = write_detector(tmp_path / "other", scale=2.0, protocol="vitdet")
    runs = read_runs([folder, other])
    anchors = [part.anchor for part in sections(runs)]
    assert anchors == ["options", "curves", "pictures", "gradients", "evaluation", "incidents"]
    assert ("protocol", "coco_1x", "vitdet") in side_by_side(runs).rows
    for chart in curves(runs):
        assert set(chart.legend) == {"b c", "other"}
        assert all(line.style != "faint" for line in chart.lines)  # nothing stands before the training loss
    first, second = lines_of(runs, "mask")
    assert second.y[-1] == pytest.approx(2 * first.y[-1])
    assert [row[0] for row in judgements(runs, "detect")[0].rows] == ["b c", "b c", "other", "other"]


def test_a_detector_and_the_pre_training_that_it_began_with(folder, tmp_path):
    pretraining = write_run(tmp_path / "pretraining")
    write_results(pretraining)
    runs = [str(folder), str(pretraining)]
    path = report(runs, out=str(tmp_path / "page.html"))
    text = html.unescape(words(path))
    assert "Average precision (AP) as COCO computes it" in text and "How often the first guess is right" in text
    assert "coco, held out, 5,000 images" in text and "knn, k=10, block 6" in text
    assert f"mirl diagnose --weights {pretraining} " in text and "Detectors have no held-out loss" in text
    assert "The shallow half of the encoder" in text and "on the right what the detector finds" in text
    assert len(data_of(path)["galleries"]) == 1 and path.read_text().count('class="card sheet"') == 1
    styles = {(line.label, line.style) for line in lines_of(read_runs(runs), "loss")}
    assert styles == {("b c", "plain"), ("pretraining", "faint"), ("pretraining", "dots")}


def test_without_a_precision_there_is_no_key_figure(tmp_path):
    """Held-out images without an object have none."""
    folder = write_detector(tmp_path / "run", evaluations=0)
    nothing = dict.fromkeys(("box_ap", "mask_ap", "mask_ap_small"))
    write_rows(folder, [{"kind": "held_out", "step": 0, "epoch": 0.0, **nothing}])
    run = read_run(folder)
    assert "box AP" not in key_figures(run)
    assert not {"box_ap_all", "mask_ap_small_all"} & {chart.name for chart in curves([run])}
    draw_curves(run.rows["held_out"], tmp_path / "curves.png")  # nor is there a loss before the first step


def test_curves_during_the_run(folder, tmp_path):
    """Of the precisions the two headline figures alone are drawn."""
    rows, drawn = read_run(folder).rows, []
    for change in ({}, {"mask_ap75": 0.0}, {"mask_ap": 0.0}):
        path = tmp_path / f"{len(drawn)}.png"
        draw_curves([*rows["train"][-1:], *(row | change for row in rows["held_out"])], path)
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
