"""Decoding is the full forward, faster: the cached loop against repeated uncached forwards, and its guards."""

import dataclasses
import functools
import io
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from spaces import HAND, attention, block, model, random_params
from tiers import plain_if, three

import llmarch
from llmarch import sharding
from llmarch.__main__ import main
from llmarch.config import Precision
from llmarch.data import companions
from llmarch.data.tokenizers import load_tokenizer
from llmarch.errors import UserError
from llmarch.infer import chat
from llmarch.infer import lm as infer
from llmarch.infer.decoder import decoding_params, make_decoder
from llmarch.infer.lm import LM, TextStream
from llmarch.layers.position import NTK, DynamicNTK, LongRoPE, RoPE
from llmarch.models.decoder import abstract
from llmarch.ops import sampling as ops
from llmarch.ops.sampling import Sampling

PROMPTS = [[7], [3, 11, 3, 25], [5, 1, 38, 2, 2, 19, 30, 4, 9, 6, 12, 17, 22]]  # windows in HAND are shorter
TEXT = model(block(attention(window=6)), block(), vocab_size=257, max_seq_len=64)
# Its attention is sharp, so that a frequency a little off changes tokens.
SHARP = model(block(attention(query_scale=4.0, position=RoPE(theta=9.0, scaling=DynamicNTK(factor=8.0, original=5)))))
OWN = {"text": TEXT, "sharp": SHARP}


@functools.cache
def lm_of(name: str) -> LM:
  config = OWN[name] if name in OWN else HAND[name]
  tokenizer = load_tokenizer("bytes") if name == "text" else None
  params = random_params(nnx.state(abstract(config)), seed=1)
  if tokenizer:  # the end of a text never has the largest logit
    params["embed"].get_value()[256] = 0
  return LM(config, params, tokenizer)


def with_length(config, length: int):
  """The config with RoPE scalings that depend on the length replaced by what they are at this one."""

  def fixed(scaling):
    match scaling:
      case DynamicNTK(factor=s, original=o):
        return NTK(factor=max(1.0, s * length / o - (s - 1)))
      case LongRoPE(short_factors=short, long_factors=long, original=o):
        kept = long if length > o else short
        return dataclasses.replace(scaling, short_factors=kept, long_factors=kept)
    return scaling

  def change(block):
    position = getattr(block.mixer, "position", None)
    if not isinstance(position, RoPE):
      return block
    position = dataclasses.replace(position, scaling=fixed(position.scaling))
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, position=position))

  return dataclasses.replace(config, blocks={name: change(block) for name, block in config.blocks.items()})


def uncached_greedy(lm: LM, prompt: list[int], n: int, prefix: bool = False, context: int | None = None) -> list[int]:
  """argmax of full forwards, one a token, with positions scaled to the prompt's length or to `context`."""
  config = with_length(lm.config, context or len(prompt))
  graph, length = nnx.graphdef(abstract(config)), len(prompt) + n
  marked = jnp.arange(length)[None] < len(prompt) if prefix else None
  forward = jax.jit(lambda p, *args: nnx.merge(graph, p)(*args, prefix=marked)[0])
  ids = prompt + [0] * n
  for t in range(len(prompt), length):
    logits = forward(lm.params, jnp.array([ids]), jnp.arange(length)[None])
    ids[t] = int(jnp.argmax(logits[0, t - 1]))
  return ids[len(prompt) :]


# ------------------------------------------------------------------------------------------ the equations


GREEDY = ["gpt2", "gemma2", "palm", "alibi_windows", "t5", "prefix", "sinks", "xpos", "sharp", "longrope", "hybrid"]


@pytest.mark.parametrize("name", three(["hybrid"].count, ["gemma2", "sinks"].count, GREEDY))
def test_cached_greedy_over_ragged_prompts_equals_uncached_greedy_of_each(name):
  lm = lm_of(name)
  assert lm.generate(PROMPTS, max_new_tokens=6) == [uncached_greedy(lm, prompt, 6) for prompt in PROMPTS]


def test_a_prefix_that_sees_itself_both_ways_equals_the_uncached_forward():
  lm = lm_of("prefix")
  both_ways = lm.generate(PROMPTS, max_new_tokens=5, prefix=True)
  assert both_ways == [uncached_greedy(lm, prompt, 5, prefix=True) for prompt in PROMPTS]
  assert both_ways != lm.generate(PROMPTS, max_new_tokens=5)


