"""display: what a terminal and what a log get, driven by a clock of the test."""

import io
import os
import pty
import subprocess
import sys
import textwrap

import jax
import pytest
from rich.console import Console

from ppo_jax.runs.output.caller import CALLER, in_words_of_caller
from ppo_jax.runs.output.pace import PlannedPhase, count_compiling
from ppo_jax.runs.output.screen import clock_time, progress


class Clock:
    """Seconds that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(updates, *, seconds=1.0, live=None, terminal=False, encoding="utf-8", width=120, **options) -> str:
    clock = Clock()
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, force_terminal=terminal, width=width, highlight=False, _environ={})
    with progress("demo", console=console, live=live, clock=clock, **options) as screen:
        for item in updates:
            clock.now += seconds
            item(screen) if callable(item) else screen.update(**item)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def ppo(step, **values):
    return {"phase": "ppo", "step": step, "total": 100, "values": values}


def test_log_has_plain_lines_at_a_bounded_rate():
    text = run([ppo(i, reward=i / 100, kl=1.5) for i in range(1, 101)], interval=10.0)
    steps = [int(line.split()[1].split("/")[0]) for line in text.splitlines()]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]  # first, one in ten seconds, last
    assert "\x1b" not in text
    # at t = 11 s update 11 of 100 is done: ten updates took ten seconds since the first, so 89 s are left
    assert text.splitlines()[1] == "[ppo]  11/100  reward +0.110  KL 1.50 nats  elapsed 0:11  left 1:29"


def test_last_update_is_printed_even_if_the_run_stops_early():
    with pytest.raises(KeyboardInterrupt):
        stream = io.StringIO()
        with progress("demo", console=Console(file=stream, width=100), clock=Clock()) as screen:
            screen.update(**ppo(1, reward=1.0))
            screen.update(**ppo(2, reward=2.0))
            raise KeyboardInterrupt
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "2/100"]


def test_an_evaluation_between_updates_does_not_reset_the_estimate():
    evaluation = {"phase": "eval", "step": 1, "values": {"reward": 0.0}}
    text = run([ppo(1), ppo(2), evaluation, ppo(3)], seconds=10.0)
    # updates 1 and 3 are 30 s apart: 15 s each, 97 to go
    assert text.splitlines()[-1] == "[ppo]  3/100  elapsed 0:40  left 24:15"


def test_a_phase_that_begins_again_starts_afresh():
    text = run([ppo(50, reward=1.0), ppo(1, kl=1.0)], seconds=20.0)
    assert text.splitlines()[-1] == "[ppo]  1/100  KL 1.00 nats  elapsed 0:40"


def test_unknown_metrics_are_shown_when_nothing_known_is():
    assert "bits_per_byte 0.9123" in run([{"phase": "x", "step": 1, "values": {"bits_per_byte": 0.91234}}])


def test_other_processes_are_silent():
    text = run(
        [ppo(1, reward=1.0), lambda s: s.message("hello"), lambda s: s.sample(["p"], ["b"], ["a"])], main_process=False
    )
    assert text == ""


def test_live_display_shows_phase_bar_values_and_sparkline():
    values = dict(reward=0.5, kl=2.0, entropy=3.0, clip_fraction=0.1, explained_variance=0.25, tokens_per_second=1234.0)
    text = run([ppo(1, **values), ppo(100, **{**values, "reward": 1.5})], live=True, terminal=True)
    for part in ("demo", "ppo", "100/100", "+1.500", "2.00 nats", "3.000", "0.100", "+0.25", "1,234", "▁█  0.5 to 1.5"):
        assert part in text, part


def test_nan_is_shown_and_left_out_of_the_sparkline():
    updates = [ppo(i, reward=x) for i, x in enumerate([1.0, float("inf"), 2.0, float("nan")])]
    text = run(updates, live=True, terminal=True)
    assert "+nan" in text and "▁█  1 to 2" in text


def test_samples_and_messages_show_text_as_it_is():
    hostile = "[red]bold[/red] \x1b[2J\x07 :smile: two\nlines"
    text = run(
        [lambda s: s.sample([hostile], ["before"], ["after"], [-1.25], [2.5]), lambda s: s.message(hostile)],
        terminal=False,
    )
    assert "\x1b" not in text and "\x07" not in text
    assert text.count("[red]bold[/red]") == 2 and ":smile:" in text
    assert "-1.25" in text and "+2.50" in text


def test_an_ascii_log_never_fails():
    text = run([ppo(1, reward=1.0), lambda s: s.sample(["café ☃"], ["é"], ["漢字"])], encoding="ascii")
    assert "caf?" in text


@pytest.mark.parametrize("live", [False, True])
def test_a_log_file_gets_all_that_is_said_in_plain_lines_and_what_ended_it(tmp_path, live, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = tmp_path / "log.txt"
    updates = [ppo(1, reward=1.0), lambda s: s.message("[red]a note[/red] :smile:"), ppo(2, reward=2.0)]
    updates += [lambda s: s.sample(["p"], ["b"], ["a"])]
    with pytest.raises(KeyError):
        run([*updates, lambda s: {}["x"]], live=live, terminal=live, log=log)
    text = log.read_text()
    assert "\x1b" not in text and "[red]a note[/red] :smile:" in text and "Samples before and after" in text
    lines = [line[20:].split("  elapsed")[0] for line in text.splitlines()]  # without their times
    assert [line for line in lines if line.startswith("[ppo]")] == [
        "[ppo]  1/100  reward +1.000", "[ppo]  2/100  reward +2.000",
    ]  # fmt: skip
    assert lines[0] == "demo" and lines[-1] == "ended by KeyError: 'x'"


def test_a_log_file_that_cannot_be_written_ends_nothing_and_makes_no_directory(tmp_path):
    run([ppo(1, reward=1.0)], log=tmp_path / "gone" / "log.txt")
    assert list(tmp_path.iterdir()) == []


def test_clock_time():
    assert [clock_time(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]


SCRIPT = textwrap.dedent("""
    from ppo_jax.runs.output.screen import progress
    with progress("demo") as screen:
        screen.update(phase="ppo", step=1, total=2, values={"reward": 1.0})
        screen.message("note")
        screen.update(phase="ppo", step=2, total=2, values={"reward": 2.0})
