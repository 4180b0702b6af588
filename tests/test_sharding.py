"""The sharding package: its table, its places, sums over the mesh, and what `llmarch describe --layout` says."""

import collections
import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmarch import sharding
from llmarch.__main__ import main
from llmarch.analysis import hlo, layer
from llmarch.analysis.layer import describe_layout, small_model
from llmarch.sharding import LAYOUTS, RESIDUAL, TRAIN, Layout, Partial, find_layout, make_mesh, parse_mesh, use_layout

# ------------------------------------------------------------------------------------------ table and places


def test_the_comment_beside_each_place_is_what_the_table_says():
  """`# ws_2d+batch_xyz: [batch, length, embed.xzy]` under a place, or under a comment that calls one, `# KV(16)`."""
  source = pathlib.Path(sharding.__path__[0], "places.py").read_text()
  place, name, checked = None, "", collections.Counter()
  for line in source.splitlines():
    if found := re.match(r"([A-Z_]+): Place", line):
      name, place = found[1], getattr(sharding, found[1])
    elif found := re.match(r"# ([A-Z_]+)\((\d+)\)$", line):
      name, place = found[1], getattr(sharding, found[1])(int(found[2]))
      place = (place,) if name == "SAMPLED" else place  # a dimension alone
    elif found := re.match(r"# ([a-z_0-9+]+): +(\[.*\])$", line):
      assert found[2] == sharding.notation(place, LAYOUTS[found[1]]), (name, found[1])
      checked[name] += 1
  places = {name for name in sharding.__all__ if name.isupper() and sharding._MODULE_OF[name] == "places"}
  assert set(checked) == places - {"ANY", "GATHERED_EMBED"} and set(checked.values()) == {3}


def test_every_name_of_a_row_is_listed():
  names = {axis for axes in sharding.AXES.values() for axis in axes.split()}
  assert all(set(layout.axes) <= names for layout in LAYOUTS.values())


def test_the_row_of_the_docstring_is_the_row():
  from llmarch.sharding import table

  text = table.__doc__.split('"ws_2d+batch_xyz" in full')[1].split("A feed-forward under it")[0]
  written = {name: tuple(axes) for name, axes in re.findall(r"(\w+)\.([xyz]+)", text)}
  assert written == {name: axes for name, axes in LAYOUTS["ws_2d+batch_xyz"].axes.items() if axes}


def test_layouts_are_values():
  again = Layout(TRAIN.name, dict(TRAIN.axes), TRAIN.products)
  assert again == TRAIN and hash(again) == hash(TRAIN) and len({*LAYOUTS.values(), again}) == len(LAYOUTS)
  assert dataclasses.replace(TRAIN, products="constraints") != TRAIN
  assert TRAIN.without("fsdp").mesh_axes("batch") == ("data", "expert", "stage")
  with pytest.raises(TypeError):
    TRAIN.axes["embed"] = ()
  mesh = make_mesh(parse_mesh("x=2,y=2,z=2"))
  assert find_layout("ws_2d", mesh) == LAYOUTS["ws_2d+heads"] != find_layout("ws_2d+latency", mesh)


# ---------------------------------------------------------------------------------------------- parts of sums


@pytest.mark.parametrize("over, scatters", [("xyz", 3), ("xy", 5)])
def test_partial_sums_over_the_same_axes_are_added_and_summed_once(over, scatters):
  """One branch is partial over x, y and z, the other over `over`; each device's summand is its own draw."""
  mesh, layout = make_mesh(parse_mesh("x=2,y=2,z=2")), LAYOUTS["ws_1d+heads"]
  draws = np.random.default_rng(1).normal(size=(2, 2, 2, 2, 1, 3, 16)).astype(np.float32)  # branch, x, y, z, B, T, D
  if over == "xy":  # over z all devices hold the same
    draws[1] = draws[1][:, :, :1]
  whole = draws[0].sum((0, 1, 2)) + draws[1].sum((0, 1, 2)) / (1 if over == "xyz" else 2)

  def run(a, b):
    with use_layout(layout, mesh, manual=True):
      return sharding.sum_over_mesh(Partial(a[0, 0, 0], tuple("xyz")) + Partial(b[0, 0, 0], tuple(over)))

  place = PartitionSpec("x", "y", "z")
  out = sharding.spec(RESIDUAL, (1, 3, 16), layout, mesh)
  step = jax.shard_map(run, mesh=mesh, in_specs=(place, place), out_specs=out, check_vma=False)
  np.testing.assert_allclose(step(*draws), whole, rtol=1e-5, atol=1e-5)
  assert str(jax.make_jaxpr(step)(*draws)).count("reduce_scatter[") == scatters


