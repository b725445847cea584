"""What a survey knows of a model before it runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Subject:
    """A model of a survey: how to build it on a device, and the arguments of one forward there."""

    name: str
    build: Callable[[str], nn.Module]
    args: Callable[[str], tuple[Any, ...]] = lambda device: ()
    kwargs: Callable[[str], dict[str, Any]] = field(default=lambda device: {})
    set: str = ""  # the set that it is examined in: two libraries may have a resnet18
