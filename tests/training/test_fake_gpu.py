"""A training step as a GPU does it, on tensors without storage that say they are a GPU's; no GPU is needed.

Fake tensors refuse to mix devices, and whatever needs a value that only the GPU knows. What they cannot tell is whether
a kernel is there and what it computes.
"""

from collections import defaultdict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import vgg16

from mirl.data.labels import open_split
from mirl.data.semantic import open_semantic
from mirl.data.sources import open_source
from mirl.data.transforms import channel_statistics
from mirl.models.attention import fused
from mirl.models.encoder import ARCHITECTURE, build_encoder, timm_arguments
from mirl.models.products import fast_products
from mirl.models.weights import Weights
from mirl.objectives.perceptual import RELU3_3
from mirl.tasks.finetune import FinetuneTask
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.segmentation import SegmentTask
from mirl.tasks.settings.finetuning import Finetuning, resolve_finetuning
from mirl.tasks.settings.pretraining import Resolved
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.training.evaluation import Means
from mirl.training.optimizers import adamw
from mirl.training.probe import _reserve
from mirl.training.processes import Autocast
from mirl.training.saving import restore
from mirl.training.steps import Accumulator
from mirl.training.task import place

GPU, IMAGES = torch.device("cuda", 0), 4
aten = torch.ops.aten
TINY = {
    "data": "shapes:20", "model": "vit_48x4_2", "image_size": (32, 32), "patch_size": (8, 8), "decoder_width": 32,
    "decoder_depth": 1, "block_figures": False, "precision": "bf16", "warmup_epochs": 1, "epochs": 2,
}  # fmt: skip
METHODS = {
    "mirl": {},
    "computed again": {"model": "vit_48x4_4", "segments": 4, "target": "raw", "checkpointing": True},
    "embedded memory": {"decoder_depth": 2, "did_memory": "embedded", "did_blocks": "all", "weight_norm": True},
    "teacher and vgg": {"feature": "ema", "vgg": "a file"},
    "mae": {"method": "mae"},
    "truncated_mae": {"method": "truncated_mae", "taps": [1]},
    "multi_decoder": {"method": "multi_decoder"},
    "coarse_to_fine": {"method": "coarse_to_fine"},
    "fine_to_coarse": {"method": "fine_to_coarse", "separation": "log"},
    "explicit_residual": {"method": "explicit_residual"},
}


