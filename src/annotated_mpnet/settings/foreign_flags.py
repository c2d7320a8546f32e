"""What the flags of other tools are called here.

Most users come with a command of transformers' Trainer, fairseq, annotated-mpnet or nanoGPT. A flag
that exists only there is refused, since a value may mean something else here (epochs are not
updates), and the error names the flag that does the same:

>>> pointer("--per_device_train_batch_size", {"--batch-size"})
'--batch-size'
>>> pointer("--num_train_epochs", {"--total-updates"})
'--total-updates, in updates: --dry-run says how many epochs they are'
>>> pointer("--fp16", {"--precision"})
'--precision, as --precision bf16'
>>> pointer("--frobnicate", {"--precision"}) is None
True
"""

from collections.abc import Container

SAME = {
    # The directory to write has another flag in each command; the first one that a command has is
    # its own.
    "--checkpoint-dir": "output-dir save-dir out-dir outdir output-path save-path output run-dir",
    "--hf-model-folder-path": "output-dir save-dir out-dir output-path output save-path",
    "--output": "output-dir save-dir out-dir output-path save-path tokenizer-dir",
    "--mpnet-checkpoint-path": (
        "checkpoint checkpoint-path checkpoint-dir model-path model-name-or-path input-path "
        "resume-checkpoint run-dir model model-name"
    ),
    "--train-dir": (
        "train-file train-files train-data train-path train-data-file train-data-path data "
        "data-dir data-path corpus dataset-path input-file train"
    ),
    "--valid-file": (
        "validation-file valid-data valid-dir valid-path validation-data val-file val-data "
        "eval-file eval-data eval-data-file eval-dir dev-file valid-subset"
    ),
    "--test-file": "test-data test-dir test-path",
    "--dataset-name": "dataset hf-dataset dataset-id train-dataset",
    "--dataset-config": "dataset-config-name dataset-subset subset",
    "--dataset-split": "split train-split train-subset",
    "--text-field": "text-column text-column-name text-key column dataset-text-field",
    "--eval-samples": "max-eval-samples num-eval-samples",
    "--buffer-size": "shuffle-buffer shuffle-buffer-size",
    "--tokenizer-name": "tokenizer tokenizer-path tokenizer-dir tokenizer-name-or-path",
    "--max-tokens": (
        "max-seq-length max-seq-len max-length seq-length seq-len sequence-length block-size "
        "context-length max-len max-source-positions"
    ),
    "--max-positions": "max-position-embeddings",
    "--hf-model-path": (
        "model-name-or-path model-name model model-path pretrained-model-name-or-path init-from "
        "base-model pretrained-model hf-model"
    ),
    "--encoder-layers": "num-hidden-layers num-layers n-layers n-layer layers",
    "--encoder-embed-dim": "hidden-size hidden-dim embed-dim d-model n-embd",
    "--encoder-ffn-dim": "intermediate-size ffn-dim encoder-ffn-embed-dim d-ff",
    "--encoder-attention-heads": "num-attention-heads num-heads attention-heads n-heads n-head",
    "--dropout": "hidden-dropout-prob hidden-dropout",
    "--attention-dropout": "attention-probs-dropout-prob attn-dropout",
    "--activation-fn": "hidden-act activation activation-function",
    "--normalize-before": "encoder-normalize-before pre-norm prenorm",
    "--pred-prob": "mlm-probability mlm-prob mask-prob masking-probability mask-ratio",
    "--keep-prob": "leave-unmasked-prob",
    "--rand-prob": "random-token-prob",
    "--whole-word-mask": "mask-whole-words whole-word whole-word-masking wwm",
    "--batch-size": (
        "per-device-train-batch-size per-gpu-train-batch-size train-batch-size micro-batch-size "
        "max-sentences batch bs bsz per-device-batch-size device-batch-size"
    ),
    "--update-freq": (
        "gradient-accumulation-steps gradient-accumulation grad-accum grad-accum-steps "
        "accumulation-steps accumulate-grad-batches accum-iter gc-steps"
    ),
    "--total-updates": (
        "max-steps max-update max-updates num-steps num-train-steps max-train-steps train-steps "
        "total-steps num-training-steps training-steps total-num-update max-iters iterations steps"
    ),
    "--warmup-updates": "warmup-steps num-warmup-steps warmup-iters warmup",
    "--lr": "learning-rate peak-lr max-lr base-lr",
    "--end-learning-rate": "end-lr min-lr lr-end final-lr",
    "--schedule": "lr-scheduler-type lr-scheduler scheduler lr-schedule scheduler-type",
    "--beta1": "adam-beta1",
    "--beta2": "adam-beta2",
    "--adam-eps": "adam-epsilon epsilon eps",
    "--weight-decay": "wd",
    "--clip-grad-norm": "max-grad-norm clip-norm grad-clip gradient-clip-val clip-grad grad-norm",
    "--checkpoint-interval": (
        "save-interval save-interval-updates save-every checkpoint-every save-freq save-steps"
    ),
    "--keep-checkpoints": (
        "save-total-limit keep-interval-updates keep-last keep-last-epochs max-checkpoints"
    ),
    "--eval-interval-steps": (
        "eval-steps evaluation-steps eval-interval eval-every eval-freq val-interval "
        "val-check-interval validate-interval validate-interval-updates"
    ),
    "--resume": "continue resume-training",
    "--resume-checkpoint": "restore-file resume-from load-checkpoint checkpoint ckpt ckpt-path",
    "--autoresume": "auto-resume requeue",
    "--overwrite": "overwrite-output-dir force",
    "--seed": "random-seed manual-seed data-seed torch-seed rng-seed random-state",
    "--logging-steps": "log-interval log-every log-steps logging-interval log-freq print-every",
    "--tensorboard-log-dir": "logging-dir tensorboard-logdir tensorboard-dir log-dir tensorboard",
    "--wandb": "use-wandb wandb-log",
    "--wandb-name": "run-name wandb-run-name experiment-name",
    "--wandb-project": "project project-name",
    "--num-workers": (
        "dataloader-num-workers preprocessing-num-workers workers num-proc num-data-workers"
    ),
    "--checkpoint": (
        "model model-path model-name model-name-or-path checkpoint-path checkpoint-dir hf-model "
        "hf-model-path mpnet-checkpoint-path run-dir"
    ),
    "--html": "output out output-html",
    "--predict": "words targets mask-words",
    "--compile": "torch-compile use-compile",
    "--gradient-checkpointing": "activation-checkpointing grad-checkpointing",
    "--attention": "attn-implementation attn-impl",
    "--distributed-timeout": "ddp-timeout",
    "--vocab-size": "vocabulary-size n-vocab max-vocab",
    "--debug": "verbose log-level",
}
"""Each of our flags, with the names that other tools give it."""

