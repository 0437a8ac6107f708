"""Every causal-LM type of the installed transformers, tiny and random: right, refused or untested.

`python tools/scan_models.py [TYPE...]` prints a line per type and fails if one is wrong or crashes; `--write` writes the table of
docs/models.md. A type is right if policy and local engine agree with transformers' own eager forward of each sequence alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from srpo.core.batch import Rollout, pack
from srpo.core.errors import UserError
from srpo.policy.forward import context_of
from srpo.policy.model import Policy, load_policy
from srpo.policy.shrink import FAILURES, small_configs
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START = "<!-- written by tools/scan_models.py -->\n"
LENGTHS = ((5, 4), (9, 16), (3, 8))  # prompt and response of three sequences; the second passes the bounds of a small config
# Settings that every checkpoint of the type has, and its default config has not.
GIVEN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
}
BOUND = 1e-4  # nats, of log-probabilities in fp32


@dataclass(frozen=True)
class Finding:
    """The result of the scan for one model type. `policy`: right, refused, untested or WRONG; `engine` too, or empty."""

    policy: str
    engine: str = ""
    why: str = ""

    @property
    def is_fault(self) -> bool:
        return "WRONG" in (self.policy, self.engine)


def scan(model_type: str) -> Finding:
    """Save a small model of the type's default config, load it, and compare."""
    try:
        config = transformers.CONFIG_MAPPING[model_type](**GIVEN.get(model_type, {}))
        if config.get_text_config() is not config:
            return _refused(config) or Finding("WRONG", why="a config of several models is taken")
        made = next((found for small in small_configs(config) if (found := _make(small)) is not None), None)
    except FAILURES as error:
        return Finding("untested", why=f"its default config: {_line(error)}")
    if made is None:
        return _refused(config) or Finding("untested", why="transformers cannot run a small copy of its default config")
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return _compare(made, Path(folder))


def _refused(config: PreTrainedConfig) -> Finding | None:
    """The refusal of a folder that has this config alone; None if it is refused for that."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            load_policy(folder)
        except UserError as error:
            return (
                None
                if "no weights" in str(error) or "transformers cannot" in str(error)
                else Finding("refused", why=_reason(error))
            )
    return Finding("WRONG", why="a folder without weights was loaded")


def _make(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A random model in fp32 with weights large enough to show a mistake; None if transformers cannot run it."""
    torch.manual_seed(1)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.ndim >= 2:
                    param.copy_(torch.randn_like(param) * 0.8 / param.shape[-1] ** 0.5)
                elif "norm" not in name:
                    param.copy_(torch.randn_like(param) * (2 if "sink" in name else 0.5))
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except FAILURES:
        return None
    return model


def _compare(theirs: PreTrainedModel, folder: Path) -> Finding:
    try:
        loaded = load_policy(folder)
    except UserError as error:
        return Finding("refused", why=_reason(error))
    except FAILURES as error:
        return Finding("WRONG", why=f"crash at load: {_line(error)}")
    rollouts = _rollouts(context_of(loaded.config), loaded.config.vocab_size)
    try:
        engine, why = LocalEngine(loaded), ""
    except UserError as error:
        engine, why = None, _reason(error)
    policy = _largest(_policy_logprobs(loaded, rollouts), [_logprobs(theirs, r.prompt_ids, r.response_ids) for r in rollouts])
    if engine is None:
        return Finding(_word(policy), "refused", why)
    samples = engine.generate(
        [r.prompt_ids for r in rollouts], SamplingParams(len(rollouts[0].response_ids), 1.0, 0, group_size=2), seed=3
    )
    sampled = [
        _logprobs(theirs, rollouts[s.prompt_index].prompt_ids, s.response_ids)
        .gather(1, torch.tensor(s.response_ids)[:, None])
        .squeeze(1)
        for s in samples
    ]
    of_engine = _largest([torch.tensor(s.sampling_logprobs) for s in samples], sampled)
    return Finding(_word(policy), _word(of_engine), "" if max(policy, of_engine) <= BOUND else f"{policy:.1e}, {of_engine:.1e}")


def _rollouts(context: int, vocab_size: int) -> list[Rollout]:
    drawn = []
    for prompt, response in LENGTHS:
        response = max(1, min(response, context - prompt))
        ids = torch.randint(3, vocab_size, (prompt + response,)).tolist()
        drawn.append(Rollout.from_tokens(ids[:prompt], ids[prompt:]))
    return drawn


@torch.no_grad()
def _policy_logprobs(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    (batch,) = pack(list(rollouts), torch.zeros(len(rollouts), 1), torch.ones(len(rollouts)))
    logits = Policy(model, activation_checkpointing=model.supports_gradient_checkpointing)(batch)
    return list(logits.log_softmax(-1).split([len(r.response_ids) for r in rollouts]))


@torch.no_grad()
def _logprobs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[L, V] of a response, in transformers' eager forward of its sequence alone."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def _largest(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in zip(ours, theirs, strict=True))


def _word(distance: float) -> str:
    return "right" if distance <= BOUND else "WRONG"


def _reason(error: UserError) -> str:
    """The reason in a refusal, without folder, type and remedy."""
    text = str(error)
    for start in ("are not supported: ", "which is "):
        text = text.partition(start)[2] or text
    for end in (". Give a", ". Set the", ": save its"):
        text = text.partition(end)[0]
    return " ".join(text.split())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def table(findings: dict[str, Finding]) -> str:
    """The table of docs/models.md."""
    counts = Counter(finding.policy for finding in findings.values())
    rows = [f"| `{name}` | {f.policy} | {f.engine} | {f.why.replace('|', '/')} |" for name, f in findings.items()]
    total = ", ".join(f"{counts[word]} {word}" for word in ("right", "refused", "untested", "WRONG") if counts[word])
    head = [f"transformers {transformers.__version__}, {len(findings)} types: {total}.", ""]
    return "\n".join([*head, "| type | trainer | local engine | why not |", "|---|---|---|---|", *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    args = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    findings: dict[str, Finding] = {}
    for name in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        findings[name] = finding = scan(name)
        print(f"{name:24} {finding.policy:9} {finding.engine:9} {finding.why}", flush=True)
    if args.write:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n" + table(findings), encoding="utf-8")
    return int(any(finding.is_fault for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(main())
