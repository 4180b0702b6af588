"""`llmarch generate`: a model and prompts in; their continuations out, streamed to the terminal."""

import sys
import time

from absl import flags

from llmarch.commands.common import parse_flags, print_table
from llmarch.errors import UserError

USAGE = "llmarch generate --from=DIR --prompt=TEXT [--max_new_tokens=N] [--temperature=T] ..."


def _define(values: flags.FlagValues) -> None:
  text = lambda name, what: flags.DEFINE_string(name, None, what, flag_values=values)
  texts = lambda name, what: flags.DEFINE_multi_string(name, [], what, flag_values=values)
  whole = lambda name, default, what: flags.DEFINE_integer(name, default, what, flag_values=values)
  number = lambda name, default, what: flags.DEFINE_float(name, default, what, flag_values=values)
  text("from", "folder of a saved model or of a training run")
  texts("prompt", "a text to continue; may be repeated")
  texts("prompt_file", "a file whose whole text is a prompt (- is the standard input); may be repeated")
  whole("max_new_tokens", 128, "tokens at most for each prompt")
  number("temperature", 0.0, "0 takes the most likely token")
  whole("top_k", 0, "sample from the k most likely tokens; 0 from all")
  number("top_p", 1.0, "sample from the most likely tokens that make up this probability")
  number("min_p", 0.0, "sample from tokens at least this fraction as likely as the most likely one")
  number("repetition_penalty", 1.0, "above 1, tokens of the prompt and the continuation become less likely")
  texts("stop", "a token, as text, before which a continuation ends; may be repeated")
  whole("seed", 0, "of the sampling")
  whole("batch", None, "prompts decoded at a time; all by default")
  whole("chunk", 256, "tokens of the prompts read at a time")
  text("mesh", "devices to work on, such as x=2,y=2,z=2 (on a CPU, that many fake ones are made)")
  for phase, what in (("prefill", "the prompts"), ("decode", "what follows")):
    flags.DEFINE_string(f"layout.{phase}", "ws_2d", f"row of the layout table for {what}", flag_values=values)
  text("weights", "format of the matrices: int8, fp8, int4, int4_32, int4_128 or nf4; as stored by default")
  text("kv", "format of the decoding state: int8, fp8, int8_channel, bfloat16 ...; precision.state by default")
  flags.DEFINE_bool("prefix", False, "prompts see themselves both ways (prefix-LM)", flag_values=values)
  flags.DEFINE_bool("stream", True, "print a single prompt's text as it comes", flag_values=values)
  flags.DEFINE_bool("json", False, "print a list of {prompt, text}", flag_values=values)


OPTIONS = (
  "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "batch",
  "chunk", "prefix",
)  # fmt: skip


def main(argv: list[str]) -> int:
  """Runs `llmarch generate`; returns its exit code."""
  args = parse_flags(argv, _define, USAGE)
  folder = args["from"].value
  if not folder:
    raise UserError("--from is missing; give the folder of a saved model or of a training run")
  prompts = args.prompt + [_read(path) for path in args.prompt_file]
  if not prompts:
    raise UserError("--prompt is missing; give a text to continue, or a --prompt_file")
  import llmarch
  from llmarch import sharding
  from llmarch.infer.lm import TextStream

  place = {}
  if args.mesh:
    place = {"mesh": sharding.device_mesh(args.mesh)}
    place |= {"prefill_layout": args["layout.prefill"].value, "decode_layout": args["layout.decode"].value}
  elif args["layout.prefill"].present or args["layout.decode"].present:
    raise UserError("--layout.prefill and --layout.decode are of a mesh; give --mesh=x=2,y=2,z=2, or leave them out")
  model = llmarch.load(folder, weights=args.weights, kv=args.kv, **place)
  if model.tokenizer is None:
    raise UserError(f"{folder} has no tokenizer, so it cannot read a text; put its tokenizer.json there")
  ids = [model.tokenizer.encode(prompt) for prompt in prompts]
  texts = [TextStream(model.tokenizer, row) for row in ids]
  pieces = []  # (when, tokens), of a stream

  def show(row: int, new: list[int]) -> None:
    if not pieces:  # only now, so that a refused prompt prints nothing
      print(prompts[row], end="")
    pieces.append((time.perf_counter(), len(new)))
    print(texts[row].push(new), end="", flush=True)

  streams = args.stream and len(ids) == 1 and not args.json
  began = time.perf_counter()
  new = model.generate(ids, stream=show if streams else None, **{name: args[name].value for name in OPTIONS})
  seconds = time.perf_counter() - began
  ends = [text.push([] if streams else row, last=True) for text, row in zip(texts, new)]
  if args.json:
    print_table([{"prompt": p, "text": t} for p, t in zip(prompts, ends)], as_json=True)
  else:
    print(ends[0] if streams else "\n---\n".join(p + t for p, t in zip(prompts, ends)))
  print(f"{sum(map(len, new))} tokens in {seconds:.2f} s, compilation included{_rate(pieces)}", file=sys.stderr)
  return 0


def _rate(pieces: list[tuple[float, int]]) -> str:
  """Tokens a second after the first two pieces, which waited for the compiler."""
  if len(pieces) < 3:
    return ""
  return f"; {sum(n for _, n in pieces[2:]) / (pieces[-1][0] - pieces[1][0]):.1f} tokens/s after it"


def _read(path: str) -> str:
  try:
    if path == "-":
      return sys.stdin.read()
    with open(path, encoding="utf-8") as f:
      return f.read()
  except (OSError, UnicodeDecodeError) as e:
    why = getattr(e, "strerror", None) or "not UTF-8"
    raise UserError(f"--prompt_file: cannot read {path} ({why}); give a text file") from None


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["generate", *sys.argv[1:]]))
