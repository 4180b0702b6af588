"""The parts of a family's table: holes for config fields and rows for weights, each of which is read both ways.

A template is the plain data of our config with holes for the values of a Hugging Face config.json. Reading fills the
holes; writing matches the template with a config and collects what the holes stand for. A family can express a config
if the round trip is exact: read(write(config)) must be the config.
"""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmarch.config import MAX_LAYERS
from llmarch.errors import UserError, check

REQUIRED = object()


class Reader:
  """The options of a config.json. It notes which of them are asked for, so that no other is silently ignored.

  defaults: the values of options that a file leaves out; they take precedence over the default that a hole names.
  refused: the sentences of all holes that could not be filled.
  """

  def __init__(self, options: dict, defaults: Mapping[str, Any] | None = None):
    self.options, self.defaults = options, defaults or {}
    self.used: set[str] = set()
    self.refused: set[str] = set()

  def get(self, key: str, default: Any = REQUIRED) -> Any:
    self.used.add(key)
    value = self.options.get(key, self.defaults.get(key, default))
    check(value is not REQUIRED, f"the option {key} is missing")
    return value

  def size(self, key: str, default: Any = REQUIRED) -> int:
    """Returns an option that is a whole number which a dimension can have."""
    value = self.get(key, default)
    check(type(value) is int and 0 < value < 2**31, f"{key}={value!r} must be a whole number from 1 to 2^31 - 1")
    return value


class Writer:
  """Collects the options of a config.json, and refuses two values for one option."""

  def __init__(self):
    self.options: dict[str, Any] = {}

  def set(self, key: str, value: Any) -> None:
    known = self.options.setdefault(key, value)
    check(known == value, f"{key} would have to be {known!r} and {value!r} at once")

  def append(self, key: str, i: int, value: Any) -> None:
    """Sets the value of layer i in the list `key`; several holes may set the same value."""
    values = self.options.setdefault(key, [])
    if i == len(values):
      values.append(value)
    check(values[i] == value, f"{key}[{i}] would have to be {values[i]!r} and {value!r} at once")


def fill(template: Any, h: Reader, i: int | None = None) -> Any:
  """Fills the holes of a template; i is the layer, in templates of blocks.

  A hole in a dict that cannot be filled is noted in h.refused, so that all of them are found at once.
  """
  if not isinstance(template, Mapping):
    return template.read(h, i) if hasattr(template, "read") else template
  filled = dict.fromkeys(template)
  for key, part in template.items():
    try:
      filled[key] = fill(part, h, i)
    except UserError as e:
      h.refused.add(str(e))
  return filled


def match(template: Any, value: Any, w: Writer, i: int | None = None) -> None:
  """Tells w what each hole of a template stands for in `value`: the inverse of `fill`."""
  if isinstance(template, Mapping):
    for key, part in template.items() if isinstance(value, Mapping) else ():
      match(part, value.get(key), w, i)
  elif hasattr(template, "write"):
    template.write(value, w, i)


# ------------------------------------------------------------------------------------------------- holes


@dataclasses.dataclass(frozen=True)
class Key:
  """A hole for one option under another name; `decode` and `encode` are inverse to each other."""

  key: str
  default: Any = REQUIRED
  decode: Callable = lambda value: value
  encode: Callable = lambda value: value

  def read(self, h: Reader, i):
    value = h.get(self.key, self.default)
    try:
      return None if value is None else self.decode(value)
    except (TypeError, ValueError, ZeroDivisionError, KeyError):
      raise UserError(f"{self.key}={value!r} is not a value that this family can have") from None

  def write(self, value, w: Writer, i):
    w.set(self.key, None if value is None else self.encode(value))


@dataclasses.dataclass(frozen=True)
class Size(Key):
  """A hole for one option that is the size of a dimension."""

  def read(self, h: Reader, i):
    return None if h.get(self.key, self.default) is None else h.size(self.key, self.default)


