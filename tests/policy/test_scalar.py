"""srpo.policy.scalar: the rows that scores are read from, the loss, and the saved files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import log_loss
from transformers import AutoModelForCausalLM

from srpo.core.errors import UserError
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import load_policy
from srpo.policy.scalar import HEAD_FILE, ScalarModel, load_scalar, probabilities, save_scalar, scalar_loss, scored_batches

EOS = 0
NOTHING = torch.zeros(1, 3)


@pytest.fixture
def model(world: Any) -> ScalarModel:
    """A model with a random head."""
    scalar = ScalarModel(load_policy(world.base))
    head: Any = scalar.model.scalar_head
    torch.nn.init.normal_(head.weight, std=0.5)
    return scalar


def head_file(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Writes other tensors into the file of a head."""
    return lambda file: save_file(load_file(file) | tensors, file)


def random_case(rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    prompt, response = ([rng.randrange(5, 600) for _ in range(rng.randrange(1, 12))] for _ in range(2))
    ends = sorted(rng.randrange(1, len(response) + 1) for _ in range(2))
    return prompt, response, [*ends, len(response)]


def test_scores_are_those_of_the_last_token_of_each_step(model: ScalarModel) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    cases = [random_case(rng) for _ in range(6)]
    with torch.no_grad():
        packed = probabilities(model, scored_batches(cases, torch.zeros(6, 3), EOS, 40))
        assert packed.shape == (6, 3)
        for (prompt, response, ends), row in zip(cases, packed, strict=True):
            for end, p in zip(ends, row, strict=True):
                ids = [*prompt, *response[:end]]  # the score must not depend on tokens after the step
                alone = scored_batches([(ids[:1], ids[1:], [len(ids) - 1] * 3)], NOTHING, EOS, 40)
                assert float(p) == pytest.approx(float(probabilities(model, alone)[0, 0]), abs=1e-5), seed
    assert len({round(float(p), 4) for p in packed.flatten()}) > 6


def test_the_loss_is_the_cross_entropy_of_the_verdicts_given() -> None:
    logits = torch.randn(50, 3)
    signs = torch.randint(-1, 2, (50, 3)).float()
    num = int(signs.abs().sum())
    given = signs != 0
    expected = log_loss((signs[given] > 0).numpy(), logits[given].double().sigmoid().numpy(), labels=[False, True])
    assert float(scalar_loss(logits, signs / num)) == pytest.approx(expected, rel=1e-5)


def test_an_untrained_head_knows_nothing_and_a_missing_one_is_named(world: Any, tmp_path: Path) -> None:
    (p,) = probabilities(ScalarModel(load_policy(world.base)), scored_batches([([5], [6, 7], [1, 1, 2])], NOTHING, EOS, 40))
    assert p.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=rf"no {HEAD_FILE} in .*--kind scalar"):
        load_scalar(world.policy)


def test_the_files_hold_the_model_and_leave_a_whole_causal_model(model: ScalarModel, world: Any, tmp_path: Path) -> None:
    save_scalar(model, load_tokenizer(world.base), tmp_path / "scalar")
    loaded = load_scalar(tmp_path / "scalar")
    batches = scored_batches([([5, 6], [7, 8, 9], [1, 2, 3])], NOTHING, EOS, 40)
    assert torch.equal(probabilities(model, batches), probabilities(loaded, batches))
    assert small.same_bits(small.parameters_of(tmp_path / "scalar"), small.parameters_of(world.base))
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "scalar", output_loading_info=True)
    _, info = loading
    assert not info["unexpected_keys"] and not info["missing_keys"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(b"broken"), "header"),
        (lambda file: save_file({"weight": torch.ones(1, 32)}, file), "it has the tensors weight, and not bias, weight"),
        (head_file(weight=torch.ones(1, 7)), r"weight is \(1, 7\) in place of \(1, \d+\)"),
        (head_file(bias=torch.ones(1, dtype=torch.int32)), "bias is stored as int32"),
        (head_file(bias=torch.full((1,), torch.nan)), "bias is not all finite"),
        (head_file(bias=torch.full((1,), torch.inf)), "bias is not all finite"),
    ],
)
def test_a_head_that_does_not_fit_is_one_sentence(
    damage: Callable[[Path], Any], reason: str, model: ScalarModel, world: Any, tmp_path: Path
) -> None:
    save_scalar(model, load_tokenizer(world.base), tmp_path)
    damage(tmp_path / HEAD_FILE)
    with pytest.raises(UserError, match=rf"{HEAD_FILE} does not fit the model .*{reason}.*: train the judge again") as refused:
        load_scalar(tmp_path)
    assert "\n" not in str(refused.value)
