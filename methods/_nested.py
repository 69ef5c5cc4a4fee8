"""What methods share whose levels are how many components of one preparation stay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rankfront.methods._method import Option, Prepared, Site, whole_level


class Nested:
    """The first k components of one preparation are the treatment at level k.

    Attributes:
        level: the name of k.
    """

    nested = True
    version = 1
    level: str

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        raise NotImplementedError

    def kept(self, option: Option) -> int:
        """k of an option; `InputError` where it has none."""
        return whole_level(option, self.level)

    def check(self, option: Option) -> None:
        self.kept(option)

    def error(self, prepared: Prepared, option: Option) -> float:
        """What the components that go hold: Σ_{i > k} ``energy``_i."""
        return float(prepared["energy"][self.kept(option) :].double().sum())

    def refit_roles(self, site: Site) -> tuple[str, ...]:
        return ("weight",) if self.needs == ("gram",) and site.roles == ("weight",) else ()

    def running(self, components: Tensor, options: Sequence[Option]) -> dict[str, Tensor]:
        """Sums (tokens,) of the first k of ``components`` (tokens, the largest k), by label: what
        `Method.gradient_dot_outputs` gives."""
        sums = components.cumsum(1)
        return {option.label: sums[:, self.kept(option) - 1] for option in options}
