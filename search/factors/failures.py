"""Sites that cannot be measured cost themselves: a pass over a model goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankfront.methods import InputError
from rankfront.search.errors import reason_of
from rankfront.search.inputs.device import out_of_memory


class Failures(dict[str, str]):
    """Site, or path of a weight -> why it cannot be measured."""

    @contextmanager
    def sparing(self, name: str) -> Iterator[None]:
        """Within, an exception is kept as the reason for ``name`` and goes no further; but for `InputError`, which
        names what the user can mend, and a shortage of memory, which is of no site."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            self.setdefault(name, reason_of(error))

    def check(self) -> None:
        """Raise RuntimeError where there is any."""
        for name, reason in self.items():
            raise RuntimeError(f"{name} cannot be measured: {reason}")
