"""Checkpoints of Hugging Face: config.json and sharded safetensors, read and written tensor by tensor.

No file is trusted: names, shapes, dtypes and sizes are compared with the config before a value is read, and values are
checked before a device sees them. Pickled weights are never opened. At most one parameter (of all layers) is held.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llmarch import files, sharding
from llmarch.build import build, differences, to_dict
from llmarch.config import ModelConfig
from llmarch.convert.adapters import CONFIG as ADAPTER
from llmarch.convert.adapters import WEIGHTS as WEIGHTS_OF_ADAPTER
from llmarch.convert.adapters import read_adapters
from llmarch.convert.fields import METADATA, Family, Rearrange, Row
from llmarch.convert.packed import Coding, Packed
from llmarch.convert.safetensors import DTYPES, Tensor, read_header, read_json, write_safetensors
from llmarch.convert.tables import FAMILIES, find_family
from llmarch.convert.tables.lacking import LACKING
from llmarch.convert.tables.wrappers import PREFIXES, decoder_of
from llmarch.errors import UserError, check, nearest
from llmarch.layers import registry  # noqa: F401  the kinds of mixers, ffns, norms and positions join their families
from llmarch.layers.attention import AttentionConfig
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import abstract

CONFIG, SINGLE, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
# The files beside the weights that say how text becomes ids and how it is generated; they are copied, never read here.
BESIDE = (
  TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
  "chat_template.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
ORIGINAL = "consolidated.safetensors"  # the makers' own names, which some families' tables know as well
TOO_LARGE = "the sizes are beyond what arrays can have; restore the file"
SHARD_BYTES = 5 << 30


# ---------------------------------------------------------------------------------------------------- slots


@dataclasses.dataclass(frozen=True)
class Slot:
  """A tensor of theirs, and its parts in our parameters: (path, index of leading dimensions: layer, expert) each."""

  key: str
  rearrange: Rearrange
  parts: tuple[tuple[str, tuple[int, ...]], ...]


def tensor_slots(family: Family, config: ModelConfig, present: Iterable[str] | None = None) -> dict[str, Slot]:
  """Finds the slot of every tensor of the config in this family; each part of each parameter occurs exactly once.

  present: the names in a file, which decide if a family has several names for a parameter; None: the first name counts.
  """
  shapes = {path: a.shape for path, a in flatten(nnx.state(abstract(config))).items()}
  slots: dict[str, Slot] = {}
  rows: dict[tuple, Row] = {}  # the row that provides each parameter, or each layer of it
  for row in family.rows:
    for prefix, known, layer in _row_prefixes(row, config):
      paths = [f"{prefix}{path}" for path in row.parts]
      leading, number = ((), ()) if layer is None else ((layer[0],), (layer[1],))
      num_indices = row.key.count("{}") - len(number)
      fits = all(path in shapes and row.fits(shapes[path][len(leading) + num_indices :]) for path in paths)
      if not fits or (paths[0], leading) in rows:
        continue
      alternatives = [r for r in family.rows if set(r.parts) & set(row.parts) and r.key != row.key]
      candidates = [r.key.format(*number, 0) for r in (row, *alternatives)]
      if present is not None and candidates[0] not in present and any(key in present for key in candidates[1:]):
        continue
      rows |= {(path, leading): row for path in paths}
      for index in map(tuple, np.ndindex(*shapes[paths[0]][len(leading) :][:num_indices])):
        ours = [shapes[path][len(leading + index) :] for path in paths]
        key = row.key.format(*number, *index)
        slots[key] = Slot(key, Rearrange.of(row.pattern, ours, known), tuple((path, leading + index) for path in paths))
  layers_of = lambda path: np.ndindex(shapes[path][:1] if path.startswith("stack/segments/") else ())
  left = [path for path in shapes if any((path, leading) not in rows for leading in layers_of(path))]
  check(not left, f"a {family.model_type} checkpoint has no place for {', '.join(left)}")
  return slots


def _row_prefixes(row: Row, config: ModelConfig):
  """Yields (prefix of its paths, known sizes, None) of a row, or one such triple per layer, with (turn, layer) last."""
  if "{}" not in row.key:
    yield "", {}, None
    return
  layer = 0
  for s, (pattern, repeat) in enumerate(config.segments):
    for turn in range(repeat):
      for b, name in enumerate(pattern):
        block, mixer = config.blocks[name], config.blocks[name].mixer
        experts = block.ffn.experts if block.ffn else None
        known = {"n": mixer.heads or 0, "e": experts[0] if experts else 0, "p": 2, "quarter": 4}
        if isinstance(mixer, AttentionConfig):
          known |= {"k": mixer.kv_heads, "h": mixer.dim(config.d_model)}
        if row.residual in (None, block.residual.kind):
          yield f"stack/segments/{s}/blocks/{b}/", known, (turn, layer)
        layer += 1


# --------------------------------------------------------------------------------------------------- reading


# Options by which a config.json of transformers is known; a model folder and a run have "model" instead.
SIGNS = {"model_type", "architectures", "auto_map", "hidden_size", "text_config", "transformers_version"}


def is_checkpoint(path: str | os.PathLike) -> bool:
  """True for a config.json of transformers, and for a folder with one or with an adapter."""
  path = Path(path)
  file = path / CONFIG if path.is_dir() else path
  try:
    data = json.loads(file.read_text()) if file.is_file() else {}
  except (OSError, ValueError, RecursionError):
    return False
  ours = not isinstance(data, dict) or "model" in data
  return not ours and (bool(SIGNS & data.keys()) or (not data and (path / ADAPTER).exists()))


@dataclasses.dataclass(frozen=True)
class Described:
  """A config.json that has been read, with the family that it belongs to.

  options: those of the decoder of text. outer: all of the file. file: its path.
  """

  file: Path
  family: Family
  options: dict
  outer: dict

  @classmethod
  def of(cls, path: str | os.PathLike) -> "Described":
    """Reads the file or the folder's config.json. Raises UserError unless the table has its family."""
    path = Path(path)
    file = path if path.suffix == ".json" and not path.is_dir() else path / CONFIG
    outer = read_json(file)
    options = decoder_of(outer, file)
    family = find_family(options)
    if family is None:
      raise UserError(f"{file}: {_unknown(options)}")
    return cls(file, family, options, outer)

  def model(self) -> dict:
    """The plain data of a ModelConfig, without precision. Raises UserError for all that the table does not know."""
    try:
      return self.family.read({k: v for k, v in self.options.items() if k != "quantization_config"})
    except UserError as e:
      raise UserError(f"{self.file}: {e}") from None

  def build(self, model: dict, dtype: str) -> ModelConfig:
    """The ModelConfig of that plain data, with parameters of a dtype. Raises UserError."""
    try:
      return build(ModelConfig, model | {"precision": dict.fromkeys(("param", "compute", "state"), dtype)}, "model")
    except UserError as e:
      raise UserError(f"{self.file}: {e}") from None
    except (OverflowError, TypeError, MemoryError):
      raise UserError(f"{self.file}: {TOO_LARGE}") from None

  @property
  def carried(self) -> dict:
    """The options that are written back unchanged, whatever the model has become."""
    both = self.options | {k: v for k, v in self.outer.items() if v is not None}
    return {k: v for k, v in both.items() if k in METADATA and "dtype" not in k and k != "auto_map"}

  @property
  def layers_beyond(self) -> range:
    """The numbers of the layers behind the last one, which predict tokens further ahead."""
    count, more = self.get(self.family.num_layers), self.get(self.family.more_layers)
    return range(count, count + more) if type(count) is int and type(more) is int else range(0)

  @property
  def is_coded(self) -> bool:
    """True if the file says that the weights are codes of numbers, and not only that they once were."""
    coded = self.get("quantization_config") or None
    loads = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
    note = isinstance(coded, dict) and coded.get("quant_method") == "bitsandbytes" and not any(map(coded.get, loads))
    return coded is not None and not note

  def coding(self) -> Coding | None:
    """The forms in which the weights are codes; None if they are numbers. Raises UserError for what is not known."""
    try:
      return Coding.of(self.get("quantization_config")) if self.is_coded else None
    except UserError as e:
      raise UserError(f"{self.file}: quantization_config: {e}") from None

  @property
  def dtype(self) -> str:
    """The dtype that the file names; by default float32, or bfloat16 if the weights are codes."""
    dtype = self.get("dtype") or self.get("torch_dtype")
    known = [dtype.name for dtype in DTYPES.values()]
    return dtype if dtype in known else "bfloat16" if self.is_coded else "float32"

  def get(self, key: str, default=None):
    """An option of the file, of the decoder before the wrapper."""
    return self.options.get(key, self.outer.get(key, default))


