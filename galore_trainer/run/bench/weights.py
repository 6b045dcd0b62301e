"""What is timed: a Llama's linear weights alone, or a whole Llama, and each method's optimizer on them."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 256},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
                 "vocab_size": 32000},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip
PEERS = {
    "adamw_8bit": "bitsandbytes",
    "adamw_8bit_paged": "bitsandbytes",
    "adamw_8bit_torchao": "torchao",
    "galore_torch": "galore_torch",
    "lora": "peft",
    "dora": "peft",
}
NEED_A_GPU = ("adamw_8bit", "adamw_8bit_paged", "adamw_8bit_torchao")
LR = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time.

    Attributes:
        shape: of ``SHAPES``.
        layers: of the step and of the refresh; ``model_layers`` those of the model that trains.
        rank: of GaLore+ and galore-torch; adapters have ``lora_rank``.
        residual_percent: of the rows with a residual.
        dtype: of weights and gradients.
        batch_size, length: of a training step.
        gap: steps over which a refresh is spread in per-step costs.
        short_gap: of the runs whose refreshes are staggered, and together.
        rounds: how often each method is timed.
        steps: of each of these runs.
        kernels: as in ``GaLoreConfig``.
        device: ``cuda`` or ``cpu``.
        profile: list the kernels of our steps, on a GPU.
    """

    shape: str = "llama-7b"
    layers: int = 16
    model_layers: int = 8
    rank: int = 128
    lora_rank: int = 32
    residual_percent: float = 1.2
    dtype: str = "bfloat16"
    batch_size: int = 8
    length: int = 512
    gap: int = 200
    short_gap: int = 20
    rounds: int = 20
    steps: int = 200
    kernels: str = "auto"
    device: str = "cuda"
    profile: bool = False

    @property
    def torch_device(self) -> torch.device:
        """The device that is timed."""
        return torch.device(self.device)

    def scaled(self, rank: int) -> int:
        """A rank of a large model, in a tiny one a small rank in its place."""
        return max(1, rank // 64) if self.shape == "tiny" else rank

    def config(self, **settings: Any) -> GaLoreConfig:
        """GaLore+ at this rank; no refresh after the first step unless ``update_proj_gap`` says so."""
        usual = {"rank": self.rank, "residual_percent": 0.0, "update_proj_gap": 1 << 30, "kernels": self.kernels}
        return GaLoreConfig(**{**usual, **settings})


def missing_peers(bench: Bench) -> dict[str, str]:
    """Methods that cannot be timed here, and why."""
    missing = {
        m: f"{package} is not installed" for m, package in PEERS.items() if not importlib.util.find_spec(package)
    }
    return missing if bench.device == "cuda" else {**missing, **dict.fromkeys(NEED_A_GPU, "it needs a GPU")}


def make_model(bench: Bench, layers: int, *, vocabulary: int | None = None) -> PreTrainedModel:
    """A Llama with random weights on the device, with gradient checkpointing."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"tie_word_embeddings": False, **SHAPES[bench.shape], "num_hidden_layers": layers, "use_cache": False}
    if vocabulary is not None:
        shape["vocab_size"] = vocabulary
    torch.manual_seed(0)
    with torch.device(bench.torch_device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=getattr(torch, bench.dtype)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def linear_weights(bench: Bench) -> nn.Module:
    """The layers of a Llama with hardly a vocabulary, and random gradients of a usual size on its matrices."""
    model = make_model(bench, bench.layers, vocabulary=32)
    for name, p in model.named_parameters():
        if p.dim() == 2 and ".layers." in name:
            p.grad = torch.randn_like(p).mul_(1e-3)
        else:
            p.requires_grad_(False)
    return model


def galore_plus(bench: Bench, model: nn.Module, **settings: Any) -> GaLoreAdamW:
    """Our optimizer on a model."""
    from galore_trainer.hf.build import galore_groups

    config = bench.config(**settings)
    return GaLoreAdamW(galore_groups(model, config, lr=LR, weight_decay=0.0), config, lr=LR)


def least_bytes(optimizer: GaLoreAdamW) -> int:
    """What a step cannot avoid: weights and moments read and written, gradients and bases read."""
    state = optimizer.state_bytes()
    weights = sum(3 * p.numel() * p.element_size() for _, p in optimizer.projected_weights())
    return weights + 2 * state["moments"] + state["basis"]


def peer(bench: Bench, method: str, model: nn.Module) -> torch.optim.Optimizer:
    """Another method's optimizer on the parameters of a model that want gradients."""
    params = [p for p in model.parameters() if p.requires_grad]
    if method in ("adamw_8bit", "adamw_8bit_paged"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        return (PagedAdamW8bit if method == "adamw_8bit_paged" else AdamW8bit)(params, lr=LR)
    if method == "adamw_8bit_torchao":
        from torchao.optim import AdamW8bit as CompiledAdamW8bit

        return CompiledAdamW8bit(params, lr=LR)
    if method == "galore_torch":
        from galore_trainer.run.training.packages import PackageFactory

        config = bench.config(head_sharing="joint", svd="exact", momentum_transfer="keep", kernels="torch")
        settings: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
        return PackageFactory()(model, method=method, config=config, **settings)
    return torch.optim.AdamW(params, lr=LR, fused=True)


def with_adapters(bench: Bench, model: Any, *, dora: bool) -> Any:
    """The model with LoRA or DoRA on all linear layers, as peft makes them."""
    from galore_trainer.run.models.adapters import add_adapters
    from galore_trainer.run.settings.methods import LoraSettings

    model.enable_input_require_grads()
    return add_adapters(model, LoraSettings(rank=bench.lora_rank, alpha=2 * bench.lora_rank), seed=0, dora=dora)


class CopiedSvd:
    """Computes torch's SVD once for each shape and returns copies of it: use it only before what is timed."""

    def __enter__(self) -> None:
        """Put the copying function in the place of torch's."""
        self._svd, copies = torch.linalg.svd, dict[Any, Any]()

        def copied(matrix: torch.Tensor, **options: Any) -> Any:
            if matrix.shape not in copies:
                copies[matrix.shape] = self._svd(matrix, **options)
            return copies[matrix.shape]

        torch.linalg.svd = copied

    def __exit__(self, *_: object) -> None:
        """Put torch's back."""
        torch.linalg.svd = self._svd
