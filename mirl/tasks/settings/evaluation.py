"""Options of `mirl evaluate`."""

from dataclasses import dataclass

from mirl.tasks.options import COUNT, NOT_NEGATIVE, Options, Ranges


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Options of `mirl evaluate`."""

    weights: str | None = None
    """run folder of mirl finetune, or its encoder/; or a run folder of mirl detect or mirl segment"""
    data: str = "shapes"
    """class folders, some or all of the classifier's; of a folder with val/ or test/ that one; for a detector a folder
    with COCO annotations, for a segmenter one with images/ and labels/; or `shapes`"""
    multi_scale: bool = False
    """for a segmenter: average six sizes of each image and their mirror images"""
    batch_size: int | None = None
    """images computed at once; by default 64, for a detector 1; a segmenter takes them one by one"""
    workers: int | None = None
    """data workers; by default one per core of a GPU, at most 16; on a CPU few or none"""
    out: str | None = None
    """folder of the results; by default evaluations/ and the name of the data, in the run folder if --weights is one"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"batch_size": COUNT, "workers": NOT_NEGATIVE}