def _unknown(options: dict) -> str:
  """The sentence about a config.json of no family that is known."""
  model_type, classes = options.get("model_type"), options.get("architectures")
  if model_type is None:
    named = f"nor a known class among its architectures ({classes!r})" if classes else "and no architectures"
    return f"it has no model_type, {named}; add the model_type of a family that docs/fine_tune.md lists"
  if isinstance(model_type, str) and model_type in LACKING:
    return f"the model_type {model_type!r} is not read: {LACKING[model_type]}"
  code = ", and code of the folder (auto_map) is never run" if "auto_map" in options else ""
  return f"the model_type {model_type!r} is unknown{code}; docs/fine_tune.md lists the families that are read"


def read_config(path: str | os.PathLike) -> ModelConfig:
  """The ModelConfig of a config.json alone, a file or in a folder; no weight is opened.

  The dtype of its parameters is the one that the file names. Raises UserError.
  """
  said = Described.of(path)
  return said.build(said.model(), said.dtype)


def entries(config: ModelConfig) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
  """(dtype, shape) of every parameter, by its path."""
  return {path: (np.dtype(a.dtype), a.shape) for path, a in flatten(nnx.state(abstract(config))).items()}


class Checkpoint:
  """A folder of transformers, checked against its family's table. Only `param` and `check_finite` read values.

  config: ours, in the dtype of most tensors; others are cast. coding: the forms in which weights are codes, which are
  decoded to the dtype that the file names. carried: other entries of config.json (ids of special tokens ...), for
  writing them back. entries: {our parameter: (dtype, shape)}. left_out: tensors of layers and parts that the decoder
  does not use. Adapters of PEFT in the folder are added to the weights. Raises UserError, which names file and tensor.
  """

  def __init__(self, directory: str | os.PathLike):
    self.folder = base_folder(directory)
    said = Described.of(self.folder)
    self.family, model = said.family, said.model()
    self.coding = said.coding()
    self.carried = said.carried
    tensors: dict[str, Tensor | Packed] = _open(self.folder)
    tensors = self.coding.decoded(tensors, said.dtype) if self.coding else tensors
    self.tensors, self.left_out = _own(tensors, said)
    self.adapters = _adapters(Path(directory), self.family)
    most = self._dtype()
    dtype = said.dtype if self.coding else most
    self.config = said.build(model, dtype)
    try:
      slots = tensor_slots(self.family, self.config, self.tensors)
    except UserError as e:
      raise UserError(f"{said.file}: {e}") from None
    except (OverflowError, TypeError, MemoryError):
      raise UserError(f"{said.file}: {TOO_LARGE}") from None
    self._check_names(slots)
    self.entries = entries(self.config)
    self._sources: dict[str, list] = {path: [] for path in self.entries}
    for key, slot in slots.items():
      tensor = self.tensors[key]
      wanted = slot.rearrange.shape
      check(tensor.shape == wanted, f"{tensor} has the shape {list(tensor.shape)}, not {list(wanted)}")
      for number, (path, index) in enumerate(slot.parts):
        self._sources[path].append((index, key, slot.rearrange, number))

  @property
  def notes(self) -> dict[str, str]:
    """Sentences for a report on the folder: parts that are left out, tensors that are cast, adapters that are added."""
    kept = self.config.precision.param
    (width,) = (dtype.itemsize for dtype in DTYPES.values() if dtype.name == kept)
    cast = Counter(tensor.dtype for tensor in self.tensors.values() if DTYPES[tensor.dtype].itemsize > width)
    codes = Counter(tensor.kind for tensor in self.tensors.values() if isinstance(tensor, Packed))
    rounded = self.coding.activations if self.coding else None
    return {
      **({"decoded": f"{'; '.join(f'{n} x {kind}' for kind, n in sorted(codes.items()))}, to {kept}"} if codes else {}),
      **({"activations": f"are not rounded here; the release rounds them ({rounded})"} if rounded else {}),
      **({"left out": ", ".join(sorted({_part(name) for name in self.left_out}))} if self.left_out else {}),
      **({"adapters": f"added to {len(self.adapters)} matrices"} if self.adapters else {}),
      **({"cast": ", ".join(f"{n} tensors of {dtype} to {kept}" for dtype, n in sorted(cast.items()))} if cast else {}),
    }

  def param(self, path: str) -> np.ndarray:
    """Reads our parameter of that path, with all its layers."""
    sources = self._sources[path]
    dtype, shape = self.entries[path]
    if not sources[0][0]:
      _, key, rearrange, number = sources[0]
      return self._cast(key, rearrange.split(self._value(key), number), dtype)
    values = np.empty(shape, dtype)
    for index, key, rearrange, number in sources:
      values[index] = self._cast(key, rearrange.split(self._value(key), number), dtype)
    return values

  def _value(self, key: str) -> np.ndarray:
    """Reads a tensor, with its adapter added."""
    values = self.tensors[key].read()
    return self.adapters[key].added_to(values, self.tensors[key]) if key in self.adapters else values

  def _cast(self, key: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
      return values
    with np.errstate(over="ignore"):
      values = values.astype(dtype)
    finite = bool(np.isfinite(values).all())
    check(finite, f"{self.tensors[key]} holds values beyond {dtype.name}, the dtype of the rest; give one dtype")
    return values

  def check_finite(self) -> None:
    """Reads all tensors, one at a time, and checks that their values are finite."""
    for tensor in self.tensors.values():
      tensor.read()

  def _dtype(self) -> str:
    """The dtype of most tensors, in which all parameters are but those that the config keeps in f32."""
    for tensor in self.tensors.values():
      known = ", ".join(DTYPES)
      check(tensor.dtype in DTYPES, f"{tensor} has the dtype {tensor.dtype}; parameters are one of {known}")
    check(bool(self.tensors), f"{self.folder} holds no tensors")
    sizes: Counter = Counter()
    for tensor in self.tensors.values():
      sizes[tensor.dtype] += math.prod(tensor.shape)
    ((most, _),) = sizes.most_common(1)
    return DTYPES[most].name

  def _check_names(self, slots: dict[str, Slot]) -> None:
    for key in slots.keys() - self.tensors.keys():
      raise UserError(f"{self.folder}: the tensor {key} is missing{nearest(key, self.tensors)}")
    heads = {row.key for row in self.family.rows if row.paths == "head"}
    for key in self.tensors.keys() - slots.keys():
      tensor = self.tensors[key]
      if self._is_empty_bias(key):
        continue
      a_copy = key in heads and self.config.head.tied
      check(a_copy, f"{tensor} has no place in a {self.family.model_type} of this config")
      embed = next(self.tensors[slot.key] for slot in slots.values() if slot.parts == (("embed", ()),))
      same = tensor.shape == embed.shape and np.array_equal(tensor.read(), embed.read())
      check(same, f"{tensor} differs from {embed.name}, but {CONFIG} ties them")
    for key in self.adapters.keys() - slots.keys():
      raise UserError(f"{self.adapters[key]} is of {key}, which the model does not have; remove the adapter")

  def _is_empty_bias(self, key: str) -> bool:
    """True for the zeros that some quantisers write beside each matrix, also in models without a bias."""
    matrix = self.tensors.get(f"{key.removesuffix('.bias')}.weight")
    return key.endswith(".bias") and isinstance(matrix, Packed) and not self.tensors[key].read().any()


def has_weights(directory: str | os.PathLike) -> bool:
  """True if the folder, or the base of an adapter there, holds safetensors."""
  return any(base_folder(directory).glob("*.safetensors"))


def base_folder(directory: str | os.PathLike) -> Path:
  """The folder with the weights: the directory, or the base that an adapter there names. Raises UserError."""
  folder = Path(directory)
  alone = not any(path.name != WEIGHTS_OF_ADAPTER for path in folder.glob("*.safetensors"))
  if not (alone and (folder / ADAPTER).is_file()):
    return folder
  name = read_json(folder / ADAPTER).get("base_model_name_or_path")
  base = Path(name) if isinstance(name, str) and name else None
  check(
    base is not None and base.is_dir(),
    f"{folder} holds an adapter ({ADAPTER}) of the base {name!r}, which is no folder here; put the adapter beside the"
    " weights of its base, or name the folder of the base in base_model_name_or_path",
  )
  return base


def _adapters(folder: Path, family: Family) -> dict[str, Any]:
  """The adapters in a folder by the key of the tensor that they change."""
  if not (folder / ADAPTER).exists():
    return {}
  return {_key(name, family): adapter for name, adapter in read_adapters(folder).items()}


def _own(tensors: dict[str, Tensor | Packed], said: Described) -> tuple[dict, dict]:
  """Splits the tensors of a folder: {key in the family's names: tensor of its decoder}, {name: any other tensor}."""
  left = {}
  if said.outer is not said.options:  # only what the wrapper calls its decoder is the decoder's
    inside = {name: tensor for name, tensor in tensors.items() if _in_wrapper(name, said.family) != name}
    if inside:
      heads = {name: tensor for name, tensor in tensors.items() if name in _standing_apart(said.family)}
      left = {name: tensor for name, tensor in tensors.items() if name not in inside | heads}
      tensors = {_in_wrapper(name, said.family): tensor for name, tensor in (inside | heads).items()}
    elif any(name.startswith(said.family.prefix) for name in tensors):  # the wrapper's parts stand beside the decoder's
      mine = (said.family.prefix, *_standing_apart(said.family))
      left = {name: tensor for name, tensor in tensors.items() if not name.startswith(mine)}
      tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
  bare = not any(name.startswith(said.family.prefix) for name in tensors)
  own = {_key(name, said.family) if bare else name: tensor for name, tensor in tensors.items()}
  own = {name: tensor for name, tensor in own.items() if not name.endswith(said.family.buffers)}
  more = tuple(f"{start}{n}." for n in said.layers_beyond for start in said.family.layer_prefixes)
  more += said.family.beyond
  left |= {name: tensor for name, tensor in own.items() if more and name.startswith(more)}
  return {name: tensor for name, tensor in own.items() if name not in left}, left


def _standing_apart(family: Family) -> set[str]:
  """The keys of a family that do not begin with its prefix: those of heads."""
  return {row.key for row in family.rows if not row.key.startswith(family.prefix)}


def _in_wrapper(name: str, family: Family) -> str:
  return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _key(name: str, family: Family) -> str:
  """The key of a tensor in the family's table, for a name that may stand in a wrapper or lack the prefix."""
  name = _in_wrapper(name, family)
  return name if name.startswith(family.prefix) or name in _standing_apart(family) else family.prefix + name


def _part(name: str) -> str:
  """The part of a model to which a tensor belongs: "vision_tower", or "layers.61"."""
  words = name.removeprefix("model.").split(".")
  return ".".join(words[:2] if words[0] == "layers" else words[:1])


def load_checkpoint(directory: str | os.PathLike, mesh: jax.sharding.Mesh | None = None, layout: str = "ws_2d"):
  """(config, parameters) of a folder of transformers, sharded over the mesh by a row of sharding.LAYOUTS.

  The host holds one parameter at a time. Raises UserError for anything wrong before the first parameter is placed.
  """
  checkpoint = Checkpoint(directory)
  params = nnx.state(abstract(checkpoint.config))
  where = dict.fromkeys(checkpoint.entries)
  if mesh is not None:
    where = flatten(sharding.shardings(params, sharding.find_layout(layout, mesh), mesh))
  checkpoint.check_finite()
  flat = {path: jax.device_put(checkpoint.param(path), to) for path, to in where.items()}
  return checkpoint.config, unflatten(params, flat, same_dtypes=True)


def _open(folder: Path) -> dict[str, Tensor]:
  """Finds all tensors of a folder, in one file or in the shards of its index."""
  files = sorted(p.name for p in folder.glob("*.safetensors") if p.name != WEIGHTS_OF_ADAPTER)
  if not (folder / INDEX).exists():
    shards = [name for name in files if name != SINGLE]
    if SINGLE in files:
      extra = [name for name in shards if name.startswith("model-")]
      check(not extra, f"{folder}: {', '.join(extra)} beside {SINGLE}, without {INDEX}; remove one or the other")
      return read_header(_inside(folder, SINGLE))[0]
    if files == [ORIGINAL]:
      return read_header(_inside(folder, ORIGINAL))[0]
    check(not shards, f"{folder}: {', '.join(shards)} need {INDEX}, which is missing; restore it")
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    check(
      not pickled,
      f"{folder} holds {', '.join(pickled)}; pickled weights are never opened: save them as safetensors",
    )
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}; give a folder of transformers")
  index = folder / INDEX
  where = read_json(index).get("weight_map")
  check(isinstance(where, dict) and bool(where), f"{index} has no weight_map; restore it")
  check(all(isinstance(file, str) for file in where.values()), f"{index}: weight_map must name a file for each tensor")
  shards = sorted(set(where.values()))
  tensors: dict[str, Tensor] = {}
  for shard in shards:
    found, _ = read_header(_inside(folder, shard))
    for name, tensor in found.items():
      check(name not in tensors, f"{tensor} is also in {tensors.get(name, tensor).file.name}; remove one of them")
      check(where.get(name) == shard, f"{tensor} is not where {INDEX} has it ({where.get(name)}); restore the index")
      tensors[name] = tensor
  for name in where.keys() - tensors.keys():
    raise UserError(f"{folder / where[name]}: {name} is not there, where {INDEX} has it; restore the shard")
  extra = [name for name in files if name.startswith("model") and name not in shards]
  check(not extra, f"{folder}: {', '.join(extra)} is not in {INDEX}; remove it or restore the index")
  return tensors


