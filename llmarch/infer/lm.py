"""The language model that users hold: config, parameters and tokenizer; text or ids go in, the same kind comes out.

Everything that JAX would silently clamp or wrap is checked here, on the host, before anything is compiled.
"""

import dataclasses
import functools
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmarch import sharding
from llmarch.build import build, to_dict
from llmarch.config import ModelConfig, StateDType
from llmarch.data import companions
from llmarch.errors import UserError, check
from llmarch.files import new_folder, or_refuse
from llmarch.infer.decoder import Programs, decoding_params, make_decoder
from llmarch.infer.quantize import quantize_params
from llmarch.layers.param import flatten, unflatten
from llmarch.models.decoder import abstract
from llmarch.ops.quant import QTensor
from llmarch.ops.sampling import Sampling

STREAM = 4  # tokens between calls of a stream function, and looks for stops; fewer are smoother, more are faster
REPLY = 512  # tokens at most of a reply in a chat, unless the caller says otherwise

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class LM:
  """A decoder with its parameters (the nnx.State of the config's Decoder) and its tokenizer (None: ids only).

  weights: a format of ops/quant.py for its matrices (None: they stay as they are). kv: a format for the keys and values
  that `generate` keeps, in place of the config's precision.state. mesh: the devices over which `generate` works, with
  rows of sharding.LAYOUTS for the prompts and for the tokens after them (None: one device). end_ids: tokens that end a
  text, beside the tokenizer's.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: nnx.State,
    tokenizer=None,
    *,
    weights: str | None = None,
    kv: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    prefill_layout: str = "ws_2d",
    decode_layout: str = "ws_2d",
    end_ids: tuple[int, ...] = (),
  ):
    check(
      mesh is None or isinstance(mesh, jax.sharding.Mesh),
      f"mesh must be a jax.sharding.Mesh, such as sharding.make_mesh(sharding.parse_mesh('x=2,y=2,z=2')), not {mesh!r}",
    )
    if kv is not None:
      config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, state=_state(kv)))
    self.config = config
    self.weights = weights
    self.params = jax.tree.map(_as_kept, params, nnx.state(abstract(config)), is_leaf=_is_param)
    if weights is not None:
      self.params = quantize_params(self.params, weights)
    self.tokenizer = tokenizer
    self._end_ids = tuple(end_ids)
    self._place = {"mesh": mesh, "prefill_layout": prefill_layout, "decode_layout": decode_layout}
    if mesh is not None:
      self._layouts = [sharding.find_layout(name, mesh) for name in (prefill_layout, decode_layout)]
      sharding.shardings(self.params, self._layouts[0], mesh)  # raises UserError unless the mesh divides all

  def __repr__(self) -> str:
    """One line, such as LM(793,728 parameters, float32, 4 layers, d_model 128, vocabulary 264, on cpu:0)."""
    c, mesh = self.config, self._place["mesh"]
    named = flatten(nnx.state(abstract(c)), variables=True)
    count = sum(math.prod(param.shape) for param in named.values())
    stored = f"matrices in {self.weights}" if self.weights else c.precision.param
    if mesh is None:
      where = "on " + ", ".join(sorted(str(device) for device in jax.tree.leaves(self.params)[0].devices()))
    else:
      where = "over a mesh of " + ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    return (
      f"LM({count:,} parameters, {stored}, {len(c.layers)} layers, d_model {c.d_model}, vocabulary {c.vocab_size},"
      f" {where})"
    )

  @functools.cached_property
  def _decoding_params(self) -> nnx.State:
    params = decoding_params(self.config, self.params)  # a second copy, made by the first `generate`
    mesh = self._place["mesh"]
    return params if mesh is None else jax.device_put(params, sharding.shardings(params, self._layouts[0], mesh))

  def _rows_at_a_time(self, rows: int) -> int:
    """The next number of rows that the mesh can split; surplus rows of a batch stay empty."""
    if self._place["mesh"] is None:
      return rows
    names = ("batch", "cache_batch")
    ways = [sharding.ways(name, layout, self._place["mesh"]) for layout in self._layouts for name in names]
    return -(-rows // math.lcm(*ways)) * math.lcm(*ways)

  def logits(self, input_ids, attention_mask=None) -> np.ndarray:
    """Maps ids [B, T] to float32 logits [B, T, V]; those at [b, t] are of the token after token t.

    attention_mask [B, T]: 1 for tokens, 0 for padding, on either side. Logits at padding are 0.
    """
    rows = _nested_list(input_ids)
    batch = isinstance(rows, list) and bool(rows) and all(isinstance(row, list) for row in rows)
    check(batch, "input_ids must be a batch of sequences [B, T]")
    shape = len(rows), len(rows[0])
    check(all(len(row) == shape[1] for row in rows), "input_ids has rows of unequal length; pad and mask them")
    try:
      mask = np.ones(shape, bool) if attention_mask is None else np.asarray(attention_mask)
    except ValueError:  # its rows have unequal lengths
      raise UserError(f"attention_mask must be an array of 0 and 1 of shape {shape}, as input_ids") from None
    check(mask.shape == shape, f"attention_mask has shape {mask.shape}, input_ids {shape}; make them equal")
    check(np.isin(mask, (0, 1)).all(), "attention_mask must hold 0 and 1 only")
    # Sequences are padded further on the right, so that few shapes are compiled.
    tokens = np.zeros((shape[0], bucket(shape[1], 16)), np.int32)
    positions = np.full_like(tokens, -1)
    for i, row in enumerate(rows):
      real = np.flatnonzero(mask[i])
      tokens[i, real] = self._check_ids(f"input_ids[{i}]", [row[t] for t in real])
      positions[i, real] = np.arange(len(real))
    logits = np.asarray(_scorer(self.config)(self.params, tokens, positions))[:, : shape[1]]
    return np.where(mask.astype(bool)[..., None], logits, np.float32(0))

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The tokens that end a text, as the checkpoint and its tokenizer name them."""
    named = (*self._end_ids, *(self.tokenizer.end_ids if self.tokenizer else ()))
    return tuple(sorted({i for i in named if i < self.config.vocab_size}))  # some configs name ids that do not exist

  @property
  def suggested(self) -> dict:
    """Returns the sampling that generation_config.json recommends, as options of `generate`; {} if it names none."""
    return self.tokenizer.companions.sampling if self.tokenizer else {}

  def generate(
    self,
    prompts,
    *,
    max_new_tokens: int,
    stop=(),
    special: bool = True,
    stream: Callable[[int, str | list[int]], None] | None = None,
    **options,
  ):
    """Continues each prompt; the result does not repeat the prompt.

    A text gives a text, and a list of texts a list of texts. A list of ids gives a list, an array of ids a NumPy array
    (int32 if its own dtype cannot hold every id), and several of them give a list. A text begins as the tokenizer's
    makers begin one (<s>, <bos>), while ids are taken as they are. A row ends after max_new_tokens, or before a token
    of `end_ids`, or before a stop: an id, or a text, wherever it comes in the row's text.

    special: whether special tokens that a prompt or a stop spells out ("<|im_end|>") are tokens; otherwise they are
    plain text. stream(row, piece) is called with each new piece of text or ids. Instead of prompts, rows that have been
    begun (`Continuation`) may be given. Raises UserError for bad input before anything is compiled, and for logits that
    are not finite.

    The options that sample are the fields of ops.sampling.Sampling (temperature, top_k, top_p, min_p,
    repetition_penalty); without them, decoding is greedy. A row's draws depend only on `seed`, the row's number and its
    own tokens. Further options: batch, rows decoded at a time (None: all). chunk, prompt tokens at a time (rounded up
    to a power of two). prefix: the prompt's tokens see each other both ways, as in prefix-LM training. context: the
    length of text for which positions that scale with it are computed (LongRoPE, dynamic NTK); None: each prompt's own.
    """
    single, prompts = _as_list("prompts", prompts)
    check(isinstance(special, bool), f"special must be True or False, got {special!r}")
    stop_ids, stops = self.parse_stops(stop, special)
    rows = [
      p if isinstance(p, Continuation) else Continuation(self, p, self._read(p, f"prompts[{i}]", special), stops=stops)
      for i, p in enumerate(prompts)
    ]
    self._continue(rows, max_new_tokens=max_new_tokens, stop_ids=stop_ids, stream=stream, **options)
    results = [row.result() for row in rows]
    return results[0] if single else results

  def chat(
    self,
    messages,
    *,
    max_new_tokens: int | None = None,
    stop=(),
    stream: Callable[[int, str], None] | None = None,
    variables: dict | None = None,
    **options,
  ) -> str:
    """Returns the model's reply to messages such as {"role": "user", "content": "Hello"}, the newest last.

    The checkpoint's chat template writes them as one prompt; `variables` are what it may read beside them (tools,
    enable_thinking ...). max_new_tokens: None means what the context has room for, and 512 at most. The other arguments
    are those of `generate`. Raises UserError for a model without a template, and for messages that it refuses.
    """
    stop_ids, stops = self.parse_stops(stop, True)
    row = self.begin_reply(messages, stops=stops, variables=variables)
    if max_new_tokens is None:
      max_new_tokens = max(1, min(REPLY, self.config.max_seq_len - len(row.prompt_ids)))
    self._continue([row], max_new_tokens=max_new_tokens, stop_ids=stop_ids, stream=stream, **options)
    return row.result()

  def begin_reply(self, messages, *, stops: tuple[str, ...] = (), variables: dict | None = None) -> "Continuation":
    """The reply to messages before it has any text."""
    from llmarch.infer.chat import render

    check(self.tokenizer is not None, "this model has no tokenizer, so it cannot chat; put its tokenizer.json there")
    beside = self.tokenizer.companions
    check(
      beside.template is not None,
      "this model has no chat template; put chat_template.jinja, or a tokenizer_config.json that has one, beside its"
      " tokenizer.json, or use `generate`",
    )
    named = {name: text for name in companions.NAMED if (text := beside.named(name)) is not None}
    text = render(beside.template, messages, **named, **(variables or {}))
    return Continuation(self, text, self.tokenizer.encode(text, special=True), stops=stops)

  def _continue(
    self,
    rows: "list[Continuation]",
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    batch: int | None = None,
    chunk: int = 256,
    prefix: bool = False,
    context: int | None = None,
    stream: Callable[[int, str | list[int]], None] | None = None,
    **sampling,
  ) -> None:
    """Lets each row run to its end; `generate` says what the arguments are."""
    n, seed, chunk = _whole("max_new_tokens", max_new_tokens, 1), _whole("seed", seed, 0), _whole("chunk", chunk, 1)
    for i, row in enumerate(rows):
      self._check_ids(f"prompts[{i}]", row.prompt_ids, n)
    check(seed < 2**32, f"seed must be below 2^32, got {seed}")
    check(context is None or _whole("context", context, 1) < 2**31, f"context must be below 2^31, got {context}")
    check(stream is None or callable(stream), f"stream must be a function of (row, piece), got {stream!r}")
    batch = self._rows_at_a_time(len(rows) if batch is None else min(_whole("batch", batch, 1), len(rows)))
    longest = max(len(row.prompt_ids) for row in rows)
    widest = max(16, _power_of_two(longest))
    chunk = widest if prefix else min(_power_of_two(chunk), widest)
    programs = make_decoder(
      self.config,
      batch=batch,
      max_len=max(chunk, bucket(longest + n - 1, 64)),
      chunk=chunk,
      sampling=build(Sampling, {name: _plain(value) for name, value in sampling.items()}, "generate"),
      stop_ids=tuple(sorted({*self.end_ids, *stop_ids})),
      prefix=prefix,
      weights=self.weights,
      **self._place,
    )
    for first in range(0, len(rows), batch):
      self._decode(programs, rows[first : first + batch], first, batch, chunk, n, seed, context, stream)

  def _decode(self, programs: Programs, rows, first: int, batch: int, chunk: int, n: int, seed: int, context, stream):
    """Runs the rows numbered from `first` to their ends; a batch that they do not fill has rows without tokens."""
    lengths = np.array([len(row.prompt_ids) for row in rows] + [0] * (batch - len(rows)), np.int32)
    width = -(-int(max(lengths)) // chunk) * chunk
    # Prompts are padded on the left, so that the last column holds the last token of every row.
    positions = np.maximum(np.arange(width) - (width - lengths[:, None]), -1).astype(np.int32)
    tokens = np.zeros((batch, width), np.int32)
    tokens[positions >= 0] = np.concatenate([row.prompt_ids for row in rows])

    params = self._decoding_params
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(first, first + batch))
    carry = programs.start(keys, jnp.asarray(lengths if context is None else np.full_like(lengths, context)))
    for t in range(0, width, chunk):
      carry = programs.prefill(params, carry, tokens[:, t : t + chunk], positions[:, t : t + chunk])
    carry = programs.switch(carry)
    new, left = np.array(carry["token"])[:, None], n - 1
    slices = STREAM if stream or any(row.stops for row in rows) else n
    while True:
      stopped = np.zeros(batch, bool)
      for i, row in enumerate(rows):
        piece = row.push([int(token) for token in new[i] if token >= 0], last=not left or new[i, -1] < 0)
        stopped[i] = row.stopped
        if stream and piece:
          stream(first + i, piece)
      for i in np.flatnonzero(carry["bad"]):
        raise UserError(
          f"the logits of prompts[{first + i}] are not finite after {len(rows[i].new_ids)} new tokens; the"
          f" parameters are damaged, or overflow in {self.config.precision.compute}"
        )
      if not left or (stopped | (new[:, -1] < 0)).all():
        return
      if stopped.any():  # the program knows of stop ids alone
        ended = np.where(stopped, np.int32(-1), np.array(carry["token"]))
        carry = {**carry, "token": jax.device_put(ended, carry["token"].sharding)}
      carry, new, steps = programs.decode(params, carry, min(left, slices))
      new, left = np.array(new)[:, : int(steps)], left - int(steps)

  def arrays(self) -> dict[str, np.ndarray]:
    """The parameters by name: {"stack/segments/0/blocks/0/mixer/q": array, ...}."""
    return {name: np.asarray(value) for name, value in flatten(self.params).items()}

  def save(self, directory: str | os.PathLike) -> None:
    """Writes a model folder: config.json, model.safetensors, tokenizer.json. It appears as a whole or not at all.

    An older model folder of that name is replaced. Raises UserError, and changes nothing, if the folder holds anything
    else.
    """
    check(self.weights is None, f"weights={self.weights} cannot be saved; load the model without it, and save that")
    target = Path(directory).absolute()
    _check_replaceable(target)
    flat = self.arrays()
    checksums = {name: zlib.crc32(np.ascontiguousarray(value).view(np.uint8)) for name, value in flat.items()}
    from safetensors.numpy import save_file

    refusal = or_refuse(f"cannot write {target}", "give a folder that can be written")
    with refusal, new_folder(target, replace=True) as new:
      (new / CONFIG).write_text(json.dumps({"format": FORMAT, "model": to_dict(self.config)}, indent=1))
      save_file(flat, new / WEIGHTS, metadata={"crc32": json.dumps(checksums)})
      if self.tokenizer:
        self.tokenizer.save(new)
      elif self._end_ids:
        (new / companions.GENERATION).write_text(json.dumps({"eos_token_id": list(self._end_ids)}, indent=2) + "\n")

  # ---------------------------------------------------------------------------------------------- checks

  def _read(self, prompt, name: str, special: bool) -> list[int]:
    if isinstance(prompt, str):
      check(self.tokenizer is not None, f"{name} is a text, but this model has no tokenizer; give ids")
      prompt = self.tokenizer.encode_prompt(prompt, special)
    return _nested_list(prompt)

  def _check_ids(self, name: str, ids: list, new: int = 0) -> list[int]:
    V, limit = self.config.vocab_size, self.config.max_seq_len
    check(len(ids) > 0, f"{name} is empty; give at least one token")
    for kind in set(map(type, ids)):
      check(_is_whole(kind), f"{name} holds a {kind.__name__}; token ids are integers")
    for token in (min(ids), max(ids)):
      check(0 <= token < V, f"{name} holds the token {token}; ids run from 0 to {V - 1} (model.vocab_size={V})")
    more = f" and max_new_tokens={new}, together" if new else ","
    mend = "shorten it, or lower max_new_tokens" if new else "shorten it"
    check(len(ids) + new <= limit, f"{name} has {len(ids)} tokens{more} above model.max_seq_len={limit}; {mend}")
    return ids

  def parse_stops(self, stop, special: bool) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The stops that are ids, and those that are texts. Special tokens and SentencePiece's pieces are ids."""
    ids, texts = [], []
    for item in stop if isinstance(stop, (list, tuple, set, np.ndarray)) else [stop]:
      if not isinstance(item, str):
        check(_is_whole(type(item)), f"stop holds {item!r}; give token ids or texts")
        ids.append(int(item))
        continue
      check(self.tokenizer is not None, f"stop: {item!r} is a text, but this model has no tokenizer; give ids")
      check(bool(item), "stop: '' comes before every token; give a text that has a character, or an id")
      found = [self.tokenizer.special_id(item) if special else None, self.tokenizer.piece_id(item)]
      ids += [i for i in found if i is not None]
      if found[0] is None:  # a special token is no part of a text
        texts.append(item)
    return tuple(ids), tuple(texts)


