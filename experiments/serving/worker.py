"""The thread that makes the texts of all requests in one batch.

A turn reads some of a waiting prompt, or several short ones together, then makes some tokens for
every text that has a row. The batch has as many rows and slots as are in use, rounded up to powers
of two, so that few texts cost little.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.experiments.serving.settings import Failure, Settings
from rabit_jax.experiments.serving.texts import Choice, Prompt, Row
from rabit_jax.experiments.serving.writing import Writing
from rabit_jax.models import serving
from rabit_jax.models.prepared import Engine
from rabit_jax.progress import Progress
from rabit_jax.types import Array, Tokenizer

STEPS = 4  # tokens of a row that one call makes
# Lengths that pieces of prompts are padded to; the last divides all slots.
PIECES = (16, 64, 128, 256)
TOGETHER = 16  # most prompts that are read in one call, no longer than one piece in all
PATIENCE = 8  # turns after which a batch of which half is free gets smaller


class Full(Exception):
    """No place is left for a request; `seconds` is when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full, try again in {seconds} s")
        self.seconds = seconds


@dataclass
class Reading:
    """A prompt that is being read, or has been and waits for rows."""

    prompt: Prompt
    read: int = 0
    cache: serving.Cache | None = None
    logits: Array | None = None

    @property
    def complete(self) -> bool:
        """Whether all of it is read."""
        return self.read == len(self.prompt.ids)


