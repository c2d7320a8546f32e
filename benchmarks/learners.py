"""The networks that `end_to_end.py` trains and compares: ours and transformers'.

A learner makes updates and returns logits for a batch of validation text. It knows the number of
updates from the start, because the learning rate depends on it. The functions at the end train and
evaluate both kinds.

    B batch   L tokens of a sentence   P predicted tokens   V vocabulary
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, MPNetForMaskedLM

from annotated_mpnet.conversion.names import to_hugging_face, to_mpnet_config
from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import InputMode, ObjectiveConfig, RelativeBiasInit
from annotated_mpnet.mpnet.loop import UpdateResult
from annotated_mpnet.mpnet.optimizer import build_optimizer, learning_rate, set_learning_rate
from annotated_mpnet.mpnet.pretraining import cross_entropy_sum
from annotated_mpnet.runs.initial_weights import build_model
from annotated_mpnet.runs.preparation import choose_attention
from annotated_mpnet.runs.session import PREFETCHED_UPDATES
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.tracking.tracker import Tracker, nats_to_bits
from annotated_mpnet.training.distributed import SharedNetwork, World
from annotated_mpnet.training.loader import BatchLoader, evaluation_batches, prefetch
from annotated_mpnet.training.muon import choose_optimizer
from annotated_mpnet.training.trainer import Trainer

CPU = torch.device("cpu")
WARMUP_SHARE = 0.05
WARM_UPDATES = 3
"""Not timed: they compile or select kernels and allocate memory."""

# Name -> the objective, and whether whole words are masked.
METRICS: dict[str, tuple[InputMode, bool]] = {
    "tokens": ("mlm", False),
    "words": ("mlm", True),
    "mpnet": ("mpnet", True),
}
METRIC_SEED = 12345
"""Seed of the validation text's masks, the same for all runs."""


class Learner(Protocol):
    """A network in training."""

    config: PretrainingConfig
    text: Text

    def batches(self) -> Iterator[Any]:
        """Yield the training data of each update, without end."""
        ...

    def update(self, number: int, batch: Any) -> int:
        """Make update `number` (from 0) and return its number of tokens."""
        ...

    def logits(self, batch: Batch, mode: InputMode) -> torch.Tensor:
        """Return logits (B, P, V) at the predicted positions, without dropout."""
        ...


def with_schedule(
    config: PretrainingConfig, updates: int, mode: InputMode, start: RelativeBiasInit = "auto"
) -> PretrainingConfig:
    """Return the configuration with another objective, start and number of updates."""
    optimization = dataclasses.replace(
        config.optimization,
        total_updates=updates,
        warmup_updates=round(WARMUP_SHARE * updates),
        update_freq=1,
        relative_bias_init=start,
    )
    objective = dataclasses.replace(config.objective, input_mode=mode)
    return dataclasses.replace(config, optimization=optimization, objective=objective)


def loader_of(config: PretrainingConfig, text: Text) -> BatchLoader:
    """Return our training batches, in the order given by the run's seed."""
    assert isinstance(text.train, PackedSequences)
    return BatchLoader(
        text.train,
        collator_of(config.objective, config, text, config.run.seed),
        config.optimization.batch_size,
        config.run.seed,
    )


def collator_of(
    objective: ObjectiveConfig, config: PretrainingConfig, text: Text, seed: int
) -> DataCollatorForMaskedPermutedLanguageModeling:
    data = config.data
    return DataCollatorForMaskedPermutedLanguageModeling(
        text.vocabulary, objective, data.max_tokens, seed, packing=data.packing
    )


