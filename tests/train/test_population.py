"""A population: every member is the run that it would be alone, and none touches another."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppo_jax.models.adapters import init_lora
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.parallel.members import feed_members
from ppo_jax.parallel.mesh import MeshConfig, use_mesh
from ppo_jax.train.population import (
    abstract_members,
    collect_members,
    iterate_members,
    make_host_members,
    make_members,
    make_places,
    member_means,
    stack_hypers,
    stack_prompts,
)
from tests.train import toy
from tests.train.toy import FROZEN, HYPER, TWICE

ALGORITHM = toy.algorithm(TWICE)._replace(reward=toy.worth)
K = 8
FIELDS = ("learning_rate", "kl_coef", "clip_low", "clip_high", "gamma", "lam", "temperature", "vf_coef", "target_kl")


@functools.cache
def members():
    """One compiled program for all tests of eight members on one device."""
    return make_members(ALGORITHM)


def hyper(member: int):
    """Scalars of a member: nine fields that differ from those of any other, one of which ends updates early."""
    return HYPER._replace(**{name: getattr(HYPER, name) * (0.6 + 0.05 * member) for name in FIELDS[:-1]},
                          target_kl=[1e9, 1e-5, 1e-3][member % 3])  # fmt: skip


class Run:
    """A population of the toy; `seeds[i]` is what member i is, and decides its prompts, its start and its scalars."""

    def __init__(self, seeds: list[int], shape: tuple[int, int, int] | None = None, iteration=None) -> None:
        self.seeds, self.steps = list(seeds), [0] * len(seeds)
        self.frozen, one = place_on_mesh(FROZEN), place_on_mesh(start(0))
        self.iteration = iteration or (members() if shape is None else make_members(ALGORITHM))
        self.places = make_places(one, len(seeds))
        self.states = self.places.fill(one)
        self.active = np.ones(len(seeds), bool)
        for place, seed in enumerate(seeds):
            self.put(place, seed)

    def put(self, place: int, seed: int, state=None) -> None:
        self.seeds[place], self.steps[place] = seed, 0
        self.states = self.places.put(self.states, place, place_on_mesh(start(seed) if state is None else state))

    def step(self) -> list[dict[str, float]]:
        prompts = [toy.prompts(100 * seed + step) for seed, step in zip(self.seeds, self.steps, strict=True)]
        hypers = stack_hypers([hyper(seed) for seed in self.seeds])
        active = feed_members(self.active)
        self.states, metrics = self.iteration(self.states, self.frozen, stack_prompts(prompts), hypers, active)
        self.steps = [step + bool(on) for step, on in zip(self.steps, self.active, strict=True)]
        return member_means(metrics)

    def member(self, place: int):
        return jax.device_get(self.places.take(self.states, place).replace(key=None))


def start(seed: int):
    """Two linear maps carry LoRA above a shared prefix: fewer arrays compile faster."""
    adapter = init_lora(jax.random.key(seed), toy.CONFIG, 3, 8.0, ("q", "down"), first_layer=1)
    return toy.moved(toy.start(adapter, seed=seed), seed=seed, scale=0.02)


def poisoned(seed: int):
    state = start(seed)
    return state.replace(policy=jax.tree.map(lambda x: x * jnp.nan, state.policy))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled inside the block."""
    found: list[str] = []

    def listen(event: str, seconds: float, **facts) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(facts.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def same(left, right) -> bool:
    """Bitwise."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_a_member_is_the_run_alone() -> None:
    """Tokens and states of the first iterations, up to rounding (which later moves a token, and then all else)."""
    run = Run(list(range(K)))
    alone = [start(seed) for seed in range(K)]
    for step in range(3):
        values = run.step()
        for seed in range(K):
            alone[seed], metrics = toy.iteration()(alone[seed], FROZEN, toy.prompts(100 * seed + step), hyper(seed))
            expected = toy.numbers(metrics)
            assert {name: values[seed][name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=2e-4)
    for seed in range(K):
        toy.assert_close(run.member(seed), jax.device_get(alone[seed].replace(key=None)), rtol=2e-3, atol=2e-4)
    assert {v["steps_left_out"] > 0 for v in values} == {True, False}  # they took different branches


def test_a_member_that_is_nan_or_stopped_leaves_the_other_seven_bit_for_bit() -> None:
    whole, sick, stopped = (Run(list(range(K))) for _ in range(3))
    sick.put(3, 3, poisoned(3))
    stopped.active[3] = False
    others = [i for i in range(K) if i != 3]
    for _ in range(3):
        values, of_sick, of_stopped = whole.step(), sick.step(), stopped.step()
        for i in others:
            assert values[i] == of_sick[i] == of_stopped[i]
    assert all(same(whole.member(i), sick.member(i)) and same(whole.member(i), stopped.member(i)) for i in others)
    ill = sick.member(3)
    assert int(ill.nonfinite) == 3 * TWICE.epochs * TWICE.num_minibatches
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(ill.policy))
    assert same(stopped.member(3), jax.device_get(start(3).replace(key=None)))  # it stays as it was


def test_a_place_is_filled_anew_without_compiling_and_the_newcomer_is_who_it_is_anywhere() -> None:
    reference = Run([20, 21, *range(2, K)])
    for _ in range(2):
        reference.step()
    run = Run(list(range(K)))
    run.step()
    with compilations() as compiled:
        run.put(0, 0, poisoned(0))
        run.step()
        run.active[1] = False
        run.step()
        run.active[:] = True
        run.put(0, 20)
        run.put(1, 21)
        for _ in range(2):
            run.step()
    assert compiled == []
    assert same(run.member(0), reference.member(0)) and same(run.member(1), reference.member(1))
    assert not same(run.member(2), reference.member(2))  # two iterations further
    with compilations() as compiled:
        jax.jit(lambda x: x + 41)(1)
    assert compiled  # the counter counts


@pytest.mark.long  # where members lie: test_members_that_do_not_divide..., parallel/test_members
@pytest.mark.parametrize(("count", "shape"), [(8, (4, 2, 1)), (2, (4, 2, 1))])
def test_on_eight_devices_members_are_spread_or_else_their_rows(count: int, shape: tuple[int, int, int]) -> None:
    """The other seven are untouched there too, and nothing compiles when a place is filled anew."""
    here = Run(list(range(count)), iteration=make_members(ALGORITHM) if count != K else None)
    with use_mesh(MeshConfig(*shape)):
        there = Run(list(range(count)), shape)
        spread = next(iter(jax.tree.leaves(there.states.policy.adapter))).sharding.spec
        assert (spread[:1] == ("data",)) == (count == K)
        there.put(0, 0, poisoned(0))
        there.step()
        with compilations() as compiled:
            there.put(0, 0)
            there.active[:] = np.arange(count) == 0  # the others wait
            there.step()
        assert compiled == []
        here.step()
        for place in range(count):
            toy.assert_close(there.member(place), here.member(place), rtol=2e-3, atol=2e-4)


def test_members_that_do_not_divide_are_whole_on_every_device() -> None:
    """Then their rows are spread."""
    with use_mesh(MeshConfig(4, 2, 1)):
        states = {count: Run(list(range(count)), (4, 2, 1)).states for count in (2, K)}
    first = {count: jax.tree.leaves(found.policy.adapter)[0].sharding.spec[:1] for count, found in states.items()}
    assert first[K] == ("data",) and first[2] != ("data",)


def test_a_reward_on_the_host_scores_all_members_in_one_call() -> None:
    calls: list[int] = []

    def reward(prompts, responses, metadata):
        calls.append(len(responses))
        assert [row["seed"] for row in metadata][:: toy.B] == sorted({row["seed"] for row in metadata})
        return toy.host_worth(prompts, responses, metadata)

    texts = [[str(i) for i in range(toy.B)] for _ in range(K)]
    metadata = [[{"seed": seed} for _ in range(toy.B)] for seed in range(K)]
    host = make_host_members(toy.algorithm(TWICE), reward, toy.text, texts, metadata)
    on_device, on_host = Run(list(range(K))), Run(list(range(K)), iteration=host)
    for run in (on_device, on_host):
        run.active[5] = False
    for _ in range(2):
        left, right = on_device.step(), on_host.step()
        for i in set(range(K)) - {5}:
            found = {name: value for name, value in right[i].items() if not name.endswith("_seconds")}
            assert left[i] == pytest.approx(found, rel=1e-3, abs=1e-4, nan_ok=True)
    assert calls == [(K - 1) * toy.B] * 2
    for i in range(K):
        toy.assert_close(on_device.member(i), on_host.member(i), rtol=1e-3, atol=1e-4)


def test_members_are_distributed_as_runs_alone_are() -> None:
    """After 8 iterations, when rounding has long moved tokens: rewards of 40 seeds, by a two-sample KS test."""
    seeds, steps, same_hyper = range(40), 8, HYPER
    one = toy.iteration()
    alone, together = [], []
    for seed in seeds:
        state = start(seed)
        for step in range(steps):
            state, metrics = one(state, FROZEN, toy.prompts(100 * seed + step), same_hyper)
        alone.append(toy.numbers(metrics)["reward"])
    for first in range(0, 40, K):
        run = Run(list(range(first, first + K)))
        for step in range(steps):
            prompts = stack_prompts([toy.prompts(100 * seed + step) for seed in run.seeds])
            run.states, metrics = run.iteration(
                run.states, FROZEN, prompts, stack_hypers([same_hyper] * K), feed_members(run.active)
            )
        together += [values["reward"] for values in member_means(metrics)]
    assert np.std(alone) > 0.1  # seeds differ, so that a shift would show
    assert stats.ks_2samp(alone, together).pvalue > 0.01
    assert stats.ks_2samp(alone, [x + np.std(alone) for x in together]).pvalue < 0.01  # and it does


def test_products_with_the_base_take_the_rows_of_all_members_at_once() -> None:
    """No array of the base has K copies, and the sampler writes at one place for all: no gather, no scatter."""
    count = 3
    state = jax.eval_shape(lambda: start(0))
    states = abstract_members(state, count)
    prompts = abstract_members(jax.eval_shape(lambda: toy.prompts()), count)
    hypers = abstract_members(jax.eval_shape(lambda: jax.tree.map(jnp.float32, HYPER)), count)
    active = jax.ShapeDtypeStruct((count,), bool)
    lower = lambda f, *args: jax.jit(functools.partial(f, ALGORITHM)).lower(*args).as_text()
    text = lower(iterate_members, states, FROZEN, prompts, hypers, active)
    for leaf in jax.tree.leaves(FROZEN.base):
        shape = "x".join(map(str, (count, *leaf.shape)))
        assert leaf.ndim < 2 or f"tensor<{shape}xf32>" not in text, shape
    rows = count * toy.B
    assert f"tensor<{count}x{toy.B}x{toy.CONFIG.vocab_size}xf32>" in text
    sampler = jax.jit(functools.partial(collect_members, ALGORITHM)).lower(states, FROZEN, prompts, hypers)
    compiled = sampler.compile().as_text()
    assert f"f32[{rows},{toy.CONFIG.vocab_size}]" in compiled  # logits of all members from one product
    assert " scatter(" not in compiled
