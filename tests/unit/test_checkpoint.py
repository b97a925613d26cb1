"""Files are whole or absent, whatever happens while they are written."""

import builtins
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle import checkpoint, states
from dalle.checkpoint import (
    FORMAT,
    fingerprint,
    load_weights,
    read_json,
    replacing,
    save_weights,
    write_json,
)
from dalle.distributed import Part
from dalle.errors import CheckpointError
from dalle.states import STATE, State, TensorFile, newest_state, state_folders, write_state


def net(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def save(folder: Path, step: int, keep: int = 9) -> Path:
    tensors = {
        "weights": {"w": torch.full((7, 3), float(step)), "count": torch.tensor(float(step))},
        "moments": {"w/exp_avg": torch.arange(5.0).expand(3, 5).t()},  # not contiguous
    }
    return save_state(folder, step, tensors, {"task": {"best": step / 7, "since": step}}, keep)


def save_state(folder: Path, step: int, tensors, values, keep: int) -> Path:
    parts = {f: {n: Part(tuple(t.shape), 0, t) for n, t in group.items()} for f, group in tensors.items()}
    return write_state(folder, step, parts, values, keep)


def load_state(path: Path):
    state = State(path)
    return state.values, {f: {n: state.read(f, n) for n in state.names(f)} for f in state.files()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(error: Exception, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


class Full:
    """A disk on which the n-th call that writes fails, and leaves half a file behind."""

    def __init__(self, monkeypatch, allowed: int):
        self.calls, self.allowed = 0, allowed
        for owner, name in (
            (checkpoint, "save_file"),
            (TensorFile, "_write"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (os, "replace"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name), name))

    def limited(self, function, name):
        def write(*args, **kwargs):
            self.calls += 1
            if self.calls <= self.allowed:
                return function(*args, **kwargs)
            if name == "save_file":
                Path(args[1]).write_bytes(b"half a file")
            if name == "_write":
                args[0]._file.write(args[1][: len(args[1]) // 2])
            if name == "write_text":
                with builtins.open(args[0], "w") as file:
                    file.write(args[1][: len(args[1]) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        return write


def fail_at_every_point(before: Path, tmp_path: Path, action, survives) -> int:
    """Run `action` on copies of `before`, failing at its first write, at its second …, until it succeeds."""
    for allowed in range(99):
        folder = tmp_path / str(allowed)
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            Full(patch, allowed)
            try:
                action(folder)
            except CheckpointError as error:
                one_line(error, "No space left on device", "make room", str(folder))
            else:
                return allowed
        assert not list(folder.rglob("*.partial"))
        survives(folder)
    raise AssertionError("never succeeded")


def test_a_full_disk_at_any_point_leaves_the_earlier_states_alone(tmp_path):
    save(tmp_path / "before", 3)
    before = files(tmp_path / "before")

    def survives(folder: Path) -> None:
        after = files(folder)
        assert {name: after[name] for name in before} == before
        found, refused = newest_state(folder)
        assert not refused
        # the very last sync comes after the renaming: then the new state is there, and whole
        assert found.values["step"] == 3 or (found.values["step"] == 5 and len(after) == 2 * len(before))

    points = fail_at_every_point(tmp_path / "before", tmp_path, lambda f: save(f, 5), survives)
    assert points >= 8


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12
def test_a_kill_at_any_point_leaves_the_earlier_states_alone(tmp_path, monkeypatch):
    save(tmp_path / "before", 3)
    for allowed in range(99):
        folder = tmp_path / str(allowed)
        shutil.copytree(tmp_path / "before", folder)
        if (child := os.fork()) == 0:
            for module in (checkpoint, states):
                monkeypatch.setattr(module, "unwritable", lambda *_: os._exit(9))
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead do not tidy up
            Full(monkeypatch, allowed)
            save(folder, 5)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found, refused = newest_state(folder)
        assert found.values["step"] in (3, 5)
        assert not refused
        if killed == 0:
            assert allowed >= 8
            return
    raise AssertionError("never succeeded")


def test_a_state_takes_its_name_in_one_step(tmp_path, monkeypatch):
    renamed, replace = [], os.replace

    def rename(a, b):
        renamed.append((Path(a).name, Path(b).name, sorted(files(Path(a)))))
        replace(a, b)

    monkeypatch.setattr(os, "replace", rename)
    save(tmp_path, 5)
    whole = ["moments.safetensors", "state.json", "weights.safetensors"]
    assert renamed == [("step-00000005.partial", "step-00000005", whole)]


def test_a_state_is_on_the_disk_before_it_takes_its_name_and_the_name_after_it(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda _handle: events.append("tensors"))
    monkeypatch.setattr(states, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("renamed"), replace(a, b)))
    save(tmp_path / "state", 5)
    assert events == ["tensors"] * 2 + ["state.json", "step-00000005.partial", "renamed", "state"]


def publish(run: Path, step: int) -> None:
    """A state, and its average as the weights to draw with."""
    average = {"average": {"w": Part((3,), 0, torch.full((3,), float(step)))}}
    write_state(run / "state", step, average, {}, 2, weights=run / "weights.safetensors")


def test_the_weights_to_draw_with_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    publish(tmp_path, 3)
    before = files(tmp_path)

    def half(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(CheckpointError, match="No space left"):
        publish(tmp_path, 5)
    assert files(tmp_path) == before


def test_a_disk_that_fills_after_the_weights_leaves_nothing_beside_the_earlier_states(tmp_path, monkeypatch):
    publish(tmp_path, 3)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        publish(tmp_path, 5)
    assert os.listdir(tmp_path / "state") == ["step-00000003"]


def test_a_full_disk_at_any_point_leaves_the_earlier_weights_alone(tmp_path):
    save_weights(tmp_path / "before", net(0).state_dict())
    old = (tmp_path / "before" / "weights.safetensors").read_bytes()
    save_weights(tmp_path / "other", net(1).state_dict())
    new = (tmp_path / "other" / "weights.safetensors").read_bytes()

    def survives(folder: Path) -> None:
        assert files(folder).keys() == {"weights.safetensors"}
        assert (folder / "weights.safetensors").read_bytes() in (old, new)

    def action(folder: Path) -> None:
        save_weights(folder, net(1).state_dict())

    assert fail_at_every_point(tmp_path / "before", tmp_path, action, survives) >= 5


def test_a_full_disk_at_any_point_leaves_the_earlier_json_alone(tmp_path):
    write_json(tmp_path / "before" / "config.json", {"format": 1, "width": 3})

    def survives(folder: Path) -> None:
        assert files(folder).keys() == {"config.json"}
        assert read_json(folder / "config.json")["width"] in (3, 5)

    def action(folder: Path) -> None:
        write_json(folder / "config.json", {"format": 1, "width": 5})

    assert fail_at_every_point(tmp_path / "before", tmp_path, action, survives) >= 5


def test_a_refusal_by_the_system_itself_reads_the_same(tmp_path):
    """Not simulated: files may not grow beyond 4 KiB, so the library's own writing fails."""
    save(tmp_path, 3)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError) as state:
            save_state(tmp_path, 5, {"weights": {"w": torch.zeros(5000)}}, {}, 2)
        with pytest.raises(CheckpointError) as weights:
            save_weights(tmp_path, {"w": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for caught in (state, weights):
        one_line(caught.value, "too large", "cannot write")
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_file_leaves_nothing(tmp_path, error):
    def write() -> None:
        with replacing(tmp_path / "a.png") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert files(tmp_path) == {}


def test_a_state_comes_back_as_it_was(tmp_path):
    state, tensors = load_state(save(tmp_path, 3))
    assert state == {"step": 3, "task": {"best": 3 / 7, "since": 3}}
    assert torch.equal(tensors["weights"]["w"], torch.full((7, 3), 3.0))
    assert tensors["weights"]["count"].shape == ()
    assert torch.equal(tensors["moments"]["w/exp_avg"], torch.arange(5.0).expand(3, 5).t())


def test_infinities_and_nan_in_a_state_come_back(tmp_path):
    values = {"task": {"best": float("inf"), "mean": float("nan"), "word": "ä"}}
    state, _ = load_state(save_state(tmp_path, 1, {}, values, 1))
    assert state["task"]["best"] == float("inf")
    assert state["task"]["mean"] != state["task"]["mean"]
    assert state["task"]["word"] == "ä"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept(tmp_path, keep):
    for step in (5, 90, 700, 12345):
        save(tmp_path, step, keep)
    names = ["step-00012345", "step-00000700", "step-00000090"]
    assert [path.name for path in state_folders(tmp_path)] == names[:keep]


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", STATE])
@pytest.mark.parametrize("harm", ["flip first", "flip middle", "flip last", "cut", "empty", "remove"])
def test_a_harmed_state_is_refused_by_name_and_the_one_before_taken(tmp_path, name, harm):
    save(tmp_path, 3)
    path = save(tmp_path, 5) / name
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[:-3])
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        data[{"flip first": 0, "flip middle": len(data) // 2, "flip last": len(data) - 1}[harm]] ^= 4
        path.write_bytes(data)
    found, refused = newest_state(tmp_path)
    assert found.values["step"] == 3
    assert len(refused) == 1
    # a hash that was harmed accuses the file it belongs to
    one_line(refused[0], str(path.parent) if name == STATE else str(path))


def test_no_harm_to_a_value_of_the_state_goes_unnoticed(tmp_path):
    path = save(tmp_path, 5) / STATE
    text = path.read_text()
    for at in range(text.index('"step"'), len(text)):
        if text[at].isalnum() or text[at] == ".":
            path.write_text(text[:at] + ("2" if text[at] != "2" else "3") + text[at + 1 :])
            with pytest.raises(CheckpointError):
                load_state(path.parent)


def test_a_state_without_its_hashes_is_refused(tmp_path):
    path = save(tmp_path, 5) / STATE
    for text in ("{}", '{"step": 5}', '{"sha256": {}}', '{"sha256": [], "step": 5}', "[]", "null"):
        path.write_text(text)
        with pytest.raises(CheckpointError) as caught:
            load_state(path.parent)
        one_line(caught.value, str(path))


def test_no_state_is_none_and_all_harmed_names_all(tmp_path):
    assert newest_state(tmp_path / "absent") == (None, [])
    for step in (3, 5):
        (save(tmp_path, step) / STATE).unlink()
    found, refused = newest_state(tmp_path)
    assert found is None
    assert [f"step-0000000{step}" in str(error) for step, error in zip((5, 3), refused, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_refused_newer_state_does_not_crowd_out_the_one_just_saved(tmp_path, keep):
    save(tmp_path, 5)
    (save(tmp_path, 10) / "weights.safetensors").write_bytes(b"")
    save(tmp_path, 7, keep)  # resumed at 5
    found, refused = newest_state(tmp_path)
    assert found.values["step"] == 7
    assert not refused


def test_what_is_to_go_is_no_state_even_before_it_is_deleted(tmp_path, monkeypatch):
    """Or a kill would leave half of one, which resuming refuses with a warning."""
    save(tmp_path, 3)
    save(tmp_path, 10)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    save(tmp_path, 7, keep=1)
    assert [path.name for path in state_folders(tmp_path)] == ["step-00000007"]


def test_a_harmed_state_is_replaced_by_the_same_step(tmp_path):
    (save(tmp_path, 5) / STATE).write_text("{")
    save(tmp_path, 5)
    assert newest_state(tmp_path)[0].values["step"] == 5


def test_what_a_killed_process_left_is_never_taken_and_goes_with_the_next_state(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000004.partial")
    assert newest_state(tmp_path)[0].values["step"] == 3
    save(tmp_path, 5)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000005"]


def test_weights_come_back_and_have_the_fingerprint_of_their_file(tmp_path):
    saved, loaded = net(0), net(1)
    print_ = save_weights(tmp_path, saved.state_dict())
    assert print_ == fingerprint(tmp_path / "weights.safetensors")
    assert len(print_) == 16
    assert print_ != save_weights(tmp_path / "other", loaded.state_dict())
    load_weights(tmp_path, loaded)
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_may_be_read_by_whoever_may_read_other_files(tmp_path):
    save_weights(tmp_path, {"w": torch.zeros(3)})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_weights_load_into_a_model_without_storage(tmp_path):
    saved = net(0)
    save_weights(tmp_path, saved.state_dict())
    with torch.device("meta"):
        loaded = net(1)
    load_weights(tmp_path, loaded)
    assert torch.equal(loaded[0].weight, saved[0].weight)


def refused_weights(folder: Path, model: nn.Module) -> str:
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, model)
    one_line(caught.value, str(folder / "weights.safetensors"))
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    return str(caught.value)


def test_weights_of_another_model_are_refused_with_the_difference(tmp_path):
    save_weights(tmp_path, net(0).state_dict())
    assert "0.weight has shape (5, 3), its config.json asks for (7, 3)" in refused_weights(
        tmp_path, net(0, width=7)
    )
    message = refused_weights(tmp_path, nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2)))
    assert "lacks ['2.bias', '2.weight'] (2 in all)" in message
    assert "has ['1.bias', '1.weight'] (2 in all) too many" in message


def test_missing_and_damaged_weights_are_refused(tmp_path):
    assert "nothing has been trained" in refused_weights(tmp_path, net(0))
    save_weights(tmp_path, net(0).state_dict())
    whole = (tmp_path / "weights.safetensors").read_bytes()
    for part in (b"", whole[:5], whole[:40], whole[:-1], b"\0" * len(whole), b"PK\3\4" + whole):
        (tmp_path / "weights.safetensors").write_bytes(part)
        assert "damaged" in refused_weights(tmp_path, net(0))


def test_json_of_a_newer_format_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"format": FORMAT, "caption": "día"})
    assert read_json(path) == {"format": FORMAT, "caption": "día"}
    write_json(path, {"format": FORMAT + 1})
    with pytest.raises(CheckpointError, match="newer version of this program; update it"):
        read_json(path)


@pytest.mark.parametrize("data", [b"", b"{", b'{"format": "x"}', b"[1]", b"\xff\xfe", b'{"format": null}'])
def test_damaged_json_is_refused_by_name(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "config.json")
    one_line(caught.value, str(tmp_path / "config.json"))


def test_missing_json_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_json(tmp_path / "config.json")


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "deep" / "config.json", {"format": 1, "name": "año"})
    text = (tmp_path / "deep" / "config.json").read_text(encoding="utf-8")
    assert text == '{\n  "format": 1,\n  "name": "año"\n}\n'
    assert json.loads(text)["name"] == "año"


def test_a_name_that_is_not_utf_8_comes_back_from_json_as_it_was(tmp_path):
    name = os.fsdecode(b"pictures \xff")
    write_json(tmp_path / "config.json", {"data": name, "é": "✓"})
    assert read_json(tmp_path / "config.json") == {"data": name, "é": "✓"}
    assert "é" in (tmp_path / "config.json").read_text(encoding="utf-8")
