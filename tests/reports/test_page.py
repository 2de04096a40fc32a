"""The page as text: what it has, what it leaves out and why, its size, what it must escape, comparisons."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from written_runs import TITLES, write_results, write_rows, write_run

from mirl.errors import UserError
from mirl.reports.charts import RAMP, ramp
from mirl.reports.contents import read_run, read_runs
from mirl.reports.curves import POINTS, curves
from mirl.reports.page import LIMIT, report, write_report
from mirl.reports.panels import galleries
from mirl.reports.sections import sections

ANCHORS = [
    *("overview", "curves", "pictures", "blocks", "gradients", "diagnosis", "evaluation", "use", "options", "skipped"),
    "incidents",
]


def words(path):
    """Return what a reader of the page's text sees, without scripts and styles."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def data_of(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def anchors(path):
    return re.findall(r'<section id="(\w+)">', path.read_text())


def test_a_real_run(real):
    path = write_report(real)
    assert path == real / "report.html" and path.stat().st_size < LIMIT
    assert anchors(path) == ANCHORS
    text = words(path)
    for part in ("finished after 12 steps", "shapes:106", "vit_ti_4", "held-out loss", "no stop, no skipped step"):
        assert part in text
    assert f'timm.create_model("local-dir:{real}/encoder", pretrained=True)' in text.replace("&#34;", '"')
    assert f"mirl pretrain --config {real}/config.yaml --out runs/again" in text
    assert f"No evaluation yet: mirl knn --weights {real} --data LABELLED" in text
    data = data_of(path)
    assert {"loss", "lr", "grad_norm", "images_per_second", "data_wait", "blocks_rank", "blocks_knn"} <= set(
        data["charts"]
    )
    assert [gallery["pairs"] for gallery in data["galleries"]] == [[["", ["main", "residual", "sum"]]]]
    assert {"gradients_mean", "gradients_time"} <= set(data["charts"])


def test_everything_that_a_run_may_have(rich, tmp_path):
    path = report(rich, out=str(tmp_path / "page.html"))  # as mirl.pretrain returns it
    assert words(report(str(rich), out=str(tmp_path / "same.html"))) == words(path)
    text = words(path)
    for part in (
        "fine-tuned",
        "40.0 to 60.0 %",
        "probe, linear, block 6",
        "calibration error 3.0%",
        "knn, k=10, block 6",
    ):
        assert part in text
    charts = data_of(path)["charts"]
    assert {"pair_1_all", "readout_1", "gradients_mean", "gradients_time"} <= set(charts)
    (gallery,) = data_of(path)["galleries"]
    assert [name for name, _ in gallery["pairs"]] == ["pair 1", "pair 2"]
    assert [len(gallery["moments"]), len(gallery["cells"][0]), len(gallery["cells"][0][0])] == [3, 3, 6]
    assert "<img" in path.read_text() and not re.search(r"<img(?![^>]*\balt=)", path.read_text())


def test_nothing_is_loaded(rich, tmp_path):
    text = report([str(rich)], out=str(tmp_path / "page.html")).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|img|iframe)[^>]*\bsrc=\"(?!data:)", text)
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']


def test_importing_the_page_does_not_import_bokeh():
    code = "import sys, mirl.reports.page; sys.exit(bool({'bokeh', 'jinja2', 'tensorboard'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Bad input and unfinished runs


def test_a_run_without_a_step(tmp_path):
    (tmp_path / "config.yaml").write_text("model: vit_ti_12\nmethod: mirl\nepochs: 3\n")
    path = write_report(tmp_path)
    assert anchors(path) == ANCHORS and "Bokeh" not in path.read_text().partition("<main>")[0]
    text = words(path)
    for part in ("no step recorded yet", "metrics.jsonl is missing or empty", "no encoder yet", "No pictures yet"):
        assert part in text


def test_a_run_that_stopped(tmp_path):
    folder = write_run(tmp_path / "run", finished=False, epochs=8, evaluations=1)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "held_out", "st')
    incidents = [
        {"kind": "incident", "step": 7, "time": "2026-01-02T03:04:05+00:00", "what": what, "text": f"text of {what}"}
        for what in ("stopped", "unusable file")
    ]
    write_rows(folder, [{}, *incidents])
    text = words(write_report(folder))
    assert "still running or stopped at step 40 of 80 (last written 2" in text
    assert "text of stopped" in text and "text of unusable file" not in text  # files have a table of their own


def test_skipped_images_are_listed_up_to_a_hundred(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "log.txt", "a") as log:
        log.writelines(f"2026-01-02 03:04:05 skipped {i:04}.jpg: is empty (0 bytes)\n" for i in range(1234))
    text = words(write_report(folder))
    assert "the first 100 of 1,234" in text and "0099.jpg" in text and "0100.jpg" not in text


