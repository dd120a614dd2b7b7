"""Generation against teacher forcing, naive loops and transformers; masks, stops, keys, filters, devices."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

import ppo_jax.rollout
from ppo_jax.models.adapters import init_lora, init_magnitudes, merge, unembedding
from ppo_jax.models.files import hf
from ppo_jax.models.heads import value
from ppo_jax.models.layout import init_params
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.models.transformer import apply
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.ops.sampling import sample
from ppo_jax.rollout import Sampling, generate
from ppo_jax.types import Policy, Prompts, PyTree, Rollout
from tests.models.tiny import CONFIG, random_params

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
B, P, T, V = 16, 6, 10, 67
STOPS = (2, 11, 23, 40, 59)
SAMPLING = Sampling(response_length=T, stop_ids=STOPS, pad_id=2)  # pad == eos
TEMPERATURE = 0.7


def random_policy() -> Policy:
    """LoRA on the upper two layers and a value head, both far from their start."""
    rng = np.random.default_rng(1)
    fresh = init_lora(jax.random.key(0), CONFIG, rank=2, alpha=2.0, first_layer=1)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), fresh)
    head = {"value": {"kernel": jnp.asarray(rng.normal(size=(32, 1)), jnp.float32), "bias": jnp.ones(1)}}
    return Policy(adapter, head)


def peaked(params: PyTree) -> PyTree:
    """Logits twice as large: mistakes show in the tokens."""
    return params | {"final_norm": 2 * params["final_norm"]}


BASE, POLICY = peaked(random_params(CONFIG)), random_policy()


def make_prompts(lengths: list[int], width: int = P, seed: int = 0, garbage: int = 2) -> Prompts:
    """Left-padded random prompts; row b's tokens depend on the seed and b alone."""
    tokens, mask = np.full((len(lengths), width), garbage, np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = True
        tokens[row, width - length :] = np.random.default_rng((seed, row)).integers(0, V, length)
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(lengths)) + 100)


LENGTHS = [1 + row % P for row in range(B)]
PROMPTS = make_prompts(LENGTHS)
TRACES = []


@partial(jax.jit, static_argnames=("sampling", "config"), compiler_options=QUICK)
def run(
    base: PyTree,
    policy: Policy,
    prompts: Prompts,
    seed: int,
    temperature: float = TEMPERATURE,
    sampling: Sampling = SAMPLING,
    config=CONFIG,
) -> Rollout:
    TRACES.append(sampling)
    return generate(base, policy, config, prompts, jax.random.key(seed), sampling, temperature)


class Forced(NamedTuple):
    logits: np.ndarray  # [B, T, V] before each response token
    logprobs: np.ndarray
    values: np.ndarray


@partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def teacher_forced(rollout: Rollout, policy: Policy, temperature: float, config=CONFIG) -> Forced:
    """One full forward pass over the finished sequences."""
    length = rollout.response_mask.shape[1]
    hidden = before_response(role_hidden(BASE, policy.adapter, config, rollout.tokens, rollout.mask), length)
    table = unembedding(BASE, policy.adapter)
    logprobs = hidden_logprobs(hidden, table, rollout.tokens[:, -length:], temperature)
    return Forced(hidden.astype(jnp.float32) @ table.T, logprobs, value(policy.value_head, hidden))


