import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from itertools import permutations

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dalle.errors import CheckpointError, ConfigError, DataError
from dalle.text import NO_TOKEN, Tokenizer, cut_or_pad, normalise

CAPTIONS = [
    "A motorcycle parked in a parking space next to another motorcycle.",
    "The woman's café: 2 dogs, 22 cats & a motorcyclist!",
    "빨간 원이 파란 원 왼쪽에 있다",
    "빨간 원 위의 파란 원",
    "😀😀 a grinning face 😀 ❤️❤️ 👍🏽",
]
TOKENIZER = Tokenizer.train(CAPTIONS, vocab_size=340)

JOINED = Tokenizer.train(CAPTIONS, vocab_size=4096, spaces="joined")

texts = st.one_of(
    st.text(),
    st.text("aegikmnoprt '.2é원빨간😀\u0301\ufe0f"),
    st.lists(st.sampled_from(" ".join(CAPTIONS).split())).map(" ".join),
)


def units(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_normalise():
    assert normalise("A CAFE\u0301") == "a caf\u00e9"
    assert normalise("J\u030c") == "\u01f0"  # one character in lower case only
    assert normalise("a\udcffb") == "a?b"  # half a surrogate pair: an argument that was not UTF-8


@given(texts)
def test_normalise_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text) == unicodedata.normalize("NFC", normalise(text))


@given(texts)
def test_decode_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == normalise(text)


