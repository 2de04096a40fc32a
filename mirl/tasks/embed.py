"""`mirl embed`: features of a folder of images in an .npy file, with a table of the images they belong to."""

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from mirl.data.loading import Views
from mirl.data.sources import open_source
from mirl.data.transforms import fixed_view
from mirl.errors import UserError, none_readable, plural
from mirl.tasks.features import batches, open_encoder
from mirl.tasks.places import beside
from mirl.tasks.settings.features import EmbedOptions
from mirl.training.files import atomic, check_writable, writing
from mirl.training.runs import console

HEADER = 128  # bytes before the numbers of an .npy file, enough for any shape


def embed(**options: Any) -> Path:
    """Write features of images to an .npy file and their paths to a table, in the same order.

    Row i of `OUT.npy`, float32 [images, width] or [images, patches, width], is the image in row i of `OUT.csv`. Files
    that cannot be read are left out of both and listed, with the reason, in `OUT_bad.csv`. By default OUT is
    `features`, in the run folder if --weights is one. Takes the fields of `mirl.EmbedOptions`; returns the path of the
    .npy file.

    Raises:
        UserError: on a mistake in options, weights or data, or if no image can be read.
    """
    settings = EmbedOptions(**options)
    out = _out(settings)
    array, table, bad_table = (Path(f"{out}{end}") for end in (".npy", f".{settings.table}", "_bad.csv"))
    for path in (array, table, bad_table):
        check_writable(path)
    encoder = open_encoder(settings, pool=settings.pool)
    source = open_source(settings.data, channels=encoder.channels)
    dataset = Views(source, np.arange(len(source)), partial(fixed_view, size=encoder.size))
    bad: list[tuple[str, str]] = []
    count = 0
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _growing_array(array, encoder.shape[1:]) as features, _growing_table(table) as paths:
            for batch in batches(dataset, settings.batch_size, settings.workers, "computing features"):
                bad += batch.bad
                if len(batch):
                    features.write(encoder(batch.images)[:, 0].cpu().numpy().tobytes())
                    paths([source.name_of(int(index)) for index in batch.indices])
                    count += len(batch)
            if not count:
                raise none_readable(len(source), bad)
        bad_table.unlink(missing_ok=True)
        if bad:
            with atomic(bad_table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("path", "reason"), *bad])
    shape = " x ".join(map(str, (count, *encoder.shape[1:])))
    console.print(f"saved {array} ({shape}) and {table}", markup=False)
    if bad:
        files = plural(len(bad), "file")
        console.print(f"left out {files}, listed in {bad_table}, e.g. {' '.join(bad[0])}", markup=False)
    return array


def _out(options: EmbedOptions) -> Path:
    """Return the files' common beginning."""
    if options.out:
        return Path(options.out.removesuffix(".npy"))
    assert options.weights is not None
    return beside(options.weights) / "features"


@contextmanager
def _growing_array(path: Path, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """Write an .npy file of float32 [rows, *shape] whose number of rows is known only at the end."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER))
        yield file
        rows = (file.tell() - HEADER) // (4 * math.prod(shape))
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *shape)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == HEADER, "the header of an .npy file has another length"


@contextmanager
def _growing_table(path: Path) -> Iterator[Callable[[list[str]], None]]:
    """Write a table of images, a batch at a time; yields what takes the next paths."""
    with atomic(path) as temporary, ExitStack() as stack:
        if path.suffix == ".csv":
            writer = csv.writer(stack.enter_context(open(temporary, "w", newline="", encoding="utf-8")))
            writer.writerow(("row", "path"))

            def write(rows: list[tuple[int, str]]) -> None:
                writer.writerows(rows)
        else:
            try:
                import pyarrow
                import pyarrow.parquet
            except ImportError as error:
                raise UserError("--table parquet needs pyarrow; run pip install 'mirl[parquet]'") from error
            schema = pyarrow.schema([("row", pyarrow.int64()), ("path", pyarrow.string())])
            parquet = stack.enter_context(pyarrow.parquet.ParquetWriter(temporary, schema))

            def write(rows: list[tuple[int, str]]) -> None:
                numbers, paths = zip(*rows, strict=True)
                parquet.write_table(pyarrow.table([numbers, paths], schema=schema))

        count = 0

        def append(paths: list[str]) -> None:
            nonlocal count
            write(list(enumerate(paths, start=count)))
            count += len(paths)

        yield append
