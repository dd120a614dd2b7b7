"""Choices that cannot be: found at start-up, with the field's name and what is allowed."""

import dataclasses
import re

import pytest

from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import OptimizerConfig
from ppo_jax.train.options import CriticConfig, KLConfig, PPOConfig, ScoreConfig, check_hyper, check_scalars_of
from ppo_jax.types import Hyper


def built(cls: type, **given: object) -> object:
    """As the constructor does for callers whose types nobody checks (here, annotations are checked on each call)."""
    record = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(record, field.name, given.get(field.name, field.default))
    record.__post_init__()
    return record


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(KLConfig, estimator="k4"), "kl.estimator='k4' must be one of k1, k2, k3, abs, full"),
        (lambda: built(KLConfig, control="pid"), "control='pid' must be one of fixed, adaptive, linear"),
        (lambda: built(KLConfig, place="score"), "place='score' must be one of reward, loss"),
        (lambda: KLConfig(estimator="k1", place="loss"), "kl.estimator=k1 cannot be a term of the loss.*Choose k2"),
        (lambda: KLConfig(estimator="abs", place="loss"), "kl.estimator=abs cannot be a term of the loss"),
        (lambda: built(ScoreConfig, normalise="zscore"), "normalise='zscore' must be one of auto, off, scale, shift"),
        (lambda: built(ScoreConfig, missing_eos="drop"), "missing_eos='drop' must be one of off, subtract, replace"),
        (lambda: built(PPOConfig, advantage="vtrace"), r"advantage='vtrace' must be one of gae, rloo, .*reinforce\+\+"),
        (
            lambda: built(PPOConfig, aggregation="mean"),
            "aggregation='mean' must be one of token-mean, seq",
        ),
        (lambda: PPOConfig(advantage="rloo"), "group_size=1: advantage=rloo compares at least 2 responses"),
        (lambda: PPOConfig(group_size=0), "group_size=0 must be at least 1"),
        (
            lambda: PPOConfig(advantage="grpo", group_size=4, critic=CriticConfig(own=True)),
            "critic options need advantage=gae; advantage=grpo has no critic",
        ),
        (
            lambda: CriticConfig(adapter=AdapterConfig(rank=2)),
            "critic.adapter is that of a critic of its own; set critic",
        ),
        (lambda: CriticConfig(init="reward"), "critic.init='reward' brings a head .*set critic.own"),
        (lambda: OptimizerConfig(kind="adafactor", b1=0.5), "are Adam's; adafactor has none of them"),
        (
            lambda: PPOConfig(behaviour="filtered", kl=KLConfig(estimator="full")),
            "kl.estimator=full is over the whole vocabulary; behaviour=filtered needs k1",
        ),
        (lambda: PPOConfig(ema_decay=1.0), r"ema_decay=1.0 must lie in \[0, 1\)"),
        (lambda: built(PPOConfig, behaviour="clip"), "behaviour='clip' must be one of ignore, importance, filtered"),
        (
            lambda: PPOConfig(behaviour="filtered", sampling=Sampling(repetition_penalty=1.2)),
            "behaviour=filtered does not know a repetition penalty",
        ),
        (lambda: Sampling(min_p=1.0), r"min_p=1.0 must lie in \[0, 1\)"),
        (lambda: Sampling(repetition_penalty=0.0), "repetition_penalty=0.0 must be positive"),
        (lambda: built(OptimizerConfig, kind="sgd"), "optimizer.kind='sgd' must be one of adamw, adafactor"),
        (
            lambda: built(OptimizerConfig, eps_placement="jax"),
            "eps_placement='jax' must be one of pytorch, tensorflow1",
        ),
        (lambda: OptimizerConfig(b2=1.0), r"optimizer.b2=1.0 must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps=0.0 must be positive"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay=-1.0 must not be negative"),
    ],
)
def test_a_choice_that_cannot_be_is_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scalar_of_the_critic_needs_one() -> None:
    rloo = PPOConfig(advantage="rloo", group_size=2)
    check_scalars_of(rloo, Hyper())
    check_scalars_of(PPOConfig(), Hyper(critic_warmup=5.0))
    with pytest.raises(ValueError, match="hyper.critic_warmup needs advantage=gae; advantage=rloo has no critic"):
        check_scalars_of(rloo, Hyper(critic_warmup=5.0))


