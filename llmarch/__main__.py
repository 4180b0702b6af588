"""`llmarch <command>`: runs a module of llmarch/commands, and imports only what that command needs."""

import importlib
import sys

COMMANDS = {
  "train": "train a decoder from a config, checkpoint it, sample from it",
  "launch": "start several processes of train: on this machine, over ssh, under Slurm",
  "generate": "continue prompts with a trained decoder",
  "presets": "list the published architectures that ship as presets",
  "describe": "print the stack, parameters, FLOPs and memory of a config",
  "plan": "choose layouts, meshes and chips for serving a decoder, by formula",
  "convert": "read a checkpoint of transformers, or write one",
  "regroup": "give a model fewer key-value heads (MHA to GQA or MQA), to train on from",
  "evaluate": "perplexity on a text, or tasks of lm-eval",
  "tokenizer": "train a BPE tokenizer, or encode a source to a token file",
  "ablate": "run an experiment's arms and seeds, record every trial, judge its comparisons",
  "report": "one page, without network, that compares experiments or runs",
  "claims": "what papers and surveys say, and what came of checking it",
  "advise": "which architecture for a task, a context and a memory, and on what evidence",
  "bench": "measure train step, prefill and decode on given shapes",
  "compile": "compile for TPUs or GPUs that are not here: memory, FLOPs, collectives",
}


COMPUTE = {"train", "generate", "evaluate", "bench"}  # commands that may compute for long on CPUs


def cli() -> int:
  """The entry point of a shell: `main`, in a process that asks for huge pages where they help."""
  if sys.argv[1:] and sys.argv[1] in COMPUTE:
    from llmarch.process import restart_with_huge_pages

    restart_with_huge_pages()
  return main()


def main(argv: list[str] | None = None) -> int:
  """Runs a command. Returns its exit code: 0, 2 for bad input, or train/faults.py's (one sentence on stderr)."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_help())
    return 0
  name, *rest = argv
  from llmarch.errors import UserError, nearest

  try:
    if name not in COMMANDS:
      raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    return importlib.import_module(f"llmarch.commands.{name}").main(rest)
  except UserError as e:
    print(f"llmarch: {e}", file=sys.stderr)
    return e.exit_code
  except KeyboardInterrupt:
    print("llmarch: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # the reader of the pipe (head, less) has ended
    sys.stderr.close()
    return 141


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
  return "usage: llmarch COMMAND [--flags]   (llmarch COMMAND --help lists the flags)\n\n" + "\n".join(lines)


if __name__ == "__main__":
  sys.exit(cli())
