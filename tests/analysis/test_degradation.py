"""What was planted in an encoder is what the verdict names; what was not measured is not said."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_classes import PLAIN, write_encoder, write_patterns

import mirl
from mirl.analysis.beginnings import distances, first_seed
from mirl.analysis.degradation import diagnose
from mirl.analysis.diagnosis import ReadOut, compare, spans
from mirl.analysis.reinitialisation import Trial, counts
from mirl.analysis.verdict import findings, verdict
from mirl.errors import UserError
from mirl.reports.contents import names_of
from mirl.tasks.settings.diagnosis import DiagnoseOptions
from mirl.tasks.weights import open_weights

LOOK = {"data": "shapes:24:32", "images": 24, "workers": 0}


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """Class folders of four patterns: 160 images to train on, 160 to test on."""
    return str(write_patterns(tmp_path_factory.mktemp("data") / "patterns", train=40, val=40))


@pytest.fixture
def encoder(tmp_path):
    """An encoder of 6 blocks of random weights, each of which does something else."""
    return write_encoder(tmp_path / "encoder", depth=6, size=(32, 32))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(tiny, run_folder):
    """A run of one step; made once, not to be changed."""
    options = tiny | {"epochs": 1, "batch_size": 98, "warmup_epochs": 0, "base_lr": 2.6e-4, "block_figures": False}
    return run_folder if run_folder.exists() else mirl.pretrain(**options, out=run_folder)


def changed(encoder, change):
    """Change an encoder's tensors in place."""
    path = f"{encoder}/model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def silence(*blocks):
    """Return what makes blocks, from 1, identities."""
    names = [f"blocks.{b - 1}.{n}.{p}" for b in blocks for n in ("attn.proj", "mlp.fc2") for p in ("weight", "bias")]
    return lambda state: [state[name].zero_() for name in names]


def drown(*blocks):
    """Return what makes blocks, from 1, add so large a constant to tokens that float32 keeps nothing else."""

    def change(state):
        for block in blocks:
            state[f"blocks.{block - 1}.mlp.fc2.bias"][:] = 1e14 * torch.randn(48, generator=torch.Generator())

    return change