def responses(rollout: Rollout) -> list[list[int]]:
    """The tokens inside the response masks, row by row."""
    length = rollout.response_mask.shape[1]
    rows = zip(np.asarray(rollout.tokens)[:, -length:], np.asarray(rollout.response_mask), strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return jax.device_get(run(BASE, POLICY, PROMPTS, 0))


def test_defect_5_log_probs_and_values_are_those_of_a_teacher_forced_pass(rollout: Rollout) -> None:
    mask, forced = rollout.response_mask, teacher_forced(rollout, POLICY, TEMPERATURE)
    np.testing.assert_allclose(rollout.logprobs[mask], forced.logprobs[mask], atol=1e-4)
    np.testing.assert_allclose(rollout.values[mask], forced.values[mask], atol=2e-4)
    np.testing.assert_array_equal(rollout.logprobs, rollout.policy_logprobs)  # nothing is filtered
    # The comparison can fail: another temperature, another role, a shift by one.
    assert np.abs(rollout.logprobs - teacher_forced(rollout, POLICY, 1.0).logprobs)[mask].max() > 0.1
    reference = POLICY._replace(adapter=jax.tree.map(jnp.zeros_like, POLICY.adapter))
    assert np.abs(rollout.logprobs - teacher_forced(rollout, reference, TEMPERATURE).logprobs)[mask].max() > 0.1
    assert np.abs(rollout.values[:, 1:] - forced.values[:, :-1])[mask[:, 1:]].max() > 0.1


def test_row_b_step_t_draws_with_its_own_key(rollout: Rollout) -> None:
    """The draw of (b, t) repeated from the teacher-forced logits with fold_in(fold_in(key, b), t)."""
    logits = jnp.asarray(teacher_forced(rollout, POLICY, TEMPERATURE).logits)

    @partial(jax.jit, compiler_options=QUICK)
    def redraw(logits: jax.Array) -> jax.Array:
        def one(row: jax.Array, step: jax.Array, x: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), step)
            return sample(key, x, TEMPERATURE)[0]

        return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, 0))(jnp.arange(B), jnp.arange(T), logits)

    mask = rollout.response_mask
    np.testing.assert_array_equal(rollout.tokens[:, P:][mask], np.asarray(redraw(logits))[mask])


def check_structure(rollout: Rollout, prompts: Prompts, sampling: Sampling) -> None:
    """A response is everything up to its first stop token; after it come pads, zeros and a mask that is off."""
    length = sampling.response_length
    np.testing.assert_array_equal(rollout.tokens[:, :-length], prompts.tokens)
    np.testing.assert_array_equal(rollout.prompt_mask, prompts.mask)
    np.testing.assert_array_equal(rollout.index, prompts.index)
    np.testing.assert_array_equal(rollout.mask, np.concatenate([prompts.mask, rollout.response_mask], axis=1))
    drawn = np.asarray(rollout.tokens)[:, -length:]
    for row, tokens in enumerate(drawn):
        inside = np.asarray(rollout.response_mask)[row]
        count = int(inside.sum())
        stops = np.isin(tokens, sampling.stop_ids) & inside
        assert inside[:count].all() and count >= 1
        # Defect 6: the stop token belongs to the response, and is its last token.
        assert bool(rollout.terminated[row]) == bool(stops.any())
        assert stops.sum() <= 1 and (stops[count - 1] if stops.any() else count == length)
        assert (tokens[count:] == sampling.pad_id).all()
        for column in (rollout.logprobs, rollout.policy_logprobs, rollout.values):
            assert not np.asarray(column)[row, count:].any()
    assert (np.asarray(rollout.logprobs) <= 0).all()


def test_defect_6_a_response_ends_with_its_stop_token(rollout: Rollout) -> None:
    check_structure(rollout, PROMPTS, SAMPLING)
    ends = [response[-1] for response, ended in zip(responses(rollout), rollout.terminated, strict=True) if ended]
    assert len(set(ends)) > 1 and 0 < len(ends) < B  # several stop ids; some rows are cut
    assert np.isin(np.asarray(PROMPTS.tokens)[np.asarray(PROMPTS.mask)], STOPS).any()  # in a prompt they stop nothing


@pytest.fixture(scope="module")
def padded(rollout: Rollout) -> Rollout:
    """The first 8 rows alone, with 3 more slots of padding, and the most common token of `rollout` as the pad id."""
    drawn = rollout.tokens[:8, P:][rollout.response_mask[:8]]
    common = int(np.bincount(drawn[~np.isin(drawn, STOPS)]).argmax())
    sampling = dataclasses.replace(SAMPLING, pad_id=common)
    prompts = make_prompts(LENGTHS[:8], width=P + 3)
    found = jax.device_get(run(BASE, POLICY, prompts, 0, sampling=sampling))
    check_structure(found, prompts, sampling)
    return found