@pytest.mark.parametrize("text", [*CAPTIONS, "", " ", "\n\t\0", "हिन्दी", "👨‍👩‍👧 4️⃣", "a\udcffb"])
def test_any_text_can_be_encoded(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == normalise(text)
    assert all(0 <= token < TOKENIZER.vocab_size for token in tokens)


def test_only_words_merge():
    tokenizer = Tokenizer.train(["it's 22 dogs,  ok?!\n"] * 9 + ["❤️love 👍🏽 love"] * 9)
    assert units("It's 22 dogs,  ok?!\n", tokenizer) == [
        *["it", "'", "s", " ", "2", "2", " ", "dogs", ",", " ", " ", "ok", "?", "!", "\n"]
    ]
    # the variation selector after the heart is a mark, and must not become a part of the word
    assert units("❤️love 👍🏽", tokenizer) == ["❤", "\ufe0f", "love", " ", "👍", "🏽"]


def test_a_space_may_join_the_word_after_it():
    tokenizer = Tokenizer.train(["it's 22 dogs,  ok?!\n"] * 9, spaces="joined")
    expected = ["it", "'", "s", " ", "2", "2", " dogs", ",", " ", " ok", "?", "!", "\n"]
    assert units("It's 22 dogs,  ok?!\n", tokenizer) == expected


@given(texts)
def test_joined_spaces_keep_the_text(text):
    assert JOINED.decode(JOINED.encode(text)) == normalise(text)
    rng = np.random.default_rng(0)
    assert JOINED.decode(JOINED.encode(text, dropout=0.5, rng=rng)) == normalise(text)


def test_accents_belong_to_their_word():
    assert units("q\u0301e", Tokenizer.train(["q\u0301e"])) == ["q\u0301e"]


def test_vocabulary_is_the_bytes_and_the_merges():
    assert TOKENIZER.vocab_size == 340
    assert Tokenizer.train(CAPTIONS, vocab_size=256).encode("원") == Tokenizer.train(["a"]).encode("원")
    # "ab" gives one merge, so that the vocabulary is smaller than asked for
    assert Tokenizer.train(["ab"], vocab_size=16_384).vocab_size == 257
    assert Tokenizer.train(["ab"]).encode("ABa") == [256, TOKENIZER.encode("a")[0]]


def test_training_is_deterministic():
    tied = ["ab cd ef gh"]
    prints = {Tokenizer.train(order).fingerprint() for order in permutations([*tied, "ab", "gh"])}
    assert len(prints) == 1
    code = f"from dalle.text import Tokenizer; print(Tokenizer.train({CAPTIONS!r}, 340).fingerprint())"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == TOKENIZER.fingerprint()


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_no_captions(captions):
    with pytest.raises(DataError, match="no captions"):
        Tokenizer.train(captions)


def test_too_small_a_vocabulary():
    with pytest.raises(ConfigError, match="vocab_size=255 must be at least 256"):
        Tokenizer.train(CAPTIONS, vocab_size=255)


def test_an_error_of_the_captions_comes_through(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)

    def captions():
        yield "a"
        raise DataError("row 2 is broken")

    with pytest.raises(DataError, match="row 2 is broken"):
        Tokenizer.train(captions())
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_threads_that_the_user_asked_for_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    Tokenizer.train(["ab"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_no_warning_after_a_fork():
    """The library warns on stderr if it used threads before a fork: 0.20 does in training."""
    code = (
        "import os; from dalle.text import Tokenizer; t = Tokenizer.train(['ab'] * 999); pid = os.fork()\n"
        "t.encode('ab', dropout=0.0)\nif pid: os.waitpid(pid, 0)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""


@given(texts)
def test_our_merges_are_the_library_s(text):
    pieces = TOKENIZER._library.pre_tokenizer.pre_tokenize_str(normalise(text))
    ours = [token for piece, _ in pieces for token in TOKENIZER._merge(piece, 0.0, np.random.default_rng(0))]
    assert ours == TOKENIZER.encode(text)


@given(texts)
def test_dropout_one_gives_bytes(text):
    tokens = TOKENIZER.encode(text, dropout=1.0, rng=np.random.default_rng(0))
    assert len(tokens) == len(normalise(text).encode())
    assert max(tokens, default=0) < 256


@given(texts, st.integers(0, 99), st.floats(0.01, 0.99))
def test_dropout_keeps_the_text_and_the_seed(text, seed, dropout):
    first, second = (
        TOKENIZER.encode(text, dropout=dropout, rng=np.random.default_rng(seed)) for _ in range(2)
    )
    assert first == second
    assert TOKENIZER.decode(first) == normalise(text)


def test_dropout_skips_each_merge_with_its_probability():
    tokenizer = Tokenizer.train(["ab"])
    rng, draws, p = np.random.default_rng(0), 4000, 0.3
    skipped = sum(len(tokenizer.encode("ab", dropout=p, rng=rng)) == 2 for _ in range(draws))
    assert abs(skipped / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5

    # merges: ab, then abc. At the start only ab is a candidate; abc is tried after it.
    tokenizer = Tokenizer.train(["abc", "ab"])
    lengths = [len(tokenizer.encode("abc", dropout=p, rng=rng)) for _ in range(draws)]
    for length, probability in {3: p, 2: (1 - p) * p, 1: (1 - p) ** 2}.items():
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(lengths.count(length) / draws - probability) < 4 * error


def test_a_skipped_merge_is_tried_again_at_the_next_step():
    tokenizer = Tokenizer.train(["abab", "ab"], vocab_size=257)
    rng, draws, p = np.random.default_rng(0), 4000, 0.5
    lengths = [len(tokenizer.encode("abab", dropout=p, rng=rng)) for _ in range(draws)]
    # all apart: both skipped at once. One pair: then the other is tried once more, and skipped.
    for length, probability in {4: p**2, 3: (1 - p**2) * p, 2: (1 - p**2) * (1 - p)}.items():
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(lengths.count(length) / draws - probability) < 4 * error


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_dropout_must_be_a_probability(dropout):
    with pytest.raises(ConfigError, match="must be a probability"):
        TOKENIZER.encode("a", dropout=dropout, rng=np.random.default_rng(0))


def test_dropout_needs_an_rng():
    with pytest.raises(ValueError, match="needs an rng"):
        TOKENIZER.encode("a", dropout=0.1)


def test_fit():
    array, was_cut = cut_or_pad([5, 6], 3)
    assert array.tolist() == [5, 6, NO_TOKEN]
    assert array.dtype == np.int64
    assert not was_cut
    array, was_cut = cut_or_pad([5, 6, 7], 2)
    assert (array.tolist(), was_cut) == ([5, 6], True)
    assert cut_or_pad([5, 6], 2)[1] is False
    assert cut_or_pad([], 2)[0].tolist() == [NO_TOKEN, NO_TOKEN]


def test_decode_passes_over_the_padding():
    assert TOKENIZER.decode(cut_or_pad(TOKENIZER.encode("a cat"), 99)[0].tolist()) == "a cat"


@pytest.mark.parametrize("token", [-2, 340])
def test_decode_refuses_what_is_no_token(token):
    with pytest.raises(ValueError, match=re.escape("must lie in [0, 340)")):
        TOKENIZER.decode([0, token])


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "prior" / "tokenizer.json"
    TOKENIZER.save(path)
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert os.listdir(path.parent) == ["tokenizer.json"]
    assert loaded.fingerprint() == TOKENIZER.fingerprint()
    assert loaded.vocab_size == 340
    for text in CAPTIONS:
        assert loaded.encode(text) == TOKENIZER.encode(text)
    JOINED.save(path)
    assert Tokenizer.load(path).fingerprint() == JOINED.fingerprint()


def test_survives_the_way_to_a_worker():
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode(CAPTIONS[0]) == TOKENIZER.encode(CAPTIONS[0])


def test_fingerprint_tells_tokenizers_apart():
    assert re.fullmatch("[0-9a-f]{16}", TOKENIZER.fingerprint())
    assert TOKENIZER.fingerprint() != Tokenizer.train(CAPTIONS, vocab_size=339).fingerprint()


def test_fingerprint_tells_other_ids_and_other_merges_apart(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    zero, one = "\u0100", "\u0101"  # these bytes, which no caption has
    changes = ({"vocab": vocab | {zero: vocab[one], one: vocab[zero]}}, {"merges": merges[::-1]})
    found = {TOKENIZER.fingerprint()}
    for change in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"model": content["model"] | change}))
        found.add(Tokenizer.load(tmp_path / "tokenizer.json").fingerprint())
    assert len(found) == 3


def test_saving_fails_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*No space left on device"):
        TOKENIZER.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert path.read_text() == "old"


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_loading_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_loading_a_tokenizer_of_another_program(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(CheckpointError, match="of another program"):
        Tokenizer.load(path)


def test_loading_a_tokenizer_without_the_bytes(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    content = json.loads(path.read_text())
    content["model"] |= {"vocab": {"a": 0}, "merges": []}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="256 bytes"):
        Tokenizer.load(path)
