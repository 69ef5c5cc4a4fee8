"""Methods: tensors in, tensors out.

A method's file, and torch with it, is imported when the method is used. Importing this package makes transformers load
exports: `checkpoint` is imported as soon as transformers' quantizers are.
"""

from typing import TYPE_CHECKING

from rankfront.methods._door import open_door
from rankfront.methods._errors import InputError, check_choice, nearest, shown
from rankfront.methods._lazy import lazy
from rankfront.methods._method import (
    DENSE,
    DENSE_OPTION,
    Factors,
    Grid,
    Heads,
    Method,
    Option,
    Prepared,
    Site,
    Weight,
    register,
    source_behind,
)
from rankfront.methods._registry import (
    describe_methods,
    get_method,
    measured_as,
    method_names,
    narrow_name,
    narrow_of,
    narrowed,
    rounding_whole,
    whole_name,
)
from rankfront.methods._sizes import INTEGER_BITS
from rankfront.methods._storage import Cost, Storage
from rankfront.methods._taxonomy import FAMILIES

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from rankfront.methods._statistics import Statistics, narrow_outputs
    from rankfront.methods._unpacked import Unpacked, places_kept
    from rankfront.methods._weighting import Gram
    from rankfront.methods.prepacked import prepack, undo_prepack

__all__ = [
    "DENSE",
    "DENSE_OPTION",
    "FAMILIES",
    "INTEGER_BITS",
    "Cost",
    "Factors",
    "Gram",
    "Grid",
    "Heads",
    "InputError",
    "Method",
    "Option",
    "Prepared",
    "Site",
    "Statistics",
    "Storage",
    "Unpacked",
    "Weight",
    "check_choice",
    "describe_methods",
    "get_method",
    "measured_as",
    "method_names",
    "narrow_name",
    "narrow_of",
    "narrow_outputs",
    "narrowed",
    "nearest",
    "places_kept",
    "prepack",
    "register",
    "rounding_whole",
    "shown",
    "source_behind",
    "undo_prepack",
    "whole_name",
]

NEED_TORCH = {  # name -> the file that has it
    "Gram": "_weighting",
    "Statistics": "_statistics",
    "Unpacked": "_unpacked",
    "narrow_outputs": "_statistics",
    "places_kept": "_unpacked",
    "prepack": "prepacked",
    "undo_prepack": "prepacked",
}


__getattr__ = lazy(__name__, NEED_TORCH)


open_door()
