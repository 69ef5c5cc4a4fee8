"""rankfront: rank search for compressing causal language models by matrix and tensor factorisation.

Nothing heavy is imported before it is used: ``rankfront.Study`` is `search.study.Study`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from rankfront.search.study import Study

__all__ = ["Study", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "Study":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rankfront.search.study import Study

    return Study
