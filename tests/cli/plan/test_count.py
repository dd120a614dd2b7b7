"""Counting over loops: programs whose work is known, and pieces of HLO as TPU compilers write it."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ppo_jax.cli.plan.count import Cost, count, group_size
from ppo_jax.cli.plan.hlo import parse, shape_bytes

N = 32
PRODUCT = 2 * N**3  # FLOPs of a product of two [N, N] matrices
X = jnp.ones((N, N))


def cost(function, *args) -> Cost:
    return count(jax.jit(function).lower(*args).compile().as_text())


def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]


def test_a_scan_counts_every_iteration_where_xla_counts_one() -> None:
    weights = jnp.ones((7, N, N))
    found = cost(layers, X, weights)
    assert found.flops == 7 * PRODUCT and found.unknown_loops == 0
    xla = jax.jit(layers).lower(X, weights).compile().cost_analysis()
    assert xla["flops"] < 2 * PRODUCT
    assert count(jax.jit(layers).lower(X, jnp.ones((14, N, N))).compile().as_text()).flops == 14 * PRODUCT


def test_nested_loops_multiply() -> None:
    def outer(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, c: layers(c, weights) @ c, x)

    assert cost(outer, X, jnp.ones((3, N, N))).flops == 5 * (3 + 1) * PRODUCT


@pytest.mark.parametrize(("remat", "products"), [(False, 3), (True, 4)])
def test_a_gradient_costs_two_more_products_and_rematerialisation_a_third(remat: bool, products: int) -> None:
    def loss(weights: jax.Array) -> jax.Array:
        body = lambda c, w: (jnp.sin(c @ w) @ w, None)
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable) if remat else body
        return jnp.sum(jax.lax.scan(body, X, weights)[0])

    found = cost(jax.grad(loss), jnp.ones((6, N, N)))
    # Two products forward; each has two in the backward pass. Again: the first only, the second's result is not needed.
    assert found.flops == 6 * (2 * products - (1 if remat else 0)) * PRODUCT


def test_a_loop_that_may_end_earlier_counts_with_its_bound() -> None:
    def decode(x: jax.Array) -> jax.Array:
        going = lambda s: (s[0] < 9) & jnp.any(s[1] > 0)
        return jax.lax.while_loop(going, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]

    found = cost(decode, X)
    assert found.flops == 9 * PRODUCT and found.unknown_loops == 0


def test_a_loop_without_a_bound_is_counted_once_and_said() -> None:
    found = cost(lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 3.0, lambda c: c @ c, x), X)
    assert found.flops == PRODUCT and found.unknown_loops == 1


def test_a_branch_counts_as_the_dearer_one() -> None:
    found = cost(lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x, x), jnp.array(True), X)
    assert found.flops == 2 * PRODUCT


def test_products_with_batch_dimensions() -> None:
    found = cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6)))
    assert found.flops == 2 * 3 * 4 * 5 * 6


def test_bytes_are_those_read_and_written_and_a_slice_reads_the_slice() -> None:
    big = jnp.ones((1000, 64))
    whole = 4 * big.size
    assert cost(lambda x, y: x + y, big, big).bytes == 3 * whole
    rows = cost(lambda x: jax.lax.scan(lambda c, row: (c + jnp.sin(row), None), jnp.zeros(64), x)[0], big)
    assert whole < rows.bytes < 8 * whole  # each row once, and the carry; not the whole array a thousand times


def test_collectives_by_hand() -> None:
    """8 devices of [4, 16] float32 (256 bytes): 7 * 256; 2 * 7/8 * 256; 7/8 * 256; 256 bytes arrive at each."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    x = jnp.ones((32, 16))

    def bytes_of(function, out: P) -> dict:
        run = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=out, check_vma=False)
        return dict(cost(run, jax.device_put(x, jax.NamedSharding(mesh, P("x")))).collectives)

    ring = [(i, (i + 1) % 8) for i in range(8)]
    assert bytes_of(lambda x: jax.lax.all_gather(x, "x", tiled=True), P()) == {"all-gather": 7 * 256}
    assert bytes_of(lambda x: jax.lax.psum(x, "x"), P()) == {"all-reduce": 2 * 7 / 8 * 256}
    scatter = lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True)
    assert bytes_of(scatter, P("x")) == {"reduce-scatter": 7 / 8 * 256}
    assert bytes_of(lambda x: jax.lax.ppermute(x, "x", ring), P("x")) == {"collective-permute": 256}
    looped = lambda x: jax.lax.fori_loop(0, 6, lambda _, c: jax.lax.psum(jnp.sin(c), "x"), x)
    assert bytes_of(looped, P()) == {"all-reduce": 6 * 2 * 7 / 8 * 256}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", 3),
        ("replica_groups=[16,4]<=[64]", 4),
        ("replica_groups=[2,8]<=[4,4]T(1,0), dimensions={0}", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=8,'b'=4] {'a','b'}", 32),
    ],
)
def test_replica_groups_in_every_notation(text: str, size: int) -> None:
    assert group_size(text) == size