def test_padding_and_batch_size_do_not_change_a_row(rollout: Rollout, padded: Rollout) -> None:
    assert responses(padded) == responses(rollout)[:8]
    np.testing.assert_allclose(padded.logprobs, rollout.logprobs[:8], atol=2e-4)
    np.testing.assert_allclose(padded.values, rollout.values[:8], atol=2e-4)


def test_defects_7_and_8_a_sampled_pad_id_is_a_token_like_any_other(rollout: Rollout, padded: Rollout) -> None:
    """The pad id fills what is off and does nothing else, though here the policy samples it often."""
    pad = padded.tokens[~padded.response_mask.all(axis=1)][0, -1]
    assert pad not in STOPS
    assert [row.count(pad) for row in responses(padded)] == [row.count(pad) for row in responses(rollout)[:8]]
    assert sum(row.count(pad) for row in responses(padded)) >= 3


def test_defect_3_keys_rows_and_steps_draw_differently() -> None:
    """Equal prompts everywhere: whatever differs between rows and steps is the randomness."""
    same = PROMPTS._replace(tokens=jnp.full((B, P), 7), mask=jnp.ones((B, P), bool))
    hot = [responses(run(BASE, POLICY, same, seed, 20.0)) for seed in (0, 0, 1)]  # nearly uniform over 67 tokens
    assert hot[0] == hot[1]
    firsts = [[response[0] for response in rows] for rows in hot]
    assert np.mean(np.array(firsts[0]) != firsts[2]) > 0.7
    assert len(set(firsts[0])) > B / 2
    steps = [
        (a, b) for rows in (hot[0], hot[2]) for response in rows for a, b in zip(response, response[1:], strict=False)
    ]
    assert len(steps) > 40 and np.mean([a == b for a, b in steps]) < 0.15


def test_neighbours_do_not_change_a_row(rollout: Rollout) -> None:
    expected = responses(rollout)
    swapped = make_prompts(LENGTHS[:4] + LENGTHS[:3:-1])
    strangers = make_prompts(LENGTHS, seed=5)
    mixed = Prompts(
        *(
            jnp.where(jnp.arange(B).reshape(-1, *[1] * (x.ndim - 1)) < 4, x, y)
            for x, y in zip(PROMPTS[:3], strangers[:3], strict=True)
        )
    )
    for prompts in (swapped, mixed):
        found = responses(run(BASE, POLICY, prompts, 0))
        assert found[:4] == expected[:4] and found[4:] != expected[4:]


def test_padding_tokens_and_rows_without_a_prompt_disturb_nobody(rollout: Rollout) -> None:
    for garbage in (0, 66, 67, -1):
        found = jax.device_get(run(BASE, POLICY, make_prompts(LENGTHS, garbage=garbage), 0))
        for field in ("response_mask", "logprobs", "values", "terminated"):
            np.testing.assert_array_equal(getattr(found, field), getattr(rollout, field))
        np.testing.assert_array_equal(found.tokens[:, P:], rollout.tokens[:, P:])
    empty = PROMPTS._replace(mask=PROMPTS.mask.at[3].set(False))
    found = jax.device_get(run(BASE, POLICY, empty, 0))
    others = [row for row in range(B) if row != 3]
    assert [responses(found)[row] for row in others] == [responses(rollout)[row] for row in others]
    assert np.isfinite(found.logprobs).all() and np.isfinite(found.values).all()


@pytest.fixture(scope="module")
def greedy() -> Rollout:
    return jax.device_get(run(BASE, POLICY, PROMPTS, 0, 0.0))


