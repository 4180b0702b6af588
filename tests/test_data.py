"""Data: batches are pure, epochs whole, splits apart, damaged files refused, synthetic answers determined."""

import collections
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import threading
import types
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llmarch.build import build
from llmarch.commands import tokenizer as command
from llmarch.data import companions, packing, pipeline, sources, synthetic, tokenfile, tokenizers
from llmarch.errors import UserError
from llmarch.run_config import (
  JSONL,
  Copy,
  DataConfig,
  HFDataset,
  Induction,
  Needle,
  Recall,
  Stdlib,
  TextFiles,
  TokenFile,
)

END = 256
TASKS = [
  Copy(length=5, num_symbols=7),
  Recall(num_pairs=4, num_symbols=6),
  Induction(period=5, num_symbols=9),
  Needle(length=11, num_symbols=8),
]


def text_of(i):
  return f"document {i}: " + " ".join(f"word{(i * j) % 17}" for j in range(i % 13 + 1)) + "é" * (i % 3)


TEXTS = [text_of(i) for i in range(40)] + ["x" * 137, text_of(3)]  # one long, one twice


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for i, text in enumerate([*TEXTS, ""]):
    (folder / f"{i:03}.txt").write_bytes(text.encode())
  return folder


@pytest.fixture
def make(corpus, tmp_path):
  """make(data fields and make_pipeline arguments together) -> Pipeline."""
  fields = {f.name for f in dataclasses.fields(DataConfig)}

  def make(**changes):
    settings = dict(source=TextFiles(paths=(f"{corpus}/*.txt",)), cache_dir=str(tmp_path / "cache"))
    settings |= dict(
      validation_fraction=0.25, batch_size=4, seq_len=24, seed=3, vocab_size=257, split="train"
    )
    settings |= changes
    data = DataConfig(**{k: v for k, v in settings.items() if k in fields})
    return pipeline.make_pipeline(data, **{k: v for k, v in settings.items() if k not in fields})

  return make


