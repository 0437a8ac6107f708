"""Which parameter each stored tensor of a checkpoint becomes, by transformers' own renaming: none is loaded twice, or in a wrong
place.

Transformers stacks numbered tensors (`experts.0.up_proj.weight`, `experts.1.up_proj.weight`, ...) in the order of their names,
whatever the numbers are, and keeps one of two names that become the same parameter.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from srpo.core.errors import UserError


@dataclass(frozen=True)
class Use:
    """A stored tensor, and the parameters of the model that transformers makes of it."""

    name: str
    targets: tuple[str, ...]
    pattern: str | None = None  # of the converter that combines or splits tensors; None: the tensor is the parameter
    converter: WeightConverter | None = None

    @property
    def number(self) -> int | None:
        """Its number among the tensors that the converter's pattern collects."""
        match = re.search((self.pattern or "").replace("*", r"(?P<number>\d+)"), self.name)
        return int(match["number"]) if match and "number" in match.re.groupindex else None

    @property
    def slot(self) -> tuple[Any, ...]:
        """What only one tensor may fill for each of the targets."""
        numbers = [part for part in self.name.split(".") if part.isdigit()] if self.converter else []
        return (self.pattern, *numbers)


def check_uses(where: str, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise UserError, beginning with `where`, if two stored names become the same parameter, or if the numbers of the tensors
    that become one parameter are not all those from 0 on."""
    own = model.state_dict()
    by_target: dict[str, list[Use]] = defaultdict(list)
    for use in uses(model, names):
        for target in use.targets:
            by_target[target].append(use)
    for target, group in by_target.items():
        if target in own:
            _check_single(where, target, group)
            for pattern in {use.pattern for use in group if use.pattern and "*" in use.pattern}:
                _check_numbers(where, target, [use for use in group if use.pattern == pattern], len(own[target]))


def unfit_names(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(parameters and buffers of the model that no stored name becomes, targets of stored names that the model lacks), sorted.

    A tied tensor needs to be there once; what transformers leaves out of a family's checkpoints may be there or not.
    """
    own = set(model.state_dict())
    targets = {target for use in uses(model, names) for target in use.targets}
    missing = own - targets
    for tied in _tied(model):
        missing -= tied if tied & targets else set()
    keys: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=targets - own)
    model._adjust_missing_and_unexpected_keys(keys)
    return sorted(keys.missing_keys), sorted(keys.unexpected_keys)


def uses(model: PreTrainedModel, names: Iterable[str]) -> Iterator[Use]:
    """The use of each stored name, in transformers' order."""
    mapping, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        if pattern is None:
            yield Use(name, (target,))
        else:
            first, *others = by_pattern[pattern].target_patterns
            targets = (target, *(target.replace(first, other) for other in others))
            yield Use(name, targets, pattern, by_pattern[pattern])


def _check_single(where: str, target: str, group: list[Use]) -> None:
    """Raise UserError if two stored tensors fill the same place of a parameter."""
    first = group[0]
    seen: dict[tuple[Any, ...], Use] = {}
    for use in group:
        other = first if use.converter is not first.converter else seen.setdefault(use.slot, use)
        if other is not use:
            raise UserError(f"{where}: {other.name} and {use.name} both become {target}: remove the one that is not the model's")


def _check_numbers(where: str, target: str, group: list[Use], size: int) -> None:
    """Raise UserError unless the tensors are numbered from 0 on, in this order; for experts, up to the parameter's own size."""
    for number, use in enumerate(group):
        if use.number != number:
            raise UserError(f"{where}: {use.name} stands where number {number} belongs in {target}: restore the checkpoint")
    converter = group[0].converter
    if converter and isinstance(converter.operations[0], MergeModulelist) and len(group) != size:
        raise UserError(f"{where}: {len(group)} tensors like {group[0].name} for the {size} of {target}: restore the checkpoint")


def _tied(model: PreTrainedModel) -> list[set[str]]:
    """Names of the state dict that are one tensor."""
    pairs = [set(pair) for pair in model.all_tied_weights_keys.items()]
    by_tensor: dict[int, set[str]] = defaultdict(set)
    for name, param in model.named_parameters(remove_duplicate=False):
        by_tensor[id(param)].add(name)
    return pairs + [names for names in by_tensor.values() if len(names) > 1]
