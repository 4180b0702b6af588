"""The counter of compiled programs, against counts by hand: on eight fake CPU devices, and on a TPU ahead of time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmarch.analysis import compile as ahead
from llmarch.analysis import hlo

pytestmark = pytest.mark.usefixtures("compile_anew")

XYZ = ("x", "y", "z")


@functools.cache
def mesh_of(machine: str):
  """cpu: 2 x 2 x 2. v4, v5e: ahead of time, 64 chips as 4 x 4 x 4 and 4 as 2 x 2 x 1."""
  if machine == "cpu":
    devices, shape = jax.devices(), (2, 2, 2)
  else:
    pytest.importorskip("libtpu")
    topology, shape = {"v4": ("v4:4x4x4", (4, 4, 4)), "v5e": ("v5e:2x2", (2, 2, 1))}[machine]
    devices = ahead.find_topology(topology).devices
  return jax.make_mesh(shape, XYZ, axis_types=(AxisType.Auto,) * 3, devices=devices)


WHOLE = P()


def counted(machine, function, *arguments, out=WHOLE, dtype=jnp.float32):
  """Counts of function(*arrays) inside a shard_map; an argument is (shape over all devices, spec)."""
  mesh = mesh_of(machine)
  shapes = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=tuple(spec for _, spec in arguments), out_specs=out, check_vma=False
  )
  with ahead._messages():
    text = jax.jit(mapped).lower(*shapes).compile().as_text()
  return hlo.count(text, mesh.shape)


def moved(counts):
  return {(c.kind, c.axes): (c.count, c.bytes) for c in counts.collectives}


# ------------------------------------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_flops_of_dots_with_and_without_batch_dimensions(machine):
  B, T, S, N, H, D = 3, 40, 48, 5, 16, 24

  def f(x, w, k):
    q = jnp.einsum("btd,dnh->btnh", x, w)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), k)

  counts = counted(machine, f, ((B, T, D), P()), ((D, N, H), P()), ((B, S, N, H), P()))
  want = 2 * B * T * D * N * H + 2 * 2 * B * N * T * S * H
  assert counts.flops == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_flops_of_dots_that_the_compiler_unrolls_to_sums_over_products(machine):
  """Decoding one row: a matrix-vector product for each key-value head."""
  B, S, K, H = 3, 640, 2, 128

  def f(q, k):
    scores = jnp.einsum("bkh,bskh->bks", q, k)
    return jnp.einsum("bks,bskh->bkh", scores, k)

  counts = counted(machine, f, ((B, K, H), P()), ((B, S, K, H), P()))
  assert counts.flops == pytest.approx(2 * 2 * B * K * S * H, rel=0.02)


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_flops_of_a_causal_convolution_by_channel(machine):
  B, T, C, width = 2, 37, 8, 4

  def f(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (1,), [(width - 1, 0)], dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=C
    )

  counts = counted(machine, f, ((B, T, C), P()), ((width, 1, C), P()))
  taps = sum(min(t + 1, width) for t in range(T))  # padding is not multiplied
  assert 2 * B * C * taps <= counts.flops <= 2 * B * C * 40 * width  # the compiler may pad T to a multiple of 8


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_a_scan_in_a_scan_counts_every_turn(machine):
  B, D, outer, inner = 8, 128, 3, 5

  def f(x, w):
    turn = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(lambda x, _: (jax.lax.scan(turn, x, w)[0] * 2, None), x, length=outer)[0]

  counts = counted(machine, f, ((B, D), P()), ((inner, D, D), P()))
  assert counts.flops == outer * inner * 2 * B * D * D
  assert counts.open_loops == 0


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_gradients_of_a_scan_cost_two_forwards_more(machine):
  B, D, layers = 16, 128, 7

  def f(x, w):
    loss = lambda w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()
    return jax.grad(loss)(w)

  counts = counted(machine, f, ((B, D), P()), ((layers, D, D), P()))
  one = 2 * B * D * D
  assert 3 * layers * one - one <= counts.flops <= 3 * layers * one  # x itself needs no gradient


def test_a_loop_that_ends_by_its_data_counts_one_turn_and_is_named():
  def f(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

  counts = counted("cpu", f, ((8, 64), P()), ((64, 64), P()))
  assert (counts.flops, counts.open_loops) == (2 * 8 * 64 * 64, 1)


def test_trips_are_found_without_the_compilers_note():
  """The TPU compiler leaves no `known_trip_count`: induction variable, bounds and step are read instead."""
  text = """HloModule m
