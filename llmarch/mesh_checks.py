"""Refuses a mesh that cannot train a model, from the config alone, before jax looks for devices."""

import math
from collections.abc import Mapping

from llmarch.branches import BranchConfig
from llmarch.config import ModelConfig
from llmarch.errors import UserError, check
from llmarch.sharding.mesh_text import BATCH, HEADS, INFERENCE, LENGTH, TRAINING, parse_mesh


def check_training(text: str, model: ModelConfig, train) -> None:
  """Raises UserError, which names the field, its value and the mend, if the mesh cannot train this model.

  text is the mesh as in RunConfig.mesh, and train a TrainConfig.
  """
  mesh = parse_mesh(text)
  names = ", ".join(axis for axis in mesh if axis in INFERENCE)
  check(not names, f"mesh={text!r} has the axes {names} of inference; training has {', '.join(TRAINING)}")

  def check_divides(what: str, size: int, axes: tuple[str, ...], times: int = 1, why: str = "") -> None:
    axes = tuple(a for a in axes if mesh[a] > 1)
    parts = times * math.prod(mesh[a] for a in axes)
    by = "*".join(axes) + (f"={parts}" if times == 1 else f" wants {times} pieces each, {parts}")
    check(size % parts == 0, f"{what}={size} is not divisible by mesh {by}{why}; make it a multiple of {parts}")

  rows = train.batch_size // train.grad_accum
  check_divides("train.batch_size/train.grad_accum", rows, BATCH, why=", which splits the batch")
  check_divides("train.seq_len", train.seq_len, LENGTH, why=", which splits the length")
  if mesh["context"] > 1:  # in a ring, each device has one piece of the first half and one of the second
    check_divides("train.seq_len", train.seq_len, ("context",), 2)
  check_divides("model.d_model", model.d_model, ("fsdp",), why=", which splits the parameters")
  for name, block in model.blocks.items():
    for part, branch in block.branches.items():
      try:
        _check_branch(part, branch, mesh, check_divides)
      except UserError as e:
        raise UserError(f"model.blocks.{name}.{e}") from None
  check(
    mesh["expert"] == 1 or any(b.ffn is not None and b.ffn.experts for b in model.blocks.values()),
    f"mesh expert={mesh['expert']} has no experts to split: no block has a moe; use data or fsdp",
  )
  plan_pipeline(mesh, model, train)


# For each logical axis (BranchConfig.extents): the mesh axes that must divide it, and the end of the error's sentence.
EXTENTS = {
  "heads": (HEADS, ""),
  "latent": (("fsdp",), ", which splits the parameters"),
  "mlp": (("tensor",), ""),
  "experts": (("expert",), ""),
  "expert_mlp": (("tensor",), ""),
}


def _check_branch(part: str, branch: BranchConfig, mesh: Mapping[str, int], check_divides) -> None:
  """Raises UserError, beginning with `part`, if the mesh cannot split this branch."""
  ring, ulysses = mesh["context"], mesh["sequence"]
  if part != "ffn":
    check(
      ring == 1 or not branch.dropout,
      f"{part}.dropout={branch.dropout} is not for mesh context={ring}: a ring keeps no weights to drop; set it to 0",
    )
  for field, axis, size in branch.extents():
    axes, why = EXTENTS[axis]
    why = ", which splits heads in attention (an all-to-all over sequence)" if axis == "heads" and ulysses > 1 else why
    check_divides(f"{part}.{field}", size, axes, why=why)
  if part != "ffn" and branch.kv_heads is not None:
    ways = math.prod(mesh[a] for a in HEADS)
    mine, group = branch.heads // ways, branch.heads // branch.kv_heads
    check(
      mine % group == 0 or group % mine == 0,
      f"{part}.num_heads={branch.heads} over mesh {'*'.join(HEADS)}={ways} gives a device {mine} heads, neither a"
      f" multiple nor a divisor of the {group} that share one of num_kv_heads={branch.kv_heads}; change any of these",
    )


def plan_pipeline(mesh: Mapping[str, int], model: ModelConfig, train) -> tuple[int, int, int] | None:
  """The stages, microbatches and circuits of train/pipeline.py; None if the mesh has no stages. Raises UserError."""
  S, V, M = mesh.get("stage", 1), train.circuits, train.microbatches
  if S == 1:
    for name, given in (("microbatches", M is not None), ("circuits", V > 1)):
      check(
        not given,
        f"train.{name}={getattr(train, name)} is of a pipeline, and the mesh has no stages; give the mesh"
        f" stage=2 or more, or leave train.{name} out",
      )
    return None
  check(model.encoder is None, f"mesh stage={S}: a pipeline has no place for model.encoder; use a mesh without stage")
  handed = sorted(set().union(*model.handed_on))
  check(
    not handed,
    f"mesh stage={S}: {', '.join(handed)} is kept in one term of model.stack and read in another, which a pipeline"
    " cannot carry; put both blocks into one term, or use a mesh without stage",
  )
  check(train.remat != "offload", f"train.remat='offload' is not for a pipeline (mesh stage={S}); take 'full'")
  for pattern, repeat in model.segments:
    check(
      repeat % (S * V) == 0,
      f"model.stack={model.stack!r} repeats {' '.join(pattern)!r} {repeat} times, which mesh stage={S} with"
      f" train.circuits={V} cannot share; make the repeats of every term a multiple of {S * V}, or change mesh",
    )
  rows, parts = train.batch_size // train.grad_accum, math.prod(mesh.get(axis, 1) for axis in BATCH)
  M = M or next((k * S for k in (4, 3, 2) if rows % (k * S * parts) == 0), S)
  check(M % S == 0, f"train.microbatches={M} must be a multiple of the mesh's stage={S}")
  check(
    rows % (M * parts) == 0,
    f"train.batch_size={train.batch_size} must be a multiple of {train.grad_accum * M * parts}: grad_accum="
    f"{train.grad_accum} x {M} microbatches x {parts} devices that the mesh splits a batch over",
  )
  return S, M, V