def _inside(folder: Path, name: str) -> Path:
  """A file of the folder, which may be a link only to the blobs of a download cache."""
  path = folder / name
  check(name == Path(name).name and name not in ("", ".", ".."), f"{folder / INDEX}: {name!r} points out of the folder")
  check(path.exists(), f"{path} is missing; restore it")
  check(path.is_file(), f"{path} is no file; restore it")
  home = folder.resolve()
  inside = path.resolve().parent in (home, home.parent.parent / "blobs")
  check(inside, f"{path} is a link out of its folder; copy the file")
  return path


# --------------------------------------------------------------------------------------------------- writing


def express(config: ModelConfig, model_type: str | None = None) -> tuple[Family, dict]:
  """The family and the config.json that describe what `config` computes; by default, the first family that can.

  Raises UserError, which says what is lacking, if no family (or not the named one) can.
  """
  check(
    model_type is None or model_type in FAMILIES,
    f"model_type={model_type!r} is unknown{nearest(str(model_type), FAMILIES)}",
  )
  lost = {}
  for family in FAMILIES.values() if model_type is None else [FAMILIES[model_type]]:
    try:
      options = family.write(*canonical(config))
      tensor_slots(family, config)
      lost[family.model_type] = _lost(config, build(ModelConfig, family.read(options), "model"))
    except UserError as e:
      lost[family.model_type] = [str(e)]
    if not lost[family.model_type]:
      return family, options
  nearest_type = min(lost, key=lambda name: len(lost[name]))
  raise UserError(
    f"a checkpoint of model_type={nearest_type} cannot say what this model computes:"
    f" {'; '.join(lost[nearest_type][:3])}" + ("" if model_type else "; nor can one of another type that is known")
  )


