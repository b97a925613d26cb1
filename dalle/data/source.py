"""What a source of captioned pictures is."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One picture with at least one caption."""

    image: Image.Image  # mode RGB, any size
    captions: tuple[str, ...]
    key: str  # names the sample in messages: a path, or archive.tar/member


class BadSample(Exception):
    """A picture that cannot be used; it is skipped, counted and named at the end, never fatal."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)  # both, so that it survives the way out of a worker process
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """Captioned pictures by number. Safe to copy into worker processes; reading keeps no state."""

    @property
    def name(self) -> str:
        """What the user called it: `scenes`, or the path given."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read sample `index`, 0 ≤ index < len. Raises `BadSample` if it cannot be used."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, without decoding the picture. Raises `BadSample` like reading does."""
