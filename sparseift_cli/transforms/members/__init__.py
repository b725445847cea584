"""The torch half of each member: a file each; `plan.members` has the other half, and the registry."""

from __future__ import annotations

from ...base.registry import import_object
from ...errors import UsageError
from ...plan.members import Member
from .base import MemberModule, TorchHalf
from .layerwise import Layerwise


def torch_half(member: Member) -> TorchHalf:
    """How `member` is carried out on a module: the class that it names, imported when it is asked for.

    Raises:
        UsageError: it cannot be imported, or is neither a MemberModule nor a TorchHalf.
    """
    named = member.torch_half
    found = import_object(named, f"torch half of member {member.name}") if isinstance(named, str) else named
    if isinstance(found, type) and issubclass(found, MemberModule):
        return Layerwise(member, found)
    if isinstance(found, type) and issubclass(found, TorchHalf):
        return found()
    raise UsageError(
        f"the torch half of member {member.name} is {named}, which is no MemberModule",
        hint="give a subclass of sparseift_cli.transforms.members.base.MemberModule",
    )