class Ours:
    """Our network in our training loop."""

    def __init__(
        self,
        config: PretrainingConfig,
        text: Text,
        updates: int,
        mode: InputMode,
        start: RelativeBiasInit,
    ) -> None:
        keep_memory()  # as a run does (`runs/run.py`)
        self.config, self.text = with_schedule(config, updates, mode, start), text
        self.model, _ = build_model(self.config, text)
        self.model.use_attention(ATTENTIONS[choose_attention(config.machine.attention, CPU)[0]])
        self._bf16 = config.machine.precision == "bf16"
        self._trainer = Trainer(
            SharedNetwork(self.model, World(), CPU),
            choose_optimizer(self.model, self.config.optimization, CPU),
            self.config.optimization,
            self.config.objective.input_mode,
            self.config.run.seed,
            self._bf16,
            Tracker.silent(),
        )

    def batches(self) -> Iterator[list[Batch]]:
        """Yield updates of one micro-batch each."""
        return (batches for batches, _ in loader_of(self.config, self.text).updates(0, 1))

    def update(self, number: int, batch: list[Batch]) -> int:
        """Make an update in our loop."""
        return self.result(number, batch).num_tokens

    def result(self, number: int, batch: list[Batch]) -> UpdateResult:
        """Make an update in our loop, and return all that it says."""
        return self._trainer.update(number, batch)

    def logits(self, batch: Batch, mode: InputMode) -> torch.Tensor:
        """Return logits (B, P, V) for either objective."""
        self.model.eval()
        positions, ids = batch.predicted_positions, batch.predicted_ids
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16):
            return self.model(batch.input_ids, positions, ids, batch.attention_mask, mode)


class HuggingFace:
    """transformers' network in a plain PyTorch loop."""

    def __init__(
        self, config: PretrainingConfig, text: Text, updates: int, start: RelativeBiasInit
    ) -> None:
        """Build the network; the start `normal` is transformers' own initialisation."""
        self.config, self.text = with_schedule(config, updates, "mlm", start), text
        ours, _ = build_model(self.config, text)
        vocabulary = text.vocabulary
        torch.manual_seed(config.run.seed)
        self.model = MPNetForMaskedLM(
            to_mpnet_config(ours.config, vocabulary.cls_id, vocabulary.sep_id)
        )
        if start != "normal":
            theirs = to_hugging_face(ours.state_dict())
            missing, unexpected = self.model.load_state_dict(theirs, strict=False)
            # Tied weights, and position ids, which are no weights.
            assert not unexpected, unexpected
            assert all("decoder" in name or "position_ids" in name for name in missing), missing
        self.optimizer = build_optimizer(self.model, self.config.optimization, CPU)
        self._bf16 = config.machine.precision == "bf16"
        torch.manual_seed(config.run.seed)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the same sequences as ours, masked by transformers' collator."""
        collator = DataCollatorForLanguageModeling(
            self.text.tokenizer, mlm_probability=0.15, seed=self.config.run.seed
        )
        loader, is_special_V = loader_of(self.config, self.text), self.text.vocabulary.is_special_V
        for k in count():
            yield collator(
                [
                    # With the mask, as in `run_mlm.py`, the collator need not compute it.
                    {
                        "input_ids": each.input_ids.tolist(),
                        "special_tokens_mask": is_special_V[each.input_ids].astype(int).tolist(),
                    }
                    for each in loader.sequences_of(k)
                ]
            )

    def update(self, number: int, batch: dict[str, torch.Tensor]) -> int:
        """Make an update of a plain PyTorch loop."""
        optimization = self.config.optimization
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16):
            loss = self.model(**batch).loss
        loss.backward()
        if optimization.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), optimization.clip_grad_norm)
        set_learning_rate(self.optimizer, learning_rate(number, optimization))
        self.optimizer.step()
        return batch["input_ids"].numel()

    def logits(self, batch: Batch, mode: InputMode) -> torch.Tensor:
        """Return logits (B, P, V), gathered from those of all positions."""
        assert mode == "mlm"
        self.model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16):
            logits_BLV = self.model(batch.input_ids, attention_mask=batch.attention_mask).logits
        positions_BP1 = batch.predicted_positions[:, :, None]
        return logits_BLV.gather(1, positions_BP1.expand(-1, -1, logits_BLV.shape[2]))


