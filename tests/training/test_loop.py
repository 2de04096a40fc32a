"""One optimizer step is the same however it is cut up, and survives what goes wrong in it."""

import json
import math
from collections import Counter
from datetime import datetime

import pytest
import torch
from torch import nn

from mirl.data.loading import Batch
from mirl.errors import UserError
from mirl.training import loop, processes
from mirl.training.checkpoints import saved_steps
from mirl.training.probe import probe
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress
from mirl.training.task import Task

BATCH = 12


class Regression(Task):
    """A small task: predict the mean of an image. Losses of `broken` images are NaN; more than `fits` is too much."""

    def __init__(self, broken=(), fits=1000):
        self.model, self.average = network(), None
        self.broken, self.fits, self.sizes = torch.tensor(list(broken)), fits, []

    def loss(self, model, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pixels = batch.images.flatten(1).float() / 255
        loss = (model(pixels)[:, 0] - pixels.mean(1)).square()
        return {"loss": torch.where(torch.isin(batch.indices, self.broken), torch.nan, loss), "double": 2 * loss}

    def draw(self, run, monitor, step, epoch):
        pass

    def names(self, batch):
        return [f"image_{int(index)}.png" for index in batch.indices]

    def example(self, size):
        return chunk(range(size))


class Overflowing(Regression):
    """Adds to the loss of `broken` images what is not finite, or whose gradient is not or is huge."""

    def __init__(self, kind, broken):
        super().__init__()
        self.kind, self.overflowing = kind, torch.tensor(list(broken))

    def loss(self, model, batch):
        values = super().loss(model, batch)
        zero = values["loss"] - values["loss"].detach()
        term = {"loss": zero + math.inf, "gradient": zero.sqrt(), "huge gradient": 1e25 * zero}[self.kind]
        return values | {"loss": values["loss"] + torch.where(torch.isin(batch.indices, self.overflowing), term, zero)}


class Unstable(Regression):
    """Its loss is infinite once the model was trained for a step."""

    def loss(self, model, batch):
        values = super().loss(model, batch)
        return values | {"loss": values["loss"] * (math.inf if model.training and self.trained(model) else 1)}

    def trained(self, model):
        return not torch.equal(next(model.parameters()).detach(), network()[0].weight)


def chunk(indices):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1000, 1, 4, 4), dtype=torch.uint8, generator=generator)
    indices = torch.tensor(list(indices))
    return Batch(images=images[indices], indices=indices)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 1))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("draw_curves", "draw_gradients"):
        monkeypatch.setattr(loop, name, lambda *_: None)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False, overwrite=False)
    yield folder
    folder.close()


def train(
    run,
    task,
    *,
    steps=2,
    micro_batch=BATCH,
    batches=None,
    clip_grad=None,
    checkpoint_seconds=1e9,
    checkpoint_steps=1000,
):
    """Run the loop for `steps` and return the weights, the progress and the rows of the training steps."""
    if batches is None:
        batches = [chunk(range(k, k + micro_batch)) for k in range(0, steps * BATCH, micro_batch)]
    progress = Progress()
    plan = loop.Plan(
        steps=steps, steps_per_epoch=steps, batch_size=BATCH, micro_batches=math.ceil(BATCH / micro_batch),
        rate=lambda _: 0.1, clip_grad=clip_grad, evaluate_every=1000, checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps, samples=1000, max_bad=0.1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(task.model.parameters())
    fabric = processes.launch("auto", 1, "32")
    loop.fit(fabric, task, optimizer, run, plan, progress, lambda _: batches, [chunk(range(900, 904))])
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return task.model.state_dict(), progress, [row for row in rows if row["kind"] == "train"]


def log(run):
    return (run.path / "log.txt").read_text()


def assert_close(left, right):
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-6)
        assert not torch.equal(value, network().state_dict()[name]), f"{name} was not trained"


