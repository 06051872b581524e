"""How an op finds the implementation that runs it: chosen, and refused, alike for all ops."""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType

from pallas_kernels import target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """The implementations of one op: modules, imported when they are first asked for.

    Each offers `unsupported(*arguments) -> str | None`: why it cannot run for these arguments, here; None if it can.
    """

    op: str
    package: str
    """Where the modules are; an implementation and its module have the same name."""
    implementations: tuple[str, ...]
    preferred: Mapping[str, tuple[str, ...]]
    """What "auto" tries on each platform, best first."""
    portable: str
    """What "auto" takes if none of those can run."""

    def choose(self, implementation: str, *arguments) -> str:
        """The implementation that runs these arguments.

        Raises:
          ValueError: a name that is unknown, or of an implementation that cannot run here.
        """
        if implementation == "auto":
            preferred = self.preferred.get(target.target_platform(), ())
            able = (name for name in preferred if self.module(name).unsupported(*arguments) is None)
            return next(able, self.portable)
        if implementation not in self.implementations:
            known = self.implementations
            raise ValueError(f"{self.op}: implementation must be 'auto' or one of {known}: got {implementation!r}")
        reason = self.module(implementation).unsupported(*arguments)
        if reason is not None:
            raise ValueError(f"{self.op}: implementation {implementation!r} cannot run here: {reason}")
        return implementation

    def module(self, implementation: str) -> ModuleType:
        """The implementation itself."""
        return importlib.import_module(f"{self.package}.{implementation}")


def always(*arguments: object) -> None:
    """The `unsupported` of an implementation that can run for all arguments, everywhere."""
