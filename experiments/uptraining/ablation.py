"""Multi-head attention made multi-query, and a little more training: how much of the loss comes back."""

import dataclasses
from pathlib import Path

import jax

from llmarch.adapt.regroup import HOW, regroup_config, regroup_params
from llmarch.lab.ablation import ZERO, Ablation, Arm, Budget, Comparison
from llmarch.lab.measures import validation
from llmarch.run import keep_programs, train_run

KV_HEADS = 1
SHARES = (0.05, 0.1)  # of the steps of the first training


def uptrain(config, workdir: str) -> dict[str, float]:
  """Trains with as many key-value heads as heads, pools them to KV_HEADS in each way, and trains each on.

  recovered = (loss after pooling - loss after training on) / (loss after pooling - loss of the first model).
  """
  import llmarch
  from llmarch.infer.lm import LM

  keep_programs(config.data.cache_dir)
  first = str(Path(workdir) / "mha")
  train_run(config, first)
  lm = llmarch.load(first)
  loss = lambda params, model: validation(config, params, model, seq_len=config.train.seq_len)["loss"]
  found = {"mha": loss(lm.params, lm.config)}
  model = regroup_config(lm.config, KV_HEADS)
  for how in HOW:
    params = regroup_params(lm.params, lm.config, model, how, jax.random.key(config.seed))
    pooled = str(Path(workdir) / how)
    LM(model, params, lm.tokenizer).save(pooled)
    found[f"{how}_0%"] = loss(params, model)
    for share in SHARES if how == "mean" else SHARES[:1]:
      name = f"{how}_{share:.0%}"
      run = str(Path(workdir) / name)
      train_run(_on(config, model, pooled, share), run)
      found[name] = loss(llmarch.load(run).params, model)
      gap = found[f"{how}_0%"] - found["mha"]
      found[f"recovered_{name}"] = (found[f"{how}_0%"] - found[name]) / gap
  return found | {"loss": found[f"mean_{SHARES[0]:.0%}"]}


def _on(config, model, source: str, share: float):
  """The same recipe for a share of the steps, on batches of another seed."""
  train = dataclasses.replace(
    config.train,
    steps=round(share * config.train.steps),
    init_from=source,
    log_every=max(config.train.log_every // 5, 1),
  )
  schedule = dataclasses.replace(config.optimizer.schedule, warmup=0)
  rate = config.optimizer.learning_rate / 3  # a cosine from a third: the state of the moments is gone
  optimizer = dataclasses.replace(config.optimizer, learning_rate=rate, schedule=schedule)
  evaluation = dataclasses.replace(config.eval, every=0)
  return dataclasses.replace(
    config, model=model, train=train, optimizer=optimizer, eval=evaluation, seed=config.seed + 500
  )


def get_ablation() -> Ablation:
  inside = lambda id, what, a, expect, b, by=0.0: Comparison(
    id, what, "uptrained", expect, by, metric=a, baseline="uptrained", baseline_metric=b
  )
  return Ablation(
    title="From multi-head to multi-query",
    question="How much of the loss of pooling key-value heads comes back in 5 % of the steps (2305.13245)?",
    config="../byte_lm.py",
    arms=(Arm("uptrained"),),
    comparisons=(
      inside(
        "recovers-at-5-percent",
        "At least 80 % comes back in 5 % of the steps",
        "recovered_mean_5%",
        "greater",
        ZERO,
        0.8,
      ),
      inside("mean-beats-random", "Mean-pooled heads end below random ones", "mean_5%", "less", "random_5%"),
      inside("mean-beats-first", "Mean-pooled heads end below the first of each group", "mean_5%", "less", "first_5%"),
      inside("more-at-10-percent", "10 % of the steps give more", "mean_10%", "less", "mean_5%"),
    ),
    budgets={"tiny": Budget(seeds=4, overrides={"train.steps": 800}, limit=900)},
    trial=uptrain,
    metric="loss",
    notes=f"{KV_HEADS} key-value head for 4. Training on: a third of the learning rate, cosine to a tenth of it.",
  )