KINDS = [dict(), dict(packing="documents"), dict(shuffle=False), dict(prefix=True, packing="documents")]
KINDS += [dict(source=task) for task in TASKS] + [dict(source=TASKS[0], prefix=True)]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rows_of(made, count):
  """The first `count` rows as dicts of [T] arrays."""
  steps = [made.batch(step) for step in range(-(-count // made.batch_size))]
  joined = {name: np.concatenate([b[name] for b in steps]) for name in steps[0]}
  return [{name: array[i] for name, array in joined.items()} for i in range(count)]


def oracle_documents(split, fraction=0.25):
  """The split's documents as lists of ids with their end: by the definition, in Python."""
  hashes = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in TEXTS}
  held_out = sorted(hashes, key=hashes.get)[: max(round(fraction * len(hashes)), 1)]
  return [[*text.encode(), END] for text in TEXTS if (text in held_out) == (split == "validation")]


# --------------------------------------------------------------------------------------------- purity


@each_kind
def test_batch_depends_on_the_step_alone(make, kind):
  made = make(**kind)
  first = [made.batch(step) for step in range(12)]
  again = make(**kind)
  for step in (7, 0, 11, 3, 3):
    assert_same(again.batch(step), first[step])
  assert any((first[0][name] != first[1][name]).any() for name in first[0])


@each_kind
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_at_any_step_continues_the_uninterrupted_run(make, kind, prefetch):
  whole = [make(**kind).batch(step) for step in range(9)]
  for start in range(9):
    batches = make(**kind, prefetch=prefetch).iterate(start)
    for expected in whole[start:]:
      assert_same(next(batches), expected)
    batches.close()


def test_closing_the_iterator_ends_its_thread(make):
  batches = make(prefetch=2).iterate(0)
  next(batches)
  threads = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
  assert threads
  batches.close()
  for thread in threads:
    thread.join(20)
    assert not thread.is_alive()


@each_kind
def test_rows_made_alone_are_those_of_the_global_batch(make, kind):
  data = make(**kind)
  for step in (0, 5):
    whole = data.batch(step)
    for rows in ([0, 1, 2, 3], [2, 3], [1], [3, 0]):
      assert_same(data.batch(step, rows), {name: array[rows] for name, array in whole.items()})


# sha256 of batches 0 and 20 of each of KINDS.
PINNED = (
  "17c57396eefc f2c4c04cff96 e4ad7be752e0 717bb9b8395b b4d6efc21e0f 0274f30ed6b0 d4955297dd10 1ff8c0319eea"
  " 9180abe0d141"
)


def test_batches_have_not_changed_since_format_1(make):
  """Pins shuffle, packing and draws against new versions of grain and NumPy; a change must raise FORMAT."""
  found = []
  for kind in KINDS:
    made, content = make(**kind), hashlib.sha256()
    for step in (0, 20):
      for name, array in sorted(made.batch(step).items()):
        content.update(name.encode() + array.tobytes())
    found.append(content.hexdigest()[:12])
  assert pipeline.FORMAT == 1
  assert " ".join(found) == PINNED


# ------------------------------------------------------------------------------------- epochs and packing


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_of_chunks_holds_every_row_of_the_stream_once(make, split, shuffle):
  made = make(split=split, shuffle=shuffle)
  stream = [END, *(i for ids in oracle_documents(split) for i in ids)]
  expected = [tuple(stream[i : i + 25]) for i in range(0, len(stream) - 24, 24)]
  rows = [(*row["tokens"], row["targets"][-1]) for row in rows_of(made, 3 * len(expected))]
  epochs = [rows[i * len(expected) : (i + 1) * len(expected)] for i in range(3)]
  if split == "validation":  # it has one epoch, and then padding
    assert collections.Counter(epochs[0]) == collections.Counter(expected)
    assert (epochs[0] == expected) == (not shuffle)
    assert {id for row in epochs[1] + epochs[2] for id in row} == {0}
    return
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(expected)
    assert (epoch == expected) == (not shuffle)
  assert (epochs[0] == epochs[1]) == (not shuffle) and (epochs[1] == epochs[2]) == (not shuffle)
  assert made.num_tokens == len(stream) - 1


def test_rows_of_chunks_are_consistent(make):
  for row in rows_of(make(), 20):
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
    np.testing.assert_array_equal(row["positions"], np.arange(24))
    assert (row["segment_ids"] == 0).all() and (row["loss_weights"] == 1).all()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seq_len", [7, 24, 200])
def test_an_epoch_of_packed_documents_counts_every_token_once(make, split, seq_len):
  made = make(split=split, seq_len=seq_len, packing="documents", batch_size=1)
  documents = oracle_documents(split)
  expected = collections.Counter()
  for ids in documents:
    for start in range(0, len(ids), seq_len):
      targets = ids[start : start + seq_len]
      inputs = [ids[start - 1] if start else END, *targets[:-1]]
      expected[tuple(inputs), tuple(targets)] += 1
  found, rows, counted = collections.Counter(), 0, 0
  while counted < made.num_tokens:
    row = {name: array[0] for name, array in made.batch(rows).items()}
    rows += 1
    used = row["positions"] >= 0
    counted += int(used.sum())
    assert not np.diff(used.astype(int)).max(initial=0) > 0, "padding comes last"
    assert (row["loss_weights"] == used).all()
    assert not any(row[name][~used].any() for name in ("tokens", "targets", "segment_ids"))
    segments = row["segment_ids"][used]
    assert (
      list(dict.fromkeys(segments)) == list(range(1, segments.max() + 1)) and (np.diff(segments) >= 0).all()
    )
    for segment in range(1, segments.max() + 1):
      here = row["segment_ids"] == segment
      np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
      found[tuple(row["tokens"][here].tolist()), tuple(row["targets"][here].tolist())] += 1
  assert found == expected
  assert counted == made.num_tokens == sum(map(len, documents))


@hypothesis.given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 25))
@hypothesis.settings(deadline=None)
def test_cut_tiles_every_document(lengths, seq_len):
  starts, sizes = packing.cut(np.array(lengths), seq_len)
  assert sizes.max() <= seq_len and sizes.min() > 0
  tokens = [t for start, size in zip(starts, sizes, strict=True) for t in range(start, start + size)]
  assert tokens == list(range(sum(lengths)))
  assert len(sizes) == sum(-(-n // seq_len) for n in lengths)


@hypothesis.given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
@hypothesis.settings(deadline=None)
def test_best_fit_decreasing_equals_the_quadratic_search(sizes):
  rows = packing.best_fit_decreasing(np.array(sizes), 20)
  loads = []
  for size in sorted(sizes, reverse=True):
    fits = [i for i, load in enumerate(loads) if load + size <= 20]
    if fits:
      loads[max(fits, key=loads.__getitem__)] += size
    else:
      loads.append(size)
  assert sorted(np.bincount(rows, weights=sizes).tolist()) == sorted(loads)
  first = [rows.tolist().index(row) for row in range(rows.max() + 1)]
  assert first == sorted(first)


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None)
def test_a_stream_reads_its_documents_as_if_they_were_joined(data):
  lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
  chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
  hypothesis.assume(chosen.any())
  tokens, ends = np.arange(100, 100 + sum(lengths), dtype=np.uint16), np.cumsum(lengths)
  stream = packing.Stream(tokens, ends, chosen, 7)
  kept = [
    t for end, n, keep in zip(ends, lengths, chosen, strict=True) if keep for t in tokens[end - n : end]
  ]
  joined = [7, *kept]
  assert len(stream) == len(joined) - 1
  for start in range(len(joined)):
    for stop in range(start, len(joined)):
      assert stream.read(start, stop - start).tolist() == joined[start : stop + 1]


@pytest.mark.parametrize("packed", ["chunks", "documents"])
def test_a_prefix_opens_each_piece_and_only_what_it_shows_is_not_counted(make, packed):
  cuts = set()
  for row in rows_of(make(prefix=True, packing=packed), 60):
    used = row["positions"] >= 0
    assert not row["prefix"][~used].any()
    for segment in set(row["segment_ids"][used]):
      here = np.flatnonzero(used & (row["segment_ids"] == segment))
      cut = int(row["prefix"][here].sum())
      cuts.add(cut)
      assert row["prefix"][here[:cut]].all() and cut < len(here)
      shown = [j + 1 < cut for j in range(len(here))]  # the target of j is input j + 1
      np.testing.assert_array_equal(row["loss_weights"][here], 1.0 - np.array(shown))
  assert 0 in cuts and len(cuts) > 10


def test_text_is_measured_in_bytes_and_ends_of_documents(make):
  made = make()
  documents = oracle_documents("train")
  assert made.num_documents == len(documents)
  assert made.num_bytes == sum(len(ids) - 1 for ids in documents)
  assert made.bytes_per_token == made.num_bytes / (made.num_bytes + len(documents))
  assert make(source=TASKS[0]).bytes_per_token == 1.0


# ------------------------------------------------------------------------------------------------ splits


def test_train_and_validation_share_no_document(make):
  seen = {}
  for split in ("train", "validation"):
    made = make(split=split, packing="documents", seq_len=300, batch_size=1)
    seen[split] = set()
    for row in rows_of(made, 2 * made.num_documents):
      for segment in set(row["segment_ids"]) - {0}:
        seen[split].add(bytes(row["targets"][row["segment_ids"] == segment].astype(np.uint16)))
  assert not seen["train"] & seen["validation"]
  assert len(seen["train"] | seen["validation"]) == len(set(TEXTS))
  assert len(seen["validation"]) == round(0.25 * len(set(TEXTS)))


@hypothesis.given(st.sets(st.integers(0, 30), min_size=13), st.data(), st.floats(0.01, 0.9))
@hypothesis.settings(deadline=None)
def test_equal_documents_fall_on_the_same_side(distinct, data, fraction):
  hashes = [*distinct, *data.draw(st.lists(st.sampled_from(sorted(distinct))))]
  hashes = np.array(data.draw(st.permutations(hashes)), np.uint64)
  sides = {split: pipeline.split_documents(hashes, fraction, split) for split in ("train", "validation")}
  assert (sides["train"] ^ sides["validation"]).all() and sides["train"].any() and sides["validation"].any()
  assert not set(hashes[sides["train"]].tolist()) & set(hashes[sides["validation"]].tolist())


# ------------------------------------------------------------------------------------------------- hash


def test_the_hash_names_all_that_decides_a_batch(make, corpus, tmp_path):
  base = make()
  tokenizers.train_bpe(TEXTS, 300).save(tmp_path / "bpe")
  changes = [
    dict(source=TextFiles(paths=(f"{corpus}/0[0-2]*.txt",))),
    dict(source=TextFiles(paths=(f"{corpus}/*.txt",), separator=" ")),
    dict(tokenizer=str(tmp_path / "bpe"), vocab_size=300),
    dict(packing="documents"),
    dict(validation_fraction=0.3),
    dict(shuffle=False),
    dict(batch_size=2),
    dict(seq_len=23),
    dict(seed=4),
    dict(split="validation"),
    dict(prefix=True),
    *(dict(source=task) for task in TASKS),
    *(dict(source=dataclasses.replace(task, num_symbols=10)) for task in TASKS),
  ]
  hashes = [base.hash] + [make(**change).hash for change in changes]
  assert len(set(hashes)) == len(hashes)
  (corpus / "000.txt").write_text("changed")
  assert make().hash not in hashes


def test_the_hash_does_not_name_where_files_lie_or_who_reads(make, corpus, tmp_path):
  base = make()
  corpus.rename(tmp_path / "moved")
  moved = TextFiles(paths=(f"{tmp_path}/moved/*.txt",))
  tokens = tmp_path / "a.tokens"
  tokenfile.write_tokens(tokens, sources.documents(moved), tokenizers.ByteTokenizer())
  jsonl = tmp_path / "a.jsonl"
  jsonl.write_text("\n".join(json.dumps({"content": text}) for text in TEXTS))
  tokenizers.ByteTokenizer().save(tmp_path / "saved")
  for change in (
    dict(source=moved),
    dict(source=moved, cache_dir=str(tmp_path / "other")),
    dict(source=moved, prefetch=0),
    dict(source=moved, vocab_size=300),
    dict(source=moved, tokenizer=str(tmp_path / "saved")),
    dict(source=TokenFile(path=str(tokens))),
    dict(source=JSONL(paths=(str(jsonl),), field="content")),
  ):
    assert make(**change).hash == base.hash, change
  assert_same(make(source=TokenFile(path=str(tokens))).batch(2), make(source=moved).batch(2))


# ------------------------------------------------------------------------------------- token files, caches


class Wide(tokenizers.ByteTokenizer):
  """A tokenizer with more ids than 16 bits hold: byte b is b + 70000."""

  vocab_size, end_id, definition = 70300, 70299, '{"kind": "wide"}'

  def encode_batch(self, texts):
    return [ids.astype(np.int64) + 70000 for ids in super().encode_batch(texts)]


class Broken(tokenizers.ByteTokenizer):
  """Spells an id in its text. 65536 + 7 and -65536 + 7 would wrap to 7 in uint16."""

  def encode_batch(self, texts):
    return [np.array([int(text)]) for text in texts]


@pytest.mark.parametrize("tokenizer", [tokenizers.ByteTokenizer(), Wide()], ids=["bytes", "wide"])
def test_a_token_file_holds_what_was_written(tmp_path, tokenizer):
  path = tmp_path / "a.tokens"
  tokenfile.write_tokens(path, TEXTS, tokenizer)
  store = tokenfile.open_tokens(path)
  expected = [i for text in TEXTS for i in [*tokenizer.encode(text), tokenizer.end_id]]
  assert store.tokens.tolist() == expected
  assert store.documents["num_bytes"].tolist() == [len(text.encode()) for text in TEXTS]
  assert store.tokens.itemsize == (2 if tokenizer.vocab_size <= 65536 else 4)


def test_every_flipped_byte_and_every_truncation_of_a_token_file_is_refused(tmp_path):
  path = tmp_path / "a.tokens"
  tokenfile.write_tokens(path, ["abc", "de", "fghij"], tokenizers.ByteTokenizer())
  good = path.read_bytes()
  damaged = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(len(good))]
  damaged += [good[:i] for i in range(len(good))] + [
    good + b"\0",
    good * 2,
    b"\0" * len(good),
    b"text\n" * 99,
  ]
  assert len(damaged) > 400
  for content in damaged:
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tokens is damaged: .*; write it again"):
      tokenfile.open_tokens(path)
  path.write_bytes(good)
  tokenfile.open_tokens(path)


