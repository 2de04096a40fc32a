"""What a cell runs: as many decoder blocks in every method, commands to type, fingerprints that tell apart."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from small_studies import SMALL, small_study

from mirl.cli import _spell_out, build_parser
from mirl.studies.definition import Cell, read_study
from mirl.studies.results import find_results
from mirl.studies.stages import encoder_folder, fingerprint_of, pretraining_of, stages_of
from mirl.tasks.settings.pretraining import autoencoder_of

REPOSITORY = Path(__file__).resolve().parents[2]
STUDIES = sorted((REPOSITORY / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_cell_of_every_study_builds_with_equal_decoders(path):
    text, study = path.read_text(), read_study(path)
    assert "# What: " in text and re.search(f"# Command: mirl study {path.stem}\\b", text)
    built = set()
    for cell in study.cells():
        assert stages_of(study, cell)
        _, settings = pretraining_of(study, cell)
        kind = (cell.method, cell.depth, str(settings.taps))
        if kind not in built:
            built.add(kind)
            with torch.device("meta"):
                model = autoencoder_of(settings)
            assert len(model.encoder.blocks) == cell.depth - cell.replaced * study.truncates(cell.method)
            assert sum(len(decoder.blocks) for decoder in model.decoders) == study.decoder_blocks
    assert {method for method, _, _ in built} == set(study.methods)


def test_the_studies_are_these():
    assert [path.stem for path in STUDIES] == ["cifar10", "cifar10_cpu", "smoke"]


def test_the_documented_study_can_be_run(tmp_path):
    (code,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "studies.md").read_text(), re.S)
    (tmp_path / "mine.yaml").write_text(code)
    found = find_results(read_study(tmp_path / "mine.yaml"))
    assert len(found.missing) == len(found.cells) == 16


def test_a_whole_cell_has_five_stages_and_a_reinitialised_one_fine_tunes_the_same_encoder(tmp_path):
    study = small_study(tmp_path)
    whole, fresh, cut = (Cell(*cell, 0) for cell in (("mae", 4, 0), ("mae", 4, 2), ("truncated_mae", 4, 2)))
    five = ["pretrain", "finetune", "probe", "knn", "diagnose"]
    assert [stage.command for stage in stages_of(study, whole)] == five
    assert [stage.command for stage in stages_of(study, fresh)] == five[:2]
    assert [stage.command for stage in stages_of(study, cut)] == five
    assert stages_of(study, whole)[0] == stages_of(study, fresh)[0]
    assert encoder_folder(study, whole) == encoder_folder(study, fresh) == Path("runs/studies/small/mae_4_seed0")
    assert encoder_folder(study, cut, Path("there")) == Path("there/truncated_mae_4_replaced2_seed0")
    assert stages_of(study, fresh)[1].options["reinit_last"] == 2
    assert stages_of(study, cut)[0].options["taps"] == [2] and stages_of(study, cut)[1].options["depth"] == 4


def test_data_are_used_without_labels_and_then_with_them(tmp_path):
    study = small_study(tmp_path, data="cats", images=900, diagnose={})
    stages = stages_of(study, study.cells()[0])
    assert [stage.options["data"] for stage in stages] == ["cats/train", "cats", "cats", "cats", "cats/test"]
    elsewhere = stages_of(study, study.cells()[0], "/disk/cats")
    assert elsewhere[0].options["data"] == "/disk/cats/train"
    assert fingerprint_of(elsewhere) == fingerprint_of(stages)


def test_commands_can_be_typed(tmp_path):
    study = small_study(tmp_path)
    for cell in study.cells():
        for stage in stages_of(study, cell):
            program, command, *words = shlex.split(stage.typed)
            parser = build_parser(command)
            values = parser.parse_args(_spell_out(parser, words)).as_dict()
            assert program == "mirl" and values.pop("devices", "1") == "1"
            options = {name: value for name, value in stage.options.items() if name != "devices"}
            assert {name: values[name] for name in options} == options


def fingerprint(folder, cell=("mirl", 4, 0, 0), **changes):
    study = small_study(folder, **changes)
    return fingerprint_of(stages_of(study, Cell(*cell)))


def with_option(stage, **options):
    return {stage: SMALL[stage] | options}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "shapes:80:32", "images": 80}, {"decoder_blocks": 8}, {"model": "vit_48x2"},
        {"methods": SMALL["methods"] | {"mirl": {"context": "none"}}}, with_option("pretrain", epochs=2),
        with_option("pretrain", precision="bf16"), with_option("finetune", base_lr=0.1), with_option("probe", epochs=2),
        with_option("knn", k=5), with_option("diagnose", images=5),
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_an_outcome_changes_the_fingerprint(tmp_path, changes):
    assert fingerprint(tmp_path, **changes) != fingerprint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Another"}, {"seeds": [0, 1, 2]}, {"panels": SMALL["panels"][:1]},
        {"methods": SMALL["methods"] | {"mae": {"method": "mae", "min_crop": 1.0}}},
        with_option("pretrain", workers=3, checkpoint_minutes=1), with_option("pretrain", mask_ratio=0.75),
        with_option("finetune", micro_batch=8),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_leaves_it(tmp_path, changes):
    assert fingerprint(tmp_path, **changes) == fingerprint(tmp_path)


def test_a_fine_tuning_alone_does_not_depend_on_how_encoders_are_read(tmp_path):
    fresh = ("mae", 4, 2, 0)
    assert fingerprint(tmp_path, fresh, probe={"epochs": 9}) == fingerprint(tmp_path, fresh)
    assert fingerprint(tmp_path, fresh, **with_option("pretrain", epochs=2)) != fingerprint(tmp_path, fresh)
    assert len({fingerprint(tmp_path, cell) for cell in (fresh, ("mae", 4, 0, 0), ("mae", 4, 2, 1))}) == 3
