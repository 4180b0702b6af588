"""Meshes as text: the names of their axes, and how "fsdp=2,tensor=4" is read (standard library only).

A config holds a mesh as text, and is checked before jax looks for devices; `meshes.py` makes the mesh itself.
"""

import math

from llmarch.errors import UserError, check, nearest

# In the order of the mesh, the slowest network outermost: between slices go only gradients (data) or one
# microbatch's activations (stage), and tensor, which talks several times a layer, has the nearest neighbours.
TRAINING = ("data", "stage", "fsdp", "expert", "context", "sequence", "tensor")
INFERENCE = ("x", "y", "z")
MESH_AXES = (TRAINING, INFERENCE)
MOST = 2**20

# The training axes that split the batch, the length of the residual stream, and the heads in attention; the major
# axis comes first. The row "train" of table.py is made of them.
BATCH = ("data", "fsdp", "expert")
LENGTH = ("context", "sequence", "tensor")
HEADS = ("tensor", "sequence")


def parse_mesh(text: str) -> dict[str, int]:
  """'fsdp=2,tensor=4' or 'x=2' -> the size of every axis of its family in order, 1 where it is not named.

  '' is one device. Raises UserError.
  """
  given = {}
  for part in filter(None, text.split(",")):
    name, _, size = (s.strip() for s in part.partition("="))
    if not any(name in family for family in MESH_AXES):
      known = [axis for family in MESH_AXES for axis in family]
      raise UserError(f"mesh={text!r} names the axis {name!r}{nearest(name, known)}")
    check(name not in given, f"mesh={text!r} gives {name} twice; give each axis once")
    if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size) > 0):
      raise UserError(f"mesh={text!r}: cannot read {part!r}; write an axis as {name}=N, with N from 1")
    given[name] = int(size)
  need = math.prod(given.values())
  check(need <= MOST, f"mesh={text!r} covers {need} devices, more than the {MOST} that any machine has")
  for family in MESH_AXES:
    if set(given) <= set(family):
      return dict.fromkeys(family, 1) | given
  raise UserError(f"mesh={text!r} mixes axes; give either {' or '.join(','.join(f) for f in MESH_AXES)}")