@pytest.mark.parametrize(
  "field, lie, why",
  [
    (1, 9, "version"),
    (2, 4, "bytes long"),
    (2, 3, "bytes a token"),
    (3, 100, "below its vocabulary"),
    (4, 12, "bytes long"),
    (4, 1 << 60, "bytes long"),
    (5, 2, "bytes long"),
    (6, 1, "add up"),
    (7, bytes(32), "checksum"),
  ],
)
def test_a_header_that_lies_with_a_right_checksum_is_refused(tmp_path, field, lie, why):
  path = tmp_path / "a.tokens"
  tokenfile.write_tokens(path, ["abc", "de", "fghij"], tokenizers.ByteTokenizer())
  content = path.read_bytes()
  values = list(tokenfile.HEADER.unpack(content[: tokenfile.HEADER.size]))
  values[field] = lie
  head = tokenfile.HEADER.pack(*values)
  path.write_bytes(head + tokenfile.CRC.pack(zlib.crc32(head)) + content[tokenfile.HEADER_SIZE :])
  with pytest.raises(UserError, match=why):
    tokenfile.open_tokens(path)


def test_a_header_that_lies_about_documents_with_right_checksums_is_refused(tmp_path):
  """First one that counts a document as 12 tokens, so that the size agrees; then one without any."""
  path = tmp_path / "a.tokens"
  tokenfile.write_tokens(path, ["abc", "de"], tokenizers.ByteTokenizer())
  content = path.read_bytes()
  values = list(tokenfile.HEADER.unpack(content[: tokenfile.HEADER.size]))
  values[3], values[4], values[5] = 65536, values[4] + 12, 1
  head = tokenfile.HEADER.pack(*values)
  path.write_bytes(head + tokenfile.CRC.pack(zlib.crc32(head)) + content[tokenfile.HEADER_SIZE :])
  with pytest.raises(UserError, match="do not fill it"):
    tokenfile.open_tokens(path)
  values[4] = values[5] = 0
  head = tokenfile.HEADER.pack(*values)
  path.write_bytes(head + tokenfile.CRC.pack(zlib.crc32(head)))
  with pytest.raises(UserError, match="holds no documents"):
    tokenfile.open_tokens(path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
  def texts():
    yield "x" * (tokenfile.PIECE + 1)
    raise UserError("the source failed")

  path = tmp_path / "a.tokens"
  tokenfile.write_tokens(path, ["good"], tokenizers.ByteTokenizer())
  good = path.read_bytes()
  with pytest.raises(UserError, match="the source failed"):
    tokenfile.write_tokens(path, texts(), tokenizers.ByteTokenizer())
  for wrong in (1 << 16 | 7, -(1 << 16) | 7, 257):
    with pytest.raises(UserError, match="outside"):
      tokenfile.write_tokens(path, ["7", str(wrong)], Broken())
  with pytest.raises(UserError, match="no text"):
    tokenfile.write_tokens(path, [], tokenizers.ByteTokenizer())
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be written"):
    tokenfile.write_tokens(tmp_path / "file" / "a.tokens", ["x"], tokenizers.ByteTokenizer())
  assert path.read_bytes() == good and sorted(p.name for p in tmp_path.iterdir()) == ["a.tokens", "file"]


def test_a_cache_is_used_again_and_a_damaged_one_made_again(make, tmp_path, capsys):
  amounts = []
  first = make(progress=amounts.append)
  assert sum(amounts) == sum(len(text.encode()) for text in TEXTS)
  (cache,) = (tmp_path / "cache").iterdir()
  good, amounts[:] = cache.read_bytes(), []
  make(progress=amounts.append, split="validation")
  assert not amounts and capsys.readouterr().err == ""
  for damaged in (good[:-1], b"", good[:-99] + b"!" + good[-98:]):
    cache.write_bytes(damaged)
    assert_same(make(progress=amounts.append).batch(0), first.batch(0))
    assert amounts and cache.read_bytes() == good
    (notice,) = capsys.readouterr().err.splitlines()
    assert str(cache) in notice and "again" in notice
    amounts.clear()


def test_a_cache_of_another_corpus_under_this_name_is_made_again(make, tmp_path, capsys):
  first = make()
  (cache,) = (tmp_path / "cache").iterdir()
  good = cache.read_bytes()
  tokenfile.write_tokens(cache, ["another corpus"], tokenizers.ByteTokenizer())
  assert_same(make().batch(0), first.batch(0))
  assert cache.read_bytes() == good


def test_a_corpus_that_changes_while_it_is_read_is_refused(make, monkeypatch):
  honest = sources.survey
  other = "0" * 64
  monkeypatch.setattr(sources, "survey", lambda source: dataclasses.replace(honest(source), corpus=other))
  with pytest.raises(UserError, match="changed while it was read"):
    make()


def test_racing_writers_leave_one_whole_file(tmp_path):
  path, texts = tmp_path / "a.tokens", [text * 50 for text in TEXTS]
  writers = [
    threading.Thread(target=tokenfile.write_tokens, args=(path, texts, tokenizers.ByteTokenizer()))
    for _ in range(8)
  ]
  for writer in writers:
    writer.start()
  while any(writer.is_alive() for writer in writers):
    if path.exists():
      tokenfile.open_tokens(path)
  assert len(tokenfile.open_tokens(path).documents) == len(texts)
  assert [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


def test_a_writer_killed_midway_leaves_no_file_under_the_name(tmp_path):
  script = """
import os, sys
from llmarch.data import tokenfile, tokenizers
def texts():
  yield "x" * (tokenfile.PIECE + 1)
  os.kill(os.getpid(), 9)
tokenfile.write_tokens(sys.argv[1], texts(), tokenizers.ByteTokenizer())
"""
  path = tmp_path / "a.tokens"
  done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True)
  assert done.returncode == -9, done.stderr
  assert not path.exists()
  tokenfile.write_tokens(path, TEXTS, tokenizers.ByteTokenizer())
  assert len(tokenfile.open_tokens(path).documents) == len(TEXTS)


def test_the_bar_shows_on_a_terminal_alone(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  for stream, patience, shown in (
    (Terminal(), 0.0, True),
    (Terminal(), 1e9, False),
    (io.StringIO(), 0.0, False),
  ):
    monkeypatch.setattr(sys, "stderr", stream)
    with tokenfile.progress_bar("tokenising", 10, patience) as advance:
      for _ in range(10):
        advance(1)
    monkeypatch.undo()
    assert ("tokenising" in stream.getvalue()) == shown


# ------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def bpe():
  return tokenizers.train_bpe(TEXTS, 320)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS))