@pytest.mark.parametrize(("name", "advantage"), [("gamma", "rloo"), ("gamma", "reinforce"), ("lam", "reinforce++")])
def test_a_scalar_that_an_estimator_does_not_read_is_refused(name: str, advantage: str) -> None:
    ppo = PPOConfig(advantage=advantage, group_size=2 if advantage == "rloo" else 1)
    with pytest.raises(ValueError, match=rf"hyper.{name}=0.9 has no effect under advantage={re.escape(advantage)}"):
        check_scalars_of(ppo, Hyper(**{name: 0.9}))
    check_scalars_of(PPOConfig(), Hyper(**{name: 0.9}))


@pytest.mark.parametrize(
    ("name", "without", "reads"),
    [
        ("kl_target", PPOConfig(), PPOConfig(kl=KLConfig(control="adaptive"))),
        ("kl_horizon", PPOConfig(kl=KLConfig(control="linear")), PPOConfig(kl=KLConfig(control="adaptive"))),
        ("kl_coef_end", PPOConfig(kl=KLConfig(control="adaptive")), PPOConfig(kl=KLConfig(control="linear"))),
        ("kl_steps", PPOConfig(), PPOConfig(kl=KLConfig(control="linear"))),
        ("missing_eos", PPOConfig(), PPOConfig(score=ScoreConfig(missing_eos="subtract"))),
        ("importance_cap", PPOConfig(behaviour="filtered"), PPOConfig(behaviour="importance")),
        *((name, PPOConfig(advantage="reinforce"), PPOConfig()) for name in ("vf_coef", "value_clip", "huber_delta")),
    ],
)
def test_a_scalar_that_these_choices_do_not_read_is_refused(name: str, without: PPOConfig, reads: PPOConfig) -> None:
    check_scalars_of(without, Hyper())
    check_scalars_of(reads, Hyper(**{name: 0.7}))
    with pytest.raises(ValueError, match=rf"hyper.{name}=0.7 has no effect without .*; choose that too"):
        check_scalars_of(without, Hyper(**{name: 0.7}))


def test_an_adaptive_coefficient_does_not_start_at_0() -> None:
    check_scalars_of(PPOConfig(), Hyper(kl_coef=0.0))
    with pytest.raises(ValueError, match="hyper.kl_coef=0 stays 0 under ppo.kl.control=adaptive"):
        check_scalars_of(PPOConfig(kl=KLConfig(control="adaptive")), Hyper(kl_coef=0.0))


def test_the_responses_of_a_batch_must_divide() -> None:
    ppo = PPOConfig(advantage="rloo", group_size=3, num_minibatches=4)
    ppo.check_batch(8)  # 24 responses
    with pytest.raises(ValueError, match="batch_size=6 x group_size=3 does not divide into num_minibatches=4"):
        ppo.check_batch(6)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dual_clip", 1.0, "greater than 1"),
        ("score_clip", 0.0, r"positive \(infinity: off\)"),
        ("huber_delta", -1.0, r"positive \(infinity: off\)"),
        ("target_kl", 0.0, r"positive \(infinity: off\)"),
        ("ptx_coef", -0.5, "at least 0"),
        ("critic_warmup", float("inf"), "at least 0"),
        ("kl_steps", 0.0, "positive"),
        ("length_penalty", float("nan"), "finite"),
        ("importance_cap", float("nan"), r"positive \(infinity: off\)"),
    ],
)
def test_a_scalar_out_of_range_is_named(name, value, allowed) -> None:
    with pytest.raises(ValueError, match=f"hyper.{name}=.* must be {allowed}"):
        check_hyper(Hyper()._replace(**{name: value}))
