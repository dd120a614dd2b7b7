"""A barrier for Orbax's threads that does not wait for a process which has failed."""

import itertools

import jax

from ppo_jax.parallel.agreement import Elsewhere

LOG = "ppo_jax/save/{process}/{number}"  # where a process says which barrier of a save it has come to


KEPT = 32  # of these are kept; a save has six, and no process is a save ahead of another


_arrived = itertools.count()  # barriers that this process has come to


_seen: dict[int, int] = {}  # process -> how many of its barriers this process knows of


def save_barrier(*, key: str, timeout_ms: int) -> None:
    """A barrier for Orbax's threads (`AsyncOptions.barrier_sync_fn`) that a process which has failed does not hold up.

    In the background of a save, processes meet when their files are written, when the first has published the
    checkpoint ("async_..._complete"), and, whatever became of that, when they are done. One that failed to write comes
    to the last one only. Each says where it has come to; who waits for it at a barrier that it has passed by raises.

    Raises:
      Elsewhere: another process has failed, so the save has.
    """
    from jax._src import distributed  # the store of keys that Orbax's own barriers use; there is no public name for it

    client, own = distributed.global_state.client, jax.process_index()
    assert client is not None
    number = next(_arrived)
    client.key_value_set(LOG.format(process=own, number=number), key)
    if number >= KEPT:
        client.key_value_delete(LOG.format(process=own, number=number - KEPT))
    for process in range(jax.process_count()):
        while process != own:
            at = _seen.get(process, 0)
            found = client.blocking_key_value_get(LOG.format(process=process, number=at), timeout_ms)
            if found != key and "_complete" in key:
                raise Elsewhere(f"process {process} could not save its part")
            _seen[process] = at + 1
            if found == key:
                break