def _lost(config: ModelConfig, back: ModelConfig) -> list[str]:
  """Lists the differences between the functions that two configs compute."""
  if back.max_seq_len > config.max_seq_len:  # a limit, which no number depends on; a scaling may allow more
    back = dataclasses.replace(back, max_seq_len=config.max_seq_len)
  both = [_function({"model": m, "layers": dict(enumerate(layers))}) for m, layers in map(canonical, (config, back))]
  found = differences(*both)
  return [d.removeprefix("config.").replace(" here, ", ", not ").removesuffix(" there") for d in found]


TRAINING = {"init_scale", "output_init_scale", "dropout", "jitter", "aux_loss", "sequence_loss", "z_loss"}


def _function(data):
  """Plain data without the fields that concern only training, and with floats rounded in their last digits."""
  if isinstance(data, dict):
    return {k: _function(v) for k, v in data.items() if k not in TRAINING}
  if isinstance(data, (list, tuple)):
    return [_function(v) for v in data]
  return float(f"{data:.12g}") if isinstance(data, float) else data


def canonical(config: ModelConfig) -> tuple[dict, list[dict]]:
  """A config as plain data: (the model without its blocks, its layers).

  Defaults that follow from other fields are written out; names of blocks, initial values and precision are left out.
  """
  apart = ("init", "embed_init", "precision", "stack", "blocks")
  model = {k: v for k, v in to_dict(config).items() if k not in apart}
  blocks = {}
  for name, block in config.blocks.items():
    data = blocks[name] = to_dict(block)
    if data["ffn"] and data["ffn"].get("router", {}).get("balance_rate"):
      data["ffn"]["router"]["balance_rate"] = 0.0  # only the presence of a bias matters, not how fast it is trained
    if not isinstance(block.mixer, AttentionConfig):
      data["mixer"]["position"]["head_dim"] = data["mixer"]["position"]["dims"]  # all dimensions of it rotate
      continue
    mixer, head_dim = data["mixer"], block.mixer.dim(config.d_model)
    mixer |= {"num_kv_heads": block.mixer.kv_heads, "head_dim": head_dim}
    mixer["query_scale"] = mixer["query_scale"] or head_dim**-0.5
    position = mixer["position"]
    if "dims" in (position or {}):
      position |= {"dims": block.mixer.position.rotated(head_dim), "head_dim": head_dim}
      if position.get("scaling") and "attention_factor" in position["scaling"]:
        position["scaling"]["attention_factor"] = block.mixer.position.scaling.gain()
  return model, [blocks[name] for name in config.layers]