def test_greedy_is_a_loop_of_full_forward_passes(greedy: Rollout) -> None:
    assert responses(run(BASE, POLICY, PROMPTS, 1, 0.0)) == responses(greedy)  # the key is irrelevant
    tokens, mask = np.full((B, P + T), 2), np.zeros((B, P + T), bool)
    tokens[:, :P], mask[:, :P] = PROMPTS.tokens, PROMPTS.mask
    alive = np.ones(B, bool)
    for slot in range(P, P + T):
        state = greedy._replace(tokens=jnp.asarray(tokens), response_mask=jnp.asarray(mask[:, P:]))
        tokens[alive, slot] = teacher_forced(state, POLICY, 1.0).logits[:, slot - P].argmax(-1)[alive]
        mask[:, slot] = alive
        alive &= ~np.isin(tokens[:, slot], STOPS)
    np.testing.assert_array_equal(greedy.tokens, tokens)
    np.testing.assert_array_equal(greedy.response_mask, mask[:, P:])
    # The log-probs of greedy decoding are those at temperature 1.
    forced = teacher_forced(greedy, POLICY, 1.0).logprobs
    np.testing.assert_allclose(greedy.logprobs[mask[:, P:]], forced[mask[:, P:]], atol=1e-4)


def test_greedy_is_what_transformers_generates(greedy: Rollout, tmp_path: Path) -> None:
    hf.save(tmp_path, CONFIG, merge(BASE, POLICY.adapter, CONFIG))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = responses(greedy)
    assert len({tuple(row) for row in ours}) > B // 2
    for row, length in enumerate(LENGTHS[:8]):
        prompt = torch.tensor(np.asarray(PROMPTS.tokens)[row : row + 1, P - length :], dtype=torch.long)
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=T,
            eos_token_id=list(STOPS), pad_token_id=2,
        )  # fmt: skip
        assert found[0, length:].tolist() == ours[row]


def test_filtered_sampling_reports_both_distributions() -> None:
    sampling = dataclasses.replace(SAMPLING, top_k=5, top_p=0.8)
    found = jax.device_get(run(BASE, POLICY, PROMPTS, 0, 1.5, sampling=sampling))
    check_structure(found, PROMPTS, sampling)
    forced, mask = teacher_forced(found, POLICY, 1.5), found.response_mask
    np.testing.assert_allclose(found.policy_logprobs[mask], forced.logprobs[mask], atol=1e-4)
    assert (found.logprobs >= found.policy_logprobs - 1e-5)[mask].all()
    assert (found.logprobs - found.policy_logprobs)[mask].mean() > 0.1
    # The behaviour policy in numpy: of the 5 largest, renormalised, the fewest that reach 0.8, renormalised again.
    scaled = np.asarray(forced.logits, np.float64)[mask] / 1.5
    for logits, token, logprob in zip(scaled, found.tokens[:, P:][mask], found.logprobs[mask], strict=True):
        order = np.argsort(-logits)[:5]
        probabilities = np.exp(logits[order] - logits[order[0]])
        probabilities /= probabilities.sum()
        kept = int(np.searchsorted(np.cumsum(probabilities), 0.8 - 1e-6)) + 1
        assert token in order[:kept]
        place = order.tolist().index(token)
        assert logprob == pytest.approx(np.log(probabilities[place] / probabilities[:kept].sum()), abs=1e-3)


def test_one_step_frequencies_are_the_tempered_probabilities() -> None:
    """4,096 rows of one prompt, P = T = 1: chi-square over the 67 tokens, rare ones pooled."""
    rows, sampling = 4096, Sampling(response_length=1)
    prompts = Prompts(jnp.full((rows, 1), 5), jnp.ones((rows, 1), bool), jnp.arange(rows))
    found = jax.device_get(run(BASE, POLICY, prompts, 0, 1.5, sampling=sampling))
    assert found.tokens.shape == (rows, 2) and found.response_mask.all() and not found.terminated.any()
    logits = np.asarray(teacher_forced(jax.tree.map(lambda x: x[:1], found), POLICY, 1.5).logits, np.float64)[0, 0]

    def p_value(temperature: float) -> float:
        expected = rows * np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        counts, common = np.bincount(found.tokens[:, 1], minlength=V), expected >= 5
        pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
        return stats.chisquare(*pooled).pvalue

    assert p_value(1.5) > 1e-3 > 1e-6 > p_value(1.3)