%body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %p = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %step = s32[] get-tuple-element(%p), index=2
  %next = s32[] add(%i, %step)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}, s32[]) tuple(%next, %y, %step)
}
%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LE
}
%condition (q: (s32[], f32[8,8], s32[])) -> pred[] {
  %q = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(11)
  ROOT %less = pred[] fusion(%j, %limit), kind=kLoop, calls=%compare
}
ENTRY %main (z: f32[8,8]) -> f32[8,8] {
  %z = f32[8,8]{1,0} parameter(0)
  %start = s32[] constant(2)
  %three = s32[] constant(3)
  %state = (s32[], f32[8,8]{1,0}, s32[]) tuple(%start, %z, %three)
  %loop = (s32[], f32[8,8]{1,0}, s32[]) while(%state), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""
  counts = hlo.count(text, {"x": 1})
  assert counts.flops == 4 * 2 * 8**3  # 2, 5, 8, 11
  assert counts.open_loops == 0


# ------------------------------------------------------------------------------------------- collectives


# bf16 becomes f32 on a CPU; f32 that only meets matmuls becomes bf16 before it is gathered on a TPU.
@pytest.mark.parametrize(("machine", "dtype"), [("cpu", jnp.float32), ("v4", jnp.bfloat16)])
def test_each_collective_has_its_axes_and_the_bytes_that_time_is_reckoned_by(machine, dtype):
  B, D, layers, size = 64, 1024, 3, dtype.dtype.itemsize
  x, y, z = mesh_of(machine).shape.values()

  def f(a, w):
    def layer(a, w):  # a [B, D/yz], w [D/yz, D]
      whole = jax.lax.all_gather(a, ("y", "z"), axis=1, tiled=True)  # [B, D]
      wide = jnp.tanh(whole @ w)  # [B, 4 D]
      return a + jax.lax.psum_scatter(wide, "x", scatter_dimension=1, tiled=True)[:, : a.shape[1]], None

    a, _ = jax.lax.scan(layer, a, w)
    a = jax.lax.all_to_all(a, "y", 0, 1, tiled=True)
    a = jax.lax.ppermute(a, "z", [(i, (i + 1) % z) for i in range(z)])
    return jax.lax.psum(a, ("x", "z"))

  counts = counted(machine, f, ((B, D), P(None, ("y", "z"))), ((layers, D, 4 * D), P()), out=P(None, "y"), dtype=dtype)
  local = size * B * D // (y * z)
  assert moved(counts) == {
    ("all-gather", ("y", "z")): (layers, layers * size * B * D),  # its output
    ("reduce-scatter", ("x",)): (layers, layers * size * B * 4 * D),  # its input
    ("all-to-all", ("y",)): (1, local),
    ("collective-permute", ("z",)): (1, local),
    ("all-reduce", ("x", "z")): (1, local),
  }
  assert {c.group for c in counts.collectives} == {x, y, z, y * z, x * z}
  assert counts.flops == layers * 2 * B * D * 4 * D


def test_two_arrays_in_one_operation_count_as_two():
  text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
%cut (c: f32[6,8], i: s32[]) -> f32[6,4] {
  %c = f32[6,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[6,4]{1,0} dynamic-slice(%c, %zero, %i), dynamic_slice_sizes={6,4}
}
ENTRY %main (p: f32[5,3], q: f32[6,8]) -> f32[6,4] {
  %p = f32[5,3]{1,0} parameter(0)
  %q = f32[6,8]{1,0} parameter(1)
  %start = (f32[5,3]{1,0}, f32[6,8]{1,0}) all-reduce-start(%p, %q), replica_groups={{0,1}}, to_apply=%add
  %done = (f32[5,3]{1,0}, f32[6,8]{1,0}) all-reduce-done(%start)
  %whole = f32[6,8]{1,0} get-tuple-element(%done), index=1
  %id = u32[] partition-id()
  %at = s32[] convert(%id)
  ROOT %r = f32[6,4]{1,0} fusion(%whole, %at), kind=kLoop, calls=%cut
}
"""
  rewritten, plain = hlo.count(text, {"x": 2}).collectives
  assert plain == hlo.Collective("all-reduce", ("x",), 2, 1, 4 * 15, None, 0)
  assert rewritten == hlo.Collective("all-reduce", ("x",), 2, 1, 4 * 48, "reduce-scatter", 4 * 48)


def test_the_tpu_compiler_rewrites_narrow_scatters_and_the_receipt_says_so():
  """A shard of the minor dimension must be a whole number of 512 bytes: 128 columns of f32."""
  B, x = 64, 4
  scatter = lambda a, w: jax.lax.psum_scatter(a @ w, "x", scatter_dimension=1, tiled=True)
  for columns, kept in ((128, True), (64, False), (192, False), (256, True)):
    counts = counted("v4", scatter, ((B, 256), P()), ((256, x * columns), P()), out=P(None, "x"))
    (found,) = counts.collectives
    size = 4 * B * x * columns
    want = ("reduce-scatter", None, 0) if kept else ("all-reduce", "reduce-scatter", size)
    assert (found.kind, found.rewritten, found.extra_bytes) == want
    assert (found.axes, found.count, found.bytes) == (("x",), 1, size)


def test_the_tpu_compiler_rewrites_gathers_over_three_axes():
  B, D, n = 64, 8192, 64
  gather = lambda a: jnp.tanh(jax.lax.all_gather(a, XYZ, axis=1, tiled=True))
  (found,) = counted("v4", gather, ((B, D), P(None, XYZ))).collectives
  assert (found.axes, found.group, found.count, found.bytes) == (XYZ, n, 1, 4 * B * D)
  assert (found.kind, found.rewritten) in (("all-reduce", "all-gather"), ("all-gather", None))


def test_a_gather_spread_over_the_fusions_it_overlaps_with_counts_once():
  D, F, layers = 2048, 8192, 4

  def f(x, w1, w2):
    def layer(x, w):
      gather = lambda w, axis: jax.lax.all_gather(w, "x", axis=axis, tiled=True)
      return jnp.tanh(jnp.tanh(x @ gather(w[0], 0)) @ gather(w[1], 1)), None

    return jax.lax.scan(layer, x, (w1, w2))[0]

  weights = ((layers, D, F), P(None, "x")), ((layers, F, D), P(None, None, "x"))
  counts = counted("v5e", f, ((2**13, D), P("x")), *weights, dtype=jnp.bfloat16)
  assert moved(counts) == {("all-gather", ("x",)): (2 * layers, 2 * layers * 2 * D * F)}
  assert counts.flops == 2 * 2 * 2**12 * D * F * layers


@pytest.mark.parametrize(
  ("written", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", [[0, 2], [1, 3]]),
    ("replica_groups={}, dimensions={0}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2], device_ids=([4]<=[2,2]T(1,0)) {'x'}, dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}, dimensions={0}", [[3, 1], [2, 0]]),
    ("replica_groups=mesh['x'=4] {'x':(1)2}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['x'=4] {'x':(2)2}, dimensions={0}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_are_read_in_every_form(written, groups):
  op = hlo.Op("g", "all-reduce", (), (), (), "", f", channel_id=1, {written}")
  assert hlo.device_groups(op, 4).tolist() == groups


def test_axes_of_groups_are_those_along_which_members_differ():
  mesh = {"x": 2, "y": 3, "z": 4}
  numbers = np.arange(24).reshape(2, 3, 4)
  assert hlo.axes_of(numbers.transpose(1, 0, 2).reshape(3, 8), mesh) == ("x", "z")
  assert hlo.axes_of(numbers.reshape(6, 4), mesh) == ("z",)
  assert hlo.axes_of(numbers.reshape(12, 2), mesh) == ("z",)  # a part of an axis
  assert hlo.axes_of(numbers.reshape(1, 24), mesh) == ("x", "y", "z")


# ------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("machine", ["cpu", "v4"])
def test_a_scan_over_stacked_weights_reads_each_layer_once(machine):
  B, D, layers = 8, 1024, 6

  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  counts = counted(machine, f, ((B, D), P()), ((layers, D, D), P()))
  weights = layers * 4 * D * D
  assert weights <= counts.bytes <= (1.1 if machine == "v4" else 3.1) * weights  # a CPU copies each slice


def test_a_scan_over_stacked_int8_weights_reads_each_layer_once():
  """Inside its fusions the TPU compiler shows the whole stack in another tiling before it slices it."""
  B, D, layers = 64, 1024, 6

  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, w)[0]

  mesh = mesh_of("v4")
  place = NamedSharding(mesh, P())
  x = jax.ShapeDtypeStruct((B, D), jnp.bfloat16, sharding=place)
  w = jax.ShapeDtypeStruct((layers, D, D), jnp.int8, sharding=place)
  with ahead._messages():
    text = jax.jit(f).lower(x, w).compile().as_text()
  assert layers * D * D <= hlo.count(text, mesh.shape).bytes <= 1.2 * layers * D * D


def test_a_cache_updated_in_place_costs_the_update():
  B, S, D = 4, 512, 128

  def f(cache, new):
    write = lambda i, cache: jax.lax.dynamic_update_slice(cache, new * i, (0, i, 0))
    return jax.lax.fori_loop(0, 10, write, cache)

  mesh = mesh_of("cpu")
  place = NamedSharding(mesh, P())
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in ((B, S, D), (B, 1, D))]
  text = jax.jit(f, donate_argnums=0).lower(*shapes).compile().as_text()
  cache = 4 * B * S * D
  assert hlo.count(text, mesh.shape).bytes < 2.5 * cache  # one copy at most, and not one a turn


def test_sizes_of_narrow_and_wide_types():
  for dtype, bits in (("pred", 8), ("s4", 4), ("bf16", 16), ("f8e4m3fn", 8), ("c64", 64), ("token", 0)):
    assert hlo._bits(dtype) == bits
  assert hlo._size(("s4", (3,))) == math.ceil(12 / 8)
