"""A model in the interface of lm-eval (the Language Model Evaluation Harness). Needs the extra `eval`.

  lm_eval.simple_evaluate(model=Harness(llmarch.load(DIR)), tasks=[...])
"""

from itertools import groupby

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmarch.errors import check
from llmarch.infer.lm import LM, TextStream
from llmarch.infer.scoring import beginning, score

MAX_NEW_TOKENS = 256  # the harness's own default


class Harness(TemplateLM):
  """Computes log-likelihoods and greedy (or sampled) text with an `LM`, `batch` rows at a time.

  A context begins with the tokens that the model's tokenizer puts before a text. One that is too long loses its oldest
  tokens.
  """

  def __init__(self, lm: LM, batch: int = 8):
    super().__init__()
    check(lm.tokenizer is not None, "the model has no tokenizer, so it cannot read a task; give it its tokenizer.json")
    self.lm, self.batch = lm, batch
    self._begin = beginning(lm.tokenizer)

  @property
  def eot_token_id(self) -> int:
    return self._begin[-1] if (end := self.lm.tokenizer.end_id) is None else end

  @property
  def prefix_token_id(self) -> int:
    return self._begin[-1]

  @property
  def max_length(self) -> int:
    return self.lm.config.max_seq_len

  @property
  def tokenizer_name(self) -> str:
    return self.lm.tokenizer.fingerprint

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    begin = [] if add_special_tokens is False else list(self.lm.tokenizer.begin_ids)
    return begin + self.lm.tokenizer.encode(string)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes a context and its continuation by the harness's rule.

    Spaces that end the context belong to the continuation. The ids of both together are cut after as many as the
    context has alone; if that leaves nothing for the continuation, the two are encoded apart.
    """
    before, after = super()._encode_pair(context, continuation)
    return before, after or self.tok_encode(continuation, add_special_tokens=False)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
    """[(anything, context ids, continuation ids)] -> [(log p of the continuation, whether it is the greedy one)]."""
    rows = [(list(before) + list(after))[-(self.max_length + 1) :] for _, before, after in requests]
    found = []
    for (_, _, after), scores in zip(requests, score(self.lm, rows, self.batch)):
      n = min(len(after), len(scores.logprobs))
      last = slice(len(scores.logprobs) - n, None)
      found.append((float(np.sum(scores.logprobs[last], dtype=np.float64)), bool(scores.greedy[last].all())))
    for (texts, _, _), result in zip(requests, found):
      if texts is not None:
        self.cache_hook.add_partial("loglikelihood", texts, result)
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-likelihoods of whole texts in disjoint windows; only a text's last window looks back, so that it is full."""
    windows = []
    for i, request in enumerate(requests):
      ids = self.lm.tokenizer.encode(request.args[0])
      pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1) if ids else []
      windows += [(i, *make_disjoint_window(pair)) for pair in pairs]
    totals = [0.0] * len(requests)
    for (i, _, _), (logprob, _) in zip(windows, self._loglikelihood_tokens([(None, a, b) for _, a, b in windows])):
      totals[i] += logprob
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Generates the text after each context, up to the first of its stops (`until`)."""
    found = [""] * len(requests)
    options_of = lambda i: repr(sorted(requests[i].args[1].items()))
    for _, alike in groupby(sorted(range(len(requests)), key=options_of), key=options_of):
      alike = sorted(alike, key=lambda i: -len(requests[i].args[0]))
      for first in range(0, len(alike), self.batch):
        chosen = alike[first : first + self.batch]
        texts = self._generate([requests[i].args[0] for i in chosen], **requests[chosen[0]].args[1])
        for i, text in zip(chosen, texts):
          found[i] = text
          self.cache_hook.add_partial("generate_until", requests[i].args, text)
    return found

  def _generate(self, contexts, until=(), max_gen_toks=MAX_NEW_TOKENS, do_sample=False, temperature=0.0, **more):
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    new = min(max_gen_toks, self.max_length - 1)
    encode_tail = lambda text: (self._begin if not text else self.tok_encode(text))[-(self.max_length - new) :]
    prompts = [encode_tail(context) for context in contexts]
    tokenizer, sampling = self.lm.tokenizer, {k: more[k] for k in ("top_k", "top_p", "min_p") if k in more}
    spelt = lambda stop: len(ids := tokenizer.encode(stop)) == 1 and tokenizer.decode(ids) == stop
    single = [tokenizer.encode(stop)[0] for stop in until if spelt(stop)]
    single += [i for stop in until if (i := tokenizer.special_id(stop)) is not None]
    rows = self.lm.generate(
      prompts, max_new_tokens=new, stop=single, temperature=temperature if do_sample else 0.0, **sampling
    )
    texts = [TextStream(tokenizer, prompt).push(row, last=True) for prompt, row in zip(prompts, rows)]
    # The text still contains a stop of several tokens; a stop that ended the row is not part of it.
    return [text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))] for text in texts]
