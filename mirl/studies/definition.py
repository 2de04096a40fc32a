"""What a study is: a grid of cells, declared in a YAML file. The axes are method, depth, blocks replaced, and seed.

A panel is a part of the grid that mirrors a figure or table of the paper; a cell that is in several panels is one cell.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mirl.errors import UserError
from mirl.studies.reading import build

Options = Mapping[str, Any]
FOLDER = Path("studies")


@dataclass(frozen=True)
class Cell:
    """One encoder, pre-trained and judged; or only fine-tuned, with fresh weights in its last `replaced` blocks."""

    method: str
    depth: int
    replaced: int
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        replaced = f"_replaced{self.replaced}" if self.replaced else ""
        return f"{self.method}_{self.depth}{replaced}_seed{self.seed}"


@dataclass(frozen=True)
class Panel:
    """A part of the grid, shown as one table and one plot.

    Attributes:
        title: its heading; mirrors: the paper's figure or table.
        methods, depths: values of the grid.
        replaced: how many last blocks fine-tuning begins with fresh.
    """

    title: str
    mirrors: str
    methods: tuple[str, ...]
    depths: tuple[int, ...]
    replaced: tuple[int, ...] = (0,)

    @property
    def axis(self) -> Literal["depth", "replaced", "method"]:
        """What accuracy is drawn against."""
        return "replaced" if len(self.replaced) > 1 else "depth" if len(self.depths) > 1 else "method"

    @property
    def values(self) -> tuple[int, ...]:
        """The axis' values; for methods, the one depth."""
        return self.replaced if self.axis == "replaced" else self.depths

    def cell(self, method: str, value: int, seed: int) -> Cell:
        """Return the cell at `value` of the axis."""
        depth, replaced = (self.depths[0], value) if self.axis == "replaced" else (value, self.replaced[0])
        return Cell(method, depth, replaced, seed)


@dataclass(frozen=True)
class Expected:
    """What its file says that a cell of `depth` blocks takes: `minutes` on `machine`."""

    minutes: float
    depth: int
    machine: str


@dataclass(frozen=True)
class Study:
    """A grid of cells and the options that they share.

    Attributes:
        path: of the YAML file.
        title: of the table and the figure.
        data: class folders with train/ and test/, or `shapes:COUNT[:PIXELS]`; images: how many there are to train on.
        model: the models' name without the depth, e.g. vit_ti.
        decoder_blocks: of all decoders of an encoder together.
        seeds: of everything random.
        methods: by the names in tables, the options of pre-training that make them.
        panels: the parts of the grid.
        expected: time of a cell, until one was timed.
        pretrain, finetune, probe, knn, diagnose: options of these commands, the same in every cell.
    """

    path: Path
    title: str
    data: str
    images: int
    model: str
    decoder_blocks: int
    seeds: tuple[int, ...]
    methods: Mapping[str, Options]
    panels: tuple[Panel, ...]
    expected: Expected
    pretrain: Options
    finetune: Options
    probe: Options = field(default_factory=dict)
    knn: Options = field(default_factory=dict)
    diagnose: Options = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def results(self) -> Path:
        """The folder of finished cells, one JSON file each."""
        return self.path.parent / "results" / self.name

    def cells(self) -> list[Cell]:
        """List every cell once, in the order in which they are run: panel, seed, blocks replaced, method, depth."""
        return list(dict.fromkeys(cell for panel in self.panels for cell in self.cells_of(panel)))

    def cells_of(self, panel: Panel) -> Iterator[Cell]:
        """List a panel's cells in their order; a truncated encoder that lacks no block is none."""
        for seed in self.seeds:
            for replaced in panel.replaced:
                for method in panel.methods:
                    if replaced or not self.truncates(method):
                        yield from (Cell(method, depth, replaced, seed) for depth in panel.depths)

    def truncates(self, method: str) -> bool:
        """Tell whether a method's pre-training leaves out the blocks that fine-tuning replaces."""
        return self.methods[method].get("method") == "truncated_mae"


def find_study(name: str) -> Path:
    """Return the file that `name` is, or studies/NAME.yaml below the current folder.

    Raises:
        UserError: if there is neither.
    """
    listed = FOLDER / f"{name}.yaml"
    if path := next((path for path in (listed, Path(name).expanduser()) if path.is_file()), None):
        return path
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise UserError(f"there is no {listed}; give {known or 'the path of'}{' or' if known else ''} a YAML file")


def read_study(path: Path) -> Study:
    """Read a study's YAML file. Whether its options make models that can be trained, `stages_of` finds.

    Raises:
        UserError: if it cannot be read, or something in it is missing, unknown or of another type.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    study = build(Study, given, str(path), path=path)
    if wrong := [name for name in study.methods if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"{path}: method {wrong[0]!r} cannot name a file; give letters, digits and _")
    for panel in study.panels:
        if unknown := [method for method in panel.methods if method not in study.methods]:
            known = ", ".join(study.methods)
            raise UserError(f"{path}: panel {panel.title!r}: method {unknown[0]!r} has no options; choose {known}")
        if len(panel.depths) > 1 and len(panel.replaced) > 1:
            raise UserError(f"{path}: panel {panel.title!r} has several depths and several replaced; make it two")
    if not study.cells():
        raise UserError(f"{path} has no cells; give panels with methods and depths, and seeds")
    return study
