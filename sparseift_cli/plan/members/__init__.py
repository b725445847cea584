"""The members of the Sparse-IFT family: one file each, and a registry that takes members from outside too.

Every module of this folder that defines MEMBER is a member. From outside, `MEMBERS.register(name, member)`, an entry point
of the group `sparseift.members`, or `package.module:Name` (an object or a subclass of `Member`) wherever a member is named.
"""

# pyright: reportImportCycles=false
# Of types alone: a member reads the spec that names it.

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ...base.registry import Registry
from .base import DenseLayer, LayerwiseMember, Member, factors

__all__ = ["MEMBERS", "DenseLayer", "LayerwiseMember", "Member", "factors", "written_name"]


def _found() -> dict[str, Member]:
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    members: list[Member] = [module.MEMBER for module in modules if hasattr(module, "MEMBER")]
    return {member.name: member for member in sorted(members, key=lambda m: m.order)}


def _why_not(entry: object) -> str | None:
    if isinstance(entry, Member) or (isinstance(entry, type) and issubclass(entry, Member)):
        return None
    return f"it is no Member of sparseift_cli.plan.members, but {type(entry).__name__}"


class _Members(Registry[Member]):
    def get(self, name: str) -> Member:
        """As any registry's; of a class that is named, an object."""
        found = super().get(name)
        return found() if isinstance(found, type) else found


_SHIPPED = _found()
MEMBERS = _Members("member", "members", _SHIPPED, aliases={f"sparse_{name}": name for name in _SHIPPED}, check=_why_not)


def written_name(name: str) -> str:
    """What JSON documents call a member: `sparse_wide`. A member from outside has the one name that it was asked for by."""
    return f"sparse_{name}" if name in _SHIPPED else name
