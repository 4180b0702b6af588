"""The page of pairs: which two features of a model and its programs were tried together, under which equations.

A feature is an option value of a config (covering.py), or a choice of the program around the model: a mesh axis of
training, a remat policy, an objective, a packing, a layout of inference, a format of the decoding state. Tests report
what they checked through the fixture `checked`; a pair is

    equal     where a test that passed had both in one layer (or in one program, for what is not of a layer), or
    refused   where the code gives a sentence for every config with both that this module can make.

Two values of one field, or of two fields that are never in one layer or one program, are no pair. `write` makes the
page of all records of the present sources, and leaves it as it is while there is a pair that is neither.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import re
import types
import typing
from collections import Counter, defaultdict

import covering
import spaces

from llmarch.config import ModelConfig, Precision
from llmarch.errors import UserError
from llmarch.layers.stack import REMAT_POLICIES
from llmarch.run_config import DataConfig, RunConfig, TrainConfig
from llmarch.sharding import ATTENTION, FEED_FORWARD, RING_FORMS, TRAINING, find_layout

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/composability.md"

EQUATIONS = {
  "1": "the forward pass (or its gradients) is that of the float64 oracle",
  "2": "a change of a token reaches what the masks allow, and nothing else",
  "3": "prefill and decoding give the logits of the full forward pass (to its rounding, where the state has a format)",
  "4": "padded, ragged and packed rows give what each document alone gives",
  "5": "chunks of any size give the same",
  "6": "scanned, unstacked and rematerialised layers compute the same",
  "7": "a layout or a mesh gives one device's numbers",
}


def values_of(owner, field: str) -> tuple:
  """The choices of a field that is a Literal."""
  return typing.get_args(spaces.field_types(owner)[field])


# The choices of programs: {field: its values}. Those of a training step and those of a decoder are in no program
# together. A mesh axis is there or not, so that each is a field.
TRAINING_FIELDS = {
  **{f"mesh.{axis}": ("given",) for axis in TRAINING},
  "remat": tuple(map(repr, ("none", *REMAT_POLICIES))),
  "loss": tuple(map(repr, values_of(TrainConfig, "loss"))),
  "z_loss": ("given",),
  "label_smoothing": ("given",),
  "packing": tuple(map(repr, values_of(DataConfig, "packing"))),
}
DECODING_FIELDS = {
  "state": tuple(map(repr, values_of(Precision, "state"))),
  "layout": (*FEED_FORWARD, "megatron"),
  "layout.attention": tuple(ATTENTION),
  "layout.ring": RING_FORMS,
}
PROGRAMS = {"training": TRAINING_FIELDS, "decoding": DECODING_FIELDS}
PROGRAM_OF = {
  f"{field}={value}": program
  for program, fields in PROGRAMS.items()
  for field, some in fields.items()
  for value in some
}
FEATURES = list(PROGRAM_OF)


def layout_features(name: str) -> list[str]:
  """The features of a layout by its name: "ws_2d+batch_z+latency" has three."""
  first, *rest = name.split("+")
  attention = next((part for part in rest if part in ATTENTION), "heads")
  rings = [f"layout.ring={part}" for part in rest if part in RING_FORMS]
  return [f"layout={first}", f"layout.attention={attention}", *rings]


# ------------------------------------------------------------------------------------------------- records


def record(equations: str, config: ModelConfig | None, features) -> dict:
  """What a test checked, for `keep`: a site is the option values of one layer."""
  unknown = set(features) - set(FEATURES)
  assert not unknown and set(equations.split()) <= EQUATIONS.keys(), (unknown, equations)
  sites = [] if config is None else sorted(map(sorted, set(covering.sites(config))))
  return {"equations": equations.split(), "sites": sites, "features": sorted(features)}


@functools.cache
def sources() -> str:
  """A digest of the package: records of other sources are no evidence."""
  digest = hashlib.sha256()
  for path in sorted((ROOT / "llmarch").rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def records_of(page: pathlib.Path) -> pathlib.Path:
  return page.with_suffix(".jsonl")


def keep(page: pathlib.Path, test: str, records: list[dict]) -> None:
  """Adds what a test checked to the records beside a page."""
  page.parent.mkdir(parents=True, exist_ok=True)
  with records_of(page).open("a") as f:
    f.write(json.dumps({"sources": sources(), "test": test, "records": records}) + "\n")


def kept(page: pathlib.Path) -> list[dict]:
  """The records of the present sources: of each test, those of its last run."""
  if not records_of(page).exists():
    return []
  lines = map(json.loads, records_of(page).read_text().splitlines())
  latest = {line["test"]: line["records"] for line in lines if line["sources"] == sources()}
  return [record for records in latest.values() for record in records]


def equal_pairs(records: list[dict]) -> dict[tuple[str, str], set[str]]:
  """{pair of features in alphabetical order: the equations under which a test had both}."""
  found = defaultdict(set)
  for one in records:
    for site in one["sites"] or [[]]:
      for pair in itertools.combinations(sorted({*site, *one["features"]}), 2):
        found[pair].update(one["equations"])
  return found


# ------------------------------------------------------------------------------------ what is no pair, or refused


@functools.cache
def parts() -> covering.Parts:
  """Where each option value is found; the list by hand comes first, so that sentences rarely change."""
  configs = (*spaces.HAND.values(), *covering.draws(covering.DRAWS))
  return covering.Parts([single for config in configs for single in covering.singles(config)])


@functools.cache
def space() -> tuple[str, ...]:
  """Every feature: the option values, then the choices of programs."""
  return (*sorted(parts().where), *FEATURES)


def field_of(feature: str) -> str:
  return feature.partition("=")[0]


def is_pair(u: str, v: str) -> bool:
  """Whether two features could be in one layer or one program."""
  if field_of(u) == field_of(v):
    return False
  programs = [PROGRAM_OF[x] for x in (u, v) if x in PROGRAM_OF]
  if len(programs) == 2:
    return programs[0] == programs[1]
  return len(programs) == 1 or next(parts().places(u, v), None) is not None


def program(config: ModelConfig, features) -> RunConfig | ModelConfig:
  """The config of a training step or of a decoder with these features; raises UserError where the code refuses it.

  The sizes of the config must suit the mesh: see `covering.even`.
  """
  chosen = {field_of(f): f.partition("=")[2].strip("'") for f in features}
  if all(PROGRAM_OF[f] == "training" for f in features):
    number = {name: 0.01 for name in ("z_loss", "label_smoothing") if name in chosen}
    words = {name: chosen[name] for name in ("remat", "loss") if name in chosen}
    mesh = ",".join(f"{axis}=2" for axis in TRAINING if f"mesh.{axis}" in chosen)
    train = TrainConfig(batch_size=16, seq_len=16, loss_chunk=4, **number, **words)
    return RunConfig(model=config, train=train, data=DataConfig(packing=chosen.get("packing", "chunks")), mesh=mesh)
  names = [chosen.get("layout", "ws_2d"), chosen.get("layout.attention"), chosen.get("layout.ring")]
  if names[0] == "megatron" and names[1] == "heads":
    names[1] = None
  axes = ("data", "tensor") if names[0] == "megatron" else ("x", "y", "z")
  find_layout("+".join(filter(None, names)), types.SimpleNamespace(shape=dict.fromkeys(axes, 2)))
  return covering.with_state(config, chosen.get("state", "float32"))


@functools.cache
def refusal(u: str, v: str) -> str:
  """The sentence with which the code refuses every config with both features; "" where it takes one."""
  inside = [x for x in (u, v) if x not in PROGRAM_OF]
  if len(inside) == 2:
    made = parts().join(u, v)
    return made if isinstance(made, str) else ""
  features = [x for x in (u, v) if x in PROGRAM_OF]
  hosts = [single for chain in parts().where[inside[0]].values() for single in chain[:3]] if inside else singles()
  sentence = ""
  for single in hosts[: covering.TRIES]:
    try:
      program(covering.even(single.config), features)
      return ""
    except UserError as e:
      sentence = sentence or str(e)
  return sentence


def singles() -> list[covering.Single]:
  return [single for name in ("llama", "mixtral") for single in covering.singles(spaces.HAND[name])]


# ------------------------------------------------------------------------------------------------- the page

SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789αβγδεζηθλμξπρστφχψω"
FAMILIES = {  # the rows of the summary: which fields belong to each
  "mixer": r"BlockConfig\.mixer",
  "mask": r"AttentionConfig\.(mask|window)",
  "attention, the rest": r"AttentionConfig\.|QKNorm\.",
  "latent attention": r"MLAConfig\.",
  "linear attention": r"LinearConfig\.",
  "cross-attention, encoder": r"CrossAttentionConfig\.|BlockConfig\.cross|ModelConfig\.encoder",
  "residual scheme": r"BlockConfig\.residual",
  "feed-forward": r"BlockConfig\.ffn|MLPConfig\.",
  "experts": r"MoEConfig\.|TopK\.|Groups\.|ExpertChoice\.",
  "norm": r"BlockConfig\.norm|ModelConfig\.final_norm|LayerNorm\.|RMSNorm\.|ScaleNorm\.",
  "position": r"RoPE\.|XPos\.|YaRN\.|LongRoPE\.|.*\.position",
  "embedding, head, initialiser": r"ModelConfig\.|EmbedConfig\.|HeadConfig\.",
  "mesh axis": r"mesh\.",
  "remat": r"remat",
  "objective": r"loss|z_loss|label_smoothing",
  "packing": r"packing",
  "layout": r"layout",
  "state format": r"state",
}


def family(feature: str) -> str:
  """The family of a feature; of a position, that of positions."""
  if re.match(r"(AttentionConfig|MLAConfig|EmbedConfig)\.position", feature):
    return "position"
  return next((name for name, pattern in FAMILIES.items() if re.match(pattern, feature)), "other")


def digits(equations) -> str:
  return " ".join(sorted(equations))


def missing(equal: dict, features=None) -> list[tuple[str, str]]:
  """Pairs that no passed test has and that the code does not refuse."""
  pairs = itertools.combinations(sorted(features or space()), 2)
  return [pair for pair in pairs if pair not in equal and is_pair(*pair) and not refusal(*pair)]


def write(page: pathlib.Path) -> str:
  """Writes the page of the records beside it, if they have every pair; returns a sentence about that."""
  equal = equal_pairs(kept(page))
  untried = missing(equal)
  if untried:
    some = "; ".join(f"{u} with {v}" for u, v in untried[:20])
    return f"{page} is left as it is: {len(untried)} pairs are neither tried nor refused: {some}"
  page.write_text(render(equal))
  return f"{page} is written: every pair is equal or refused"


def render(equal: dict[tuple[str, str], set[str]]) -> str:
  """The page as text."""
  known, state = space(), {}  # state: of a pair in the order of `known`, its equations or a sentence
  for u, v in itertools.combinations(known, 2):
    pair = tuple(sorted((u, v)))
    if is_pair(*pair):
      state[u, v] = digits(equal[pair]) if pair in equal else refusal(*pair)
  is_equal = lambda text: bool(re.fullmatch(r"[\d ]+", text))
  sets = Counter(text for text in state.values() if is_equal(text))
  sentences = list(dict.fromkeys(text for text in state.values() if not is_equal(text)))
  symbol = dict(zip([text for text, _ in sets.most_common()], SYMBOLS, strict=False))
  assert len(symbol) == len(sets) and len(sentences) <= 26
  symbol |= {text: chr(ord("A") + i) for i, text in enumerate(sentences)}
  total, refused = len(state), sum(not is_equal(text) for text in state.values())

  lines = [
    "# What goes with what",
    "",
    "Every feature against every other: an option value of a model's config, or a choice of the program around the"
    " model (a mesh axis of training, a remat policy, an objective, a packing, a layout of inference, a format of the"
    " decoding state). A pair is *equal* where a test that passed had both in one layer, or in one program for what is"
    " not of a layer; the numbers say which equations that test checked. A pair is *refused* where the code answers"
    " with a sentence. Two values of one field, and two values that no layer and no program can hold together, are no"
    " pair.",
    "",
    "`pytest --nightly` writes this page. By itself it is made by",
    "",
    "    pytest --composability=docs/composability.md tests/test_composability.py \\",
    "      tests/test_invariants.py::test_one_forward_serves_all_for_every_pair_of_options",
    "",
    "Several runs over the same sources add up. `tests/test_composability.py` holds this page against the code.",
    "",
    "## Summary",
    "",
    f"- {len(known) - len(FEATURES)} option values and {len(FEATURES)} choices of programs.",
    f"- {total} pairs: {total - refused} equal, {refused} refused, 0 not tried.",
    "",
    "| | equation |",
    "|---|---|",
    *(f"| ({number}) | {text} |" for number, text in EQUATIONS.items()),
    "",
    "| | pairs | why they are refused | which |",
    "|---|---|---|---|",
  ]
  for sentence in sentences:
    pairs = [pair for pair, text in state.items() if text == sentence]
    lines.append(f"| {symbol[sentence]} | {len(pairs)} | {sentence} | {some_of(pairs)} |")
  lines += [
    "",
    "## By family",
    "",
    "A cell has the equations under which every pair of the two families is equal that is not refused; its letters are"
    " the sentences above.",
    "",
  ]
  names = [name for name in (*FAMILIES, "other") if any(family(x) == name for x in known)]
  cells = defaultdict(list)
  for (u, v), text in state.items():
    cells[frozenset((family(u), family(v)))].append(text)
  lines += ["| |" + "|".join(f" {i} " for i in range(1, len(names) + 1)) + "|", "|---" * (len(names) + 1) + "|"]
  for i, row in enumerate(names):
    texts = [cells[frozenset((row, column))] for column in names[: i + 1]]
    lines.append(
      f"| {i + 1} {row} |" + "|".join(f" {cell(t, symbol, is_equal)} " for t in texts) + "|" * (len(names) - i)
    )
  lines += [
    "",
    "## Every pair",
    "",
    "Features are numbered; the cell of features 7 and 3 is the third letter of row 7. A dot is no pair; a capital"
    " letter is a sentence above; any other is a set of equations:",
    "",
    "| | equations | pairs |",
    "|---|---|---|",
    *(f"| {symbol[text]} | {text} | {count} |" for text, count in sets.most_common()),
    "",
    "<details><summary>The chart</summary>",
    "",
    "```",
  ]
  width = max(map(len, known))
  for i, u in enumerate(known):
    row = "".join(symbol[state[v, u]] if (v, u) in state else "." for v in known[:i])
    lines.append(f"{i + 1:3d} {u:{width}} {row}".rstrip())
  return "\n".join([*lines, "```", "", "</details>", ""])


def some_of(pairs: list[tuple[str, str]]) -> str:
  """Pairs in few words: what all share is said once, and long lists are cut by field."""
  shared = set(pairs[0]).intersection(*map(set, pairs))
  if len(pairs) > 1 and len(shared) == 1:
    (one,) = shared
    others = [v if u == one else u for u, v in pairs]
    return f"`{one}` with {fields(others)}"
  return " ".join(f"{fields([a for a, _ in pairs])} with {fields([b for _, b in pairs])}".split())


def fields(features: list[str]) -> str:
  """`RoPE.scaling=NTK, LongRoPE`: the values by field."""
  grouped = defaultdict(dict)
  for feature in features:
    name, _, value = feature.partition("=")
    grouped[name][value] = None
  return ", ".join(f"`{name}={', '.join(some)}`" for name, some in grouped.items())


def cell(texts: list[str], symbol: dict[str, str], is_equal) -> str:
  """What a cell of the summary says."""
  if not texts:
    return ""
  sets = [set(text.split()) for text in texts if is_equal(text)]
  both = [digits(set.intersection(*sets))] if sets else []
  return " ".join(filter(None, [*both, *sorted({symbol[text] for text in texts if not is_equal(text)})]))


# ---------------------------------------------------------------------------------------- reading it again


def read(text: str) -> tuple[list[str], dict[tuple[str, str], str]]:
  """A page -> the features, and {pair in alphabetical order: equations or a sentence}."""
  meaning = dict(re.findall(r"^\| (\S) \| ([\d ]+?) \| \d+ \|$", text, re.M))
  meaning |= {letter: why for letter, why in re.findall(r"^\| ([A-Z]) \| \d+ \| (.*?) \| `.*\|$", text, re.M)}
  rows = re.findall(r"^ *\d+ (\S+) *(.*)$", text[text.index("```\n") :], re.M)
  known, found = [name for name, _ in rows], {}
  for i, (name, cells) in enumerate(rows):
    assert len(cells) == i, (name, "has another number of cells than there are features above it")
    for other, letter in zip(known, cells, strict=False):
      if letter != ".":
        found[tuple(sorted((name, other)))] = meaning[letter]
  return known, found
