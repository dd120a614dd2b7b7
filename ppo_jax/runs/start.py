"""What a PPO run starts from: its batches of prompts, and a fresh state."""

from collections.abc import Callable
from typing import Any

from ppo_jax.data import prompt_batches, sft_batches
from ppo_jax.models.adapters import init_adapter
from ppo_jax.models.files import artifacts
from ppo_jax.models.placement import create_on_mesh
from ppo_jax.parallel import processes
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.runs.setup import Setup
from ppo_jax.train.buckets import cut_prompts
from ppo_jax.train.state import TrainState, init_state, key_stream, value_head_of_reward
from ppo_jax.types import Prompts, Texts


class Ahead:
    """The batch of a number, which may have been made before it is asked for."""

    def __init__(self, make: Callable[[int], Prompts]) -> None:
        self.make = make
        self.made: dict[int, Prompts] = {}

    def __call__(self, number: int) -> Prompts:
        self.prepare(number)
        return self.made[number]

    def prepare(self, number: int) -> None:
        """Make the batch, and let go of the others."""
        if number not in self.made:
            self.made = {number: self.make(number)}


def prompt_batches_of(setup: Setup) -> Callable[[int], Prompts]:
    """step -> the prompts of that update, with its pretraining texts where there are some: a function of step alone."""
    rows, size, pad = setup.prompts.rows, setup.loop.batch_size, setup.model.pad_id
    prompts = prompt_batches(rows, size, setup.seed, pad, mix=setup.mix)

    def batch(step: int) -> Prompts:
        return cut_prompts(prompts[step], setup.ppo.prompt_buckets)

    if not setup.pretrain:
        return lambda step: processes.feed(batch(step))
    responses, seed = size * setup.ppo.group_size, setup.seed + 1  # an order of their own
    if len(setup.pretrain) < responses:
        raise ValueError(f"{len(setup.pretrain)} pretraining texts, but an update has {responses} responses: give more")
    texts = sft_batches(setup.pretrain, [0] * len(setup.pretrain), responses, seed, pad)
    return lambda step: processes.feed(batch(step)._replace(pretrain=Texts(texts[step].tokens, texts[step].mask)))


def make_fresh_state(setup: Setup, optimizer: Any) -> TrainState:
    """The state before the first update, with the critic that the configuration asks for."""
    ppo, model = setup.ppo, setup.model
    critic, value_head = None, None
    if ppo.critic.own:
        key = key_stream(setup.seed, "critic")
        fresh = lambda k, base: init_adapter(k, base, model.config, ppo.critic.adapter)  # noqa: E731
        critic = create_on_mesh(fresh, key, model.params)
    if ppo.critic.init == "reward":
        if not isinstance(setup.reward.params, RewardRole):
            raise ValueError('ppo.critic.init="reward" needs a LoRA reward model on the same base as the only reward')
        if (read := setup.reward.layers or model.config.num_layers) != model.config.num_layers:
            raise ValueError(
                f'ppo.critic.init="reward" needs a reward model that reads all {model.config.num_layers} layers of the '
                f"base; this one reads {read}, so its adapter and head would meet other layers and states than in "
                'training. Train one with --reward.depth 0, or leave ppo.critic.init at "zero"'
            )
        value_head = value_head_of_reward(setup.reward.params.head)
        critic = setup.reward.params.adapter if ppo.critic.own else None
    elif ppo.critic.init != "zero":
        found = artifacts.load(ppo.critic.init, "policy")
        artifacts.check_base(found, model.fingerprint, model.config)
        critic, value_head = found.adapter if ppo.critic.own else None, found.head
    key, ema = key_stream(setup.seed, "ppo"), ppo.ema_decay > 0
    return init_state(
        key, setup.adapter, model.config, optimizer, setup.hyper.kl_coef, critic=critic, value_head=value_head, ema=ema
    )
