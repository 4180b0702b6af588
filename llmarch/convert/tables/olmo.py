"""The decoders of OLMo: a LayerNorm without parameters, or RMSNorm after each branch."""

from llmarch.convert.fields import FULL, Family, Key, Rope, Size, SomeRope, Window, every, slides
from llmarch.convert.tables.parts import (
  ATTENTION_BIAS,
  ENDS,
  HEAD_DIM,
  QK_NORM,
  WHOLE_QK,
  L,
  attention,
  gated,
  llama_like,
  model,
  norm,
  projections,
  rms,
)
from llmarch.errors import check

OLMO = (
  *ENDS,
  *norm(f"{L}.post_attention_layernorm", "mixer_norm"),
  *norm(f"{L}.post_feedforward_layernorm", "ffn_norm"),
  *projections(f"{L}.self_attn"),
  *QK_NORM,
  *gated(f"{L}.mlp"),
)
NO_PARAMETERS = {"kind": "layernorm", "eps": 1e-5, "scale": False, "bias": False}


def olmo2(model_type: str, architecture: str, **mixer) -> Family:
  """Norms after each branch, and of all queries or keys at once."""
  norm = rms(default=1e-5)
  block = {"mixer": attention(**HEAD_DIM, **mixer, **WHOLE_QK, **ATTENTION_BIAS), "norm": norm, "residual": "output"}
  return llama_like(model_type, architecture, {}, block=block, model=model(norm), rows=OLMO)


def _exaone_slides(h, i) -> bool:
  """sliding_window_pattern is a number n (each n-th layer sees all), or letters: L slides, G does not."""
  pattern = h.get("sliding_window_pattern", 4)
  if h.get("sliding_window", 4096) is None or not pattern:
    return False
  if isinstance(pattern, str):
    check(not set(pattern) - set("LG"), f"sliding_window_pattern={pattern!r} must be a number, or letters L and G")
    return pattern[i % len(pattern)] == "L"
  return every(4)(h, i)


def _exaone_rotates(h, i) -> bool:
  return h.get("sliding_window", 4096) is None or slides(h, i, _exaone_slides)


def _say_exaone_rotates(w, i, has: bool) -> None:
  """Layers that see all have no positions, unless no layer has a window."""
  if has and w.options["layer_types"][i] == FULL:
    w.set("sliding_window", None)


FAMILIES = (
  llama_like(
    "olmo",
    "OlmoForCausalLM",
    {**HEAD_DIM, "position": Rope(), "qkv_clip": Key("clip_qkv", None), **ATTENTION_BIAS},
    model=model(NO_PARAMETERS),
    block={"norm": NO_PARAMETERS},
  ),
  olmo2("olmo2", "Olmo2ForCausalLM", position=Rope()),
  olmo2(
    "olmo3",
    "Olmo3ForCausalLM",
    window=Window(4096, types=every(4)),
    position=Rope(theta=5e5, by_type=True, types=every(4)),
  ),
  llama_like(
    "exaone4",
    "Exaone4ForCausalLM",
    {
      "head_dim": Size("head_dim", None),
      "window": Window(4096, types=_exaone_slides),
      "position": SomeRope(Rope(), _exaone_rotates, _say_exaone_rotates),
      "qk_norm": {"norm": rms(default=1e-5)},
    },
    block={"norm": rms(default=1e-5), "residual": "output"},
    model=model(rms(default=1e-5)),
    rows=OLMO,
  ),
)
