"""Packaged configurations that name a card: their models' shapes, their plan, and whether they have room there.

No weights are loaded and nothing is downloaded. Peaks of all layers are recorded in results/fit; each is compared here
with that of one and two layers, as every layer takes the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

import fit
from galore_trainer.optim import plain
from galore_trainer.optim.param_groups import scale_of
from galore_trainer.run.memory.estimate import empty_model
from galore_trainer.run.settings.run_config import load_run_config, packaged_configs
from galore_trainer.targets.groups import plan_weights
from studies import studies

NAMES = list(fit.cards())
PEAKS = {row["configuration"]: row["peak"] for row in fit.predicted_configurations()}
PUBLISHED = {  # parameters that the hub counts, embeddings and output layer once where they are tied
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
}
EMBEDDINGS = {kind: [("model.embed_tokens.weight", kind), ("lm_head.weight", kind)] for kind in ("plain", "frozen")}


def test_they_cover_one_to_fourteen_billion_parameters_on_16_to_80_gb() -> None:
    assert set(fit.cards().values()) == set(fit.CARDS)
    assert {load_run_config(name).model_name_or_path for name in NAMES} == set(PUBLISHED)
    assert list(PEAKS) == NAMES, "run `make figures`"


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_of_every_layer_is_projected_at_its_rank_and_scale(name: str) -> None:
    with fit.shaped(name) as config:
        model = empty_model(config)
    weights = plan_weights(model, config.galore)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[load_run_config(name).model_name_or_path]
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", weight.name), weight.kind) for weight in weights)
    layers = model.config.num_hidden_layers
    for leaf in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        assert kinds[f"model.layers.*.{leaf}_proj.weight", "projected"] == layers
    embeddings = [n for kind, n in kinds.items() if kind in EMBEDDINGS[config.galore.embeddings]]
    assert len(embeddings) == (1 if model.config.tie_word_embeddings else 2)
    for weight in weights:
        for matrix in weight.matrices:
            kept = model.get_parameter(weight.name).shape[1 if matrix.side == "right" else 0]
            assert matrix.rank == config.galore.rank
            assert scale_of({}, config.galore, matrix) == pytest.approx(math.sqrt(kept / matrix.rank))


@pytest.mark.parametrize("name", NAMES)
def test_it_has_room_on_its_card_and_says_how_much_it_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = packaged_configs()[name]
    assert fit.fits(PEAKS[name], fit.cards()[name])
    assert f"Predicted peak {PEAKS[name] / 2**30:.1f} GiB" in text
    assert "not run on real weights" in text
    assert f"galore-ft train {name} " in text
    assert f"galore-ft ablate rates base={name} " in text
    monkeypatch.setattr(plain, "CHUNK", 1 << 25)  # fewer fake operations; the peak is in backward
    one, two = fit.predict_configuration(name, 1), fit.predict_configuration(name, 2)
    layers = fit.SHAPES[load_run_config(name).model_name_or_path]["num_hidden_layers"]
    # whole numbers of weights are due for a refresh in layer-wise mode; other versions of torch allocate a little more
    assert one + (layers - 1) * (two - one) == pytest.approx(PEAKS[name], rel=0.02)


def test_gsm8k_has_the_best_rate_of_each_method_that_the_study_ran() -> None:
    search = studies()["gsm8k_rates"]
    for method, cell in (("galore_plus", "GaLore+ r 32, scaled"), ("adamw", "AdamW"), ("lora", "LoRA r 32")):
        config = load_run_config("gsm8k", [], {"method": method})
        assert config.training["learning_rate"] == search.rate(cell)