@hypothesis.settings(deadline=None)
def test_tokenizers_give_any_unicode_back(bpe, name, text):
  tokenizer = bpe if name == "bpe" else tokenizers.load_tokenizer("bytes")
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids, np.int32)) == text
  assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.end_id not in ids


def test_byte_ids_are_byte_values():
  assert tokenizers.load_tokenizer("bytes").encode("aé") == [97, 0xC3, 0xA9]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_decoding_survives_anything(bpe, name):
  tokenizer = bpe if name == "bpe" else tokenizers.load_tokenizer("bytes")
  ids = tokenizer.encode("nñ")
  assert tokenizer.decode(ids[:-1]) == "n\ufffd"
  assert (
    tokenizer.decode([-1, tokenizer.end_id, *ids, 10**15, tokenizer.end_id, tokenizer.vocab_size]) == "nñ"
  )
  assert tokenizer.decode([]) == "" and tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_no_text_spells_the_end_of_a_document(bpe, name):
  tokenizer = bpe if name == "bpe" else tokenizers.load_tokenizer("bytes")
  ids = tokenizer.encode("a<|endoftext|>b")
  assert tokenizer.end_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_saved_tokenizer_comes_back(bpe, name, tmp_path):
  tokenizer = bpe if name == "bpe" else tokenizers.load_tokenizer("bytes")
  tokenizer.save(tmp_path / "deep" / "er")
  for spec in (tmp_path / "deep" / "er", tmp_path / "deep" / "er" / "tokenizer.json"):
    loaded = tokenizers.load_tokenizer(str(spec))
    assert (loaded.fingerprint, loaded.vocab_size, loaded.end_id) == (
      tokenizer.fingerprint,
      tokenizer.vocab_size,
      tokenizer.end_id,
    )
    assert loaded.encode(TEXTS[7]) == tokenizer.encode(TEXTS[7])


def variant(bpe, path, change):
  definition = json.loads(bpe.definition)
  change(definition)
  path.write_text(json.dumps(dict(reversed(definition.items()))))
  return str(path)


