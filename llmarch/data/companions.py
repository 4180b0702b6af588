"""The files that stand beside a tokenizer.json and say how its ids are used: which begin a text, which end it, how a
chat is written.

  tokenizer_config.json    bos_token, eos_token, add_bos_token, chat_template, the special tokens
  special_tokens_map.json  the same tokens, in older folders
  generation_config.json   eos_token_id, one or several, and how to sample
  chat_template.jinja      the chat template, in newer folders
  config.json              bos_token_id, eos_token_id of the model
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from llmarch.errors import UserError, check

TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"
SPECIALS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
FILES = (TOKENIZER, SPECIALS, GENERATION, TEMPLATE)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Companions:
  """The texts of the files by name, and the options of config.json; each may be absent. `read` makes it of a folder."""

  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  options: Mapping = dataclasses.field(default_factory=dict)
  folder: str = ""

  def named(self, name: str) -> str | None:
    """The spelling of bos_token, eos_token ...; None where no file has it."""
    for file in (TOKENIZER, SPECIALS):
      if (found := _content(self._json(file).get(name))) is not None:
        return found
    return None

  @property
  def named_options(self) -> dict:
    """Returns what tokenizer_config.json says; {} where it is absent."""
    return self._json(TOKENIZER)

  def with_file(self, options: Mapping) -> "Companions":
    """These files, with a tokenizer_config.json of these options."""
    return dataclasses.replace(self, files={**self.files, TOKENIZER: json.dumps(options, indent=2) + "\n"})

  @property
  def adds_begin(self) -> bool | None:
    """add_bos_token: whether the begin token stands before every text; None leaves it to tokenizer.json."""
    found = self._json(TOKENIZER).get("add_bos_token")
    return found if isinstance(found, bool) else None

  @property
  def specials(self) -> set[str]:
    """The spellings of all tokens that the files call special."""
    found = {self.named(name) for name in NAMED}
    for file in (TOKENIZER, SPECIALS):
      data = self._json(file)
      for name in ("additional_special_tokens", "extra_special_tokens"):
        more = data.get(name) or []
        found |= {_content(token) for token in (more.values() if isinstance(more, Mapping) else more)}
    added = self._json(TOKENIZER).get("added_tokens_decoder") or {}
    found |= {_content(token) for token in added.values() if isinstance(token, Mapping) and token.get("special")}
    return found - {None, ""}

  def ids(self, name: str) -> tuple[int, ...]:
    """The ids that generation_config.json and config.json give for bos_token_id or eos_token_id; none twice."""
    text = self.options.get("text_config")
    places = [(GENERATION, self._json(GENERATION)), ("config.json", self.options)]
    places += [("config.json", text)] if isinstance(text, Mapping) else []
    found = []
    for file, data in places:
      value = data.get(name)
      for i in value if isinstance(value, list) else [] if value is None else [value]:
        whole = isinstance(i, int) and not isinstance(i, bool)
        check(whole, f"{os.path.join(self.folder, file)}: {name}={value!r} must be a token id, or a list of them")
        found.append(i)
    return tuple(dict.fromkeys(i for i in found if i >= 0))  # some files write -1 for none

  @property
  def template(self) -> str | None:
    """The chat template, in the language of jinja2; None where there is none."""
    if TEMPLATE in self.files:
      return self.files[TEMPLATE]
    found = self._json(TOKENIZER).get("chat_template")
    if isinstance(found, list):  # several by name
      named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
      found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None

  @property
  def sampling(self) -> dict:
    """The fields of ops.sampling.Sampling with which the makers of the model sample; {} is greedy."""
    data = self._json(GENERATION)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    kept = names if data.get("do_sample") else names[-1:]
    found = {name: data[name] for name in kept if data.get(name) is not None}
    return {"temperature": 1.0, **found} if data.get("do_sample") else found

  def written(self) -> dict[str, str]:
    """The files as they are to be saved, with the end ids of config.json, which is not among them."""
    end_ids, files = self.ids("eos_token_id"), dict(self.files)
    data = self._json(GENERATION)
    if end_ids != dataclasses.replace(self, options={}).ids("eos_token_id"):
      files[GENERATION] = json.dumps(data | {"eos_token_id": list(end_ids)}, indent=2) + "\n"
    return files

  def _json(self, name: str) -> dict:
    if name not in self.files:
      return {}
    try:
      data = json.loads(self.files[name])
    except (ValueError, RecursionError):
      data = None
    check(isinstance(data, dict), f"{os.path.join(self.folder, name)} is not a JSON object; restore the file")
    return data


def read(folder: str | os.PathLike) -> Companions:
  """Reads what the folder holds of the files. Raises UserError for one that cannot be read."""
  files = {}
  for name in FILES:
    try:
      files[name] = (Path(folder) / name).read_text(encoding="utf-8")
    except FileNotFoundError:
      continue
    except (OSError, UnicodeDecodeError) as e:
      why = getattr(e, "strerror", None) or "not UTF-8"
      raise UserError(f"{Path(folder) / name} cannot be read ({why}); restore the file") from None
  found = Companions(files, _options(Path(folder) / "config.json"), os.fspath(folder))
  for name in FILES[:3]:
    found._json(name)
  return found


def _options(path: Path) -> dict:
  """The options of a config.json of transformers, or of the checkpoint that a model folder of ours came from."""
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):  # whoever reads the model says what is wrong with it
    return {}
  data = data if isinstance(data, dict) else {}
  options = data.get("hf", {}) if "format" in data else data
  return options if isinstance(options, dict) else {}


def _content(token) -> str | None:
  """A token is its spelling, or a dict that holds it."""
  token = token.get("content") if isinstance(token, Mapping) else token
  return token if isinstance(token, str) else None
