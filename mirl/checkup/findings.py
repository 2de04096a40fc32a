"""What is wrong or odd about files of a data set, by kind, and what pre-training makes of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mirl.checkup.records import Records
from mirl.data.inspection import Trait
from mirl.models.patches import Size

ELONGATED = 4  # times as long as wide
ENLARGED = 2  # times; less is usual
HUGE = 40e6  # pixels: more take tenths of a second and hundreds of megabytes

Severity = Literal["skipped", "odd"]

# (kind, what is odd, severity, what pre-training makes of it, which text says more)
OF_TRAITS: tuple[tuple[str, Trait, Severity, str, str], ...] = (
    ("broken", Trait.BROKEN, "skipped", "no image comes out of them", "reason"),
    ("unread", Trait.UNREAD, "skipped", "may be good, but could not be read now", "reason"),
    ("channels", Trait.CHANNELS, "skipped", "of another number of channels than --channels", "reason"),
    ("constant", Trait.CONSTANT, "odd", "all pixels have one colour: nothing to learn", ""),
    ("deep", Trait.DEEP, "odd", "over 8 bits a channel: grey and .npy are stretched to 8, colour is cut to 8", "mode"),
    ("colour space", Trait.COLOURS, "odd", "neither grey nor RGB: converted without a profile", "mode"),
    ("profile", Trait.PROFILE, "odd", "a colour profile that is not sRGB and is not applied", "profile"),
    ("frames", Trait.FRAMES, "odd", "several frames: the first is used", "format"),
    ("suffix", Trait.SUFFIX, "odd", "named as another format: read as what they are", "format"),
)


@dataclass(frozen=True)
class Finding:
    """Files of one kind.

    Attributes:
        severity: whether pre-training skips them or uses them; meaning: what it makes of them.
        positions: of the files, ascending; detail: what to say of the file at a position.
    """

    kind: str
    severity: Severity
    meaning: str
    positions: np.ndarray
    detail: Callable[[int], str] = lambda position: ""

    def __len__(self) -> int:
        return len(self.positions)

    def files(self, records: Records) -> Iterator[tuple[str, str]]:
        """Yield (name, detail) of each file."""
        for position in map(int, self.positions):
            yield records.name(position), self.detail(position)


def findings(records: Records, image_size: Size, patch_size: Size) -> list[Finding]:
    """Return the kinds of findings of which there are files, those that are skipped first.

    Args:
        image_size, patch_size: what pre-training will use, (height, width).
    """
    of_traits = [
        Finding(kind, severity, meaning, np.flatnonzero(records.having(trait)), _said(records, column))
        for kind, trait, severity, meaning, column in OF_TRAITS
    ]
    found = [*of_traits, *_of_sizes(records, image_size, patch_size), _copies(records), *_of_colours(records)]
    return sorted(filter(len, found), key=lambda finding: finding.severity == "odd")


def _said(records: Records, column: str) -> Callable[[int], str]:
    return (lambda position: records.text(column, position)) if column else (lambda position: "")


def _of_sizes(records: Records, image_size: Size, patch_size: Size) -> Iterator[Finding]:
    usable = np.flatnonzero(records.usable)
    height, width = (records.rows[side][usable] for side in ("height", "width"))

    def pixels(position: int) -> str:
        return "{}x{} px".format(*records.size(position))

    too_small = (height < patch_size[0]) | (width < patch_size[1])
    small = ~too_small & ((height * ENLARGED < image_size[0]) | (width * ENLARGED < image_size[1]))
    long = np.maximum(height, width) > ELONGATED * np.minimum(height, width)
    patch = "{}x{} px".format(*patch_size)
    yield Finding("too small", "skipped", f"smaller than a patch of {patch}", usable[too_small], pixels)
    yield Finding("small", "odd", f"enlarged more than {ENLARGED} times", usable[small], pixels)
    megapixels = f"over {HUGE / 1e6:.0f} megapixels: slow to read, and much memory"
    yield Finding("huge", "odd", megapixels, usable[height.astype(np.float32) * width > HUGE], pixels)
    yield Finding("elongated", "odd", f"over {ELONGATED}:1: a crop sees little of them", usable[long], pixels)


def _of_colours(records: Records) -> Iterator[Finding]:
    """Find the few among the many: grey images among colour ones, or the other way round; what is transparent."""
    alpha = "transparent in places: " + ("kept" if records.source.channels == 4 else "laid over white")
    yield Finding("alpha", "odd", alpha, np.flatnonzero(records.having(Trait.ALPHA)))
    constant = records.having(Trait.CONSTANT)
    grey = records.having(Trait.GREY) & ~constant
    colour = records.usable & ~grey & ~constant
    if grey.sum() <= colour.sum():
        yield Finding("grey", "odd", "grey among colour", np.flatnonzero(grey))
    else:
        yield Finding("colour", "odd", "colour among grey", np.flatnonzero(colour))


def _copies(records: Records) -> Finding:
    """Find the files with the same bytes as an earlier one."""
    usable = np.flatnonzero(records.usable)
    digests, sizes = (records.rows[column][usable] for column in ("digest", "bytes"))
    order = np.argsort(digests, kind="stable")  # the earliest of equal files comes first
    digests, sizes = digests[order], sizes[order]
    repeats = (digests[1:] == digests[:-1]) & (sizes[1:] == sizes[:-1])
    places = np.flatnonzero(repeats) + 1
    begins = np.concatenate([[0], np.flatnonzero(~repeats) + 1])
    firsts = begins[np.searchsorted(begins, places, side="right") - 1]
    copies, originals = usable[order[places]], usable[order[firsts]]
    by_position = np.argsort(copies)
    copies, originals = copies[by_position], originals[by_position]
    return Finding(
        "duplicate", "odd", "the same bytes as another file: seen more often, and perhaps both trained on and held out",
        copies, lambda position: f"same as {records.name(int(originals[np.searchsorted(copies, position)]))}",
    )  # fmt: skip
