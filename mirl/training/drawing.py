"""What every drawing shares: colours that the colour-blind tell apart, and a file that is whole or not there."""

from pathlib import Path

from matplotlib.figure import Figure

from mirl.training.files import atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the suffix of `path` names."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