@pytest.fixture
def whole(tmp_path):
    """Weights and rows of two steps, each over the whole batch at once."""
    folder = RunFolder(tmp_path / "whole", resume=False, overwrite=False)
    weights, _, rows = train(folder, Regression())
    folder.close()
    return weights, rows


@pytest.mark.parametrize("micro_batch", [1, 4, 5])  # 5: the last piece is smaller
def test_micro_batches_add_up_to_the_batch(run, whole, micro_batch):
    batches = None
    if micro_batch == 5:
        batches = [chunk(r) for k in (0, BATCH) for r in (range(k, k + 5), range(k + 5, k + 10), range(k + 10, k + 12))]
    weights, _, rows = train(run, Regression(), micro_batch=micro_batch, batches=batches)
    assert_close(weights, whole[0])
    for row, expected in zip(rows, whole[1], strict=True):
        for name in ("loss", "double", "grad_norm", "lr"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5)


def test_short_memory_halves_the_piece_and_not_the_result(run, whole):
    task = Regression(fits=4)
    weights, _, rows = train(run, task)
    assert_close(weights, whole[0])
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole[1]], rel=1e-5)
    assert task.sizes[1:] == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3, 4]  # the found size is kept; 4: held-out images
    assert "out of GPU memory with 12 images at once; going on with 6" in log(run)


def test_what_a_step_added_up_before_memory_ran_out_does_not_count(run, whole):
    ranges = [range(k, k + n) for first in (0, BATCH) for k, n in ((first, 3), (first + 3, 9))]
    weights, _, _ = train(run, Regression(fits=4), micro_batch=6, batches=[chunk(r) for r in ranges])
    assert_close(weights, whole[0])


def test_no_memory_for_one_image_is_a_user_error(run):
    class Full(Regression):
        def loss(self, model, batch):
            if model.training:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(model, batch)

    with pytest.raises(UserError, match="with 1 image at once; try a smaller model or image"):
        train(run, Full())


def test_a_non_finite_loss_skips_the_step_and_names_the_image(run):
    batches = [chunk(range(12)), chunk(range(12, 24)), chunk(range(24, 36))]
    weights, progress, rows = train(run, Regression(broken=[17]), steps=3, batches=batches)
    assert progress.skipped == 1
    assert "step 2 skipped: the loss of image_17.png is not finite (1 skipped so far)" in log(run)
    assert [row["loss"] is not None for row in rows] == [True, False, True]  # NaN is null in JSON
    assert all(value.isfinite().all() for value in weights.values())


def test_followers_follow_each_step_that_was_taken_and_the_task_knows_when_it_was(run):
    class Followed(Regression):
        followed = ()

        @property
        def followers(self):
            return {"average": self.model}

        def follow(self, step):
            self.followed += ((step, self.epoch),)

    task = Followed(broken=[17])
    train(run, task, steps=4, batches=[chunk(range(k, k + 12)) for k in (0, 12, 24, 36)])
    assert task.followed == ((0, 0.0), (2, 0.5), (3, 0.75))
    assert task.epoch == 1.0  # of the last evaluation


def test_what_happened_is_recorded_with_its_step(run):
    memory = train(run, Regression(fits=6), steps=1)[1]
    assert memory.skipped == 0
    train(run, Regression(broken=[17]), steps=3, batches=[chunk(range(k, k + 12)) for k in (0, 12, 24)])
    incidents = [row for row in run.rows() if row["kind"] == "incident"]
    assert [(row["what"], row["step"]) for row in incidents] == [("memory", 1), ("skipped step", 2)]
    assert incidents[1]["text"] in log(run) and "image_17.png" in incidents[1]["text"]
    assert all(datetime.fromisoformat(row["time"]).tzinfo for row in incidents)