def test_settings_of_a_tokenizer_file_that_would_lose_text_are_not_used(bpe, tmp_path):
  def change(definition):
    definition["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    definition["padding"] = dict(
      strategy={"Fixed": 99},
      direction="Right",
      pad_to_multiple_of=None,
      pad_id=0,
      pad_type_id=0,
      pad_token="x",
    )

  loaded = tokenizers.load_tokenizer(variant(bpe, tmp_path / "t.json", change))
  assert loaded.encode(TEXTS[9]) == bpe.encode(TEXTS[9]) and loaded.fingerprint != bpe.fingerprint


def test_the_vocabulary_reaches_to_the_largest_id(bpe, tmp_path):
  def change(definition):
    definition["added_tokens"] += [definition["added_tokens"][0] | dict(id=1000, content="<far>")]
    definition["model"]["vocab"]["<far>"] = 1000

  assert tokenizers.load_tokenizer(variant(bpe, tmp_path / "t.json", change)).vocab_size == 1001


def released(folder, special=("<bos>", "<end>", "<turn>"), plain=("</s>",), begins=False, **files):
  """A folder as released models have it: byte-level BPE without merges, then tokens; files are those beside it."""
  from tokenizers import AddedToken, Tokenizer, processors

  folder.mkdir()
  model = Tokenizer.from_str(tokenizers.as_byte_bpe().replace(tokenizers.END, special[0]))
  model.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  model.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
  if begins:
    first = (special[0], model.token_to_id(special[0]))
    model.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
  model.save(str(folder / "tokenizer.json"))
  for name, data in files.items():
    (folder / f"{name}.json").write_text(json.dumps(data))
  return str(folder)


BOS, EOS, TURN, CLOSE = 256, 257, 258, 259  # ids of `released`
ENDS = [  # the files beside, the id that ends a document, the ids that end a text
  (dict(tokenizer_config={"eos_token": "<turn>"}), TURN, (TURN,)),
  (dict(special_tokens_map={"eos_token": {"content": "<end>"}}), EOS, (EOS,)),
  (dict(config={"model_type": "llama", "eos_token_id": EOS}), EOS, (EOS,)),
  (dict(config={"format": 1, "hf": {"eos_token_id": [EOS, TURN]}}), EOS, (EOS, TURN)),
  (dict(config={"text_config": {"eos_token_id": TURN}}), TURN, (TURN,)),
  (dict(generation_config={"eos_token_id": [TURN, EOS, -1]}, config={"eos_token_id": EOS}), TURN, (TURN, EOS)),
  (dict(generation_config={"eos_token_id": EOS}, tokenizer_config={"eos_token": "<turn>"}), TURN, (TURN, EOS)),
  (dict(config={"eos_token_id": CLOSE}), CLOSE, (CLOSE,)),
]


@pytest.mark.parametrize("files, end, ends", ENDS)
def test_the_files_beside_a_tokenizer_say_which_ids_end_a_text(tmp_path, files, end, ends):
  loaded = tokenizers.load_tokenizer(released(tmp_path / "m", **files))
  assert (loaded.end_id, loaded.end_ids) == (end, ends)
  assert not {*ends, BOS} & set(loaded.encode("a<bos><end><turn>" + "</s>" * (CLOSE in ends)))
  loaded.save(tmp_path / "again")
  again = tokenizers.load_tokenizer(str(tmp_path / "again"))
  assert (again.end_id, again.end_ids, again.fingerprint) == (end, ends, loaded.fingerprint)


def test_a_flag_names_the_token_that_ends_a_document(tmp_path):
  folder = released(tmp_path / "m")
  with pytest.raises(UserError, match="name it in data.document_end"):
    _ = tokenizers.load_tokenizer(folder).document_end
  for token, end in (("<turn>", TURN), ("<end>", EOS)):
    loaded = tokenizers.load_tokenizer(folder, token)
    assert loaded.as_document(np.array([65])).tolist() == [65, end] and end not in loaded.encode(f"a{token}")
    loaded.save(tmp_path / token)
    again = tokenizers.load_tokenizer(str(tmp_path / token))
    assert (again.end_id, again.fingerprint) == (end, loaded.fingerprint)
  for spec, token in ((folder, "<trun>"), ("bytes", "<end>")):
    with pytest.raises(UserError, match=f"data.document_end='{token}'"):
      tokenizers.load_tokenizer(spec, token)
  assert tokenizers.load_tokenizer("bytes", tokenizers.END).end_id == 256
  (tmp_path / "a.txt").write_text("A" * 19)
  config = DataConfig(
    source=TextFiles(paths=(str(tmp_path / "a.txt"),)), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0,
    tokenizer=folder, document_end="<turn>",
  )  # fmt: skip
  rows = pipeline.make_pipeline(config, batch_size=1, seq_len=20, seed=0, vocab_size=CLOSE + 1, split="train")
  assert rows.batch(0)["targets"].tolist() == [[65] * 19 + [TURN]]


def test_a_spelling_ends_nothing_by_itself(tmp_path):
  loaded = tokenizers.load_tokenizer(released(tmp_path / "m"))
  assert (loaded.end_id, loaded.end_ids, loaded.begin_ids) == (None, (), ())
  assert loaded.encode("a</s>b") == [97, CLOSE, 98] and loaded.decode([97, CLOSE, 98]) == "a</s>b"
  with pytest.raises(UserError, match="eos_token") as refusal:
    loaded.as_document(np.arange(3))
  assert "vocab" not in str(refusal.value)
  with pytest.raises(UserError, match=r"generation_config.json: eos_token_id='x'"):
    tokenizers.load_tokenizer(released(tmp_path / "n", generation_config={"eos_token_id": "x"}))


