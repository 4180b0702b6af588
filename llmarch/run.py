"""Assembles a run from its config: the data, the initial weights, the sampler of text, and the training loop.

`llmarch train` and every trial of an ablation call `train_run`.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

from llmarch import sharding
from llmarch.errors import UserError, check
from llmarch.files import absolute_path, cache_folder, local_path
from llmarch.run_config import JSONL, RunConfig, TextFiles, TokenFile
from llmarch.train import distributed


def keep_programs(cache_dir: str) -> None:
  """Makes JAX keep compiled programs in a folder of this user, so that a run that starts again is quick.

  cache_dir: the folder; "" means $LLMARCH_CACHE or ~/.cache/llmarch. A cache that is configured already stays.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = Path(cache_folder(cache_dir)) / "programs"
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # only this user may write what will be executed
  except OSError:
    return  # the run works without a cache, only slower
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def train_run(config: RunConfig, workdir: str, num_processes: int = 1, branch=None) -> dict:
  """Trains `config` in `workdir`; everything that can be refused is refused before anything is compiled.

  branch: a checkpoint of another run to start from (train/branch.py). Returns the last evaluation row (train/loop.py).
  Raises UserError, and whatever else the training loop raises.
  """
  workdir = local_path(workdir, "--workdir")
  config = with_absolute_paths(config)
  check_settings(config)
  mesh = sharding.device_mesh(config.mesh, num_processes) if config.mesh else None

  import jax

  from llmarch.analysis import cost, hardware
  from llmarch.build import to_dict
  from llmarch.data.synthetic import TASKS
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.train.checkpoint import needs_weights
  from llmarch.train.loop import train
  from llmarch.train.step import check_trains
  from llmarch.train.workdir import check_workdir

  c = config.train
  check_trains(config, mesh)
  if distributed.is_main():  # the corpus is not tokenised yet, so that bad input is refused first
    check_workdir(workdir, config)
    if branch:
      branch.check(workdir, config)
  absent = bool(c.init_from) and not Path(c.init_from).exists() and needs_weights(config, workdir)
  absent = absent and (branch is None or c.lora is not None)
  check(not absent, f"train.init_from: there is no {c.init_from}; give the folder of a model")
  text = type(config.data.source) not in TASKS  # a synthetic task has neither text nor a tokenizer
  tokenizer = load_tokenizer(config.data.tokenizer, config.data.document_end) if text else None
  sample = _sampler(config, tokenizer) if text and config.eval.every and config.eval.sample_tokens else None
  with distributed.main_first("data"):  # the main process writes the cache of tokens, which the others then read
    train_data = _batches(config, "train")
    eval_data = _batches(config, "validation") if config.eval.every else None
  if eval_data and distributed.is_main():
    _say_short_split(config.eval.batches, eval_data)
  distributed.check_same(config=json.dumps(to_dict(config)), corpus=train_data.hash, version=jax.__version__)
  devices = list(mesh.devices.flat) if mesh else jax.devices()[:1]
  if sample and distributed.several() and not _fits_one(config.model, devices):
    sample = None
    if distributed.is_main():
      print("no samples: the parameters are too large for one device", file=sys.stderr)
  flops = cost.train_flops_per_token(config.model, c.seq_len, frozen=c.lora is not None)
  peak = hardware.peak_flops(devices[0], config.model.precision.compute)
  if distributed.is_main():
    _announce(config, train_data, cost.params(config.model)["total"], flops, devices, peak)
  return train(
    config,
    workdir,
    train_data,
    eval_data,
    mesh=mesh,
    sample=sample,
    flops_per_token=flops,
    peak_flops=peak and peak * len(devices),
    tokenizer=tokenizer,
    weights=(lambda: _weights(config, tokenizer)) if c.init_from else None,
    branch=branch,
  )


def with_absolute_paths(config: RunConfig) -> RunConfig:
  """The config with `~` expanded and all paths absolute, so that the run can be resumed from any directory."""
  data, train = config.data, config.train
  full = lambda value, key: absolute_path(value, key) if value else value
  source = data.source
  if isinstance(source, TextFiles | JSONL):
    paths = tuple(absolute_path(path, "data.source.paths") for path in source.paths)
    source = dataclasses.replace(source, paths=paths)
  elif isinstance(source, TokenFile):
    source = dataclasses.replace(source, path=absolute_path(source.path, "data.source.path"))
  tokenizer = data.tokenizer if data.tokenizer == "bytes" else full(data.tokenizer, "data.tokenizer")
  cache_folder(data.cache_dir)  # raises UserError for an address; it may lie elsewhere on each host
  return dataclasses.replace(
    config,
    data=dataclasses.replace(data, source=source, tokenizer=tokenizer),
    train=dataclasses.replace(train, init_from=full(train.init_from, "train.init_from")),
  )


def check_settings(config: RunConfig) -> None:
  """Raises UserError for settings that cancel each other, which an old run may still have in its config.json."""
  c, e = config.checkpoint, config.eval
  check(
    not config.log.wandb or importlib.util.find_spec("wandb") is not None,
    f"log.wandb={config.log.wandb!r} needs the package wandb; run pip install 'llmarch[wandb]', or leave log.wandb out",
  )
  check(
    not c.keep_best or (e.every and c.every and c.every % e.every == 0),
    f"checkpoint.keep_best={c.keep_best} keeps checkpoints by their eval/loss, and with checkpoint.every={c.every} and"
    f" eval.every={e.every} some or all have none; make checkpoint.every a multiple of eval.every, or set keep_best=0",
  )


