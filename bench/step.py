"""What a pre-training step takes, by part and beside Hugging Face's MAE, against the machine's matrix products.

    python bench/step.py --models vit_s_54 --batches 8 32 --precisions 32 bf16
    python bench/step.py --models vit_s_12 vit_s_48 vit_s_200 --segments 2 --batches 8 --precisions bf16 --no_peer

A step is the loop's own: normalisation, forward, backward, gradient norm, AdamW. The peer is `ViTMAEForPreTraining` of
the same encoder with the decoder of equal cost (4 blocks), forward, backward and AdamW as its users write them. Each is
a process of its own, as it would be for a user: what one does to the allocator or the heap does not reach the other.
They take turns, and with them a matrix product that shows the machine's ceiling at that moment, so that ratios hold on
a busy machine; medians of them are given. Ours are MIRL with decoders of 1 block (the official code's for ViT-S-54)
and of 2 (the paper's), and with `--compile` the first of them compiled.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from plan import Real
from recording import add, machine
from sides import Side
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mirl.analysis.cost import step_cost
from mirl.analysis.machines import GIB, this_machine
from mirl.analysis.memory import step_memory
from mirl.models.encoder import parse_model
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training import processes
from mirl.training.runs import RunFolder

BETAS = (0.9, 0.95)
PEER = "Hugging Face MAE"


def settings_of(model: str, decoder_depth: int, segments: int | None, precision: str) -> Resolved:
    """Return what `mirl pretrain --model ...` would choose at 224 px."""
    return Resolved(
        model=model, decoder_depth=decoder_depth, image_size=(224, 224), patch_size=(16, 16), segments=segments,
        precision=precision, block_figures=False,
    )  # fmt: skip


@dataclass
class Parts:
    """Seconds by part of one step, by marks that modules leave when they begin and end."""

    real: Real
    marks: list[tuple[str, float]] = field(default_factory=list)

    def measure(self, images: int) -> dict[str, float]:
        """Do a step and return the seconds of its parts; `did` is within `decoders`."""
        model = self.real.task.model
        first, last, decoders = model.encoder.blocks[0], model.encoder.blocks[-1], model.decoders
        dids = [block.did for decoder in decoders for block in decoder.blocks if block.did is not None]
        hooks = [
            first.register_forward_pre_hook(self._mark("encoder")), last.register_forward_hook(self._mark("decoders")),
            decoders[-1].register_forward_hook(self._mark("loss, backward of it and decoders")),
            last.register_full_backward_pre_hook(self._mark("encoder backward")),
            *(did.register_forward_pre_hook(self._mark("+did")) for did in dids),
            *(did.register_forward_hook(self._mark("-did")) for did in dids),
        ]  # fmt: skip
        optimizer = self.real.accumulator.optimizer
        hooks.append(optimizer.register_step_pre_hook(self._mark("optimizer")))
        self.marks.clear()
        began = self.real._now()
        self.real.seconds(images)
        ended = self.real._now()
        for hook in hooks:
            hook.remove()
        main = [("input", began), *(mark for mark in self.marks if mark[0][1:] != "did"), ("", ended)]
        parts = {name: until - since for (name, since), (_, until) in pairwise(main)}
        did = sum((-1 if name[0] == "+" else 1) * at for name, at in self.marks if name[1:] == "did")
        return {**parts, "did (of decoders)": did}

    def _mark(self, name: str) -> Callable[..., None]:
        return lambda *_: self.marks.append((name, self.real._now()))


class Measured:
    """One side, in its own process; without a model it is the meter of the machine's ceiling."""

    def __init__(self, precision: Any) -> None:
        self.device, self.precision = torch.device("cuda" if torch.cuda.is_available() else "cpu"), precision

    def ceiling(self) -> float:
        """Return the FLOP/s of large matrix products at this moment."""
        return this_machine(self.device, self.precision).peak(self.precision)

    def parts(self, images: int) -> dict[str, float]:
        """Return the seconds of a step's parts, if they can be told apart."""
        return {}

    def peak(self) -> float:
        """Return the most GiB that were held so far: a GPU's since the last call, else the process's ever."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        held = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()  # for the other processes
        return held


class Ours(Measured):
    """The loop's own steps."""

    def __init__(self, settings: Resolved, compiled: bool, folder: str) -> None:
        fabric = processes.launch("auto", 1, settings.precision)
        super().__init__(settings.precision)
        run = RunFolder(Path(folder), resume=False, overwrite=False)
        self.compiled, self.real = compiled, Real(fabric, run, settings)
        if compiled:
            self.real.task.model.compile_repeated()

    def turn(self, images: int) -> float:
        """Return the seconds of a step."""
        return self.real.seconds(images)[1]

    def parts(self, images: int) -> dict[str, float]:
        return {} if self.compiled else Parts(self.real).measure(images)


