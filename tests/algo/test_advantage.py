from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_t1.algo.advantage import assign, grpo, leave_one_out
from megatron_t1.types import Group, Prompt, Reward, Sample


def test_is_the_reward_minus_the_mean_of_the_others():
    rewards = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 64)
    by_hand = [rewards[i] - np.delete(rewards, i).mean() for i in range(64)]
    np.testing.assert_allclose(leave_one_out(rewards), by_hand, atol=1e-15)


def test_equal_rewards_teach_nothing_and_the_sum_is_zero():
    assert not leave_one_out(np.ones(8)).any()
    assert abs(leave_one_out(np.array([1.0, 0, -1, 1])).sum()) < 1e-15


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, -1, 1], [0.0, 1.0], [1.0, 1, 1], [-1.0]])
def test_grpo_is_torch_s_standard_score(rewards: list[float]) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-6) if len(rewards) > 1 else torch.zeros(1)
    np.testing.assert_allclose(grpo(np.array(rewards)), expected.numpy(), atol=1e-12)


def test_an_ungraded_sample_is_refused():
    prompt = Prompt(id="q", text="", token_ids=np.array([1]), gold="1")
    sample = Sample(
        token_ids=np.array([1]), logprobs=np.zeros(1, np.float32), text="", finish_reason="stop",
        weight_versions=((0, 0, 1),), server="",
    )  # fmt: skip
    with pytest.raises(ValueError, match="prompt q: a sample has no reward"):
        assign([Group(prompt=prompt, samples=[sample])])
    sample.reward = Reward(value=1.0, correct=True, outcome="correct", extracted="1", reason="")
    assert assign([Group(prompt=prompt, samples=[sample])])[0].samples[0].advantage == 1.0