def test_sampling_is_suggested_where_the_makers_sample():
  said = {"do_sample": True, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1, "max_length": 9}
  suggested = lambda data: companions.Companions({companions.GENERATION: json.dumps(data)}).sampling
  assert suggested(said) == {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
  assert suggested(said | {"do_sample": False}) == {"repetition_penalty": 1.1} and suggested({}) == {}


def test_pieces_that_are_searched_for_spell_no_special_token():
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  pieces = [("<unk>", 0.0), ("</s>", 0.0), *[(c, -3.0) for c in "▁as</>"]]
  model = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
  model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  beside = companions.Companions({companions.TOKENIZER: json.dumps({"eos_token": "</s>", "unk_token": "<unk>"})})
  loaded = tokenizers.HFTokenizer(model.to_str(), "unigram", beside)
  ids = loaded.encode("a</s>aé")
  assert loaded.end_id == 1 and 1 not in ids and 0 in ids and loaded.decode([i for i in ids if i]) == "a</s>a"
  assert loaded.encode("a</s>", special=True)[-1] == 1


BEGINS = [  # the template begins a text, add_bos_token, the ids before a text
  (True, None, [BOS]),
  (True, True, [BOS]),
  (True, False, []),
  (False, True, [BOS]),
  (False, None, []),
]


@pytest.mark.parametrize("template, flag, begin", BEGINS)
def test_a_prompt_and_a_document_begin_as_the_makers_of_the_tokenizer_say(tmp_path, template, flag, begin):
  said = {"bos_token": "<bos>", "eos_token": "<end>"} | ({} if flag is None else {"add_bos_token": flag})
  loaded = tokenizers.load_tokenizer(released(tmp_path / "m", begins=template, tokenizer_config=said))
  assert loaded.encode("ab") == [97, 98] and loaded.encode_prompt("ab") == [*begin, 97, 98]
  assert loaded.encode_prompt("") == [BOS]
  assert loaded.encode_prompt("<bos>a<turn>", special=True) == [BOS, 97, TURN]
  assert loaded.encode_prompt("<turn>") == [*begin, *b"<turn>"]
  assert loaded.as_document(loaded.encode_batch(["ab"])[0]).tolist() == [*begin, 97, 98, EOS]
  tokenfile.write_tokens(tmp_path / "t.tokens", ["ab", "c"], loaded)
  assert tokenfile.open_tokens(tmp_path / "t.tokens").tokens.tolist() == [*begin, 97, 98, EOS, *begin, 99, EOS]


def test_no_fingerprint_of_a_tokenizer_without_a_begin_has_changed(bpe, tmp_path):
  sorted_text = lambda definition: json.dumps(json.loads(definition), sort_keys=True).encode()
  for tokenizer in (bpe, tokenizers.load_tokenizer("bytes")):
    tokenizer.save(tmp_path / str(tokenizer.vocab_size))
    again = tokenizers.load_tokenizer(str(tmp_path / str(tokenizer.vocab_size)))
    for one in (tokenizer, again):
      assert one.fingerprint == hashlib.sha256(sorted_text(tokenizer.definition)).hexdigest()
  assert tokenizers.load_tokenizer("bytes").definition == '{"kind": "bytes"}\n'


@pytest.mark.parametrize("name", ["bytes", "bpe", "begins"])
def test_the_package_transformers_reads_what_is_saved(bpe, name, tmp_path):
  transformers = pytest.importorskip("transformers")
  begins = lambda: tokenizers.load_tokenizer(released(tmp_path / "m", begins=True, config={"eos_token_id": EOS}))
  tokenizer = {"bytes": lambda: tokenizers.load_tokenizer("bytes"), "bpe": lambda: bpe, "begins": begins}[name]()
  tokenizer.save(tmp_path / "saved")
  (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  for text in ("def f(x):\n\t return 'é🙂'", TEXTS[3], "<|endoftext|>a <turn> </s>"):
    assert theirs(text).input_ids == tokenizer.encode_prompt(text, special=True)
    assert theirs.decode(tokenizer.encode(text)) == text
  assert theirs.eos_token_id == tokenizer.end_id


def test_the_fingerprint_names_the_definition_whatever_its_layout(bpe, tmp_path):
  compact = tokenizers.load_tokenizer(variant(bpe, tmp_path / "a.json", lambda definition: None))
  other = variant(bpe, tmp_path / "b.json", lambda d: d["model"]["merges"].pop())
  assert compact.fingerprint == bpe.fingerprint != tokenizers.load_tokenizer(other).fingerprint


# ---------------------------------------------------------------------------------------- synthetic tasks


def solve(task, seen):
  """The next token, from the tokens seen so far alone: the naive reading of each task."""
  if isinstance(task, Copy):
    return seen[len(seen) - seen.index(task.num_symbols) - 1]
  if isinstance(task, Recall):
    pairs = dict(zip(seen[: 2 * task.num_pairs : 2], seen[1 : 2 * task.num_pairs : 2], strict=True))
    return pairs[seen[-1]]
  if isinstance(task, Induction):
    return seen[len(seen) - task.period]
  mark = seen.index(task.num_symbols)
  assert seen[-2:] == [task.num_symbols + 1, seen[mark + 1]]
  return seen[mark + 2]


SHORTEST = {Copy: 10, Recall: 15, Induction: 5, Needle: 16}
ANSWERS = {Copy: lambda T: 5, Recall: lambda T: 4, Induction: lambda T: T - 4, Needle: lambda T: 1}
SYMBOLS = {Copy: 8, Recall: 12, Induction: 9, Needle: 10}


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.kind)
@pytest.mark.parametrize("extra", [0, 7])
def test_every_counted_target_is_determined_by_the_tokens_before_it(make, task, extra):
  seq_len = SHORTEST[type(task)] + extra
  made = make(source=task, seq_len=seq_len, vocab_size=SYMBOLS[type(task)])
  used_ids = set()
  for row in rows_of(made, 200):
    used = row["positions"] >= 0
    np.testing.assert_array_equal(row["positions"][used], np.arange(used.sum()))
    np.testing.assert_array_equal(row["tokens"][used][1:], row["targets"][used][:-1])
    counted = np.flatnonzero(row["loss_weights"])
    assert len(counted) == ANSWERS[type(task)](seq_len) and used[counted].all()
    for j in counted:
      assert solve(task, row["tokens"][: j + 1].tolist()) == row["targets"][j]
    used_ids |= set(row["tokens"][used]) | set(row["targets"][used])
  assert used_ids == set(range(SYMBOLS[type(task)]))


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.kind)
def test_rows_of_a_task_differ_by_index_seed_and_split(make, task):
  made = [make(source=task), make(source=task, seed=4), make(source=task, split="validation")]
  rows = [row["tokens"].tobytes() for m in made for row in rows_of(m, 50)]
  assert len(set(rows)) > 0.98 * len(rows)


