"""docs/others.md says what transformers does; here transformers does it."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    MPNetConfig,
    MPNetForMaskedLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.models.mpnet.modeling_mpnet import create_position_ids_from_input_ids

from annotated_mpnet.mpnet.positions import relative_position_bucket
from annotated_mpnet.text.tokenizer import load_tokenizer
from tiny_run import write_text


def tiny_model(**changes: object) -> MPNetForMaskedLM:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 42,
    }
    return MPNetForMaskedLM(MPNetConfig(**{**sizes, **changes})).eval()


def test_the_objective_is_berts_and_the_loss_a_mean() -> None:
    model, ids = tiny_model(), torch.arange(5, 25)[None]
    assert not {"positions", "pred_size"} & set(inspect.signature(model.forward).parameters)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5] = ids[0, 3:5]
    with torch.no_grad():
        predicted = model(ids, labels=labels)
        nothing_predicted = model(ids, labels=torch.full_like(ids, -100))
    assert predicted.logits.shape == (1, 20, 50)  # at all positions
    logits = predicted.logits[0, 3:5]
    mean = torch.nn.functional.cross_entropy(logits, ids[0, 3:5])
    torch.testing.assert_close(predicted.loss, mean)
    assert nothing_predicted.loss.isnan()


def test_buckets_of_another_number_are_made_and_not_used() -> None:
    model = tiny_model(relative_attention_num_buckets=64)
    table = model.mpnet.encoder.relative_attention_bias.weight
    assert table.shape == (64, 2)
    found = model.mpnet.encoder.compute_position_bias(torch.zeros(3, 40, 16))
    distance = torch.arange(40)[None] - torch.arange(40)[:, None]
    with_32 = table[relative_position_bucket(distance, 32, 128)].permute(2, 0, 1)
    torch.testing.assert_close(found, with_32.expand(3, 2, 40, 40))
    assert found.is_contiguous()  # a copy for each sample


def test_positions_count_what_is_not_id_1() -> None:
    ids = torch.tensor([[0, 7, 8, 2, 1, 1]])
    assert create_position_ids_from_input_ids(ids, 1).tolist() == [[2, 3, 4, 5, 1, 1]]
    assert tiny_model(pad_token_id=0).mpnet.embeddings.padding_idx == 1
    default = MPNetConfig()
    assert default.max_position_embeddings == 512
    assert default.layer_norm_eps == 1e-12


def test_what_the_network_has_not() -> None:
    assert not MPNetForMaskedLM._supports_sdpa
    assert not MPNetForMaskedLM.supports_gradient_checkpointing


def test_trainers_defaults(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)
    assert (arguments.adam_epsilon, arguments.weight_decay) == (1e-8, 0.0)
    assert (arguments.learning_rate, arguments.warmup_steps) == (5e-5, 0)
    assert arguments.max_grad_norm == 1.0
    assert not arguments.save_only_model
    assert not arguments.ignore_data_skip
    trainer = Trainer(model=tiny_model(), args=arguments)
    # It believes that the model divides by the tokens of the whole update.
    assert trainer.model_accepts_loss_kwargs
    decays = trainer.get_decay_parameter_names(trainer.model)
    assert "mpnet.encoder.relative_attention_bias.weight" not in decays
    assert "mpnet.encoder.layer.0.intermediate.dense.weight" in decays
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert get_linear_schedule_with_warmup(optimizer, 10, 100).get_last_lr() == [0.0]


def test_collator_draws_each_token_and_cannot_corrupt_whole_words(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_text(tmp_path).tokenizer))
    collator = DataCollatorForLanguageModeling(tokenizer, seed=0)
    assert collator.mlm_probability == 0.15
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (0.8, 0.1)
    ids = [tokenizer.cls_token_id, *[20] * 98, tokenizer.sep_token_id]
    batch = collator([{"input_ids": ids} for _ in range(40)])
    counts = (batch["labels"] != -100).sum(dim=1)
    assert counts.min() < counts.max()
    assert (batch["labels"][:, [0, -1]] == -100).all()
    with pytest.warns(UserWarning, match="not supported with whole word masking"):
        collator = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    assert (collator.mask_replace_prob, collator.random_replace_prob) == (1, 0)