def test_what_a_tpu_keeps_in_its_own_memory_is_no_traffic() -> None:
    shape = "(bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, f32[3]{0:T(128)}, pred[]{:T(512)}, u32[]{:S(2)})"
    assert shape_bytes(shape) == 64 + 12 + 1 + 4 and shape_bytes(shape, hbm=True) == 12 + 1


# A loop as libtpu writes it: no trip count, a rotated condition, a product as a convolution, and one all-gather that
# appears in the fusion that starts it and in the one that ends it.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%start (p0: bf16[16,64]) -> bf16[64,64] {
  %p0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begin = bf16[64,64]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (q0: bf16[16,64], q1: bf16[64,64]) -> bf16[64,64] {
  %q0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %q1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%q0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %finish = bf16[64,64]{1,0} custom-call(%q1, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (b: (s32[], bf16[32,64], bf16[16,64])) -> (s32[], bf16[32,64], bf16[16,64]) {
  %b = (s32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}, bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b), index=1
  %w = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=2
  %fusion.1 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %fusion.1), kind=kCustom, calls=%end
  %y = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %fusion.2), dim_labels=bf_io->bf, metadata={op_name="f(x)"}
  ROOT %t = (s32[]{:T(128)}, bf16[32,64]{1,0:S(1)}, /*index=2*/bf16[16,64]{1,0}) tuple(%next, %y, /*index=2*/%w)
}

%condition (c: (s32[], bf16[32,64], bf16[16,64])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[32,64]{1,0:S(1)}, bf16[16,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  %step = s32[]{:T(128)} constant(1)
  %ahead = s32[]{:T(128)} add(%j, %step)
  %bound = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%ahead, %bound), direction=LT
}

ENTRY %main (a0: bf16[32,64], a1: bf16[16,64]) -> bf16[32,64] {
  %a0 = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(0)
  %a1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %first = s32[]{:T(128)} copy(%zero)
  %tuple = (s32[]{:T(128)}, bf16[32,64]{1,0:S(1)}, bf16[16,64]{1,0}) tuple(%first, %a0, %a1)
  %while.1 = (s32[]{:T(128)}, bf16[32,64]{1,0:S(1)}, bf16[16,64]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[32,64]{1,0} get-tuple-element(%while.1), index=1
}
"""


# A product that reads one layer of a stack and writes one layer of another, both in fusions within its fusion.
NESTED = """HloModule m

%layer (s: f32[32,8,16], i: s32[]) -> f32[8,16] {
  %s = f32[32,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,16]{2,1,0} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%cut)
}

%store (o: f32[32,8,4], y: f32[1,8,4], k: s32[]) -> f32[32,8,4] {
  %o = f32[32,8,4]{2,1,0} parameter(0)
  %y = f32[1,8,4]{2,1,0} parameter(1)
  %k = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %put = f32[32,8,4]{2,1,0} dynamic-update-slice(%o, %y, %k, %nil, %nil)
}

