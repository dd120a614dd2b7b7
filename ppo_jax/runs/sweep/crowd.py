"""The members of one group: ordinary PPO runs, whose iterations are one program.

Each member is `runs.ppo.run_ppo` in its own run directory, as a `Routine`. Where a run alone would call its compiled
iteration, a member hands over its state, prompts and scalars and waits; when all wait, one program does the iteration
of all of them. Evaluations, checkpoints, records, faults and resuming are therefore those of any run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.parallel.members import feed_members
from ppo_jax.parallel.processes import fetch
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.runs.setup import Setup
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm
from ppo_jax.train.population import Places, make_host_members, make_members, make_places, stack_hypers, stack_prompts
from ppo_jax.train.state import Iteration, TrainState
from ppo_jax.types import Frozen, Hyper, Prompts

SHOWN = ("step", "nonfinite", "failing", "best")  # of a state, what the host's loop reads after every iteration


@dataclasses.dataclass(frozen=True)
class MemberState:
    """The state of a member, whose arrays stay with the population until somebody asks for them.

    As a pytree it is the member's `TrainState`: it is saved, evaluated and exported like that of a run alone.
    """

    step: Any
    nonfinite: Any
    failing: Any
    best: Any
    whole: Callable[[], TrainState] = dataclasses.field(repr=False)  # a copy; only until the next iteration

    def arrays(self) -> TrainState:
        """The `TrainState`, which knows what the host has noted since."""
        noted: dict[str, Any] = {name: jnp.asarray(getattr(self, name)) for name in SHOWN}
        return dataclasses.replace(self.whole(), **noted)

    @property
    def policy(self) -> Any:
        return self.whole().policy

    @property
    def ema(self) -> Any:
        return self.whole().ema


def _flatten_with_keys(state: MemberState) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    whole = state.arrays()
    names = tuple(field.name for field in dataclasses.fields(TrainState))
    return [(jax.tree_util.GetAttrKey(name), getattr(whole, name)) for name in names], names


def _unflatten(names: tuple[str, ...], parts: Iterable[Any]) -> Any:
    return TrainState(**dict(zip(names, parts, strict=True)))


jax.tree_util.register_pytree_with_keys(MemberState, _flatten_with_keys, _unflatten)


class Request(NamedTuple):
    """What a member hands over: one iteration, please."""

    state: TrainState | MemberState
    frozen: Frozen
    prompts: Prompts
    hyper: Hyper


def member_iteration(park: Callable[[Any], Any]) -> Iteration:
    """The iteration of a member; see `Crowd.advance`."""

    def iteration(state: Any, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> Any:
        return park(Request(state, frozen, prompts, hyper))

    return iteration


class Crowd:
    """The program of a group and the states of `count` places."""

    def __init__(self, setup: Setup, count: int) -> None:
        self.count = count
        self.ppo = setup.ppo
        rows = [*setup.prompts.rows, *setup.held_out.rows]
        self.slots = max(map(len, rows))  # whatever a seed holds out, every member's prompts have this length
        self.pad_id = setup.model.pad_id
        algorithm = Algorithm(setup.model.config, setup.ppo, make_optimizer(setup.ppo.optimizer), setup.reward.device)
        self.texts: list[Sequence[str]] = [()] * count
        self.metadata: list[Sequence[dict[str, Any]]] = [()] * count
        if setup.reward.host is None:
            self.iterate = make_members(algorithm)
        else:
            reward = SplitReward(setup.reward.host)
            self.iterate = make_host_members(algorithm, reward, setup.model.decode, self.texts, self.metadata)
        self.places: Places | None = None  # made when the first member comes
        self.states: Any = None
        self.last: list[Request | None] = [None] * count  # an empty place goes through the motions of an earlier member

    def seat(self, place: int, setup: Setup) -> None:
        """Says whose prompts a place has from now on."""
        self.texts[place], self.metadata[place] = tuple(setup.prompts.texts), tuple(setup.prompts.metadata)

    def advance(self, requests: Sequence[Request | None]) -> list[tuple[MemberState, Any] | None]:
        """One iteration of every place that has a request: (state, metrics) for each."""
        active: Any = np.array([request is not None for request in requests])
        for place, request in enumerate(requests):
            if request is not None and isinstance(request.state, TrainState):
                self._put(place, request.state)
            self.last[place] = request or self.last[place]
        some = next(request for request in self.last if request is not None)
        asked = [request or some for request in self.last]
        prompts = stack_prompts([self._widen(fetch(request.prompts)) for request in asked])
        hypers = stack_hypers([request.hyper for request in asked])
        self._note(requests)
        self.states, metrics = self.iterate(self.states, some.frozen, prompts, hypers, feed_members(active))
        shown = fetch({name: getattr(self.states, name) for name in SHOWN})
        assert self.places is not None
        own = self.places.split(metrics)
        return [(self._state(i, shown), own[i]) if active[i] else None for i in range(self.count)]

    def _state(self, place: int, shown: dict[str, np.ndarray]) -> MemberState:
        assert self.places is not None
        take = self.places.take
        step, nonfinite, failing, best = (shown[name][place] for name in SHOWN)
        return MemberState(step, nonfinite, failing, best, lambda: take(self.states, place))

    def _put(self, place: int, state: TrainState) -> None:
        if self.places is None:
            self.places = make_places(state, self.count)
            self.states = self.places.fill(state)
        self.states = self.places.put(self.states, place, state)

    def _note(self, requests: Sequence[Request | None]) -> None:
        """Writes what the host has noted in the members' states into the population's."""
        noted = [(i, request.state) for i, request in enumerate(requests) if request is not None]
        if not any(isinstance(state, MemberState) for _, state in noted):
            return
        for name in ("failing", "best"):
            column = np.array(fetch(getattr(self.states, name)))
            before = column.copy()
            for place, state in noted:
                column[place] = np.asarray(getattr(state, name))
            if (column != before).any():
                self.states = dataclasses.replace(self.states, **{name: feed_members(column)})

    def _widen(self, prompts: Prompts) -> Prompts:
        """Prompts in as many slots as those of every other member; the new slots, on the left, are empty."""
        missing = self.slots - np.shape(prompts.tokens)[1]
        if not missing:
            return prompts
        left = ((0, 0), (missing, 0))
        tokens: Any = np.pad(prompts.tokens, left, constant_values=self.pad_id)
        mask: Any = np.pad(prompts.mask, left)
        return prompts._replace(tokens=tokens, mask=mask)