LEARNERS: dict[str, Callable[[PretrainingConfig, Text, int], Learner]] = {
    "mpnet": partial(Ours, mode="mpnet", start="local"),
    "mpnet-normal": partial(Ours, mode="mpnet", start="normal"),
    "mlm": partial(Ours, mode="mlm", start="local"),
    "mlm-normal": partial(Ours, mode="mlm", start="normal"),
    "hf": partial(HuggingFace, start="normal"),
    "hf-local": partial(HuggingFace, start="local"),
}


def calibrate(learner: Learner, seconds: float) -> float:
    """Return the seconds per update, measured by training the learner for this long."""
    with closing(prefetch(learner.batches(), PREFETCHED_UPDATES)) as batches:
        for number in range(WARM_UPDATES):
            learner.update(number, next(batches))
        started, done = time.perf_counter(), 0
        while done < WARM_UPDATES or time.perf_counter() - started < seconds:
            learner.update(WARM_UPDATES + done, next(batches))
            done += 1
        return (time.perf_counter() - started) / done


Curve = list[tuple[float, float]]
"""Pairs: seconds of training so far, and bits on the validation text."""


def bits_of_words(learner: Learner) -> float:
    """Return the bits by the yardstick `words`."""
    return judge(learner, "words")[0]


def train(
    learner: Learner,
    updates: int,
    judged: Sequence[int] = (),
    judge_it: Callable[[Learner], float] = bits_of_words,
) -> dict[str, Any]:
    """Make all updates of a learner.

    Args:
        learner: a fresh one.
        updates: how many.
        judged: the updates after which to judge it, with the clock stopped.
        judge_it: how.

    Returns:
        Seconds of training, the tokens it saw, and its curve.
    """
    tokens, seconds, curve = 0, 0.0, Curve()
    with closing(prefetch(learner.batches(), PREFETCHED_UPDATES)) as batches:
        started = time.perf_counter()
        for number in range(updates):
            tokens += learner.update(number, next(batches))
            if number + 1 in judged:
                seconds += time.perf_counter() - started
                # A short run may reach two of its points with the same update.
                curve += [(seconds, judge_it(learner))] * judged.count(number + 1)
                started = time.perf_counter()
        seconds += time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens, "curve": curve}


def time_to(curve: Curve, bits: float) -> float | None:
    """Return when a curve reaches a loss, interpolated linearly; None if it does not.

    >>> time_to([(10, 9.0), (20, 8.0), (30, 6.0)], 7.0), time_to([(10, 9.0)], 7.0)
    (25.0, None)
    """
    earlier: tuple[float, float] | None = None
    for seconds, reached in curve:
        if reached <= bits:
            if earlier is None:
                return seconds
            share = (earlier[1] - bits) / (earlier[1] - reached)
            return earlier[0] + share * (seconds - earlier[0])
        earlier = seconds, reached
    return None


@torch.no_grad()
def judge(learner: Learner, metric: str) -> tuple[float, float]:
    """Return bits per predicted token on the validation text, and accuracy."""
    mode, whole_words = METRICS[metric]
    config, sequences = learner.config, learner.text.valid
    assert sequences is not None
    objective = ObjectiveConfig(input_mode=mode, whole_word_mask=whole_words)
    collator = collator_of(objective, config, learner.text, METRIC_SEED)
    loss = correct = predicted = 0.0
    for batch in evaluation_batches(sequences, collator, config.optimization.batch_size):
        logits_BPV = learner.logits(batch, mode)
        used_BP = batch.predicted_ids != NOT_PREDICTED
        loss += cross_entropy_sum(logits_BPV, batch.predicted_ids).item()
        correct += ((logits_BPV.argmax(-1) == batch.predicted_ids) & used_BP).sum().item()
        predicted += batch.num_predicted
    return nats_to_bits(loss / predicted), correct / predicted