def test_a_skipped_step_changes_nothing(run, tmp_path):
    bad_last = [chunk(range(12)), chunk(range(12, 24))]
    weights, _, _ = train(run, Regression(broken=[17]), batches=bad_last)
    one = RunFolder(tmp_path / "one", resume=False, overwrite=False)
    expected, _, _ = train(one, Regression(), steps=1)
    one.close()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["loss", "gradient", "huge gradient"])
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "loss scale"])
def test_what_overflows_in_one_micro_batch_touches_neither_weights_nor_moments(tmp_path, monkeypatch, kind, scaled):
    """A loss may overflow where its gradient does not, and the other way round."""
    if scaled:  # what --precision 16 has on a GPU
        launch = processes.launch

        def launch_scaled(*options):
            fabric = launch(*options)
            fabric.strategy.precision = processes.Autocast(
                "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0)
            )
            return fabric

        monkeypatch.setattr(processes, "launch", launch_scaled)
    states = []
    for steps in (2, 1):  # the second of two is skipped
        folder = RunFolder(tmp_path / str(steps), resume=False, overwrite=False)
        task = Overflowing(kind, [17])
        train(folder, task, steps=steps, micro_batch=4)
        cause = "loss of image_17.png" if kind == "loss" else "gradient"
        assert (f"step 2 skipped: the {cause} is not finite" in log(folder)) == (steps == 2)
        # Of three micro-batches that are computed again, one has a loss that is not finite.
        again = {4: 3, 1: 4} if kind == "loss" and steps == 2 else {}
        assert Counter(task.sizes) == Counter({4: 3 * steps + 2}) + Counter(again)
        states.append(torch.load(folder.checkpoints / f"step_{steps:08d}.pt", weights_only=True))
        folder.close()
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_five_skipped_in_a_row_stop_with_advice_and_the_last_checkpoint_stays(run):
    with pytest.raises(UserError, match=r"5 steps in a row .*--resume and --rollback.*--clip_grad 1.*--base_lr"):
        train(run, Unstable(), steps=20, checkpoint_seconds=0)
    newest = saved_steps(run.checkpoints)[0]
    state = torch.load(loop.checkpoints.checkpoint_path(run.checkpoints, newest), weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert log(run).count("skipped: ") == 5


def test_the_gradient_is_clipped_and_its_true_norm_recorded(run, whole):
    weights, _, rows = train(run, Regression(), clip_grad=1e-12, steps=1)
    assert rows[0]["grad_norm"] == pytest.approx(whole[1][0]["grad_norm"], rel=1e-5)
    # Adam divides by the gradient's size plus 1e-8: what is far below that hardly moves (AdamW's decay aside).
    moved = (weights["0.weight"] - network()[0].weight * (1 - 0.1 * 0.01)).abs().max()
    assert moved < 1e-4


def test_half_precision_leaves_what_a_model_is_given_as_it_is():
    """Corners of boxes beyond 256 px are no numbers of bfloat16, and grey levels lose their last digits."""
    given = torch.rand(3, 16), [{"boxes": torch.tensor([[1025.0, 10.0, 1027.0, 20.0]])}]

    class Model(nn.Linear):
        def forward(self, images, targets):
            assert torch.equal(images, given[0]) and torch.equal(targets[0]["boxes"], given[1][0]["boxes"])
            result = super().forward(images)
            assert result.dtype == torch.bfloat16
            return result

    fabric = processes.launch("auto", 1, "bf16")
    assert fabric.setup_module(Model(16, 2))(*given).dtype == torch.float32
    with fabric.autocast():
        assert torch.is_autocast_enabled("cpu")


def test_too_many_processes_are_a_user_error():
    with pytest.raises(UserError, match="--devices 0"):
        processes.launch(0, 1, "32")


def test_checkpoints_come_after_so_many_steps(run):
    train(run, Regression(), steps=5, checkpoint_steps=2)
    assert saved_steps(run.checkpoints) == [5, 4]


def test_the_probe_halves_until_it_fits(run):
    fabric = processes.launch("auto", 1, "32")
    task = Regression(fits=3)
    size, seconds = probe(fabric, task, 12, run)
    assert (size, task.sizes) == (3, [12, 6, 3, 3])
    assert seconds > 0
    assert "12 images at once do not fit in GPU memory; taking 3" in log(run)