class TextStream:
  """The text of ids that come piece by piece, after the text of a prompt, up to the first of some stops."""

  def __init__(self, tokenizer, prompt_ids: list[int], stops: tuple[str, ...] = ()):
    self._tokenizer, self._prompt_ids, self._stops = tokenizer, prompt_ids, stops
    self._ids: list[int] = []
    self._text = ""
    self.given = 0  # characters that `push` has returned
    self.stopped = False

  def push(self, ids: list[int], *, last: bool = False) -> str:
    """Takes ids and returns the new text, up to the stop that is complete first.

    Unless last, it holds back a character whose bytes are incomplete, and what may be the beginning of a stop.
    """
    if not self.stopped:
      self._take(ids)
    text = self._text if last or self.stopped else self._text.rstrip("\ufffd")
    if not (last or self.stopped):
      starts = (k for stop in self._stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
      text = text[: len(text) - max(starts, default=0)]
    start, self.given = self.given, max(self.given, len(text))
    return text[start : self.given]

  def _take(self, ids: list[int]) -> None:
    text = self.text_of(self._ids + ids)
    if any(stop in text for stop in self._stops) and len(ids) > 1:
      for i in ids:  # one by one, so that the result does not depend on how many came together
        if not self.stopped:
          self._take([i])
      return
    self._ids, self._text = self._ids + ids, text
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self._text, self.stopped = text[: min(found)], True

  def text_of(self, ids: list[int]) -> str:
    """The text of these ids after the prompt."""
    # Ids are decoded after their prompt, because some tokenizers drop a leading space of the text that they decode.
    before, text = (self._tokenizer.decode(ids) for ids in (self._prompt_ids, self._prompt_ids + ids))
    return text[len(before) :] if text.startswith(before) else self._tokenizer.decode(ids)

  def __str__(self) -> str:
    return self._text


class Continuation:
  """A prompt and its continuation so far; the result is of the prompt's kind."""

  def __init__(self, lm: LM, prompt, prompt_ids: list[int], *, stops: tuple[str, ...] = ()):
    self.prompt_ids, self.stops, self.dtype = prompt_ids, stops, None
    self.new_ids: list[int] = []
    self.pieces: list[tuple[float, int]] = []  # when tokens came, and how many
    self.is_text = isinstance(prompt, str)
    self.text = TextStream(lm.tokenizer, prompt_ids, stops) if self.is_text or stops else None
    self._given = 0  # ids that `push` has returned
    if not isinstance(prompt, (str, list, tuple)):
      dtype = np.asarray(prompt).dtype
      holds = np.issubdtype(dtype, np.integer) and np.iinfo(dtype).max >= lm.config.vocab_size - 1
      self.dtype = dtype if holds else np.int32

  @property
  def stopped(self) -> bool:
    return self.text is not None and self.text.stopped

  def push(self, ids: list[int], *, last: bool) -> str | list[int]:
    """Takes ids and returns what is new of the result."""
    if self.stopped:
      return "" if self.is_text else []
    self.new_ids += ids
    self.pieces.append((time.perf_counter(), len(ids)))
    if self.text is None:
      return ids
    piece = self.text.push(ids, last=last)
    if self.is_text:
      return piece
    start = self._given
    if last and not self.stopped:
      self._given = len(self.new_ids)
    while self._given < len(self.new_ids):  # ids whose text lies before the stop, or what may be its beginning
      if len(self.text.text_of(self.new_ids[: self._given + 1])) > self.text.given:
        break
      self._given += 1
    if self.stopped:
      self.new_ids = self.new_ids[: self._given]
    return self.new_ids[start : self._given]

  def result(self):
    if self.is_text:
      return str(self.text)
    return self.new_ids if self.dtype is None else np.array(self.new_ids, self.dtype)


def _is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


def _as_kept(param: nnx.Param, kept: nnx.Param) -> nnx.Param:
  """The parameter on the device: in the dtype that the config gives it, or quantised if it is so already."""
  value = param.get_value()
  return param.replace(value if isinstance(value, QTensor) else jnp.asarray(value, kept.get_value().dtype))


def _state(kv: str) -> str:
  return build(StateDType, kv, "kv")


def load_saved(directory: str | os.PathLike, tokenizer=None, **options) -> LM:
  """Loads the model of a folder that `LM.save` wrote, with options of `LM`.

  Raises UserError if anything in it is damaged or does not fit.
  """
  import llmarch.layers.registry  # noqa: F401  lets the kinds of mixers, ffns, norms and positions join their families

  folder = Path(directory)
  try:
    data = json.loads((folder / CONFIG).read_text())
  except (OSError, ValueError, RecursionError) as e:
    why = getattr(e, "strerror", None) or "not JSON"
    raise UserError(f"cannot read {folder / CONFIG} ({why}); give a folder that LM.save wrote, or a run's") from None
  if not isinstance(data, dict) or data.get("format") != FORMAT:
    raise UserError(
      f"{folder / CONFIG} is not of a model of format {FORMAT}; give a folder that LM.save wrote,"
      " or a run that has a checkpoint"
    )
  config = build(ModelConfig, data.get("model"), "model")
  flat = _read_weights(folder / WEIGHTS)
  try:
    params = unflatten(nnx.state(abstract(config)), flat, same_dtypes=True)
  except UserError as e:
    raise UserError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {e}") from None
  return LM(config, params, tokenizer, **options)


def _read_weights(path: Path) -> dict[str, np.ndarray]:
  """Reads all arrays of the file; checks their checksums, and that all values are finite."""
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="numpy") as f:
      flat = {name: f.get_tensor(name) for name in f.keys()}
      checksums = json.loads((f.metadata() or {}).get("crc32", "{}"))
  except (SafetensorError, OSError, ValueError) as e:
    raise UserError(f"{path} is damaged or missing ({e}); restore it, or save the model again") from None
  for name, value in flat.items():
    check(zlib.crc32(value.view(np.uint8)) == checksums.get(name), f"{path}: {name} is damaged; restore the file")
    check(np.isfinite(value.astype(np.float32)).all(), f"{path}: {name} holds values that are not finite")
  return flat


