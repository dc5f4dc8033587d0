"""The adapter of a model to lm-evaluation-harness; `pip install 'lm-eval<0.5'`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import jax
from jax.sharding import Mesh

from rabit_jax.errors import BadInput, first_line
from rabit_jax.evaluate.batched_generation import BatchGenerator, Settings, settings_of
from rabit_jax.evaluate.scoring import Request, score
from rabit_jax.formats.tokenizer import check_ids, encode, prompt_ids
from rabit_jax.models.decoder import Decoder
from rabit_jax.progress import progress
from rabit_jax.train.sharding import batch_sharding, param_shardings, row_shards
from rabit_jax.types import Json, Params, Tokenizer

# `(context and continuation as texts, or None; tokens of the context; tokens of the continuation)`
Tokenised = tuple[tuple[str, str] | None, list[int], list[int]]

_missing: ImportError | None = None
if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
else:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:  # raised when a HarnessModel is made
        TemplateLM, _missing = object, error


class HarnessModel(TemplateLM):
    """A dense, training-form or packed decoder for `lm_eval.simple_evaluate(model=...)`.

    Args:
      model: the decoder.
      params: its params, dense, in training form, packed or mixed.
      tokenizer: of transformers, with an end-of-text token.
      batch_size: rows per call; on a mesh a multiple of the devices on data and fsdp.
      max_length: most tokens of a sequence, for models whose attention over all their positions
        would not fit in memory; None for the model's number of positions. Longer contexts are cut
        at the beginning, as in the harness's own models.
      mesh: from `make_mesh`. Batches are split over `data` and `fsdp`, kernels over `fsdp` and
        `tensor`; None for one device.
      chunk: positions per vocabulary projection.
      seed: seed for tasks that sample.

    Raises:
      BadInput: lm-eval is not installed, no tokenizer or one without an end-of-text token, a batch
        that does not divide over the mesh, a length beyond the positions of the model.

    Example:
      >>> model, params, tokenizer = load_model("runs/quickstart/packed")
      >>> lm = HarnessModel(model, params, tokenizer)
      >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])["results"]
    """

    def __init__(
        self, model: Decoder, params: Params, tokenizer: Tokenizer, *, batch_size: int = 8,
        max_length: int | None = None, mesh: Mesh | None = None, chunk: int = 256, seed: int = 0,
    ) -> None:
        require_harness()
        super().__init__()
        _check(model, tokenizer, batch_size, max_length, mesh)
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_size, self.chunk, self.rows = batch_size, chunk, None
        self.max_length = max_length or model.config.max_position
        if mesh is not None:
            self.params = jax.device_put(params, param_shardings(params, mesh))
            self.rows = batch_sharding(mesh)
        eos = {*model.config.eos_ids, self.eot_token_id}
        self.generator = BatchGenerator(model, self.params, tuple(sorted(eos)), mesh, seed)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token: the tokenizer's, or else the model's first."""
        own = cast(int | None, self.tokenizer.eos_token_id)
        return self.model.config.eos_ids[0] if own is None else own

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the begin token, or else the end token."""
        begin = cast(int | None, self.tokenizer.bos_token_id)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The tokens of a text, after the special tokens that the tokenizer puts before a text.

        None are added to a text that already begins with them, such as the output of a chat
        template, and none behind it, where they would end a context before its continuation.

        Raises:
          BadInput: a token that the model has no row for; the message names it.
        """
        size = self.model.config.vocab_size
        if add_special_tokens is not False:
            return prompt_ids(self.tokenizer, string, size)
        (ids,) = encode(self.tokenizer, [string])
        check_ids(ids, self.tokenizer, size)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, by the tokenizer's template.

        If the template raises an error, it is applied again without the system message, as the
        harness does for templates that do not support one.

        Raises:
          BadInput: the tokenizer has no chat template.
        """
        import jinja2

        if not self.tokenizer.chat_template:
            raise BadInput("the tokenizer has no chat template: evaluate without one")

        def apply(history: list[dict[str, str]]) -> str:
            return cast(str, self.tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            ))

        try:
            try:
                return apply(chat_history)
            except jinja2.exceptions.TemplateError:
                return apply([turn for turn in chat_history if turn["role"] != "system"])
        except Exception as error:  # a template is a program, and fails like one
            raise BadInput(f"the chat template cannot be applied ({first_line(error)}): evaluate "
                           "without it, or correct chat_template in the folder") from error

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """`sum_s log p(w_s | w_<s)` of whole texts, each token predicted once.

        A text longer than `max_length` is cut into windows of that length that overlap by one
        token; the last one is extended to the left to full length. See the harness's
        `get_rolling_token_windows`.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pieces, owners = [], []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            # The windows put this token before the text.
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                pieces.append((None, *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pieces, disable_tqdm)
        for index, (logprob, _) in zip(owners, scores, strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenised], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """`(log-probability, is_greedy)` of continuations; called by the harness's loglikelihood.

        Args:
          requests: see `Tokenised`.
          disable_tqdm: no progress bar.
        """
        found: dict[int, tuple[float, bool]] = {}
        wanted = [self._request(*request) for request in requests]
        with progress("log-probabilities", len(requests), hidden=disable_tqdm) as bar:
            for pairs in score(
                self.model, self.params, wanted, batch_size=self.batch_size, chunk=self.chunk,
                longest=self.max_length, batch_sharding=self.rows,
            ):
                for index, answer in pairs:
                    found[index] = (answer.logprob, answer.greedy)
                    if texts := requests[index][0]:
                        self.cache_hook.add_partial("loglikelihood", texts, found[index])
                bar.update(len(found))
        return [found[index] for index in range(len(requests))]

    def _request(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> Request:
        """The tokens to score, cut at the left to `max_length` inputs and one predicted token."""
        context = context or [self.prefix_token_id]  # it was blank, and is part of what is scored
        if not 0 < len(continuation) <= self.max_length:
            raise BadInput(
                f"a task asks for {texts!r}, which has {len(context)} tokens of context and "
                f"{len(continuation)} to score: wanted at least 1 of both and at most "
                f"{self.max_length} to score"
            )
        return Request((context + continuation)[-self.max_length - 1 :], len(continuation))

    def _prompt(self, text: str, most: int) -> list[int]:
        """The last `most` tokens of a prompt; an empty prompt becomes the token before texts."""
        return self.tok_encode(text)[-most:] or [self.prefix_token_id]

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """The texts that continue the prompts, each cut before its first stop string.

        Requests with the same settings (`until`, `max_gen_toks`, `do_sample`, `temperature`,
        `top_p`) are batched, the longest prompts first.

        Raises:
          BadInput: settings that are not implemented, such as `num_beams`, or a `max_gen_toks` that
            leaves no token of `max_length` for the prompt.
        """
        found: dict[int, str] = {}
        groups: dict[Settings, list[int]] = {}
        for index, request in enumerate(requests):
            settings = settings_of(cast(tuple[str, Json], request.args)[1], self.max_length)
            groups.setdefault(settings, []).append(index)
        with progress("generation", len(requests), hidden=disable_tqdm) as bar:
            for settings, indices in groups.items():
                most = self.max_length - settings.new_tokens
                prompts = {i: self._prompt(requests[i].args[0], most) for i in indices}
                order = sorted(indices, key=lambda i: (-len(prompts[i]), prompts[i]))
                for start in range(0, len(order), self.batch_size):
                    part = order[start : start + self.batch_size]
                    texts = self.generator.generate(
                        [prompts[i] for i in part], settings, self.tokenizer, self.batch_size)
                    for i, text in zip(part, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(found))
        return [found[index] for index in range(len(requests))]


def require_harness() -> None:
    """Raises BadInput if lm-eval, or a package that it needs, is not installed."""
    if _missing is not None:
        raise BadInput(f"lm-evaluation-harness is not installed ({_missing}): "
                       "pip install 'lm-eval<0.5'")


def _check(
    model: Decoder, tokenizer: Tokenizer | None, batch_size: int, max_length: int | None,
    mesh: Mesh | None,
) -> None:
    if tokenizer is None or (tokenizer.eos_token_id is None and not model.config.eos_ids):
        what = "no tokenizer" if tokenizer is None else "a tokenizer without an end-of-text token"
        raise BadInput(f"found {what}, wanted one with: put the model's tokenizer.json and "
                       "tokenizer_config.json into its folder")
    devices = 1 if mesh is None else row_shards(mesh)
    if batch_size < 1 or batch_size % devices:
        raise BadInput(f"batch_size is {batch_size} for {devices} devices on data and fsdp: make "
                       "it a multiple of that")
    if max_length is not None and not 2 <= max_length <= model.config.max_position:
        raise BadInput(f"max_length is {max_length}, wanted 2 to the model's "
                       f"{model.config.max_position} positions")
