"""llmarch: language-model architectures as data, trained, sharded and decoded by one forward (JAX/Flax)."""

import os

__version__ = "0.1.0"


def load(directory: str | os.PathLike, **options):
  """Loads the LM of a folder.

  The folder is one that `LM.save` wrote, the workdir of a training run (its newest checkpoint is loaded), or a
  checkpoint of transformers (config.json and safetensors). Options are those of `LM`: weights, a format for its
  matrices ("int8", "int4", "nf4" ...); kv, a format for the decoding state ("int8", "int8_channel" ...); mesh,
  prefill_layout, decode_layout. Raises UserError if there is no model, it is damaged, or an option does not suit it.
  """
  # These imports stand inside the function, so that `import llmarch` and `llmarch --help` do not load jax.
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.infer import lm

  if os.path.isdir(os.path.join(directory, "checkpoints")):
    from llmarch.train.checkpoint import restore_params

    config, params, tokenizer = restore_params(os.fspath(directory), base=lambda folder: load(folder).arrays())
    return lm.LM(config, params, tokenizer and load_tokenizer(tokenizer), **options)
  has_tokenizer = os.path.exists(os.path.join(directory, lm.TOKENIZER))
  tokenizer = load_tokenizer(os.fspath(directory)) if has_tokenizer else None
  from llmarch.convert import hf

  if hf.is_checkpoint(directory):
    mesh, layout = options.get("mesh"), options.get("prefill_layout", "ws_2d")
    return lm.LM(*hf.load_checkpoint(directory, mesh, layout), tokenizer, **options)
  return lm.load_saved(directory, tokenizer, **options)
