"""Models of images or sound around a decoder of text, which is read alone.

Only those stand here whose decoder treats a text without images as a model of text does.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wrapper:
  """A model_type whose text_config describes a decoder.

  text: the model_type of the text_config, if it names none. tied: the default of tie_word_embeddings. Where the wrapper
  has that option, it decides, because the head stands outside the decoder.
  """

  text: str
  tied: bool = False


WRAPPERS = {
  "gemma3": Wrapper("gemma3_text", tied=True),
  "kimi_k25": Wrapper("kimi_k2"),
  "llava": Wrapper("llama"),
  "llava_next": Wrapper("llama"),
  "mistral3": Wrapper("mistral"),
  "qwen3_vl": Wrapper("qwen3_vl_text"),
  "qwen3_vl_moe": Wrapper("qwen3_vl_moe_text"),
}

# The names of the decoder among the weights, and those of the head beside it.
PREFIXES = ("language_model.", "model.language_model.")