class Peer(Measured):
    """Hugging Face's MAE of the same encoder."""

    def __init__(self, model: str, precision: str) -> None:
        super().__init__(precision)
        width, heads, depth = parse_model(model)
        decoder = min(512, width)
        shape = ViTMAEConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            decoder_hidden_size=decoder, decoder_num_hidden_layers=4, decoder_num_attention_heads=decoder // 32,
            decoder_intermediate_size=4 * decoder, norm_pix_loss=True,
        )  # fmt: skip
        self.model = ViTMAEForPreTraining(shape).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=BETAS, weight_decay=0.05)

    def turn(self, images: int) -> float:
        """Return the seconds of a step."""
        batch = torch.randn(images, 3, 224, 224, device=self.device)
        began = self._now()
        half = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            loss = self.model(batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - began

    def flops(self) -> float:
        """Count a step of one image."""
        with FlopCounterMode(display=False) as counter:
            self.model(torch.randn(1, 3, 224, 224, device=self.device)).loss.backward()
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def flops_of(settings: Resolved) -> float:
    """Count the arithmetic of our step for one image, a multiply-add as two."""
    with torch.device("meta"):
        model = autoencoder_of(settings)
        return 2 * step_cost(model, settings.mask_ratio).forward_and_backward.total


def memory_of(settings: Resolved, precision: Any, images: int, gpu: bool) -> dict[str, float]:
    """Count the GiB of a step, without and with checkpointing."""
    with torch.device("meta"):
        model = autoencoder_of(settings)
    memory = step_memory(model, settings.mask_ratio, precision, gpu=gpu)
    sizes = (memory.needed(images, checkpointing=checkpointing) / GIB for checkpointing in (False, True))
    return dict(zip(("gib", "gib_checkpointed"), (round(size, 2) for size in sizes), strict=True))


def compare(model: str, precision: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let ours and the peer take turns at every batch size."""
    forms = {f"MIRL, {depth} block{'s' * (depth > 1)} a decoder": depth for depth in options.decoder_depths}
    settings = {name: settings_of(model, depth, options.segments, precision) for name, depth in forms.items()}
    if options.compile:
        settings["MIRL, compiled"] = next(iter(settings.values()))
    flops = {name: flops_of(each) for name, each in settings.items()}
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides = {
            name: stack.enter_context(Side(partial(Ours, each, name == "MIRL, compiled", f"{folder}/{name}")))
            for name, each in settings.items()
        }
        meter = stack.enter_context(Side(partial(Measured, precision)))
        if options.peer:
            sides[PEER] = stack.enter_context(Side(partial(Peer, model, precision)))
            flops[PEER] = sides[PEER].ask("flops")
        first = {name: round(side.ask("turn", options.batches[0]), 2) for name, side in sides.items()}
        for batch in options.batches:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            ceilings = []
            for turn in range(options.repeats + 1):  # the first warms up
                for name, side in sides.items():
                    seconds[name].append(side.ask("turn", batch))
                    if torch.cuda.is_available() and not turn:
                        side.ask("peak")
                ceilings.append(meter.ask("ceiling"))
            for name, side in sides.items():
                taken, peers = seconds[name][1:], seconds.get(PEER, seconds[name])[1:]
                row = {"model": model, "what": name, "batch": batch, "precision": precision}
                row |= summary(batch, flops[name], taken, peers, ceilings[1:])
                row["arithmetic_ratio"] = round(flops[name] / flops.get(PEER, flops[name]), 3)
                row |= {"first_step_seconds": first[name], "peak_gib": round(side.ask("peak"), 2)}
                if name in settings:
                    row |= memory_of(settings[name], precision, batch, torch.cuda.is_available())
                row["parts"] = {part: round(taken, 4) for part, taken in side.ask("parts", batch).items()}
                results.append(row)
                print(json.dumps(row), flush=True)
    return results


def summary(batch: int, flops: float, taken: list[float], peers: list[float], ceilings: list[float]) -> dict[str, Any]:
    """Return medians over turns, and of ratios to what came in the same turn; `flops` are an image's."""
    return {
        "seconds": round(median(taken), 4), "images_per_second": round(batch / median(taken), 2),
        "gflop_per_image": round(flops / 1e9, 2),
        "gflop_per_second": round(batch * flops / median(taken) / 1e9, 1),
        "ceiling_gflop_per_second": round(median(ceilings) / 1e9, 1),
        "share_of_ceiling": round(median(batch * flops / t / c for t, c in zip(taken, ceilings, strict=True)), 3),
        "ratio_to_peer": round(median(a / b for a, b in zip(taken, peers, strict=True)), 3),
        "all_seconds": [round(each, 4) for each in taken],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_s_54", "vit_b_24", "vit_b_48", "vit_b_12"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--precisions", nargs="+", default=["32", "bf16"], choices=["32", "bf16"])
    parser.add_argument("--decoder_depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--segments", type=int, help="by default the paper's number")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_peer", dest="peer", action="store_false")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"))
    options = parser.parse_args()
    pairs = [(model, precision) for model in options.models for precision in options.precisions]
    results = [row for model, precision in pairs for row in compare(model, precision, options)]
    about = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    about["machine"] = machine(processes.launch("auto", 1, "32"))
    add({**about, "results": results}, options.out)


if __name__ == "__main__":
    main()
