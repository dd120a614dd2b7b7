"""The checkpoints of a run that is under way: a save that fails is reported at once, tried again, and ends nothing.

With several processes a save that fails in one has failed in all, and all try it again at the same update; everything
here is collective then, but for `close`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ppo_jax.parallel.agreement import of_first
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.errors import CheckpointSaveBroken, CheckpointSaveError
from ppo_jax.train.loop import Exploded, LoopConfig, Stopped
from ppo_jax.types import PyTree


class Saver:
    """`Saver(step, state, due)` after every update; a failed save is tried again 1, 2, 4, ... updates later.

    best: asked at every save for the step that the best evaluation was at, or None; its checkpoint is kept.
    """

    def __init__(
        self,
        directory: Path,
        loop: LoopConfig,
        meta: Mapping[str, Any],
        notify: Callable[[str], None],
        last: int | None,
        best: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.directory, self.loop, self.meta, self.notify = directory, loop, meta, notify
        self.good, self.best = last, best
        self.pending: int | None = None  # given to Orbax, not yet known to be on disk
        self.retry: int | None = None  # the update at which a failed save is tried again
        self.patience = 1
        self.stack = contextlib.ExitStack()
        self.manager: Any = None

    def __call__(self, step: int, state: PyTree, due: bool) -> None:
        """Saves when due, in the background; looks whether the save before went well."""
        if self.pending is not None:
            self._guard(step, self._poll)
        if (due or (self.retry is not None and step >= self.retry)) and step not in (self.good, self.pending):
            self._guard(step, lambda: self._save(step, state))

    def _poll(self) -> None:
        if store.poll(self.manager):
            self.good, self.pending, self.patience = self.pending, None, 1

    def settle(self) -> int | None:
        """Waits for the last save; the newest step that is on disk, or None."""
        if self.pending is not None:
            step = self.pending
            self._guard(step, lambda: store.wait(self.manager))
            if self.pending is not None:
                self.good, self.pending, self.patience = step, None, 1
        return self.good

    def insist(self, step: int, state: PyTree) -> None:
        """Saves and waits, at the end of a run. Raises `CheckpointSaveError`."""
        self.close()
        self.retry = self.pending = None
        if not self._published(step):
            self.manager = self.stack.enter_context(self._open())
            try:
                store.save(self.manager, step, state, self.meta)
                store.wait(self.manager)
            except CheckpointSaveError as error:
                if isinstance(error, CheckpointSaveBroken) or not self._published(step):
                    raise
            finally:
                self.close()
        self.good = step

    def close(self) -> None:
        """Lets the manager go. Errors were reported, or belong to a save that `settle` has not been asked about."""
        manager, self.manager = self.stack, None
        self.stack = contextlib.ExitStack()
        with contextlib.suppress(CheckpointSaveError):
            manager.close()

    def _save(self, step: int, state: PyTree) -> None:
        self.settle()
        if self.manager is None:
            self.manager = self.stack.enter_context(self._open())
        store.save(self.manager, step, state, self.meta)
        self.pending, self.retry = step, None

    def _published(self, step: int | None) -> bool:
        """Whether it is on disk, whole: what failed may have come after that, the deletion of an older one."""
        steps: list[int] = []
        with contextlib.suppress(OSError):  # there may be no directory
            steps = store.all_steps(self.directory)
        return step in of_first(steps)

    def _open(self) -> contextlib.AbstractContextManager[Any]:
        return store.open_manager(self.directory, self.loop.keep, self.loop.keep_every, self.best)

    def _guard(self, step: int, action: Callable[[], None]) -> None:
        """Runs `action`; a failure to save closes the manager, is reported, and sets the time of the next try."""
        try:
            action()
        except CheckpointSaveBroken:
            raise
        except (CheckpointSaveError, OSError) as error:
            tried, self.pending = self.pending, None
            self.close()
            if self._published(tried):
                self.good, self.patience = tried, 1
                cause = error.__cause__ or error
                self.notify(f"update {tried} is saved, but an older checkpoint could not be deleted: {cause}")
                store.delete_old(self.directory, self.loop.keep, self.loop.keep_every, self.best())
                return
            self.retry, self.patience = step + self.patience, min(2 * self.patience, 64)
            last = "there is none yet" if self.good is None else f"the last good one is of update {self.good}"
            again = f"saving is tried again at update {self.retry} at the latest"
            self.notify(f"{error}; {last}. Training goes on, and {again}")


@contextlib.contextmanager
def saver(
    directory: Path,
    loop: LoopConfig,
    meta: Mapping[str, Any],
    notify: Callable[[str], None],
    last: int | None,
    best: Callable[[], int | None] = lambda: None,
) -> Iterator[Saver]:
    """A `Saver` for the length of the block, at whose end the last save is waited for."""
    found = Saver(directory, loop, meta, notify, last, best)
    try:
        yield found
        found.settle()
    finally:
        found.close()


def leave(error: Stopped, keep: Saver, given: tuple[int, PyTree] | None) -> NoReturn:
    """Raises the error again, with what is on disk; a state that is not there is tried once more.

    Args:
      given: the last update that was done, and its state; None where none was.

    Raises:
      Stopped: in place of Interrupted, where the state could not be saved: what was done since is lost.
    """
    saved = keep.settle()
    if isinstance(error, Exploded):
        raise Exploded(f"{error}. {_way_back(keep.directory, given[0] if given else saved)}") from None
    if given and saved != given[0]:
        try:
            keep.insist(*given)
            saved = keep.good
        except (CheckpointSaveError, OSError) as failure:
            left = "no update has been saved" if saved is None else f"--resume goes on from update {saved}"
            raise Stopped(f"{error}; its state is not saved: {failure}; {left}") from None
    on_disk = "no update has been saved" if saved is None else f"update {saved} is saved"
    raise type(error)(f"{error}; {on_disk}. Go on with --resume") from None


def _way_back(checkpoints: Path, gone: int | None) -> str:
    """What to do about a policy that, after update `gone`, is too far from the reference."""
    steps = store.all_steps(checkpoints)
    bad = [step for step in steps if gone is not None and step >= gone]
    good = [step for step in steps if step not in bad]
    change = "raise --hyper.kl-coef (adaptive: lower --hyper.kl-target) or lower --hyper.learning-rate, and "
    if not good:
        return f"There is no checkpoint from before: {change}start anew with --overwrite or in another run directory"
    moves = "".join(f"move {checkpoints / str(step)} to another place, " for step in bad)
    return f"To go back to update {good[-1]}: {moves}{change}go on with --resume. Move more away to go further back"