@dataclasses.dataclass(frozen=True)
class Choice:
  """A hole for several options that stand for one value of ours: {(option, option, ...): ours}."""

  keys: tuple[tuple[str, Any], ...]  # (key, default)
  table: Mapping[tuple, Any]

  def read(self, h: Reader, i):
    values = tuple(h.get(key, default) for key, default in self.keys)
    said = ", ".join(f"{key}={value!r}" for (key, _), value in zip(self.keys, values))
    for options, ours in self.table.items():
      if options == values:
        return fill(ours, h, i)
    raise UserError(f"{said} is not among the forms that this family is known in")

  def write(self, value, w: Writer, i):
    is_plain = lambda ours: not isinstance(ours, Mapping) and not hasattr(ours, "read")
    kind_of = lambda part: part.get("kind") if isinstance(part, Mapping) else None
    for options, ours in sorted(self.table.items(), key=lambda item: not is_plain(item[1])):
      if ours == value if is_plain(ours) else value is not None and kind_of(ours) in (None, kind_of(value)):
        for (key, _), option in zip(self.keys, options):
          w.set(key, option)
        return match(ours, value, w, i)
    raise UserError(f"{', '.join(key for key, _ in self.keys)} cannot say {value!r}")


def when(key: str, default: Any, then: Any, otherwise: Any = None) -> Choice:
  """A hole for `then` if the option is true, and `otherwise` if it is false."""
  return Choice(((key, default),), {(True,): then, (False,): otherwise})


@dataclasses.dataclass(frozen=True)
class Derived:
  """A hole that follows from other options. Nothing is written for it; reading back checks that it still holds."""

  of: Callable[[Reader], Any]

  def read(self, h: Reader, i):
    return self.of(h)

  def write(self, value, w: Writer, i):
    pass


@dataclasses.dataclass(frozen=True)
class Pair:
  """A hole with a function for each way: read(reader, layer) -> value; write(value, writer, layer)."""

  read: Callable[[Reader, int | None], Any]
  write: Callable[[Any, Writer, int | None], None]


@dataclasses.dataclass(frozen=True)
class Window:
  """The sliding window of each layer, or only of those that layer_types calls sliding_attention.

  types: the default of layer_types as a function (reader, layer) -> bool, true if the layer slides; None: every layer
  does. switch: an option that turns windows off (Qwen).
  """

  default: Any = None
  types: Callable[[Reader, int], bool] | None = None
  switch: str | None = None

  def read(self, h: Reader, i):
    window = h.get("sliding_window", self.default)
    on = h.get(self.switch, False) if self.switch else True
    if self.types and not slides(h, i, self.types):
      return None
    return window if on else None

  def write(self, value, w: Writer, i):
    if self.types:
      w.append("layer_types", i, FULL if value is None else SLIDING)
    if value is not None or not self.types:
      w.set("sliding_window", value)
    if self.switch and value is not None:
      w.set(self.switch, True)


FULL, SLIDING = "full_attention", "sliding_attention"


def slides(h: Reader, i: int, default: Callable[[Reader, int], bool]) -> bool:
  """True if layer i has local attention."""
  fallback, types = default(h, i), h.get("layer_types", None)  # a file may have either option, or both
  if types is None:
    return fallback
  check(isinstance(types, list) and i < len(types), f"layer_types must name each layer, layer {i} is missing")
  check(types[i] in (FULL, SLIDING), f"layer_types[{i}]={types[i]!r} must be {FULL} or {SLIDING}")
  return types[i] == SLIDING


def every(n: int) -> Callable[[Reader, int], bool]:
  """A default of layer_types: all layers slide but each n-th (sliding_window_pattern, if the config still has it)."""

  def default(h: Reader, i: int) -> bool:
    pattern = h.get("sliding_window_pattern", n)
    check(type(pattern) is int and pattern > 0, f"sliding_window_pattern={pattern!r} must be a whole number above 0")
    return (i + 1) % pattern != 0

  return default


