"""Adapters with their heads on disk: bitwise round trips, the wrong base, and a named error for every damage."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ppo_jax.data.disk import sha256_of
from ppo_jax.models.adapters import LINEARS, Lora, init_full, init_lora, init_magnitudes, init_top_k
from ppo_jax.models.files import artifacts, hf
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.heads import RewardHead, ValueHead
from ppo_jax.models.placement import shardings
from ppo_jax.models.transformer import apply
from ppo_jax.parallel import sharding
from ppo_jax.parallel.mesh import MeshConfig, make_mesh
from ppo_jax.types import PyTree
from tests.disk import small_disk
from tests.models.tiny import CONFIG, LLAMA3, equal, random_params

PARAMS = random_params(CONFIG)
HIDDEN = jnp.zeros((1, CONFIG.hidden_size))
VALUE = jax.tree.map(lambda x: x + 0.25, ValueHead().init(jax.random.key(0), HIDDEN)["params"])
REWARD = RewardHead().init(jax.random.key(1), HIDDEN)["params"] | {"gain": jnp.float32(1.5), "bias": jnp.float32(-3)}


def noisy(tree: PyTree, seed: int = 0) -> PyTree:
    """Every array filled with normal numbers, so that nothing is equal to its initial value."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def same_leaves(left: PyTree, right: PyTree) -> bool:
    """Bitwise, dtypes included."""
    return equal(jax.tree.leaves(left), jax.tree.leaves(right))


LORA = noisy(init_lora(jax.random.key(2), CONFIG, rank=2, alpha=3.0, first_layer=1))
ADAPTERS = {
    "base": {},
    "lora": LORA,
    "dora": noisy(init_magnitudes(PARAMS["layers"], LORA, CONFIG)),
    "some_linears": noisy(init_lora(jax.random.key(2), CONFIG, 3, 1.0, ("v", "down"))),
    "top_k": noisy(init_top_k(PARAMS, CONFIG, 2)),
    "full": noisy(init_full(PARAMS)),
    "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), noisy(init_top_k(PARAMS, CONFIG, 1))),
}


BASE = artifacts.Base("some/model", "f" * 64, CONFIG)


