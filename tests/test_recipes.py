"""Every recipe parses, says what it is, and builds; the paper's models and rows have the published numbers."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from mirl.cli import build_parser
from mirl.models.autoencoder import build_autoencoder
from mirl.models.encoder import build_encoder, parse_model
from mirl.tasks.settings.detection import Detection, resolve_detection
from mirl.tasks.settings.finetuning import Finetuning, resolve_finetuning
from mirl.tasks.settings.pretraining import Pretraining, autoencoder_of, decoder_shape, method_of, resolve
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.training.optimizers import adamw

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name in ("pretrain", "finetune", "detect", "segment")]
ROWS = [path for path in FILES if path not in RECIPES]
MACHINE = {"images": 1_281_167, "gpu": False, "devices": 1, "precision": "32"}
MODELS = {"vit_s_12", "vit_b_12", "vit_s_54", "vit_b_24", "vit_l_24", "vit_b_48"}

COUNTS = {
    "table_2a": 4, "table_2b": 4, "table_2c": 4, "table_2d": 6, "table_2e": 6, "table_3": 13,
    "figure_2": 17, "figure_3": 3, "figure_5": 12, "figure_6": 6,
}  # fmt: skip
# The paper's tables, top-1 in %; its figures print no numbers.
ACCURACIES = {
    "table_2a": {"pixel": 83.5, "pixel_feature_mae": 83.2, "pixel_feature": 83.6, "pixel_vgg": 83.8},
    "table_2b": {"segments_1": 83.5, "segments_2": 84.3, "segments_4": 84.7, "segments_6": 84.6},
    "table_2c": {
        "vit_b_24_without_did": 84.5, "vit_b_24_with_did": 84.7,
        "vit_b_48_without_did": 85.0, "vit_b_48_with_did": 85.3,
    },
    "table_2d": {
        "vit_b_12_mirl": 83.5, "vit_b_12_multi_decoder": 83.2,
        "vit_b_24_mirl": 84.7, "vit_b_24_multi_decoder": 84.1,
        "vit_b_48_mirl": 85.3, "vit_b_48_multi_decoder": 84.5,
    },
    "table_2e": {
        "vit_b_12_mirl": 83.5, "vit_b_12_coarse_to_fine": 83.1, "vit_b_12_fine_to_coarse": 82.9,
        "vit_b_24_mirl": 84.7, "vit_b_24_coarse_to_fine": 84.2, "vit_b_24_fine_to_coarse": 84.2,
    },
    "table_3": {
        "vit_b_12_mae_300": 82.6, "vit_b_12_mae_800": 83.1, "vit_b_12_mae_1600": 83.6,
        "vit_b_12_mirl_300": 83.5, "vit_b_12_mirl_800": 84.1,
        "vit_s_54_mirl_300": 84.4, "vit_s_54_mirl_800": 84.8,
        "vit_b_24_mirl_300": 84.7,
        "vit_l_24_mae_300": 84.5, "vit_l_24_mae_800": 85.4, "vit_l_24_mae_1600": 85.9,
        "vit_b_48_mirl_300": 85.3, "vit_b_48_mirl_800": 86.2,
    },
}  # fmt: skip
TIMES = {"pixel": "1.0", "pixel_feature_mae": "1.6", "pixel_feature": "1.8", "pixel_vgg": "2.5"}

# Batch, epochs, warm-up epochs, rate per 256 images, layer decay, drop path, decay of the average.
FINETUNING = {
    "vit_b_48": (2048, 60, 30, 7.5e-4, 0.88, 0.0, 0.9998),
    "vit_s_54": (2048, 100, 20, 7.5e-4, 0.88, 0.1, 0.9998),
    "vit_b_12": (1024, 100, 5, 5e-4, 0.65, 0.1, None),
    "vit_l_24": (1024, 50, 5, 1e-3, 0.75, 0.2, None),
    "vit_b_24": (2048, 100, 20, 7.5e-4, 0.80, 0.1, 0.9998),
    "vit_s_12": (1024, 100, 5, 5e-4, 0.75, 0.1, None),
}


def recipes(kind):
    return {path.stem: path for path in RECIPES if path.parent.name == kind}


def test_there_are_recipes_for_the_papers_models_and_the_official_code():
    assert MODELS | {"official_vit_s_54", "official_vit_b_48", "demo", "shapes", "cifar10"} == set(recipes("pretrain"))
    assert MODELS | {"cifar10"} == set(recipes("finetune"))
    assert {"vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48", "vitdet_vit_b_12", "shapes"} == set(recipes("detect"))
    assert {"vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48", "camvid", "shapes"} == set(recipes("segment"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_says_what_it_is_and_builds(path):
    text = path.read_text()
    kind = path.parent.name
    assert "# What: " in text
    assert f"# Command: mirl {kind} --config recipes/{kind}/{path.name} " in text
    assert "run here" in text.lower()
    options = yaml.safe_load(text)
    if kind == "finetune":
        sizes = {"depth": 2, "image_size": (224, 224), "patch_size": (16, 16)}
        assert resolve_finetuning(Finetuning(**options), **sizes, **MACHINE).epochs == options["epochs"]
        return
    if kind == "detect":
        given = Detection(**options | {"weights": "x"})
        resolved = resolve_detection(given, shorter_side=480, depth=12, patch_size=16, **MACHINE)
        assert options == {name: getattr(resolved, name) for name in options}
        return
    if kind == "segment":
        given = Segmentation(**options | {"weights": "x"})
        resolved = resolve_segmentation(given, shorter_side=512, depth=12, width=768, patch_size=16, **MACHINE)
        assert options == {name: getattr(resolved, name) for name in options}
        return
    settings = resolve(Pretraining(**options), shorter_side=256, **MACHINE)
    with torch.device("meta"):
        model = autoencoder_of(settings)
    assert len(model.encoder.blocks) == model.method.depth == parse_model(settings.model)[2]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where users type the commands


@cache
def parser(command):
    return build_parser(command)


@cache
def typed(path):
    """Return what the command line makes of the two commands in a row's header: options of each."""
    options = []
    for label, command in (("Pre-train", "pretrain"), ("Fine-tune", "finetune")):
        (words,) = re.findall(rf"^# {label}: mirl {command} (.+)$", path.read_text(), re.M)
        options.append(parser(command).parse_args(words.split()).as_dict())
    return options


