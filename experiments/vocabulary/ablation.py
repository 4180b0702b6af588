"""Tokens a byte against the size of a BPE vocabulary."""

import numpy as np

from llmarch.data import sources
from llmarch.data.tokenizers import train_bpe
from llmarch.lab.ablation import Ablation, Arm, Budget, Comparison

TRAIN_BYTES, TEST_BYTES = 3_000_000, 1_000_000


def tokens_per_byte(config, workdir: str) -> dict[str, float]:
  """Of held-out documents, with a BPE trained on others; the seed chooses both."""
  documents = list(sources.documents(config.data.source))
  order = np.random.default_rng(config.seed).permutation(len(documents))
  sizes = np.cumsum([len(documents[i].encode()) for i in order])
  train = [documents[i] for i in order[sizes <= TRAIN_BYTES]]
  test = [documents[i] for i in order[(sizes > TRAIN_BYTES) & (sizes <= TRAIN_BYTES + TEST_BYTES)]]
  tokenizer = train_bpe(train, config.model.vocab_size)
  num_bytes = sum(len(text.encode()) for text in test)
  return {"tokens_per_byte": sum(map(len, tokenizer.encode_batch(test))) / num_bytes}


def get_ablation() -> Ablation:
  size = lambda n: Arm(str(n), {"model.vocab_size": n})
  fewer = lambda id, arm, baseline: Comparison(
    id, f"{arm} tokens need fewer for a byte than {baseline}", arm, "less", metric="tokens_per_byte", baseline=baseline
  )
  return Ablation(
    title="Vocabulary",
    question="How many tokens does a byte of text take, and so a decoded text steps, as the vocabulary grows?",
    config="../byte_lm.py",
    arms=(size(1024), size(2048), size(4096), size(8192), size(16384)),
    comparisons=(
      fewer("larger-vocabulary-fewer-tokens", "8192", "1024"),
      fewer("still-fewer-at-16384", "16384", "8192"),
    ),
    budgets={"tiny": Budget(seeds=3)},
    trial=tokens_per_byte,
    metric="tokens_per_byte",
    notes=f"BPE trained on {TRAIN_BYTES:,} bytes of the standard library, judged on {TEST_BYTES:,} others.",
  )
