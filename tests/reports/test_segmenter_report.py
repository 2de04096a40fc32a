"""The report of a run of mirl segment: alone, unfinished, beside a detector."""

import html
import json

import pytest
from test_page import anchors, data_of, words
from written_runs import write_detector, write_overlaps, write_rows, write_segmenter

from mirl.reports.contents import read_run, read_runs
from mirl.reports.curves import curves
from mirl.reports.judged import confusions, judgements
from mirl.reports.page import LIMIT, report
from mirl.reports.sections import sections
from mirl.reports.tables import key_figures, results, side_by_side
from mirl.training.pictures import _figures


def section(runs, anchor):
    return next(part for part in sections(runs) if part.anchor == anchor)


def lines_of(runs, name):
    return next(chart for chart in curves(runs) if chart.name == name).lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, moved since it was written; not to be changed."""
    return write_segmenter(tmp_path_factory.mktemp("segmenter") / "first").rename(
        tmp_path_factory.mktemp("moved") / "b c"
    )


def test_a_finished_run(folder, tmp_path):
    path = report([str(folder)], out=str(tmp_path / "page.html"))
    assert path.stat().st_size < LIMIT and "&lt;i&gt;pole" in path.read_text() and "<i>pole" not in path.read_text()
    assert anchors(path) == [
        *("overview", "curves", "pictures", "gradients", "evaluation", "use", "options", "skipped", "incidents")
    ]
    text = html.unescape(words(path))
    for part in (
        *("finished after 20 steps", "mean IoU 40.0 %", "pixel accuracy 80.0 %", "Use the segmenter"),
        *("the mean IoU rise", "where it is wrong", "IoU is the overlap of what is said", "mirl segment --config"),
    ):
        assert part in text
    assert "held-out loss" not in text and "mirl diagnose" not in text and "precision" not in text
    charts = {"segmenter_losses", "miou_all", "accuracy", "gradients_mean", "loss", "lr"}
    assert charts <= set(data_of(path)["charts"])
    assert path.read_text().count('class="card sheet"') == 2  # predictions and confusion


def test_lines_to_paste_name_the_place_where_the_run_is(folder):
    assert section([read_run(folder)], "use").code.splitlines() == [
        f"mirl segment '{folder}' --predict IMAGES",
        f"mirl evaluate --weights '{folder}' --data OTHER_LABELS",
        "",
        f'segmenter = mirl.load_segmenter("{folder}")',
    ]


def test_curves_of_one_run(folder):
    run = read_run(folder)
    losses = {line.label: line.y[-1] for line in lines_of([run], "segmenter_losses")}
    assert losses == pytest.approx({"decoder": 0.15, "auxiliary head": 0.1})
    assert {line.label: line.y.tolist() for line in lines_of([run], "miou_all")} == {
        "mean IoU": [0, 20, 40], "pixel accuracy": [0, 40, 80], "class accuracy": [0, 25, 50]
    }  # fmt: skip
    assert lines_of([run], "accuracy")[-1].y[-1] == pytest.approx(95)


def test_tables_of_overlap(tmp_path):
    """The hardest class first; what is neither true nor said is left out."""
    folder = write_segmenter(tmp_path / "run")
    write_overlaps(folder / "evaluations/other/results.json", "other", multi_scale=True)
    run = read_run(folder)
    assert not results([run])  # they are no accuracies of images
    table, *classes = judgements([run], "segment")
    assert table.head == ("data", "mean IoU", "pixel accuracy", "class accuracy")
    assert table.rows == (
        ("streets, held out, 2,000 images", "40.0 %", "80.0 %", "50.0 %"),
        ("other, 2,000 images, several sizes", "40.0 %", "80.0 %", "50.0 %"),
    )
    assert [found.folded for found in classes] == [True, True]
    assert classes[0].head == ("class", "share of pixels", "IoU", "accuracy")
    assert classes[0].rows == (
        ("<i>pole", "0.0 %", "0.0 %", "–"),
        ("road", "40.0 %", "30.0 %", "40.0 %"),
        ("sky", "60.0 %", "90.0 %", "95.0 %"),
    )


def test_a_run_that_was_also_judged_at_several_sizes(tmp_path):
    folder = write_segmenter(tmp_path / "run")
    document = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(document | {"multi_scale": document | {"miou": 0.45}}))
    assert [row[:2] for row in judgements([read_run(folder)], "segment")[0].rows] == [
        ("streets, held out, 2,000 images", "40.0 %"),
        ("streets, held out, 2,000 images, several sizes", "45.0 %"),
    ]


def test_results_that_cannot_be_read_are_named(tmp_path):
    folder = write_segmenter(tmp_path / "run")
    (folder / "results.json").write_text('{"data": "st')
    (folder / "confusion.png").write_bytes(b"no picture")
    part = section([read_run(folder)], "evaluation")
    assert part.lines == ("results.json of run could not be read.",) and not part.tables and not part.sheets


def test_a_run_that_has_just_begun(tmp_path):
    run = read_run(write_segmenter(tmp_path / "run", finished=False, evaluations=1))
    use, evaluation = section([run], "use"), section([run], "evaluation")
    assert not run.finished and use.missing == "There is no segmenter yet: it is written at the end of the run."
    assert evaluation.empty and evaluation.missing == "No evaluation yet: results.json is written at the end."


def test_without_labels_there_is_no_key_figure(tmp_path):
    folder = write_segmenter(tmp_path / "run", evaluations=0)
    write_rows(folder, [{"kind": "held_out", "step": 0, "epoch": 0.0, "miou": None, "aacc": None, "macc": None}])
    assert not {"mean IoU", "pixel accuracy"} & key_figures(read_run(folder)).keys()


def test_two_segmenters(folder, tmp_path):
    runs = read_runs([folder, write_segmenter(tmp_path / "other", scale=2.0)])
    assert [part.anchor for part in sections(runs)] == [
        *("options", "curves", "pictures", "gradients", "evaluation", "incidents")
    ]
    first, second = lines_of(runs, "decode")
    assert second.y[-1] == pytest.approx(2 * first.y[-1])
    assert [line.label for line in lines_of(runs, "miou")] == ["b c", "other"]
    assert [row[0] for row in judgements(runs, "segment")[0].rows] == ["b c", "other"] and len(confusions(runs)) == 2
    assert ("mean IoU", "40.0 %", "40.0 %") in side_by_side(runs).rows


def test_a_segmenter_beside_a_detector(folder, tmp_path):
    """Each has its own tables and charts, and the words of both are said."""
    runs = [str(folder), str(write_detector(tmp_path / "detector"))]
    path = report(runs, out=str(tmp_path / "page.html"))
    text = html.unescape(words(path))
    assert "Average precision (AP) as COCO computes it" in text and "IoU is the overlap of what is said" in text
    assert "streets, held out, 2,000 images" in text and "coco, held out, 5,000 images" in text
    assert {"decode", "rpn_class", "miou", "box_ap"} <= set(data_of(path)["charts"])


def test_curves_during_the_run():
    """Of the values beside the loss the three figures alone are drawn."""
    assert _figures({"miou", "aacc", "macc", "other"}) == (["aacc", "macc", "miou"], "IoU and accuracy")
    assert _figures({"pair_1", "pair_2"}) == (["pair_1", "pair_2"], "loss")
    assert _figures({"top1", "top5"})[1] == "accuracy" and _figures(set()) == (["loss"], "loss")
