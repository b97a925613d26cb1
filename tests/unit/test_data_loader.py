"""One stream, whatever reads it and wherever it is entered."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dalle
from dalle.data.loader import TRIES, Loader
from dalle.data.order import shuffled
from dalle.data.source import BadSample, Sample
from dalle.errors import ConfigError, DataError

# Two workers on a machine of one core: torch advises against it, and the stream must be the same.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers:
    """Sample i is a picture of `side` pixels and red i; the numbers in `broken` cannot be read."""

    name = "numbers"

    def __init__(self, length, broken=(), small=()):
        self.length, self.broken, self.small = length, set(broken), set(small)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        texts = self.captions(index)
        side = 4 if index in self.small else 8
        return Sample(Image.new("RGB", (side + 3, side), (index, 0, 0)), texts, str(index))

    def captions(self, index):
        if index in self.broken:
            raise BadSample(str(index), "torn")
        return (f"{index}",)


def prepare(sample, rng):
    return torch.tensor(sample.image.getpixel((0, 0))[0]), torch.from_numpy(rng.integers(0, 1000, size=3))


def place(sample, rng):
    return (torch.tensor(int(sample.key)),)


def refuse(sample, rng):
    raise ConfigError("no such crop; choose another")


def take(loader, n, start=0, stride=1):
    batches = loader.batches(start, stride)
    taken = list(islice(batches, n))
    batches.close()
    return taken


def numbers(batches):
    return torch.cat([batch[0] for batch in batches]).tolist()


def same(a, b):
    return all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


# The order


@settings(deadline=None)
@given(length=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
def test_an_epoch_holds_every_index_once(length, seed, epoch):
    indices = [shuffled(epoch * length + i, length, seed) for i in range(length)]
    assert sorted(indices) == list(range(length))


@settings(deadline=None)
@given(length=st.integers(1, 2**40), seed=st.integers(0, 2**64), position=st.integers(0, 2**60))
def test_an_index_is_in_range_for_any_length(length, seed, position):
    assert 0 <= shuffled(position, length, seed) < length


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(shuffled(p, 50, seed) for p in range(e * 50, e * 50 + 50))
        for e in range(9)
        for seed in range(9)
    }
    assert len(orders) == 81


@pytest.mark.parametrize("length", [5, 37])
def test_every_index_comes_first_and_next_to_every_other_equally_often(length):
    epochs = 4000
    firsts = np.zeros(length)
    pairs = np.zeros((length, length))
    for epoch in range(epochs):
        a, b = (shuffled(epoch * length + i, length, seed=7) for i in range(2))
        firsts[a] += 1
        pairs[a, b] += 1
    expected = epochs / length
    assert ((firsts - expected) ** 2 / expected).sum() < length + 6 * (2 * length) ** 0.5  # χ², six sigmas
    expected = epochs / (length * (length - 1))
    off = ~np.eye(length, dtype=bool)
    assert ((pairs[off] - expected) ** 2 / expected).sum() < off.sum() + 6 * (2 * off.sum()) ** 0.5


# The stream


def test_the_stream_is_the_same_for_any_number_of_workers():
    source = Numbers(41, broken=[3, 4, 20])
    alone = Loader(source, prepare, batch_size=5, seed=1)
    helped = Loader(source, prepare, batch_size=5, seed=1, workers=2)
    assert same(take(alone, 20), take(helped, 20))
    assert alone.skipped == helped.skipped == dict.fromkeys(("3", "4", "20"), "torn")


def test_batches_follow_the_order_of_positions():
    loader = Loader(Numbers(41), prepare, batch_size=5, seed=1)
    assert numbers(take(loader, 20)) == [shuffled(p, 41, 1) for p in range(100)]


@pytest.mark.parametrize("start", [1, 39, 41, 83])
def test_a_stream_entered_anywhere_is_the_tail_of_the_whole(start):
    loader = Loader(Numbers(41, broken=[7]), prepare, batch_size=1, seed=3)
    whole = take(loader, 100)
    assert same(take(loader, 100 - start, start), whole[start:])


def test_strides_share_a_stream():
    loader = Loader(Numbers(41), prepare, batch_size=2, seed=3)
    parts = [numbers(take(loader, 6, start=5 + r, stride=3)) for r in range(3)]
    whole = numbers(take(loader, 18, start=5))
    assert [parts[i % 3][i // 3] for i in range(36)] == whole


def test_reading_leaves_the_global_generators_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(Loader(Numbers(9), prepare, batch_size=2, seed=0), 3)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_draws_differ_between_positions_and_seeds():
    draws = [
        tuple(batch[1][0].tolist())
        for seed in (0, 1)
        for batch in take(Loader(Numbers(1), prepare, batch_size=1, seed=seed), 20)
    ]
    assert len(set(draws)) == 40


# Bad samples


@pytest.fixture
def in_order(monkeypatch):
    monkeypatch.setattr("dalle.data.loader.shuffled", lambda position, length, seed: position % length)


def test_the_next_readable_sample_takes_a_bad_ones_place(in_order):
    loader = Loader(Numbers(6, broken=[2, 3, 5]), prepare, batch_size=6, seed=0)
    assert loader.skipped == {}
    assert numbers(take(loader, 1)) == [0, 1, 1, 1, 4, 4]
    assert loader.skipped == dict.fromkeys("235", "torn")


def test_what_takes_a_bad_ones_place_is_prepared_anew(in_order):
    """With the draws of that place: the sample is in the epoch twice, and not twice the same."""
    loader = Loader(Numbers(6, broken=[2]), prepare, batch_size=6, seed=0)
    ((read, draws),) = take(loader, 1)
    assert read[1] == read[2]
    assert not torch.equal(draws[1], draws[2])


def test_bad_samples_that_lie_together_neither_end_the_stream_nor_lean_on_their_neighbours():
    """A folder in it of small pictures, longer than the number of tries."""
    bad = range(100, 100 + 2 * TRIES)
    loader = Loader(Numbers(2000, small=bad), place, batch_size=2000, seed=0, min_side=8)
    stream = numbers(take(loader, 1))
    drawn = np.bincount(stream, minlength=2000)
    plain = [shuffled(p, 2000, 0) for p in range(2000)]
    assert not drawn[bad].any()
    assert (np.delete(drawn, bad) >= 1).all()
    assert drawn.max() <= 5  # 200 replacements for 1,800 places to take them from
    assert all(stream[p] == index for p, index in enumerate(plain) if index not in bad)


def test_one_readable_sample_is_found_wherever_it_is():
    loader = Loader(Numbers(90, broken=set(range(90)) - {17}), prepare, batch_size=20, seed=0)
    assert set(numbers(take(loader, 1))) == {17}


def test_small_pictures_are_skipped_with_their_size(in_order):
    loader = Loader(Numbers(4, small=[1]), prepare, batch_size=4, seed=0, min_side=8)
    assert numbers(take(loader, 1)) == [0, 0, 2, 3]
    reason = "7×4 pixels, smaller than image_size=8; a dVAE with --set image_size=… could use it"
    assert loader.skipped == {"1": reason}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_in_one_line(in_order, workers):
    loader = Loader(Numbers(7, broken=range(7)), prepare, batch_size=2, seed=0, workers=workers)
    with pytest.raises(DataError) as caught:
        next(loader.batches())
    assert str(caught.value) == (
        "numbers: no readable picture among 7 tries; the first, 0: torn; mend it or take it away"
    )
    assert len(loader.skipped) == 7
    assert multiprocessing.active_children() == []


def test_tries_end():
    loader = Loader(Numbers(250, broken=range(250)), prepare, batch_size=1, seed=0)
    with pytest.raises(DataError, match=f"among {TRIES} tries"):
        next(loader.batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_callers_mistake_in_a_worker_keeps_its_type_and_message(workers):
    loader = Loader(Numbers(3), refuse, batch_size=1, seed=0, workers=workers)
    with pytest.raises(ConfigError) as caught:
        next(loader.batches())
    assert str(caught.value) == "no such crop; choose another"


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="numbers: no samples"):
        Loader(Numbers(0), prepare, batch_size=1, seed=0)


def test_what_the_source_lost_on_opening_is_counted_too():
    source = Numbers(3)
    source.bad = [BadSample("0.tar", "cut off")]
    assert Loader(source, prepare, batch_size=1, seed=0).skipped == {"0.tar": "cut off"}


def test_some_are_read_without_bad_samples_or_repetitions(in_order):
    loader = Loader(Numbers(9, broken=[0, 2]), prepare, batch_size=4, seed=0)
    told = []
    assert loader.some(3, told.append)[0].tolist() == [1, 3, 4]
    assert told == [1, 2, 3]
    assert loader.some(99)[0].tolist() == [1, 3, 4, 5, 6, 7, 8]
    assert loader.skipped == {"0": "torn", "2": "torn"}
    with pytest.raises(DataError, match="no readable picture"):
        Loader(Numbers(2, broken=[0, 1]), prepare, batch_size=1, seed=0).some(1)


def test_some_that_take_long_are_read_by_several_threads_and_are_the_same(monkeypatch):
    source, readers = Numbers(99, broken=[5, 70]), set()

    def noted(sample, rng):
        readers.add(threading.get_ident())
        time.sleep(0.002)
        return prepare(sample, rng)

    plain = Loader(source, prepare, batch_size=1, seed=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    slow = Loader(source, noted, batch_size=1, seed=1)
    told = []
    assert same([plain.some(80)], [slow.some(80, told.append)])
    assert told == list(range(1, 81))
    assert slow.skipped == plain.skipped
    assert len(readers) == 1 + 4


def test_a_sample_among_some_is_prepared_alike_in_any_order(request):
    def prepared():
        some = Loader(Numbers(9), prepare, batch_size=1, seed=1).some(9)
        return list(zip(*(column.tolist() for column in some), strict=True))

    one = prepared()
    request.getfixturevalue("in_order")
    other = prepared()
    assert one != other
    assert sorted(one) == sorted(other)


def test_warnings_are_heard_again_after_several_threads_silenced_them(monkeypatch):
    """Each restores what it found: where two overlap, the later one what the earlier one had set."""
    both, main = threading.Barrier(2), threading.current_thread()

    def overlapping(sample, rng):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            later = threading.current_thread() is main or both.wait()
            time.sleep(0.01 * later)  # ends last; so slow that threads read what follows the first two
        return prepare(sample, rng)

    monkeypatch.setattr("dalle.data.loader.AHEAD", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    before = list(warnings.filters)
    Loader(Numbers(4), overlapping, batch_size=1, seed=1).some(4)
    assert warnings.filters == before


def test_some_are_of_the_whole_source():
    """Folders are often sorted by kind or date."""
    found = Loader(Numbers(1000), place, batch_size=1, seed=0).some(100)[0]
    assert len(set(found.flatten().tolist())) == 100
    assert 400 < found.float().mean() < 600  # 500 ± 29 for a random choice


# Worker processes


def observe(sample, rng, parent):
    assert os.getpid() != parent
    return (torch.tensor([os.getpid(), torch.get_num_threads()]),)


def crash(sample, rng):
    raise RuntimeError("a bug")


def test_workers_outlive_signals_use_one_thread_and_end_with_the_stream():
    loader = Loader(Numbers(9), partial(observe, parent=os.getpid()), batch_size=3, seed=0, workers=2)
    batches = loader.batches()
    pids, threads = next(batches)[0].T.tolist()
    assert threads == [1, 1, 1]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(pids[0], number)
    for _ in range(6):  # more than the two batches that each worker has read ahead
        next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_stream_that_fails():
    with pytest.raises(RuntimeError, match="a bug"):
        next(Loader(Numbers(9), crash, batch_size=3, seed=0, workers=2).batches())
    assert multiprocessing.active_children() == []


def test_a_stream_that_is_never_closed_does_not_hold_up_the_exit(tmp_path):
    (tmp_path / "leave.py").write_text("""
import os
import torch
from dalle.data.loader import Loader
from dalle.data.source import Sample
from PIL import Image
class One:
    name = "one"
    def __len__(self): return 1
    def __getitem__(self, index): return Sample(Image.new("RGB", (8, 8)), ("x",), "0")
def prepare(sample, rng): return (torch.zeros(1),)
if __name__ == "__main__":
    os.sched_getaffinity = lambda _: {0}  # fewer cores than workers
    batches = Loader(One(), prepare, batch_size=1, seed=0, workers=2).batches()
    next(batches)
    raise SystemExit(7)
""")
    path = {"PYTHONPATH": str(Path(dalle.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "leave.py")]
    done = subprocess.run(command, timeout=25, env=os.environ | path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (7, "")
