"""Each block's gradient is recorded as it was before clipping, summed over micro-batches. Paper: Appendix C."""

import math

import pytest
import torch
from timm.models import VisionTransformer
from torch.nn import functional as F

from mirl.data.loading import Batch
from mirl.training import loop, processes
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress
from mirl.training.steps import block_norms
from mirl.training.task import Task

BATCH, STEPS = 8, 12


class Brightness(Task):
    """A tiny ViT that tells how bright an image is."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = VisionTransformer(
                img_size=8, patch_size=4, in_chans=1, embed_dim=12, depth=3, num_heads=2, num_classes=1
            )

    @property
    def encoder(self):
        return self.model

    def loss(self, model, batch):
        pixels = batch.images.float() / 255
        return {"loss": F.mse_loss(model(pixels)[:, 0], pixels.mean((1, 2, 3)), reduction="none")}

    def names(self, batch):
        return [str(int(index)) for index in batch.indices]

    def example(self, size):
        return images(range(size))


def images(indices):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Batch(images=pixels[list(indices)], indices=torch.tensor(list(indices)))


@pytest.fixture
def recorded(tmp_path):
    """Return a function that trains and gives the rows of gradients and of steps."""

    def train(name="run", *, micro_batch=BATCH, clip_grad=None):
        run, task = RunFolder(tmp_path / name, resume=False, overwrite=False), Brightness()
        batches = [images(range(k, k + micro_batch)) for k in range(0, STEPS * BATCH, micro_batch)]
        plan = loop.Plan(
            steps=STEPS, steps_per_epoch=STEPS, batch_size=BATCH, micro_batches=BATCH // micro_batch,
            rate=lambda _: 1e-3, clip_grad=clip_grad, evaluate_every=STEPS, checkpoint_seconds=1e9,
            checkpoint_steps=STEPS, samples=200, max_bad=0.1,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(task.model.parameters())
        fabric = processes.launch("auto", 1, "32")
        loop.fit(fabric, task, optimizer, run, plan, Progress(), lambda _: batches, [images(range(150, 154))])
        run.close()
        return [[row for row in run.rows() if row["kind"] == kind] for kind in ("gradients", "train")], run

    return train


def test_norms_are_those_of_the_loss(recorded):
    (gradients, steps), run = recorded()
    assert [row["step"] for row in gradients] == [1, 11]  # the first, then every tenth
    task = Brightness()
    task.loss(task.model, images(range(BATCH)))["loss"].mean().backward()
    for block, norm in zip(task.model.blocks, gradients[0]["blocks"], strict=True):
        expected = math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters()))
        assert norm == pytest.approx(expected, rel=1e-5)
    # All of this model is its encoder.
    assert gradients[0]["encoder"] == pytest.approx(steps[0]["grad_norm"], rel=1e-5)
    assert (run.pictures / "gradients.png").stat().st_size > 1000


def test_neither_clipping_nor_micro_batches_change_the_first_norms(recorded):
    (whole, _), _ = recorded("whole")
    for name, options in {"clipped": {"clip_grad": 1e-4}, "cut": {"micro_batch": 2}}.items():
        (gradients, _), _ = recorded(name, **options)
        assert gradients[0]["blocks"] == pytest.approx(whole[0]["blocks"], rel=1e-4)


def test_a_block_without_gradient_has_norm_zero():
    task = Brightness()
    for block in task.model.blocks[1:]:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    task.loss(task.model, images(range(4)))["loss"].mean().backward()
    task.model.blocks[2].zero_grad()
    assert block_norms(task.model)[3] == 0
    task.model.blocks[1].requires_grad_(False).zero_grad()
    assert block_norms(task.model)[2] == 0