@pytest.mark.parametrize("name", plain_if(lambda name: name == "sharp", ["gemma2", "sharp"]))
def test_chunks_batches_slices_and_neighbours_change_nothing(name):
  lm = lm_of(name)
  generate = functools.partial(lm.generate, max_new_tokens=7, temperature=1.5, top_k=30, seed=5)
  whole = generate(PROMPTS)
  for chunk in (1, 4):
    assert generate(PROMPTS, chunk=chunk) == whole
  assert generate(PROMPTS, batch=2) == whole  # the second batch is padded with a row without tokens
  assert generate(PROMPTS[0]) == whole[0]
  assert generate([PROMPTS[0], PROMPTS[2], PROMPTS[2]])[::2] == whole[::2]
  pieces = [[] for _ in PROMPTS]
  assert generate(PROMPTS, stream=lambda row, ids: pieces[row].append(ids)) == whole
  assert [list(itertools.chain(*p)) for p in pieces] == whole
  assert len(pieces[0]) == 1 + -(-6 // infer.STREAM)


def test_exactly_max_seq_len_tokens_fit_and_one_more_is_refused():
  lm, prompt = lm_of("gemma2"), PROMPTS[2]
  room = lm.config.max_seq_len - len(prompt)
  assert lm.generate(prompt, max_new_tokens=room) == uncached_greedy(lm, prompt, room)
  with pytest.raises(UserError, match="max_seq_len"):
    lm.generate(prompt, max_new_tokens=room + 1)


def test_a_row_ends_before_its_stop_token_and_the_loop_with_the_last_row():
  lm = lm_of("t5")
  free = lm.generate(PROMPTS, max_new_tokens=9)
  stops = (free[1][4], free[2][2])
  until = [next((t for t, token in enumerate(row) if token in stops), len(row)) for row in free]
  assert lm.generate(PROMPTS, max_new_tokens=9, stop=list(stops)) == [r[:t] for r, t in zip(free, until)]

  programs, carry, params = prefilled(lm, PROMPTS[1:], stop_ids=stops)
  ends = [until[1], until[2]]
  first = np.array(carry["token"])
  carry, tokens, steps = programs.decode(params, carry, 20)
  assert int(steps) == max(ends)  # the prefill gave the first token; the last step gave the last row's stop
  for row, (end, want) in enumerate(zip(ends, free[1:])):
    assert [first[row], *np.array(tokens)[row]][: end + 1] == [*want[:end], -1]
  assert (np.array(tokens)[:, int(steps) :] == -1).all()
  assert int(programs.decode(params, carry, 20)[2]) == 0


def prefilled(lm: LM, prompts, mesh=None, **options):
  """Programs, their carry after the prompts (16 tokens at most), and parameters."""
  batch = len(prompts)
  place = dict(mesh=mesh, prefill_layout="megatron", decode_layout="megatron")
  programs = make_decoder(lm.config, batch=batch, max_len=64, chunk=16, sampling=Sampling(), **place, **options)
  params = decoding_params(lm.config, lm.params)
  if mesh is not None:
    params = jax.device_put(params, sharding.shardings(params, sharding.LAYOUTS["megatron"], mesh))
  tokens, positions = np.zeros((batch, 16), np.int32), np.full((batch, 16), -1, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, 16 - len(prompt) :] = prompt
    positions[i, 16 - len(prompt) :] = np.arange(len(prompt))
  carry = programs.start(jax.random.split(jax.random.key(0), batch), jnp.full(batch, 24))
  return programs, programs.prefill(params, carry, tokens, positions), params


@pytest.mark.parametrize("batch", [1, 3])
def test_the_decode_loop_updates_its_caches_in_place_and_takes_parameters_as_arguments(batch):
  lm = lm_of("gemma2")
  programs, carry, params = prefilled(lm, PROMPTS[-batch:])
  compiled = programs.decode.lower(params, carry, 5).compile()
  caches = {
    ",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(carry["state"]["layers"])
  }  # [B, K, S, H], global and windowed
  assert len(caches) == 2
  for shape in caches:
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", compiled.as_text())
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= size(carry["state"])
  assert memory.argument_size_in_bytes >= size(params) + size(carry["state"])
  assert memory.temp_size_in_bytes < size(carry["state"]["layers"])


@pytest.mark.parametrize("name, sentence", [("encoder", "it sees the future"), ("encoder_decoder", "reads a source")])
def test_a_decoder_of_a_model_that_cannot_decode_is_refused(name, sentence):
  with pytest.raises(UserError, match=sentence):
    make_decoder(HAND[name], batch=1, max_len=8, chunk=4, sampling=Sampling())


@pytest.mark.full
def test_decoding_over_a_mesh_equals_decoding_on_one_device():
  lm, found = lm_of("llama"), []
  for mesh in (None, sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])):
    programs, carry, params = prefilled(lm, PROMPTS[1:], mesh)
    first = np.array(carry["token"])
    carry, tokens, _ = programs.decode(params, carry, 6)
    found.append(np.column_stack([first, tokens]))
  assert np.array_equal(*found)
  cache = jax.tree.leaves(carry["state"]["layers"][0])[0]
  assert cache.sharding.shard_shape(cache.shape) == (1, 1, *cache.shape[2:])


