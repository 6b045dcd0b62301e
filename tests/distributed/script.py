"""Trains a tiny model under one backend: ``script.py BACKEND MODEL OUTPUT SETTINGS [CHECKPOINT ...]``, under torchrun.

SETTINGS are GaLoreConfig's, in JSON, and five more: ``bf16``, ``eps`` and ``accumulation`` for the Trainer, ``adamw``
for PyTorch's AdamW instead, at this learning rate, ``attach`` for a Seq2SeqTrainer that exists, in the place of the
plugin. Two GPUs are used where there are two. On CPUs DeepSpeed needs no
compiler (its shared-memory operation is declared missing) and accelerate needs to be told that FSDP may run there: both
are for tests alone.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, set_seed

from galore_trainer import GaLoreConfig, attach, galore_plugin, import_state
from galore_trainer.hf.callback import unwrap_optimizer

ON_GPU = torch.cuda.device_count() >= 2
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
ROWS, LENGTH, SAVE_AT = 48, 12, 3
BATCH = 8  # sequences of a step, over all processes and micro-batches


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 takes FSDP for a thing of accelerators: it would train under DDP without a word."""
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    init = state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None:
            for known in (state.AcceleratorState, state.PartialState):
                known._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self._shared_state["fsdp_plugin"] = plugin

    state.AcceleratorState.__init__ = patched  # type: ignore[method-assign]


def backend_arguments(backend: str) -> dict[str, Any]:
    """What TrainingArguments need for a backend."""
    if backend == "fsdp2":
        if not ON_GPU:
            allow_fsdp_on_cpu()
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    if backend.startswith("zero"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return {
            "deepspeed": {
                "zero_optimization": {"stage": int(backend[4])},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": "auto"},
            }
        }
    return {}


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The model's weights, gathered."""
    found = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return found


def make_trainer(backend: str, model_dir: str, output: str, options: dict[str, Any]) -> Trainer:
    """Six steps of two micro-batches, three refreshes, which move weights by some 0.05; saves after the third step."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (ROWS, LENGTH), generator=generator).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]
    set_seed(3)
    # The residual's entries near zero are normalised by their own size: with the usual 1e-8 the order of a sum decides
    # their sign (1e-4 seen in one entry of a matrix, under DDP too).
    options = dict(options)
    bf16, adamw, by_attach = options.pop("bf16", False), options.pop("adamw", None), options.pop("attach", False)
    eps, accumulation = options.pop("eps", 1e-5), options.pop("accumulation", 2)
    args = Seq2SeqTrainingArguments(
        output,
        max_steps=6,
        per_device_train_batch_size=BATCH // WORLD // accumulation,
        max_grad_norm=0.0 if "max_grad_norm" in options else 0.5,
        gradient_accumulation_steps=accumulation,
        learning_rate=adamw or 2e-3,
        weight_decay=0.1,
        adam_epsilon=eps,
        use_cpu=not ON_GPU,
        bf16=bf16,
        save_strategy="steps",
        save_steps=SAVE_AT,
        report_to="none",
        disable_tqdm=True,
        seed=3,
        logging_steps=1,
        **backend_arguments(backend),
    )
    usual = {"rank": 4, "update_proj_gap": 2, "residual": "both", "residual_warmup_steps": 2, "proj_type": "right"}
    if options.get("layerwise"):
        usual["residual"] = "sparse"
    config = GaLoreConfig(**{**usual, **options})
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if by_attach:
        return attach(Seq2SeqTrainer(model, args, train_dataset=rows), config)
    return Trainer(model, args, train_dataset=rows, **({} if adamw else galore_plugin(config, args)))


def train(backend: str, model_dir: str, output: str, options: dict[str, Any], resume: str | None) -> dict[str, Any]:
    """Train to the end; a whole checkpoint is imported first where the backend cuts weights."""
    if resume and backend not in ("single", "ddp") and os.path.isfile(f"{resume}/optimizer.pt"):
        resume = str(import_state(make_trainer(backend, model_dir, f"{output}/imported", options), resume))
    trainer = make_trainer(backend, model_dir, output, options)
    trainer.train(resume_from_checkpoint=resume)
    if "adamw" in options:
        return {"weights": whole_weights(trainer)}
    optimizer = unwrap_optimizer(trainer.optimizer)
    local = sum(p.numel() for _, p in optimizer.projected_weights())
    whole = sum(
        shape.numel() for g in optimizer.param_groups if g["projected"] for shape in optimizer.placement.shapes(g)
    )
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    return {"weights": whole_weights(trainer), "norms": norms, "share": local / whole}


def main() -> None:
    """Train, resume what was saved, write both outcomes; or go on from checkpoints."""
    backend, model_dir, output, options = sys.argv[1:5]
    resume = {f"{output}/{i}": checkpoint for i, checkpoint in enumerate(sys.argv[5:])}
    jobs = resume or {output: None, f"{output}/again": f"{output}/checkpoint-3"}
    found = [train(backend, model_dir, folder, json.loads(options), source) for folder, source in jobs.items()]
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still receives
        torch.distributed.destroy_process_group()
    if RANK == 0:
        torch.save(found, f"{output}/found.pt")


if __name__ == "__main__":
    main()
