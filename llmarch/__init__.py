"""llmarch: language-model architectures as data, trained, sharded and decoded by one forward (JAX/Flax)."""

import os

__version__ = "0.1.0"


def load(directory: str | os.PathLike):
  """The LM of a folder: one that `LM.save` wrote, or the workdir of a training run (its newest checkpoint).

  Raises UserError if there is none or it is damaged.
  """
  # Here, so that `import llmarch` and `llmarch --help` do not pay for jax.
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.infer import lm

  if os.path.isdir(os.path.join(directory, "checkpoints")):
    from llmarch.train.checkpoint import restore_params

    config, params, tokenizer = restore_params(os.fspath(directory))
    return lm.LM(config, params, load_tokenizer(tokenizer))
  has_tokenizer = os.path.exists(os.path.join(directory, lm.TOKENIZER))
  return lm.load(directory, load_tokenizer(os.fspath(directory)) if has_tokenizer else None)