%product (stack: f32[32,8,16], w: f32[16,4], out: f32[32,8,4], at: s32[]) -> f32[32,8,4] {
  %stack = f32[32,8,16]{2,1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %out = f32[32,8,4]{2,1,0} parameter(2)
  %at = s32[] parameter(3)
  %x = f32[8,16]{1,0} fusion(%stack, %at), kind=kLoop, calls=%layer
  %dot = f32[8,4]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %one = f32[1,8,4]{2,1,0} bitcast(%dot)
  ROOT %put.1 = f32[32,8,4]{2,1,0} fusion(%out, %one, %at), kind=kLoop, calls=%store
}

ENTRY %main (a: f32[32,8,16], b: f32[16,4], c: f32[32,8,4], d: s32[]) -> f32[32,8,4] {
  %a = f32[32,8,16]{2,1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %c = f32[32,8,4]{2,1,0} parameter(2)
  %d = s32[] parameter(3)
  ROOT %f = f32[32,8,4]{2,1,0} fusion(%a, %b, %c, %d), kind=kOutput, calls=%product
}
"""


def test_a_fusion_within_a_fusion_reads_and_writes_its_slice_alone() -> None:
    found = count(NESTED)
    assert found.flops == 2 * 8 * 16 * 4
    assert found.bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4 + 1)  # the layer, the weights, the result, the index
    whole = count(NESTED.replace("dynamic-slice(%s, %i, %zero, %zero)", "dynamic-reduce(%s)"))  # another use reads all
    assert whole.bytes == found.bytes + 4 * (32 - 1) * 8 * 16


def test_a_loop_as_a_tpu_compiler_writes_it() -> None:
    found = count(TPU)
    assert found.flops == 11 * 2 * 32 * 64 * 64
    assert dict(found.collectives) == {"all-gather": 11 * 3 * 16 * 64 * 2}  # once per iteration, from three others
    assert found.unknown_loops == 0
    unbounded = count(re.sub("direction=LT", "direction=NE", TPU))
    assert unbounded.flops == 2 * 32 * 64 * 64 and unbounded.unknown_loops == 1


def test_a_splash_kernel_counts_half_of_its_squares_and_its_metadata_may_break_lines() -> None:
    """4 sequences, 8 heads, S 1024, H 128: 2, 3 and 4 products of 2 * S^2 * H FLOPs each, of which half is masked."""

    def module(name: str) -> str:
        return f"""HloModule m
ENTRY %main (q: bf16[4,8,1024,128]) -> bf16[64,64] {{
  %q = bf16[4,8,1024,128]{{3,2,1,0}} parameter(0)
  %{name}.2 = (f32[4,512,128]{{2,1,0}}, bf16[4,2,1024,128]{{3,2,1,0}}) custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512}}"
}}}}, metadata={{op_name="jit(f)"}}
  %w = bf16[64,64]{{1,0}} constant({{...}})
  ROOT %c = bf16[64,64]{{1,0}} convolution(%w, %w), dim_labels=bf_io->bf
}}
"""  # noqa: E501

    square = 4 * 8 * 1024 * 1024 * 128
    for name, products in (("splash_mha_fwd_segmented_residuals", 2), ("splash_mha_dq_x", 3), ("splash_mha_dkv_x", 4)):
        assert count(module(name)).flops == products * square + 2 * 64**3


def test_a_batched_product_as_a_dilated_convolution_counts_real_positions_only() -> None:
    """b of the product becomes a window of size 3 over a dilated and padded input: 1 of 3 positions is real."""
    text = """HloModule m
ENTRY %main (a: f32[3,4,5], b: f32[3,5,6]) -> f32[3,4,6] {
  %a = f32[3,4,5]{2,1,0} parameter(0)
  %b = f32[3,5,6]{2,1,0} parameter(1)
  ROOT %c = f32[3,4,6]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=3 stride=2 pad=2_2 lhs_dilate=3}")
    assert count(text).flops == 2 * 3 * 4 * 5 * 6


def test_text_that_is_not_hlo_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("nothing here")
