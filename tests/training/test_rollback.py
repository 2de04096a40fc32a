"""A run that goes wrong goes back to before, leaves out what it read since, and is still the same run."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from mirl.data.loading import Batch, Views, epoch_order, seeded
from mirl.errors import UserError
from mirl.tasks import run as running
from mirl.tasks.options import ResolvedRun
from mirl.training import processes
from mirl.training.checkpoints import saved_steps
from mirl.training.divergence import ENOUGH, PERSISTENT, SPIKE, Watch
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress
from mirl.training.steps import Step

IMAGES, BATCH = 640, 8
STEPS = IMAGES // BATCH


class Numbers(Views):
    """Random images; the index of an image tells its epoch too, so that each is seen once."""

    def __init__(self, count):
        super().__init__([], np.arange(count), view=None)

    def __getitem__(self, key):
        epoch, index = key
        with seeded(epoch, index, torch_alone=True):
            images = torch.randint(256, (1, 1, 4, 4), dtype=torch.uint8)
        return Batch(images=images, indices=torch.tensor([epoch * IMAGES + index]))


class Poisoned(running.RunnableTask):
    """Predict the mean of an image. Losses of the last images of some batches of the first epoch are multiplied.

    Args:
        batches: that are poisoned; dose: what their losses are multiplied by; images: how many in each.
        killed, told: after how many steps in all the process dies, or is sent SIGTERM.
        blown_up: the step whose learning rate is infinite.
    """

    samples = IMAGES + 4

    def __init__(self, batches=(), dose=math.nan, images=BATCH, *, steps=STEPS, killed=None, told=None, blown_up=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 1))
        self.steps = steps
        order = epoch_order(steps * BATCH, 0, 0).reshape(steps, BATCH)[list(batches), BATCH - images :]
        self.poison, self.dose = torch.tensor(order.flatten()), dose
        self.killed, self.told, self.blown_up = killed, told, blown_up
        self.training, self.held_out, self.seen = Numbers(steps * BATCH), Numbers(4), []

    def optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), weight_decay=0)

    def rate(self, epoch):
        return math.inf if round(epoch * self.steps) + 1 == self.blown_up else 1e-2

    def loss(self, model, batch):
        if model.training and torch.is_grad_enabled() and batch.indices[0] >= 0:  # not when speed is measured
            self.seen.append(batch.indices.tolist())
            if len(self.seen) == self.told:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(self.seen) == self.killed:
                raise SystemError("killed")
        pixels = batch.images.flatten(1).float() / 255
        loss = (model(pixels)[:, 0] - pixels.mean(1)).square() + 0.01 * pixels[:, 0]
        return {"loss": torch.where(torch.isin(batch.indices, self.poison), self.dose, 1) * loss}

    def names(self, batch):
        return [f"image_{int(index)}.png" for index in batch.indices]

    def example(self, size):
        return Batch(images=torch.zeros(size, 1, 4, 4, dtype=torch.uint8), indices=torch.arange(-size, 0))

    def summary(self):
        return []

    def finish(self, run):
        pass


def carry_out(folder, task, *, rollback=True, resume=False, checkpoint_steps=10, devices=1):
    """Train, and return the weights, what was recorded of steps, and the run folder."""
    fabric = processes.launch(devices, 1, "32")
    run = RunFolder(folder, resume=resume, overwrite=False, writes=fabric.is_global_zero)
    task.settings = ResolvedRun(
        out=str(folder), batch_size=BATCH, micro_batch=BATCH // devices, report=False, rollback=rollback, resume=resume,
        checkpoint_steps=checkpoint_steps,
    )  # fmt: skip
    task.seen.clear()
    running.carry_out(fabric, task, run)
    rows = [(row["step"], row["loss"], row["lr"]) for row in run.rows() if row["kind"] == "train"]
    return task.model.state_dict(), rows, run


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_gradients"):
            patch.setattr(f"mirl.training.loop.{name}", lambda *_: None)
        yield


@pytest.fixture
def train(tmp_path):
    """Return a function that trains in a folder of that name."""
    return lambda task, name="run", **options: carry_out(tmp_path / name, task, **options)


@pytest.fixture(scope="module")
def jumping(tmp_path_factory):
    """Return a function that trains without poison and, from its start, has batches to leave out."""

    @cache
    def run(step, batch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "Progress", lambda: Progress(jumps=[(step, batch)]))
            return carry_out(tmp_path_factory.mktemp("jumping"), Poisoned())

    return run


def assert_same(left, right):
    """Check that two runs recorded the same and ended with the same weights, bit for bit."""
    assert left[1] == right[1] and len(left[1]) == STEPS
    assert all(torch.equal(value, right[0][name]) for name, value in left[0].items())


def incidents(run, what):
    return [(row["step"], row["text"]) for row in run.rows() if row["kind"] == "incident" and row["what"] == what]


NAN = {"batches": range(43, 48)}
SPIKE_OF_20 = {"batches": range(43, 63), "dose": 1000.0}


@pytest.mark.parametrize(
    ("poison", "start", "reached", "saved"),
    [(NAN, 42, 48, 40), ({"batches": range(40, 45)}, 39, 45, 30), (SPIKE_OF_20, 42, 63, 40)],
    ids=["nan", "nan just after a checkpoint", "spike"],
)
def test_a_run_that_rolls_back_equals_one_that_never_met_the_trouble(train, jumping, poison, start, reached, saved):
    task = Poisoned(**poison)
    found = train(task)
    assert_same(found, jumping(start, reached))
    ((step, text),) = incidents(found[2], "rollback")
    assert (step, text.partition(":")[0]) == (start, f"rolled back from step {reached} to step {saved}")
    assert text.endswith(f"; the batches of steps {start + 1} to {reached} are left out")
    again = {index for batch in task.seen[reached:] for index in batch}
    assert len(again) == (STEPS - saved) * BATCH and not again & set(task.poison.tolist())


def test_the_result_does_not_depend_on_when_checkpoints_were_written(train, jumping):
    found = train(Poisoned(**NAN), checkpoint_steps=35)
    assert_same(found, jumping(42, 48))
    assert "to step 35:" in incidents(found[2], "rollback")[0][1]


def test_there_may_be_several_rollbacks(train):
    run = train(Poisoned(batches=[*range(43, 48), *range(66, 71)]))[2]
    assert [step for step, _ in incidents(run, "rollback")] == [42, 59]  # 6 batches have been left out by then


@pytest.mark.parametrize("killed", [46, 50, 65], ids=["in trouble", "after the rollback", "later"])
def test_a_kill_before_or_after_a_rollback_changes_nothing(train, jumping, killed):
    with pytest.raises(SystemError):
        train(Poisoned(**NAN, killed=killed))
    assert_same(train(Poisoned(**NAN), resume=True), jumping(42, 48))


def test_a_signal_in_trouble_keeps_the_checkpoint_from_before(train, jumping, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(Poisoned(**NAN, told=46))
    line = (
        "stopped at step 46 of 80, in trouble and so not saved, the last good checkpoint is step 40; go on with --out"
    )
    assert line in capsys.readouterr().out
    assert_same(train(Poisoned(**NAN), resume=True), jumping(42, 48))


def test_trouble_that_comes_back_stops_the_run_with_advice(train, tmp_path):
    with pytest.raises(
        UserError, match=r"5 steps in a row .* after 3 rollbacks within 1000 steps; a checkpoint from bef"
    ):
        train(Poisoned(batches=range(43, 80)))
    assert saved_steps(tmp_path / "run" / "checkpoints")[0] == 40


def test_without_the_option_a_spike_is_named_and_the_run_goes_on(train):
    task = Poisoned(**SPIKE_OF_20 | {"images": 2})
    _, rows, run = train(task, rollback=False)
    assert len(rows) == STEPS and not incidents(run, "rollback")
    (first, text), (last, stays) = incidents(run, "loss spike")
    assert (first, last) == (46, 63)
    assert re.match(r"loss spike: \S+ at step 46, \S+ usually; 3 unusual steps in a row; highest for image_", text)
    poisoned = [f"image_{index}.png" for index in task.poison.tolist()]
    assert set(re.findall(r"image_\d+.png", text)[:2]) == set(poisoned[4:6])
    assert "going on with it (--rollback would go back to step 43)" in stays


@pytest.mark.parametrize(("poison", "last"), [(NAN, 48), (SPIKE_OF_20, 63)], ids=["nan", "spike"])
def test_without_the_option_a_run_saved_in_trouble_goes_wrong_at_the_same_step(train, jumping, tmp_path, poison, last):
    """And with the option it then does what it would have done."""
    with pytest.raises(KeyboardInterrupt):
        train(Poisoned(**poison, told=46), rollback=False)
    with pytest.raises(UserError, match="5 steps in a row") if poison is NAN else nullcontext():
        train(Poisoned(**poison), rollback=False, resume=True)
    run = RunFolder(tmp_path / "run", resume=True, overwrite=False, writes=False)
    if poison is NAN:
        assert [step for step, _ in incidents(run, "failed")] == [last]
        assert_same(train(Poisoned(**poison), resume=True), jumping(42, last))
    else:
        assert [step for step, _ in incidents(run, "loss spike")] == [46, last]


def test_trouble_from_before_all_checkpoints_is_not_gone_back_on(train, tmp_path):
    with pytest.raises(UserError, match="5 steps in a row"):
        train(Poisoned(**NAN), rollback=False, checkpoint_steps=1)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [47, 46]
    _, rows, run = train(Poisoned(**NAN), resume=True)
    assert len(rows) == STEPS and not incidents(run, "rollback")


def test_a_loss_that_stays_high_at_the_end_is_evaluated(train):
    run = train(Poisoned(**SPIKE_OF_20, steps=63), rollback=False)[2]
    assert incidents(run, "loss spike")[-1][0] == 63
    assert [row["step"] for row in run.rows() if row["kind"] == "held_out"] == [0, 63]


class Observing(Poisoned):
    """Records at leisure what it saw when it was evaluated."""

    run = None

    def draw(self, run, monitor, step, epoch):
        self.run = run

    def settle(self):
        if self.run:
            self.run.record({"kind": "blocks", "step": 0})
            self.run = None


def test_what_is_computed_beside_the_training_is_recorded_before_a_checkpoint(train):
    """Or a kill after it would lose it: the step is never done again."""
    rows = train(Observing(), rollback=False, checkpoint_steps=10)[2].rows()
    kinds = [(row["kind"], row["step"]) for row in rows]
    assert kinds.index(("train", 10)) < kinds.index(("blocks", 0)) < kinds.index(("train", 11))


def test_weights_that_overflow_are_never_saved(train):
    """At an infinite rate no weight stays finite, and no loss after it."""
    with pytest.raises(
        UserError, match=r"not finite at step 46; the last good checkpoint is step 40; add --resume and"
    ):
        train(Poisoned(blown_up=45), rollback=False)
    with pytest.raises(UserError, match=r"not finite after step 50; the last good checkpoint is step 40; add --resume"):
        train(Poisoned(blown_up=50), "saving", rollback=False)


def test_weights_that_overflow_are_rolled_back(train, monkeypatch):
    task = Poisoned()
    once = iter([math.inf])
    task.rate = lambda epoch: next(once, 1e-2) if round(epoch * STEPS) == 49 else 1e-2
    _, rows, run = train(task)
    assert len(rows) == STEPS
    ((step, text),) = incidents(run, "rollback")
    assert step == 49 and text.startswith(
        "rolled back from step 50 to step 40: the weights are not finite after step 50"
    )


def test_two_processes_roll_back_together(tmp_path, train):
    """Only the second has the images whose loss is not finite."""
    poison = {"steps": 16, "batches": range(5, 10), "images": BATCH // 2}
    command = [sys.executable, __file__, str(tmp_path / "two"), repr(poison)]
    two = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert two.returncode == 0, two.stderr
    assert (
        json.loads((tmp_path / "two" / "collectives.json").read_text())[1:4] == [["all_reduce"] * 2] * 3
    )  # and DDP's exchange of gradients
    weights, _, run = train(Poisoned(**poison))
    found = torch.load(tmp_path / "two" / "checkpoints" / "step_00000016.pt", weights_only=True)
    assert found["jumps"] == [(4, 10)]
    for name, value in weights.items():
        torch.testing.assert_close(found["model"][name], value, atol=1e-5, rtol=1e-5)
    theirs = RunFolder(tmp_path / "two", resume=True, overwrite=False, writes=False)
    assert incidents(theirs, "rollback") == incidents(run, "rollback")


@pytest.fixture
def watch():
    return Watch()


def follow(watch, losses):
    """Return the steps at which a spike was told, and those at which it stayed."""
    told, stays = [], []
    for number, loss in enumerate(losses, 1):
        trouble = watch.follow(number, Step({"loss": loss}, 1.0))
        told += [number] if watch.unusual == SPIKE else []
        if trouble:
            stays.append(number)
            watch.accept()
    return told, stays


def falling(noise, steps=2000):
    """A learning curve of a small batch: a steep fall, a plateau, a slow fall."""
    generator = random.Random(0)
    course = (0.4 + 2.5 * math.exp(-step / 40) + 0.5 / (1 + math.exp((step - 900) / 60)) for step in range(steps))
    return [loss * generator.lognormvariate(0, noise) for loss in course]


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.05, 0.5])
def test_no_alarm_at_curves_as_they_are(watch, noise):
    assert follow(watch, falling(noise)) == ([], [])


def test_no_alarm_at_a_loss_that_rises_slowly_or_has_a_heavy_tail(watch):
    generator = random.Random(0)
    assert follow(watch, [1 + step / 500 + generator.gauss(0, 0.001) for step in range(2000)]) == ([], [])
    watch.accept()
    assert follow(watch, [generator.paretovariate(1.5) for _ in range(5000)])[1] == []


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.05])
def test_a_spike_is_told_once_and_single_steps_are_not(watch, noise):
    losses = falling(noise)
    for step in (500, 502, 504, 505, *range(1500, 1510)):
        losses[step] *= 3
    assert follow(watch, losses) == ([1503], [])


def test_a_loss_that_stays_high_is_told_and_becomes_usual(watch):
    losses = falling(0.05)
    losses[1500:] = [3 * loss for loss in losses[1500:]]
    assert follow(watch, losses) == ([1500 + SPIKE], [1500 + PERSISTENT])
    assert len(watch.losses) >= ENOUGH


class Exchanging(Poisoned):
    """Notes the collectives that Python asked for between the losses of one step and the next."""

    def __init__(self, **poison):
        super().__init__(**poison)
        self.asked, self.by_step = [], []
        for name in ("all_reduce", "all_gather_object", "all_gather", "barrier", "broadcast", "broadcast_object_list"):
            call = partial(self.noted, name, getattr(torch.distributed, name))
            setattr(torch.distributed, name, call)
            setattr(torch.distributed.distributed_c10d, name, call)

    def noted(self, name, collective, *arguments, **options):
        self.asked.append(name)
        return collective(*arguments, **options)

    def loss(self, model, batch):
        if model.training and torch.is_grad_enabled() and batch.indices[0] >= 0:
            self.by_step.append(self.asked.copy())
            self.asked.clear()
        return super().loss(model, batch)


if __name__ == "__main__":
    task = Exchanging(**eval(sys.argv[2]))
    run = carry_out(sys.argv[1], task, devices=2)[2]
    if run.writes:
        (run.path / "collectives.json").write_text(json.dumps(task.by_step))
