"""Language-model architectures as data, trained, sharded and decoded by one forward (JAX and Flax).

Use a model:
  load(directory)    returns the LM of a training run, of a saved model or of a checkpoint of transformers
  LM                 is a model with its parameters and tokenizer: generate, logits, save
  UserError          is what wrong input raises: one sentence that names the field and says how to mend it

Describe a model:
  PRESETS            holds the published architectures: PRESETS["llama_3_8b"]() is a ModelConfig
  shrink             returns the same architecture at toy size
  ModelConfig        is an architecture: blocks by name, and the order of the layers
  BlockConfig        is one kind of layer: a mixer, a feed-forward, a norm, a residual scheme
  AttentionConfig    is softmax attention with its heads, positions, mask and window
  MLAConfig          is multi-head latent attention
  MLPConfig          is a feed-forward, gated or not
  MoEConfig          is a mixture of experts
  RunConfig          is everything that decides a training run: model, data, optimizer, schedule, mesh

Compute with it:
  Decoder            is the module: logits, state, aux = Decoder(config, key)(tokens, positions)
  make_train_step    returns the jitted init, step and evaluate of a RunConfig
  make_decoder       returns the jitted start, prefill and decode of a ModelConfig
  Sampling           says how the next token is chosen
  make_mesh          arranges devices in a mesh with named axes
  LAYOUTS            holds the rows of the layout table by name

docs/api.md of the repository shows all of these at work. A name is imported when it is first used, so that
`import llmarch` loads no JAX.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from llmarch.infer.lm import LM

__version__ = "0.1.0"

_MODULE_OF = {
  "LM": "infer.lm",
  "UserError": "errors",
  "PRESETS": "presets",
  "shrink": "presets",
  "ModelConfig": "config",
  "BlockConfig": "config",
  "AttentionConfig": "layers.attention",
  "MLAConfig": "layers.mla",
  "MLPConfig": "layers.ffn",
  "MoEConfig": "layers.moe",
  "RunConfig": "run_config",
  "Decoder": "models.decoder",
  "make_train_step": "train.step",
  "make_decoder": "infer.decoder",
  "Sampling": "ops.sampling",
  "make_mesh": "sharding",
  "LAYOUTS": "sharding",
}


def __getattr__(name: str) -> Any:
  """Imports a public name on first use. Raises AttributeError for any other."""
  if name not in _MODULE_OF:
    raise AttributeError(f"module 'llmarch' has no attribute {name!r}")
  value = getattr(importlib.import_module(f"llmarch.{_MODULE_OF[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """All public names, whether they have been imported or not."""
  return sorted({*(name for name in globals() if name.startswith("__")), *_MODULE_OF, "load"})


def load(directory: str | os.PathLike, **options: Any) -> "LM":
  """Loads the LM of a folder.

  The folder is one that `LM.save` wrote, the workdir of a training run (its newest checkpoint is loaded), or a
  checkpoint of transformers (config.json and safetensors). Options are those of `LM`: weights, a format for its
  matrices ("int8", "int4", "nf4" ...); kv, a format for the decoding state ("int8", "int8_channel" ...); mesh,
  prefill_layout, decode_layout. Raises UserError if there is no model, it is damaged, or an option does not suit it.
  """
  # These imports stand inside the function, so that `import llmarch` and `llmarch --help` do not load jax.
  from llmarch.data import companions
  from llmarch.data.tokenizers import load_tokenizer
  from llmarch.infer import lm

  if os.path.isdir(os.path.join(directory, "checkpoints")):
    from llmarch.train.checkpoint import restore_params

    config, params, tokenizer = restore_params(os.fspath(directory), base=lambda folder: load(folder).arrays())
    return lm.LM(config, params, tokenizer and load_tokenizer(tokenizer), **options)
  has_tokenizer = os.path.exists(os.path.join(directory, lm.TOKENIZER))
  tokenizer = load_tokenizer(os.fspath(directory)) if has_tokenizer else None
  if tokenizer is None:
    options = {"end_ids": companions.read(directory).ids("eos_token_id"), **options}
  from llmarch.convert import hf

  if hf.is_checkpoint(directory):
    mesh, layout = options.get("mesh"), options.get("prefill_layout", "ws_2d")
    return lm.LM(*hf.load_checkpoint(directory, mesh, layout), tokenizer, **options)
  return lm.load_saved(directory, tokenizer, **options)
