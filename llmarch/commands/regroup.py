"""llmarch regroup: a model with fewer key-value heads (MHA to GQA or MQA), to train on from.

llmarch regroup --from=DIR --to=DIR --num_kv_heads=2 [--how=mean|first|random] [--blocks=local,global]
llmarch train --config=DIR --config.train.init_from=DIR --workdir=RUN     5 % of the training steps restore most of it
"""

import json

from absl import flags

from llmarch.commands.common import parse_flags
from llmarch.errors import UserError, check

HOW = {
  "mean": "the mean of the heads that become one",
  "first": "the first of them",
  "random": "new heads, from --seed",
}


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("from", None, "a saved model, a run, or a checkpoint of transformers", flag_values=values)
  flags.DEFINE_string("to", None, "the folder to write; it may hold a model, which is replaced", flag_values=values)
  flags.DEFINE_integer("num_kv_heads", None, "key-value heads of each regrouped block", flag_values=values)
  said = "; ".join(f"{name}: {what}" for name, what in HOW.items())
  flags.DEFINE_enum("how", "mean", list(HOW), f"what the new heads are ({said})", flag_values=values)
  flags.DEFINE_list("blocks", [], "names of the blocks to change; by default all with such heads", flag_values=values)
  flags.DEFINE_integer("seed", 0, "of --how=random", flag_values=values)
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Raises UserError for what cannot be regrouped; then nothing is written."""
  args = parse_flags(argv, _define, __doc__)
  source, target = args["from"].value, args.to
  if not source or not target:
    raise UserError(f"--{'to' if source else 'from'} is missing; name the folder")
  if args.num_kv_heads is None:
    raise UserError("--num_kv_heads is missing; give the number of key-value heads to have (1: MQA)")
  check(0 <= args.seed < 2**32, f"--seed must lie between 0 and 2^32 - 1, got {args.seed}")
  import jax

  import llmarch
  from llmarch.adapt.regroup import has_groups, regroup_config, regroup_params
  from llmarch.infer.lm import LM

  lm = llmarch.load(source)
  config = regroup_config(lm.config, args.num_kv_heads, args.blocks)
  params = regroup_params(lm.params, lm.config, config, args.how, jax.random.key(args.seed))
  LM(config, params, lm.tokenizer).save(target)
  heads = lambda config: {n: b.mixer.kv_heads for n, b in config.blocks.items() if has_groups(b.mixer)}
  report = {"path": target, "how": args.how, "kv_heads_before": heads(lm.config), "kv_heads": heads(config)}
  print(json.dumps(report) if args.json else "\n".join(f"{k:16} {v}" for k, v in report.items()))
  return 0