def _say_short_split(batches: int, data) -> None:
  """Says that an evaluation is longer than the validation split, where that is so."""
  rows = data.num_rows
  if rows is not None and batches * data.batch_size > rows:
    print(
      f"eval.batches={batches} of {data.batch_size} rows are more than the {rows} rows of the validation split; each"
      " of its rows counts once",
      file=sys.stderr,
    )


def _batches(config, split: str):
  """The batches of a split, "train" or "validation" (data.pipeline.Pipeline)."""
  from llmarch.data.pipeline import make_pipeline

  return make_pipeline(
    config.data,
    batch_size=config.train.batch_size,
    seq_len=config.train.seq_len,
    seed=config.seed if split == "train" else 0,  # runs with any seed are judged on the same text
    vocab_size=config.model.vocab_size,
    split=split,
    prefix=config.train.loss == "prefix",
  )


def _weights(config, tokenizer) -> dict:
  """The parameters of train.init_from by name, as this config has them.

  Raises UserError if a name or a shape is not the config's, or if the text is encoded by another tokenizer. Any other
  difference between the models (a window, an activation) changes what they compute, and is printed.
  """
  import numpy as np
  from flax import nnx

  import llmarch
  from llmarch.build import differences, to_dict
  from llmarch.layers.param import flatten, unflatten
  from llmarch.models.decoder import abstract

  source = config.train.init_from
  lm = llmarch.load(source)
  wanted = nnx.state(abstract(config.model))
  try:
    params = flatten(unflatten(wanted, flatten(lm.params)))
  except UserError as e:
    raise UserError(f"train.init_from: {source} does not fit config.model: {e}") from None
  known, end = None not in (tokenizer, lm.tokenizer), config.data.document_end
  check(
    not known or tokenizer.fingerprint == (lm.tokenizer.with_end(end) if end else lm.tokenizer).fingerprint,
    f"train.init_from: {source} has another tokenizer than data.tokenizer={config.data.tokenizer!r}; set"
    f" data.tokenizer={source!r}",
  )
  other = differences(to_dict(config.model), to_dict(lm.config), "model")
  if other:
    print(f"train.init_from: the model there differs: {'; '.join(other[:8])}", file=sys.stderr)
  return {name: np.asarray(value, p.dtype) for (name, value), p in zip(params.items(), flatten(wanted).values())}


def _fits_one(model, devices: list) -> bool:
  """True if one device can hold all parameters beside its part of the state, so that the main process can sample there.

  The state counts as four times the parameters in f32: the parameters, their gradients and two moments.
  """
  import jax

  from llmarch.analysis import cost

  count = cost.params(model)["total"]
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))  # CPUs report no limit
  return count * (jax.numpy.dtype(model.precision.param).itemsize + 16 / len(devices)) < limit


def _announce(config, data, params: int, flops: float, devices: list, peak: float | None) -> None:
  c = config.train
  lines = [
    f"model: {config.model.stack}, {params:,} parameters{_adapted(config)}",
    f"data: {data.num_bytes:,} bytes, {data.num_tokens:,} tokens in the train split ({config.data.source.kind})",
    f"work: {c.steps} steps of {c.batch_size} x {c.seq_len} tokens on {len(devices)} x {devices[0].device_kind}",
  ]
  if peak:
    what = f"{flops:,.0f} FLOPs ({4 if c.lora else 6} a weight, and attention's)"
    lines.append(f"mfu = tokens/s * {what} / {peak * len(devices):.3g} FLOP/s peak")
  print("\n".join(lines), file=sys.stderr)


def _adapted(config) -> str:
  if config.train.lora is None:
    return ""
  from llmarch.adapt.lora import Adapters

  c = config.train.lora
  frozen = "" if c.weights is None else f", frozen matrices in {c.weights}"
  return f", frozen; trained: {Adapters(c, config.model).size:,} of adapters of rank {c.rank}{frozen}"


def _sampler(config, tokenizer):
  """Makes a function from params to the prompt and its continuation. Raises UserError if the model cannot generate."""
  import jax
  from flax import nnx

  from llmarch.infer.decoder import check_generates
  from llmarch.infer.lm import LM
  from llmarch.layers.param import unflatten
  from llmarch.models.decoder import abstract

  e = config.eval
  length = len(tokenizer.encode_prompt(e.sample_prompt, special=True))
  limit, mend = config.model.max_seq_len, "or set eval.sample_tokens=0"
  try:
    check_generates(config.model)
  except UserError as why:
    raise UserError(f"eval.sample_tokens={e.sample_tokens}: {why}; set it to 0") from None
  check(length > 0, f"eval.sample_prompt is empty; give a text to continue, {mend}")
  check(length < limit, f"eval.sample_prompt has {length} tokens of model.max_seq_len={limit}; shorten it, {mend}")
  n = min(e.sample_tokens, limit - length)
  shapes = nnx.state(abstract(config.model))

  def sample(params: dict) -> str:
    lm = LM(config.model, unflatten(shapes, jax.device_get(params)), tokenizer)
    return e.sample_prompt + lm.generate(e.sample_prompt, max_new_tokens=n, temperature=e.temperature, seed=config.seed)

  return sample
