"""llmarch tokenizer: trains a byte-level BPE on a source, or writes a source as a token file.

llmarch tokenizer --vocab_size=4096 --out=DIR                        the standard library's source code
llmarch tokenizer --source='text:docs/**/*.md,README.md' --out=DIR   text files; `jsonl:PATH,...` likewise
llmarch tokenizer --encode --tokenizer=DIR --out=FILE.tokens         for data.source.kind=tokens
"""

import json
import sys
from pathlib import Path

from absl import flags

from llmarch.build import build, parse_value
from llmarch.commands.common import parse_flags
from llmarch.errors import UserError
from llmarch.run_config import SourceConfig


def main(argv: list[str]) -> int:
  """Raises UserError for bad flags, and before any work where --out exists already."""
  options = parse_flags(argv, _define, __doc__)
  for name, encoding in (("tokenizer", True), ("document_end", True), ("vocab_size", False)):
    if options[name].present and options.encode != encoding:
      raise UserError(f"--{name} is of no use {'without' if encoding else 'with'} --encode; drop it")
  if not options.out:
    raise UserError("--out is missing; name the directory or file to write")
  source = parse_source(options.source)
  out = Path(options.out).expanduser()
  if not options.encode and out.suffix != ".json":
    out = out / "tokenizer.json"
  if out.exists() and not options.overwrite:
    raise UserError(f"--out: {out} exists; name another place or give --overwrite")
  if options.encode:
    report = _encode(source, options.tokenizer, options.document_end, out)
  else:
    report = _train(source, options.vocab_size, out)
  if options.json:
    print(json.dumps(report))
  else:
    print("\n".join(f"{name:16} {value}" for name, value in report.items()))
  return 0


def _define(options: flags.FlagValues) -> None:
  for define, name, default, doc in (
    (flags.DEFINE_string, "source", "stdlib", "stdlib, text:GLOB,..., jsonl:GLOB,..., or data.source's dict"),
    (flags.DEFINE_integer, "vocab_size", 4096, "ids of the new tokenizer, the end of a document included"),
    (flags.DEFINE_string, "out", "", "a directory or FILE.json; with --encode, the token file"),
    (flags.DEFINE_boolean, "overwrite", False, "replace what is there"),
    (flags.DEFINE_boolean, "encode", False, "write a token file instead of training a tokenizer"),
    (flags.DEFINE_string, "tokenizer", "bytes", "with --encode: bytes, a tokenizer.json, or its directory"),
    (flags.DEFINE_string, "document_end", "", "with --encode: the token that ends a document; \"\": the tokenizer's"),
    (flags.DEFINE_boolean, "json", False, "print JSON"),
  ):
    define(name, default, doc, flag_values=options)


def parse_source(text: str) -> SourceConfig:
  """`kind`, `kind:GLOB,...` or a dict -> a config. Raises UserError as `llmarch.build.build` does."""
  kind, colon, paths = text.partition(":")
  if text.startswith("{"):
    value = parse_value(text)
  else:
    value = {"kind": kind, "paths": paths.split(",")} if colon else kind
  source = build(SourceConfig, value, "--source")
  from llmarch.data.sources import READERS

  if type(source) not in READERS:
    raise UserError(f"--source={source.kind} holds no text; give one of stdlib, text, jsonl or hf")
  return source


def _train(source: SourceConfig, vocab_size: int, out: Path) -> dict:
  from llmarch.data import sources, tokenizers
  from llmarch.data.tokenfile import batches, new_file

  found = sources.survey(source)
  tokenizer = tokenizers.train_bpe(sources.documents(source), vocab_size, show_progress=sys.stderr.isatty())
  num_tokens = sum(
    len(ids) + 1 for some in batches(sources.documents(source)) for ids in tokenizer.encode_batch(some)
  )
  with new_file(out) as f:
    f.write(tokenizer.definition.encode())
  return _report(out, tokenizer, found, num_tokens)


def _encode(source: SourceConfig, spec: str, end: str, out: Path) -> dict:
  from llmarch.data import sources, tokenizers
  from llmarch.data.tokenfile import open_tokens, progress_bar, write_tokens

  tokenizer = tokenizers.load_tokenizer(spec, end)
  found = sources.survey(source)
  with progress_bar("tokenising", found.num_bytes) as advance:
    write_tokens(out, sources.documents(source), tokenizer, advance)
  return _report(out, tokenizer, found, len(open_tokens(out).tokens))


def _report(out, tokenizer, found, num_tokens) -> dict:
  return {
    "path": str(out),
    "vocab_size": tokenizer.vocab_size,
    "bytes_per_token": round(found.num_bytes / num_tokens, 4),
    "fingerprint": tokenizer.fingerprint,
    "corpus": found.corpus,
    "num_documents": found.num_documents,
    "num_bytes": found.num_bytes,
    "num_tokens": num_tokens,
  }
