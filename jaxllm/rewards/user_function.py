"""Reward functions that users write, found by their dotted path."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from jaxllm.errors import InputError
from jaxllm.rewards.base import RewardFunction, checked


def user_function(path: str) -> RewardFunction:
    """Import `package.module:function`, from the working directory too, and check all that it returns.

    Raises:
      InputError: no such module or function, or what stands there cannot be called.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name.isidentifier()):
        raise InputError(f"path is {path!r}; expected package.module:function")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"{path}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        raise InputError(f"{path}: {module.__file__} defines no {name!r}")
    function = vars(module)[name]
    if not callable(function):
        raise InputError(f"{path} is of type {type(function).__name__}; expected a function of a list of answers")
    return checked(path, function)
