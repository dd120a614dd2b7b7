"""The PPO iteration as a whole: fresh ratios, keys, steps, compilation, the host path, devices, and that it learns."""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ppo_jax.rollout import Sampling
from ppo_jax.train.buckets import cut_prompts
from ppo_jax.train.experience import evaluate_reference, make_experience, score_rollout, share_prefix
from ppo_jax.train.host import host_iteration
from ppo_jax.train.objective import count_units, ppo_loss
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import collect, iterate, make_host_iteration, make_iteration
from ppo_jax.train.state import init_state
from ppo_jax.types import Hyper, Scores
from tests.train import toy
from tests.train.toy import FROZEN, HYPER, TWICE, B, T, assert_close, iteration, numbers


@jax.jit
def fresh(state, frozen, prompts, hyper):
    """Metrics of the loss that the first minibatch sees, and of the KL, without the update."""
    algorithm = toy.algorithm(toy.ONCE)
    collected = share_prefix(algorithm, state.policy, frozen, collect(algorithm, state, frozen, prompts, hyper))
    reference = evaluate_reference(algorithm, state.policy, frozen, collected, hyper)
    scores = score_rollout(toy.worth, frozen, collected)
    experience = make_experience(algorithm, collected, scores, reference, hyper)
    counts = count_units(algorithm, experience.batch)
    _, metrics = ppo_loss(state.policy, algorithm, frozen, experience.batch, counts, hyper)
    worst = jnp.max(jnp.where(experience.batch.loss_mask, jnp.abs(experience.kl), 0.0))
    return metrics, worst, collected.prefix is not None


@functools.cache
def host_halves():
    return make_host_iteration(toy.CONFIG, TWICE, make_optimizer())


@pytest.mark.parametrize("kind", toy.ADAPTERS)
def test_first_minibatch_sees_ratio_1_and_an_equal_reference_has_kl_0(kind: str):
    at_base = toy.start(toy.ADAPTERS[kind]())
    away = toy.moved(at_base)
    for temperature in (0.0, 0.3, 0.7, 1.0, 2.0):
        hyper = HYPER._replace(temperature=temperature)
        for state in (at_base, away):
            metrics, worst_kl, shared = fresh(state, FROZEN, toy.prompts(), hyper)
            values = numbers(metrics)
            assert values["ratio"] == pytest.approx(1, abs=1e-5)
            assert values["clip_fraction"] == 0
            assert values["approx_kl"] == pytest.approx(0, abs=1e-8)
            if state is at_base:
                assert worst_kl < 2e-5
            elif state.policy.adapter:
                assert worst_kl > 1e-3  # the comparison above is not vacuous
    assert bool(shared) == (kind in ("lora above a shared prefix", "top-k", "value head alone"))


def test_old_logprobs_are_the_rollouts_so_later_ratios_differ_from_1():
    """Defect 9. With one optimizer step the only minibatch is the first; with four, three see a changed policy."""
    state, metrics = iteration(TWICE)(toy.moved(toy.start()), FROZEN, toy.prompts(), HYPER)
    values = numbers(metrics)
    assert abs(values["ratio"] - 1) > 1e-4
    assert values["approx_kl"] > 1e-4


def test_optimizer_steps_are_epochs_times_minibatches():
    """Defect 12: Adam counts its own steps."""
    state = toy.start()
    for done in (1, 2):
        state, _ = iteration(TWICE)(state, FROZEN, toy.prompts(), HYPER)
        counts = [int(state.opt_state[i].count) for i in range(2)]  # the policy's optimizer and the critic's
        assert counts == 2 * [done * TWICE.epochs * TWICE.num_minibatches]
        assert int(state.step) == done


def test_nothing_recompiles_and_the_state_is_donated():
    run = iteration(TWICE)
    adapter, key = toy.ADAPTERS["lora above a shared prefix"](), jax.random.key(5)
    state = init_state(key, adapter, toy.CONFIG, make_optimizer(), 0.05)
    given = state
    state, _ = run(state, FROZEN, toy.prompts(0), HYPER)
    used = (given.step, given.key, given.policy, given.opt_state)  # a fixed kl_coef is not read, so not donated
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(used)), "donated buffers are reused"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapter, key, FROZEN))), "the caller's own are not"

    programs = run._cache_size()
    other = Hyper(*(0.5 * (i + 1) for i in range(len(Hyper._fields))))
    changed = [HYPER._replace(**{name: value}) for name, value in other._asdict().items()]
    for number, hyper in enumerate([other, *changed]):
        frozen = FROZEN._replace(reward=FROZEN.reward + number)
        state, _ = run(state, frozen, toy.prompts(number), hyper)
    assert run._cache_size() == programs


