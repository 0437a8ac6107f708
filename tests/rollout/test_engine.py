from __future__ import annotations

import pytest

from srpo.rollout.engine import SamplingParams, check_prompts


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", 0.0), ("temperature", -1.0), ("top_k", -1), ("group_size", 0)]
)
def test_params_name_the_setting_to_change(field, value):
    with pytest.raises(ValueError, match=rf"rollout\.{field} is {value}"):
        SamplingParams(**{field: value})


def test_check_prompts_names_the_example():
    params = SamplingParams(max_new_tokens=10)
    check_prompts([(1,) * 20], params, 30, ["a"])
    with pytest.raises(ValueError, match=r"the prompt of b has 21 tokens.*context of 30.*policy\.max_context"):
        check_prompts([(1,), (1,) * 21], params, 30, ["a", "b"])
    with pytest.raises(ValueError, match=r"the prompt of a is empty"):
        check_prompts([()], params, 30, ["a"])
