"""A trained detector or segmenter on disk: one file of a run folder, with everything that builds it again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mirl.errors import UserError
from mirl.models.weights import State, Weights
from mirl.tasks.options import ResolvedRun
from mirl.tasks.weight_files import about
from mirl.training.checkpoints import load_newest, save_tensors
from mirl.training.files import atomic
from mirl.training.runs import NOUNS, TRAINED, Command, command_of, console, read_config

ENCODER = "pyramid.encoder."  # ends what stands before the names of an encoder's tensors
Facts = dict[str, Any]


def form_of(weights: Weights) -> Facts:
    """Return what, beside the options, builds the encoder again."""
    form = {name: value for name, value in about(weights).items() if name != "classes"}
    return dict(json.loads(json.dumps(form | {"depth": weights.full_depth or weights.depth})))


def weights_of(form: Facts, state: State) -> Weights:
    """Return the encoder that is a part of a trained model's `state`, by what `form_of` returned."""
    encoder = {name.partition(ENCODER)[2]: value for name, value in state.items() if ENCODER in name}
    return Weights(
        form["architecture"], form["arguments"], encoder, tuple(form["mean"]), tuple(form["deviation"]),
        full_depth=form["depth"],
    )  # fmt: skip


def save_trained(model: nn.Module, settings: ResolvedRun, facts: Facts, path: Path) -> None:
    """Write a model with the options and the `facts` that build it."""
    state = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    with atomic(path) as temporary:
        save_tensors(state, temporary, mirl=json.dumps({"settings": settings.saved(), **facts}))


def trained_by(weights: str | Path) -> Command | None:
    """Return the command whose model `weights` is, one of those in `TRAINED`: a run folder or its file; else None."""
    path = Path(weights).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("mirl", "{}"))
        except (OSError, SafetensorError, json.JSONDecodeError):
            return next((command for command, name in TRAINED.items() if path.name == name), None)
        command = command_of(facts["settings"]) if "settings" in facts else None
    elif found := [command for command, name in TRAINED.items() if (path / name).exists()]:
        return found[0]
    else:
        command = command_of(read_config(path)) if (path / "config.yaml").exists() else None
    return command if command in TRAINED else None


def read_trained(weights: str | Path, command: Command) -> tuple[Facts, State]:
    """Return what describes a trained model, with its `settings`, and its tensors.

    Args:
        weights: run folder, if unfinished its newest checkpoint is read, or its file.
        command: what trained it.

    Raises:
        UserError: if there is no such model in it.
    """
    given, noun = Path(weights).expanduser(), NOUNS[command]
    path = given if given.suffix == ".safetensors" else given / TRAINED[command]
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("mirl", "{}"))
            state = load_file(path)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); give a run folder of mirl {command}") from error
        if trained_by(path) != command:
            raise _holds_another(path, command)
        return facts, state
    run = path.parent
    if path.name != TRAINED[command] or trained_by(run) != command:
        raise _holds_another(run if path.name == TRAINED[command] else path, command)
    settings, state = read_config(run), load_newest(run / "checkpoints", console.print)
    if state is None:
        raise UserError(f"{run} holds no {noun} yet; finish it with mirl {command} --out {run} --resume")
    console.print(f"{run} is not finished: using its checkpoint of step {state['step']}", markup=False)
    return {"settings": settings, **state["about"]}, state["model"]


def _holds_another(path: Path, command: Command) -> UserError:
    other, noun = trained_by(path), NOUNS[command]
    held = f"a {NOUNS[other]}, no {noun}" if other else f"no {noun}"
    return UserError(f"{path} holds {held}; give a run folder of mirl {command}")


@contextmanager
def as_it_says(weights: str | Path, command: Command) -> Iterator[None]:
    """Turn what goes wrong in building a model of a file into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error.__cause__, ImportError):  # a package that is missing is not the file's fault
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{weights} is not the {NOUNS[command]} that it says ({reason}); train it again") from error