def test_the_prefix_of_a_task_is_all_before_its_first_answer(make):
  for task in TASKS:
    for row in rows_of(make(source=task, prefix=True), 5):
      first = np.flatnonzero(row["loss_weights"])[0]
      np.testing.assert_array_equal(row["prefix"], np.arange(24) <= first)


def test_draws_are_uniform():
  draws = synthetic.Draws("test")
  counts = np.bincount(draws.integers(60000, 6), minlength=6)
  assert abs(counts - 10000).max() < 500  # 5 standard deviations are 456
  firsts = np.bincount([synthetic.Draws("test", i).permutation(6)[0] for i in range(6000)], minlength=6)
  assert abs(firsts - 1000).max() < 150


# ------------------------------------------------------------------------------------------------ sources


def test_the_standard_library_is_the_library_itself():
  files = sources.stdlib_files(sysconfig.get_paths()["stdlib"])
  names = {file.rsplit("/", 1)[-1] for file in files}
  assert {"argparse.py", "typing.py"} <= names and len(files) == len(set(files)) > 300
  assert not any(f"/{skipped}/" in file for file in files for skipped in ("site-packages", "test", "idlelib"))
  found = sources.survey(Stdlib())
  assert found.num_bytes > 5e6 and 300 < found.num_documents <= len(files)
  assert found == sources.survey(Stdlib())


