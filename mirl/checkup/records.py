"""What was found of each file of a data set, packed: 48 bytes a file, so that ten million take half a GiB."""

import numpy as np

from mirl.data.inspection import Inspection, Trait
from mirl.data.sources import ImageFiles

RECORD = np.dtype([
    ("traits", "u4"), ("reason", "u4"), ("bytes", "u8"), ("digest", "u8"), ("height", "u4"), ("width", "u4"),
    ("format", "u4"), ("mode", "u4"), ("profile", "u4"), ("seconds", "f4"),
])  # fmt: skip
UNUSABLE = Trait.BROKEN | Trait.UNREAD | Trait.CHANNELS


class Records:
    """What is known of `members` (ascending) of a source; position i is that of `members[i]`.

    Attributes:
        rows: a `RECORD` for each; texts are numbers, which `text` looks up.
    """

    def __init__(self, source: ImageFiles, members: np.ndarray) -> None:
        self.source, self.members = source, members
        self.rows = np.zeros(len(members), RECORD)
        self._texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.members)

    def put(self, member: int, found: Inspection) -> None:
        """Keep what was found of a member of the source."""
        position = self.position(member)
        assert position is not None, f"{member} is none of the members"
        traits, reason, count, digest, (height, width), format_, mode, profile, seconds = found
        texts = [self._number(text) for text in (reason, format_, mode, profile)]
        self.rows[position] = (int(traits), texts[0], count, digest, height, width, *texts[1:], seconds)

    def position(self, member: int) -> int | None:
        """Return where a member is; None if it was not looked at."""
        place = int(np.searchsorted(self.members, member))
        return place if place < len(self) and self.members[place] == member else None

    def name(self, position: int) -> str:
        """Return a file's path."""
        return self.source.name_of(int(self.members[position]))

    def text(self, column: str, position: int) -> str:
        """Return the `reason`, `format`, `mode` or `profile` of a file."""
        return self._texts[self.rows[column][position]]

    def size(self, position: int) -> tuple[int, int]:
        """Return a file's (height, width) in pixels."""
        row = self.rows[position]
        return int(row["height"]), int(row["width"])

    def having(self, traits: Trait) -> np.ndarray:
        """Tell for each file whether it has one of these."""
        return (self.rows["traits"] & int(traits)) != 0

    @property
    def usable(self) -> np.ndarray:
        """Whether an image comes out of each file."""
        return ~self.having(UNUSABLE)

    def of_usable(self, column: str) -> np.ndarray:
        """Return a column of the usable files."""
        return self.rows[column][self.usable]

    def counts(self, column: str) -> dict[str, int]:
        """Count the texts of a column over usable files, the most frequent first."""
        counts = np.bincount(self.of_usable(column))
        found = {self._texts[number]: int(counts[number]) for number in np.flatnonzero(counts)}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self._texts)
            self._texts.append(text)
        return self._numbers[text]
