"""A study's file makes the cells that it says, in the order that it says; a mistake in it is one line."""

import pytest
from small_studies import SMALL, small_study, write_study

from mirl.errors import UserError
from mirl.studies.definition import Cell, find_study, read_study
from mirl.studies.results import find_results


def test_cells_come_panel_by_panel_and_once(tmp_path):
    study = small_study(tmp_path)
    assert [cell.name for cell in study.cells()] == [
        "mae_2_seed0", "mae_4_seed0", "mirl_2_seed0", "mirl_4_seed0",
        "mae_2_seed1", "mae_4_seed1", "mirl_2_seed1", "mirl_4_seed1",
        "mirl_4_4_seed0", "mirl_4_4_seed1",
        "mae_4_replaced2_seed0", "truncated_mae_4_replaced2_seed0",
        "mae_4_replaced2_seed1", "truncated_mae_4_replaced2_seed1",
    ]  # fmt: skip
    assert [panel.axis for panel in study.panels] == ["depth", "method", "replaced"]
    assert study.panels[2].cell("mae", 2, 1) == Cell("mae", 4, 2, 1)
    assert study.name == "small" and study.results == tmp_path / "studies" / "results" / "small"


def test_a_study_is_a_name_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no studies/cifar.yaml; give the path of a YAML file"):
        find_study("cifar")
    path, _ = write_study(tmp_path), write_study(tmp_path, "other")
    assert find_study("small") == path.relative_to(tmp_path) and find_study(str(path)) == path
    with pytest.raises(UserError, match="there is no studies/cifar.yaml; give other, small or a YAML file"):
        find_study("cifar")


def panel(**changes):
    return [SMALL["panels"][0] | changes]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "has no option 'seed'; choose seeds"),
        ({"decoder_blocks": None}, "has no decoder_blocks; add it"),
        ({"images": "many"}, "images 'many' is not allowed; give a whole number"),
        ({"seeds": 3}, "seeds 3 is not allowed; give a list, each of it a whole number"),
        ({"methods": 3}, "methods 3 is not allowed; give names and values"),
        ({"seeds": []}, "has no cells; give panels with methods and depths, and seeds"),
        ({"panels": panel(axis="depth")}, "panels, number 1 has no option 'axis'"),
        ({"panels": panel(methods=["mea"])}, "panel 'by depth': method 'mea' has no options; choose mae, mirl, "),
        ({"panels": panel(replaced=[0, 1])}, "has several depths and several replaced; make it two"),
        ({"panels": panel(depths=[3])}, "mirl of depth 3: depth 3 does not divide into 2 segments; choose 1"),
        ({"panels": panel(methods=["mae"], depths=[2], replaced=[3])}, "3 blocks cannot be replaced; give at most 2"),
        ({"panels": panel(methods=["truncated_mae"], depths=[2], replaced=[2])}, "trains the first of 2 blocks"),
        ({"decoder_blocks": 3}, "decoder_blocks 3 cannot be shared by 2 decoders"),
        ({"decoder_blocks": 0}, "decoder_blocks 0 cannot be shared by 1 decoder"),
        (
            {"methods": {"mae": {"method": "mea"}, "mirl": {}}, "panels": panel()},
            "method 'mea' is not allowed; give mirl",
        ),
        ({"methods": {"mae/2": {}, "mae": {}, "mirl": {}}, "panels": panel()}, "'mae/2' cannot name a file"),
        ({"methods": {"mae": None, "mirl": {}}, "panels": panel()}, "methods: mae None is not allowed"),
        ({"methods": {"mae": {"seed": 1}, "mirl": {}}, "panels": panel()}, "methods: seed is set by the study itself"),
        ({"model": "vit_huge"}, "unknown model 'vit_huge_2'"),
        ({"pretrain": SMALL["pretrain"] | {"epoch": 1}}, "pretrain has no option 'epoch'; choose epochs"),
        ({"pretrain": SMALL["pretrain"] | {"epochs": 0}}, "--epochs 0 is not allowed; give 1 or more"),
        ({"pretrain": SMALL["pretrain"] | {"base_lr": "1e-3"}}, "base_lr '1e-3' is not allowed; give a number"),
        ({"pretrain": SMALL["pretrain"] | {"precision": 32}}, "precision 32 is not allowed; give auto or 32 or bf16"),
        ({"pretrain": SMALL["pretrain"] | {"patch_size": 7}}, "do not tile an image of 32x32"),
        ({"pretrain": SMALL["pretrain"] | {"decoder_width": 18}}, "--decoder_width 18"),
        ({"pretrain": SMALL["pretrain"] | {"mask_ratio": 0.99}}, "leaves 0 of 16 patches visible"),
        ({"pretrain": {"epochs": 1}}, "pretrain has no image_size; add it"),
        ({"pretrain": SMALL["pretrain"] | {"batch_size": 64}}, "--batch_size 64 is more than the 32 training images"),
        ({"finetune": SMALL["finetune"] | {"depth": 3}}, "finetune: depth is set by the study itself; leave it out"),
        ({"knn": {"k": [10, 20]}}, "knn: k \\[10, 20\\] is not allowed; give one number"),
        ({"diagnose": {"labels": "yes"}}, "diagnose: labels 'yes' is not allowed; give true or false"),
        ({"expected": 5}, "expected is 5; give names and values"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, changes, message):
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        find_results(read_study(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "{", "\x00"])
def test_a_file_that_is_no_study_is_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="broken.yaml (is|cannot be read)") as caught:
        read_study(path)
    assert "\n" not in str(caught.value)