@dataclasses.dataclass(frozen=True)
class MaxLength:
  """The longest context, which a scaling of the rotary positions may make longer than max_position_embeddings.

  With "dynamic" and "linear" scaling the file has the original length, which is `factor` times shorter. With "yarn" it
  may have either; the context is `factor` times original_max_position_embeddings or longer. extended: the file of this
  family has the scaled length also with "linear" scaling.
  """

  extended: bool = False

  def read(self, h: Reader, i):
    length = h.size("max_position_embeddings")
    for _, options in rope_options(h):
      kind, factor = options.get("rope_type", options.get("type")), options.get("factor") or 1
      original = options.get("original_max_position_embeddings") or length
      if not all(isinstance(n, (int, float)) and 0 < n < 2**31 for n in (factor, original)):
        continue  # the hole of the positions refuses them
      if kind == "dynamic" or (kind == "linear" and not self.extended):
        return max(length, int(length * factor))
      if kind == "yarn":
        return max(length, int(original * factor))
    return length

  def write(self, value, w: Writer, i):
    for _, options in rope_options(Reader(w.options)):
      if options.get("rope_type", options.get("type")) == "linear" and not self.extended:
        value = math.ceil(value / options["factor"])
    w.options.setdefault("max_position_embeddings", value)  # a dynamic scaling has set the original length before


