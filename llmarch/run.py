"""Assembles a run from its config: the data, the initial weights, the sampler of text, and the training loop.

`llmarch train` and every trial of an ablation call `train_run`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from llmarch import sharding
from llmarch.errors import UserError, check
from llmarch.run_config import RunConfig
from llmarch.train import distributed


def keep_programs(cache_dir: str) -> None:
  """Makes JAX keep compiled programs in a folder of this user, so that a run that starts again is quick.

  cache_dir: the folder; "" means $LLMARCH_CACHE or ~/.cache/llmarch. A cache that is configured already stays.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = Path(cache_dir or os.environ.get("LLMARCH_CACHE") or "~/.cache/llmarch").expanduser() / "programs"
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # only this user may write what will be executed
  except OSError:
    return  # the run works without a cache, only slower
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def train_run(config: RunConfig, workdir: str, num_processes: int = 1) -> dict:
  """Trains `config` in `workdir`; everything that can be refused is refused before anything is compiled.

  Returns the last evaluation row (train/loop.py). Raises UserError, and whatever else the training loop raises.
  """
  mesh = sharding.device_mesh(config.mesh, num_processes) if config.mesh else None
  if config.train.init_from:  # the run records an absolute path, so that it can be resumed from any directory
    here = os.path.abspath(os.path.expanduser(config.train.init_from))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=here))

  import jax

  from llmarch.analysis import cost, hardware
  from llmarch.build import to_dict
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.train.loop import train
  from llmarch.train.workdir import check_workdir

  c = config.train
  if distributed.is_main():  # the corpus is not tokenised yet, so that bad input is refused first
    check_workdir(workdir, config)
  with distributed.main_first("data"):  # the main process writes the cache of tokens, which the others then read
    train_data = _batches(config, "train")
    eval_data = _batches(config, "validation") if config.eval.every else None
  distributed.check_same(config=json.dumps(to_dict(config)), corpus=train_data.hash, version=jax.__version__)
  text = train_data.num_bytes > 0  # a synthetic task has neither text nor a tokenizer
  tokenizer = load_tokenizer(config.data.tokenizer) if text else None
  sample = _sampler(config, tokenizer) if text and config.eval.every and config.eval.sample_tokens else None
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
  known = None not in (tokenizer, lm.tokenizer)
  check(
    not known or tokenizer.fingerprint == lm.tokenizer.fingerprint,
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

  from llmarch.infer.lm import LM, check_generates
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
