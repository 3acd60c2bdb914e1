"""Tuners of PEFT: which of them can adapt a backbone, and the config of each."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GloVLMError, nearest

# Short names of LoRA with one of its switches on.
VARIANTS = {"RSLORA": "use_rslora", "DORA": "use_dora"}
# Tuners whose `r` is not the rank of what is added: they keep the sizes that PEFT gives them.
OWN_SIZE = ("ADAMSS", "OFT", "PVERA", "RANDLORA", "SUPERTUNING", "VERA")
_VIRTUAL_TOKENS = "puts virtual tokens in front of a language model's (see prompt_tuning, maple)"
_DATA = "a pass over data before the start"
# Tuners that cannot serve here, and why.
UNSUITABLE = {
    "ADAPTION_PROMPT": "knows LLaMA alone",
    "CARTRIDGE": _VIRTUAL_TOKENS,
    "CPT": _VIRTUAL_TOKENS,
    "LILY": "cannot be merged, and an adapted model stands without PEFT",
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "POLY": "chooses among tasks, and there is one here",
    "PREFIX_TUNING": _VIRTUAL_TOKENS,
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "SHADOW": "runs a second language model beside the first",
    "TRAINABLE_TOKENS": "is what the method prompt_tuning trains",
    "XLORA": "mixes LoRA adapters that were trained before",
}
# Arguments of the tuners' configs that cannot serve here, and what they need.
UNSERVED = {
    "alora_invocation_tokens": "a causal language model",
    "arrow_config": "adapters that were trained before",
    "corda_config": _DATA,
    "eva_config": _DATA,
    "layer_replication": "a decoder",
    "loftq_config": "quantised weights",
    "lora_ga_config": _DATA,
    "megatron_config": "Megatron",
    "megatron_core": "Megatron",
    "use_qalora": "quantised weights",
}
STARTS_FROM_DATA = ("corda", "eva", "loftq", "lora_ga")
SET_BY_THE_METHOD = ("target_modules", "modules_to_save", "total_step")


def tuner_names() -> list[str]:
    """Names of PEFT's tuners that can serve here, and the short names."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = (kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    return sorted({*names, *VARIANTS} - set(UNSUITABLE))


def find_tuner(name: str) -> tuple[str, dict[str, Any]]:
    """Find a tuner by its name in PEFT, in capitals or not, or by a short name.

    Returns:
        The name in PEFT, and the arguments that a short name stands for.

    Raises:
        GloVLMError: PEFT has none of this name, or it cannot serve here.
    """
    key = name.upper().replace("-", "_")
    known = tuner_names()
    if key in UNSUITABLE:
        raise GloVLMError(f"PEFT's {key} {UNSUITABLE[key]}: choose one of {', '.join(known)}.")
    if key not in known:
        raise GloVLMError(
            f"PEFT has no tuner '{name}' that adapts linear maps; it has {', '.join(known)}."
            f"{nearest(key, known)}"
        )
    return ("LORA", {VARIANTS[key]: True}) if key in VARIANTS else (key, {})


