"""llmarch evaluate: how well a model predicts a text, or does the tasks of lm-eval.

llmarch evaluate --from=DIR --text=FILE [--length=N] [--stride=N]    tokens, loss, perplexity, bits per byte
llmarch evaluate --from=DIR --tasks=NAME [--include_path=DIR]        tasks of lm-eval, or of the yaml files in DIR

With --text, the file is one document x_1 .. x_n, and x_0 is what the tokenizer puts before a text, else the end of a
document. Windows of --length inputs begin every --stride tokens; a window predicts the token after each of its inputs,
of which the last --stride count (in the first window, all), so that every token counts once. The last window ends with
the text, and what no other counted counts there. With N the sum of -log p in nats: loss = N / n,
perplexity = exp(N / n), bits_per_byte = N / ln 2 / the file's bytes.
"""

import difflib
import sys

from absl import flags

from llmarch.commands.common import parse_flags, print_table
from llmarch.errors import UserError, check


def _define(values: flags.FlagValues) -> None:
  text = lambda name, what: flags.DEFINE_string(name, None, what, flag_values=values)
  whole = lambda name, default, what: flags.DEFINE_integer(name, default, what, flag_values=values)
  text("from", "a saved model, a run, or a checkpoint of transformers")
  text("text", "a text file, in UTF-8")
  whole("length", None, "with --text: tokens of a window; model.max_seq_len by default")
  whole("stride", None, "with --text: tokens between windows; --length by default (disjoint windows)")
  flags.DEFINE_list("tasks", [], "names of tasks of lm-eval (pip install -e '.[eval]')", flag_values=values)
  text("include_path", "with --tasks: a folder of task files; no others are then looked up")
  whole("num_fewshot", None, "with --tasks: examples before each question; as the task says by default")
  whole("limit", None, "with --tasks: questions of each task at most")
  whole("batch", 8, "rows at a time")
  text("weights", "format of the matrices: int8, fp8, int4, int4_32, int4_128 or nf4; as stored by default")
  flags.DEFINE_bool("json", False, "print JSON", flag_values=values)


def main(argv: list[str]) -> int:
  """Runs `llmarch evaluate`; returns its exit code."""
  args = parse_flags(argv, _define, __doc__, words=("from",))
  folder = args["from"].value
  if not folder:
    raise UserError("--from is missing; give the folder of a saved model, a run or a checkpoint of transformers")
  if bool(args.text) == bool(args.tasks):
    raise UserError("give either --text=FILE or --tasks=NAME")
  other = ("include_path", "num_fewshot", "limit") if args.text else ("length", "stride")
  for name in other:
    needs = "tasks" if args.text else "text"
    check(args[name].value is None, f"--{name} is of no use without --{needs}; drop it")
  check(args.batch >= 1, f"--batch must be at least 1, got {args.batch}")
  text = _read(args.text) if args.text else None
  run_tasks = _harness(args) if args.tasks else None
  import llmarch
  from llmarch.infer.scoring import perplexity
  from llmarch.run import keep_programs

  keep_programs("")
  lm = llmarch.load(folder, weights=args.weights)
  if text is not None:
    rows = [perplexity(lm, text, length=args.length, stride=args.stride, batch=args.batch)]
  else:
    rows = run_tasks(lm)
  print_table(rows, args.json)
  return 0


def _read(path: str) -> str:
  try:
    with open(path, encoding="utf-8", newline="") as f:  # every byte counts
      return f.read()
  except (OSError, UnicodeDecodeError) as e:
    why = getattr(e, "strerror", None) or "not UTF-8"
    raise UserError(f"--text: cannot read {path} ({why}); give a text file") from None


def _harness(args):
  """Loads the tasks: -> a function from an LM to a row for each task and metric.

  Raises UserError where lm-eval is missing, or a task cannot be loaded, before the model is.
  """
  try:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
  except ImportError as e:
    raise UserError(f"--tasks needs lm-eval ({e}); pip install -e '.[eval]'") from None
  from llmarch.infer.harness import Harness

  try:
    manager = TaskManager(include_path=args.include_path, include_defaults=args.include_path is None)
    known = manager.all_tasks
  except Exception as e:
    raise UserError(f"--include_path: cannot read the tasks of {args.include_path} ({_first(e)}); mend them") from None
  for name in args.tasks:
    where = args.include_path or "lm-eval"
    check(name in known, f"--tasks: there is no task {name!r} in {where}{_near(name, known)}")
  try:
    loaded = manager.load(args.tasks)
  except Exception as e:  # whatever the network, a data set's host or a task's own code raises
    raise UserError(
      f"--tasks: cannot load {', '.join(args.tasks)} ({_first(e)}); their data sets are fetched from the network unless"
      " they are cached"
    ) from None
  manager.load = lambda names: loaded  # the harness would fetch them again

  def run_tasks(lm) -> list[dict]:
    found = simple_evaluate(
      model=Harness(lm, args.batch), tasks=args.tasks, task_manager=manager, num_fewshot=args.num_fewshot,
      limit=args.limit, log_samples=False,
    )  # fmt: skip
    rows = []
    for task, results in found["results"].items():
      for name, value in results.items():
        metric, _, filtered = name.partition(",")
        if filtered and not metric.endswith("_stderr"):
          error = results.get(f"{metric}_stderr,{filtered}")
          error = None if isinstance(error, str) else error
          rows.append({"task": task, "metric": metric, "filter": filtered, "value": value, "stderr": error})
    return rows

  return run_tasks


def _near(name: str, known) -> str:
  """The nearest of the known tasks, which are thousands; else how many there are."""
  close = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {close[0]!r}?" if close else f", which has {len(known)}"


def _first(e: Exception) -> str:
  """An error of another package in a line."""
  line = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
  return f"{type(e).__name__}: {line[:200]}" if line else type(e).__name__


if __name__ == "__main__":
  from llmarch.__main__ import main as llmarch

  sys.exit(llmarch(["evaluate", *sys.argv[1:]]))
