"""What the options of all commands share: their ranges, those of every run that trains, what resuming allows."""

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin

from mirl.errors import UserError, in_words
from mirl.training.runs import command_of, read_config

Precision = Literal["32", "bf16", "16"]

# Options of one start, not of the run; the others that may change when a run is resumed.
OF_THIS_START = {"resume", "overwrite", "download", "devices", "num_nodes", "strategy", "workers"}
FREE = {"out", "checkpoint_minutes", "checkpoint_steps", "rollback", "max_bad", "micro_batch", "clip_grad",
        "evaluate_epochs", "precision", "block_figures", "labelled", "report", "compile", "checkpointing"}  # fmt: skip
NOT_SAVED = {"resume", "overwrite", "download"}


class Machine(TypedDict):
    """What choices depend on beside the data: whether there is a GPU, processes of the whole run, the precision."""

    gpu: bool
    devices: int
    precision: Precision


Ranges = dict[str, tuple[Callable[[Any], bool], str]]
POSITIVE: tuple[Callable[[Any], bool], str] = (lambda x: 0 < x < math.inf, "more than 0")
NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x < math.inf, "0 or more")
COUNT: tuple[Callable[[Any], bool], str] = (lambda x: x >= 1, "1 or more")
SEED: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x < 2**63, "0 to 2^63 - 1")
SHARE: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x <= 1, "0 to 1, or 0% to 100%")
FRACTION: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x <= 1, "0 to 1")
RUN_RANGES: Ranges = {
    "max_bad": SHARE, "weight_decay": NOT_NEGATIVE, "checkpoint_minutes": NOT_NEGATIVE, "clip_grad": POSITIVE,
    "seed": SEED, "workers": NOT_NEGATIVE, "batch_size": COUNT, "micro_batch": COUNT, "evaluate_epochs": COUNT,
    "checkpoint_steps": COUNT, "num_nodes": COUNT,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of a command, held to their types and ranges; paths become text, and NumPy's numbers Python's.

    None, which leaves a choice open, is allowed everywhere.

    Raises:
        UserError: if a value is of another type, or a number outside its range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, Real) and hasattr(value, "item"):
                value = value.item()
            object.__setattr__(self, field.name, value)
            if value is not None and not fits(value, field.type):
                shown = value if get_origin(field.type) is Literal else repr(value)
                quoted = ", as text" if str(value) in get_args(field.type) else ""  # 32, where "32" is meant
                raise UserError(f"--{field.name} {shown} is not allowed; give {in_words(field.type)}{quoted}")
        for name, (allowed, text) in self.ranges().items():
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise UserError(f"--{name} {value} is not allowed; give {text}")

    def ranges(self) -> Ranges:
        """Return what is allowed: for each number a test and its words."""
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Tell whether `value` is of the type that an option has; lists and tuples are alike, as YAML has no tuples."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        hints = parts if kind is tuple else parts * len(value)
        return len(hints) == len(value) and all(map(fits, value, hints))
    if kind in (int, float):  # True is 1 to Python, and not to a user
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True)
class RunOptions(Options, ABC):
    """Options of every run that trains: the optimizer's, the machine's, the run folder's."""

    out: str | None = None
    """run folder; by default runs/ and the name of the data"""
    batch_size: int | None = None
    """images in one optimizer step over all devices; by default a power of two near images / 50, from 16 on"""
    micro_batch: int | None = None
    """images computed at once on one device; by default 64 on a CPU (large ones fewer), on a GPU what fits, at most
    512"""
    weight_decay: float = 0.05
    """AdamW's, not applied to norms and biases"""
    clip_grad: float | None = None
    """largest gradient norm; by default not clipped"""
    seed: int = 0
    """of weights, order and everything random about images"""

    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """auto: bf16 where the device multiplies it in hardware, else 32 on a CPU and 16 on a GPU"""
    devices: str | int = "auto"
    """GPUs (or CPU processes) on this machine"""
    num_nodes: int = 1
    """machines"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """for several devices: ddp (auto) gives each the whole model; with fsdp they share weights, gradients, moments"""
    workers: int | None = None
    """data workers per device; by default one per core of a GPU, at most 16; on a CPU few or none"""
    resume: bool = False
    """go on with the run in --out; options that are not given are the run's own"""
    overwrite: bool = False
    """delete the run in --out and start again"""
    checkpoint_minutes: float = 10
    """longest time between checkpoints"""
    checkpoint_steps: int | None = None
    """most steps between checkpoints; by default only the time counts"""
    rollback: bool = False
    """when the loss stays high or is not finite, go back to the last checkpoint from before and leave those batches
    out, at most 3 times in 1,000 steps; otherwise the run goes on or stops with advice"""
    evaluate_epochs: int | None = None
    """epochs between evaluations with pictures; by default 20 times in a run"""
    max_bad: float | str | None = None
    """share of unusable files above which the run stops, such as 0.01 or 1%; by default 10%"""
    report: bool = True
    """write report.html at the end, however the run ends"""

    def __post_init__(self) -> None:
        if isinstance(self.max_bad, str):
            object.__setattr__(self, "max_bad", share_of(self.max_bad, "max_bad"))
        super().__post_init__()

    @property
    @abstractmethod
    def run_folder(self) -> Path:
        """The run folder, given or by default."""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of every run."""
        return RUN_RANGES

    def saved(self) -> dict[str, Any]:
        """Return what config.yaml keeps: every option but those that tell how to start."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_SAVED}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class ResolvedRun(RunOptions):
    """Options of every run, of which every choice is made."""

    out: str = ""
    batch_size: int = 1
    micro_batch: int = 1
    precision: Literal["32", "bf16", "16"] = "32"
    workers: int = 0
    evaluate_epochs: int = 1
    max_bad: float = 0.1
    epochs: int = 1

    @property
    def run_folder(self) -> Path:
        return Path(self.out)


