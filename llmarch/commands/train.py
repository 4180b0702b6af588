"""`llmarch train`: a config and a workdir in; a trained, checkpointed, sampled model out."""

import sys

from absl import flags

from llmarch.commands.common import device_mesh, load_config, parse_flags, split_overrides
from llmarch.config import UserError, check

USAGE = "llmarch train --config=FILE|PRESET --workdir=DIR [--config.a.b=value ...]"


def _define(values: flags.FlagValues) -> None:
  text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=values)
  text("config", "config file (FILE.py or FILE.py:argument), preset or run folder")
  text("workdir", "folder of the run; resumed if it holds the same config")


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  args = parse_flags(argv, _define, USAGE)
  if not args.workdir:
    raise UserError("--workdir is missing; give a folder for the run")
  config = load_config(args.config, overrides)
  run(config, args.workdir)
  return 0


def run(config, workdir: str) -> dict:
  """Trains `config` in `workdir`; everything that can be refused is refused before anything is compiled."""
  mesh = device_mesh(config.mesh) if config.mesh else None

  import jax

  from llmarch.analysis import cost, hardware
  from llmarch.data.pipeline import make_pipeline
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.train.checkpoint import check_workdir
  from llmarch.train.loop import train

  c = config.train
  check_workdir(workdir, config)  # before the corpus is tokenised
  make = lambda split: make_pipeline(
    config.data,
    batch_size=c.batch_size,
    seq_len=c.seq_len,
    seed=config.seed,
    vocab_size=config.model.vocab_size,
    split=split,
    prefix=c.loss == "prefix",
  )
  train_data, eval_data = make("train"), make("validation") if config.eval.every else None
  text = train_data.num_bytes > 0  # a synthetic task has none, nor a tokenizer
  tokenizer = load_tokenizer(config.data.tokenizer) if text else None
  sample = _sampler(config, tokenizer) if text and config.eval.every and config.eval.sample_tokens else None
  devices = list(mesh.devices.flat) if mesh else jax.devices()[:1]
  flops = cost.train_flops_per_token(config.model, c.seq_len)
  peak = hardware.peak_flops(devices[0], config.model.precision.compute)
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
  )


def _announce(config, data, params: int, flops: float, devices: list, peak: float | None) -> None:
  c = config.train
  lines = [
    f"model: {config.model.stack}, {params:,} parameters",
    f"data: {data.num_bytes:,} bytes, {data.num_tokens:,} tokens in the train split ({config.data.source.kind})",
    f"work: {c.steps} steps of {c.batch_size} x {c.seq_len} tokens on {len(devices)} x {devices[0].device_kind}",
  ]
  if peak:
    lines.append(
      f"mfu = tokens/s * {flops:,.0f} FLOPs (6 a weight, and attention's) / {peak * len(devices):.3g} FLOP/s peak"
    )
  print("\n".join(lines), file=sys.stderr)


def _sampler(config, tokenizer):
  """params -> a prompt and its continuation. Raises UserError where there can be none."""
  import jax
  from flax import nnx

  from llmarch.infer.lm import LM, check_generates
  from llmarch.layers.param import unflatten
  from llmarch.models.decoder import abstract

  e = config.eval
  length, limit, mend = len(tokenizer.encode(e.sample_prompt)), config.model.max_seq_len, "or set eval.sample_tokens=0"
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


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["train", *sys.argv[1:]]))
