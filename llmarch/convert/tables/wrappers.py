"""Models of images or sound around a decoder of text, which is read alone.

Only those stand here whose decoder treats a text without images as a model of text does.
"""

import dataclasses

from llmarch.errors import check


@dataclasses.dataclass(frozen=True)
class Wrapper:
  """A model_type whose text_config describes a decoder.

  text: the model_type of the text_config, if it names none. tied: the default of tie_word_embeddings. Where the wrapper
  has that option, it decides, because the head stands outside the decoder. flat: older files have the options of the
  decoder beside those of the wrapper, without a text_config. apart: the options of the wrapper alone.
  """

  text: str
  tied: bool = False
  flat: bool = False
  apart: frozenset[str] = frozenset()


_QWEN_VL = frozenset({"vision_start_token_id", "vision_end_token_id", "vision_token_id", "image_token_id"})

WRAPPERS = {
  "gemma3": Wrapper("gemma3_text", tied=True),
  "kimi_k25": Wrapper("kimi_k2"),
  "llava": Wrapper("llama"),
  "llava_next": Wrapper("llama"),
  "maira2": Wrapper("llama"),
  "mistral3": Wrapper("mistral"),
  "qwen2_vl": Wrapper("qwen2_vl_text", flat=True, apart=_QWEN_VL | {"video_token_id", "vision_config"}),
  "qwen2_5_vl": Wrapper("qwen2_5_vl_text", flat=True, apart=_QWEN_VL | {"video_token_id", "vision_config"}),
  "qwen3_vl": Wrapper("qwen3_vl_text"),
  "qwen3_vl_moe": Wrapper("qwen3_vl_moe_text"),
}

# The names of the decoder among the weights, and those of the head beside it.
PREFIXES = ("language_model.", "model.language_model.")


def decoder_of(outer: dict, file) -> dict:
  """The options of the decoder of text: those of a config.json, or of its text_config where it is a wrapper's.

  A wrapper may also have its decoder's own model_type. Raises UserError.
  """
  model_type, text = outer.get("model_type"), outer.get("text_config")
  if not isinstance(model_type, str):
    return outer
  wrapper = WRAPPERS.get(model_type)
  if wrapper is None and isinstance(text, dict) and text.get("model_type") == model_type:
    wrapper = Wrapper(model_type)
  if wrapper is None:
    return outer
  if text is None and wrapper.flat:
    return {k: v for k, v in outer.items() if k not in wrapper.apart} | {"model_type": wrapper.text}
  check(isinstance(text, dict), f"{file}: text_config is missing, which describes the decoder of a {model_type}")
  tied = outer.get("tie_word_embeddings", text.get("tie_word_embeddings", wrapper.tied))
  return {"model_type": wrapper.text} | text | {"tie_word_embeddings": tied}