def test_values_that_are_missing(tmp_path):
    folder = write_run(tmp_path / "run")
    nothing = {"loss": None, "grad_norm": None, "lr": None, "seconds": 0, "data_wait": None, "pair_1": None}
    write_rows(folder, [
        {"kind": "train", "step": 41, "epoch": 4.0, **nothing},
        {"kind": "held_out", "step": 41, "epoch": 4.0, "loss": None, "pair_1": None},
        {"kind": "blocks", "step": 41, "epoch": 4.0, "rank": [None, 2.0, float("nan")], "similarity": [None]},
        {"kind": "gradients", "step": 41, "epoch": 4.0, "encoder": None, "blocks": [None] * 6},
    ])  # fmt: skip
    assert "2 → 0.04878" in words(write_report(folder))


def test_pictures_that_cannot_be_read(tmp_path):
    folder = write_run(tmp_path / "run", evaluations=4)
    panels = sorted((folder / "pictures" / "panels").iterdir())
    panels[0].unlink()
    panels[1].write_bytes(panels[1].read_bytes()[:100])
    Image.new("RGB", (5, 5)).save(panels[2], format="WEBP")
    path = write_report(folder)
    assert "3 pictures could not be read, e.g. pictures/panels/step_00000000.webp" in words(path)
    assert [gallery["moments"] for gallery in data_of(path)["galleries"]] == [[[40, 4.0]]]


def test_a_run_of_fine_tuning(tmp_path):
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("weights: runs/a\ndata: labelled\nepochs: 2\nout: runs/b\n")
    places = [{"step": step, "epoch": float(step)} for step in (1, 2)]
    write_rows(folder, [{"kind": "train", **place, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0} for place in places])
    write_rows(
        folder, [{"kind": "held_out", **place, "loss": 1.0, "top1": 0.5, "average_top1": 0.6} for place in places]
    )
    Image.fromarray(np.zeros((900, 2000, 3), np.uint8)).save(folder / "pictures" / "step_00000002.png")
    path = write_report(folder)
    text = words(path)
    assert "What the classifier is shown" in text and "pictures of held-out images at step 2" in text
    assert "Fine-tuning records no figures of blocks" in text and "mirl finetune --config" in text
    assert 'alt="run: pictures of held-out images at step 2" width="1100" height="495"' in path.read_text()
    assert "top1_all" in data_of(path)["charts"] and "50.0 %" in text


