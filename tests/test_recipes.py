"""Every recipe parses, says what it is, and builds."""

from pathlib import Path

import pytest
import torch
import yaml

from mirl.models.autoencoder import build_autoencoder
from mirl.tasks.pretrain import decoder_shape, method_of
from mirl.tasks.settings import Pretraining, resolve

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").rglob("*.yaml"))


def test_there_are_recipes_for_the_papers_models_and_the_official_code():
    names = {path.stem for path in RECIPES}
    assert {"vit_b_12", "vit_b_24", "vit_s_54", "vit_b_48", "official_vit_s_54", "official_vit_b_48"} <= names
    assert len(RECIPES) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_builds(path):
    text = path.read_text()
    assert "# What: " in text
    assert f"# Command: mirl pretrain --config recipes/pretrain/{path.name} " in text
    assert "run here" in text.lower()
    settings = resolve(
        Pretraining(**yaml.safe_load(text)), images=1_281_167, shorter_side=256, gpu=False, devices=1, precision="32"
    )
    method = method_of(settings)
    with torch.device("meta"):
        model = build_autoencoder(
            settings.model, method, decoder_shape(settings, method), image_size=settings.image_size,
            patch_size=settings.patch_size, channels=settings.channels,
        )  # fmt: skip
    assert len(model.encoder.blocks) == method.depth


def test_official_recipes_choose_what_the_official_code_does():
    for name, decoder in (("official_vit_s_54", (384, 1, 12)), ("official_vit_b_48", (512, 2, 16))):
        options = yaml.safe_load(next(path for path in RECIPES if path.stem == name).read_text())
        assert (options["decoder_width"], options["decoder_depth"], options["decoder_heads"]) == decoder
        assert (options["did_blocks"], options["did_memory"], options["weight_norm"]) == ("all", "embedded", True)