def test_logits_are_those_of_each_sequence_alone_and_zero_at_padding():
  lm = lm_of("hybrid")
  graph = nnx.graphdef(abstract(lm.config))
  ids, mask = np.full((4, 9), -100), np.zeros((4, 9), int)
  where = [range(0, 9), range(4, 9), range(0, 3), (1, 2, 5, 8)]
  draws = np.random.default_rng(0)
  for i, at in enumerate(where):
    ids[i, list(at)], mask[i, list(at)] = draws.integers(0, lm.config.vocab_size, len(at)), 1
  found = lm.logits(ids, mask)
  assert found.dtype == np.float32
  for i, at in enumerate(where):
    alone = nnx.merge(graph, lm.params)(jnp.array(ids[i : i + 1, list(at)]), jnp.arange(len(at))[None])[0]
    np.testing.assert_allclose(found[i, list(at)], alone[0], rtol=2e-5, atol=2e-5)
  assert (found[mask == 0] == 0).all()
  assert np.array_equal(lm.logits(ids[:1].tolist()), lm.logits(ids[:1], [[True] * 9]))


# -------------------------------------------------------------------------------------------- the samplers

FILTERS = [
  {"repetition_penalty": 1.7},
  {"repetition_penalty": 0.6},
  {"top_k": 7},
  {"top_p": 0.6},
  {"top_p": 1e-9},
  {"min_p": 0.2},
  {"min_p": 1.0},
  {"temperature": 0.4, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


def random_logits(B=5, V=50):
  draws = np.random.default_rng(3)
  return (3 * draws.normal(size=(B, V))).astype(np.float32), draws.integers(0, V, (B, 8))


def seen_of(history, V=50):
  return np.array([[token in row for token in range(V)] for row in history])


def naive(logits, history, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
  """The definitions, a token at a time, in float64."""
  out = logits.astype(np.float64)
  softmax = lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum()
  for row, past in zip(out, history):
    for token in set(past.tolist()):
      row[token] = row[token] / repetition_penalty if row[token] > 0 else row[token] * repetition_penalty
    row /= temperature
    if top_k:
      row[np.argsort(-row)[top_k:]] = -np.inf
    order, mass = np.argsort(-row), 0.0
    probability = softmax(row)
    for token in order:
      if mass >= top_p:
        row[token] = -np.inf
      mass += probability[token]
    row[softmax(row) < min_p * softmax(row).max()] = -np.inf
  return out


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_their_definitions(options):
  logits, history = random_logits()
  found = ops.filtered(logits, seen_of(history), sampling=Sampling(**{"temperature": 1.0} | options))
  np.testing.assert_allclose(found, naive(logits, history, **options), rtol=1e-5)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_those_of_transformers(options):
  torch = pytest.importorskip("torch")
  hf = pytest.importorskip("transformers.generation.logits_process")
  classes = {
    "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
    "temperature": hf.TemperatureLogitsWarper,
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
  }
  logits, history = random_logits()
  want = torch.tensor(logits)
  for name, make in classes.items():
    want = make(options[name])(torch.tensor(history), want) if name in options else want
  found = ops.filtered(logits, seen_of(history), sampling=Sampling(**{"temperature": 1.0} | options))
  np.testing.assert_allclose(found, want.numpy(), rtol=1e-5)


def test_top_p_keeps_all_that_equal_the_last_one_kept():
  logits = np.log(np.array([[0.1, 0.4, 0.2, 0.2, 0.1]], np.float32))
  kept = np.isfinite(ops.filtered(logits, None, sampling=Sampling(temperature=1.0, top_p=0.5)))
  assert kept.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
  n, logits = 20_000, np.array([1.2, -0.3, 0.0, 2.0, -np.inf], np.float32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(n))
  drawn = ops.sample(jnp.tile(logits, (n, 1)), None, keys, sampling=Sampling(temperature=temperature))
  p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  counts = np.bincount(drawn, minlength=5)
  assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
  argmax = ops.sample(logits[None], None, None, sampling=Sampling())
  assert argmax.tolist() == [3]


def test_the_penalty_counts_the_prompt_and_what_was_generated():
  lm, prompt = lm_of("llama"), PROMPTS[2]
  ids = list(prompt)
  for _ in range(6):
    logits = lm.logits([ids])[:, -1]
    ids.append(int(naive(logits, np.array([ids]), repetition_penalty=3.0)[0].argmax()))
  assert lm.generate(prompt, max_new_tokens=6, repetition_penalty=3.0) == ids[len(prompt) :]


def test_seeds_and_row_numbers_choose_the_draws():
  lm = lm_of("llama")
  generate = functools.partial(lm.generate, [PROMPTS[1]] * 3, max_new_tokens=8, temperature=3.0)
  first = generate(seed=1)
  assert first == generate(seed=1) and first != generate(seed=2)
  assert len(set(map(tuple, first))) == 3
  assert len(set(generate(temperature=1e6)[0])) > 3  # the draws of a row are not one draw


# ------------------------------------------------------------------------------------------ kinds and text


def test_each_kind_of_prompt_gives_its_own_kind():
  lm = lm_of("text")
  text = "dé"
  ids = lm.tokenizer.encode(text)
  new = lm.generate(ids, max_new_tokens=5)
  assert type(new) is list and len(new) == 5
  assert lm.generate([ids, ids], max_new_tokens=5) == [new, new]
  assert lm.generate(text, max_new_tokens=5) == lm.tokenizer.decode(new)
  assert lm.generate([text], max_new_tokens=5) == [lm.tokenizer.decode(new)]
  array = np.array(ids, np.int64)
  for one in (lm.generate(array, max_new_tokens=5), *lm.generate(array[None], max_new_tokens=5)):
    assert one.dtype == np.int64 and one.tolist() == new
  for dtype in (np.uint8, object):  # which cannot hold every id
    one = lm.generate(array.astype(dtype), max_new_tokens=5)
    assert one.dtype == np.int32 and one.tolist() == new
  assert lm.generate(jnp.array(ids), max_new_tokens=5, temperature=jnp.float32(0)).tolist() == new
  torch = pytest.importorskip("torch")
  assert lm.generate(torch.tensor([ids]), max_new_tokens=5)[0].tolist() == new
  assert lm.generate(text, max_new_tokens=5, stop=chr(new[2]) if new[2] < 128 else new[2]) == lm.tokenizer.decode(
    new[: new.index(new[2])]
  )


def test_a_text_ends_at_the_tokenizers_end():
  lm = lm_of("text")
  new = lm.generate(lm.tokenizer.encode("ab"), max_new_tokens=6)
  tokenizer = type("Ending", (type(lm.tokenizer),), {"end_id": new[3]})()
  want = tokenizer.decode(new[: new.index(new[3])])
  assert LM(lm.config, lm.params, tokenizer).generate("ab", max_new_tokens=6) == want


@pytest.mark.full
@pytest.mark.parametrize("name", ["sharp", "longrope"])
def test_the_first_tokens_do_not_depend_on_how_many_may_follow(name):
  lm = lm_of(name)
  for prompt in PROMPTS:
    few, many = (lm.generate(prompt, max_new_tokens=n) for n in (3, 11))
    assert few == many[:3] and few[0] == int(lm.logits([prompt])[0, -1].argmax())
  assert lm.generate(PROMPTS, max_new_tokens=6, context=20) == [uncached_greedy(lm, p, 6, context=20) for p in PROMPTS]


def test_other_numbers_of_sampling_and_other_stops_need_no_other_program(monkeypatch):
  lm, made = lm_of("llama"), []
  monkeypatch.setattr(infer, "make_decoder", lambda *a, **options: made.append(make_decoder(*a, **options)) or made[-1])
  generate = functools.partial(lm.generate, PROMPTS[1], max_new_tokens=4)
  generate(temperature=0.7, top_k=5, stop=[1])
  generate(temperature=1.3, top_p=0.4, min_p=0.1, stop=[2, 3])
  assert made[0].decode is made[1].decode and made[0].prefill is made[1].prefill
  assert made[0].decode._cache_size() == made[0].prefill._cache_size() == 1


def test_a_stop_is_found_wherever_it_lies_in_the_text():
  lm = lm_of("text")
  text = lm.generate("dé", max_new_tokens=40)
  ids = lm.generate([*"dé".encode()], max_new_tokens=40)
  for start, size in ((1, 1), (3, 2), (5, 3), (9, 7)):
    stop, pieces = text[start : start + size], []
    want = text[: text.index(stop)]
    assert lm.generate("dé", max_new_tokens=40, stop=["never", stop]) == want
    keep = lambda row, piece, pieces=pieces: pieces.extend(piece)
    streamed = lm.generate("dé", max_new_tokens=40, stop=stop, stream=keep)
    assert streamed == "".join(pieces) == want
    pieces.clear()
    as_ids = [lm.generate([*"dé".encode()], max_new_tokens=40, stop=stop, stream=stream) for stream in (None, keep)]
    assert as_ids[0] == as_ids[1] == pieces == ids[: len(pieces)]
    assert lm.tokenizer.decode(pieces).rstrip("\ufffd") == want.rstrip("\ufffd")


def test_of_two_stops_the_one_that_is_complete_first_ends_the_text():
  for together in (1, 4):
    text = TextStream(load_tokenizer("bytes"), [], ("abcd", "c"))
    for at in range(0, 8, together):
      text.push(list(b"xxabcdxx")[at : at + together])
    assert str(text) == "xxab"


def test_special_tokens_of_a_prompt_and_of_a_stop_are_tokens_on_request():
  lm = lm_of("text")
  spelt, ids = "a<|endoftext|>b", [97, 256, 98]
  assert lm.generate(spelt, max_new_tokens=5) == lm.tokenizer.decode(lm.generate(ids, max_new_tokens=5))
  plain = lm.generate(spelt, max_new_tokens=5, special=False)
  assert plain == lm.tokenizer.decode(lm.generate([*spelt.encode()], max_new_tokens=5))
  assert lm.parse_stops(["<|endoftext|>", 3, "b"], True) == ((256, 3), ("b",))
  assert lm.parse_stops(["<|endoftext|>", 3, "b"], False) == ((3,), ("<|endoftext|>", "b"))


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- generation %}<|{{ m.role }}|>{{ m.content | trim | tojson }}{{ eos_token }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def test_a_chat_is_the_text_of_its_template():
  lm = lm_of("text")
  tokenizer = load_tokenizer("bytes")
  tokenizer.companions = companions.Companions(
    {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": json.dumps({"eos_token": "<|endoftext|>"})}
  )
  chatty, messages = LM(lm.config, lm.params, tokenizer), [{"role": "user", "content": " é"}]
  prompt = '<|user|>"é"<|endoftext|><|assistant|>'
  assert chatty.begin_reply(messages).prompt_ids == tokenizer.encode(prompt, special=True)
  want = lm.generate(prompt, max_new_tokens=7)
  assert chatty.chat(messages, max_new_tokens=7) == want
  with pytest.raises(UserError, match="no chat template"):
    lm.chat(messages)
  for bad in ([], "hello", [{"content": "x"}], [{"role": "tool", "content": "x"}]):
    with pytest.raises(UserError, match="messages"):
      chatty.chat(bad)
  utils = pytest.importorskip("transformers.utils.chat_template_utils")
  said = [*messages, {"role": "assistant", "content": "yes <b>"}, {"role": "user", "content": "and\n"}]
  named = dict(bos_token="B", eos_token="E")
  theirs, _ = utils.render_jinja_template([said], chat_template=TEMPLATE, add_generation_prompt=True, **named)
  assert chat.render(TEMPLATE, said, **named) == theirs[0]


def test_the_command_answers_a_message_and_goes_on_with_a_chat(tmp_path, capsys, monkeypatch):
  lm = lm_of("text")
  lm.save(tmp_path / "model")
  (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
  chatty, user = llmarch.load(tmp_path / "model"), lambda text: {"role": "user", "content": text}
  first = chatty.chat([user("hi")], max_new_tokens=3)
  said = [user("hi"), {"role": "assistant", "content": first}, user("and")]
  second = chatty.chat(said, max_new_tokens=3)
  options = ["generate", str(tmp_path / "model"), "--chat", "--max_new_tokens=3"]
  assert main([*options, "--prompt=hi"]) == 0
  assert capsys.readouterr().out == f"{first}\n"
  monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nand\n"))
  assert main(options) == 0
  assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_template_cannot_reach_out_of_its_sandbox():
  for evil in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}"):
    with pytest.raises(UserError, match="template"):
      text = chat.render(evil, [{"role": "user", "content": "x"}])
      assert text == "", text  # an unsafe attribute is undefined in a sandbox, which prints nothing
      raise UserError("template")


def test_a_checkpoints_end_ids_end_a_text_without_a_tokenizer(tmp_path):
  lm = lm_of("llama")
  free = lm.generate(PROMPTS[2], max_new_tokens=9)
  ending = LM(lm.config, lm.params, end_ids=(free[4], 10**6))
  want = free[: free.index(free[4])]
  assert ending.generate(PROMPTS[2], max_new_tokens=9) == want
  ending.save(tmp_path / "model")
  assert llmarch.load(tmp_path / "model").generate(PROMPTS[2], max_new_tokens=9) == want


def test_streamed_text_never_shows_half_a_character():
  tokenizer = load_tokenizer("bytes")
  whole = "naïve 数 🙂!"
  text = TextStream(tokenizer, tokenizer.encode("x"))
  pieces = [text.push([byte]) for byte in whole.encode()]
  assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces)
  cut = TextStream(tokenizer, [])
  assert cut.push(list("é".encode()[:1])) == "" and cut.push([], last=True) == "\ufffd"


def test_the_command_prints_what_generate_gives(tmp_path, capsys):
  lm = lm_of("text")
  lm.save(tmp_path / "model")
  (tmp_path / "prompt.txt").write_text("two")
  want = lm.generate(["one", "two"], max_new_tokens=6, temperature=0.7, seed=3)
  options = [f"--from={tmp_path / 'model'}", "--max_new_tokens=6", "--temperature=0.7", "--seed=3"]
  assert main(["generate", *options, "--prompt=one", f"--prompt_file={tmp_path / 'prompt.txt'}", "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == [
    {"prompt": "one", "text": want[0]},
    {"prompt": "two", "text": want[1]},
  ]
  for more in ([], ["--nostream"]):
    assert main(["generate", *options, "--prompt=one", *more]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"one{want[0]}\n" and "tokens in" in shown.err
  wrong = ("--top_p=7", "--seed=x", "--layout.decode=wg_x")  # the last for want of a mesh
  for bad in (["--prompt="], ["--prompt_file=/none"], [], *(["--prompt=a", flag] for flag in wrong)):
    assert main(["generate", *options, *bad]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------- guards

BAD = [
  ("prompts", dict(prompts=[])),
  ("prompts", dict(prompts=7)),
  ("prompts", dict(prompts=None)),
  ("prompts", dict(prompts={"a": 1})),
  ("prompts", dict(prompts={1})),
  ("prompts", dict(prompts=np.array(5))),
  (r"prompts\[0\]", dict(prompts="")),
  (r"prompts\[1\]", dict(prompts=["a", ""])),
  (r"prompts\[1\]", dict(prompts=[[1], []])),
  (r"prompts\[1\].*257", dict(prompts=[[1], [2, 257]])),
  (r"prompts\[0\].*-1", dict(prompts=[-1, 3])),
  (r"prompts\[0\]", dict(prompts=[2**40])),
  (r"prompts\[0\]", dict(prompts=np.array([1, 2**40]))),
  (r"prompts\[0\].*float", dict(prompts=[1.0, 2.0])),
  (r"prompts\[0\].*float", dict(prompts=np.array([1.0]))),
  (r"prompts\[0\].*bool", dict(prompts=[True, 3])),
  (r"prompts\[0\].*bool", dict(prompts=np.array([True]))),
  (r"prompts\[0\].*list", dict(prompts=np.ones((2, 2, 2), int))),
  (r"prompts\[0\].*max_seq_len", dict(prompts=[1] * 62)),
  (r"prompts\[1\].*max_seq_len", dict(prompts=["a", "b" * 62])),
  ("max_new_tokens", dict(max_new_tokens=0)),
  ("max_new_tokens", dict(max_new_tokens=-1)),
  ("max_new_tokens", dict(max_new_tokens=2.0)),
  ("max_new_tokens", dict(max_new_tokens=True)),
  ("max_new_tokens", dict(max_new_tokens=10**9)),
  ("temperature", dict(temperature=-0.1)),
  ("temperature", dict(temperature=float("nan"))),
  ("temperature", dict(temperature=float("inf"))),
  ("temperature", dict(temperature="1")),
  ("top_k", dict(top_k=-1)),
  ("top_k", dict(top_k=258)),
  ("top_k", dict(top_k=1.5)),
  ("top_p", dict(top_p=0.0)),
  ("top_p", dict(top_p=1.1)),
  ("top_p", dict(top_p=float("nan"))),
  ("min_p", dict(min_p=-0.1)),
  ("min_p", dict(min_p=1.1)),
  ("repetition_penalty", dict(repetition_penalty=0.0)),
  ("repetition_penalty", dict(repetition_penalty=float("inf"))),
  ("temperatur.*did you mean 'temperature'", dict(temperatur=1.0)),
  ("stop", dict(stop=[257])),
  ("stop", dict(stop=-1)),
  ("stop", dict(stop=[""])),
  ("stop", dict(stop=[1.0])),
  ("stop", dict(stop=1.0)),
  ("stop", dict(stop=None)),
  ("stream", dict(stream=3)),
  ("seed", dict(seed=-1)),
  ("seed", dict(seed=2**32)),
  ("batch", dict(batch=0)),
  ("chunk", dict(chunk=0)),
  ("prefix", dict(prefix=True)),
  ("special", dict(special=1)),
  ("context", dict(context=0)),
]


@pytest.mark.parametrize("names,bad", BAD, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_input_is_refused_by_name_before_anything_is_compiled(names, bad, monkeypatch):
  monkeypatch.setattr(LM, "_decode", lambda *args: pytest.fail("it would have been decoded"))
  with pytest.raises(UserError, match=names):
    lm_of("text").generate(**{"prompts": "a", "max_new_tokens": 3} | bad)


def test_a_model_that_sees_the_future_or_has_no_tokenizer_is_refused():
  with pytest.raises(UserError, match="bidirectional"):
    lm_of("encoder").generate([1], max_new_tokens=1)
  with pytest.raises(UserError, match="no tokenizer"):
    lm_of("llama").generate("a", max_new_tokens=1)


@pytest.mark.parametrize(
  "args",
  [
    ([1, 2],),
    ([],),
    ([[]],),
    ([[1], [1, 2]],),
    ([[1, 257]],),
    ([[-1]],),
    ([[1.0]],),
    ([[1] * 65],),
    (np.array(5),),
    ([[1, 2]], [[1]]),
    ([[1, 2]], [[1], [1, 0]]),
    ([[1, 2]], [[1, 2]]),
    ([[1, 2]], [[0, 0]]),
  ],
  ids=str,
)
def test_logits_refuse_bad_input(args):
  with pytest.raises(UserError, match="input_ids|attention_mask"):
    lm_of("text").logits(*args)


def test_logits_that_are_not_finite_raise_and_name_the_row():
  lm = lm_of("qwen3")  # its head is not tied, so that a bad embedding spoils the rows that hold it alone
  params = jax.tree.map(lambda p: p, lm.params)
  params["embed"].set_value(params["embed"].get_value().at[11, 0].set(jnp.nan))
  broken = LM(lm.config, params)
  for temperature in (0.0, 1.0):
    with pytest.raises(UserError, match=r"prompts\[1\] are not finite"):
      broken.generate([[7], [11]], max_new_tokens=2, temperature=temperature)
    assert len(broken.generate([7], max_new_tokens=1, temperature=temperature)) == 1


# ---------------------------------------------------------------------------------------------- on the disk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_loading_keeps_every_bit(dtype, tmp_path):
  config = model(block(attention(window=6)), block(), vocab_size=257, precision=Precision(param=dtype))
  lm = LM(config, random_params(nnx.state(abstract(config)), seed=1), load_tokenizer("bytes"))
  lm.save(tmp_path / "a" / "model")
  lm.save(tmp_path / "a" / "model")  # over an older one
  loaded = llmarch.load(tmp_path / "a" / "model")
  assert loaded.config == lm.config and loaded.tokenizer.fingerprint == lm.tokenizer.fingerprint
  for found, want in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(lm.params), strict=True):
    assert found.dtype == want.dtype == dtype and np.array_equal(found, want)
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model"]


def test_a_damaged_file_is_refused_wherever_the_damage(tmp_path):
  lm, folder = lm_of("llama"), tmp_path / "model"
  lm.save(folder)
  path = folder / "model.safetensors"
  good, draws = path.read_bytes(), np.random.default_rng(0)
  header = int.from_bytes(good[:8], "little")
  places = [*range(9), *draws.integers(8, 8 + header, 40), *draws.integers(8 + header, len(good), 40)]
  damaged = [good[:at] + bytes([good[at] ^ (1 << draws.integers(8))]) + good[at + 1 :] for at in map(int, places)]
  damaged += [good[:n] for n in (0, 5, 8, header, header + 8, len(good) - 1)] + [good + b"x"]
  for bytes_ in damaged:
    path.write_bytes(bytes_)
    with pytest.raises(UserError, match="safetensors"):
      infer.load_saved(folder)
  path.write_bytes(good)
  infer.load_saved(folder)


def test_a_config_of_a_model_that_is_no_json_is_refused(tmp_path):
  lm_of("text").save(tmp_path / "m")
  for text in ("", "{", "[]", "3", "[" * 100_000):
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
      llmarch.load(tmp_path / "m")


def test_loading_names_everything_that_does_not_fit(tmp_path):
  lm, folder = lm_of("llama"), tmp_path / "model"
  lm.save(folder)
  data = json.loads((folder / "config.json").read_text())
  data["model"]["blocks"]["a"]["ffn"]["d_ff"] = 29
  data["model"]["blocks"]["a"]["mixer"]["sinks"] = True
  data["model"]["final_norm"] = None
  (folder / "config.json").write_text(json.dumps(data))
  with pytest.raises(UserError, match="ffn/up is .*sinks is missing|sinks is missing.*ffn/up is") as caught:
    infer.load_saved(folder)
  assert "final_norm/scale is unknown" in str(caught.value)
  data["model"]["d_modle"] = 3
  (folder / "config.json").write_text(json.dumps(data))
  with pytest.raises(UserError, match="d_modle.*did you mean 'd_model'"):
    infer.load_saved(folder)
  for text in ("", "[]", "{", '{"format": 2}'):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
      infer.load_saved(folder)
  shutil.rmtree(folder)
  with pytest.raises(UserError, match="config.json"):
    llmarch.load(folder)


def test_saving_never_touches_a_folder_that_is_no_model(tmp_path):
  lm = lm_of("llama")
  for name in ("notes.txt", "config.json"):
    folder = tmp_path / name.split(".")[0]
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(UserError, match="other files"):
      lm.save(folder)
    assert (folder / name).read_text() == "mine" and len(list(folder.iterdir())) == 1
  (tmp_path / "empty").mkdir()
  lm.save(tmp_path / "empty")
  with pytest.raises(UserError, match="is a file"):
    lm.save(tmp_path / "notes" / "notes.txt")
  (tmp_path / "empty" / "mine.txt").write_text("mine")
  with pytest.raises(UserError, match="other files"):
    lm.save(tmp_path / "empty")
