"""`mirl pretrain --resume_from`: a longer run that begins where a finished one was about to lower its rate.

Paper: Sec. 4.2, training schedules, Figure 6: with a step decay, one training gives the results of several lengths.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mirl.errors import UserError
from mirl.tasks.options import resumed
from mirl.tasks.settings.pretraining import Pretraining
from mirl.training import checkpoints
from mirl.training.runs import RunFolder, read_config

KEPT = ("train", "held_out", "blocks", "gradients", "data")  # rows that need none of the old run's files


def extended(given: Pretraining, named: Collection[str]) -> Pretraining:
    """Return the settings of the run that `--resume_from` names, with more epochs and another folder.

    Args:
        named: the options that the user named.

    Raises:
        UserError: if that run cannot be extended, or an option was given that would make it another run.
    """
    assert given.resume_from
    origin = Path(given.resume_from).expanduser()
    saved = read_config(origin)
    if "method" not in saved:
        raise UserError(f"--resume_from {origin} is no pre-training; give a run folder of mirl pretrain")
    if saved["schedule"] != "step":
        raise UserError(
            f"{origin} has --schedule {saved['schedule']}, whose every rate depends on its length; give a run with "
            "--schedule step"
        )
    length = saved["epochs"]
    if given.epochs is None or given.epochs <= length:
        raise UserError(f"--resume_from {origin} needs --epochs; give more than its {length}")
    if saved["warmup_epochs"] > length:
        raise UserError(f"{origin} is all warm-up ({saved['warmup_epochs']:g} epochs); start a new run")
    if not (origin / "checkpoints" / checkpoints.UNDECAYED).exists():
        raise UserError(
            f"{origin} keeps no checkpoint from before its rate decays, at 90 % of its {length} epochs; "
            f"if it is not that far, go on with --out {origin} --resume"
        )
    out = str(given.run_folder)
    if Path(out).resolve() == origin.resolve():
        raise UserError(f"--out {out} is the run to extend; give another folder")
    settings = resumed(replace(given, resume_from=None, epochs=None, out=out), named, saved)
    return replace(settings, resume_from=given.resume_from, epochs=given.epochs)


def begin(run: RunFolder, origin: str) -> None:
    """Give a new run the undecayed checkpoint of `origin`, and what was recorded up to it; the first process does.

    Raises:
        UserError: if the checkpoint cannot be read or copied.
    """
    if not run.writes:
        return
    try:
        _take_over(run, origin)
    except BaseException:
        run.close()
        raise


def _take_over(run: RunFolder, origin: str) -> None:
    old = RunFolder(Path(origin).expanduser(), resume=True, overwrite=False, writes=False)
    kept = old.checkpoints / checkpoints.UNDECAYED
    step = checkpoints.step_of(kept)
    run.forget_after(-1)  # rows of a start that was killed in here
    for row in old.rows():
        if row["step"] <= step and row["kind"] in KEPT:
            run.record(row)
    checkpoints.copy(kept, checkpoints.checkpoint_path(run.checkpoints, step))  # last: with it, this is done
    run.say(f"extends {origin} from its step {step}, before its rate decayed")
