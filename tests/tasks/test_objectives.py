"""What a teacher and a VGG add to the loss, to checkpoints and to nothing else."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_classes import write_encoder
from tiny_runs import losses, rows, weights
from torch.nn import functional as F
from torchvision.models import vgg16

import mirl
from mirl.data.sources import open_source
from mirl.data.transforms import standardise
from mirl.errors import UserError
from mirl.models.patches import gather, patchify
from mirl.models.weights import AutoencoderWeights
from mirl.objectives.frequency import coarse_part
from mirl.objectives.pixels import patch_statistics
from mirl.tasks.objectives import Seen
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.tasks.weights import load_autoencoder, open_weights

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = {
    "data": "shapes:20", "model": "vit_48x4_2", "image_size": (32, 32), "patch_size": (8, 8), "decoder_width": 32,
    "decoder_depth": 1, "block_figures": False, "warmup_epochs": 10, "epochs": 20,
}  # fmt: skip
RUN = {"model": "vit_48x4_2", "block_figures": False, "epochs": 1, "base_lr": 3e-2}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of random VGG16 weights up to relu3_3."""
    torch.manual_seed(0)
    with torch.device("meta"):
        own = vgg16(weights=None).features[:16].state_dict()
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": torch.randn(value.shape) * 0.05 for name, value in own.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def patterned(tmp_path_factory):
    """A folder of grey .npy images; the generated shapes are RGB."""
    folder = tmp_path_factory.mktemp("grey")
    for index in range(3):
        np.save(folder / f"{index}.npy", np.full((32, 32, 1), 50 * index, dtype=np.uint8))
    return str(folder)


def task_of(**options):
    settings = Resolved(**SMALL | options)
    source = open_source(settings.data, channels=settings.channels)
    torch.manual_seed(0)
    return PretrainTask(settings, source, *split_off_held_out(len(source)))


def values_of(task, images=5, *, training=True):
    torch.manual_seed(1)
    task.model.train(training)
    return task.loss(task.model, task.example(images))


def tokens_before_norm(encoder, images):
    """Return the patches' tokens after the last block, by timm's own forward pass without its norm."""
    encoder.norm = torch.nn.Identity()
    return encoder.forward_features(images)[:, 1:]


# The loss


def test_the_loss_is_the_weighted_sum_and_the_feature_weight_grows_with_the_epoch(vgg, encoder):
    task = task_of(feature=encoder, feature_weight=3.0, vgg=vgg, vgg_weight=0.5)
    for epoch, weight in ((0, 0.0), (5, 1.5), (10, 3.0), (400, 3.0)):
        task.epoch = epoch
        values = values_of(task)
        assert list(values) == ["loss", "pixel", "feature", "vgg"]
        expected = values["pixel"] + weight * values["feature"] + 0.5 * values["vgg"]
        torch.testing.assert_close(values["loss"], expected)


def test_without_objectives_nothing_is_added():
    assert list(values_of(task_of())) == ["loss"]
    assert list(values_of(task_of(method="explicit_residual"))) == ["loss", "decoder_1", "residual_1"]
    assert task_of().followers == {}