def settings_of(path):
    """Return the options of a row's two commands with every choice made, as in `mirl pretrain` and `mirl finetune`."""
    pretraining, finetuning = (
        {name: value for name, value in each.items() if name != "config"} for each in typed(path)
    )
    settings = resolve(Pretraining(**pretraining), shorter_side=256, **MACHINE)
    sizes = {"image_size": settings.image_size, "patch_size": settings.patch_size}
    depth = parse_model(settings.model)[2]
    return settings, resolve_finetuning(Finetuning(**finetuning), depth=depth, **sizes, **MACHINE)


@cache
def blocks_built(model, method, shape):
    """Return of how many blocks the encoder is that an autoencoder builds; rows that build the same share it."""
    with torch.device("meta"):
        built = build_autoencoder(model, method, shape, image_size=(224, 224), patch_size=(16, 16), channels=3)
    return len(built.encoder.blocks)


def header(path, label):
    (line,) = re.findall(rf"^# {label}: (.+)$", path.read_text(), re.M)
    return line


def same_run(path):
    """Return the row whose folders a row's commands share, or nothing."""
    return "".join(re.findall(r"^# Same run as: (.+)$", path.read_text(), re.M))


def figure(path):
    """Return a row's expected figure as its header has it: a number, or `plotted`."""
    return header(path, "Expected").split()[0].rstrip(",")


def folder(name):
    return [path for path in ROWS if path.parent.name == name]


def test_every_row_of_the_papers_tables_and_figures_has_a_file():
    assert Counter(path.parent.name for path in ROWS) == COUNTS


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_rows_commands_can_be_typed_and_build(path):
    name = path.relative_to(REPOSITORY).as_posix()
    pretraining, finetuning = typed(path)
    row = yaml.safe_load(path.read_text())
    composed = finetuning if path.stem.endswith("_finetune") else pretraining
    assert str(composed["config"][-1]) == name
    assert {option: composed[option] for option in row} == row
    assert str(pretraining["config"][0]) == f"recipes/pretrain/{pretraining['model']}.yaml"
    assert str(finetuning["config"][0]) == f"recipes/finetune/{pretraining['model']}.yaml"
    assert finetuning["weights"] == pretraining["out"]

    settings, classifier = settings_of(path)
    assert (settings.image_size, settings.patch_size, settings.channels) == ((224, 224), (16, 16), 3)
    width, _, depth = parse_model(settings.model)
    method = method_of(settings)
    shape = replace(decoder_shape(settings, method), features=width if settings.feature else 0)
    assert blocks_built(settings.model, method, shape) == method.depth <= depth == classifier.depth
    assert (depth > method.depth) == (settings.method == "truncated_mae")
    assert classifier.reinit_last < depth


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_row_says_what_it_is_and_what_to_expect(path):
    kind, number = path.parent.name.split("_")
    assert header(path, "What").startswith(f"{kind.title()} {number}, ")
    assert header(path, "Expected").endswith("(paper). Not run here.")
    known = ACCURACIES.get(path.parent.name)
    assert figure(path) == (str(known[path.stem]) if known else "plotted")
    assert known is None or header(path, "Expected").startswith(f"{figure(path)} % top-1 on ImageNet-1K")


