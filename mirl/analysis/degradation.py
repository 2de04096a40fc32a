"""`mirl diagnose`: which blocks of an encoder learned? Paper: Sec. 2.2, Observations I to III, Figure 2.

Whole images pass through the encoder and through the same one with fresh weights; rules read the figures of every
block (`verdict.py`). With labels every block is read out, and with --reinit the last ones are replaced by fresh ones.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mirl.analysis.beginnings import distances, first_seed
from mirl.analysis.diagnosis import Diagnosis, ReadOut
from mirl.analysis.diagnosis_page import draw_page
from mirl.analysis.reinitialisation import counts, fingerprint_of, reinitialise
from mirl.analysis.representations import Observation, cka, finite, observe
from mirl.analysis.side_by_side import compare_all
from mirl.analysis.verdict import findings, idle_blocks, verdict
from mirl.data.labels import LabelledSource, open_split
from mirl.data.loading import Views
from mirl.data.sources import open_source
from mirl.data.transforms import fixed_view
from mirl.errors import plural
from mirl.models.patches import pair
from mirl.models.weights import Weights
from mirl.reports.contents import names_of
from mirl.tasks.accuracy import write_json
from mirl.tasks.blocks import evenly, read_outs
from mirl.tasks.features import FrozenEncoder, cache
from mirl.tasks.settings.diagnosis import DiagnoseOptions
from mirl.tasks.weights import open_weights
from mirl.training.files import check_writable
from mirl.training.runs import console, duration

FITTED = 2 / 3  # share of the labelled images that read-outs are fitted on
FRESH = 5  # encoders with fresh weights, a pass over the images each; one is compared with the trained and the others


def diagnose(**options: Any) -> dict[str, Diagnosis]:
    """Say which blocks of an encoder learned, with figures of every block; of several encoders side by side.

    Takes the fields of `mirl.DiagnoseOptions`, e.g. `mirl.diagnose(weights=["runs/a", "runs/b"], data="photos")`;
    writes `diagnosis.png` and `diagnosis.json` and returns what was found by the weights' names.

    Raises:
        UserError: on a mistake in options, weights or data.
    """
    started = time.monotonic()
    settings = DiagnoseOptions(**options)
    picture, table = (settings.folder / f"diagnosis.{end}" for end in ("png", "json"))
    check_writable(table)
    opened = [open_weights(weights, say=console.print) for weights in settings.weights]
    if settings.reinit:
        for weights in opened:
            counts(weights.depth, settings.reinit_blocks)  # a mistake is said before hours of work
    names = _names(settings.weights)
    diagnoses = [_examine(*each, settings) for each in zip(names, settings.weights, opened, strict=True)]
    found = [findings(d) for d in diagnoses]
    verdicts = {d.name: verdict(d, each) for d, each in zip(diagnoses, found, strict=True)}
    compared = compare_all(diagnoses) if len(diagnoses) > 1 else []
    for name, lines in verdicts.items():
        console.print("\n".join([f"\n{name}: {lines[0]}", *(f"  - {line}" for line in lines[1:])]), markup=False)
    if compared:
        console.print("\n".join(["\nside by side:", *(f"  - {line}" for line in compared)]), markup=False)
    results = [
        _results(d) | {"findings": list(map(asdict, each)), "verdict": verdicts[d.name]}
        for d, each in zip(diagnoses, found, strict=True)
    ]
    versions = {name: version(name) for name in ("torch", "timm", "mirl")}
    about = {"options": asdict(settings), "versions": versions}
    write_json(table, finite(about | {"encoders": results, "side_by_side": compared}))
    draw_page(diagnoses, verdicts, compared, f"{settings.data}", picture)
    console.print(f"\nsaved {picture} and {table} after {duration(time.monotonic() - started)}", markup=False)
    return {d.name: d for d in diagnoses}


def _examine(name: str, weights: str, opened: Weights, settings: DiagnoseOptions) -> Diagnosis:
    """Measure one encoder."""
    splits = None
    if settings.labels or settings.reinit:
        splits = open_split(
            settings.data, channels=opened.channels, val_fraction=settings.val_fraction, seed=settings.seed
        )
        source, members = splits[1].source, splits[1].members
    else:
        source = open_source(settings.data, channels=opened.channels)
        members = np.arange(len(source))
    build = partial(
        FrozenEncoder, opened, precision=settings.precision,
        image_size=None if settings.image_size is None else pair(settings.image_size),
    )  # fmt: skip
    encoder = build()
    images = Views(source, evenly(members, settings.images), partial(fixed_view, size=encoder.size))
    seen = partial(observe, images=images, options=settings)
    trained = seen(encoder, title=f"{name}: looking at blocks")
    for file, reason in trained.bad:
        console.print(f"left out {file}: {reason}", markup=False)
    seed, unknown = first_seed(weights)
    untrained, every = partial(build, untrained=True), range(1, opened.depth + 1)
    first, *others = range(seed or 0, (seed or 0) + FRESH)
    fresh = seen(untrained(seed=first), title=f"{name}: fresh weights")
    chances = [_apart(seen(untrained(seed=other), title=f"{name}: fresh weights"), fresh) for other in others]
    measures = trained.measures()
    reads: dict[str, ReadOut] = {}
    fresh_reads: dict[str, ReadOut] = {}
    seconds = 0.0
    if splits:
        reads, seconds = _read(build(blocks=every), splits, settings, f"{name}: reading blocks out")
        fresh_encoder = untrained(seed=first, blocks=every)
        fresh_reads, _ = _read(fresh_encoder, splits, settings, f"{name}: reading fresh weights out")
    trials = []
    if settings.reinit:
        assert splits is not None
        trials_in = settings.folder / "reinit" / (name if len(settings.weights) > 1 else "")
        assert ".." not in Path(name).parts and trials_in.is_relative_to(settings.folder)
        trials = reinitialise(
            weights, trials_in,
            counts(opened.depth, settings.reinit_blocks), range(settings.seed, settings.seed + settings.seeds),
            # A training step is a forward pass and a backward pass, which is twice as long.
            3 * seconds * len(splits[0]) * settings.reinit_epochs,
            fingerprint_of(opened.state, len(splits[0]) + len(splits[1])), data=settings.data,
            epochs=settings.reinit_epochs, val_fraction=settings.val_fraction, image_size=encoder.size,
            workers=settings.workers, precision=settings.precision, depth=opened.depth,
        )  # fmt: skip
    without = None
    if idle := idle_blocks(measures, reads):
        for block in idle:
            encoder.encoder.blocks[block - 1] = nn.Identity()
        left = seen(encoder, title=f"{name}: without {plural(len(idle), 'block')}")
        without = cka(left.content(opened.depth), trained.content(opened.depth))
    return Diagnosis(
        name=name, weights=weights, images=trained.images, measures=measures, fresh=fresh.measures(),
        patches=len(trained.rows[0]), change=_apart(trained, fresh),
        chance=[max(each) for each in zip(*chances, strict=True)],
        distance=None if seed is None else distances(opened, seed), distance_unknown=unknown,
        read_outs=reads, fresh_read_outs=fresh_reads, without=without, trials=trials, epochs=settings.reinit_epochs,
    )  # fmt: skip


def _read(
    encoder: FrozenEncoder, splits: tuple[LabelledSource, LabelledSource], settings: DiagnoseOptions, title: str
) -> tuple[dict[str, ReadOut], float]:
    """Read out the embedding and every block; return also the seconds that an image took.

    Args:
        encoder: of every block; it gets one more, which does nothing, before the first.
    """
    encoder.encoder.blocks.insert(0, nn.Identity())  # features "after" it are the embedding's
    encoder.blocks.append(encoder.blocks[-1] + 1)
    encoder.shape = (len(encoder.blocks), *encoder.shape[1:])
    most = settings.labelled_images
    shares = (max(1, int(FITTED * most)), max(1, most - int(FITTED * most)))
    parts = [replace(split, members=evenly(split.members, n)) for split, n in zip(splits, shares, strict=True)]
    started = time.monotonic()
    fit, test = (cache(encoder, part, settings, title) for part in parts)
    seconds = (time.monotonic() - started) / (len(fit.labels) + len(test.labels))
    labels, truth = torch.from_numpy(fit.labels), torch.from_numpy(test.labels)
    blocks = []
    for i in range(fit.features.shape[1]):
        known, judged = (torch.from_numpy(part.features[:, i].copy()) for part in (fit, test))
        blocks.append(read_outs(known, labels, judged, truth, len(splits[0].classes)))
    return {name: ReadOut(torch.stack([b[name] for b in blocks]), truth, len(labels)) for name in blocks[0]}, seconds


def _apart(one: Observation, other: Observation) -> list[float]:
    """Return 1 - CKA of the tokens of two encoders after the embedding and each block."""
    return [1 - cka(a, b) for a, b in zip(one.rows, other.rows, strict=True)]


def _names(weights: Sequence[str]) -> list[str]:
    """Return short names: of files and folders their last parts, of models elsewhere what was given."""
    paths = [Path(given).expanduser() for given in weights]
    return names_of([p.resolve().parts if p.exists() else (given,) for p, given in zip(paths, weights, strict=True)])


def _results(d: Diagnosis) -> dict[str, Any]:
    """Return what JSON keeps of a diagnosis."""
    read_outs = ("read_outs", "fresh_read_outs")
    kept_apart = ("measures", "fresh", "trials", *read_outs)
    kept = {name: value for name, value in vars(d).items() if name not in kept_apart}
    return kept | {
        "measures": asdict(d.measures), "fresh": asdict(d.fresh), "trials": list(map(asdict, d.trials)),
        **{kind: {name: read.figures() for name, read in getattr(d, kind).items()} for kind in read_outs},
    }  # fmt: skip
