"""Checkpoints: bitwise round trips (keys, shardings, odd leaves), refusals that name the leaf, faults on disk."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppo_jax.runs.checkpoints import checksums, manifests, reading, store
from tests.disk import small_disk


class Moments(NamedTuple):
    mean: jax.Array
    count: jax.Array


@flax.struct.dataclass
class State:
    params: dict[str, jax.Array]
    opt_state: optax.OptState
    moments: Moments
    key: jax.Array
    step: jax.Array
    row_keys: jax.Array
    reference: jax.Array | None = None


def mesh(data: int, fsdp: int) -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types)


def make_state(seed: int, on: Mesh | None = None, spec: P | None = None) -> State:
    """A state such as training has, random in every float; weights sharded by `spec` where a mesh is given."""
    w, b, mu, key = jax.random.split(jax.random.key(seed), 4)
    params = {"w": jax.random.normal(w, (8, 16)), "b": jax.random.normal(b, (16,), jnp.bfloat16)}
    if on is not None:
        params["w"] = jax.device_put(params["w"], NamedSharding(on, spec if spec is not None else P()))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    return State(
        params=params,
        opt_state=opt_state,
        moments=Moments(jax.random.normal(mu), jnp.int32(2**31 - 1)),
        key=key,
        step=jnp.int32(seed),
        row_keys=jax.random.split(key, 8),
    )


def bits(tree: Any) -> list[bytes]:
    """Every leaf as bytes: NaN equals itself, -0 differs from 0."""
    return [np.asarray(jax.random.key_data(x) if manifests.is_key(x) else x).tobytes() for x in jax.tree.leaves(tree)]


def save(directory: Path, step: int, state: Any, meta: Any = None) -> None:
    with store.open_manager(directory) as manager:
        store.save(manager, step, state, meta)


def test_round_trip_is_bitwise_and_the_key_goes_on(tmp_path: Path) -> None:
    state = make_state(3)
    save(tmp_path, 7, state)
    restored, step = store.restore(tmp_path, make_state(4))
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state) != bits(make_state(4))
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    np.testing.assert_array_equal(jax.random.normal(restored.key, (5,)), jax.random.normal(state.key, (5,)))


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    odd = jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45, 3.4e38], jnp.float32)
    state = {"x": odd, "half": odd.astype(jnp.bfloat16), "flags": jnp.array([True, False]), "u": jnp.uint32(2**32 - 1)}
    save(tmp_path, 1, state)
    assert bits(store.restore(tmp_path, jax.tree.map(jnp.zeros_like, state))[0]) == bits(state)


def test_sharded_on_one_mesh_restored_onto_another(tmp_path: Path) -> None:
    """Eight devices as 4x2, rows and columns split; back as 2x4 with columns split, and onto one device."""
    saved = make_state(3, mesh(4, 2), P("data", "fsdp"))
    save(tmp_path, 1, saved)

    elsewhere = NamedSharding(mesh(2, 4), P(None, "fsdp"))
    keys = NamedSharding(mesh(2, 4), P("data"))
    abstract = jax.eval_shape(lambda: make_state(0))
    abstract = abstract.replace(
        params=abstract.params | {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=elsewhere)},
        row_keys=jax.ShapeDtypeStruct((8,), saved.key.dtype, sharding=keys),
    )
    restored, _ = store.restore(tmp_path, abstract)
    assert restored.params["w"].sharding == elsewhere
    assert restored.params["w"].addressable_shards[0].data.shape == (8, 4)
    assert restored.row_keys.sharding == keys
    assert bits(restored) == bits(saved)

    single, _ = store.restore(tmp_path, make_state(0))
    assert len(single.params["w"].devices()) == 1
    assert bits(single) == bits(saved)


def test_uncommitted_leaves_come_back_uncommitted(tmp_path: Path) -> None:
    """A scalar pinned to device 0 could not meet arrays sharded over eight devices in one jit."""
    sharded = make_state(3, mesh(4, 2), P("data"))
    save(tmp_path, 1, sharded)
    restored, _ = store.restore(tmp_path, sharded)
    assert restored.params["w"].committed and not restored.step.committed
    total = jax.jit(lambda s: s.params["w"].sum() * s.step + jax.random.normal(s.key))(restored)
    assert jnp.isfinite(total)


def test_numpy_python_empty_and_absent_leaves(tmp_path: Path) -> None:
    state = {
        "best": 0.1,  # float64: would lose digits as float32
        "count": 2**40,
        "done": True,
        "host": np.arange(3, dtype=np.int64) * 2**40,
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "none": None,
        "nothing": {},
        "pair": (jnp.float32(1.5), [jnp.int8(-3)]),
    }
    save(tmp_path, 1, state)
    restored, _ = store.restore(tmp_path, state | {"best": 0.0, "count": 0, "done": False})
    assert (restored["best"], restored["count"], restored["done"]) == (0.1, 2**40, True)
    assert type(restored["best"]) is float and type(restored["host"]) is np.ndarray
    assert restored["empty"].shape == (0, 4) and restored["empty"].dtype == jnp.bfloat16
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    """The background write must not read a buffer that the next update has overwritten in place."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    sharding = NamedSharding(mesh(4, 2), P("data"))
    with store.open_manager(tmp_path, keep=None) as manager:
        for step in range(1, 6):
            state = {
                "plain": jnp.full((500_000,), float(step)),
                "sharded": jax.device_put(jnp.full((500_000,), float(step)), sharding),
            }
            store.save(manager, step, state)
            jax.block_until_ready(overwrite(state))
    target = {name: jax.ShapeDtypeStruct((500_000,), jnp.float32) for name in ("plain", "sharded")}
    for step in range(1, 6):
        restored, _ = store.restore(tmp_path, target, step)
        for name, x in restored.items():
            assert np.unique(x).tolist() == [step], name