def test_what_the_diagnosis_says(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "mirl diagnose --weights" in words(write_report(folder))
    (folder / "diagnosis").mkdir()
    (folder / "diagnosis" / "diagnosis.json").write_text(
        json.dumps({"encoders": [{"verdict": ["all blocks learned"]}]})
    )
    Image.new("RGB", (50, 40)).save(folder / "diagnosis" / "diagnosis.png")
    path = write_report(folder)
    assert "all blocks learned" in words(path) and 'alt="run: charts of the diagnosis"' in path.read_text()


def test_a_place_that_cannot_be_written(rich, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*page.html: .*; choose another --out"):
        report([str(rich)], out=str(tmp_path / "file" / "page.html"))


# Text of users


def test_names_of_users_are_text(tmp_path):
    evil = '<script>alert("1")</script>&\'</script>'
    folder = write_run(tmp_path / "<b>run", data=evil, out=evil, titles=[evil, "masked", f"{evil}: main"])
    write_results(folder, data=evil)
    with open(folder / "log.txt", "a") as log:
        log.write(f"2026-01-02 03:04:05 skipped {evil}.jpg: is <i>empty\n")
    write_rows(folder, [{"kind": "incident", "step": 1, "time": evil, "what": evil, "text": evil}])
    path = report([str(folder)], out=str(tmp_path / "page.html"))
    text = path.read_text()
    assert "&lt;script&gt;alert(&#34;1&#34;)" in text and "<script>alert" not in text
    assert "<b>run" not in text and "<i>empty" not in text and text.count("</script>") == 3
    assert data_of(path)["galleries"][0]["pairs"] == [[evil, ["main"]]]


# Size


def test_a_long_run_of_many_large_pictures_stays_small(tmp_path):
    titles = [*TITLES, *(f"pair 3: {part}" for part in ("main", "residual", "sum"))]
    size = {"steps": 20_000, "evaluations": 21, "blocks": 48, "side": 224, "images": 6, "titles": titles}
    folder = write_run(tmp_path / "run", **size, alike=True)
    path = write_report(folder)
    assert 2_000_000 < path.stat().st_size < LIMIT
    (gallery,) = data_of(path)["galleries"]
    assert len(gallery["moments"]) >= 5 and max(gallery["height"], gallery["width"]) <= 160
    assert gallery["moments"][0][0] == 0 and gallery["moments"][-1][0] == 20_000
    assert max(len(line.y) for chart in curves([read_run(folder)]) for line in chart.lines) <= POINTS


@pytest.mark.parametrize("budget", [1_000_000, 30_000, 4_000, 10])
def test_pictures_keep_to_their_budget(rich, budget):
    found = galleries([read_run(rich)] * 2, budget)
    sizes = [len(source) for g in found for images in (g.fixed, *g.cells) for image in images for source in image]
    assert sum(sizes) <= budget and len(found) == 2


# Several runs


def test_a_comparison(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        write_run(tmp_path / "mirl"),
        write_run(tmp_path / "mae", method="mae", titles=["original", "masked", "reconstruction"]),
    ]
    for run, top1 in zip(runs, (0.3, 0.6), strict=True):
        write_results(run, top1=top1)
    path = report([str(run) for run in (*runs, real)])
    assert path.resolve() == tmp_path / "comparison.html" and path.stat().st_size < LIMIT
    assert anchors(path) == ["overview", "options", *ANCHORS[1:7], "incidents"]
    text = words(path)
    assert "mirl and mae and run" in text and "method mirl mae mirl" in text
    data = data_of(path)
    assert [len(gallery["moments"]) for gallery in data["galleries"]] == [1, 1, 1]
    assert [gallery["pairs"][0][1][-1] for gallery in data["galleries"]] == ["sum", "reconstruction", "sum"]
    assert {"pair_1", "pair_2", "gradients_mean", "readout_1", "blocks_rank"} <= set(data["charts"])


def test_a_comparison_shows_each_run_in_its_colour(tmp_path):
    runs = read_runs([write_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")])
    for part in sections(runs):
        for chart in part.charts:
            assert set(chart.legend) == {"a", "b", "c"} and len(set(chart.legend.values())) == 3
            assert all(name in chart.summary for name in "abc")


def test_many_runs_stay_small(tmp_path):
    runs = [write_run(tmp_path / f"run{i:02}", steps=500, evaluations=2, blocks=24, seed=i) for i in range(12)]
    path = report([str(run) for run in runs], out=str(tmp_path / "page.html"))
    assert path.stat().st_size < LIMIT and "12 runs" in words(path)


def test_the_scale_of_colours():
    assert [ramp(share) for share in (0, 0.5, 1)] == ["#" + "".join(f"{v:02x}" for v in colour) for colour in RAMP]
    assert ramp(-1) == ramp(0) and ramp(2) == ramp(1)


@pytest.fixture
def small(tmp_path):
    """A run of options alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: mirl\n")
    return folder


@pytest.mark.parametrize(
    "path, content",
    [
        ("results.json", {"weights": {"top1": 0.5, "interval": 3}}),
        ("results.json", {"weights": {"top1": 0.5, "per_class": [1, 2]}}),
        ("results.json", {"average": 0.5}),
        ("readouts/a.json", {"options": [1], "blocks": {"1": {"knn": {"top1": 0.3}}}}),
        ("readouts/a.json", {"blocks": {"1": {"knn": {"top1": 0.3}}, "2": None}}),
        ("readouts/a.json", {"blocks": {"1": {"knn": {"top1": 0.1, "interval": 4}}, "2": {"knn": {"top1": 0.1}}}}),
        ("evaluations/x/results.json", {"accuracy": [1]}),
        ("diagnosis/diagnosis.json", {"encoders": [{"verdict": 3}]}),
        ("diagnosis/diagnosis.json", {"encoders": [None]}),
        ("diagnosis/diagnosis.json", [[1, 2]]),
    ],
    ids=str,
)
def test_results_of_another_form_are_named(small, path, content):
    (small / path).parent.mkdir(parents=True, exist_ok=True)
    (small / path).write_text(json.dumps(content))
    assert f"{path} of run could not be read." in words(write_report(small))


def test_results_that_lack_something_are_shown_as_far_as_they_go(tmp_path):
    folders = [write_run(tmp_path / name, steps=2, evaluations=1, images=1) for name in "ab"]
    for path, content in {
        "diagnosis/diagnosis.json": {"encoders": [{}, {"verdict": ["a verdict"]}]},
        "readouts/probe.json": {"command": "probe", "blocks": {"last": {"linear": {"top1": 0.5}}, "1": {}}},
        "readouts/knn.json": {"blocks": {"1": {"k=10": {"top1": 0.5, "interval": [None, 1]}}}},
        "readouts/nothing.json": {"blocks": {"1": {}, "2": {}}},
    }.items():
        (folders[0] / path).parent.mkdir(exist_ok=True)
        (folders[0] / path).write_text(json.dumps(content))
    write_rows(folders[0], [
        {"kind": "train", "step": 1, "epoch": 1, "loss": "x"},
        {"kind": "gradients", "step": 1, "epoch": 1, "encoder": 1, "blocks": [1, "a"]},
    ])  # fmt: skip
    for runs in (folders[:1], folders):
        text = words(report([str(run) for run in runs], out=str(tmp_path / "page.html")))
        assert "a verdict" in text and "could not be read" not in text
