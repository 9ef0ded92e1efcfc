"""Packages that only some of what mixlm does needs: the extras `retrieval` and `korean`."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import UserError


def required(module: str, extra: str = "retrieval") -> ModuleType:
    """A module of an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed; install it with: pip install 'mixlm[{extra}]'") from error


@cache
def kiwi() -> Any:
    """The one Kiwi of this process (https://github.com/bab2min/kiwipiepy), which finds morphemes."""
    return import_module("kiwipiepy").Kiwi(num_workers=1)  # threads are for many texts at a time
