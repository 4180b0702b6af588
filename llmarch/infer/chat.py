"""The text of a chat, by the template that a checkpoint brings: a program of jinja2, which is not trusted."""

import functools
import json
from collections.abc import Mapping, Sequence

from llmarch.errors import UserError, check


def render(template: str, messages: Sequence[Mapping], **variables) -> str:
  """Writes messages as the model read them in training, up to where its reply begins.

  The template runs in jinja2's sandbox with the functions and filters that transformers gives it. `variables` are what
  it may read beside the messages, such as bos_token or tools. Raises UserError for messages that it refuses.
  """
  check(
    isinstance(messages, Sequence)
    and bool(messages)
    and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages),
    f"messages must be a list of dicts such as {{'role': 'user', 'content': 'Hello'}}, got {messages!r}",
  )
  compiled = _compiled(template)
  try:
    return compiled.render(messages=messages, add_generation_prompt=True, **variables)
  except Exception as e:  # whatever the template's expressions raise
    why = f"{type(e).__name__}: {e}"
    raise UserError(f"the model's chat template refuses these messages ({why}); change them") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
  try:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as e:
    raise UserError(f"a chat needs the package jinja2 ({e}); pip install jinja2") from None

  class Generation(Extension):
    """Reads `{% generation %}`, which marks replies for training, as its content alone."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      return jinja2.nodes.Scope(body).set_lineno(line)

  def refuse(message):
    raise jinja2.exceptions.TemplateError(message)

  def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  def now(format):
    from datetime import datetime

    return datetime.now().strftime(format)

  extensions = [Generation, "jinja2.ext.loopcontrols"]
  sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
  sandbox.filters["tojson"] = to_json
  sandbox.globals |= {"raise_exception": refuse, "strftime_now": now}
  try:
    return sandbox.from_string(template)
  except jinja2.exceptions.TemplateError as e:
    raise UserError(f"the model's chat template is not jinja2 ({e}); restore it") from None
