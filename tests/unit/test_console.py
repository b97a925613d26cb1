"""What a person sees while a command runs."""

import io
from contextlib import suppress

import pytest

from dalle import console
from dalle.console import Bar, Patient, Stopwatch, duration, say, warn


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (40.0, "40 s"),
        (98.0, "98 s"),
        (100.0, "2 min"),
        (120.0, "2 min"),
        (5_370.0, "90 min"),
        (5_970.0, "1 h 40 min"),
        (11_100.0, "3 h 05 min"),
        (2 * 86_400.0, "2 d 0 h"),
        (2 * 86_400 + 4 * 3_600.0, "2 d 4 h"),
    ],
)
def test_durations_are_in_the_words_one_would_use(seconds, words):
    assert duration(seconds) == words


def test_a_log_on_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full:
        patient = Patient(file=full)
        patient.print("a line")
        with patient:
            patient.print("another")
        assert patient.quiet
    with open("/dev/full", "w") as full, Patient(file=full) as patient:
        patient.print("kept until the end")
    assert patient.quiet


def test_lines_go_to_standard_error_unwrapped_and_as_they_are(capsys):
    text = "[bold]brackets[/bold] " + "long " * 100 + "end"
    say(text)
    warn(text)
    assert capsys.readouterr() == ("", f"{text}\nwarning: {text}\n")


class Clock(Stopwatch):
    seconds = 0.0


def test_without_a_terminal_lines_come_now_and_then_and_at_the_end(capsys):
    clock = Clock()
    with Bar("dVAE", 1_000, start=100, clock=clock, unit="steps", every=15.0) as bar:
        for done in range(101, 1_001):
            clock.seconds += 0.05
            bar.show(done, {"loss": "0.5"})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        "dVAE 400/1,000",
        "dVAE 700/1,000",
        "dVAE 1,000/1,000",
    ]
    assert lines[0] == "dVAE 400/1,000 · 20 steps/s · 30 s left · loss 0.5"


def test_pauses_are_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dalle.console.time.monotonic", lambda: now[0])
    clock = Stopwatch()
    now[0] = 3.0
    with clock.paused():
        now[0] = 10.0
    now[0] = 11.0
    assert clock.seconds == 4.0
    with suppress(OSError), clock.paused():
        now[0] = 20.0
        raise OSError
    assert clock.seconds == 4.0


def test_steps_are_added_up_towards_what_is_expected(capsys):
    clock = Clock()
    with Bar("drawing", 10_000, clock=clock) as bar:
        bar.expect(3_000)
        bar.show(1_000)
        clock.seconds = 1.5
        for _ in range(2):
            bar.advance(1_000)
    assert capsys.readouterr().err == "drawing 3,000/3,000 · 2,000 steps/s · 0 s left\n"


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    terminal = Patient(file=io.StringIO(), force_terminal=True, width=99, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    with Bar("dVAE", 1_000, start=100, clock=Clock()) as bar:
        assert bar.progress.live.is_started
        bar.show(400, {"loss": "0.5"})
        bar.expect(2_000)
        bar.show(2_000, {"loss": "0.5"})
    shown = terminal.file.getvalue()
    assert "2000/2000" in shown
    assert "loss 0.5" in shown
    assert "2,000/2,000" not in shown
    assert not bar.progress.live.is_started