def test_a_share_of_the_batch_is_scaled_to_the_whole(vgg):
    whole, part = (values_of(task_of(feature="ema", vgg=vgg, extra_share=share)) for share in (1.0, 0.5))
    for name in ("feature", "vgg"):
        torch.testing.assert_close(part[name], whole[name] * torch.tensor([5 / 3] * 3 + [0, 0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part["pixel"], whole["pixel"])


def test_held_out_images_are_all_looked_at():
    whole, part = (values_of(task_of(feature="ema", extra_share=s), training=False) for s in (1.0, 0.1))
    torch.testing.assert_close(part["feature"], whole["feature"])


@pytest.mark.parametrize(("method", "parts"), [("coarse_to_fine", "coarse fine"), ("fine_to_coarse", "fine coarse")])
def test_parts_of_the_image_are_the_targets(method, parts, vgg):
    task = task_of(method=method, vgg=vgg, feature="ema", extra_share=1.0, separation_sigma=1.0)
    names = [f"{part}_{number}" for number, part in enumerate(parts.split(), start=1)]
    assert list(values_of(task)) == ["loss", "pixel", "feature", "vgg", *names]
    images = torch.randn(2, 3, 32, 32)
    patches, masked = patchify(images, (8, 8)), torch.tensor([[3, 0, 9], [2, 7, 15]])
    targets = task.targets(images, patches, masked)
    mean, deviation = patch_statistics(gather(patches, masked))
    coarse = gather(patchify(coarse_part(images, 1.0), (8, 8)), masked)
    torch.testing.assert_close(targets["coarse"] * deviation + mean, coarse)
    torch.testing.assert_close(targets["fine"] * deviation, gather(patches, masked) - coarse, atol=1e-5, rtol=1e-4)
    perfect = Seen(task.example(2).images, patches, masked, [targets[part] for part in parts.split()], [])
    assert task.extras[1](perfect).max() < 1e-8  # together they are the image, which is what a VGG sees


@pytest.mark.parametrize("method", ["coarse_to_fine", "explicit_residual", "multi_decoder", "mae"])
def test_every_parameter_is_trained_whatever_the_method(method, vgg):
    task = task_of(method=method, feature="ema", vgg=vgg, extra_share=0.5)
    task.epoch = 1
    values_of(task)["loss"].sum().backward()
    trained = [p for p in task.model.parameters() if p.requires_grad]
    assert all(parameter.grad.any() for parameter in trained)
    assert all(p.grad is None and not p.requires_grad for extra in task.extras for p in extra.parameters())


# The teacher


def test_a_trained_teacher_sees_the_whole_image_as_it_was_trained_to(encoder):
    """At the size that gives it the student's grid, normalised by its own statistics."""
    task = task_of(feature=encoder, patch_size=(4, 4))
    teacher = task.extras[0].teacher
    assert teacher.encoder.patch_embed.img_size == (64, 64) and task.model.shape.features == 48
    teacher.mean, teacher.deviation = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images = task.example(2).images
    seen = F.interpolate(standardise(images, teacher.mean, teacher.deviation), (64, 64), mode="bicubic", antialias=True)
    own = open_weights(encoder).build(img_size=(64, 64))
    tokens = teacher(images)
    torch.testing.assert_close(tokens, tokens_before_norm(own, seen), atol=1e-5, rtol=1e-4)
    assert not tokens.requires_grad
    masked = torch.tensor([[3, 0, 40], [2, 63, 15]])
    told = gather(tokens, masked)
    seen = Seen(images, torch.empty(2), masked, [], [told, torch.zeros_like(told)])
    torch.testing.assert_close(task.extras[0](seen), torch.zeros(2), atol=1e-5, rtol=0)


def test_the_average_follows_the_encoder_and_its_decay_the_epoch():
    task = task_of(feature="ema")
    (average,) = task.followers.values()
    encoder = task.model.encoder
    assert {p.data_ptr() for p in average.parameters()}.isdisjoint(p.data_ptr() for p in task.model.parameters())
    before = encoder.norm.bias.detach().clone()
    with torch.no_grad():
        encoder.norm.bias.fill_(1)
    task.follow(0)  # it has seen nothing yet
    assert torch.equal(average.norm.bias, encoder.norm.bias) and not torch.equal(before, average.norm.bias)
    for epoch, step, decay in ((0, 11, 10 / 19), (0, 10**9, 0.999), (50, 10**9, 0.99945), (100, 10**9, 0.9999),
                               (250, 10**9, 0.999945), (400, 10**9, 0.99999), (900, 10**9, 0.99999)):  # fmt: skip
        with torch.no_grad():
            average.norm.bias.zero_()
        task.epoch = epoch
        task.follow(step)
        torch.testing.assert_close(average.norm.bias, torch.full((48,), 1 - decay), atol=1e-7, rtol=1e-3)


def test_a_teacher_starts_from_the_weights_that_the_student_does():
    settings = Resolved(**SMALL, feature="ema")
    start = AutoencoderWeights(asdict(settings), autoencoder_of(settings).state_dict())
    source = open_source(settings.data)
    task = PretrainTask(settings, source, *split_off_held_out(len(source)), start)
    for name, value in task.followers["feature_average"].state_dict().items():
        assert torch.equal(value, start.state[f"encoder.{name}"])


def test_predicting_a_teacher_is_learned(tiny, tmp_path, encoder):
    options = tiny | RUN | {"data": "shapes:24", "epochs": 40, "min_crop": 1.0, "flip": False, "evaluate_epochs": 40}
    found = rows(mirl.pretrain(**options, feature=encoder, extra_share=1.0, warmup_epochs=2, out=tmp_path / "run"))
    assert found[0]["feature"] > 1.5 and found[-1]["feature"] < 0.6 * found[0]["feature"]


# What a run leaves


def test_what_a_run_leaves_needs_no_teacher(tiny, tmp_path):
    options = tiny | RUN | {"feature": "ema", "checkpoint_steps": 1}
    run = mirl.pretrain(**options, out=tmp_path / "run")
    assert not any("predict_features" in name for name in weights(run))
    finished = load_autoencoder(str(run))
    (run / "autoencoder.safetensors").unlink()
    (run / "encoder").rename(run / "gone")
    unfinished = load_autoencoder(str(run))  # from its checkpoint
    assert unfinished.shape.features == 0
    for name, value in finished.state_dict().items():
        assert torch.equal(value, unfinished.state_dict()[name])
    state = torch.load(next((run / "checkpoints").iterdir()), weights_only=True)
    assert state["feature_average"].keys() == finished.encoder.state_dict().keys()
    again = mirl.pretrain(**options | {"weights": str(run)}, out=tmp_path / "again")
    log = (again / "log.txt").read_text()
    assert "2 decoders trained too; their layers that predict features are fresh" in log
    assert rows(again, "held_out")[0]["pixel"] == pytest.approx(rows(run, "held_out")[-1]["pixel"], abs=1e-5)


def test_the_summary_says_what_is_compared_and_what_is_not_read(vgg, encoder):
    lines = task_of(feature=encoder, vgg=vgg, method="coarse_to_fine", separation="log", separation_sigma=0.5).summary()
    for line in (
        "parts     coarse and fine, log, 0.5 px",
        f"objective 1 x feature: tokens of {encoder}, growing over 10 epochs · on 50% of each batch",
        f"objective 0.1 x vgg: relu3_3 of a VGG16, {vgg} · on 50% of each batch",
    ):
        assert line in lines
    assert not any(line.startswith("warning") for line in lines)
    idle = {"separation_sigma": 1.0, "feature_weight": 2.0, "vgg_weight": 2.0, "extra_share": 1.0, "did_blocks": "all"}
    idle |= {"context": "previous", "labelled": "shapes", "block_figures": False}
    lines = task_of(method="mae", **idle).summary()
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: --context has no effect without several segments",
        "warning: --did_blocks has no effect without cross-attention",
        "warning: --separation_sigma has no effect without coarse and fine targets",
        "warning: --feature_weight has no effect without --feature",
        "warning: --vgg_weight has no effect without --vgg",
        "warning: --extra_share has no effect without --feature or --vgg",
        "warning: --labelled has no effect without --block_figures",
    ]


def test_bfloat16_runs_with_every_objective(tiny, tmp_path, vgg):
    options = tiny | RUN | {"feature": "ema", "vgg": vgg, "precision": "bf16", "method": "coarse_to_fine"}
    assert all(np.isfinite(loss) for _, _, loss in losses(mirl.pretrain(**options, out=tmp_path / "run")))


# Mistakes


def test_mistakes_are_one_line(patterned, vgg, encoder, tmp_path):
    grey = {"data": patterned, "channels": 1}
    lone = write_encoder(tmp_path / "grey", channels=1)
    for options, message in (
        (grey | {"vgg": vgg}, "--vgg sees images of 3 channels and these have 1; leave out --vgg"),
        (grey | {"feature": encoder}, "sees images of 3 channels and these have 1; give another ViT, or --feature ema"),
        ({"feature": lone}, "sees images of 1 channel and these have 3"),
        ({"feature": "nowhere"}, "--feature: 'nowhere' is neither a file"),
        ({"feature": "nowhere"}, "; or ema, an average of the encoder"),
        ({"vgg": "nowhere"}, "--vgg nowhere is no file; give torchvision's VGG16"),
    ):
        with pytest.raises(UserError) as caught:
            task_of(**options)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(values_of(task_of(**grey, feature=lone))) == ["loss", "pixel", "feature"]