def test_the_loop_ends_with_the_last_living_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the model per token of the longest response, however long it might have become."""
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        jax.debug.callback(lambda: calls.append(1))
        return apply(*args, **kwargs)

    monkeypatch.setattr(ppo_jax.rollout, "apply", counted)
    sampling = Sampling(response_length=40, stop_ids=tuple(range(0, V, 4)))
    fresh = jax.jit(lambda prompts, key: generate(BASE, POLICY, CONFIG, prompts, key, sampling), compiler_options=QUICK)
    found = jax.block_until_ready(fresh(make_prompts([3, 6, 1, 2]), jax.random.key(0)))
    jax.effects_barrier()
    longest = max(map(len, responses(found)))
    assert found.terminated.all() and 2 < longest < 20
    assert len(calls) == longest  # the prefill gives the first token, every decoding step one more
    assert (found.tokens[:, P + longest :] == 0).all()


def test_the_cache_has_exactly_prompt_plus_response_slots() -> None:
    program = jax.make_jaxpr(lambda key: generate(BASE, POLICY, CONFIG, PROMPTS, key, SAMPLING))(jax.random.key(0))
    (loop,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "while")
    carried = [variable.aval.shape for variable in loop.outvars]
    assert carried.count((B, 2, P + T, 8)) == 2 * 3 and carried.count((B, P + T)) == 1
    assert not [shape for shape in carried if len(shape) > 3 and shape != (B, 2, P + T, 8)]


def test_dora_measures_its_lengths_once_and_not_once_a_token() -> None:
    policy = POLICY._replace(adapter=init_magnitudes(BASE["layers"], POLICY.adapter, CONFIG))
    draw = lambda policy: generate(BASE, policy, CONFIG, PROMPTS, jax.random.key(0), SAMPLING)  # noqa: E731
    for adapter, count in ((policy, 7), (POLICY, 0)):  # a square root for each of the linear maps
        program = jax.make_jaxpr(draw)(adapter)
        (loop,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "while")
        assert str(program).count("= sqrt ") == count and "= sqrt " not in str(loop)


def test_the_cache_is_updated_in_place() -> None:
    """Where the cache is the bulk of the memory, there is one of it: the loop and its layers pass on no copies."""
    sampling = Sampling(response_length=1000)
    size = 4 * 2 * 3 * B * (P + 1000) * 2 * 8
    memory = run.lower(BASE, POLICY, PROMPTS, 0, sampling=sampling).compile().memory_analysis()
    assert size < memory.temp_size_in_bytes < 2 * size


def test_a_loop_over_the_stack_of_layers_draws_the_same_tokens(rollout: Rollout) -> None:
    """As on accelerators and meshes: a mesh of one device asks for it."""
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        program = jax.make_jaxpr(lambda key: generate(BASE, POLICY, CONFIG, PROMPTS, key, SAMPLING))(jax.random.key(0))
        found = jax.device_get(run(BASE, POLICY, PROMPTS, 0))
    (loop,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "while")
    assert [variable.aval.shape for variable in loop.outvars].count((3, B, 2, P + T, 8)) == 2
    np.testing.assert_array_equal(found.tokens, rollout.tokens)
    np.testing.assert_array_equal(found.response_mask, rollout.response_mask)
    np.testing.assert_allclose(found.logprobs, rollout.logprobs, atol=2e-4)


@pytest.mark.parametrize(("layers", "width", "apart"), [(32, 16, True), (33, 16, False), (2, 8192, False)])
def test_deep_and_wide_models_keep_the_stack_in_the_loop(layers: int, width: int, apart: bool) -> None:
    """The third one's layers have 3.2 GB, which the loop does not hold twice. Nothing is compiled."""
    config = dataclasses.replace(CONFIG, num_layers=layers, hidden_size=width, intermediate_size=width * 2)
    base = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    policy = Policy({}, {"value": {"kernel": jnp.ones((width, 1)), "bias": jnp.ones(1)}})
    draw = jax.make_jaxpr(lambda base, key: generate(base, policy, config, PROMPTS, key, SAMPLING))
    program = draw(base, jax.random.key(0))
    (loop,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "while")
    carried = [variable.aval.shape for variable in loop.outvars]
    assert carried.count((B, 2, P + T, 8)) == (2 * layers if apart else 0)
    assert carried.count((layers, B, 2, P + T, 8)) == (0 if apart else 2)


