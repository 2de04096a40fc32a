"""Rates decay with depth and weight decay spares what it should: MAE's rule, stated anew, for every parameter."""

import pytest
import timm
import torch

from mirl.models.encoder import ARCHITECTURE, build_encoder, timm_arguments
from mirl.tasks.finetune import build_classifier
from mirl.tasks.settings.finetuning import ResolvedFinetuning
from mirl.tasks.weights import Weights
from mirl.training.optimizers import adamw

TOKENS = ("cls_token", "reg_token", "pos_embed")
OPTIONS = {"lr": 2e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "fused": True}


def weights():
    state = build_encoder(48, 4, 2, (16, 16), (8, 8), 3).state_dict()
    arguments = timm_arguments(48, 4, 2, (16, 16), (8, 8), 3)
    return Weights(ARCHITECTURE, arguments, state, (0.5,) * 3, (0.5,) * 3)


def timms_weights():
    """Weights of a model of timm's with register tokens and a scale for each branch."""
    model = timm.create_model("test_vit2", num_classes=0)
    sizes = {"img_size": (160, 160), "patch_size": (16, 16), "in_chans": 3, "num_classes": 0}
    return Weights("test_vit2", sizes, model.state_dict(), (0.5,) * 3, (0.5,) * 3)


def classifier(depth, weights=weights):
    opened = weights()
    settings = ResolvedFinetuning(depth=depth, image_size=opened.image_size, patch_size=opened.patch_size)
    return build_classifier(settings, opened, 7)


def layer_of(name, depth):
    """Number a parameter as MAE's `get_layer_id_for_vit` does: what makes tokens 0, blocks from 1, the rest on top."""
    first, *rest = name.split(".")
    if first in (*TOKENS, "patch_embed"):
        return 0
    return int(rest[0]) + 1 if first == "blocks" else depth + 1


@pytest.mark.parametrize("decay", [0.65, 1.0])
@pytest.mark.parametrize(("depth", "weights"), [(1, weights), (2, weights), (5, weights), (12, weights),
                                                (8, timms_weights), (3, timms_weights)])  # fmt: skip
def test_every_parameter_has_maes_rate_and_decay(depth, weights, decay):
    model = classifier(depth, weights)
    groups = adamw(model, **OPTIONS, layer_decay=decay).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - layer_of(name, depth)), rel=1e-12), name
        spared = parameter.ndim == 1 or name in TOKENS
        assert group["weight_decay"] == (0.0 if spared else 0.05), name


def test_a_classifier_has_the_parameters_that_the_rule_is_about():
    names = {name for name, _ in classifier(2).named_parameters() if not name.startswith("blocks")}
    assert names == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "fc_norm.weight",
                     "fc_norm.bias", "head.weight", "head.bias"}  # fmt: skip


def test_parameters_that_are_not_trained_have_no_group():
    model = classifier(2)
    model.patch_embed.requires_grad_(False)
    grouped = {id(p) for group in adamw(model, **OPTIONS, layer_decay=0.65).param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) not in grouped} == {
        "patch_embed.proj.weight", "patch_embed.proj.bias"
    }  # fmt: skip


def test_without_layer_decay_every_rate_is_the_same():
    groups = adamw(classifier(2), **OPTIONS).param_groups
    assert all("lr_scale" not in group and group["lr"] == 2e-3 for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_adamw_has_the_recipes_numbers():
    defaults = adamw(classifier(1), **OPTIONS, layer_decay=0.65).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (2e-3, (0.9, 0.999), 1e-8)
    assert defaults["fused"] and not defaults["amsgrad"]


def test_a_step_is_as_long_as_its_scale():
    """Adam's first step is the rate itself, whatever the gradient."""
    model = classifier(3)
    optimizer = adamw(model, **OPTIONS | {"weight_decay": 0.0}, layer_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = torch.full_like(parameter, 1e-2 * 0.5 ** (4 - layer_of(name, 3)))
        torch.testing.assert_close(before[name] - parameter, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_an_encoder_inside_a_model_stands_below_its_head(depth):
    encoder = weights().build(depth=depth, global_pool="", final_norm=False)
    model = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(48, 7)})
    groups = adamw(model, **OPTIONS, layer_decay=0.7, encoder=encoder).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    for name, parameter in encoder.named_parameters():
        scale = of[id(parameter)]["lr_scale"]
        assert scale == pytest.approx(0.7 ** (depth + 1 - layer_of(name, depth)), rel=1e-12), name
    assert "lr_scale" not in of[id(model["head"].weight)]
    assert of[id(model["head"].weight)]["weight_decay"] == 0.05
    assert of[id(model["head"].bias)]["weight_decay"] == 0.0