def test_prompts_in_fewer_slots_give_the_same_rollout_and_loss():
    """P = 4 has the widths 4, 2, 1. Rows of at most 2 tokens go into 2; with 2 widths or 3 that is the same."""
    whole = toy.prompts()
    whole = whole._replace(mask=whole.mask & (jnp.arange(4) >= 2))
    short = cut_prompts(whole, 2)
    assert short.tokens.shape == short.mask.shape == (B, 2) and int(short.mask.sum()) == int(whole.mask.sum())
    assert cut_prompts(whole, 3).mask.shape == (B, 2) and cut_prompts(whole, 1).mask.shape == (B, 4)
    assert cut_prompts(toy.prompts(), 3).mask.shape == (B, 4)  # one prompt needs them all
    state = toy.moved(toy.start())
    left, right = (fresh(state, FROZEN, prompts, HYPER) for prompts in (whole, short))
    assert_close(numbers(left[0]), numbers(right[0]))
    assert float(left[1]) == pytest.approx(float(right[1]), abs=1e-5)


def test_each_step_draws_with_a_key_of_its_own():
    """Defect 3: the same prompts at another step, or under another root key, get other responses."""
    draw_, _ = host_halves()
    draw = lambda state: draw_(state, FROZEN, toy.prompts(), HYPER)
    state = toy.start()
    first, again = draw(state), draw(state)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    later = draw(state.replace(step=state.step + 1))
    other = draw(state.replace(key=jax.random.key(99)))
    for rollout in (later, other):
        same = np.mean(np.asarray(rollout.tokens[:, -T:]) == np.asarray(first.tokens[:, -T:]))
        assert same < 0.6


def test_the_host_path_computes_the_same_iteration():
    draw, learn = host_halves()
    texts, metadata = tuple(map(str, range(B))), tuple({} for _ in range(B))
    run = host_iteration(draw, learn, toy.host_worth, toy.text, toy.SAMPLING, texts, metadata)
    left, right = toy.moved(toy.start()), toy.moved(toy.start())
    for number in range(3):
        left, on_device = iteration(TWICE)(left, FROZEN, toy.prompts(number), HYPER)
        right, on_host = run(right, FROZEN, toy.prompts(number), HYPER)
        on_host = {name: pair for name, pair in on_host.items() if not name.endswith("_seconds")}
        assert_close(numbers(on_device), numbers(on_host))
    assert_close(left, right)
    assert learn._cache_size() == draw._cache_size() == 1


def test_a_sum_over_device_and_host_is_one_reward():
    """half on the device + half on the host = all on the device."""
    half = lambda *arguments: toy.worth(*arguments)._replace(reward=toy.worth(*arguments).reward / 2, parts={})  # noqa: E731
    draw, learn = make_host_iteration(toy.CONFIG, TWICE, make_optimizer(), half)
    texts, metadata = ("",) * toy.B, ({},) * toy.B

    def host(prompts, responses, metadata):
        return Scores(toy.host_worth(prompts, responses, metadata).reward / 2, np.ones(len(prompts), bool), {})

    run = host_iteration(draw, learn, host, toy.text, toy.SAMPLING, texts, metadata)
    state, metrics = run(toy.start(), FROZEN, toy.prompts(), HYPER)
    whole, others = toy.iteration()(toy.start(), FROZEN, toy.prompts(), HYPER)
    assert_close(state.policy, whole.policy, rtol=1e-4, atol=1e-6)
    assert numbers(metrics)["reward"] == pytest.approx(numbers(others)["reward"], rel=1e-5)


@pytest.mark.long
def test_a_host_reward_of_0_changes_nothing_on_the_device():
    """Bit for bit."""
    texts, metadata = ("",) * toy.B, ({},) * toy.B
    _, others = toy.iteration()(toy.start(), FROZEN, toy.prompts(), HYPER)
    draw, learn = make_host_iteration(toy.CONFIG, TWICE, make_optimizer(), toy.worth)
    nothing = lambda prompts, *_: Scores(np.zeros(len(prompts)), np.ones(len(prompts), bool), {})  # noqa: E731
    run = host_iteration(draw, learn, nothing, toy.text, toy.SAMPLING, texts, metadata)
    _, metrics = run(toy.start(), FROZEN, toy.prompts(), HYPER)
    for name in ("reward", "reward_std", "reward_min", "reward_max", "reward/half"):
        assert numbers(metrics)[name] == numbers(others)[name], name


@pytest.mark.long
def test_eight_devices_compute_what_one_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state, one = toy.moved(toy.start()), toy.moved(toy.start())
    state, frozen = jax.device_put((state, FROZEN), whole)
    for number in range(2):
        one, expected = iteration(TWICE)(one, FROZEN, toy.prompts(number), HYPER)
        prompts = jax.device_put(toy.prompts(number), rows)
        assert len(prompts.tokens.addressable_shards) == 8
        state, metrics = iteration(TWICE)(state, frozen, prompts, HYPER)
        assert_close(numbers(metrics), numbers(expected), rtol=2e-5, atol=1e-6)
    assert_close(state, one, rtol=2e-5, atol=2e-6)


