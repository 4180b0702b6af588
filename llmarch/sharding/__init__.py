"""Layouts over device meshes: one row of a table places every array, and one rule derives every collective from it.

The modules build on each other in this order; each imports only those before it:

  mesh_text    names of mesh axes, and "fsdp=2,tensor=4" as text                  no jax
  table        logical axis -> mesh axes: the rows, and `find_layout`             no jax
  places       the named places of activations; `spec`, `shardings`
  active       `use_layout`, and what the layout in use says of an axis
  collectives  `redistribute` and `reduce`, inside a `jax.shard_map`
  moves        `shard`, `move`, `local`, `Partial`: what layers and ops call
  meshes       making a mesh of devices (imports mesh_text alone)

The package serves two modes. Automatic: the model is an ordinary program over global arrays; a move is a sharding
constraint, and XLA places the collectives. Manual: inside a `jax.shard_map` an array is what one device holds, and
moves and products place the collectives themselves. For inference a whole step is manual. Training is automatic, but
for its products and its attention, each of which is a manual program of its own (`local`).

Below are the public names. They are imported on first use, so that reading a mesh's text does not import jax.
"""

import importlib

_MODULE_OF = {
  # meshes
  "TRAINING": "mesh_text",  # the mesh axes of training, in the order of the mesh
  "INFERENCE": "mesh_text",  # those of inference: x, y, z
  "parse_mesh": "mesh_text",  # "x=2,y=2" -> {axis: size}
  "make_mesh": "meshes",  # {axis: size} -> jax Mesh
  "device_mesh": "meshes",  # text -> jax Mesh, with fake devices on a machine without accelerators
  "across_granules": "meshes",  # how a mesh is cut into slices or processes
  # rows of the table
  "Layout": "table",
  "AXES": "table",  # all logical axes, by what they are dimensions of
  "LAYOUTS": "table",  # all rows by name
  "TRAIN": "table",  # the row of training
  "FEED_FORWARD": "table",  # first parts of a name: ws_2d ...
  "ATTENTION": "table",  # second parts: batch_xyz ...
  "RING_FORMS": "table",  # last parts, if wanted: latency ...
  "find_layout": "table",  # the row of a name for inference
  "check_axes": "table",  # refuses a mesh with axes of which a row does not speak
  # places: names of dimensions
  "Axis": "places",
  "Place": "places",
  "ANY": "places",
  "RESIDUAL": "places",
  "NORMED": "places",
  "NARROW": "places",
  "TOKENS": "places",
  "BRANCH": "places",
  "PROJECTED": "places",
  "ROWS": "places",
  "ATTENDING": "places",
  "ATTENDING_TOKENS": "places",
  "ATTENDING_HEADS": "places",
  "WEIGHTS_OF_HEADS": "places",
  "SCORES": "places",
  "SCORES_OF_ALL_HEADS": "places",
  "RECURRING": "places",
  "LATENT": "places",
  "kv_heads": "places",
  "KV": "places",
  "KEYS": "places",
  "NEXT_LOGITS": "places",
  "SAMPLED": "places",
  "GATHERED_EMBED": "places",
  "name_in_input": "places",
  "name_in_result": "places",
  "has_name_in_inputs": "places",
  # places over a mesh
  "spec": "places",  # names, shape -> PartitionSpec
  "axes_of": "places",  # PartitionSpec -> mesh axes of each dimension
  "shardings": "places",  # a tree of named leaves -> NamedShardings
  "ways": "places",  # into how many parts a layout splits an axis
  "notation": "places",  # a place as "[batch, length, embed.xzy]"
  "split_text": "places",  # how one dimension of it is split
  # the layout in use
  "use_layout": "active",
  "with_active_layout": "active",
  "Mode": "active",
  "mode": "active",
  "is_manual": "active",
  "is_automatic": "active",
  "ring_form": "active",
  "is_split": "active",
  "active_layout": "active",
  "automatic_axes": "active",
  "mesh_sizes": "active",
  "mesh_axes": "active",
  "mesh_axes_of": "active",
  "num_parts": "active",
  "part_index": "active",
  # collectives of the manual mode
  "redistribute": "collectives",
  "reduce": "collectives",
  # moves of activations and parameters
  "shard": "moves",
  "move": "moves",
  "local": "moves",
  "replicated": "moves",
  "at_use": "moves",
  # sums over the mesh
  "Partial": "moves",
  "sum_over_mesh": "moves",
  "mean_over_mesh": "moves",
  "any_over_mesh": "moves",
  "size_over_mesh": "moves",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
  if name not in _MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
  globals()[name] = value
  return value


def __dir__():
  return sorted({*globals(), *__all__})
