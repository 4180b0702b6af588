"""`llmarch generate`: a model and prompts in; their continuations out, streamed to the terminal.

llmarch generate DIR --prompt=TEXT [--max_new_tokens=N] [--temperature=T] ...    goes on with a text
llmarch generate DIR --chat [--prompt=TEXT] [--system=TEXT] ...                  answers, by the model's chat template

With --chat and without --prompt, each line of the standard input is a message, and the chat goes on until its end.
"""

import sys
import time

from absl import flags

from llmarch.commands.common import parse_flags, print_table
from llmarch.errors import UserError, check


def _define(values: flags.FlagValues) -> None:
  text = lambda name, what: flags.DEFINE_string(name, None, what, flag_values=values)
  texts = lambda name, what: flags.DEFINE_multi_string(name, [], what, flag_values=values)
  whole = lambda name, default, what: flags.DEFINE_integer(name, default, what, flag_values=values)
  number = lambda name, default, what: flags.DEFINE_float(name, default, what, flag_values=values)
  switch = lambda name, default, what: flags.DEFINE_bool(name, default, what, flag_values=values)
  text("from", "folder of a saved model, of a training run or of a checkpoint of transformers; or the first word")
  texts("prompt", "a text to continue; may be repeated")
  texts("prompt_file", "a file whose whole text is a prompt (- is the standard input); may be repeated")
  switch("chat", False, "prompts are messages of a user, which the model answers")
  text("system", "with --chat: what the system's message says")
  switch("special", False, "special tokens that a prompt or a stop spells out, such as <|im_end|>, are tokens")
  whole("max_new_tokens", 128, "tokens at most for each prompt")
  number("temperature", 0.0, "0 takes the most likely token")
  whole("top_k", 0, "sample from the k most likely tokens; 0 from all")
  number("top_p", 1.0, "sample from the most likely tokens that make up this probability")
  number("min_p", 0.0, "sample from tokens at least this fraction as likely as the most likely one")
  number("repetition_penalty", 1.0, "above 1, tokens of the prompt and the continuation become less likely")
  texts("stop", "a text before which a continuation ends; may be repeated")
  flags.DEFINE_multi_integer("stop_id", [], "a token id before which it ends; may be repeated", flag_values=values)
  switch("suggested", False, "sample as the checkpoint's generation_config.json says, but for what other flags say")
  whole("seed", 0, "of the sampling")
  whole("batch", None, "prompts decoded at a time; all by default")
  whole("chunk", 256, "tokens of the prompts read at a time")
  whole("context", None, "length of text to which LongRoPE and dynamic NTK scale positions; the prompt's by default")
  text("mesh", "devices to work on, such as x=2,y=2,z=2 (on a CPU, that many fake ones are made)")
  for phase, what in (("prefill", "the prompts"), ("decode", "what follows")):
    flags.DEFINE_string(f"layout.{phase}", "ws_2d", f"row of the layout table for {what}", flag_values=values)
  text("weights", "format of the matrices: int8, fp8, int4, int4_32, int4_128 or nf4; as stored by default")
  text("kv", "format of the decoding state: int8, fp8, int8_channel, bfloat16 ...; precision.state by default")
  switch("prefix", False, "prompts see themselves both ways (prefix-LM)")
  switch("stream", True, "print a single prompt's text as it comes")
  switch("json", False, "print a list of {prompt, text}")


OPTIONS = (
  "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "batch", "chunk", "prefix",
  "context",
)  # fmt: skip


def main(argv: list[str]) -> int:
  """Runs `llmarch generate`; returns its exit code."""
  args = parse_flags(argv, _define, __doc__, words=("from",))
  folder = args["from"].value
  check(bool(folder), "--from is missing; give the folder of a saved model, of a training run or of a checkpoint")
  prompts = args.prompt + [_read(path) for path in args.prompt_file]
  check(bool(prompts) or args.chat, "--prompt is missing; give a text to continue, or a --prompt_file")
  check(args.chat or args.system is None, "--system is a message of a chat; give --chat, or leave it out")
  import llmarch
  from llmarch import sharding
  from llmarch.infer.lm import Continuation
  from llmarch.run import keep_programs

  place = {}
  if args.mesh:
    place = {"mesh": sharding.device_mesh(args.mesh)}
    place |= {"prefill_layout": args["layout.prefill"].value, "decode_layout": args["layout.decode"].value}
  elif args["layout.prefill"].present or args["layout.decode"].present:
    raise UserError("--layout.prefill and --layout.decode are of a mesh; give --mesh=x=2,y=2,z=2, or leave them out")
  keep_programs("")
  model = llmarch.load(folder, weights=args.weights, kv=args.kv, **place)
  if model.tokenizer is None:
    raise UserError(f"{folder} has no tokenizer, so it cannot read a text; put its tokenizer.json there")
  options = {name: args[name].value for name in OPTIONS}
  options |= {k: v for k, v in model.suggested.items() if args.suggested and not args[k].present}
  stop_ids, stops = model.parse_stops([*args.stop, *args.stop_id], args.special or args.chat)
  options["stop"] = stop_ids
  if args.chat and not prompts:
    return _converse(model, args.system, stops, options)
  if args.chat:
    rows = [model.begin_reply(_messages(args.system, prompt), stops=stops) for prompt in prompts]
  else:
    ids = [model.tokenizer.encode_prompt(prompt, args.special) for prompt in prompts]
    rows = [Continuation(model, prompt, row, stops=stops) for prompt, row in zip(prompts, ids)]
  before = [""] * len(rows) if args.chat else prompts  # a reply stands alone
  streams = args.stream and len(rows) == 1 and not args.json
  began = time.perf_counter()
  model.generate(rows, stream=_printer(before[0]) if streams else None, **options)
  seconds = time.perf_counter() - began
  if args.json:
    print_table([{"prompt": p, "text": row.result()} for p, row in zip(prompts, rows)], as_json=True)
  elif streams:
    print("" if rows[0].result() else before[0])  # the printer waits for the first piece
  else:
    print("\n---\n".join(text + row.result() for text, row in zip(before, rows)))
  tokens = sum(len(row.new_ids) for row in rows)
  print(f"{tokens} tokens in {seconds:.2f} s, compilation included{_rate(rows[0].pieces)}", file=sys.stderr)
  return 0


def _printer(before: str):
  """A stream function that prints the text before the first piece, so that a refused prompt prints nothing."""
  left = [before]

  def show(row: int, piece: str) -> None:
    print(left.pop() if left else "", piece, sep="", end="", flush=True)

  return show


def _messages(system: str | None, prompt: str) -> list[dict]:
  said = [] if system is None else [{"role": "system", "content": system}]
  return [*said, {"role": "user", "content": prompt}]


def _converse(model, system: str | None, stops: tuple[str, ...], options: dict) -> int:
  """Answers the lines of the standard input one after another, each with all that was said before it."""
  messages = _messages(system, "")[:-1]
  for line in sys.stdin if not sys.stdin.isatty() else iter(_ask, None):
    if not line.strip():
      continue
    messages.append({"role": "user", "content": line.rstrip("\n")})
    row = model.begin_reply(messages, stops=stops)
    model.generate([row], stream=_printer(""), **options)
    print()
    messages.append({"role": "assistant", "content": row.result()})
  return 0


def _ask() -> str | None:
  try:
    return input("> ")
  except EOFError:
    print()
    return None


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