""")


def in_terminal(**environment: str) -> str:
    """Standard output of SCRIPT on a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def test_real_terminal_is_live_and_no_color_is_respected():
    coloured, plain = in_terminal(), in_terminal(NO_COLOR="1")
    assert "\x1b[36m" in coloured and "\x1b[?25l" in coloured  # cyan; cursor hidden while live
    assert "\x1b[36m" not in plain and "\x1b[?25l" in plain
    assert "note" in plain and "2/2" in plain


def test_pipe_is_plain_even_with_force_color():
    env = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
    assert [line.split("  elapsed")[0] for line in done.stdout.splitlines()] == [
        "[ppo]  1/2  reward +1.000",
        "note",
        "[ppo]  2/2  reward +2.000",
    ]


# -- phases, compiling, and what runs between two updates --------------------------------------------------------------

PLAN = {"reading": PlannedPhase("what it reads", 1), "ppo": PlannedPhase("PPO", 3), "last": PlannedPhase("the end", 2)}


def plan(screen) -> None:
    screen.plan = PLAN


def test_phases_are_counted_and_the_time_of_all_is_estimated():
    text = run(
        [plan, *({"phase": "reading", "step": i, "total": 11} for i in range(1, 12)), ppo(1), ppo(2)], seconds=10.0
    )
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("Phase")] == [
        "Phase 1 of 3: what it reads", "Phase 2 of 3: PPO",
    ]  # fmt: skip
    # At 30 s the phase "reading" has begun 10 s ago and is 90 s from its end: 100 s for one of six units.
    assert "2/11  elapsed 0:30  left 1:30, of all 9:50" in text
    # At 130 s PPO (3 units) begins, of which nothing is known: a unit takes 130 s, as the one before.
    assert lines[-2].startswith("[ppo]  1/100") and lines[-2].endswith("of all 10:50")
    # At 140 s 98 updates of 10 s are left of PPO, which so takes 990 s: two more units take 660 s.
    assert lines[-1].endswith("left 16:20, of all 27:20")


def test_without_a_plan_no_phase_is_announced():
    assert "Phase" not in run([lambda s: s.begin("ppo"), ppo(1)])


def test_seconds_of_compiling_are_no_part_of_the_pace():
    spent = iter([0.0, 0.0, 30.0])
    # Updates 1 and 3 are 30 + 2 * 5 s apart, of which 30 s went into a compilation: 97 updates of 5 s are left.
    waits = iter([5.0, 5.0, 35.0])
    clock = Clock()
    stream = io.StringIO()
    with progress(
        "demo", console=Console(file=stream, width=120), clock=clock, compiling=lambda: next(spent)
    ) as screen:
        for step in (1, 2, 3):
            clock.now += next(waits)
            screen.update(**ppo(step))
    assert "3/100  elapsed 0:45  left 8:05" in stream.getvalue()


def test_jax_tells_of_the_seconds_that_it_compiles():
    before = (seconds := count_compiling())()
    jax.jit(lambda x: x * 3.25 + 1)(1.5).block_until_ready()
    assert seconds() > before and count_compiling() is seconds


def test_what_runs_between_updates_is_said_once_and_replaces_the_phase():
    def busy(screen) -> None:
        screen.doing("compiling (once)", "ppo")
        assert "compiling (once)" in render(screen) and "ppo" not in render(screen)

    def on(screen) -> None:
        screen.doing("", "ppo")
        assert "ppo" in render(screen) and "eval" not in render(screen)

    evaluation = {"phase": "eval", "step": 1, "values": {"reward": 0.0}}
    text = run([busy, busy, ppo(1), evaluation, on])
    assert text.count("compiling (once)") == 1


def render(screen) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(screen)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_line_of_ppo_has_the_parts_of_the_reward_the_coefficient_and_the_value_loss():
    parts = {"reward/a": 0.25, "reward/b": 0.75, "reward/b_std": 3.0}
    text = run([ppo(1, reward=1.0, kl=2.0, kl_coef=0.05, value_loss=0.5, **parts)])
    assert (
        "reward +1.000  reward a +0.250  reward b +0.750  KL 2.00 nats  KL coefficient 0.05  value loss 0.500" in text
    )
    assert "reward a" not in run([ppo(1, reward=1.0, **{"reward/a": 1.0})])  # the one part is the reward itself


def test_options_are_said_in_the_words_of_make(monkeypatch):
    said = 'pass --resume to go on, --overwrite to delete it; "--resume auto starts one"; runs/x--resume; --resumed'
    assert in_words_of_caller(said) == said
    monkeypatch.setenv(CALLER, "make demo")
    assert in_words_of_caller(said) == (
        "make demo ARGS=--resume to go on, make demo ARGS=--overwrite to delete it; "
        '"make demo ARGS="--resume auto" starts one"; runs/x--resume; --resumed'
    )
    assert "Go on with make demo ARGS=--resume" in run([lambda s: s.message("Go on with --resume")])