def tuner_arguments(
    tuner: str,
    targets: Mapping[str, nn.Module],
    *,
    r: int,
    alpha: int,
    dropout: float,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of a tuner's config.

    Args:
        tuner: A name from `find_tuner`.
        targets: What it adapts, by name in the backbone.
        r: Rank, for tuners that have one.
        alpha: Scaling numerator, likewise.
        dropout: Of the added path's input, likewise.
        given: What the user sets beyond these; it wins.

    Raises:
        GloVLMError: An argument is unknown or cannot serve here, or the tuner cannot adapt these
            maps together.
    """
    allowed = _check(tuner, given)
    own = tuner.lower()
    shared: dict[str, Any] = {f"{own}_dropout": dropout}
    if tuner not in OWN_SIZE:
        shared |= {"r": r, "alpha": alpha, f"{own}_alpha": alpha}
    arguments = {name: value for name, value in shared.items() if name in allowed}
    if tuner == "ADALORA":
        arguments = {"target_r": r, "init_r": math.ceil(1.5 * r)}
        arguments |= {"lora_alpha": alpha, "lora_dropout": dropout}
        # PEFT needs a number at once; `AdaLoraBudget.begin` sets the right one.
        arguments["total_step"] = 1 + given.get("tinit", 0) + given.get("tfinal", 0)
    elif tuner == "IA3":  # scales the attention's outputs, and the inputs of the MLP's maps
        arguments["feedforward_modules"] = [n for n in targets if not in_attention(n)]
    elif tuner == "FROD":
        shapes = sorted({tuple(m.weight.shape) for m in targets.values()})  # type: ignore[arg-type]
        if len(shapes) > 1:
            raise GloVLMError(
                f"FROD shares matrices among maps of one shape; found {shapes}: choose one tower, "
                "and leave the MLP out."
            )
        arguments["progressbar"] = False
    return {"target_modules": list(targets), **arguments, **given}


def build_config(tuner: str, arguments: Mapping[str, Any]) -> Any:
    """Build the tuner's config in PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[tuner](**arguments)  # type: ignore[index]


def describe_tuner(tuner: str, arguments: Mapping[str, Any]) -> list[str]:
    """Notes on a tuner for the results: its arguments, and how its adapter loads."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    left_out = (*SET_BY_THE_METHOD, "feedforward_modules", "progressbar")
    listed = ", ".join(f"{k} {v}" for k, v in arguments.items() if k not in left_out)
    notes = [f"PEFT tuner {tuner}: {listed or 'with its own defaults'}."]
    if getattr(PEFT_TYPE_TO_TUNER_MAPPING[tuner], "uses_shared_state", False):  # type: ignore[index]
        notes.append(
            f"{tuner} shares vectors among layers: its adapter loads with peft's "
            "PeftModel.from_pretrained, and AutoModel.from_pretrained refuses it."
        )
    return notes


def in_attention(name: str) -> bool:
    """Whether a linear map of a block belongs to its attention, by its name."""
    return "attn" in name or "attention" in name


def _check(tuner: str, given: Mapping[str, Any]) -> set[str]:
    """Names of the arguments that a tuner takes; refuses others that are given."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[tuner])}  # type: ignore[index]
    allowed = fields - {f.name for f in dataclasses.fields(PeftConfig)} - set(SET_BY_THE_METHOD)
    for name, value in given.items():
        if name in SET_BY_THE_METHOD:
            raise GloVLMError(
                f"'{name}' in tuner_config is set by the method: use its settings towers, last, "
                "layers, projections and mlp."
            )
        if name not in allowed:
            known = ", ".join(sorted(allowed - set(UNSERVED)))
            raise GloVLMError(
                f"PEFT's {tuner} has no argument '{name}' (it has: {known})."
                f"{nearest(name, allowed)}"
            )
        if name in UNSERVED:
            raise GloVLMError(f"'{name}' of {tuner} needs {UNSERVED[name]}: leave it out.")
        if name == "init_lora_weights" and value in STARTS_FROM_DATA:
            raise GloVLMError(f"The start '{value}' of {tuner} needs {_DATA}: choose another.")
    return allowed


class AdaLoraBudget:
    """Rank allocation of AdaLoRA: ranks fall to the budget, and factors stay near orthogonal.

    Zhang et al. 2023, arXiv:2303.10512.

    Args:
        peft_model: A backbone wrapped with AdaLoRA.
    """

    def __init__(self, peft_model: Any) -> None:
        self.tuner = peft_model.base_model
        self.config = peft_model.peft_config["default"]
        named = list(peft_model.named_parameters())
        self.right = [p for n, p in named if ".lora_A." in n]  # [r, in]
        self.left = [p for n, p in named if ".lora_B." in n]  # [out, r]

    def begin(self, steps: int) -> None:
        """Lay the schedule over a run of `steps` optimiser steps."""
        if self.config.tinit + self.config.tfinal >= steps:
            raise GloVLMError(
                f"AdaLoRA lowers the ranks after tinit ({self.config.tinit}) steps and until "
                f"tfinal ({self.config.tfinal}) before the end; a run of {steps} leaves none "
                "between. Lower them in tuner_config, or train longer."
            )
        self.config.total_step = steps

    def after_step(self, step: int) -> None:
        """Score what trains by its gradient; zero the singular values beyond the budget."""
        self.tuner.update_and_allocate(step)

    def penalty(self) -> Tensor:
        """Mean of `|P^T P - 1|` and `|Q Q^T - 1|` (Frobenius) over all factors, times a weight."""
        norms = [
            torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
            for gram in (*(q @ q.T for q in self.right), *(p.T @ p for p in self.left))
        ]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def keep_every_rank(self) -> None:
        """Before saving and merging: every rank is there, the pruned ones zero.

        Cut to the last step's ranks, the adapter would not be the state of a better epoch before.
        """
        self.config.rank_pattern = None
