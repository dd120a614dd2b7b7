"""The host's loop: schedules, what happens when, resuming, faults; and the iteration around a host reward."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.rollout import Sampling
from ppo_jax.train.loop import LoopConfig, evaluation_due, host_iteration, learning_rate, means, response_texts, train
from ppo_jax.train.state import TrainState
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, Rollout, Scores

FROZEN = Frozen({})


def rates(loop: LoopConfig, peak: float = 0.8) -> list[float]:
    return [learning_rate(peak, loop)(step) for step in range(loop.updates)]


def test_linear_schedule_with_warm_up():
    # 2 of 6 updates warm up: 0.4, 0.8; then 4 updates from 0.8 down by a quarter each, towards 0 at update 6
    assert rates(LoopConfig(updates=6, warmup=2)) == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])


def test_constant_schedule():
    assert rates(LoopConfig(updates=3, schedule="constant")) == pytest.approx([0.8] * 3)
    assert rates(LoopConfig(updates=5, schedule="constant", warmup=4)) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_cosine_schedule():
    # 0.8 (1 + cos(pi t / 4)) / 2
    half = math.sqrt(0.5)
    expected = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half)]
    assert rates(LoopConfig(updates=4, schedule="cosine")) == pytest.approx(expected)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 30), st.integers(0, 29), st.floats(1e-6, 1.0))
def test_no_rate_is_above_the_peak_or_0(schedule, updates, warmup, peak):
    loop = LoopConfig(updates=updates, schedule=schedule, warmup=min(warmup, updates - 1))
    found = rates(loop, peak)
    assert all(0 < rate <= peak * (1 + 1e-6) for rate in found)
    assert max(found) == pytest.approx(peak)
    assert all(isinstance(rate, float) for rate in found)  # an array of another kind would compile anew


def state(step: int = 0) -> TrainState:
    empty = Policy({}, {})
    return TrainState(jnp.asarray(step), jax.random.key(0), empty, (), jnp.zeros(()))


class Log:
    """What `train` did, in order; an iteration that only counts, and says what it was given."""

    def __init__(self, broken: dict[int, dict] | None = None, seconds: float = 0.0):
        self.events: list[tuple] = []
        self.written: dict[int, dict] = {}
        self.broken, self.seconds = broken or {}, seconds

    def iteration(self, state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper):
        step = int(state.step)
        time.sleep(self.seconds)
        self.events.append(("update", step, prompts, hyper.learning_rate))
        names = ("policy_loss", "value_loss", "grad_norm", "reward")
        metrics = {name: (jnp.asarray(3.0), jnp.asarray(2.0)) for name in names}
        metrics |= {"response_length": (jnp.asarray(60.0), jnp.asarray(4.0)), "invalid_scores": (0.0, 4.0)}
        metrics |= self.broken.get(step, {})
        return state.replace(step=state.step + 1), jax.tree.map(jnp.asarray, metrics)

    def run(self, loop: LoopConfig, start: int = 0) -> TrainState:
        return train(
            state(start),
            FROZEN,
            self.iteration,
            lambda step: f"batch {step}",
            Hyper(learning_rate=0.8),
            loop,
            write=lambda step, values: (self.events.append(("write", step)), self.written.update({step: dict(values)})),
            evaluate=lambda step, state: self.events.append(("evaluate", step, int(state.step))),
            save=lambda step, state: self.events.append(("save", step, int(state.step))),
        )

    def all(self, kind: str) -> list[tuple]:
        return [event[1:] for event in self.events if event[0] == kind]


def test_each_thing_happens_exactly_when_due():
    log = Log()
    last = log.run(LoopConfig(updates=7, schedule="constant", eval_every=3, checkpoint_every=2))
    assert int(last.step) == 7
    assert log.all("update") == [(step, f"batch {step}", pytest.approx(0.8)) for step in range(7)]
    assert log.all("write") == [(step,) for step in range(1, 8)]
    assert log.all("save") == [(step, step) for step in (2, 4, 6, 7)]
    assert log.all("evaluate") == [(step, step) for step in (0, 3, 6, 7)]
    assert log.events[0][0] == "evaluate"  # before the first update
    assert log.events.index(("save", 6, 6)) < log.events.index(("evaluate", 6, 6))  # a slow judge risks no update


def test_zero_means_at_the_ends_only():
    log = Log()
    log.run(LoopConfig(updates=5, eval_every=0, checkpoint_every=0))
    assert log.all("save") == [(5, 5)]
    assert log.all("evaluate") == [(0, 0), (5, 5)]


def test_an_end_that_is_also_due_happens_once():
    log = Log()
    log.run(LoopConfig(updates=4, eval_every=2, checkpoint_every=2))
    assert log.all("save") == [(2, 2), (4, 4)]
    assert log.all("evaluate") == [(0, 0), (2, 2), (4, 4)]


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 12))
def test_evaluation_due_says_what_train_does(updates, every, done):
    due = evaluation_due(done, LoopConfig(updates=updates, eval_every=every))
    assert due == (done in {0, updates, *(range(0, 100, every) if every else ())})


def test_resuming_goes_on_at_the_step_of_the_state():
    whole, resumed = Log(), Log()
    loop = LoopConfig(updates=6, warmup=2, eval_every=2, checkpoint_every=2)
    whole.run(loop)
    resumed.run(loop, start=4)
    assert resumed.all("update") == whole.all("update")[4:]  # same batches, same learning rates
    assert resumed.all("write") == [(5,), (6,)]
    assert resumed.all("evaluate") == [(6, 6)]  # not again before the first update
    finished = Log()
    assert int(finished.run(loop, start=6).step) == 6
    assert finished.events == []


@pytest.mark.parametrize("name", ["policy_loss", "value_loss", "grad_norm", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_before_it_is_saved(name: str, value: float):
    log = Log(broken={3: {name: (value, 1.0)}})
    with pytest.raises(FloatingPointError, match=rf"update 4: {name} is (nan|inf).*resume") as error:
        log.run(LoopConfig(updates=6, checkpoint_every=1))
    assert log.all("save") == [(1, 1), (2, 2), (3, 3)]
    assert log.all("write")[-1] == (4,)  # the record shows what happened
    assert ("reward" in str(error.value).split("is from before")[1]) == (name == "reward")


def test_a_batch_whose_rewards_all_failed_is_no_fault_but_a_broken_gradient_is():
    nothing = {name: (0.0, 0.0) for name in ("policy_loss", "value_loss", "reward")}
    failed = {"invalid_scores": (4.0, 4.0), "grad_norm": (0.0, 1.0), **nothing}
    log = Log(broken={1: failed})
    log.run(LoopConfig(updates=3))
    assert len(log.all("write")) == 3
    assert math.isnan(log.written[2]["reward"])
    with pytest.raises(FloatingPointError, match="grad_norm"):
        Log(broken={1: {**failed, "grad_norm": (math.nan, 1.0)}}).run(LoopConfig(updates=3))


def test_tokens_per_second_counts_response_tokens_over_the_whole_iteration():
    log = Log(seconds=0.05)
    log.run(LoopConfig(updates=1))
    values = log.written[1]
    assert 0.05 <= values["seconds"] < 2
    assert values["tokens_per_second"] == pytest.approx(60 / values["seconds"])
    assert values["policy_loss"] == 1.5 and values["response_length"] == 15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"keep": 0}, "keep=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"updates": 5, "warmup": 5}, "warmup=5 must be shorter than updates=5"),
    ],
)
def test_impossible_settings_name_the_field(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**fields)


@given(st.lists(st.lists(st.integers(-100, 100).map(float), max_size=4), min_size=1, max_size=5))
def test_any_cut_of_the_batch_has_the_same_mean(cut):
    """Defects 11 and 15: pairs (total, count) are summed and divided once."""
    pairs = [(sum(part), len(part)) for part in cut]
    summed = tuple(jnp.asarray(sum(column), jnp.float32) for column in zip(*pairs, strict=True))
    values = [x for part in cut for x in part]
    found = means({"x": summed})["x"]
    assert math.isnan(found) if not values else found == pytest.approx(np.mean(values), abs=1e-5)


def test_response_texts_leave_out_the_stop_token_and_what_is_masked():
    tokens = np.array([[9, 1, 4, 0, 2], [9, 9, 5, 6, 7], [9, 9, 3, 0, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    assert response_texts(tokens, mask, str, stop_ids=(2, 3)) == ["[4 0]", "[5 6]", "[]"]
    # Without stop ids every sampled token is text; a pad id inside the mask is one too (defect 8).
    assert response_texts(tokens, mask, str, stop_ids=()) == ["[4 0 2]", "[5 6]", "[3]"]


def test_host_iteration_gives_the_reward_texts_and_the_rows_of_the_table():
    tokens = jnp.asarray([[8, 8, 3, 2], [8, 8, 4, 5]], jnp.int32)
    prompts = Prompts(tokens[:, :2], jnp.ones((2, 2), bool), jnp.asarray([3, 1]))
    zeros = jnp.zeros((2, 2))
    rollout = Rollout(
        tokens, prompts.mask, jnp.asarray([[True, True], [True, True]]), zeros, zeros, zeros,
        jnp.asarray([True, False]), prompts.index,
    )  # fmt: skip
    calls = []

    def reward(prompts, responses, metadata) -> Scores:
        calls.append((list(prompts), list(responses), list(metadata)))
        return Scores(np.array([0.5, 1.5], np.float32), np.array([True, True]), {})

    def learn(state, frozen, rollout, scores, hyper):
        return state.replace(step=state.step + 1), {"reward": (jnp.asarray(scores.reward.sum()), jnp.asarray(2.0))}

    run = host_iteration(
        lambda *_: rollout,
        learn,
        reward,
        lambda ids: " ".join(map(str, ids)),
        Sampling(response_length=2, stop_ids=(2,)),
        ("zero", "one", "two", "three"),
        tuple({"row": i} for i in range(4)),
    )
    after, metrics = run(state(), FROZEN, prompts, Hyper())
    assert calls == [(["three", "one"], ["3", "4 5"], [{"row": 3}, {"row": 1}])]
    assert int(after.step) == 1
    assert means(metrics) == {"reward": 1.0}