def rope_options(h: Reader) -> list[tuple[str | None, dict]]:
  """The options of rope_parameters, or of rope_scaling in older files: [(layer type or None, options)].

  As in transformers, rope_scaling replaces all of rope_parameters where a file has both.
  """
  newer, older = h.get("rope_parameters", None), h.get("rope_scaling", None)
  found = older or newer or {}
  check(isinstance(found, dict), f"rope_parameters={found!r} must be a dict")
  if found.keys() & {FULL, SLIDING}:
    for options in found.values():
      check(isinstance(options, dict), f"rope_parameters={found!r} must hold dicts alone")
    return list(found.items())
  return [(None, found)]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: rope_parameters, or rope_theta, rope_scaling and partial_rotary_factor in older files.

  theta, partial: the family's defaults. local_theta: the default for sliding layers, and its older name. by_type: the
  file has one dict for each type of layer; older files scale only the full layers. types: see Window. old: the names
  that older files of the family have for rope_theta and partial_rotary_factor. original_beside: the option
  original_max_position_embeddings stands beside rope_parameters and takes precedence (Phi-3). apart: options of
  rope_parameters that say nothing of the angles; another hole reads them, or nobody. older: the family's own code knows
  rope_theta and rope_scaling alone, so that these are written.
  """

  theta: float = 10000.0
  partial: float = 1.0
  interleaved: bool = False
  by_type: bool = False
  local_theta: tuple[str, float] | None = None
  types: Callable[[Reader, int], bool] | None = None
  old: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
  original_beside: bool = False
  apart: frozenset[str] = frozenset()
  older: bool = False

  def read(self, h: Reader, i):
    theta, partial = h.get(self.old[0], self.theta), h.get(self.old[1], self.partial)
    local = self.by_type and slides(h, i, self.types)
    if self.local_theta:
      local_theta = h.get(*self.local_theta)
      theta = local_theta if local else theta
    found = dict(rope_options(h))
    if self.by_type and None in found:
      options = {} if local else found[None]
    else:
      options = found.get(SLIDING if local else FULL, {}) if None not in found else found[None]
    options = {k: v for k, v in options.items() if v is not None and k not in self.apart}
    theta, partial = options.pop("rope_theta", theta), options.pop("partial_rotary_factor", partial)
    number = isinstance(partial, (int, float))
    check(number and 0 < partial <= 1, f"partial_rotary_factor={partial!r} must lie in (0, 1]")
    scaling = _scaling(h, options)
    return {
      "kind": "rope",
      "theta": theta,
      "dims": None if partial == 1 else int(_head_dim(h) * partial),
      "interleaved": self.interleaved,
      "scaling": scaling,
    }

  def write(self, value, w: Writer, i):
    check(isinstance(value, Mapping) and value["kind"] == "rope", f"positions must be rope, not {value!r}")
    options = {"rope_theta": value["theta"]} | _scaling_options(value["scaling"], w)
    if self.original_beside and value["scaling"]:
      w.set("original_max_position_embeddings", options.get("original_max_position_embeddings"))
    if value["dims"] != value["head_dim"]:
      partial = value["dims"] / value["head_dim"]
      down = int(value["head_dim"] * partial) < value["dims"]  # transformers rounds down
      options["partial_rotary_factor"] = math.nextafter(partial, 1) if down else partial
    elif self.partial != 1:
      options["partial_rotary_factor"] = 1.0
    if self.older:
      w.set("rope_theta", options.pop("rope_theta"))
      kind = options.pop("rope_type")
      return w.set("rope_scaling", None if kind == "default" else {"type": kind} | options)
    if not self.by_type:
      return w.set("rope_parameters", options)
    kind = w.options["layer_types"][i]
    known = w.options.setdefault("rope_parameters", {}).setdefault(kind, options)
    check(known == options, f"rope_parameters[{kind!r}] would have to be {known!r} and {options!r} at once")


@dataclasses.dataclass(frozen=True)
class SomeRope:
  """Rope in layers for which `has` is true, and no positions in others; `say` writes which (None: windows tell)."""

  rope: Rope
  has: Callable[[Reader, int], bool]
  say: Callable[[Writer, int, bool], None] | None = None

  def read(self, h: Reader, i):
    rope = self.rope.read(h, i)
    return rope if self.has(h, i) else None

  def write(self, value, w: Writer, i):
    if self.say:
      self.say(w, i, value is not None)
    if value is not None:
      self.rope.write(value, w, i)


def _head_dim(h: Reader) -> int:
  given = h.options.get("head_dim", h.defaults.get("head_dim"))  # a family without such a hole does not use it up
  return given if type(given) is int else h.size("hidden_size") // h.size("num_attention_heads")


def _scaling(h: Reader, options: dict) -> dict | None:
  """Makes our scaling from the entries of rope_parameters besides theta. An entry that remains unread is an error."""
  older, kind = options.pop("type", None), options.pop("rope_type", None)
  kind = kind or older or "default"
  longest = h.get("max_position_embeddings")
  # Phi-3 has this option beside rope_parameters, and transformers gives it precedence.
  original = options.pop("original_max_position_embeddings", longest)
  original = h.get("original_max_position_embeddings", original) or longest
  take = options.pop
  try:
    match kind:
      case "default" | "mrope":  # the sections of mrope differ only where there are images
        scaling = None
      case "linear":
        scaling = {"kind": "linear", "factor": take("factor")}
      case "dynamic":
        scaling = {"kind": "dynamic_ntk", "factor": take("factor"), "original": longest}
      case "llama3":
        scaling = {"kind": "llama3", "factor": take("factor"), "original": original}
        scaling |= {"low_factor": take("low_freq_factor"), "high_factor": take("high_freq_factor")}
      case "yarn":
        factor = take("factor", longest / original)
        gain, scales = take("attention_factor", None), (take("mscale", None), take("mscale_all_dim", None))
        if gain is None and all(scales):
          gain = (0.1 * scales[0] * math.log(factor) + 1) / (0.1 * scales[1] * math.log(factor) + 1)
        scaling = {"kind": "yarn", "factor": factor, "original": original, "attention_factor": gain}
        scaling |= {"beta_fast": take("beta_fast", 32.0), "beta_slow": take("beta_slow", 1.0)}
        scaling |= {"truncate": take("truncate", True)}
      case "longrope" | "su":
        scaling = {"kind": "longrope", "original": original, "factor": take("factor", max(1.0, longest / original))}
        scaling |= {"short_factors": take("short_factor"), "long_factors": take("long_factor")}
        scaling |= {"attention_factor": take("attention_factor", None)}
      case _:
        known = "default, linear, dynamic, yarn, llama3, longrope"
        raise UserError(f"rope_parameters.rope_type={kind!r} is unknown (known: {known})")
  except UserError:
    raise
  except KeyError as e:
    raise UserError(f"rope_parameters.{e.args[0]} is missing, which rope_type={kind!r} needs") from None
  except (TypeError, ValueError, ZeroDivisionError):
    raise UserError("rope_parameters must hold numbers above 0") from None
  idle = IDLE_ROPE | ({"factor", "mrope_section", "mrope_interleaved"} if kind in ("default", "mrope") else set())
  unknown = sorted(f"rope_parameters.{key}={value!r}" for key, value in options.items() if key not in idle)
  check(not unknown, f"{', '.join(unknown)}: not known as options of rope_type={kind!r}")
  return scaling


IDLE_ROPE = {"finetuned"}  # notes among the options of a rope, which change nothing


def _scaling_options(scaling: dict | None, w: Writer) -> dict:
  """The options that describe a scaling of ours: the inverse of `_scaling`."""
  s = scaling or {"kind": None}
  gain_options = lambda: {} if s["attention_factor"] is None else {"attention_factor": s["attention_factor"]}
  original_options = lambda: {"original_max_position_embeddings": s["original"]}
  match s["kind"]:
    case None:
      return {"rope_type": "default"}
    case "linear":
      return {"rope_type": "linear", "factor": s["factor"]}
    case "dynamic_ntk":
      w.set("max_position_embeddings", s["original"])
      return {"rope_type": "dynamic", "factor": s["factor"]}
    case "llama3":
      factors = {"low_freq_factor": s["low_factor"], "high_freq_factor": s["high_factor"]}
      return {"rope_type": "llama3", "factor": s["factor"]} | original_options() | factors
    case "yarn":
      betas = {"beta_fast": s["beta_fast"], "beta_slow": s["beta_slow"]}
      betas |= {} if s["truncate"] else {"truncate": False}
      return {"rope_type": "yarn", "factor": s["factor"]} | original_options() | betas | gain_options()
    case "longrope":
      factors = {"short_factor": list(s["short_factors"]), "long_factor": list(s["long_factors"])}
      return {"rope_type": "longrope", "factor": s["factor"]} | original_options() | factors | gain_options()
  raise UserError(f"rope_parameters cannot say scaling={s['kind']}")


# --------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Row:
  """A row from their tensor to our parameter: `key`, our path (in the block, or in the decoder), and a pattern.

  In `key`, {} stands for the layer; a second {} stands for the index of our leading dimension (an expert, a head). The
  pattern is read both ways. Letters: d model, n query heads, k key-value heads, h head dim, e experts.

    "(n h) d -> d n h"     their matrix [n h, d] is our [d, n, h]
    "(c f) d -> d f"       a fused projection of several paths, whose parts lie one after another along c
    "(f c) d -> d f"       the same, but their columns take turns: part 0, part 1, part 0, part 1 ...
    "c d -> d c ..."       the last group of ours stands for all remaining dimensions: joins [d, n, h] and [d, f]

  The row has no effect if the decoder has no such parameter, or one of another rank, nor in blocks whose residual form
  is not `residual`, if that is given.
  """

  key: str
  paths: str | tuple[str, ...]
  pattern: str | None = None
  residual: str | None = None

  @property
  def parts(self) -> tuple[str, ...]:
    return (self.paths,) if isinstance(self.paths, str) else self.paths

  def fits(self, shape: tuple[int, ...]) -> bool:
    """True if our array (of one layer, of one expert) has the pattern's rank."""
    if self.pattern is None:
      return True
    groups = len(_groups(self.pattern.split("->")[1]))
    return len(shape) >= groups if "..." in self.pattern else len(shape) == groups