def said(folder, number=0):
    """Return what was written of one encoder; JSON must be strict."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((folder / "diagnosis.json").read_text(), parse_constant=refuse)
    return written | written["encoders"][number]


def kinds(found):
    return {finding["kind"]: finding for finding in reversed(found["findings"])}


def test_blocks_that_do_nothing_are_named_and_no_others(encoder, tmp_path, capfd):
    diagnose(weights=encoder, **LOOK, out=tmp_path / "healthy")
    healthy = said(tmp_path / "healthy")
    assert "idle" not in kinds(healthy) and healthy["verdict"][0].startswith("all 6 blocks change their tokens")
    changed(encoder, silence(2, 5, 6))
    capfd.readouterr()
    (found,) = diagnose(weights=encoder, **LOOK, out=tmp_path / "idle").values()
    assert found.measures.update[4] == 0 and found.measures.kept[4] == pytest.approx(1, abs=1e-4)
    idle = said(tmp_path / "idle")
    assert kinds(idle)["idle"]["blocks"] == [2, 5, 6]
    assert idle["verdict"][0] == "blocks 2, 5-6 of 6 add next to nothing."
    assert (
        "without them the last tokens have CKA 1.000" in idle["verdict"][1] and "need not harm" in idle["verdict"][-1]
    )
    assert "encoder: blocks 2, 5-6 of 6 add next to nothing." in capfd.readouterr().out


def test_an_encoder_in_which_most_blocks_do_nothing(encoder, tmp_path):
    changed(encoder, silence(2, 3, 4, 5, 6))
    diagnose(weights=encoder, **LOOK, out=tmp_path)
    assert kinds(said(tmp_path))["idle"]["blocks"] == [2, 3, 4, 5, 6]


def test_small_updates_that_later_blocks_need_are_not_called_nothing(encoder, tmp_path):
    d = diagnose(weights=encoder, **LOOK, out=tmp_path)["encoder"]
    small = [0.3, 0.3, 0.005, 0.3, 0.3, 0.3]
    d.measures.__dict__.update(update=small, kept=[1.0] * 6)
    for without, words in (
        (0.7, "block 3 of 6 hardly changes its tokens, yet what follows needs it."),
        (0.99, "block 3 of 6 adds next to nothing."),
        (math.nan, "block 3 of 6 hardly changes its tokens; whether what follows needs it cannot be told."),
    ):
        d.__dict__.update(without=without)
        assert verdict(d, findings(d))[0] == words
    assert findings(d)[0].sentence.startswith("Block 3 changes tokens by 0.5 % of their norm")
    d.measures.__dict__.update(kept=[0.5] * 6)  # small beside what all tokens share, and yet all that differs
    slight = {finding.kind: finding for finding in findings(d)}
    assert "idle" not in slight and "yet what differs between images has CKA 0.500" in slight["slight"].sentence
    d.measures.__dict__.update(kept=[1.0] * 6)
    right = torch.tensor([[True] * 30] * 3 + [[False] * 30] * 4)  # only block 3 takes away what is read out
    read = ReadOut(right, torch.zeros(30), 60)
    d.__dict__.update(read_outs={"linear": read, "knn": read}, fresh_read_outs={"linear": read, "knn": read})
    slight = {finding.kind: finding for finding in findings(d)}
    assert "idle" not in slight and slight["slight"].blocks == (3,)
    assert "yet the linear read-out finds 100.0 % before and 0.0 % after it, the k-NN" in slight["slight"].sentence


def test_lost_classes_are_told_with_the_noise_of_the_test_images(encoder, patterns, tmp_path):
    options = {"weights": encoder, "data": patterns, "labels": True, "images": 30, "workers": 0}
    kept = diagnose(**options, out=tmp_path / "kept")["encoder"]
    assert "lost" not in kinds(said(tmp_path / "kept")) and min(kept.read_outs["linear"].top1[1:]) > 0.6
    assert kinds(said(tmp_path / "kept"))["no_better"]["blocks"] == [1, 2, 3, 4, 5, 6]  # it was never trained
    assert "after blocks 1-6 no read-out is shown to be better" in said(tmp_path / "kept")["verdict"][0]
    changed(encoder, drown(5, 6))
    lost = diagnose(**options, out=tmp_path / "lost")["encoder"]
    found = said(tmp_path / "lost")
    linear = found["read_outs"]["linear"]
    assert linear["top1"] == lost.read_outs["linear"].top1 and len(linear["top1"]) == 1 + 6
    assert linear["top1"][6] < 0.5 and (linear["images"], linear["fitted_on"]) == (160, 160)
    assert all(
        low < top1 < high or top1 in (low, high)
        for top1, (low, high) in zip(linear["top1"], linear["interval"], strict=True)
    )
    finding = kinds(found)["lost"]
    assert finding["blocks"] == [5, 6] and finding["evidence"]["top1"]["6"] == linear["top1"][6]
    assert f"{100 * linear['top1'][6]:.1f} % after block 6" in finding["sentence"] in found["verdict"]
    linear = lost.read_outs["linear"]
    lost.fresh_read_outs["linear"] = replace(linear, right=torch.zeros_like(linear.right))  # now all are better
    assert "after blocks 5-6 the linear read-out is below its best" in verdict(lost, findings(lost))[0]
    assert kinds(found)["rank"]["blocks"][-1] == 6


def test_tokens_that_become_alike_are_told(encoder, tmp_path):
    changed(encoder, lambda state: [drown(5)(state), state["pos_embed"].mul_(20)])
    diagnose(weights=encoder, **LOOK, out=tmp_path)
    found = said(tmp_path)
    assert kinds(found)["collapsed"]["blocks"] == [5, 6] and "after blocks 5-6 the tokens of" in found["verdict"][0]


def test_the_comparison_of_read_outs_by_hand():
    one, other = torch.tensor([True] * 60 + [False] * 40), torch.tensor([True] * 45 + [False] * 55)
    test = compare(one, other)
    assert test.share == pytest.approx(0.15) and test.p == pytest.approx(2 * 0.5**15)
    n, more, less = 102, 15.5, 0.5  # Agresti and Min: half an image more in each of four counts
    half = 1.96 * np.sqrt(more + less - (more - less) ** 2 / n) / n
    assert (test.low, test.high) == pytest.approx((15 / n - half, 15 / n + half))
    assert compare(one, one).p == 1 and compare(one, ~one).share == pytest.approx(0.2)
    assert compare(one, one).high == -compare(one, one).low == pytest.approx(1.96 / n)
    few = torch.ones(3, dtype=torch.bool)
    assert compare(few, ~few).high == 1 and str(compare(few, ~few)).startswith("100.0 points (95 %: ")


def test_weights_are_where_they_began_and_move_with_training(run, tmp_path):
    opened = open_weights(str(run))
    assert first_seed(str(run)) == (0, "")
    fresh = opened.__class__(**vars(opened) | {"state": opened.build(trained=False, seed=0).state_dict()})
    assert distances(fresh, 0) == [0.0] * 4
    own = shutil.copytree(run, tmp_path / "own")
    few = shutil.copytree(run, tmp_path / "few")
    diagnose(weights=few, **LOOK)
    assert "fresh" not in kinds(said(few / "diagnosis"))  # of 384 patches nothing is said that rests on chance
    (found,) = diagnose(weights=own, **LOOK | {"data": "shapes:40:32", "images": 40}).values()
    assert all(0.0005 < moved < 0.01 for moved in found.distance)  # one step; other first weights are 1.4 away
    assert min(distances(opened, 1)) > 1
    assert (own / "diagnosis" / "diagnosis.png").exists()
    written = said(own / "diagnosis")
    assert kinds(written)["unmoved"]["blocks"] == [1, 2, 3, 4] and kinds(written)["fresh"]["blocks"] == [1, 2, 3, 4]
    assert written["verdict"][0] == "blocks 1-4 of 4 hardly trained: their weights are almost the first ones."


def test_where_weights_began_is_not_guessed(encoder, run, tmp_path):
    assert first_seed(encoder) == (None, "only a folder of mirl pretrain says how its weights began")
    later = shutil.copytree(run, tmp_path / "later")
    config = (later / "config.yaml").read_text()
    (later / "config.yaml").write_text(config.replace("weights: null", "weights: runs/first"))
    assert first_seed(str(later)) == (None, "the run began with the weights of runs/first")


def test_a_classifier_is_looked_at_without_its_head(encoder, tmp_path):
    data = write_patterns(tmp_path / "few", train=8, val=3)
    run = mirl.finetune(weights=encoder, data=data, **PLAIN | {"epochs": 1}, out=tmp_path / "classifier")
    (found,) = diagnose(weights=run, data=data, labels=True, images=12, workers=0).values()
    assert found.distance is None and encoder in found.distance_unknown and len(found.read_outs["knn"].top1) == 1 + 6


def test_encoders_of_any_depth_and_form_side_by_side(encoder, run, patterns, tmp_path):
    wide = write_encoder(tmp_path / "wide", depth=3, size=(16, 48))
    options = {"data": patterns, "labels": True, "images": 16, "workers": 0, "labelled_images": 60}
    found = diagnose(weights=[encoder, wide, run], **options, out=tmp_path / "all")
    assert list(found) == ["encoder", "wide", "run"] and [d.depth for d in found.values()] == [6, 3, 4]
    written = said(tmp_path / "all")
    assert len(written["encoders"]) == 3 and len(written["side_by_side"]) == 4 and written["options"]["images"] == 16
    assert written["versions"].keys() == {"torch", "timm", "mirl"}
    with Image.open(tmp_path / "all" / "diagnosis.png") as picture:
        assert picture.width > 1500 and np.asarray(picture.convert("L")).std() > 10
    again = diagnose(weights=[encoder, run], **LOOK | {"image_size": (16, 32)}, out=tmp_path / "again")
    assert all(d.images == 24 for d in again.values())


def test_no_fine_tuning_is_written_outside_of_out(tmp_path):
    data = write_patterns(tmp_path / "few", train=8, val=3)
    given = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        given.append(write_encoder(tmp_path / place / "encoder"))
    before = sorted((tmp_path / "a").rglob("*"))
    options = {"data": data, "workers": 0, "reinit": True, "reinit_blocks": [0], "seeds": 1, "reinit_epochs": 1}
    found = diagnose(weights=given, **options, out=tmp_path / "out")
    assert list(found) == ["a/encoder", "b/encoder"] and sorted((tmp_path / "a").rglob("*")) == before
    assert all((tmp_path / "out" / "reinit" / name / "k00_seed0").is_dir() for name in found)
    assert names_of([("/", "b", "run"), ("/", "x", "b", "run")]) == ["b/run", "x/b/run"]


def test_encoders_that_tell_the_same_images_are_equal(encoder, patterns, tmp_path):
    twin = shutil.copytree(encoder, tmp_path / "twin")
    options = {"data": patterns, "labels": True, "images": 16, "workers": 0, "labelled_images": 30}
    diagnose(weights=[encoder, str(twin)], **options, out=tmp_path / "out")
    assert "encoder and twin are equal on each of 10 test images, which leave up to 16." in said(tmp_path / "out")[
        "side_by_side"
    ][2]  # fmt: skip


def test_images_without_any_difference_are_no_reason_to_fail(encoder, tmp_path):
    (tmp_path / "grey").mkdir()
    for index in range(4):
        Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(tmp_path / "grey" / f"{index}.png")
    changed(encoder, lambda state: [drown(3)(state), state["pos_embed"].zero_()])
    diagnose(weights=encoder, data=tmp_path / "grey", workers=0, out=tmp_path / "out")
    written = said(tmp_path / "out")
    assert written["measures"]["cka"][0][0] is None and "idle" not in kinds(written)


def test_fresh_last_blocks_are_fine_tuned_once_and_resumed(tmp_path, capfd):
    options = {
        "weights": write_encoder(tmp_path / "encoder"), "reinit": True, "reinit_blocks": [2], "seeds": 1,
        "data": write_patterns(tmp_path / "few", train=8, val=3), "reinit_epochs": 1, "workers": 0, "out": tmp_path,
    }  # fmt: skip
    diagnose(**options)
    assert sorted(path.name for path in (tmp_path / "reinit").iterdir()) == ["began_with.txt", "k00_seed0", "k02_seed0"]
    first = said(tmp_path)
    assert [(t["count"], t["seed"], t["images"]) for t in first["trials"]] == [(0, 0, 12), (2, 0, 12)]
    assert "for 1 epoch; 1 seed, so no spread is known; 12 test images" in kinds(first)["reinit"]["sentence"]
    log = (tmp_path / "reinit" / "k00_seed0" / "log.txt").read_text()
    (tmp_path / "reinit" / "k02_seed0" / "results.json").unlink()  # as if it had been killed before the end
    capfd.readouterr()
    diagnose(**options)
    output = capfd.readouterr().out
    assert "2 fine-tunings of 1 epoch, 1 of them are there; 1 takes about" in output and "1 of 1 is done" in output
    assert (tmp_path / "reinit" / "k00_seed0" / "log.txt").read_text() == log
    assert [trial["count"] for trial in said(tmp_path)["trials"]] == [0, 2]
    diagnose(**options | {"workers": 1, "image_size": 16})  # as many as before, and the size that it has
    with pytest.raises(UserError, match="k00_seed0 was fine-tuned with --epochs 1, not 2; choose another --out or"):
        diagnose(**options | {"reinit_epochs": 2})
    changed(tmp_path / "encoder", lambda state: state["blocks.0.mlp.fc1.bias"].add_(1e-3))
    with pytest.raises(UserError, match="reinit began with other weights or images; remove it or choose another"):
        diagnose(**options)


@pytest.mark.parametrize(
    ("top1", "kind", "words"),
    [
        ([(0.50, 0.51, 0.52), (0.60, 0.61, 0.63)], "harmed", "10.3 points better than the trained ones: at this"),
        ([(0.50, 0.51, 0.52), (0.52, 0.53, 0.545)], "reinit", "more than seeds but not more than the test images"),
        ([(0.50, 0.58, 0.54), (0.55, 0.57, 0.59)], "reinit", "3.0 points better than the trained ones, within what"),
        ([(0.50, 0.51, 0.52), (0.40, 0.41, 0.43)], "reinit", "9.7 points worse than the trained ones. Accuracy"),
        ([(0.50, 0.58, 0.54), (0.51, 0.55, 0.53)], "reinit", "worse than the trained ones, within what seeds leave"),
        ([(0.50, 0.51, 0.52), (0.50, 0.51, 0.52)], "reinit", "fine-tune as well as the trained ones. Accuracy"),
        ([(0.50, 0.51), (0.90, 0.92)], "reinit", "within what seeds leave open: no harm"),  # two seeds are too few
        ([(0.50,), (0.90,)], "reinit", "within what seeds leave open: no harm"),
    ],
)
def test_harm_is_what_exceeds_seeds_and_test_images(encoder, tmp_path, top1, kind, words):
    d = diagnose(weights=encoder, **LOOK, out=tmp_path)["encoder"]
    trials = [Trial(2 * i, seed, value, 1000) for i, both in enumerate(top1) for seed, value in enumerate(both)]
    d.__dict__.update(trials=trials)
    (found,) = (finding for finding in findings(d) if finding.kind in ("harmed", "reinit"))
    assert found.kind == kind and words in found.sentence
    assert found.blocks == ((5, 6) if kind == "harmed" else ())


def test_default_numbers_of_fresh_blocks():
    assert counts(12, None) == [0, 2, 3, 4, 6] and counts(54, None) == [0, 7, 14, 20, 27]
    assert counts(1, None) == [0, 1] and counts(12, [5, 3]) == [0, 3, 5]


def test_runs_of_blocks_have_one_name():
    assert spans([3]) == "block 3" and spans([1, 2, 3]) == "blocks 1-3" and spans([7, 9, 10]) == "blocks 7, 9-10"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": []}, "--weights is missing; give a run folder or a timm name, or several"),
        ({"weights": "pixels"}, "raw pixels have no blocks; give --weights of encoders"),
        ({"weights": ["{encoder}", "{encoder}/"]}, "encoder/ was given twice; leave one out"),
        ({"weights": "nowhere"}, "'nowhere' is neither a file"),
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"data": "{tmp}/broken"}, "none of 2 images can be read, e.g. .*; check the data"),
        ({"data": "{tmp}/broken", "labels": True}, "has no train/ with val/ or test/"),
        ({"data": "{tmp}/broken", "reinit": True}, "has no train/ with val/ or test/"),
        ({"reinit": True, "reinit_blocks": [7]}, "--reinit_blocks 7 is not allowed: the encoder has 6 blocks"),
        ({"reinit_blocks": [1]}, "--reinit_blocks has no effect without --reinit; add it"),
        ({"val_fraction": 0.2}, "--val_fraction has no effect without --labels; add it"),
        ({"images": 0}, "--images 0 is not allowed; give 1 or more"),
        ({"seeds": 0}, "--seeds 0 is not allowed; give 1 or more"),
        ({"image_size": 20}, "do not tile an image of 20x20"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(encoder, tmp_path, options, message):
    (tmp_path / "broken").mkdir()
    for index in range(2):
        (tmp_path / "broken" / f"{index}.png").write_bytes(b"no image")
    put = {"{encoder}": encoder, "{tmp}": str(tmp_path)}

    def filled(value):
        for mark, text in put.items():
            value = value.replace(mark, text) if isinstance(value, str) else value
        return [filled(part) for part in value] if isinstance(value, list) else value

    given = {"weights": encoder, **LOOK, "out": tmp_path / "out"} | {name: filled(v) for name, v in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        diagnose(**given)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_results_go_where_the_weights_are_if_these_are_one_run(run):
    assert DiagnoseOptions(weights=run).folder == run / "diagnosis"
    assert str(DiagnoseOptions(weights=[str(run), "vit_small_patch16_224"]).folder) == "diagnosis"
    assert str(DiagnoseOptions(weights="vit_small_patch16_224").folder) == "diagnosis"