def save(path: Path, kind: artifacts.Kind = "policy", adapter: PyTree = LORA, head: PyTree = VALUE, **more) -> Path:
    return artifacts.save(path, kind, adapter, head, **{"base": BASE} | more)


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip_is_bitwise(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    path = save(tmp_path / "policy", adapter=adapter, meta={"accuracy": 0.75, "stages": [1, 2]})
    again = artifacts.load(path, "policy")
    assert jax.tree.structure(again.adapter) == jax.tree.structure(adapter)  # Lora's static scale included
    assert same_leaves(again.adapter, adapter) and same_leaves(again.head, VALUE)
    assert again.meta == {"accuracy": 0.75, "stages": [1, 2]}
    assert (again.kind, again.base, again.fingerprint) == ("policy", "some/model", "f" * 64)
    artifacts.check_base(again, "f" * 64, CONFIG)


def test_nan_and_signed_zero_keep_their_bits(tmp_path: Path) -> None:
    odd = jnp.asarray([np.nan, -0.0, np.inf, 1e-42, 0, 1, 2, 3] * 4, jnp.float32)
    head = {"value": {"kernel": odd[:, None], "bias": odd[1:2]}}
    again = artifacts.load(save(tmp_path / "a", head=head)).head
    for left, right in zip(jax.tree.leaves(head), jax.tree.leaves(again), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_a_loaded_adapter_computes_the_same(tmp_path: Path) -> None:
    again = artifacts.load(save(tmp_path / "a"))
    tokens, positions = jnp.arange(10).reshape(2, 5), jnp.tile(jnp.arange(5), (2, 1))
    expected = apply(PARAMS, LORA, CONFIG, tokens, positions)
    np.testing.assert_array_equal(apply(PARAMS, again.adapter, CONFIG, tokens, positions), expected)


def test_a_reward_model_on_a_cut_trunk(tmp_path: Path) -> None:
    trunk = dataclasses.replace(CONFIG, num_layers=2)
    adapter = noisy(init_lora(jax.random.key(0), trunk, 2, 2.0))
    again = artifacts.load(save(tmp_path / "r", "reward", adapter, REWARD, layers=2), "reward")
    artifacts.check_base(again, "f" * 64, CONFIG)
    assert again.trunk(CONFIG) == trunk
    assert same_leaves(again.head, REWARD)
    with pytest.raises(ValueError, match="a policy that reads 2 layers, the model has 3"):
        save(tmp_path / "p", "policy", adapter, layers=2)
    with pytest.raises(ValueError, match=r"stacked over \[2\] layers of 1"):
        save(tmp_path / "p", "reward", adapter, REWARD, layers=1)


def test_a_policy_may_have_no_head_and_a_reward_model_must(tmp_path: Path) -> None:
    assert artifacts.load(save(tmp_path / "a", head={})).head == {}
    with pytest.raises(ValueError, match="a reward's head needs"):
        save(tmp_path / "b", "reward", head={})
    with pytest.raises(ValueError, match="a policy's head needs"):
        save(tmp_path / "b", "policy", head=REWARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_another_kind_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    with pytest.raises(ValueError, match="is a policy .field kind of artifact.json., but a reward is needed"):
        artifacts.load(path, "reward")


def test_another_base_is_refused(tmp_path: Path) -> None:
    artifact = artifacts.load(save(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"other weights: those of some/model \(sha256 ffff.*this model's are 0000"):
        artifacts.check_base(artifact, "0" * 64, CONFIG)
    for change, message in [
        ({"num_layers": 4}, "num_layers is 3 there and 4 here"),
        ({"rope_theta": 5e5}, "rope_theta is 10000.0 there and 500000.0 here"),
        ({"rope_scaling": LLAMA3}, "rope_scaling is None there and {'kind': 'llama3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            artifacts.check_base(artifact, "f" * 64, dataclasses.replace(CONFIG, **change))
    # how it is run, and where it stops, does not matter
    artifacts.check_base(
        artifact, "f" * 64, dataclasses.replace(CONFIG, dtype="bfloat16", remat="full", eos_token_ids=())
    )


def test_rope_scaling_survives_json(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, rope_scaling=LLAMA3)
    artifacts.check_base(artifacts.load(save(tmp_path / "a", base=BASE._replace(config=config))), "f" * 64, config)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"lora": {"q": Lora(jnp.zeros((3, 32, 2)), jnp.zeros((3, 2, 31)), 1.0)}}, "lora/q/b has shape .3, 2, 31."),
        ({"lora": {"x": Lora(jnp.zeros((3, 32, 2)), jnp.zeros((3, 2, 32)), 1.0)}}, "the model has no layers.x"),
        (
            {"lora": {"q": Lora(jnp.zeros((3, 32, 2)), jnp.zeros((3, 2, 32)), 1.0, magnitude=jnp.zeros((3, 31)))}},
            r"lora/q/magnitude has shape \(3, 31\), the model needs \(3, 32\)",
        ),
        ({"layers": {"q": jnp.zeros((4, 32, 32))}}, r"stacked over \[4\] layers of 3"),
        ({"layers": {"attention_norm": jnp.zeros((2, 32)), "mlp_norm": jnp.zeros((1, 32))}}, r"over \[1, 2\] layers"),
        ({"layers": {"mlp_norm": jnp.zeros(32)}}, r"layers/mlp_norm has shape \(32,\), the model needs \(3, 32\)"),
        ({"embedding": jnp.zeros((66, 32))}, r"adapter/embedding has shape \(66, 32\), the model needs \(67, 32\)"),
        ({"unembedding": jnp.zeros((67, 32))}, "the model has no unembedding"),
        ({"final_norm": jnp.zeros(32, jnp.float16)}, "adapter/final_norm is float16; supported: float32, bfloat16"),
    ],
)
def test_what_does_not_fit_is_not_written(adapter: PyTree, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a", adapter=adapter)
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_unasked_and_only_artifacts_ever(tmp_path: Path) -> None:
    path = save(tmp_path / "a", meta={"n": 1})
    with pytest.raises(FileExistsError, match="already exists; choose another directory or pass overwrite=True"):
        save(path, meta={"n": 2})
    assert artifacts.load(path).meta == {"n": 1}
    save(path, adapter=ADAPTERS["top_k"], meta={"n": 2}, overwrite=True)
    assert artifacts.load(path).meta == {"n": 2} and "layers" in artifacts.load(path).adapter
    other = tmp_path / "thesis"
    other.mkdir()
    with pytest.raises(FileExistsError, match="already exists; choose another directory$"):
        save(other, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "thesis"]  # and nothing half-written


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a", meta={"n": 1})
    with small_disk(2000), pytest.raises(OSError, match="too large"):
        save(path, adapter=ADAPTERS["full"], meta={"n": 2}, overwrite=True)
    assert artifacts.load(path).meta == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_on_a_mesh_the_same_arrays_lie_on_their_shards(name: str, tmp_path: Path) -> None:
    """Written from one device and from the mesh: the same file; read shard by shard, where the table wants them."""
    adapter, mesh = ADAPTERS[name], make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = shardings(adapter, mesh)
    one, other = save(tmp_path / "a", adapter=adapter), save(tmp_path / "b", adapter=sharding.place(adapter, layout))
    assert (one / artifacts.ARRAYS).read_bytes() == (other / artifacts.ARRAYS).read_bytes()
    assert (one / artifacts.DESCRIPTION).read_bytes() == (other / artifacts.DESCRIPTION).read_bytes()
    with jax.set_mesh(mesh):
        again = artifacts.load(one)
        reward = artifacts.load(save(tmp_path / "r", "reward", adapter, REWARD))
    assert same_leaves(again.adapter, adapter) and same_leaves(again.head, VALUE)
    assert same_leaves(reward.head, REWARD) and reward.head["gain"].shape == ()
    assert jax.tree.map(lambda x: x.sharding, again.adapter) == layout


def test_on_a_mesh_the_host_reads_a_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, put = [], jax.device_put
    monkeypatch.setattr(
        sharding.jax, "device_put", lambda x, *more, **how: sizes.append(x.size) or put(x, *more, **how)
    )
    path = save(tmp_path / "a", adapter=ADAPTERS["full"], head={})
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        artifacts.load(path)
    assert max(sizes) == 3 * 32 * 48 // 8 and len(sizes) > 8 * 9  # of the stacked MLP matrices


def test_everybody_who_reads_the_description_reads_the_arrays(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    modes = {(path / name).stat().st_mode for name in (artifacts.ARRAYS, artifacts.DESCRIPTION)}
    assert len(modes) == 1


# -- damage ------------------------------------------------------------------------------------------------------------


def redescribe(path: Path, **fields: object) -> None:
    file = path / artifacts.DESCRIPTION
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not ...}))


def rearray(path: Path, **changes: np.ndarray | None) -> None:
    """Rewrites the arrays with some replaced, added or (None) removed, and the digest with them; "__" is "/"."""
    file = path / artifacts.ARRAYS
    arrays = load_file(file) | {name.replace("__", "/"): array for name, array in changes.items()}
    save_file({k: v for k, v in arrays.items() if v is not None}, file)
    redescribe(path, arrays_sha256=sha256_of(file))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format is 2; this version reads 1"),
        ({"kind": "critic"}, "kind is 'critic'; allowed: policy, reward"),
        ({"kind": ...}, "kind is None"),
        ({"base": "x"}, "base is not an object"),
        ({"base": {"name": "x"}}, "base.sha256 is not text"),
        ({"model": []}, "model is not an object"),
        ({"layers": "3"}, "layers is not an integer"),
        ({"arrays_sha256": 5}, "arrays_sha256 is not text"),
        ({"lora_scales": {"q": "1"}}, "lora_scales.q is '1', not a finite number"),
        ({"lora_scales": {"q": float("nan")}}, "not JSON .NaN is not a number of JSON"),
        ({"lora_scales": {"q": 1.0}}, r"adapter/lora has \['down', .*, lora_scales of artifact.json has \['q'\]"),
        ({"meta": ...}, "meta is not an object"),
        ({"arrays_sha256": "0" * 64}, "arrays.safetensors is damaged"),
    ],
)
def test_a_damaged_description(fields: dict, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    redescribe(path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        artifacts.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__lora__q__a": None}, "adapter/lora/q is not a pair"),
        ({"adapter__lora__q__a": np.zeros((32, 2), np.float32)}, "adapter/lora/q is not a pair of stacked matrices"),
        ({"adapter__lora__q": np.zeros(2, np.float32)}, "adapter/lora/q/a lies below another array"),
        ({"elsewhere": np.zeros(2, np.float32)}, "elsewhere belongs neither to the adapter nor to the head"),
        ({"head__value__bias": np.zeros(1, np.float64)}, "head/value/bias is F64; supported: F32, BF16"),
    ],
)
def test_damaged_arrays(changes: dict, message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    rearray(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        artifacts.load(path)
    assert str(path / artifacts.ARRAYS) in str(error.value)


def test_an_unknown_linear_map_is_refused_on_a_mesh_too(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    rearray(path, adapter__lora__x__a=np.zeros((2, 32, 2), np.float32), adapter__lora__x__b=np.zeros((2, 2, 32), "f4"))
    message = r"arrays.safetensors: adapter/lora has \['down', .*'x'\], lora_scales of"
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), pytest.raises(ValueError, match=message):
        artifacts.load(path)


def test_arrays_that_do_not_fit_their_own_base(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    rearray(path, head__value__kernel=np.zeros((31, 1), np.float32))
    with pytest.raises(ValueError, match=r"arrays.safetensors: a policy's head needs .*\(32, 1\).*\(31, 1\)"):
        artifacts.check_base(artifacts.load(path), "f" * 64, CONFIG)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        artifacts.load(tmp_path / "nowhere")
    for name in (artifacts.ARRAYS, artifacts.DESCRIPTION):
        path = save(tmp_path / name.partition(".")[0])
        (path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            artifacts.load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("artifact") / "a", adapter=ADAPTERS["some_linears"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_value_error(whole: Path, data: st.DataObject) -> None:
    """Bytes flipped or cut off anywhere: the description fails its checks, the arrays fail their digest."""
    path = whole.parent / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    file = path / data.draw(st.sampled_from([artifacts.ARRAYS, artifacts.DESCRIPTION]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(content))
    try:
        again = artifacts.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # a changed letter of a name or number in the description, which only `check_base` can see
        assert file.name == artifacts.DESCRIPTION and same_leaves(again.head, VALUE)


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    hf.save(tmp_path / "m", CONFIG, PARAMS)
    first = fingerprint_of(tmp_path / "m")
    assert first == sha256_of(tmp_path / "m" / hf.SINGLE)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert fingerprint_of(tmp_path / "copy") == first
    changed = PARAMS | {"final_norm": PARAMS["final_norm"].at[0].add(1e-3)}
    hf.save(tmp_path / "m", CONFIG, changed, overwrite=True)
    assert fingerprint_of(tmp_path / "m") != first


def test_fingerprint_of_shards_and_of_a_file(tmp_path: Path) -> None:
    hf.save(tmp_path / "m", CONFIG, PARAMS, max_shard_bytes=20_000)
    first = fingerprint_of(tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    os.utime(shard, ns=(1, 1))
    assert fingerprint_of(tmp_path / "m") != first
    assert fingerprint_of(shard) == sha256_of(shard)
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor model.safetensors.index.json"):
        fingerprint_of(tmp_path)


def test_names_are_readable(tmp_path: Path) -> None:
    names = load_file(save(tmp_path / "a") / artifacts.ARRAYS).keys()
    assert names == {f"adapter/lora/{n}/{x}" for n in LINEARS for x in "ab"} | {"head/value/kernel", "head/value/bias"}
