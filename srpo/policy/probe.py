"""Whether srpo computes a kind of model right, found out at load: on a small random copy with two layers made from its config.

Transformers passes attention and experts to srpo's functions. Anything that a family does beside them is unknown here: a state
that runs on into the next packed sequence, sinks, dropout, positions that depend on the neighbour. So the logits of the copy are
compared: right, or a `UserError` that names the model type and what differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from srpo.core.batch import Batch, Rollout, pack
from srpo.core.errors import UserError
from srpo.policy.attention import ATTENTION
from srpo.policy.decode import Decoder
from srpo.policy.experts import registered_name
from srpo.policy.folder import quiet
from srpo.policy.forward import context_of, for_head, hidden_states, make_deterministic
from srpo.policy.shrink import FAILURES, small_configs

TOLERANCE = 1e-4  # largest difference of two logits in fp32
_LENGTHS = (7, 26)  # of the two sequences; the second passes every bound of `small_configs`
_NUM_STEPS = 2  # of the local engine after its prefill
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # config keys for operations on the logits after the head
_LOGIT_SCALES = ("lm_head_multiplier", "output_multiplier")
_STATES = {"linear_attention", "conv", "mamba", "recurrent"}  # names in a config's layer_types
_VISIBLE = 1e-2  # least change of the copy's logits by other tokens before them
_verdicts: dict[tuple[str, str, bool], str | None] = {}  # of this process: why a config is refused


def check_family(config: PreTrainedConfig, *, experts: str = "grouped_mm", engine: bool = False) -> None:
    """Raise UserError if srpo does not compute models of this config right; with `engine`, if the local engine does not.

    Takes some 50 ms per config and process, whatever the size of the model.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    key = (json.dumps(fields, sort_keys=True, default=str), experts, engine)
    if key not in _verdicts:
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            _verdicts[key] = _verdict(config, "grouped_mm" if experts == "megablocks" else experts, engine)
    if (verdict := _verdicts[key]) is not None:
        remedy = "set the engine to 'vllm'" if engine else "give a model of another type (docs/models.md)"
        raise UserError(
            f"models of type {config.model_type!r} {'in the local engine ' if engine else ''}are not supported: {verdict}. "
            f"{remedy[0].upper()}{remedy[1:]}"
        )


def logit_operations(config: PreTrainedConfig) -> list[str]:
    """Config keys of the operations on the logits after the head."""
    after = [key for key in _LOGIT_CAPS if getattr(config, key, None) not in (None, 0)]
    return after + [key for key in _LOGIT_SCALES if getattr(config, key, None) not in (None, 1)]


def _verdict(config: PreTrainedConfig, experts: str, engine: bool) -> str | None:
    """The part of such a model that srpo does not compute; None if it computes all."""
    if after := logit_operations(config):
        return f"it changes its logits after the head ({', '.join(after)})"
    try:
        context_of(config)
    except UserError as error:
        return str(error)
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False) or _STATES & set(_layer_types(config)):
        return "it has a state beside its attention, which would run on from one packed sequence into the next"
    failure = "transformers cannot run it"
    for small in small_configs(config):
        try:
            theirs = _model(small, "eager", "eager")
            if not isinstance(getattr(theirs, "lm_head", None), nn.Module):
                return f"{type(theirs).__name__} has no lm_head"
            _randomize(theirs)
            sequences = _sequences(small)
            *alone, joined = [
                theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                for ids in (*sequences, [*sequences[0], *sequences[1]])
            ]
            if _distance(joined[-len(sequences[1]) :], alone[1]) < _VISIBLE:
                failure = "its logits hardly depend on earlier tokens, so a small copy of it shows nothing"
                continue
        except FAILURES as error:
            failure = f"transformers cannot run a small copy of it ({_line(error)})"
            continue
        try:
            ours = _model(small, ATTENTION, registered_name(experts))
            ours.load_state_dict(theirs.state_dict())
            return _engine_differs(ours, sequences) if engine else _policy_differs(ours, sequences, alone)
        except UserError as error:
            return str(error)
        except FAILURES as error:
            if isinstance(error, KeyError) and ATTENTION in str(error):
                return "its attention is not one of transformers' attention interface, where srpo puts its own"
            return f"srpo cannot run it ({_line(error)})"
    return failure


