"""Methods: tensors in, tensors out. Importing this package registers every method, and the loader of exports."""

import importlib
import pkgutil

from rankfront.methods._errors import InputError, check_choice, nearest, shown
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
    get_method,
    method_names,
    register,
    source_behind,
    source_of,
)
from rankfront.methods._statistics import Statistics, narrow_outputs
from rankfront.methods._storage import Cost, Storage
from rankfront.methods._taxonomy import FAMILIES
from rankfront.methods._unpacked import Unpacked
from rankfront.methods._weighting import Gram
from rankfront.methods.prepacked import prepack, undo_prepack

__all__ = [
    "DENSE",
    "DENSE_OPTION",
    "FAMILIES",
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
    "get_method",
    "method_names",
    "narrow_outputs",
    "nearest",
    "prepack",
    "register",
    "shown",
    "source_behind",
    "source_of",
    "undo_prepack",
]

for _module in pkgutil.iter_modules(__path__):  # a new method is a new file: nothing to add here
    importlib.import_module(f"{__name__}.{_module.name}")