def _check_replaceable(target: Path) -> None:
  """Raises UserError unless the target is absent, an empty folder, or a model, which `save` may replace."""
  found = {p.name for p in target.iterdir()} if target.is_dir() else set()
  check(target.is_dir() or not target.exists(), f"{target} is a file; give a folder for the model")
  if found:
    ours = WEIGHTS in found and found <= {CONFIG, WEIGHTS, TOKENIZER, *companions.FILES}
    check(ours, f"{target} holds other files than a model's; give a new folder")


@functools.lru_cache(maxsize=16)
def _scorer(config: ModelConfig):
  graph = nnx.graphdef(abstract(config))
  return jax.jit(lambda params, tokens, positions: nnx.merge(graph, params)(tokens, positions)[0])


def bucket(n: int, least: int) -> int:
  """Rounds n up to one of four sizes an octave, at least `least` apart, so that few programs are compiled."""
  step = max(least, _power_of_two(n) // 8)
  return -(-n // step) * step


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()


def _as_list(name: str, prompts) -> tuple[bool, list]:
  """(True if it is a single prompt, the list of prompts)."""
  if isinstance(prompts, str) or getattr(prompts, "ndim", 2) == 1:
    return True, [prompts]
  several = isinstance(prompts, (list, tuple, bytes)) or getattr(prompts, "ndim", 0)
  check(several, f"{name} must be a text, token ids, or a list of them, got {prompts!r}")
  check(len(prompts) > 0, f"{name} is empty; give a text or token ids")
  if isinstance(prompts[0], (str, list, tuple, Continuation)) or getattr(prompts[0], "ndim", 0):
    return False, list(prompts)
  return True, [prompts]


def _nested_list(ids) -> list:
  """Turns arrays into lists, whose elements keep the type that they came with."""
  if hasattr(ids, "tolist"):
    return ids.tolist()
  check(isinstance(ids, (list, tuple)), f"token ids must be a list or an array, got {ids!r}")
  return [_nested_list(i) if isinstance(i, (list, tuple)) or hasattr(i, "tolist") else i for i in ids]


def _is_whole(kind: type) -> bool:
  return issubclass(kind, (int, np.integer)) and kind is not bool


def _whole(name: str, value, least: int) -> int:
  check(_is_whole(type(value)) and value >= least, f"{name} must be a whole number of at least {least}, got {value!r}")
  return int(value)


def _plain(value):
  """Turns a scalar of NumPy or JAX into a Python number."""
  return value.item() if getattr(value, "ndim", 1) == 0 else value
