"""The published keys of LLaMA-Factory, axolotl, TRL and transformers, and what stands for each of them here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from galore_trainer.run.settings.convert_rules import (
    ANSWERS,
    AXOLOTL_DATA,
    ROWS,
    TRL_DATA,
    WEIGHTS,
    Rule,
    Tool,
    as_here,
    by_hand,
    case,
    column,
    held_out,
    inverted,
    mixer,
    modules,
    none,
    sets,
    share_of_steps,
    source,
    to,
    twice_the_rank,
    when,
)
from galore_trainer.run.settings.keys import REFUSED

# ------------------------------------------------------------------------------------------ shared rules

REGISTERED = f"A name of dataset_info.json: write its file or hub id. {ROWS}"
ROUNDING = "Updates are rounded stochastically (galore.stochastic_rounding)."
LONGER = "Longer examples are left out whole, not cut."
OWN_TEMPLATE = "The tokenizer's own chat template is used: save another one with the tokenizer."
LAYERWISE = (
    "Layer-wise with accumulation and clipping (max_grad_norm, 1.0 unless written), which apply here; refreshes are "
    "spread over the gap, and the first basis comes from a sketch. Without the lines head_sharing, momentum_transfer "
    "and residual_percent it is GaLore+."
)
SCALE = "The same factor on lr for projected weights; this project begins with scale auto and learning rate 4e-4."
QUANTIZED = "Weights are not quantised here."
ATTENTION = "transformers chooses the attention."
CACHE = "Examples are tokenized once and kept."
SHARDED = "Give galore-ft train the flag --launch-config: fsdp2, zero1, zero2 or zero3."
TRL_TRAINER = "TRL's trainer packs: 'trainer: trl', which needs the extra [trl]; packed examples do not see each other."
CUT = "Whole examples share rows; they are neither cut nor do they see each other."
PREFERENCES = "Only supervised fine-tuning; the plugin is for TRL's other trainers."
RENAMED = "The name in transformers 5."
ANOTHER = "This optimizer is not offered; method: adamw stands in its place."
GALORE_LAYERWISE = {
    "method": "galore_plus",
    "galore.layerwise": True,
    "galore.head_sharing": "joint",
    "galore.momentum_transfer": "keep",
    "galore.residual_percent": 0.0,
    "galore.plain_lr_ratio": 1.0,
}
EAGER, FLASH = (sets({"attn_implementation": name}) for name in ("eager", "flash_attention_2"))
EIGHT_BITS = {"galore.state_bits": 8, "galore.plain_state_bits": 8}
PAGED = "bitsandbytes' 8-bit AdamW without pages."
PACKED = when(sets({"packing": True}))

OPTIMIZERS: dict[Any, Rule] = {
    **{name: sets({"method": "adamw"}) for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")},
    **{name: sets({"method": "adamw_8bit"}) for name in ("adamw_bnb_8bit", "adamw_8bit")},
    "paged_adamw_8bit": sets({"method": "adamw_8bit"}, PAGED),
    "paged_adamw_32bit": sets({"method": "adamw"}, "AdamW without pages."),
    "paged_adamw": sets({"method": "adamw"}, "AdamW without pages."),
    "galore_adamw": sets({"method": "galore"}),
    "galore_adamw_8bit": sets({"method": "galore", **EIGHT_BITS}, "This project's own 8-bit moments."),
    "galore_adafactor": sets({"method": "galore"}, "AdamW's moments of projected gradients, not Adafactor's."),
    "galore_adamw_layerwise": sets(GALORE_LAYERWISE, LAYERWISE),
    "galore_adamw_8bit_layerwise": sets({**GALORE_LAYERWISE, **EIGHT_BITS}, LAYERWISE),
    "galore_adafactor_layerwise": sets(GALORE_LAYERWISE, f"AdamW's moments, not Adafactor's. {LAYERWISE}"),
}
OPTIMIZER = case(OPTIMIZERS, none(ANOTHER))
OPTIM_ARGS: dict[str, Rule] = {
    "optim_args.rank": to("galore.rank"),
    "optim_args.update_proj_gap": to("galore.update_proj_gap"),
    "optim_args.scale": to("galore.scale", SCALE),
    "optim_args.proj_type": to("galore.proj_type"),
    "optim_target_modules": to("galore.target_modules", value=modules),
}
GALORE_OF_TRANSFORMERS = {"galore.rank": 128, "galore.update_proj_gap": 200, "galore.scale": 0.25}

# Fields of TrainingArguments, of this or an earlier version, that are no keys here.
TRAINING: dict[str, Rule] = {
    "optim": OPTIMIZER,
    **OPTIM_ARGS,
    "adafactor": when(none(ANOTHER)),
    "evaluation_strategy": to("eval_strategy", RENAMED),
    "warmup_ratio": to("warmup_steps", "Below 1 it is a share of all steps."),
    "no_cuda": to("use_cpu", RENAMED),
    "group_by_length": when(sets({"train_sampling_strategy": "group_by_length"}, RENAMED)),
    "overwrite_output_dir": when(by_hand("Give galore-ft train the flag --overwrite.")),
    "resume_from_checkpoint": when(by_hand("Give galore-ft train the flag --resume auto, or --resume PATH.")),
    "logging_dir": none("Set the environment variable TENSORBOARD_LOGGING_DIR."),
    "do_train": case({True: as_here("galore-ft train trains")}, by_hand("galore-ft eval scores a model.")),
    "do_eval": when(by_hand("eval_strategy decides; galore-ft train also scores before and after.")),
    "do_predict": when(by_hand("galore-ft eval MODEL_OR_RUN writes predictions.")),
    "hub_token": none("Set the environment variable HF_TOKEN: a run writes its configuration down."),
    "save_safetensors": case({True: as_here()}, none("Weights are always saved as safetensors.")),
    "deepspeed": none(SHARDED),
    "fsdp": case({"": as_here()}, none(SHARDED)),
    "fsdp_config": none(SHARDED),
    "torch_dtype": to("dtype"),
    "model_revision": case({"main": as_here()}, none("Give a local folder of that revision.")),
    "preprocessing_num_workers": as_here(CACHE),
    "overwrite_cache": as_here(CACHE),
    "cache_dir": none("Set the environment variable HF_HOME."),
    "trust_remote_code": to("trust_remote_code"),
    "attn_implementation": to("attn_implementation"),
    "load_in_4bit": when(none(QUANTIZED)),
    "load_in_8bit": when(none(QUANTIZED)),
}  # fmt: skip

# ------------------------------------------------------------------------------------------ the tools

LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    typical=("stage", "finetuning_type", "dataset", "template", "cutoff_len"),
    defaults={"method": "lora", "max_length": 2048, "gradient_checkpointing": True},
    galore_defaults={"galore.rank": 16, "galore.update_proj_gap": 200, "galore.scale": 2.0},
    lora_defaults={
        "lora.rank": 8, "lora.alpha": lambda settings: twice_the_rank(0, {"lora_rank": settings.get("lora.rank")}),
    },
    rules={
        **TRAINING,
        "stage": case({"sft": as_here(), "pt": sets({"data.task": "text"})}, none(PREFERENCES)),
        "finetuning_type": case(
            {"full": sets({"method": "adamw"}), "lora": sets({"method": "lora"})},
            none("The way of training has no counterpart; method: lora stands in its place."),
        ),
        "use_dora": when(sets({"method": "dora"})),
        "lora_rank": to("lora.rank"),
        "lora_alpha": to("lora.alpha", value=twice_the_rank),
        "lora_dropout": to("lora.dropout"),
        "lora_target": to("lora.target_modules", value=modules),
        "use_galore": when(sets({"method": "galore"})),
        "galore_layerwise": when(sets(GALORE_LAYERWISE, LAYERWISE)),
        "galore_target": to("galore.target_modules", value=modules),
        "galore_rank": to("galore.rank"),
        "galore_update_interval": to("galore.update_proj_gap"),
        "galore_scale": to("galore.scale", SCALE),
        "galore_proj_type": to("galore.proj_type"),
        "dataset": to("data.source", REGISTERED, source, commas=True),
        "eval_dataset": to("data.eval_source", REGISTERED, source),
        "dataset_dir": none("data.source is the file itself."),
        "template": none(OWN_TEMPLATE),
        "cutoff_len": to("max_length", LONGER),
        "interleave_probs": dataclasses.replace(WEIGHTS, commas=True),
        "mix_strategy": case({"concat": as_here()}, by_hand("No example is drawn twice.")),
        "max_samples": to("data.train_samples", "Of all sources together, picked by data.split_seed."),
        "val_size": to("data.eval_samples", value=held_out),
        "packing": when(sets({"packing": True}, CUT)),
        "neat_packing": PACKED,
        "mask_history": case({True: sets({"data.train_on": "last"})}, sets({"data.train_on": "all"})),
        "train_on_prompt": when(none(ANSWERS)),
        "tokenized_path": none(CACHE),
        "streaming": when(none("All rows are read before training.")),
        "default_system": to("data.system_prompt"),
        "pure_bf16": when(sets({"dtype": "bfloat16"}, ROUNDING)),
        "enable_liger_kernel": to("use_liger_kernel"),
        "disable_gradient_checkpointing": to("gradient_checkpointing", value=inverted),
        "plot_loss": when(by_hand("galore-ft report RUN draws the loss.")),
        "flash_attn": case({"auto": as_here(), "disabled": EAGER, "fa2": FLASH}, to("attn_implementation")),
        "quantization_bit": none(QUANTIZED),
        "quantization_method": none(QUANTIZED),
        "use_unsloth": when(none("Full-parameter training goes without unsloth.")),
        **{f"use_{name}": when(none(ANOTHER)) for name in ("apollo", "badam", "adam_mini", "muon")},
        "use_rslora": to("lora.use_rslora"),
        "use_swanlab": when(sets({"report_to": "swanlab"})),
        "moe_aux_loss_coef": none("The model's own coefficient is used."),
        "compute_accuracy": when(none("galore-ft scores answers before and after.")),
        "ref_model": none(PREFERENCES),
        "pref_beta": none(PREFERENCES),
        "pref_loss": none(PREFERENCES),
    },
)  # fmt: skip

AXOLOTL = Tool(
    name="axolotl",
    typical=("base_model", "datasets", "sequence_len", "micro_batch_size", "num_epochs"),
    defaults={
        "method": "adamw", "per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "cosine",
    },
    galore_defaults=GALORE_OF_TRANSFORMERS,
    lora_defaults={},
    rules={
        **TRAINING,
        "base_model": to("model_name_or_path"),
        **{name: as_here("found by the model") for name in ("model_type", "tokenizer_type", "base_model_config")},
        "tokenizer_config": none("The model's own tokenizer is used."),
        "strict": as_here("Every key is checked."),
        "optimizer": OPTIMIZER,
        "adapter": case(
            {"lora": sets({"method": "lora"}), "qlora": sets({"method": "lora"}, QUANTIZED)},
            none("The adapter has no counterpart; the method that optimizer names stands in its place."),
        ),
        "peft_use_dora": when(sets({"method": "dora"})),
        "peft_use_rslora": to("lora.use_rslora"),
        "lora_r": to("lora.rank"),
        "lora_alpha": to("lora.alpha"),
        "lora_dropout": to("lora.dropout"),
        "lora_target_modules": to("lora.target_modules", value=modules),
        "lora_target_linear": when(sets({"lora.target_modules": "all-linear"})),
        "lora_modules_to_save": none("Adapters alone are trained."),
        "lora_model_dir": none("Training starts from a model without adapters."),
        **AXOLOTL_DATA,
        "val_set_size": to("data.eval_samples", value=held_out),
        "dataset_prepared_path": none(CACHE),
        "dataset_processes": as_here(CACHE),
        "shuffle_merged_datasets": case({True: as_here()}, none("Training data are shuffled.")),
        "sequence_len": to("max_length", LONGER),
        "sample_packing": PACKED,
        "eval_sample_packing": when(sets({"eval_packing": True, "trainer": "trl"}, TRL_TRAINER)),
        "pad_to_sequence_len": when(none("Batches are padded to their longest example.")),
        "chat_template": case({"tokenizer_default": as_here()}, none(OWN_TEMPLATE)),
        "chat_template_jinja": none(OWN_TEMPLATE),
        "default_system_message": to("data.system_prompt"),
        "special_tokens": none("Save the tokenizer with those tokens beside the model."),
        "tokens": none("Save the tokenizer with those tokens beside the model."),
        "train_on_inputs": case({False: as_here(ANSWERS)}, none(ANSWERS)),
        "micro_batch_size": to("per_device_train_batch_size"),
        "batch_size": none("Write gradient_accumulation_steps."),
        "eval_batch_size": to("per_device_eval_batch_size"),
        "num_epochs": to("num_train_epochs"),
        "lr_scheduler": to("lr_scheduler_type"),
        "cosine_min_lr_ratio": sets({
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "{value}"},
        }),
        "bf16": case(
            {False: to("bf16")},
            sets({"bf16": "{value}", "dtype": "bfloat16"}, "The weights are bfloat16, too, as axolotl loads them."),
        ),
        "bfloat16": when(sets({"dtype": "bfloat16"})),
        "float32": when(sets({"dtype": "float32"})),
        "xformers_attention": when(none(ATTENTION)),
        "flash_attention": when(FLASH),
        "sdp_attention": when(sets({"attn_implementation": "sdpa"})),
        "flex_attention": when(sets({"attn_implementation": "flex_attention"})),
        "eager_attention": when(none(ATTENTION)),
        "evals_per_epoch": case({0: as_here()}, Rule(
            kind="changed", note="A share of all steps.", key="eval_steps", value=share_of_steps,
            sets={"eval_strategy": "steps"},
        )),
        "saves_per_epoch": case({0: as_here()}, Rule(
            kind="changed", note="A share of all steps.", key="save_steps", value=share_of_steps,
            sets={"save_strategy": "steps"},
        )),
        "wandb_project": sets({"report_to": "wandb"}, "Set the environment variable WANDB_PROJECT to it."),
        "wandb_entity": none("Set the environment variable WANDB_ENTITY."),
        "wandb_watch": none("Set the environment variable WANDB_WATCH."),
        "wandb_log_model": none("Set the environment variable WANDB_LOG_MODEL."),
        "wandb_name": to("run_name"),
        "wandb_run_id": none("Set the environment variable WANDB_RUN_ID."),
        "use_tensorboard": when(sets({"report_to": "tensorboard"})),
        "hub_model_id": sets({"hub_model_id": "{value}", "push_to_hub": True}),
        "early_stopping_patience": none("A run ends with its steps."),
        "loss_watchdog_threshold": none("A loss that is not finite ends a run."),
        "eval_table_size": none("Predictions stand in the run's folder."),
        "unfrozen_parameters": none("All parameters train; galore.embeddings can freeze the embeddings."),
        "rl": none(PREFERENCES),
        "plugins": none("Integrations of axolotl are not loaded."),
        "debug": when(none("galore-ft takes the flag --debug.")),
        "gptq": when(none(QUANTIZED)),
        **{f"liger_{name}": when(sets({"use_liger_kernel": True}, "All of Liger's kernels."))
           for name in ("rope", "rms_norm", "glu_activation", "fused_linear_cross_entropy", "layer_norm")},
    },
)  # fmt: skip

TRL = Tool(
    name="TRL",
    typical=("model_name_or_path", "dataset_name", "dataset_train_split", "max_length", "use_peft"),
    defaults={
        "method": "adamw", "learning_rate": 2e-5, "max_length": 1024, "gradient_checkpointing": True, "bf16": "auto",
    },
    galore_defaults=GALORE_OF_TRANSFORMERS,
    lora_defaults={"lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05},
    rules={
        **TRAINING,
        "use_peft": when(sets({"method": "lora"})),
        "use_dora": when(sets({"method": "dora"})),
        "lora_r": to("lora.rank"),
        "lora_alpha": to("lora.alpha"),
        "lora_dropout": to("lora.dropout"),
        "lora_target_modules": to("lora.target_modules", value=modules),
        "lora_modules_to_save": none("Adapters alone are trained."),
        "lora_target_parameters": none("Adapters are for linear layers."),
        **{name: none(QUANTIZED) for name in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage")},
        "use_bnb_nested_quant": when(none(QUANTIZED)),
        "ignore_bias_buffers": case({False: as_here()}, none("For DDP with buffers of booleans.")),
        "lora_task_type": case({"CAUSAL_LM": as_here()}, none("Only causal language models.")),
        "use_rslora": to("lora.use_rslora"),
        "dataset_name": to("data.source", value=source),
        "dataset_config": to("data.subset"),
        "dataset_train_split": to("data.split"),
        "dataset_test_split": to("data.eval_split"),
        "dataset_streaming": when(none("All rows are read before training.")),
        **TRL_DATA,
        "dataset_mixture.seed": to("data.split_seed"),
        "dataset_mixture.test_split_size": to("data.eval_samples", value=held_out),
        "dataset_mixer": to("data.sources", "Its shares of single data sets are not kept: write weights.", mixer),
        "dataset_splits": none("Write data.split and data.eval_split."),
        "test_split_size": to("data.eval_samples", value=held_out),
        "max_length": to("max_length", LONGER),
        "max_seq_length": to("max_length", LONGER),
        "packing": PACKED,
        "packing_strategy": sets({"packing_strategy": "{value}", "trainer": "trl"}),
        "eval_packing": when(sets({"eval_packing": True, "trainer": "trl"}, TRL_TRAINER)),
        "padding_free": when(sets({"padding_free": True, "trainer": "trl"}, "TRL's trainer, with the extra [trl].")),
        "pad_to_multiple_of": sets({"pad_to_multiple_of": "{value}", "trainer": "trl"}),
        "loss_type": sets({"loss_type": "{value}", "trainer": "trl"}),
        "activation_offloading": when(sets({"activation_offloading": True, "trainer": "trl"})),
        "assistant_only_loss": case({True: sets({"data.train_on": "all"})}, by_hand(ANSWERS)),
        "completion_only_loss": case({True: as_here()}, none(ANSWERS)),
        "dataset_text_field": case({"text": as_here()}, to("data.columns", value=column("text"))),
        "dataset_num_proc": as_here(CACHE),
        "dataset_kwargs": none(CACHE),
        "truncation_mode": none(LONGER),
        "use_liger": to("use_liger_kernel", RENAMED),
        "chat_template": none(OWN_TEMPLATE),
        "chat_template_path": none(OWN_TEMPLATE),
        "eos_token": none("Save the tokenizer with that token beside the model."),
        "pad_token": none("Save the tokenizer with that token beside the model."),
        "use_flash_attention_2": when(FLASH),
        "model_init_kwargs": none("Write dtype, attn_implementation and trust_remote_code."),
        "beta": none(PREFERENCES),
    },
)  # fmt: skip

TRANSFORMERS = Tool(
    name="transformers",
    typical=("output_dir", "optim", "optim_args", "optim_target_modules", "per_device_train_batch_size"),
    defaults={"method": "adamw"},
    galore_defaults=GALORE_OF_TRANSFORMERS,
    lora_defaults={},
    rules={
        **TRAINING,
        "dataset_config_name": to("data.subset"),
        "train_file": to("data.source", ROWS, source),
        "validation_file": to("data.eval_source", ROWS, source),
        "block_size": to("max_length", LONGER),
        "max_train_samples": to("data.train_samples"),
        "max_eval_samples": to("data.eval_samples"),
        "tokenizer_name": none("The model's own tokenizer is used."),
        "use_fast_tokenizer": as_here(),
    },
)

TOOLS = (LLAMA_FACTORY, AXOLOTL, TRL, TRANSFORMERS)
FOREIGN = {key for table, _ in REFUSED for key in table}.union(*(tool.typical for tool in TOOLS[:-1]))
"""Keys that most files of other programs have; some of them are ours, too."""


def marks(tool: Tool) -> set[str]:
    """Keys at the top of a file that this program alone has; for transformers all of its table."""
    tops = {t.name: {key.partition(".")[0] for key in t.rules} for t in TOOLS}
    return tops[tool.name].difference(*(tops[t.name] for t in TOOLS if tool is not TRANSFORMERS and t is not tool))


def recognise(data: Mapping[str, Any], known: Collection[str], least: int = 1) -> Tool | None:
    """The program whose file this is: the one that most keys belong to alone; None where no key does.

    Args:
        data: a file's content.
        known: the keys of this project, which say nothing.
        least: keys that must belong to it.
    """
    counts = {tool.name: len((marks(tool) & data.keys()).difference(known)) for tool in TOOLS}
    best = max(TOOLS[:-1], key=lambda tool: counts[tool.name])
    if not counts[best.name]:
        best = TRANSFORMERS
    return best if counts[best.name] >= least else None
