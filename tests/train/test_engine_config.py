"""The JSON DeepSpeed is given."""

import pytest

from cairn.config.train import EngineSection
from cairn.errors import UserError
from cairn.train.engine_config import deepspeed_config, effective_stage


def test_user_json_is_merged_key_by_key() -> None:
    section = EngineSection(
        zero_stage=3,
        precision="fp16",
        offload="all",
        deepspeed={
            "zero_optimization": {"reduce_bucket_size": 7, "offload_param": {"pin_memory": False}},
            "fp16": {"initial_scale_power": 4},
            "wall_clock_breakdown": True,
        },
    )
    config = deepspeed_config(section, 2, 0.25)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 4}
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_clipping"] == 0.25
    assert section.deepspeed["fp16"] == {"initial_scale_power": 4}


def test_no_timer_waits_for_the_device() -> None:
    from deepspeed.utils.config import get_timers_config

    assert not get_timers_config(deepspeed_config(EngineSection(), 1, 1.0)).enabled


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, "engine.deepspeed.optimizer .* set optim instead"),
        ({"train_batch_size": 8}, "set train.global_batch_size instead"),
        ({"fp16": {"enabled": True}}, "engine.deepspeed.fp16.enabled .* set engine.precision"),
        ({"zero_optimization": {"stage": 2}}, "set engine.zero_stage"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "engine.deepspeed.data_types cannot be set"),
    ],
)
def test_a_key_that_contradicts_ours_is_named_with_its_remedy(extra: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        deepspeed_config(EngineSection(deepspeed=extra), 1, 1.0)


def test_offload_needs_a_stage() -> None:
    with pytest.raises(UserError, match=r"engine\.offload=optimizer needs engine\.zero_stage"):
        deepspeed_config(EngineSection(zero_stage=0, offload="optimizer"), 1, 1.0)


def test_stage_0_is_deepspeeds_own_in_fp32_only() -> None:
    assert effective_stage(EngineSection(zero_stage=0, precision="fp32")) == 0
    assert effective_stage(EngineSection(zero_stage=0, precision="bf16")) == 1
    assert effective_stage(EngineSection(zero_stage=3, precision="bf16")) == 3
