"""Optimisers: a dataclass of options with a method `build` each. No torch before one is built: recipes read the options.

One from outside is such a class, under a name (`OPTIMIZERS.register`, an entry point `sparseift.optimizers`) or as
`package.module:Name` in a recipe's optimizer.name:

    @dataclass(frozen=True)
    class Adagrad:
        lr: Annotated[float, Option("Learning rate at its peak.", above=0)] = 0.01

        def build(self, groups, device):
            return torch.optim.Adagrad(groups, self.lr)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from ..base.options import Option, check
from ..base.registry import Registry
from ..errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

NoDecay = tuple[Literal["norm", "bias"], ...]
ParameterGroup = dict[str, Any]
"""`params`, a list of parameters, and what is particular to them: `weight_decay`."""
_PART = Annotated[float, Field(ge=0, lt=1)]
_LR = "Learning rate at its peak."
_WEIGHT_DECAY = "Weight decay."
_NO_DECAY = "Parameters without weight decay: norm, bias."
_FUSED = "One kernel for the whole update, where the device has it."


class OptimizerOptions(Protocol):
    """What a class in `OPTIMIZERS` is: a dataclass whose fields have an `Option`."""

    @property
    def lr(self) -> float:
        """Learning rate at its peak; a schedule sets it for every step."""
        ...

    def build(self, groups: Sequence[ParameterGroup], device: torch.device) -> Optimizer:
        """The optimiser of these parameters, which are on `device`."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent."""

    lr: Annotated[float, Option(_LR, above=0)] = 0.1
    momentum: Annotated[float, Option("Momentum.", minimum=0, below=1)] = 0.9
    nesterov: Annotated[bool, Option("Nesterov's form of momentum.")] = False
    weight_decay: Annotated[float, Option(_WEIGHT_DECAY, minimum=0)] = 0.0
    no_decay_on: Annotated[NoDecay, Option(_NO_DECAY)] = ()
    fused: Annotated[bool, Option(_FUSED)] = True

    def __post_init__(self) -> None:
        check(self)
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov needs a momentum above 0")

    @property
    def states_per_weight(self) -> int:
        """Numbers that it keeps for every weight."""
        return 1 if self.momentum else 0

    def build(self, groups: Sequence[ParameterGroup], device: torch.device) -> Optimizer:
        from torch.optim import SGD as TorchSGD

        fused = self.fused and can_be_fused(groups, device)
        return TorchSGD(
            groups, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov, fused=fused
        )


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    lr: Annotated[float, Option(_LR, above=0)] = 1e-3
    betas: Annotated[tuple[_PART, _PART], Option("Decay of the means of gradients and of their squares.")] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Option("Added to the root of the mean square.", above=0)] = 1e-8
    weight_decay: Annotated[float, Option(_WEIGHT_DECAY, minimum=0)] = 0.01
    no_decay_on: Annotated[NoDecay, Option(_NO_DECAY)] = ()
    fused: Annotated[bool, Option(_FUSED)] = True

    def __post_init__(self) -> None:
        check(self)

    @property
    def states_per_weight(self) -> int:
        """Numbers that it keeps for every weight."""
        return 2

    def build(self, groups: Sequence[ParameterGroup], device: torch.device) -> Optimizer:
        from torch.optim import AdamW as TorchAdamW

        fused = self.fused and can_be_fused(groups, device)
        # A CUDA graph needs the step count on the device: capturable.
        capturable = fused and device.type == "cuda"
        return TorchAdamW(groups, self.lr, self.betas, self.eps, self.weight_decay, fused=fused, capturable=capturable)


def _not_an_optimizer(entry: object) -> str | None:
    if not isinstance(entry, type) or not is_dataclass(entry) or not callable(getattr(entry, "build", None)):
        return "it is no dataclass with a method build(groups, device)"
    return None if "lr" in entry.__dataclass_fields__ else "it has no field `lr`, which a schedule sets"


SHIPPED: dict[str, type[OptimizerOptions]] = {"sgd": SGD, "adamw": AdamW}
OPTIMIZERS: Registry[type[OptimizerOptions]] = Registry("optimiser", "optimizers", SHIPPED, check=_not_an_optimizer)
"""Every optimiser by name."""


def make_optimizer(model: nn.Module, chosen: OptimizerOptions, device: torch.device) -> Optimizer:
    """The optimiser over every parameter that trains; those named by `no_decay_on` in a group without weight decay."""
    undecayed = set(_without_decay(model, getattr(chosen, "no_decay_on", ())))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[ParameterGroup] = [
        {"params": [p for p in trained if p not in undecayed]},
        {"params": [p for p in trained if p in undecayed], "weight_decay": 0.0},
    ]
    return chosen.build([group for group in groups if group["params"]], device)


def can_be_fused(groups: Sequence[ParameterGroup], device: torch.device) -> bool:
    """Whether torch has one kernel for the whole update of these parameters."""
    return device.type in ("cpu", "cuda") and all(p.is_floating_point() for group in groups for p in group["params"])


def _without_decay(model: nn.Module, kinds: NoDecay) -> Iterator[nn.Parameter]:
    from torch import nn

    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for module in model.modules():
        norm = isinstance(module, norms) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if ("norm" in kinds and norm) or ("bias" in kinds and "bias" in name):
                yield parameter