def test_steps_meta_and_keeping_the_last_n(tmp_path: Path) -> None:
    assert store.latest_step(tmp_path / "none") is None
    with store.open_manager(tmp_path / "run", keep=2) as manager:
        for step in (0, 5, 10):
            store.save(manager, step, {"x": jnp.float32(step)}, {"config": f"lr: {step}\n", "n": [step, None]})
    assert store.all_steps(tmp_path / "run") == [5, 10]
    assert store.latest_step(tmp_path / "run") == 10
    assert store.read_meta(tmp_path / "run") == {"config": "lr: 10\n", "n": [10, None]}
    assert store.read_meta(tmp_path / "run", 5)["n"] == [5, None]
    restored, step = store.restore(tmp_path / "run", {"x": jnp.float32(0)}, step=5)
    assert step == 5 and restored["x"] == 5.0


def test_what_is_kept_besides_the_newest(tmp_path: Path) -> None:
    best = 3
    with store.open_manager(tmp_path, keep=2, every=5, best=lambda: best) as manager:
        for step in range(1, 14):
            store.save(manager, step, {"x": jnp.float32(step)})
            if step == 12:
                best = 12  # the old best one may go
    assert store.all_steps(tmp_path) == [5, 10, 12, 13]


@pytest.mark.parametrize("leaf", ["w", "key", "half", "zero"])
def test_another_value_of_the_same_shape_is_noticed(tmp_path: Path, leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a byte had changed below everything that has a checksum of its own: the sum is of what was saved."""
    state = {"w": jnp.ones((2, 3)), "key": jax.random.key(0), "half": jnp.ones(3, jnp.bfloat16), "zero": jnp.int32(0)}
    other = {"w": jnp.ones((2, 3)).at[1, 2].set(1.0000001), "key": jax.random.key(1)}
    other |= {"half": -state["half"], "zero": jnp.int32(1)}
    known = checksums.sums({name: manifests.storable(value) for name, value in state.items()})
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "sums", lambda arrays: known)
        save(tmp_path, 1, state | {leaf: other[leaf]})
    with pytest.raises(store.DamagedCheckpoint, match=rf"not the bytes that were saved: {leaf}$"):
        store.restore(tmp_path, state)


def test_every_difference_is_listed_by_its_path(tmp_path: Path) -> None:
    save(tmp_path, 2, {"params": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "opt": (jnp.int32(0), jnp.ones(4))})
    target = {
        "params": {"w": jnp.ones((3, 2)), "b": jnp.ones(3, jnp.bfloat16), "lora": jnp.ones(1)},
        "opt": (jnp.int32(0),),
    }
    with pytest.raises(store.CheckpointError) as error:
        store.restore(tmp_path, target)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path / '2'} does not fit the state:"
    assert [line.strip() for line in lines[1:]] == [
        "opt.1: float32[4] in the checkpoint, not in the state",
        "params.b: float32[3] in the checkpoint, bfloat16[3] in the state",
        "params.lora: missing in the checkpoint, the state has float32[1]",
        "params.w: float32[2, 3] in the checkpoint, float32[3, 2] in the state",
    ]


def test_a_key_is_not_restored_as_another_kind(tmp_path: Path) -> None:
    save(tmp_path, 1, {"key": jax.random.key(0)})
    for other in (jax.random.key(0, impl="rbg"), jnp.zeros(2, jnp.uint32)):
        with pytest.raises(store.CheckpointError, match=r"key: key<threefry2x32>\[\] in the checkpoint"):
            store.restore(tmp_path, {"key": other})


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    target = {"x": jnp.ones(1)}
    with pytest.raises(FileNotFoundError, match="absent: no such directory"):
        store.restore(tmp_path / "absent", target)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        store.restore(tmp_path, target)
    save(tmp_path, 1, target)
    with pytest.raises(FileNotFoundError, match="no step 2; it has 1"):
        store.restore(tmp_path, target, step=2)


def test_an_unfinished_save_and_foreign_files_are_not_steps(tmp_path: Path) -> None:
    save(tmp_path, 1, {"x": jnp.ones(2)})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("lr was too high")
    assert store.all_steps(tmp_path) == [1]


def test_a_step_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, {"x": jnp.ones(2)})
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step {step} is not after the newest checkpoint, 5"):
            save(tmp_path, step, {"x": jnp.zeros(2)})
    assert store.restore(tmp_path, {"x": jnp.zeros(2)})[0]["x"].tolist() == [1, 1]


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    middle = len(content) // 2
    yield "cut", content[:middle]
    yield "flipped", content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    yield "emptied", b""


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    """Every file cut, emptied, gone or with a flipped byte: our error, or (a spare copy) the right bits."""
    state = {"x": jax.random.normal(jax.random.key(0), (1000,)), "key": jax.random.key(1)}
    save(tmp_path, 3, state)
    noticed = set()
    for path in sorted((tmp_path / "3").rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        name = str(path.relative_to(tmp_path / "3"))
        for damage, harmed in [*damaged(content), ("gone", None)]:
            if not content:
                continue
            path.unlink() if harmed is None else path.write_bytes(harmed)
            try:
                restored, _ = store.restore(tmp_path, state)
                assert bits(restored) == bits(state), (name, damage)
            except store.DamagedCheckpoint as error:
                assert f"{tmp_path / '3'}: " in str(error) and "\n" not in str(error)
                noticed.add((name, damage))
            path.write_bytes(content)
    for damage in ("cut", "flipped", "emptied", "gone"):
        assert ("arrays/manifest.ocdbt", damage) in noticed
        assert ("meta/metadata", damage) in noticed


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_survives(tmp_path: Path) -> None:
    big = {"x": jax.random.normal(jax.random.key(0), (200_000,))}
    target = {"x": jnp.zeros((200_000,))}
    save(tmp_path, 1, big)
    with (
        pytest.raises(store.CheckpointSaveError, match=str(tmp_path)),
        store.open_manager(tmp_path) as manager,
        small_disk(10_000),
    ):
        store.save(manager, 2, big)  # fails in the background ...
        store.save(manager, 3, big)  # ... and surfaces here
        raise AssertionError("the failed save went unnoticed")
    assert store.latest_step(tmp_path) == 1
    save(tmp_path, 2, big)
    assert bits(store.restore(tmp_path, target)[0]) == bits(big)


def test_a_failure_in_the_background_surfaces_on_wait_and_on_leaving(tmp_path: Path) -> None:
    big = {"x": jax.random.normal(jax.random.key(0), (200_000,))}
    with (
        pytest.raises(store.CheckpointSaveError),
        small_disk(10_000),
        store.open_manager(tmp_path / "a") as manager,
    ):
        store.save(manager, 1, big)
        store.wait(manager)
        raise AssertionError("wait said nothing")
    with pytest.raises(store.CheckpointSaveError), small_disk(10_000):
        save(tmp_path / "b", 1, big)
    with (
        pytest.raises(KeyboardInterrupt),
        small_disk(10_000),
        store.open_manager(tmp_path / "c") as manager,
    ):
        store.save(manager, 1, big)
        raise KeyboardInterrupt  # is not hidden behind the failed save


def test_a_path_that_is_a_pattern_is_refused(tmp_path: Path) -> None:
    """Orbax would look below whatever matches it, find nothing to merge, and call that saved."""
    with pytest.raises(ValueError, match=r"with \[ in its name"):
        save(tmp_path / "lr=[0.1]", 1, {"x": jnp.ones(1)})
    (tmp_path / "link").symlink_to(tmp_path / "lr=[0.1]")
    with pytest.raises(ValueError, match=r"with \[ in its name"):
        save(tmp_path / "link", 1, {"x": jnp.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_cannot_be_read_back_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: the checkpoint does not get its name, and the one before stays."""
    save(tmp_path, 1, {"x": jnp.ones(3)})
    merge = ocp.PyTreeCheckpointHandler.finalize
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda self, directory: None)  # as for such a path
    with pytest.raises(store.CheckpointSaveError, match="could not be saved"):
        save(tmp_path, 2, {"x": jnp.ones(3)})
    assert store.all_steps(tmp_path) == [1]
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", merge)
    save(tmp_path, 2, {"x": jnp.ones(3)})
    assert store.all_steps(tmp_path) == [1, 2]


def test_headers_are_those_that_orbax_reads_and_leave_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path / "lr=1 #2 50%41 & more", 1, make_state(0))  # what a URL would read otherwise
    folder = tmp_path / "lr=1 #2 50%41 & more" / "1" / "arrays"
    known = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    found = reading.read_headers(folder, [*known, "absent"])
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in known.items()}

    gc.collect()
    before = len(gc.get_objects())
    for _ in range(5):
        reading.read_headers(folder, known)
    gc.collect()
    assert len(gc.get_objects()) - before < 5 * len(known)  # Orbax's leave 11 objects for every array


def test_a_place_that_cannot_hold_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(store.CheckpointSaveError, match="file"):
        save(tmp_path / "file", 1, {"x": jnp.ones(1)})
    with pytest.raises(ValueError, match="keep=0"), store.open_manager(tmp_path, keep=0):
        pass
    with pytest.raises(ValueError, match="no array"):
        save(tmp_path / "empty", 1, {"x": None})
    with pytest.raises(ValueError, match=r"share a path: \['a.b'\]"):
        save(tmp_path / "clash", 1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