def test_learns_to_say_one_token():
    """From random weights (a share of about 1/11) to more than nine in ten."""
    target = 7
    frozen = FROZEN._replace(reward=jnp.zeros(toy.CONFIG.vocab_size).at[target].set(1 / T))
    hyper = HYPER._replace(learning_rate=1e-2, temperature=1.0, kl_coef=0.0, entropy_coef=0.0)
    state, rewards = toy.start(), []
    for number in range(40):
        state, metrics = iteration(TWICE)(state, frozen, toy.prompts(number), hyper)
        rewards.append(numbers(metrics)["reward"])
    assert rewards[0] < 0.2
    assert np.mean(rewards[-5:]) > 0.9


def test_learns_to_stop():
    """Defect 6: the stop token is trained like any other, so silence can be learned."""
    frozen = FROZEN._replace(reward=jnp.full(toy.CONFIG.vocab_size, -1 / T, jnp.float32).at[toy.STOP].set(0.0))
    hyper = HYPER._replace(learning_rate=1e-2, temperature=1.0, kl_coef=0.0, entropy_coef=0.0)
    state, lengths = toy.start(), []
    for number in range(40):
        state, metrics = iteration(TWICE)(state, frozen, toy.prompts(number), hyper)
        lengths.append(numbers(metrics)["response_length"])
    assert lengths[0] > 2.5
    assert np.mean(lengths[-5:]) < 1.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"num_minibatches": 0}, "num_minibatches=0"),
        ({"accumulate": -1}, "accumulate=-1"),
        ({"logprob_chunk": -2}, "logprob_chunk=-2"),
    ],
)
def test_impossible_settings_name_the_field(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**fields)


def test_a_batch_that_does_not_divide_is_refused_while_tracing():
    ppo = PPOConfig(sampling=Sampling(response_length=T), num_minibatches=3, accumulate=2)
    run = make_iteration(toy.CONFIG, ppo, optax.identity(), toy.worth)
    with pytest.raises(ValueError, match=r"16 responses do not divide .*=3 x accumulate=2; use a multiple of 6"):
        run(toy.start(optimizer=optax.identity()), FROZEN, toy.prompts(), HYPER)


def test_another_loss_is_put_in_place_without_patching() -> None:
    """The loss of docs/algorithm.md: in the first minibatch its gradient is PPO's (nothing is clipped at ratio 1)."""
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text(encoding="utf-8")
    names: dict = {"jnp": jnp}
    exec(page.split("```python\n")[1].split("\niteration =")[0], names)
    optimizer = optax.sgd(1.0)  # the parameters' change is the gradient
    hyper = HYPER._replace(vf_coef=0.0, entropy_coef=0.0)
    one_step = lambda **more: make_iteration(toy.CONFIG, toy.ONCE, optimizer, toy.worth, **more)
    after = {}
    for name, loss in (("ppo", None), ("page", names["my_loss"])):
        state, metrics = one_step(loss=loss)(toy.start(optimizer=optimizer), FROZEN, toy.prompts(), hyper)
        after[name] = state.policy.adapter
        assert numbers(metrics)["grad_norm"] > 1e-3
    assert_close(after["page"], after["ppo"], rtol=1e-4, atol=1e-7)
    assert "clip_fraction" not in metrics and "kl" in metrics  # what is not the loss's stays


def test_another_estimator_of_advantages_is_put_in_place() -> None:
    """Advantages of 0 leave the policy where it was; the shaped rewards are there to read."""
    seen = []

    def nothing(algorithm, outcome, hyper):
        seen.append((algorithm.ppo, outcome.rewards.shape))
        return jnp.zeros_like(outcome.rewards), outcome.values

    hyper = HYPER._replace(vf_coef=0.0, entropy_coef=0.0)
    run = make_iteration(toy.CONFIG, toy.ONCE, optax.sgd(1.0), toy.worth, advantage=nothing)
    start = toy.start(optimizer=optax.sgd(1.0))
    adapter = jax.tree.map(np.asarray, start.policy.adapter)
    state, _ = run(start, FROZEN, toy.prompts(), hyper)
    assert_close(state.policy.adapter, adapter, rtol=0, atol=1e-9)
    assert seen == [(toy.ONCE, (B, T))]


def test_iterate_is_pure_and_what_make_iteration_compiles() -> None:
    algorithm = toy.algorithm(TWICE)._replace(reward=toy.worth)
    state, prompts = toy.start(), toy.prompts()
    plain = jax.jit(partial(iterate, algorithm))
    expected, metrics = plain(state, FROZEN, prompts, HYPER)
    found, same = iteration()(state, FROZEN, prompts, HYPER)  # donates the state, which `iterate` has left alone
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(same, metrics, rtol=0, atol=0)
