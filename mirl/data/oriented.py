"""Images turned as they were when somebody annotated them."""

from torch import Tensor

from mirl.data.decode import image_to_tensor, only_bad_image, open_image
from mirl.data.sources import ImageFiles
from mirl.models.patches import Size


def read_as_annotated(files: ImageFiles, index: int, size: Size) -> Tensor:
    """Return uint8 [c, h, w] upright, or as stored where only that has the annotations' `size`, or raise `BadImage`.

    Annotation tools show images upright, so this is how they are read. Where only the stored pixels have `size`, it was
    done without regard to the EXIF orientation. An image that has it neither way is returned upright.
    """
    image = files.read(index)
    path = files.path_of(index)
    if image.shape[-2:] == size or image.shape[:-3:-1] != size or path.lower().endswith(".npy"):
        return image
    with only_bad_image(), open_image(path, files.channels) as stored:
        as_stored = image_to_tensor(stored, files.channels)
    return as_stored if as_stored.shape[-2:] == size else image