def test_a_partial_sum_may_be_scaled_before_it_is_summed():
  mesh, layout = make_mesh(parse_mesh("x=2,y=2,z=2")), LAYOUTS["ws_1d+heads"]
  draws = np.random.default_rng(1).normal(size=(2, 2, 2, 1, 3, 16)).astype(np.float32)
  gate = np.random.default_rng(2).normal(size=(1, 3, 1)).astype(np.float32)

  def run(a):
    with use_layout(layout, mesh, manual=True):
      return sharding.sum_over_mesh(Partial(a[0, 0, 0], tuple("xyz")).scaled(gate))

  out = sharding.spec(RESIDUAL, (1, 3, 16), layout, mesh)
  step = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("x", "y", "z"), out_specs=out, check_vma=False)
  np.testing.assert_allclose(step(draws), gate * draws.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------- describe


def counts_of_a_compiled_layer(name: str, text: str, found: dict) -> collections.Counter:
  """{(kind, axes): how many} of what a second layer adds to the program that is compiled for this machine's devices."""
  mesh, layout = make_mesh(parse_mesh(text)), TRAIN.without("stage") if name == "train" else None
  layout = layout or find_layout(name, mesh)
  model = small_model(8, found["tokens"][1])
  counts = collections.Counter()
  for layers, sign in ((2, 1), (1, -1)):
    run, arguments, specs = layer.program(
      dataclasses.replace(model, stack=f"{layers}*layer"), layout, mesh, *found["tokens"]
    )
    placed = jax.tree.map(
      lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    compiled = jax.jit(run, in_shardings=placed).lower(*arguments).compile().as_text()
    for c in hlo.count(compiled, mesh.shape).collectives:
      counts[c.rewritten or c.kind, tuple(sorted(c.axes))] += sign * c.count
  return +counts


@pytest.mark.parametrize(
  "name, text",
  [
    ("ws_2d+batch_xyz", "x=2,y=2,z=2"),
    ("wg_xy+batch_z+throughput", "x=2,y=2,z=2"),
    ("megatron", "data=2,tensor=4"),
    ("train", "fsdp=2,sequence=2,tensor=2"),
    ("train", "data=4,fsdp=2"),
  ],
)
def test_the_described_collectives_are_those_of_the_compiled_program(name, text):
  found = describe_layout(name, text)
  described = collections.Counter()
  for c in found["collectives"]["layer"]:
    described[c["kind"], tuple(sorted(c["axes"]))] += c["count"]
  assert described and described == counts_of_a_compiled_layer(name, text, found)


def test_describe_prints_a_row_and_the_collectives_of_each_block_of_a_config(capsys):
  assert main(["describe", "--layout=ws_2d+batch_xyz", "--mesh=x=2,y=2"]) == 0
  out = capsys.readouterr().out
  assert "act_embed.xy" in out and "kv_heads.y" in out and "[batch, length, embed.xy]" in out  # z is of size 1
  assert re.search(r"reduce-scatter +y +float32\[2,8,16,16\] +block", out)
  config = ["--config=deepseek_v2_lite", "--config.model.vocab_size=1024"]
  assert main(["describe", "--layout=train", "--mesh=expert=2,tensor=2", "--json", *config]) == 0
  out = capsys.readouterr().out
  assert '"dense"' in out and '"moe"' in out


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["--layout=ws_3d"], "there is no 'ws_3d'"),
    (["--layout=train+latency"], "there is no 'train+latency'"),
    (["--layout=train", "--mesh=x=2"], "'train' splits over context, data"),
    (["--layout=ws_2d", "--mesh=x=2,q=2"], "names the axis 'q'"),
    (["--layout=ws_1d", "--mesh=x=3,y=3", "--config=llama_2_7b"], "'act_embed' of size 4096 is not divisible by mesh"),
    (["--layout=train", "--mesh=tensor=3", "--config=llama_2_7b"], "train.seq_len=256 is not divisible by mesh"),
    (["--mesh=x=2"], "--mesh says where a layout is described"),
  ],
)
def test_what_cannot_be_described_is_one_sentence(arguments, sentence, capsys):
  assert main(["describe", *arguments]) == 2
  err = capsys.readouterr().err
  assert sentence in err and len(err.splitlines()) == 1
