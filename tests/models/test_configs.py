"""Every shipped config builds, and is the size it says."""

from pathlib import Path

import pytest
import yaml

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.models.build import count_parameters, flops_per_token

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
PARAMETERS = {
    "bench-8x512": 29_676_544,
    "bench-bert-8x512": 30_016_514,
    "bert-base": 110_106_428,  # as BertForPreTraining
    "bert-books": 8_455_168,
    "bert-large": 336_226_108,  # as BertForPreTraining
    "bert-tiny": 4_378_114,
    "gpt-1.3b": 1_315_819_520,
    "gpt-1.3b-fp8": 1_315_819_520,
    "gpt-books": 16_908_288,
    "gpt-tiny": 5_242_880,
    "gpt-tiny-classic": 4_273_664,
    "gpt2-124m": 124_475_904,  # GPT-2's 124,439,808 and 47 rows of padding
    "llama-1b": 1_235_814_400,  # Llama-3.2-1B
    "seq2seq-tiny": 6_558_208,
}


def files() -> dict[str, Path]:
    """Configs that are runs: those that no other extends only to share a recipe."""
    found = {path.stem: path for path in FOLDER.glob("*.yaml")}
    recipes = {yaml.safe_load(path.read_text()).get("extends", "").removesuffix(".yaml") for path in found.values()}
    return {name: path for name, path in found.items() if name in PARAMETERS or name not in recipes}


@pytest.mark.parametrize("name", files())
def test_config_has_its_parameters(name: str) -> None:
    config = load(PretrainConfig, files()[name], [])
    # Sizes are those of the config itself, so any tokenizer that fits gives the same.
    assert count_parameters(config.model, 300) == PARAMETERS[name]


def test_flops_are_near_six_per_parameter() -> None:
    config = load(PretrainConfig, FOLDER / "gpt-1.3b.yaml", [])
    per_token = flops_per_token(config.model, 50257, config.seq_len)
    assert 6 * 1.31e9 < per_token < 1.15 * 6 * 1.31e9