def test_one_program_for_all_prompts_keys_and_temperatures(rollout: Rollout) -> None:
    before = len(TRACES)
    outcomes = {
        str(responses(run(BASE, POLICY, make_prompts(lengths, seed=seed), seed, temperature)))
        for seed, lengths, temperature in ((0, LENGTHS, 0.7), (1, [P] * B, 1.3), (2, [1] * B, 0.0), (3, LENGTHS, 5.0))
    }
    assert len(TRACES) == before and len(outcomes) == 4


def test_eight_devices_draw_the_same_tokens(rollout: Rollout) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    found = run(jax.device_put(BASE, whole), jax.device_put(POLICY, whole), jax.device_put(PROMPTS, spread), 0)
    assert found.tokens.sharding.is_equivalent_to(spread, 2)  # no device holds the whole batch
    found = jax.device_get(found)
    for field in ("tokens", "response_mask", "terminated"):
        np.testing.assert_array_equal(getattr(found, field), getattr(rollout, field))
    np.testing.assert_allclose(found.logprobs, rollout.logprobs, atol=2e-4)
    np.testing.assert_allclose(found.values, rollout.values, atol=2e-4)


def test_a_single_short_prompt_in_bfloat16_with_the_unembedding_of_the_loss() -> None:
    """B = P = 1. Activations bfloat16, parameters float32: cached and full pass agree, in float32 log-probs.

    An unembedding rounded to bfloat16 in one of them would show as an error of about 2^-9 * |logits|.
    """
    config, sampling, prompts = dataclasses.replace(CONFIG, dtype="bfloat16"), Sampling(24), make_prompts([1], width=1)
    found = jax.device_get(run(BASE, POLICY, prompts, 0, sampling=sampling, config=config))
    check_structure(found, prompts, sampling)
    assert found.logprobs.dtype == found.values.dtype == np.float32 and found.tokens.shape == (1, 25)
    forced = teacher_forced(found, POLICY, TEMPERATURE, config)
    np.testing.assert_allclose(found.logprobs, forced.logprobs, atol=1e-3)
    np.testing.assert_allclose(found.values, forced.values, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(response_length=0), "response_length=0 must be at least 1"),
        (lambda: Sampling(top_k=-1), "top_k=-1 must be 0"),
        (lambda: Sampling(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"),
        (lambda: Sampling(top_p=1.5), r"top_p=1.5 must lie in \(0, 1\]"),
        (lambda: with_ids(pad_id=V), r"pad_id=67 must lie in the vocabulary \[0, 67\)"),
        (lambda: with_ids(pad_id=-100), r"pad_id=-100 must lie in the vocabulary \[0, 67\)"),
        (lambda: with_ids(stop_ids=(2, 70)), r"stop_ids=\(2, 70\) must lie in the vocabulary \[0, 67\)"),
    ],
)
def test_bad_choices_are_named_with_what_is_allowed(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def with_ids(**changes: object) -> Rollout:
    return generate(BASE, POLICY, CONFIG, PROMPTS, jax.random.key(0), dataclasses.replace(SAMPLING, **changes))


def test_only_filters_make_the_behaviour_policy_another_one() -> None:
    assert not Sampling().filtered
    assert Sampling(top_k=5).filtered and Sampling(top_p=0.9).filtered