def test_headers_have_what_else_the_paper_prints():
    for path in ROWS:
        table, expected = path.parent.name, header(path, "Expected")
        if table == "table_2a":
            assert f" time {TIMES[path.stem]}x " in expected
        if table == "table_2d":
            model = path.stem[:8]
            gap = ACCURACIES[table][f"{model}_mirl"] - ACCURACIES[table][f"{model}_multi_decoder"]
            assert f" {gap:.1f} {'more' if path.stem.endswith('mirl') else 'less'} than " in expected
        for printed in re.findall(r"Table 3 prints (\S+) %", expected):
            name = f"{path.stem}_300" if table == "figure_5" else f"{path.stem[:8]}_mirl_{path.stem[9:]}"
            assert float(printed) == ACCURACIES["table_3"][name]


@pytest.mark.parametrize("name", COUNTS)
def test_rows_of_a_table_are_different_runs(name):
    rows = folder(name)
    assert len({settings_of(path)[1].out for path in rows}) == len(rows)


def test_rows_have_the_same_folders_where_they_are_the_same_run_and_say_so():
    """What a run goes on from is a setting of it: those of Figure 6 that do are runs of their own."""
    for command in (0, 1):
        options = [settings_of(path)[command] for path in ROWS]
        runs = {(str(replace(each, out="")), each.out) for each in options}
        assert len({settings for settings, _ in runs}) == len(runs) == len({out for _, out in runs})
    owners = {f"runs/{path.parent.name}_{path.stem.removesuffix('_finetune')}_finetuned": path for path in ROWS}
    for path in ROWS:
        owner = owners[settings_of(path)[1].out]
        assert same_run(path) == ("" if owner == path else f"{owner.parent.name}/{owner.name}")


def test_rows_that_go_on_from_a_run_go_on_from_a_shorter_one_beside_them():
    runs = {pretraining["out"]: pretraining for pretraining, _ in map(typed, ROWS)}
    extended = [pretraining for pretraining in runs.values() if pretraining["resume_from"]]
    assert len(extended) == 4
    for options in extended:
        shorter = runs[options["resume_from"]]
        assert (shorter["epochs"], options["epochs"]) in ((300, 800), (800, 1000))
        changed = {name for name in options if options[name] != shorter[name]}
        assert changed == {"config", "epochs", "out", "resume_from"}


