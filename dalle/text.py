"""Captions ↔ tokens: byte-pair encoding (BPE), with BPE-dropout that can be seeded.

Units are those of the paper's author (openai/DALL-E, issue 22), widened to every script: lower-cased
words merge, and every digit, space, punctuation mark and emoji stands alone. A tokenizer may instead
join a word with the space before it, as GPT-2's does, which takes about half as many tokens a caption.
The alphabet is the 256 bytes, so that any text can be encoded. Padding and the start of the text are
learned vectors of the prior and have no token here.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tokenizers
from jaxtyping import Int64
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from dalle.checkpoint import replacing
from dalle.errors import CheckpointError, ConfigError, DataError

BYTES = 256
PARALLELISM = "TOKENIZERS_PARALLELISM"  # what the library asks the environment
NO_TOKEN = -1  # a text position without text: the prior puts its own padding vector there

# Lower case first: only some pairs of letter and accent have one character in both cases.
NORMALISER = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])

Spaces = Literal["alone", "joined"]  # whether the space before a word is a unit of its own

# A word starts with a letter: the variation selector that ends many an emoji is a mark (\p{M}) too.
UNITS: dict[Spaces, str] = {
    "alone": r"\p{L}[\p{L}\p{M}]*|[\s\S]",
    "joined": r" ?\p{L}[\p{L}\p{M}]*|[\s\S]",
}


def normalise(caption: str) -> str:
    """The text that encoding keeps: lower case, composed accents (NFC), `?` for half a surrogate pair."""
    return NORMALISER.normalize_str(_sound(caption))


def cut_or_pad(tokens: Sequence[int], length: int) -> tuple[Int64[np.ndarray, " length"], bool]:
    """Tokens cut to `length`, or filled up with `NO_TOKEN`; and whether any were cut off."""
    array = np.full(length, NO_TOKEN, dtype=np.int64)
    kept = tokens[:length]
    array[: len(kept)] = kept
    return array, len(tokens) > length


class Tokenizer:
    """Captions ↔ tokens, integers in [0, vocab_size).

    Source: paper, §2.2 and App. B; BPE-dropout: Provilkov et al. 2020, arXiv:1910.13267, algorithm 1.
    """

    vocab_size: int

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        model = json.loads(library.to_str())["model"]
        self._library = library
        self._ids: dict[str, int] = model["vocab"]
        self._merges = {  # neighbours → (rank, the token they become); a lower rank merges first
            (self._ids[a], self._ids[b]): (rank, self._ids[a + b])
            for rank, (a, b) in enumerate(model["merges"])
        }
        self.vocab_size = len(self._ids)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int = 16_384, spaces: Spaces = "alone"
    ) -> "Tokenizer":
        """Learn the merges from captions; the same captions, in any order, give the same tokenizer.

        Args:
            vocab_size: at most so many tokens; fewer if the captions run out of pairs to merge.
            spaces: a space is a token of its own, as in the paper, or joined to the word after it.

        Raises:
            ConfigError: if there is no room for the 256 bytes.
            DataError: if no caption has any text.
        """
        if vocab_size < BYTES:
            raise ConfigError(f"vocab_size={vocab_size} must be at least {BYTES}, one token for each byte")
        seen = 0

        def texts() -> Iterator[str]:
            nonlocal seen
            for caption in captions:
                seen += bool(caption.strip())
                yield _sound(caption)

        library = _untrained(spaces)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        with _one_thread():
            library.train_from_iterator(texts(), trainer)
        if not seen:
            raise DataError("the tokenizer found no captions to learn from; expected at least one with text")
        return cls(library)

    def encode(
        self, caption: str, *, dropout: float = 0.0, rng: np.random.Generator | None = None
    ) -> list[int]:
        """The tokens of a caption, of any length; `decode` gives `normalise(caption)` back.

        Args:
            dropout: the probability of skipping a merge, in [0, 1]; the paper trains with 0.1.
            rng: where the dropout's random numbers come from; needed with dropout.

        Raises:
            ConfigError: if dropout is no probability.
        """
        if not 0 <= dropout <= 1:
            raise ConfigError(f"dropout={dropout} must be a probability, from 0 to 1")
        if dropout == 0:
            return self._library.encode(_sound(caption), add_special_tokens=False).ids
        if rng is None:
            raise ValueError("BPE-dropout needs an rng")
        pieces = self._library.pre_tokenizer.pre_tokenize_str(normalise(caption))
        return [token for piece, _ in pieces for token in self._merge(piece, dropout, rng)]

    def _merge(self, piece: str, dropout: float, rng: np.random.Generator) -> list[int]:
        """Encode one unit, a character for each byte; at each step skip each merge with p = dropout.

        The candidates are tried in order until one is not skipped. That is the paper's "drop some,
        take the best of the others", with few random numbers; the library's own dropout takes no seed.
        """
        symbols = [self._ids[byte] for byte in piece]
        left, right = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        candidates = [
            (*self._merges[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self._merges
        ]
        heapify(candidates)
        symbols.append(NO_TOKEN)  # the end, which merges with nothing, like a symbol merged away
        skipped = []
        while candidates:
            rank, merged, i = heappop(candidates)
            if self._merges.get((symbols[i], symbols[right[i]])) != (rank, merged):
                continue  # a neighbour went into another merge
            if rng.random() < dropout:
                skipped.append((rank, merged, i))
                continue
            symbols[i], symbols[right[i]] = merged, NO_TOKEN
            right[i] = right[right[i]]
            if right[i] < len(left):
                left[right[i]] = i
            for j in (left[i], i):
                if j >= 0 and (found := self._merges.get((symbols[j], symbols[right[j]]))):
                    heappush(candidates, (*found, j))
            while skipped:  # the next step tries them again
                heappush(candidates, skipped.pop())
        return [symbol for symbol in symbols if symbol != NO_TOKEN]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; `NO_TOKEN` is passed over, half a character shows as U+FFFD."""
        ids = [int(token) for token in tokens if token != NO_TOKEN]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"tokens must lie in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}")
        return self._library.decode(ids, skip_special_tokens=False)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell tokenizers apart, whatever version of the library wrote them."""
        content = json.dumps([sorted(self._ids.items()), sorted(self._merges.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, whole or not at all. Raises `CheckpointError` if it cannot be written."""
        with replacing(path) as partial:
            partial.write_text(self._library.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises `CheckpointError` if it is missing or is anything else."""
        try:
            library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: the tokenizer cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({_line(error)})") from error
        if _settings(library) not in [_settings(_untrained(spaces)) for spaces in get_args(Spaces)]:
            raise CheckpointError(f"{path}: a tokenizer of another program, which splits text otherwise")
        if not set(pre_tokenizers.ByteLevel.alphabet()) <= library.get_vocab().keys():
            raise CheckpointError(f"{path}: a tokenizer without a token for each of the {BYTES} bytes")
        return cls(library)


def _untrained(spaces: Spaces) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = NORMALISER
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNITS[spaces]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def _settings(library: tokenizers.Tokenizer) -> dict[str, Any]:
    """All of a tokenizer but what it has learned."""
    content: dict[str, Any] = json.loads(library.to_str())
    return content | {"model": {k: v for k, v in content["model"].items() if k not in ("vocab", "merges")}}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of the library do not survive a fork; having used any, it warns (0.20) in each data worker."""
    chosen = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = chosen or "false"
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[PARALLELISM]


def _sound(text: str) -> str:
    """Half a surrogate pair, as in a command line that is not UTF-8, has no bytes: make it a `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