def share_of(text: str, name: str) -> float:
    """Return the share that 0.01 or 1% is, or raise UserError about the option `name`."""
    number, percent, rest = text.strip().partition("%")
    try:
        if rest:
            raise ValueError
        return float(number) / 100 if percent else float(number)
    except ValueError:
        raise UserError(f"--{name} {text} is not allowed; give a share such as 0.01 or 1%") from None


def default_folder(data: str, otherwise: str, ending: str = "") -> Path:
    """Return runs/ and the name of the data, `otherwise` where it has none, with an `ending`."""
    name = otherwise if set("*{") & set(data) else Path(data).stem
    return Path("runs") / f"{name.replace(':', '-') or otherwise}{ending}"


def required(weights: str | None) -> str:
    """Return `--weights` of a command that trains from an encoder, or raise UserError if it is missing."""
    if not weights:
        raise UserError("--weights is missing; give a run folder of mirl pretrain, or a timm name")
    return weights


def check_only(given: Options, allowed: Sequence[str]) -> None:
    """Raise UserError if an option is given that has no meaning where nothing is trained."""
    for field in dataclasses.fields(given):
        if field.name not in allowed and getattr(given, field.name) != field.default:
            raise UserError(f"--{field.name} belongs to training; leave it out with a trained run")


Run = TypeVar("Run", bound=RunOptions)


def resumed(given: Run, named: Collection[str], saved: dict[str, Any]) -> Run:
    """Return the run's own settings, with the options that may change taken from `given`.

    Args:
        named: the options that the user named; they count even with their defaults' values, all others are the run's.
        saved: the run's own.

    Raises:
        UserError: if it is another command's run, or an option was given that would make it another run.
    """
    from mirl.models.patches import pair  # it imports PyTorch, which options do without

    own, theirs = command_of({field.name: None for field in dataclasses.fields(given)}), command_of(saved)
    if own != theirs:
        raise UserError(f"{given.out} is a run of mirl {theirs}; go on with mirl {theirs} --out {given.out} --resume")
    changes = {}
    for field in dataclasses.fields(given):
        value, kept = getattr(given, field.name), saved.get(field.name, field.default)
        if field.name in ("image_size", "patch_size"):  # one number, or as config.yaml keeps two
            kept = tuple(kept) if isinstance(kept, list) else kept
            value = kept if value is not None and pair(value) == pair(kept) else value
        if field.name in OF_THIS_START:
            changes[field.name] = value
        elif field.name not in named or value == kept:
            changes[field.name] = kept
        elif field.name in FREE:
            changes[field.name] = value
        elif value is None:  # to be chosen, which it was
            changes[field.name] = kept
        else:
            raise UserError(
                f"the run was started with --{field.name} {kept}, and going on cannot change it to {value}; "
                f"leave it out, or start a new run with another --out"
            )
    return type(given)(**changes | {"out": str(given.run_folder)})  # where it was found, which may have been moved


def restarts() -> int:
    """Return how often torchrun or Slurm has started this process again."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return max(int(count) if count.isdigit() else 0 for count in counts)


def begun(given: Run, named: Collection[str]) -> Run:
    """Return the settings to start with: with --resume the run's own, and so where a launcher started it again.

    Args:
        named: the options that the user named.
    """
    if restarts() and (given.run_folder / "config.yaml").exists():
        given = dataclasses.replace(given, resume=True, overwrite=False)
    return resumed(given, named, read_config(given.run_folder)) if given.resume else given


def resolve_run(
    given: RunOptions, *, images: int, most: int, epochs: int, gpu: bool, devices: int, precision: Precision,
    on_cpu: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """Choose batches, workers and evaluations of a run over `images` for `epochs`.

    Args:
        most: images in a batch; on_cpu: images computed at once without a GPU, whose memory would be measured.

    Raises:
        UserError: if the batch is larger than the data or cannot be shared by the devices.
    """
    batch = given.batch_size or default_batch(images, devices, most)
    if batch > images:
        raise UserError(f"--batch_size {batch} is more than the {images} training images; give at most {images}")
    if batch % devices:
        raise UserError(f"--batch_size {batch} cannot be shared by {devices} devices; give a multiple of {devices}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", devices // given.num_nodes))  # which torchrun says
    cores = available_cores() // max(1, here)
    return {
        "epochs": epochs,
        "batch_size": batch,
        "micro_batch": min(given.micro_batch or (512 if gpu else on_cpu), batch // devices),
        "precision": precision,
        "workers": default_workers(cores, gpu) if given.workers is None else given.workers,
        "evaluate_epochs": given.evaluate_epochs or max(1, epochs // 20),
        "max_bad": 0.1 if given.max_bad is None else given.max_bad,
    }


def built_in(data: str) -> bool:
    """Tell whether the data are the generated shapes."""
    return data.partition(":")[0] == "shapes"


def default_batch(images: int, devices: int, most: int) -> int:
    """Return `most` (the paper's) for ImageNet's size, less for fewer images: about 50 to 100 steps an epoch."""
    power = 2 ** max(0, (images // 50).bit_length() - 1)
    batch = min(images, most, max(16, power))
    return max(devices, batch - batch % devices)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(cores: int, gpu: bool) -> int:
    """Return one data worker for each core of a GPU; on a CPU few, because they take cores from the training."""
    return min(16, max(1, cores)) if gpu else max(0, cores // 2 - 1)