def write_checkpoint(
  directory: Path,
  config: ModelConfig,
  read: Callable[[str, tuple[int, ...]], np.ndarray],
  *,
  model_type: str | None = None,
  carried: dict | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> Family:
  """Writes config.json and the tensors, in shards of at most `shard_bytes` (a larger tensor has its own shard).

  read(path, index) gives the part of our parameter at an index of its leading dimensions (layer, expert). carried: see
  Checkpoint.
  """
  family, options = express(config, model_type)
  slots, dtypes = tensor_slots(family, config), {path: dtype for path, (dtype, _) in entries(config).items()}
  options = (carried or {}) | options | {"dtype": config.precision.param}
  (directory / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
  theirs = {key: (dtypes[slot.parts[0][0]], slot.rearrange.shape) for key, slot in slots.items()}
  size_of = lambda key: math.prod(theirs[key][1]) * theirs[key][0].itemsize
  shards: list[list[str]] = [[]]
  filled = 0
  for key in slots:
    if shards[-1] and filled + size_of(key) > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(key)
    filled += size_of(key)
  names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  names = names if len(shards) > 1 else [SINGLE]
  for name, keys in zip(names, shards):
    make_array = lambda key: slots[key].rearrange.join([read(*part) for part in slots[key].parts])
    write_safetensors(directory / name, {key: theirs[key] for key in keys}, make_array, metadata={"format": "pt"})
  if len(shards) > 1:
    total = sum(map(size_of, slots))
    where = {key: name for name, keys in zip(names, shards) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return family


def carry(source: Path, target: Path) -> None:
  """Copies the files beside the weights that the target lacks. Raises UserError for a link out of the folder."""
  for name in BESIDE:
    if (source / name).is_file() and not (target / name).exists():
      shutil.copyfile(_inside(source, name), target / name)


@contextlib.contextmanager
def new_folder(directory: str | os.PathLike) -> Iterator[Path]:
  """Yields a folder as `files.new_folder` does. Raises UserError if the name is taken or cannot be written."""
  target = Path(directory).expanduser().absolute()
  taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
  check(not taken, f"{target} exists already; name a new folder")
  refusal = files.or_refuse(f"cannot write {target}", "name a folder that can be written and has room")
  with refusal, files.new_folder(target) as new:
    yield new
