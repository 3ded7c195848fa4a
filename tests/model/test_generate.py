"""Answers while training, which the checkpoint's own generation settings must not change."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from spo_ray.config.train import TrainConfig
from spo_ray.model.load import load_model
from spo_ray.train.distributed import Distributed
from spo_ray.train.generation import EntropyRecorder, generate_answers
from spo_ray.train.logp_eval import Measure

RANK = Distributed(0, 1, torch.device("cpu"))


def answers(model, chat):
    prompts = [chat.prompt_ids("Ada owns 3 toys and finds 4 more."), chat.prompt_ids("How many?")]
    measure = Measure(model, chat, TrainConfig(), RANK)
    torch.manual_seed(0)
    return [generate_answers(measure, prompts, 48, entropy) for entropy in (None, EntropyRecorder())]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoints_own_settings_change_no_answer_and_are_kept_for_the_export(adapted, toy_base, chat):
    model = load_model(toy_base).eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    base = model.get_base_model() if adapted else model
    expected = answers(model, chat)
    own = {"repetition_penalty": 1.3, "top_p": 0.5, "top_k": 2, "do_sample": True}
    base.generation_config.update(**own)
    assert answers(model, chat) == expected
    assert base.generation_config.to_dict().items() >= own.items()
