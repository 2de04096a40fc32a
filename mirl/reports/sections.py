"""The sections of the page, for one run or for several: what each shows, how to read it, and why it may be empty."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirl.reports import depth, judged, tables
from mirl.reports.charts import Chart
from mirl.reports.contents import Run
from mirl.reports.curves import curves
from mirl.reports.panels import Gallery, Sheet, sheet
from mirl.reports.tables import Table, quoted
from mirl.training.runs import NOUNS, TRAINED, Command

# What a run says at its end: an indented block of code after a line that begins with "done:".
USE = re.compile(r"^done: .*\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)

DIAGNOSIS = "diagnosis/diagnosis.json"
# How to read the pictures of runs of a method or command, and how to get an evaluation.
PICTURES = {
    "mirl": "Held-out images, never trained on. The shallow half of the encoder predicts the main component, the deep "
    "half the residual that it missed, drawn around grey; the loss compares their sum with the original. Visible "
    "patches are shown as they are.",
    "pretrain": "Held-out images, never trained on, and what the decoder makes of the patches that it sees. Visible "
    "patches are shown as they are.",
    "finetune": "What the classifier is shown at the last evaluation and says of it, with the truth if wrong.",
    "detect": "Held-out images at the last evaluation: on the left what is annotated, on the right what the detector "
    "finds.",
    "segment": "Held-out images at the last evaluation: what is true, what the segmenter says, and where it is wrong. "
    "What has no label is dark.",
}
EVALUATE = {
    "pretrain": "mirl knn --weights {} --data LABELLED tells in one pass what the features know.",
    "finetune": "results.json is written at the end; mirl evaluate --weights {} --data OTHER.",
    **dict.fromkeys(TRAINED, "results.json is written at the end."),
}
# What can be done with a trained detector or segmenter.
USES: dict[Command, str] = {
    "detect": "Find objects in a folder of images, judge the detector on other annotations, or call it from Python.",
    "segment": "Label the pixels of a folder of images, judge the segmenter on other label maps, or call it from "
    "Python.",
}


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor, title: for the navigation and the heading; reading: how to read it, in a sentence.
        lines: short findings, before everything else; code: to copy.
        missing: why there is nothing to show; shown where there is not.
    """

    anchor: str
    title: str
    reading: str
    lines: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    tables: tuple[Table, ...] = ()
    code: str = ""
    missing: str = ""

    @property
    def empty(self) -> bool:
        return not (self.lines or self.charts or self.galleries or self.sheets or self.tables or self.code)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections of a report on `runs`; that of pictures lacks the reconstructions."""
    blockwise = any(run.command not in TRAINED for run in runs)  # mirl diagnose takes encoders alone
    training = [
        _curves(runs),
        reconstructions(runs, [Gallery(run.name) for run in runs]),
        *([_blocks(runs)] if blockwise else []),
        _gradients(runs),
        *([_diagnosis(runs)] if blockwise else []),
        _evaluation(runs),
    ]
    if len(runs) > 1:
        return [_differences(runs), *training, _incidents(runs)]
    (run,) = runs
    return [*training, _use(run), _options(run), _skipped(run), _incidents(runs)]


def _curves(runs: Sequence[Run]) -> Section:
    headed = [run for run in runs if run.command in TRAINED]
    if len(runs) == 1:
        shown = judged.JUDGED.get(runs[0].command)
        reading = (
            f"The training loss should fall and the {shown.figure} rise: one that falls again while the loss falls is "
            "overfitting."
            if shown
            else "The training loss should fall and the held-out loss with it: a held-out loss that rises again while "
            "the training loss falls is overfitting."
        ) + " Faint lines are single steps, strong ones averages, dots evaluations."
    elif len(headed) == len(runs):
        reading = (
            "One colour for each run; dots are evaluations on held-out images, losses are of training, and compare "
            "only between runs of the same data and protocol."
        )
    else:
        reading = (
            "One colour for each run; in the charts of losses dots are held-out images and faint lines training. "
            "Losses compare only between runs of the same data, target and mask ratio."
        ) + "".join(f" {noun.capitalize()}s have no held-out loss." for noun in _nouns(headed))
    missing = "No step is recorded yet: metrics.jsonl is missing or empty."
    return Section("curves", "Learning curves", reading, charts=tuple(curves(runs)), missing=missing)


def _nouns(runs: Sequence[Run]) -> list[str]:
    """Name what the runs trained, each kind once; an encoder has no name."""
    return list(dict.fromkeys(NOUNS[run.command] for run in runs if run.command in NOUNS))


def reconstructions(runs: Sequence[Run], shown: Sequence[Gallery]) -> Section:
    """Show held-out images as the model fills them in, or the pictures of the last evaluation where it does not."""
    kinds: set[str] = {run.command for run in runs}
    title = "Reconstructions" if kinds == {"pretrain"} else "Pictures"
    if any(run.config.get("method") == "mirl" for run in runs):
        kinds = kinds - {"pretrain"} | {"mirl"}
    reading = " ".join(text for kind, text in PICTURES.items() if kind in kinds)
    galleries: list[Gallery] = []
    sheets: list[Sheet] = []
    lines: list[str] = []
    for run, gallery in zip(runs, shown, strict=True):
        name = f"{run.name}: " if len(runs) > 1 else ""
        lost = ", ".join(gallery.unreadable[:3])
        if gallery.unreadable:
            lines.append(f"{name}{len(gallery.unreadable)} pictures could not be read, e.g. {lost}.")
        if gallery.cells:
            galleries.append(gallery)
        elif found := _last_picture(run, len(runs)):
            sheets.append(found)
    missing = "No pictures yet: they are written at each evaluation."
    return Section(
        "pictures", title, reading, tuple(lines), galleries=tuple(galleries), sheets=tuple(sheets),
        missing=missing,
    )  # fmt: skip


def _last_picture(run: Run, sharing: int) -> Sheet | None:
    paths = sorted(run.folder.glob("pictures/step_*.png"))
    step = paths[-1].stem.removeprefix("step_").lstrip("0") or "0" if paths else ""
    return sheet(paths[-1], f"{run.name}: pictures of held-out images at step {step}", sharing) if paths else None


def _blocks(runs: Sequence[Run]) -> Section:
    reading = (
        "Each block of the encoder from shallow to deep. A rank that falls or a similarity near one says that "
        "tokens lose what tells them apart; read-outs that no longer rise, that deeper blocks add little for classes."
    ) + (" Each run at its last evaluation." if len(runs) > 1 else " Colours are moments of the training.")
    missing = (
        "No figures of blocks: mirl pretrain records them at each evaluation unless --block_figures is false."
        if any(run.pretraining for run in runs)
        else "Fine-tuning records no figures of blocks; the report of the pre-training run may have them."
    )
    return Section(
        "blocks", "What each block learns", reading, charts=tuple(depth.block_figures(runs)), missing=missing
    )


def _gradients(runs: Sequence[Run]) -> Section:
    reading = (
        "How large the gradient of each block is, before clipping. AdamW scales it, so that a small gradient is no "
        "small step; the paper's appendix C compares encoders of different methods in this way."
    )
    missing = "No gradient norms of blocks are recorded: the run has no step yet, or was made by an earlier release."
    return Section("gradients", "Gradients of blocks", reading, charts=tuple(depth.gradients(runs)), missing=missing)


def _diagnosis(runs: Sequence[Run]) -> Section:
    """Show what `mirl diagnose` found, where it was asked."""
    lines: list[str] = []
    sheets: list[Sheet] = []
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        lines += _unreadable(run, DIAGNOSIS)
        for document in run.documents(DIAGNOSIS).found.values():
            lines += [f"{name}{line}" for found in document.get("encoders", ()) for line in found.get("verdict", ())]
        if picture := sheet(
            run.folder / "diagnosis" / "diagnosis.png", f"{run.name}: charts of the diagnosis", len(runs)
        ):
            sheets.append(picture)
    reading = "Which blocks learned, in words and charts, measured on whole images after the training."
    weights = next((quoted(run.folder) for run in runs if run.command not in TRAINED), "")
    missing = f"No diagnosis yet: mirl diagnose --weights {weights} --data IMAGES tells which blocks learned."
    return Section("diagnosis", "Diagnosis", reading, tuple(lines), sheets=tuple(sheets), missing=missing)


def _evaluation(runs: Sequence[Run]) -> Section:
    accuracies, found = (
        tables.results(runs),
        [table for each in judged.JUDGED for table in judged.judgements(runs, each)],
    )
    readings = [shown.reading for each, shown in judged.JUDGED.items() if any(run.command == each for run in runs)]
    if accuracies or not readings:
        readings.insert(0, tables.READING)
    unreadable = [
        line
        for run in runs
        for line in _unreadable(run, *(judged.EVALUATIONS if run.command in TRAINED else tables.FILES))
    ]
    missing = "No evaluation yet: " + EVALUATE[runs[0].command].format(quoted(runs[0].folder))
    return Section(
        "evaluation", "Evaluation", " ".join(readings), tuple(unreadable), charts=tuple(depth.read_outs(runs)),
        sheets=tuple(judged.confusions(runs)), tables=(*accuracies, *found), missing=missing,
    )  # fmt: skip


def _unreadable(run: Run, *patterns: str) -> list[str]:
    return [f"{path} of {run.name} could not be read." for each in patterns for path in run.documents(each).unreadable]


def _differences(runs: Sequence[Run]) -> Section:
    reading = "A difference in the curves can come from any of these options; the others are the same in all runs."
    table = tables.differences(runs)
    missing = "The runs have the same options."
    return Section("options", "What differs", reading, tables=(table,) if table.rows else (), missing=missing)


def _use(run: Run) -> Section:
    trained = NOUNS.get(run.command, "encoder")
    reading = USES.get(run.command, "Paste this into Python; timm opens the folder, nothing of mirl is needed.")
    found = USE.findall(run.log)
    code = textwrap.dedent(found[-1]).strip() if found else ""
    written = Path(str(run.config.get("out", "")))  # the folder may have been moved since
    code = code.replace(f"local-dir:{written / 'encoder'}", f"local-dir:{run.folder / 'encoder'}")
    code = code.replace(f"--weights {written} ", f"--weights {quoted(run.folder)} ")
    code = code.replace(f"mirl {run.command} {written} ", f"mirl {run.command} {quoted(run.folder)} ")
    code = code.replace(f'load_{trained}("{written}")', f'load_{trained}("{run.folder}")')
    missing = f"There is no {trained} yet: it is written at the end of the run."
    return Section("use", f"Use the {trained}", reading, code=code if run.finished else "", missing=missing)


def _options(run: Run) -> Section:
    code = f"mirl {run.command} --config {quoted(run.folder / 'config.yaml')} --out runs/again"
    reading = "Every option with the value that was used; the line repeats the run."
    return Section("options", "Configuration", reading, code=code, tables=(tables.options(run),))


def _skipped(run: Run) -> Section:
    table = tables.skipped(run)
    reading = "Files that could not be used; another image took the place of each."
    missing = "None: every image that was asked for could be read."
    return Section("skipped", "Images left out", reading, tables=(table,) if table else (), missing=missing)


def _incidents(runs: Sequence[Run]) -> Section:
    table = tables.incidents(runs)
    reading = "Stops, resumptions, skipped steps, loss spikes, rollbacks and shortages of memory, in their order."
    missing = "None is recorded: no stop, no skipped step, no loss spike, no shortage of memory."
    return Section("incidents", "Incidents", reading, tables=(table,) if table else (), missing=missing)
