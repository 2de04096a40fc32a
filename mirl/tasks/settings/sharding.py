"""Options of `mirl shard`."""

from dataclasses import dataclass

from mirl.tasks.options import COUNT, NOT_NEGATIVE, Options, Ranges

LARGEST_MIB = 2**20


@dataclass(frozen=True)
class ShardOptions(Options):
    """Options of `mirl shard`."""

    data: str
    """whatever pretrain's --data takes: a folder, a glob, a list, other shards ..."""
    out: str
    """folder for the shards; new or empty, or that of the same command that was interrupted"""
    shard_mib: float = 256
    """size of a shard in MiB, about"""
    resize: int | None = None
    """shorter side, in pixels, to make larger images smaller; by default images stay as they are"""
    shuffle: bool = True
    """mix the images, so that each shard is a fair sample; false keeps their order"""
    seed: int = 0
    """of the mixing"""
    channels: int = 3
    """of the images; other than 1, 3 and 4 only .npy files are images"""
    workers: int | None = None
    """processes; by default one for each core"""
    download: bool = False
    """let torchvision or the hub fetch a data set given by name"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {
            "shard_mib": (lambda x: 0 < x <= LARGEST_MIB, f"more than 0 and at most {LARGEST_MIB}"),
            "resize": (lambda x: x >= 1, "pixels, 1 or more"),
            "seed": NOT_NEGATIVE, "channels": COUNT, "workers": NOT_NEGATIVE,
        }  # fmt: skip