def test_rows_are_the_methods_that_the_tables_name():
    settings = {f"{path.parent.name}/{path.stem}": settings_of(path)[0] for path in ROWS}
    taps = {name: method_of(each).taps for name, each in settings.items()}
    for segments in (1, 2, 4, 6):
        assert taps[f"table_2b/segments_{segments}"] == tuple(range(24 // segments, 25, 24 // segments))
    for replaced in range(1, 9):
        assert taps[f"figure_2/truncated_mae_replaced_{replaced}"] == (12 - replaced,)
        row = REPOSITORY / f"recipes/figure_2/mae_replaced_{replaced}_finetune.yaml"
        assert settings_of(row)[1].reinit_last == replaced
    for name, each in settings.items():
        methods = ("truncated_mae", "multi_decoder", "coarse_to_fine", "fine_to_coarse", "mae")
        assert each.method == next((method for method in methods if method in name), "mirl")
        assert each.context == ("none" if "without_did" in name else "dense")
        if name.startswith("table_3"):
            assert each.epochs == int(name.split("_")[-1])
        if each.method in ("mae", "truncated_mae"):
            decoder, schedule = (8, "cosine") if name.startswith("table_3") else (4, "step")
            assert (each.decoder_depth, each.schedule) == (decoder, schedule)


def test_the_table_of_recipes_has_each_row_with_its_figure():
    text = (REPOSITORY / "recipes" / "README.md").read_text()
    link_to = r"\[([\w/.]+)\]\(([\w/.]+)\)"
    table = re.findall(rf"^\| (.+) \| {link_to} \| (.+) \| (?:{link_to} )?\|$", text, re.M)
    names = [f"{path.parent.name}/{path.name}" for path in ROWS]
    files = dict(zip(names, ROWS, strict=True))
    assert sorted(name for _, name, *_ in table) == names
    for what, name, link, expected, *same in table:
        path = files[name]
        assert (link, expected) == (name, figure(path))
        assert header(path, "What").split(": ")[0] == what
        assert same == [same_run(path)] * 2
    code = "\n".join(re.findall(r"^    .*$", text, re.M)).replace("\\\n", " ")
    for command, words in re.findall(r"mirl (\w+) (.*)", code):
        assert parser(command).parse_args(words.split()).config


def test_official_recipes_choose_what_the_official_code_does():
    for name, decoder in (("official_vit_s_54", (384, 1, 12)), ("official_vit_b_48", (512, 2, 16))):
        options = yaml.safe_load(recipes("pretrain")[name].read_text())
        assert (options["decoder_width"], options["decoder_depth"], options["decoder_heads"]) == decoder
        assert (options["did_blocks"], options["did_memory"], options["weight_norm"]) == ("all", "embedded", True)


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_has_the_published_numbers(name):
    options = yaml.safe_load(recipes("finetune")[name].read_text())
    names = ("batch_size", "epochs", "warmup_epochs", "base_lr", "layer_decay", "drop_path", "ema")
    assert tuple(options.get(option) for option in names) == FINETUNING[name]
    augmentation = {option: options[option] for option in ("min_crop", "randaugment", "erasing", "mixup", "cutmix")}
    assert augmentation == {
        "min_crop": 0.08, "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
    }  # fmt: skip
    assert (options["smoothing"], options["weight_decay"], options["min_lr"]) == (0.1, 0.05, 1e-6)


def test_a_recipes_layer_decay_reaches_the_patch_embedding():
    width, heads, depth = parse_model("vit_s_54")
    encoder = build_encoder(width, heads, depth, (32, 32), (16, 16), 3)
    groups = adamw(encoder, lr=1.0, weight_decay=0.05, betas=(0.9, 0.999), fused=False, layer_decay=0.88).param_groups
    lowest = next(g for g in groups if any(p is encoder.patch_embed.proj.weight for p in g["params"]))
    # Without a head the norm after the last block is the top; a classifier has one layer more.
    assert lowest["lr_scale"] == pytest.approx(0.88**54)


def test_detection_recipes_have_table_4s_figures_and_its_schedule():
    for name, figures in {"vit_b_12": (49.3, 43.7), "vit_b_48": (53.4, 46.5)}.items():
        text = recipes("detect")[name].read_text()
        assert "Table 4" in text and "{} box AP, {} mask AP".format(*figures) in text
    for name in ("vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48"):
        text = recipes("detect")[name].read_text()
        options = yaml.safe_load(text)
        assert "Not run here." in text
        assert (options["protocol"], options["epochs"], options["batch_size"]) == ("coco_1x", 12, 32)
        depth = parse_model(name)[2]
        lowest = options["layer_decay"] ** (depth + 1)  # CAE's: 0.75 at 12 blocks, 0.85 at 24
        assert 0.85**25 * 0.9 < lowest <= 0.75**13 * 1.001, name


def test_segmentation_recipes_have_table_5s_figure_and_beits_protocol():
    assert "Table 5" in (text := recipes("segment")["vit_b_48"].read_text()) and "53.2 mIoU" in text
    for name in ("vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48"):
        text = recipes("segment")[name].read_text()
        options = yaml.safe_load(text)
        assert "Not run here." in text
        steps = options["epochs"] * (20_210 // options["batch_size"])
        assert steps == pytest.approx(160_000, rel=0.005)
        assert options["warmup_epochs"] * 20_210 / options["batch_size"] == pytest.approx(1500, rel=0.005)
        assert (options["crop_size"], options["stride"], options["relative_positions"]) == (512, 341, True)
        width, _, depth = parse_model(name)
        assert options["width"] == width
        lowest = options["layer_decay"] ** (depth + 1)  # BEiT's 0.65 at 12 blocks, about 0.88 at 48
        assert 0.65**13 / 2 < lowest < 0.65**13 * 1.01, name
