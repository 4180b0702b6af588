"""What `llmarch describe --layout=NAME` prints: a row of the table, the places of activations under it, and the
collectives of one layer in order."""

import math

from llmarch import sharding
from llmarch.analysis import layer
from llmarch.commands.common import print_table
from llmarch.config import BlockConfig, ModelConfig
from llmarch.experiment_checks import check_training, plan_pipeline
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.ffn import MLPConfig
from llmarch.layers.norm import RMSNorm
from llmarch.layers.position import RoPE
from llmarch.sharding.mesh_text import LENGTH

MESHES = {"train": "fsdp=2,sequence=2,tensor=2", "megatron": "data=2,tensor=4"}  # by default
MESH = "x=2,y=2,z=2"
PLACES = (
  "RESIDUAL", "NORMED", "BRANCH", "PROJECTED", "ATTENDING", "SCORES", "LATENT",
)  # fmt: skip


def describe_layout(name: str, mesh: str | None, config=None) -> dict:
  """The row, the places and the collectives, as plain data.

  config: an ExperimentConfig, whose blocks are described; None: one small block that the mesh divides.
  Raises UserError.
  """
  text = MESHES.get(name.split("+")[0], MESH) if mesh is None else mesh
  sizes = sharding.parse_mesh(text)
  devices = layer.abstract_mesh(sizes)
  training = name == sharding.TRAIN.name
  layout = sharding.TRAIN if training else sharding.find_layout(name, devices)
  sharding.check_axes(layout, devices)
  n = math.prod(sizes.values())
  batch, length = n * math.ceil(8 / n), 16
  if training:
    length *= math.prod(sizes[axis] for axis in LENGTH)
    if config is not None:
      check_training(text, config.model, config.train)
      batch, length = config.train.batch_size // config.train.grad_accum, config.train.seq_len
      if stages := plan_pipeline(sizes, config.model, config.train):
        batch //= stages[1]  # a layer works on one microbatch
  model = small_model(n, length) if config is None else config.model
  present = lambda axes: [a for a in axes if sizes[a] > 1]
  collectives = {
    block: layer.layer_collectives(model, block, layout, devices, batch, length) for block in model.blocks
  }
  return {
    "layout": layout.name,
    "mesh": {axis: size for axis, size in sizes.items() if size > 1},
    "products": layout.products if training else ("rings" if layout.ring else "manual"),
    "axes": {
      part: {axis: present(layout.mesh_axes(axis)) for axis in names.split()} for part, names in sharding.AXES.items()
    },
    "places": {place: sharding.notation(getattr(sharding, place), layout, sizes) for place in PLACES},
    "tokens": [batch, length],
    "collectives": {block: [c._asdict() for c in found] for block, found in collectives.items()},
  }


def small_model(devices: int, length: int) -> ModelConfig:
  """A model with one block, attention and a gated feed-forward, whose sizes any mesh of so many devices divides."""
  heads = devices * math.ceil(8 / devices)
  block = BlockConfig(
    mixer=AttentionConfig(num_heads=heads, head_dim=16, position=RoPE()), ffn=MLPConfig(d_ff=32 * heads), norm=RMSNorm()
  )
  return ModelConfig(
    d_model=8 * heads, vocab_size=8 * heads, max_seq_len=length, blocks={"layer": block}, stack="1*layer"
  )


def print_layout(found: dict) -> None:
  """The same for people."""
  mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
  ways = {
    "local": "each product is a manual program of its own",
    "manual": "the whole step is one manual program",
    "rings": "the whole step is one manual program, with looped collective einsums",
  }
  print(f"layout {found['layout']} on mesh {mesh or 'of one device'}: {ways[found['products']]}\n")
  for part, axes in found["axes"].items():
    words = (f"{axis}{sharding.split_text(split)}" for axis, split in axes.items())
    print(f"  {part:<12} {'  '.join(words)}")
  print()
  for place, text in found["places"].items():
    print(f"  {place:<12} {text}")
  batch, length = found["tokens"]
  for block, collectives in found["collectives"].items():
    print()
    title = f"collectives of one layer {block!r}, on {batch} x {length} tokens"
    if not collectives:
      print(f"{title}: none")
      continue
    rows = [
      {
        "collective": c["kind"],
        "over": ", ".join(c["axes"]),
        "sends": f"{c['dtype']}[{','.join(map(str, c['shape']))}]" + (f" x {c['count']}" if c["count"] > 1 else ""),
        "asked for in": c["where"] + (" (placed by XLA)" if c["implied"] else ""),
      }
      for c in collectives
    ]
    print_table(rows, False, title=title)
  print("\nA device's arrays. The compiler may merge collectives, and drop one that repeats another.")
