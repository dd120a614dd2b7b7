"""The host's loop: schedules, what happens when, resuming, faults; and the iteration around a host reward."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.ops.means import means
from ppo_jax.ops.rewards import RunningMoments
from ppo_jax.rewards.failures import GivenUp
from ppo_jax.rollout import Sampling
from ppo_jax.train.host import host_iteration, response_texts
from ppo_jax.train.loop import (
    Exploded,
    Interrupted,
    LoopConfig,
    OfflineLoop,
    Stopped,
    assess,
    evaluation_due,
    learning_rate,
    schedule_hyper,
    train,
)
from ppo_jax.train.state import TrainState
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, Rollout, Scores

FROZEN = Frozen({})


def rates(loop: LoopConfig, peak: float = 0.8) -> list[float]:
    return [learning_rate(peak, loop)(step) for step in range(loop.updates)]


def test_a_stage_on_fixed_data_has_a_schedule_too() -> None:
    """Without a warm-up the rate is peak (1 - n / steps) in all its digits; a share of the steps is rounded up."""
    plain = OfflineLoop()
    assert [plain.rate(0.3, plain.of(3))(n) for n in range(3)] == [0.3 * (1 - n / 3) for n in range(3)]
    risen = OfflineLoop(schedule="cosine", warmup=0.3)
    loop = risen.of(10)
    assert loop.warmup == 3 and OfflineLoop(warmup=4.0).of(10).warmup == 4 and risen.of(1).warmup == 0
    rates = [risen.rate(0.6, loop)(n) for n in range(10)]
    wanted = [0.2, 0.4, 0.6] + [0.3 * (1 + math.cos(math.pi * n / 7)) for n in range(7)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6)
    for warmup in (-0.1, 1.5, math.inf):
        with pytest.raises(ValueError, match="must be a number of steps, or a share of all below 1"):
            OfflineLoop(warmup=warmup)


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


def state(step: int = 0, failing: int = 0) -> TrainState:
    return TrainState(
        step=jnp.asarray(step),
        key=jax.random.key(0),
        policy=Policy({}, {}),
        opt_state=(),
        kl_coef=jnp.zeros(()),
        moments=RunningMoments.init(),
        baseline=RunningMoments.init(),
        nonfinite=jnp.zeros((), jnp.int32),
        failing=jnp.asarray(failing, jnp.int32),
        best=jnp.asarray(-jnp.inf, jnp.float32),
    )


class Log:
    """What `train` did, in order; an iteration that only counts, and says what it was given."""

    def __init__(
        self,
        broken: dict[int, dict] | None = None,
        seconds: float = 0.0,
        skipped: dict[int, int] | None = None,
        evaluations: dict[int, float] | None = None,
        stop: dict[int, str] | None = None,
        give_up: int | None = None,
    ):
        self.events: list[tuple] = []
        self.written: dict[int, dict] = {}
        self.broken, self.seconds = broken or {}, seconds
        self.skipped, self.evaluations, self.reasons, self.give_up = skipped or {}, evaluations, stop or {}, give_up

    def iteration(self, state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper):
        step = int(state.step)
        if step == self.give_up:
            raise GivenUp
        time.sleep(self.seconds)
        self.events.append(("update", step, prompts, hyper.learning_rate))
        names = ("policy_loss", "value_loss", "grad_norm", "reward")
        metrics = {name: (jnp.asarray(3.0), jnp.asarray(2.0)) for name in names}
        metrics |= {"response_length": (jnp.asarray(60.0), jnp.asarray(4.0)), "invalid_scores": (0.0, 4.0)}
        metrics |= {"nonfinite_updates": (float(step in self.skipped), 1.0)}
        metrics |= self.broken.get(step, {})
        state = state.replace(step=state.step + 1, nonfinite=jnp.asarray(self.skipped.get(step, 0), jnp.int32))
        return state, jax.tree.map(jnp.asarray, metrics)

    def evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
        self.events.append(("evaluate", step, int(state.step)))
        return {} if self.evaluations is None else {"reward": self.evaluations[step], "kl": 1.0}

    def run(self, loop: LoopConfig, start: int = 0, failing: int = 0) -> TrainState:
        hyper = schedule_hyper(Hyper(learning_rate=0.8), loop)

        def step(state: TrainState, number: int):
            return self.iteration(state, FROZEN, f"batch {number}", hyper(number))

        self.dump = lambda number, state: f" [dump of {number}, {hyper(number).learning_rate:.1f}]"
        return train(state(start, failing), step, loop, self)

    def write(self, done: int, values: dict) -> None:
        self.events.append(("write", done))
        self.written[done] = dict(values)

    def meanwhile(self) -> None:
        self.events.append(("meanwhile",))

    def save(self, done: int, state: TrainState, due: bool) -> None:
        if due:
            self.events.append(("save", done, int(state.step)))

    def stop(self, done: int) -> str | None:
        return self.reasons.get(done)

    def causes(self) -> str:
        return ""

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
    assert log.events.index(("evaluate", 6, 6)) < log.events.index(("save", 6, 6))  # the checkpoint knows the result
    kinds = [event[0] for event in log.events if event[0] in ("update", "meanwhile", "write")]
    assert kinds == ["update", "meanwhile", "write"] * 7  # what was put off is done while the next step is under way


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


def test_skipped_steps_in_a_row_stop_with_a_checkpoint_and_a_dump():
    log = Log(skipped={1: 2, 2: 4, 3: 6})
    with pytest.raises(Stopped, match=r"update 4: the last 6 optimizer steps.*resume \[dump of 3, 0.8\]"):
        log.run(LoopConfig(updates=9, schedule="constant", checkpoint_every=0, max_nonfinite=5, eval_every=4))
    assert log.all("save") == [(4, 4)]  # the parameters in it are those from before
    assert log.all("write")[-1] == (4,)  # the record shows what happened
    assert log.all("evaluate") == [(0, 0)]  # due, but there is nothing to measure
    fine = Log(skipped={1: 2, 2: 4})  # a good step in between counts from 0 again
    assert int(fine.run(LoopConfig(updates=9, max_nonfinite=5)).step) == 9


def test_a_batch_of_a_policy_that_is_gone_is_not_dumped():
    """Half of the optimizer steps were taken: what the policy samples now is another batch."""
    log = Log(skipped={3: 6}, broken={3: {"nonfinite_updates": (2.0, 4.0)}})
    with pytest.raises(Stopped, match=r"update 4: the last 6 .* No batch is dumped") as error:
        log.run(LoopConfig(updates=9, max_nonfinite=5))
    assert "dump of 3" not in str(error.value)


def test_the_streak_of_failed_batches_is_part_of_the_state():
    bad = {"invalid_scores": (2.0, 4.0)}
    loop = LoopConfig(updates=9, checkpoint_every=0, eval_every=0, max_failed=0.2, max_failed_batches=3)
    with pytest.raises(Stopped, match="update 5: 50 %.*3 batches in a row"):
        Log(broken={4: bad}).run(loop, start=4, failing=2)
    assert int(Log(broken={4: bad}).run(loop, start=4, failing=1).failing) == 0  # the next batch was good
    assert int(Log(broken={7: bad, 8: bad}).run(loop).failing) == 2


def test_a_first_evaluation_that_was_given_up_is_due_again():
    log = Log()
    log.evaluate = lambda step, state: None  # type: ignore[method-assign]
    log.reasons = {0: "SIGTERM"}
    with pytest.raises(Interrupted, match="SIGTERM in the first evaluation"):
        log.run(LoopConfig(updates=3))
    assert log.all("save") == [(0, 0)] and not log.all("update")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_only_a_finite_evaluation_is_the_best(value: float):
    for metric in ("reward", "-reward"):
        after, best = assess(state(), {"reward": value}, LoopConfig(best_metric=metric))
        assert not best and float(after.best) == -math.inf


@pytest.mark.parametrize(("failed", "most", "stops"), [(1.0, 0.2, True), (0.9, 0.2, False), (1.0, 1.0, False)])
def test_a_first_evaluation_without_any_score_stops_the_run_before_it_trains(failed, most, stops):
    log = Log()
    log.evaluate = lambda step, state: {"invalid_scores": failed}  # type: ignore[method-assign]
    loop = LoopConfig(updates=2, max_failed=most)
    if not stops:
        assert int(log.run(loop).step) == 2
        return
    with pytest.raises(Stopped, match=r"not one response of the first evaluation.*Nothing was trained.*--resume"):
        log.run(loop)
    assert log.all("save") == [(0, 0)] and log.all("write") == []


def test_a_loss_that_is_not_finite_for_once_is_no_fault():
    log = Log(broken={3: {"policy_loss": (math.nan, 1.0), "grad_norm": (math.inf, 1.0)}}, skipped={3: 1})
    assert int(log.run(LoopConfig(updates=6)).step) == 6
    assert math.isnan(log.written[4]["policy_loss"])


def test_a_batch_whose_rewards_all_failed_is_no_fault():
    nothing = {name: (0.0, 0.0) for name in ("policy_loss", "value_loss", "reward", "kl")}
    log = Log(broken={1: {"invalid_scores": (4.0, 4.0), **nothing}})
    log.run(LoopConfig(updates=3, max_kl=0.5))
    assert len(log.all("write")) == 3
    assert math.isnan(log.written[2]["reward"])


def test_the_kl_may_have_a_limit():
    log = Log(broken={2: {"kl": (40.0, 4.0)}})
    with pytest.raises(Exploded, match=r"update 3: the KL of the policy after update 2 .* 10 nats.*--loop.max-kl 9"):
        log.run(LoopConfig(updates=6, checkpoint_every=1, max_kl=9.0))
    assert log.all("save") == [(1, 1), (2, 2)]  # the exploded state takes no good one's place
    assert log.all("write")[-1] == (3,)
    Log(broken={2: {"kl": (40.0, 4.0)}}).run(LoopConfig(updates=6))  # off by default


def test_the_checkpoint_of_the_best_evaluation_is_due():
    values = {0: 1.0, 2: 0.5, 4: 2.0, 6: math.nan, 8: 2.0, 9: 3.0}
    log = Log(evaluations=values)
    last = log.run(LoopConfig(updates=9, eval_every=2, checkpoint_every=0))
    assert log.all("save") == [(4, 4), (9, 9)] and float(last.best) == 3.0  # 8 is as good as 4, not better
    low = Log(evaluations=values)
    last = low.run(LoopConfig(updates=9, eval_every=2, checkpoint_every=0, best_metric="-reward"))
    assert low.all("save") == [(2, 2), (9, 9)] and float(last.best) == -0.5
    off = Log(evaluations=values)
    off.run(LoopConfig(updates=9, eval_every=2, checkpoint_every=0, best_metric=""))
    assert off.all("save") == [(9, 9)]


def test_asked_to_stop_it_saves_and_does_not_evaluate():
    log = Log(stop={4: "SIGTERM"})
    with pytest.raises(Interrupted, match="stopped by SIGTERM after update 4"):
        log.run(LoopConfig(updates=9, eval_every=2, checkpoint_every=0))
    assert log.all("save") == [(4, 4)] and log.all("evaluate") == [(0, 0), (2, 2)]


def test_an_iteration_given_up_leaves_the_state_before_it():
    log = Log(give_up=4)
    asked = iter([None] * 4 + ["SIGINT"])  # the signal comes in the middle of the iteration after update 4
    log.stop = lambda done: next(asked)  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped by SIGINT after update 4"):
        log.run(LoopConfig(updates=9, checkpoint_every=0))
    assert log.all("save") == [(4, 4)] and log.all("write")[-1] == (4,)


def test_an_evaluation_given_up_stops_the_run():
    log = Log()
    log.evaluate = lambda step, state: {} if step == 0 else None  # type: ignore[method-assign]
    asked = iter([None, None, "SIGTERM"])
    log.stop = lambda done: next(asked)  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM after update 2"):
        log.run(LoopConfig(updates=9, eval_every=2, checkpoint_every=0))
    assert log.all("save") == [(2, 2)]


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
        ({"keep_every": -1}, "keep_every=-1"),
        ({"max_nonfinite": 0}, "max_nonfinite=0"),
        ({"max_kl": 0.0}, "max_kl=0.0 must be positive"),
        ({"max_kl": math.nan}, "max_kl=nan must be positive"),
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

    def learn(state, frozen, rollout, scores, hyper, pretrain):
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
    found = means(metrics)
    assert found.pop("reward") == 1.0
    assert found.keys() == {"rollout_seconds", "reward_seconds", "learn_seconds"} and min(found.values()) >= 0