class Watch(TorchDispatchMode):
    """Notes what a GPU is asked for, and goes on with 1 wherever the host reads a number from it.

    Attributes:
        read: how many numbers are read; copied: tensors for which the host waits until they are on the other side.
        products: types of the results of matrix products; not of attention's, whose kernel only a GPU chooses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read, self.copied, self.products = 0, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.read += 1
            return 1.0
        result = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or args[2:])
            if waits and source.device.type != result.device.type:
                self.copied.append(f"{tuple(source.shape)} from {source.device} to {result.device}")
        if func in (aten.addmm.default, aten.mm.default):
            self.products.add(result.dtype)
        return result


@contextmanager
def gpu():
    """Let tensors be fake, and have bf16 on a GPU."""
    true, there = (lambda: True), torch.cuda.is_available()
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", true),
        patch("torch.cuda.is_available", lambda: there),  # which takes long, and is asked at each operation
        patch("torch._C._current_graph_task_id", lambda: 0),  # or checkpointing would begin again at each tensor
        patch.object(Tensor, "backward", backward),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@torch.no_grad()
def backward(loss):
    """Do what autograd's engine does, which would ask the driver for its devices."""
    order, seen, todo = [], set(), [(loss.grad_fn, False)]
    while todo:  # depth first: a node comes before those that it needs a gradient from
        node, finished = todo.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo += [(node, True), *((other, False) for other, _ in node.next_functions if other is not None)]
    gradients = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        given = gradients.pop(node, {})
        results = node(*(given.get(number) for number in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        for (other, number), result in zip(node.next_functions, results, strict=False):
            if other is None or result is None:
                continue
            form = other._input_metadata[number]
            assert result.device == form.device, other
            result = result.sum_to_size(form.shape) if list(result.shape) != form.shape else result
            result = result.to(form.dtype) if result.dtype != form.dtype else result
            before = gradients[other].get(number)
            gradients[other][number] = result if before is None else before + result


class Absent(CPUAccelerator):
    """Stands for the GPU's, which would ask the driver."""

    def setup_device(self, device):
        pass


def fabric_of_gpu(precision="bf16-mixed"):
    strategy = SingleDeviceStrategy(device=GPU)
    return Fabric(accelerator=Absent(), strategy=strategy, plugins=Autocast(precision, "cuda"))


def a_step(task, micro_batches=1, *, by_block=False):
    """Do a step as `fit` does it, then an evaluation; return what was asked of the GPU in both, and the gradients."""
    fabric = fabric_of_gpu()
    chunks = [task.example(IMAGES) for _ in range(micro_batches)]
    gradients = {}

    def clip(*arguments, **options):
        gradients.update({name: p.grad for name, p in task.model.named_parameters() if p.requires_grad})
        return Fabric.clip_gradients(fabric, *arguments, **options)

    with gpu(), patch.object(fabric, "clip_gradients", clip):
        place(fabric, task)
        optimizer = task.optimizer()
        assert all(group["fused"] for group in optimizer.param_groups)
        model = fabric.setup_module(task.model.train(), move_to_device=False)
        accumulator = Accumulator(fabric, task, model, fabric.setup_optimizers(optimizer), 1.0, run=None)
        with Watch() as training:
            step = accumulator.step(chunks, (0, 2, 1), number=1, by_block=by_block)
            task.follow(0)
        assert step.finite
        moments = {value.device for state in optimizer.state.values() for value in state.values()}
        assert moments == {GPU}
        evaluation = Means(fabric, lambda batch: task.loss(task.model.eval(), batch))
        with Watch() as judging, torch.no_grad(), fabric.autocast():
            evaluation.add(chunks[0].to(GPU))
    assert (judging.read, judging.copied) == (0, [])
    return training, gradients, step


def check(training, gradients, step):
    """Check that a step waited for what it records, once, and that weights have gradients of their own type."""
    blocks = 0 if step.blocks is None else len(step.blocks)
    assert training.copied == []
    assert training.read == len(step.means) + 1 + blocks
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert (gradient.device, gradient.dtype) == (GPU, torch.float32), name


@pytest.fixture
def vgg():
    """A VGG16 without weights' values."""
    with torch.device("meta"):
        network = vgg16(weights=None, init_weights=False).features[:RELU3_3]
    return network.to_empty(device="cpu").requires_grad_(False).eval().to(memory_format=torch.channels_last)


def pretraining(network=None, **options):
    settings = Resolved(**TINY | options)
    source = open_source(settings.data)
    with patch("mirl.tasks.objectives.open_vgg", lambda path: network):
        return PretrainTask(settings, source, *split_off_held_out(len(source)))


@pytest.fixture
def encoder():
    """Weights of a tiny ViT."""
    arguments = timm_arguments(48, 4, 2, (32, 32), (8, 8), 3)
    state = build_encoder(48, 4, 2, (32, 32), (8, 8), 3).state_dict()
    return Weights(ARCHITECTURE, arguments, state, *channel_statistics(3))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_step_of_pre_training(options, vgg):
    training, *others = a_step(pretraining(vgg, **options))
    check(training, *others)
    # Images are filtered in float32, or what is left of them would be mostly rounding.
    filtered = {torch.float32} if "coarse" in options.get("method", "mirl") else set()
    assert training.products == {torch.bfloat16} | filtered


def test_micro_batches_and_gradients_of_blocks_are_read_once_a_step():
    training, gradients, step = a_step(pretraining(), micro_batches=2, by_block=True)
    check(training, gradients, step)
    assert len(step.blocks) == 3


def test_a_step_of_fine_tuning(encoder):
    given = Finetuning(weights="x", data="shapes:20:32", ema=0.9, erasing=1.0, drop_path=0.1)
    train, val = open_split(given.data, channels=3)
    settings = resolve_finetuning(
        given, images=20, depth=2, image_size=(32, 32), patch_size=(8, 8), gpu=True, devices=1, precision="bf16"
    )
    task = FinetuneTask(settings, encoder, train, val)
    check(*a_step(task))


@pytest.mark.parametrize("relative", [False, True])
def test_a_step_of_segmentation(encoder, relative):
    given = Segmentation(weights="x", data="shapes:20:32", crop_size=32, image_size=32, width=16, stride=16,
                         relative_positions=relative)  # fmt: skip
    train, val = open_semantic(given.data)
    settings = resolve_segmentation(
        given, images=20, shorter_side=32, depth=2, width=48, patch_size=8, gpu=True, devices=1, precision="bf16"
    )
    check(*a_step(SegmentTask(settings, encoder, train, val)))


def test_kernels_are_a_gpus():
    task = pretraining()
    with gpu():
        place(fabric_of_gpu(), task)
    chosen = [module.fused_attn for module in task.model.modules() if hasattr(module, "fused_attn")]
    assert len(chosen) == 2
    assert all(chosen)
    assert all(fused(GPU, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    assert isinstance(fast_products(task.model, GPU), nullcontext)


@pytest.mark.parametrize("before", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("after", ["bf16-mixed", "16-mixed"])
def test_a_run_goes_on_in_another_precision(before, after):
    """AdamW counts its steps on the GPU if it is fused, else on the CPU; a loss scaler's state may be there or not."""

    def optimizer(model, precision):
        fused = precision == "bf16-mixed"
        return adamw(model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), fused=fused)

    model = nn.Linear(3, 2)
    begun = optimizer(model, before)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    begun.step()
    with gpu():
        fabric = fabric_of_gpu(before)
        state = {
            "step": 1, "samples": 9, "model": model.state_dict(), "optimizer": begun.state_dict(),
            "precision": fabric.strategy.precision.state_dict(), "skipped": 0, "bad": {}, "jumps": [], "watch": {},
        }  # fmt: skip
        task = SimpleNamespace(model=nn.Linear(3, 2, device=GPU), followers={}, about={})
        resumed = optimizer(task.model, after)
        run = SimpleNamespace(checkpoints=None, say=None)
        with patch("mirl.training.checkpoints.load_newest", lambda *_, **__: state):
            assert restore(fabric_of_gpu(after), run, task, resumed, 9).step == 1
        devices = [{name: value.device for name, value in moments.items()} for moments in resumed.state.values()]
        counted = GPU if after == "bf16-mixed" else torch.device("cpu")
        assert devices == [{"step": counted, "exp_avg": GPU, "exp_avg_sq": GPU}] * 2
    # Nothing is left of a file that may be mapped.
    assert all(
        now["step"] is not then["step"] for now, then in zip(resumed.state.values(), begun.state.values(), strict=True)
    )


def test_several_gpus_leave_memory_to_their_exchange():
    with gpu(), patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=2000)):
        model = nn.Linear(3, 2, device=GPU)
        alone, together = (
            sum(
                tensor.nbytes for tensor in _reserve(SimpleNamespace(strategy=None, device=GPU, world_size=size), model)
            )
            for size in (1, 2)
        )
    assert (alone, together) == (2 * 8 * 4, 2 * 8 * 4 + 100)


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (lambda x: x + torch.zeros(3), FakeTensorDeviceMismatchError),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[0].item(), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
    ],
)
def test_mistakes_do_not_pass(mistake, expected):
    with gpu(), pytest.raises(expected):
        mistake(torch.zeros(3, device=GPU))


def test_waiting_is_noted():
    with gpu(), Watch() as watch:
        x = torch.zeros(2, device=GPU)
        x.new_tensor([1.0, 2.0])
        torch.zeros(3).to(GPU, non_blocking=True)
        x.cpu()
        x.tolist()
    assert watch.copied == ["(2,) from cpu to cuda:0", "(2,) from cuda:0 to cpu"]
    assert watch.read == 2