NEARLY = {
    "--total-updates, in updates: --dry-run says how many epochs they are": (
        "epochs num-train-epochs num-epochs max-epoch max-epochs n-epochs epoch train-epochs"
    ),
    "--warmup-updates, in updates": "warmup-ratio warmup-proportion warmup-fraction",
    "--precision, as --precision bf16": (
        "fp16 bf16 half amp mixed-precision memory-efficient-fp16 memory-efficient-bf16 use-amp "
        "fp16-full-eval bf16-full-eval dtype torch-dtype"
    ),
    "--max-tokens: what fairseq calls so is --batch-size, in sequences": "tokens-per-sample",
    "--valid-fraction, as --valid-fraction 0.05 for 5 %": (
        "validation-split-percentage validation-split valid-split val-split eval-split val-size "
        "test-size"
    ),
    "--preset, with --encoder-layers and so on for another size": "arch model-type config-name",
    "--packing, as --packing none": "line-by-line sample-break-mode group-texts pack",
    "--beta1, with --beta2": "adam-betas betas",
    "--resume, or --resume-checkpoint PATH": "resume-from-checkpoint",
    "--wandb, or --tensorboard-log-dir DIR": "report-to logger",
    "--device, as --device cpu": "no-cuda use-cpu cpu gpu gpus gpu-id",
    "--checkpoint-interval, in updates": "save-strategy save-interval-epochs",
    "--eval-interval-steps, in updates": "evaluation-strategy eval-strategy do-eval",
    "--batch-size, for evaluation too": (
        "per-device-eval-batch-size eval-batch-size valid-batch-size batch-size-valid "
        "per-gpu-eval-batch-size max-tokens-valid max-sentences-valid"
    ),
    "--fsdp, without a value": "zero-stage deepspeed ddp-backend fsdp-config",
    "torchrun starts a process for each GPU": (
        "local-rank nproc-per-node nnodes distributed-world-size num-gpus n-gpu world-size "
        "distributed-port master-addr master-port num-nodes devices"
    ),
    "convert-to-hf exports a checkpoint": "push-to-hub hub-model-id hub-token",
    "--optimizer, as --optimizer adamw": "optim use-adam optimizer-name",
    "--input-mode, as --input-mode mlm": "task criterion mlm loss objective",
    "not needed, a run trains, validates and tests on the text that it is given": (
        "do-train do-predict"
    ),
}
"""Where the flag's name alone would mislead: what to say, and the names elsewhere."""


def pointer(name: str, flags: Container[str]) -> str | None:
    """Return what a flag of another tool is here; None if it is not known.

    Args:
        name: as it was typed, with any dashes or underscores.
        flags: those that the command has. A flag that it does not have is not pointed to.
    """
    plain = name.lstrip("-").replace("_", "-").lower()
    # `--no-fp16` turns off what `--fp16` turns on.
    plain = plain.removeprefix("no-") if plain != "no-cuda" else plain
    for said, names in (*NEARLY.items(), *SAME.items()):
        ours = flag_in(said)
        if plain in names.split() and (ours in flags or not ours.startswith("--")):
            return said
    return None


def flag_in(pointer: str) -> str:
    """Return the flag that a pointer begins with.

    >>> flag_in("--precision, as --precision bf16")
    '--precision'
    """
    return pointer.split()[0].rstrip(",:")