def _layer_types(config: PreTrainedConfig) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _policy_differs(model: PreTrainedModel, sequences: Sequence[Sequence[int]], alone: Sequence[torch.Tensor]) -> str | None:
    """A difference between the trainer's forward and transformers' eager one of each sequence alone, in words; or None."""
    make_deterministic(model, activation_checkpointing=model.supports_gradient_checkpointing)
    single = torch.cat([_logits(model, [ids]) for ids in sequences])
    packed, again = (_logits(model, sequences) for _ in range(2))
    comparisons = {
        "two forwards of one batch differ, so something in it is random": (packed, again),
        "a sequence alone differs from transformers' own eager forward": (single, torch.cat(list(alone))),
        "a sequence that is packed beside another differs from the same sequence alone": (packed, single),
    }
    distances = {words: _distance(*pair) for words, pair in comparisons.items()}
    return next((f"{words} (by {distance:.2g})" for words, distance in distances.items() if distance > TOLERANCE), None)


def _engine_differs(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> str | None:
    """A difference between the local engine's prefill and steps and the trainer's forward, in words; or None."""
    make_deterministic(model)
    want = _logits(model, sequences).split([len(ids) for ids in sequences])
    engine = Decoder(model)
    logits, key_values = engine.prefill([ids[:-_NUM_STEPS] for ids in sequences], 2, _NUM_STEPS)
    for step in range(_NUM_STEPS + 1):
        place = step - _NUM_STEPS - 1
        expected = torch.stack([logits_of[place] for logits_of in want]).repeat_interleave(2, 0)
        if (distance := _distance(logits, expected)) > TOLERANCE:
            return f"{f'step {step}' if step else 'the prefill'} differs from the trainer's forward (by {distance:.2g})"
        if step < _NUM_STEPS:
            tokens = torch.tensor([ids[place + 1] for ids in sequences]).repeat_interleave(2)
            logits = engine.step(tokens, key_values)
    return None


def _model(config: PreTrainedConfig, attention: str, experts: str) -> PreTrainedModel:
    own = type(config).from_dict(config.to_dict())  # the model keeps it, and writes its attention into it
    return AutoModelForCausalLM.from_config(
        own, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts, trust_remote_code=False
    ).eval()


def _randomize(model: nn.Module) -> None:
    """Weights of a size at which every part of the model shows in its logits."""
    for name, param in model.named_parameters():
        if param.ndim >= 2:
            param.copy_(torch.randn_like(param) / param.shape[-1] ** 0.5)
        elif "norm" not in name:
            param.copy_(torch.randn_like(param) / 2)
        else:
            param.add_(torch.randn_like(param) / 10)


def _sequences(config: PreTrainedConfig) -> list[list[int]]:
    longest = min(_LENGTHS[1], context_of(config))
    return [torch.randint(3, config.vocab_size, (length,)).tolist() for length in (min(_LENGTHS[0], longest - 1), longest)]


def _logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """[T, V] of the sequences, packed."""
    return model.lm_head(for_head(model.config, hidden_states(model, _packed(sequences))))


def _packed(sequences: Sequence[Sequence[int]]) -> Batch:
    rollouts = [Rollout.from_tokens(ids, (0,)) for ids in sequences]  # the last token is a label only
    (batch,) = pack(rollouts, torch.zeros(len(rollouts), 1), torch.ones(len(rollouts)))
    return batch


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; infinite if a value is not finite."""
    return float((a - b).abs().nan_to_num(nan=torch.inf).max())


def _line(error: Any) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