def test_the_standard_library_skips_what_is_not_there_or_not_text(tmp_path, monkeypatch):
  for name in ("b.py", "a.py", "sub/c.py", "test/t.py", "site-packages/s.py", "sub/tests/u.py", "note.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(name)
  (tmp_path / "latin.py").write_bytes(b"\xe9")
  (tmp_path / "empty.py").touch()
  (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  assert list(sources.documents(Stdlib())) == ["a.py", "b.py", "sub/c.py"]
  assert not any("dangling" in file for file in sources.stdlib_files(str(tmp_path)))
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
  with pytest.raises(UserError, match="no standard library source"):
    list(sources.documents(Stdlib()))


def test_text_globs_give_each_file_once_in_order(corpus):
  source = TextFiles(paths=(f"{corpus}/03*.txt", f"{corpus}/*.txt", f"{corpus.parent}/**/001.txt"))
  assert list(sources.documents(source)) == TEXTS
  (corpus / "000.txt").write_text("one--two----three")
  assert list(sources.documents(TextFiles(paths=(f"{corpus}/000.txt",), separator="--"))) == [
    "one",
    "two",
    "three",
  ]


def test_datasets_are_read_by_their_field(monkeypatch):
  class Rows(list):
    column_names = ("body", "id")

  def load_dataset(path, name, split):
    if path == "missing":
      raise FileNotFoundError("no such\n dataset")
    return Rows([{"body": "one"}, {"body": None}, {"body": f"{path} {name} {split}"}])

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  source = HFDataset(path="p", name="n", split="s", field="body")
  assert list(sources.documents(source)) == ["one", "p n s"]
  with pytest.raises(UserError, match="no column 'bodi'; did you mean 'body'"):
    sources.survey(dataclasses.replace(source, field="bodi"))
  with pytest.raises(UserError, match="cannot be loaded by datasets: no such dataset"):
    sources.survey(dataclasses.replace(source, path="missing"))


# ----------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_in_a_sentence_that_names_it(make, corpus, tmp_path, bpe):
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  (tmp_path / "empty.txt").touch()
  (tmp_path / "one.txt").write_text("one document")
  lines = dict(broken="{", number='{"text": 1}', other='{"txet": ""}', array="[]", deep="[" * 10**5)
  lines |= dict(surrogate='{"text": "a\\ud800"}')
  for name, line in lines.items():
    (tmp_path / f"{name}.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
  (tmp_path / "bad.json").write_text('{"no": "model"}')
  bpe.save(tmp_path / "bpe")
  wide = tmp_path / "wide.tokens"
  tokenfile.write_tokens(wide, TEXTS, Wide())

  def text(name):
    return dict(source=TextFiles(paths=(f"{tmp_path}/{name}.txt",)))

  def jsonl(name):
    return dict(source=JSONL(paths=(f"{tmp_path}/{name}.jsonl",)))

  cases = [
    (
      dict(vocab_size=256),
      "model.vocab_size=256 is smaller than the 257 ids of data.tokenizer=bytes; raise it",
    ),
    (dict(tokenizer=str(tmp_path / "bpe")), "model.vocab_size=257 is smaller than the"),
    (dict(tokenizer=str(tmp_path / "nowhere")), "nowhere cannot be read"),
    (dict(tokenizer=str(tmp_path)), "tokenizer.json cannot be read"),
    (dict(tokenizer=str(tmp_path / "bad.json")), "bad.json is not a tokenizer.json"),
    (dict(tokenizer=str(tmp_path / "latin.txt")), "latin.txt cannot be read (not UTF-8)"),
    (text("nothing"), "nothing.txt'; correct data.source.paths"),
    (text("latin"), "latin.txt is not UTF-8 at byte 3"),
    (text("empty"), "data.source (text) holds no text"),
    (text("one"), "data.source has 1 different documents, too few to train and validate on"),
    (text("one") | dict(validation_fraction=0.0), "fewer than train.batch_size=4"),
    (dict(validation_fraction=0.0, split="validation"), "data.validation_fraction=0 leaves nothing"),
    (dict(batch_size=1000), "rows of 24 tokens, fewer than train.batch_size=1000"),
    (dict(cache_dir=str(tmp_path / "one.txt")), "cannot be written"),
    (jsonl("broken"), "broken.jsonl, line 3, is not JSON"),
    (jsonl("deep"), "deep.jsonl, line 3, is not JSON"),
    (jsonl("number"), "number.jsonl, line 3, holds int, not text, in 'text'"),
    (jsonl("other"), "no field 'text'; set data.source.field; did you mean 'txet'?"),
    (jsonl("array"), "no field 'text'; set data.source.field"),
    (jsonl("surrogate"), "the lone surrogate in 'a\\ud800'"),
    (dict(source=TokenFile(path=str(tmp_path / "nowhere"))), "nowhere cannot be read"),
    (dict(source=TokenFile(path=str(tmp_path / "one.txt"))), "one.txt is damaged: it has no header"),
    (dict(source=TokenFile(path=str(wide)), vocab_size=80000), "written with another tokenizer"),
    (dict(source=TASKS[0], vocab_size=7), "data.source (copy) uses 8 ids but model.vocab_size=7; raise it"),
    (dict(source=TASKS[1], vocab_size=11), "data.source (recall) uses 12 ids"),
    (dict(source=TASKS[2], vocab_size=8), "data.source (induction) uses 9 ids"),
    (dict(source=TASKS[3], vocab_size=9), "data.source (needle) uses 10 ids"),
    (dict(source=TASKS[0], seq_len=9), "data.source.length=5 needs rows of 10 tokens but train.seq_len=9"),
    (dict(source=TASKS[1], seq_len=14), "data.source.num_pairs=4 needs rows of 15 tokens"),
    (dict(source=TASKS[2], seq_len=4), "data.source.period=5 needs rows of 5 tokens"),
    (dict(source=TASKS[3], seq_len=15), "data.source.length=11 needs rows of 16 tokens"),
    (dict(source=HFDataset(path="x")), "pip install datasets"),
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for change, sentence in cases:
      with pytest.raises(UserError) as caught:
        make(**change)
      assert sentence in str(caught.value), (change, str(caught.value))
      assert "\n" not in str(caught.value)


def test_data_configs_refuse_what_makes_no_sense():
  for value, sentence in [
    (dict(source=dict(kind="text", paths=[])), "data.source.paths is empty"),
    (dict(source=dict(kind="jsonl", paths=[])), "data.source.paths is empty"),
    (dict(source=dict(kind="txt", paths=["a"])), "did you mean 'text'"),
    (dict(source=dict(kind="copy", length=0)), "data.source.length must be at least 1"),
    (dict(source=dict(kind="induction", period=0)), "data.source.period must be at least 1"),
    (dict(source=dict(kind="needle", num_symbols=0)), "data.source.num_symbols must be at least 1"),
    (dict(source=dict(kind="recall", num_pairs=9, num_symbols=8)), "data.source.num_pairs=9 needs as many"),
    (dict(validation_fraction=1.0), "data.validation_fraction must be"),
    (dict(prefetch=-1), "data.prefetch must be"),
    (dict(packing="chunk"), "did you mean 'chunks'"),
  ]:
    with pytest.raises(UserError) as caught:
      build(DataConfig, value, "data")
    assert sentence in str(caught.value)


def test_a_batch_with_an_id_outside_the_vocabulary_is_refused(make):
  with pytest.raises(UserError, match=r"outside model\.vocab_size=100"):
    dataclasses.replace(make(), vocab_size=100).batch(0)
  with pytest.raises(ValueError, match="at least 0"):
    make().batch(-1)


def test_an_error_in_the_thread_reaches_the_reader(make):
  with pytest.raises(UserError, match=r"outside model\.vocab_size=100"):
    next(dataclasses.replace(make(), vocab_size=100).iterate(0))


# ------------------------------------------------------------------------------------ llmarch tokenizer


def test_the_command_trains_the_same_tokenizer_twice_and_overwrites_none(corpus, tmp_path, capsys):
  argv = [f"--source=text:{corpus}/0*.txt,{corpus}/001.txt", "--vocab_size=300", "--json"]
  reports = []
  for out in ("a", "b.json"):
    assert command.main([*argv, f"--out={tmp_path / out}"]) == 0
    reports.append(json.loads(capsys.readouterr().out))
  assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b.json").read_bytes()
  tokenizer = tokenizers.load_tokenizer(reports[0]["path"])
  assert reports[0]["fingerprint"] == reports[1]["fingerprint"] == tokenizer.fingerprint
  assert reports[0]["vocab_size"] == tokenizer.vocab_size == 300
  num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
  num_bytes = sum(len(text.encode()) for text in TEXTS)
  assert reports[0]["bytes_per_token"] == round(num_bytes / num_tokens, 4)
  before = (tmp_path / "b.json").read_bytes()
  with pytest.raises(UserError, match=r"b\.json exists; name another place or give --overwrite"):
    command.main([*argv, "--vocab_size=280", f"--out={tmp_path}/b.json"])
  assert (tmp_path / "b.json").read_bytes() == before
  command.main([*argv, "--vocab_size=280", f"--out={tmp_path}/b.json", "--overwrite"])
  assert tokenizers.load_tokenizer(f"{tmp_path}/b.json").vocab_size == 280


def test_the_command_writes_a_token_file_that_stands_for_its_source(make, corpus, tmp_path, bpe, capsys):
  bpe.save(tmp_path)
  path = f"{tmp_path}/corpus.tokens"
  source = json.dumps(dict(kind="text", paths=[f"{corpus}/*.txt"]))
  argv = [f"--source={source}", "--encode", f"--tokenizer={tmp_path}", f"--out={path}"]
  assert command.main(argv) == 0
  assert f"num_tokens       {sum(len(bpe.encode(t)) + 1 for t in TEXTS)}" in capsys.readouterr().out
  common = dict(tokenizer=str(tmp_path), vocab_size=bpe.vocab_size, packing="documents")
  ours, theirs = make(source=TokenFile(path=path), **common), make(**common)
  assert ours.hash == theirs.hash
  assert_same(ours.batch(1), theirs.batch(1))
  with pytest.raises(UserError, match="exists"):
    command.main(argv)


def test_the_command_refuses_bad_flags(tmp_path):
  out = f"--out={tmp_path}/x"
  for argv, sentence in [
    ([out, "--vocab_sise=9"], "did you mean 'vocab_size'"),
    ([out, "--vocab_size=many"], "vocab_size=many"),
    ([out, "--vocab_size=256"], "vocab_size=256 has no room"),
    ([out, "--vocab_size=99999999999999999999"], "is more than ids can count"),
    ([out, "stray"], "'stray' is not a flag"),
    ([], "--out is missing"),
    ([out, "--tokenizer=bytes"], "--tokenizer is of no use without --encode"),
    ([out, "--encode", "--vocab_size=300"], "--vocab_size is of no use with --encode"),
    ([out, "--source=copy"], "--source=copy holds no text"),
    ([out, "--source=tekst:a"], "did you mean 'text'"),
    ([out, "--source={'kind': 'jsonl'}"], "--source.paths is missing"),
    ([out, f"--source=text:{tmp_path}/*.md"], "no file matches"),
  ]:
    with pytest.raises(UserError) as caught:
      command.main(argv)
    assert sentence in str(caught.value)
  assert not list(tmp_path.iterdir())
