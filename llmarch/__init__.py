"""llmarch: language-model architectures as data, trained, sharded and decoded by one forward (JAX/Flax)."""

__version__ = "0.1.0"


def __getattr__(name):
  # Lazy, so that `import llmarch` and `llmarch --help` do not pay for jax.
  if name == "load":
    from llmarch.infer.lm import load

    return load
  raise AttributeError(f"module 'llmarch' has no attribute {name!r}")
