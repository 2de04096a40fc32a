"""Every recipe parses, says what it is, and builds; the paper's models have the published numbers, row for row."""

from pathlib import Path

import pytest
import torch
import yaml

from mirl.models.encoder import build_encoder, parse_model
from mirl.tasks.settings import Finetuning, Pretraining, autoencoder_of, resolve, resolve_finetuning
from mirl.training.optimizers import adamw

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").rglob("*.yaml"))
MACHINE = {"images": 1_281_167, "gpu": False, "devices": 1, "precision": "32"}
MODELS = {"vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48"}

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
    assert MODELS | {"official_vit_s_54", "official_vit_b_48", "demo", "cifar10"} == set(recipes("pretrain"))
    assert MODELS | {"vit_l_24", "vit_s_12", "cifar10"} == set(recipes("finetune"))


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
    settings = resolve(Pretraining(**options), shorter_side=256, **MACHINE)
    with torch.device("meta"):
        model = autoencoder_of(settings)
    assert len(model.encoder.blocks) == model.method.depth == parse_model(settings.model)[2]


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
