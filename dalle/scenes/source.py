"""The built-in data as a source of samples."""

from random import Random

from dalle.data.source import Sample
from dalle.errors import ConfigError
from dalle.scenes.compose import compose
from dalle.scenes.draw import draw
from dalle.scenes.facts import Facts, Scene
from dalle.scenes.splits import Split
from dalle.scenes.words import caption


class Scenes:
    """Drawn pictures of `size` × `size` pixels, one caption each; all a function of (split, index).

    There are 2²⁴ of them in train and 2¹⁶ in every other split; the scene and the caption of an index do
    not depend on the size. Raises `ConfigError` below 16 pixels, where shapes can no longer be told apart.
    """

    name = "scenes"

    def __init__(self, split: Split = "train", size: int = 64) -> None:
        if size < 16:
            raise ConfigError(
                f"scenes of {size} pixels: shapes need at least 16 to be told apart; ask for more"
            )
        self.split = split
        self.size = size

    def __len__(self) -> int:
        return 2**24 if self.split == "train" else 2**16

    def __getitem__(self, index: int) -> Sample:
        scene, text, _ = self._make(index)
        return Sample(draw(scene, self.size), (text,), self._key(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._make(index)[1],)

    def scene(self, index: int) -> Scene:
        """What is in picture `index`."""
        return self._make(index)[0]

    def facts(self, index: int) -> Facts:
        """What the caption of picture `index` states."""
        return self._make(index)[2]

    def _key(self, index: int) -> str:
        return f"scenes/{self.split}/{index}"

    def _make(self, index: int) -> tuple[Scene, str, Facts]:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)} in split {self.split}")
        # Seeded by the bytes of the key, so that splits share no stream and every platform has the same.
        rng = Random(self._key(index))
        scene = compose(rng, self.split)
        return scene, *caption(scene, rng, self.split)
