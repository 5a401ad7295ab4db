"""What callers pass as numbers and truth values, taken for what it is or refused by name.

Knows numbers of Python, NumPy and torch, not what they are for. A truth value is no number here, nor a number a truth value:
`batch_size=True` and `log1p="no"` are slips that Python would let pass.
"""

import operator
from numbers import Real
from typing import Any

import numpy as np


def is_truth(value: Any) -> bool:
    """Tell whether a value is a truth value, of Python, NumPy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", None)) in ("bool", "torch.bool")


def whole(name: str, value: Any, least: int | None = None) -> int:
    """Return a whole number as an int. Raises TypeError for anything else, ValueError below `least`."""
    expected = "a whole number" + ("" if least is None else f" of at least {least}")
    if is_truth(value):
        raise TypeError(f"{name} is {shown(value)}, expected {expected}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} is {shown(value)}, expected {expected}") from error
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}, expected {expected}")
    return number


def real(name: str, value: Any, expected: str) -> float:
    """Return a number as a float. Raises TypeError for anything else, saying what was expected."""
    if is_truth(value) or not isinstance(value, Real):
        raise TypeError(f"{name} is {shown(value)}, expected {expected}")
    return float(value)


def truth(name: str, value: Any, expected: str = "True or False") -> bool:
    """Return a truth value as a bool. Raises TypeError for anything else, saying what was expected."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {shown(value)}, expected {expected}")
    return bool(value)


def check_list(name: str, values: Any, what: str) -> None:
    """Raise ValueError for one text where a list of `what` was expected, TypeError for what is no list at all."""
    if isinstance(values, str):
        raise ValueError(f"{name} is {values!r}, expected a list of {what}: {name}=[{values!r}]")
    if not hasattr(type(values), "__iter__") or isinstance(values, bytes):
        raise TypeError(f"{name} is {shown(values)}, expected a list of {what}")


def shown(value: Any) -> str:
    """Show a value in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