class Worker:
    """Answers prompts until it is closed.

    Args:
      engine: from `prepare`.
      tokenizer: of transformers.
      eos_ids: tokens that end every text.
      rows: most texts at once.
      waiting: most texts that wait for a row.
      context: most tokens of a prompt and its text.
      failed: called, in the worker's thread, when an error ends it.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, eos_ids: Sequence[int], rows: int,
        waiting: int, context: int, failed: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.tokenizer, self.eos_ids = engine, tokenizer, frozenset(eos_ids)
        self.ends = jnp.asarray(sorted(self.eos_ids) or [-2], jnp.int32)
        self.rows, self.most_waiting, self.context, self.failed = rows, waiting, context, failed
        self.special = {str(text): i for text, i in tokenizer.get_added_vocab().items()}
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Prompt] = deque()
        self._closing = False
        # Either one prompt that is partly read, or some that are read.
        self._readings: deque[Reading] = deque()
        self._held: list[Row | None] = [None]
        self._batch = serving.empty(engine.config, 1, PIECES[-1], engine.cache_bits)
        self._roomy, self._seconds = 0, 1.0
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    # what other threads call

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take prompts to be answered.

        Raises:
          Full: all rows are in use and the queue has no place for them.
        """
        wanted = sum(len(prompt.choices) for prompt in prompts)
        with self._changed:
            free = self.rows - self.running
            if self.waiting + wanted > self.most_waiting + free or self._closing:
                rounds = math.ceil((self.waiting + 1) / self.rows)
                raise Full(min(60, max(1, math.ceil(rounds * self._seconds))))
            self._waiting.extend(prompts)
            self._changed.notify_all()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Nobody waits for these any more: their rows are free from the next turn on."""
        with self._changed:
            for choice in choices:
                choice.cancelled = True
            self._changed.notify_all()

    def close(self, now: bool = False) -> None:
        """End the thread when all that was submitted is answered, or at its next turn."""
        with self._changed:
            self._closing = True
            if now:
                self.cancel(self._all())
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def running(self) -> int:
        """Texts that have a row."""
        with self._changed:
            return sum(row is not None for row in self._held)

    @property
    def waiting(self) -> int:
        """Texts that wait for one."""
        with self._changed:
            return sum(choice.wanted for prompt in self._prompts() for choice in prompt.choices)

    def _prompts(self) -> list[Prompt]:
        """The prompts whose texts have no row yet."""
        return [*self._waiting, *(reading.prompt for reading in self._readings)]

    def _all(self) -> list[Choice]:
        """All texts that wait or have a row."""
        waiting = [choice for prompt in self._prompts() for choice in prompt.choices]
        return waiting + [row.choice for row in self._held if row]

    def warm(self, bar: Progress) -> None:
        """Compile what short prompts and texts need, before the worker starts; the bar counts
        `warm_steps`."""
        sizes, done, reading = self.row_sizes(), 0, Reading(Prompt([0], []))
        for size in PIECES:
            self._together([Reading(Prompt([0] * (size // 2), [])) for _ in range(2)])
            reading = Reading(Prompt([0] * size, []))
            self._piece(reading)
            bar.update(done := done + 1)
        assert reading.cache is not None and reading.logits is not None
        one = sampling_of(Settings(1, 0.0, 1.0, 0))
        for size in sizes:
            for other in (*sizes, size):  # from every size to every other one
                self._resize(other, PIECES[-1])
            self._batch, made = serving.admit(
                self._batch, np.int32(0), reading.cache, reading.logits, np.int32(1), one,
                np.int32(1), self.ends)
            self._batch, made = serving.decode(self.engine, self._batch, self.ends, STEPS)
            jax.block_until_ready(made)
            bar.update(done := done + 1)
        self._resize(1, PIECES[-1])

    def warm_steps(self) -> int:
        """Programs that `warm` compiles."""
        return len(PIECES) + len(self.row_sizes())

    def row_sizes(self) -> list[int]:
        """Numbers of rows that a batch may have: powers of two, and the most."""
        return sorted({min(2**n, self.rows) for n in range(self.rows.bit_length() + 1)})

    # the thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = error
            self._fail_all()
            self.failed()

    def _turn(self) -> bool:
        """Some tokens for everybody; False when closed."""
        with self._changed:
            while not (self._waiting or self._readings or self.running or self._closing):
                self._changed.wait()
            if not (self._waiting or self._readings or self.running):
                return False
        for number, row in enumerate(self._held):
            if row and not row.choice.wanted:
                self._free(number)
        self._read()
        if self.running:
            self._decode()
        return True

    def _fail_all(self) -> None:
        failure = Failure(500, "the server has failed, its log says why")
        with self._changed:
            self._closing = True
            choices = self._all()
            self._waiting.clear()
            self._readings.clear()
            self._held = [None]
        for choice in choices:
            if choice.wanted:
                choice.fail(failure)

    # prompts

    def _read(self) -> None:
        """Reads prompts, of 256 tokens or less in all, and gives those that are read a row."""
        budget, admitted = PIECES[-1], []
        while budget > 0 and self.running < self.rows:
            self._take()
            if not self._readings:
                break
            first = self._readings[0]
            if not first.complete:
                budget -= self._further(list(self._readings))
            if first.complete:
                admitted += self._admit(first)
        # All at once, for waiting for one takes as long as making it.
        firsts = jax.device_get([made for _, made in admitted])
        for (row, _), made in zip(admitted, firsts, strict=True):
            self._hand_out(made, [row])

    def _take(self) -> None:
        """Where no prompt is being read, takes the first of those that wait, and those behind it
        that can be read with it in one call and find a row."""
        with self._changed:
            while self._readings and not self._readings[0].prompt.wanted:
                self._readings.popleft()
            if self._readings:
                return
            self._waiting = deque(prompt for prompt in self._waiting if prompt.wanted)
            tokens, most = 0, min(TOGETHER, self.rows - self.running)
            while self._waiting and len(self._readings) < most:
                tokens += len(self._waiting[0].ids)
                if self._readings and tokens > PIECES[-1]:
                    return
                self._readings.append(Reading(self._waiting.popleft()))

    def _further(self, readings: Sequence[Reading]) -> int:
        """Reads a piece of one prompt, or several prompts; returns how many tokens were computed.

        Where the logits of one of several are not finite, each is read alone, for such a value is
        in the sums of all.
        """
        if len(readings) > 1 and (computed := self._together(readings)):
            return computed
        return sum(map(self._piece, readings))

    def _together(self, readings: Sequence[Reading]) -> int:
        """Reads several prompts in one call; 0 where their logits are not finite."""
        ids = [one.prompt.ids for one in readings]
        counts = np.array([len(one) for one in ids], np.int32)
        starts, size = np.cumsum(counts, dtype=np.int32) - counts, padded(int(counts.sum()))

        def filled(array: np.ndarray, length: int) -> np.ndarray:
            return np.pad(array, (0, length - len(array)), mode="edge")

        tokens = filled(np.concatenate(ids).astype(np.int32), size)
        prompt = filled(np.repeat(np.arange(len(ids), dtype=np.int32), counts), size)
        places = filled(starts, TOGETHER), filled(counts, TOGETHER)
        logits, finite, cache = serving.read_together(self.engine, tokens, prompt, *places)
        if not finite:
            return 0
        for n, one in enumerate(readings):
            one.logits, one.cache = serving.one_of(
                self.engine.config, logits, cache, np.int32(n), *places, PIECES[-1])
            one.read = len(ids[n])
        return size

    def _piece(self, reading: Reading) -> int:
        """Reads a piece of a prompt; returns how many tokens were computed."""
        ids, engine = reading.prompt.ids, self.engine
        piece = ids[reading.read : reading.read + PIECES[-1]]
        tokens = np.zeros((1, padded(len(piece))), np.int32)
        tokens[0, : len(piece)] = piece
        cache = reading.cache or serving.empty_cache(
            engine.config, self._slots(len(ids)), engine.cache_bits)
        reading.logits, reading.cache = serving.read(
            engine, cache, tokens, np.int32(reading.read), np.int32(len(piece)))
        reading.read += len(piece)
        return tokens.size

    def _admit(self, reading: Reading) -> list[tuple[Row, serving.Made]]:
        """Gives the texts of a prompt their rows, as far as there are any; returns them with their
        first tokens."""
        choices, length = reading.prompt.choices, len(reading.prompt.ids)
        assert reading.logits is not None and reading.cache is not None
        found = []
        while choices and self.running < self.rows:
            choice = choices[0]
            row = None
            if choice.wanted:
                others = sum(one.wanted for read in self._readings for one in read.prompt.choices)
                self._grow(min(self.rows, self.running + others),
                           max(length + 1, reading.cache.slots))
                number = self._held.index(None)
                self._batch, made = serving.admit(
                    self._batch, np.int32(number), reading.cache, reading.logits,
                    np.int32(length), sampling_of(choice.settings),
                    np.int32(choice.settings.max_tokens), self.ends)
                stop = choice.settings.stop
                ends = self.eos_ids.union(self.special[s] for s in stop if s in self.special)
                writing = Writing(self.tokenizer, reading.prompt.ids, stop)
                row = Row(choice, writing, ends, length)
                found.append((row, made))
            with self._changed:
                choices.pop(0)
                if row is not None:
                    self._held[self._held.index(None)] = row
        if not choices:
            with self._changed:
                self._readings.popleft()
        return found

    # tokens

    def _decode(self) -> None:
        self._fit()
        self._batch, made = serving.decode(self.engine, self._batch, self.ends, STEPS)
        found = jax.device_get(made)
        for row, tokens in zip(self._held, found.tokens, strict=True):
            if row:
                row.length += int((tokens != serving.NOTHING).sum())
        self._hand_out(found, list(self._held))

    def _hand_out(self, made: serving.Made, rows: Sequence[Row | None]) -> None:
        """Tells the texts of these rows what was made for them, row by row."""
        for index, row in enumerate(rows):
            if row is None:
                continue
            new = [n for n, token in enumerate(made.tokens[index]) if token != serving.NOTHING]
            finish = None
            for n in new:
                finish = finish or row.add(made, index, n)
            if made.broken[index]:
                row.choice.fail(Failure(
                    500, "the logits hold NaN or infinity: the model's weights are damaged or "
                         f"overflow {self.engine.config.dtype}, pack or load them again"))
                self._free(self._held.index(row), stopped=True)
                continue
            row.tell(finish)
            if finish:
                row.choice.over = True
                taken = time.monotonic() - row.began
                self._seconds += 0.2 * (taken - self._seconds)
                self._free(self._held.index(row))

    def _free(self, number: int, stopped: bool = False) -> None:
        if not stopped:
            self._batch = serving.stop(self._batch, np.int32(number))
        with self._changed:
            self._held[number] = None

    # the size of the batch

    def _slots(self, tokens: int) -> int:
        """Slots for so many tokens: 256 times a power of two, at most those of the context."""
        unit = PIECES[-1]
        blocks = max(1, -(-tokens // unit))
        most = -(-self.context // unit)
        return unit * min(1 << (blocks - 1).bit_length(), max(most, blocks))

    def _needed(self) -> int:
        """Slots that the rows need for the next call."""
        longest = max((row.length for row in self._held if row), default=0)
        return self._slots(min(longest + STEPS, self.context))

    def _grow(self, rows: int, slots: int) -> None:
        """Makes the batch hold so many rows and slots, and those that there are."""
        have_rows, have_slots = len(self._held), self._batch.slots
        if not self.running:
            have_rows, have_slots = 0, 0
        rows = max(next(size for size in self.row_sizes() if size >= rows), have_rows)
        slots = max(self._slots(slots), self._needed(), have_slots)
        self._resize(rows, slots)

    def _fit(self) -> None:
        """Makes the batch larger where it must be, and smaller where half of it is long unused."""
        rows = next(size for size in self.row_sizes() if size >= self.running)
        slots, have = self._needed(), (len(self._held), self._batch.slots)
        if slots > have[1]:
            self._resize(max(rows, have[0]), slots)
        self._roomy = self._roomy + 1 if 2 * rows <= have[0] or 2 * slots <= have[1] else 0
        if self._roomy > PATIENCE:
            self._resize(rows, slots)

    def _resize(self, rows: int, slots: int) -> None:
        if (rows, slots) == (len(self._held), self._batch.slots):
            return
        kept = [n for n, row in enumerate(self._held) if row]
        source = np.zeros(rows, np.int32)
        source[: len(kept)] = kept
        self._batch = serving.resize(
            self.engine.config, self._batch, source, np.int32(len(kept)), slots)
        with self._changed:
            self._held = [self._held[n] for n in kept] + [None] * (rows - len(kept))
        self._roomy = 0


def padded(length: int) -> int:
    """The length that a piece of a prompt gets."""
    return next(size for size in PIECES if size >= min(length, PIECES[-1]))


def sampling_of(settings: Settings) -> serving.Sampling:
    """The settings of one row."""
    low, high = np.uint32(settings.seed & 0xFFFFFFFF), np.uint32(settings.seed >> 32 & 0xFFFFFFFF)
    key = jax.random.fold_in(jax.random.key(low), high)
    return serving.Sampling(
        key[None], jnp.array([settings.temperature]), jnp.array([settings.top_p]),
        jnp.array([settings.alternatives is not None]))