@dataclasses.dataclass(frozen=True)
class Rearrange:
  """A row's pattern with all sizes known: it splits one tensor of theirs into our arrays, and joins them again."""

  theirs: tuple[tuple[str, ...], ...]  # groups of axes of their tensor
  ours: tuple[tuple[str, ...], ...]
  sizes: tuple[dict[str, int], ...]  # sizes of the axes, for each part
  shapes: tuple[tuple[int, ...], ...]  # shapes of our arrays

  @classmethod
  def of(cls, pattern: str | None, shapes: list[tuple[int, ...]], known: dict[str, int]) -> "Rearrange":
    """Solves a row's pattern for the shapes of our arrays; `known` has the sizes of letters that shapes leave open."""
    if pattern is None:
      axes = tuple((f"axis{j}",) for j in range(len(shapes[0])))
      theirs = ours = axes
    else:
      theirs, ours = (_groups(side) for side in pattern.split("->"))
    merged = [(*shape[: len(ours) - 1], math.prod(shape[len(ours) - 1 :])) for shape in shapes]
    return cls(theirs, ours, tuple(_solve(ours, shape, known) for shape in merged), tuple(shapes))

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of their tensor."""
    return tuple(math.prod(map(self._total, group)) for group in self.theirs)

  def _total(self, axis: str) -> int:
    return sum(sizes[axis] for sizes in self.sizes) if axis == "c" else self.sizes[0][axis]

  def _order(self) -> list[str]:
    """The axes in our order, followed by c if each part has one entry of it."""
    ours = [axis for group in self.ours for axis in group]
    return ours + [axis for group in self.theirs for axis in group if axis not in ours]

  def split(self, x: np.ndarray, part: int) -> np.ndarray:
    """Takes our array number `part` out of their tensor."""
    axes = [axis for group in self.theirs for axis in group]
    x = x.reshape([self._total(axis) for axis in axes])
    if len(self.sizes) > 1:
      start = sum(sizes["c"] for sizes in self.sizes[:part])
      x = x[(slice(None),) * axes.index("c") + (slice(start, start + self.sizes[part]["c"]),)]
    return x.transpose([axes.index(axis) for axis in self._order()]).reshape(self.shapes[part])

  def join(self, parts: list[np.ndarray]) -> np.ndarray:
    """Joins all our arrays to their tensor: the inverse of `split`."""
    to, axes = [axis for group in self.theirs for axis in group], self._order()
    order = [axes.index(axis) for axis in to]
    flat = [x.reshape([sizes[a] for a in axes]).transpose(order) for x, sizes in zip(parts, self.sizes)]
    return (np.concatenate(flat, to.index("c")) if len(flat) > 1 else flat[0]).reshape(self.shape)


def _groups(side: str) -> tuple[tuple[str, ...], ...]:
  """Parses the groups of one side: "(n h) d" -> (("n", "h"), ("d",))."""
  found, inside = [], False
  for word in side.replace("(", " ( ").replace(")", " ) ").replace("...", "").split():
    if word in "()":
      inside = word == "("
      found += [()] if inside else []
    elif inside:
      found[-1] += (word,)
    else:
      found.append((word,))
  return tuple(found)


def _solve(groups, shape: tuple[int, ...], known: dict[str, int]) -> dict[str, int]:
  """Solves for the size of each axis; a group may have one axis that is not known beforehand."""
  sizes = known | ({} if any("c" in group for group in groups) else {"c": 1})
  for group, size in zip(groups, shape, strict=True):
    unknown = [axis for axis in group if axis not in sizes or len(group) == 1]
    if unknown:
      (axis,) = unknown
      sizes[axis] = size // math.prod(sizes[a] for a in group if a != axis)
  return sizes


# ------------------------------------------------------------------------------------------------ families

# These options have no effect on the function that a decoder computes, whatever their values.
METADATA = {
  # what transformers notes about a model, and options of its base class
  "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
  "decoder_start_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype", "torch_dtype",
  "finetuning_task", "gradient_checkpointing", "id2label", "label2id", "num_labels", "initializer_range", "init_std",
  "init_device", "is_decoder", "keys_to_ignore_at_inference", "model_type", "output_attentions",
  "output_hidden_states", "output_past", "prefix", "pretraining_tp", "problem_type", "pruned_heads", "return_dict",
  "slow_but_exact", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
  "summary_use_proj",
  "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torchscript",
  "transformers_version", "use_bfloat16", "use_cache", "_name_or_path", "_commit_hash", "_attn_implementation",
  "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation", "_experts_implementation",
  "_flash_attn_2_enabled", "use_flash_attn", "reorder_and_upcast_attn", "cache_implementation",
  # what matters in training alone
  "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout",
  "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "output_router_logits",
  "router_aux_loss_coef", "router_z_loss_coef", "neftune_noise_alpha",
  # how text is generated, in older files
  "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
  "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
  "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "length_penalty", "max_length", "max_new_tokens",
  "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
  "num_return_sequences", "output_scores", "penalty_alpha", "remove_invalid_values", "renormalize_logits",
  "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
  # notes of other programs: trainers, exporters, quantisers
  "context_window_size", "internal_version", "is_composition", "is_llama_config", "max_sequence_length",
  "model_max_length", "move_model_to_device", "prefill_chunk_size",
  "n_special", "predict_special_tokens", "selective_checkpoint_enabled", "sequence_parallel_enabled",
  "tokenizer_model_max_length", "transformers.js_config", "unsloth_fixed", "unsloth_version", "use_unsloth",
  "_load_in_4bit", "_load_in_8bit", "_pre_quantization_dtype", "pre_quantization_dtype",
}  # fmt: skip

# These options have no effect where they have one of these values, in a family whose table does not read them. Nor has
# an option that is null or empty.
IDLE = {
  "alibi": (False,), "attention_bias": (False,), "embedding_multiplier": (1,),
  "full_attn_mod": (1,), "interpolate_factor": (1,), "is_causal": (True,),
  "layer_norm_elementwise_affine": (True,), "lm_head_bias": (False,), "logit_scale": (1,), "logits_scaling": (1,),
  "mlp_bias": (False,), "n_shared_experts": (0,), "num_nextn_predict_layers": (0,), "partial_rotary_factor": (1,),
  "qk_layernorm": (False,), "qk_norm": (False,), "qkv_bias": (False,), "residual_multiplier": (1,),
  "rope_interleaved": (False,), "rotary_pct": (1,), "shared_expert_intermediate_size": (0,), "use_mrope": (False,),
  "use_parallel_residual": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,),
}  # fmt: skip

# Sizes and counts of layers under names that another family has. One that a table does not read is nowhere used, and
# the shapes of the weights are compared with those that are.
SHAPES = {"intermediate_size", "max_window_layers", "num_key_value_heads"}

# Options that have no effect where they repeat another one.
REPEATED = {"layer_norm_eps": "rms_norm_eps", "norm_eps": "rms_norm_eps"}

NOT_OURS = {"is_encoder_decoder": (False,), "add_cross_attention": (False,)}


@dataclasses.dataclass(frozen=True)
class Family:
  """A model_type of transformers.

  model, block: templates of ModelConfig (without stack and blocks) and of each BlockConfig. only: options that our
  space lacks, with the values under which they have no effect. aliases: other names of options, in older files. moot:
  options that change nothing, as METADATA. buffers: endings of keys in older files that follow from the config.
  nested: names of options that are dicts of options, such as "attn_config". more_layers: the option that counts layers
  behind the last one, which predict tokens further ahead; they are left out. beyond: other beginnings of the keys of
  such layers. defaults: what transformers takes for
  options that a file leaves out. also: other model_types of the same function.
  """

  model_type: str
  architecture: str
  model: dict
  block: dict
  rows: tuple[Row, ...]
  num_layers: str = "num_hidden_layers"
  only: dict[str, tuple] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  moot: frozenset[str] = frozenset()
  buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
  nested: tuple[str, ...] = ()
  more_layers: str | None = None
  beyond: tuple[str, ...] = ()
  also: tuple[str, ...] = ()
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def prefix(self) -> str:
    """The name of the decoder in the keys of its weights, such as "model.", which files of a bare decoder leave out."""
    embed = next(row.key for row in self.rows if row.paths == "embed")
    name, _, rest = embed.partition(".")
    return f"{name}." if "." in rest else ""

  @property
  def layer_prefixes(self) -> set[str]:
    """The words before the number of the layer in the keys of its weights, such as "model.layers."."""
    return {row.key.partition("{}")[0] for row in self.rows if "{}" in row.key}

  def read(self, options: dict) -> dict:
    """The plain data of a ModelConfig (without precision) from that of a config.json.

    Raises UserError, which names all options that are missing, have an unknown value, or are not in the table.
    """
    h = Reader(self._flat(options), self.defaults)
    blocks, model = self._fill(h)
    for key, values in (NOT_OURS | self.only).items():
      value = h.get(key, values[0])
      if value not in values:
        h.refused.add(f"{key}={reprlib.repr(value)} is not supported; this family is known with {values[0]!r}")
    # A hole that was refused may have left others unread, which are known all the same.
    known = h.used | (self._keys if h.refused else set())
    unknown = sorted(key for key in h.options.keys() - known if not self._is_idle(key, h))
    if unknown:
      said, many = ", ".join(f"{key}={reprlib.repr(h.options[key])}" for key in unknown), len(unknown) > 1
      h.refused.add(
        f"the option{'s' * many} {said} {'are' if many else 'is'} not in the table of {self.model_type}; "
        f"{'they' if many else 'it'} might change what the model computes"
      )
    check(not h.refused, "; ".join(sorted(h.refused)))
    return model | name_blocks(blocks)

  def _fill(self, h: Reader) -> tuple[list[dict], dict]:
    """The blocks and the model; what cannot be filled is noted in h.refused."""
    try:
      num_layers = h.size(self.num_layers)
      check(num_layers <= MAX_LAYERS, f"{self.num_layers}={num_layers} is above {MAX_LAYERS}")
    except UserError as e:
      h.refused.add(str(e))
      num_layers = 1
    return [fill(self.block, h, i) for i in range(num_layers)], fill(self.model, h)

  @functools.cached_property
  def _keys(self) -> set[str]:
    """The options that are read of a file that leaves all of them out."""
    h = Reader({}, self.defaults | {self.num_layers: 2})
    self._fill(h)
    return h.used

  def _is_idle(self, key: str, h: Reader) -> bool:
    """True if an option that no hole has read changes nothing at its value."""
    name, value = key.split(".")[-1], h.options[key]
    if value is None or value in ({}, []) or {key, name} & METADATA or key in self.moot | SHAPES:
      return True
    if name in REPEATED:
      return value == h.options.get(REPEATED[name])
    if name == "head_dim":
      sizes = value, h.options.get("num_attention_heads"), h.options.get("hidden_size")
      return all(type(n) is int for n in sizes) and sizes[0] * sizes[1] == sizes[2]
    return value in IDLE.get(name, ())

  def write(self, model: dict, blocks: list[dict]) -> dict:
    """The options of a config.json from the plain data of a model and its layers. Raises UserError."""
    w = Writer()
    for i, block in enumerate(blocks):
      match(self.block, block, w, i)
    match(self.model, model, w)
    w.set(self.num_layers, len(blocks))
    return self._nest(w.options) | {"model_type": self.model_type, "architectures": [self.architecture]}

  def _flat(self, options: dict) -> dict:
    for other, key in self.aliases.items():
      if other in options:
        both = key in options and options[key] != options[other]
        check(not both, f"{other}={options.get(other)!r} is another name of {key}={options.get(key)!r}; give one value")
        options = {k: v for k, v in options.items() if k != other} | {key: options[other]}
    for outer in self.nested:
      inner = options.get(outer)
      if isinstance(inner, dict):
        rest = {k: v for k, v in options.items() if k != outer}
        options = rest | {f"{outer}.{k}": v for k, v in inner.items()}
    return options

  def _nest(self, options: dict) -> dict:
    nested: dict[str, Any] = {}
    for key, value in options.items():
      outer, dot, inner = key.partition(".")
      if dot:
        nested.setdefault(outer, {})[inner] = value
      else:
        nested[key] = value
    return nested


def name_blocks(blocks: list[dict]) -> dict:
  """{"stack", "blocks"} for a list of layers: equal layers share a name, and the stack says what repeats."""
  kinds: list[dict] = []
  for block in blocks:
    if block not in kinds:
      kinds.append(block)
  if len(kinds) == 1:
    names = ["layer"]
  else:
    reach = ["global" if kind["mixer"].get("window") is None else "local" for kind in kinds]
    width = ["moe" if (kind.get("ffn") or {}).get("kind") == "moe" else "dense" for kind in kinds]
    told = [names for names in (reach, width) if len(set(names)) > 1]
    names = ["_".join(parts) for parts in zip(*told)]
    names = names if len(set(names)) == len(kinds) else [f"block{j}" for j in range(len(kinds))]
  order = [names[kinds.index(block)] for block in blocks]
  return {"stack": _stack(order), "blocks": dict(zip(names, kinds))}


def _stack(order: list[str]) -> str:
  """Writes an order by its shortest period: ["a", "a", "b", "a", "a", "b", "a"] -> "2*(2*a b) a"."""
  n = len(order)
  period = next(p for p in range(1, n + 1) if all(order[j] == order[j % p] for j in range(n)))
  turns, rest = divmod(n, period)
  inner = _runs(order[:period])
  if turns == 1:
    return " ".join(filter(None, (inner, _runs(order[period:]))))
  first = f"{turns}*{inner}" if period == 1 else f"{turns}*({inner})"
  return " ".join(filter(None, (first, _runs(order[n - rest :] if rest else []))))


def _runs(order: list[str]) -> str:
  runs: list[list] = []
  for name in order:
    if runs and runs[-1][0] == name:
      runs[-1][1] += 1
    else:
      runs.append([name, 1])
  return " ".join(name if count == 1 else f"{count}*{name}" for name, count in runs)
