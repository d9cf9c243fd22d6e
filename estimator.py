"""What scikit-learn asks of an estimator beside ``fit``: the arguments of its constructor, by name."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from .errors import ConfigError

Own = TypeVar("Own", bound="Estimator")


class Estimator:
    """A class that keeps each argument of its constructor as an attribute of that name."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # scikit-learn passes it
        """Return the constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self: Own, **params: Any) -> Own:
        """Change constructor arguments; returns the estimator.

        Raises:
            ConfigError: there is no such argument.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ConfigError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}.")
            setattr(self, name, value)
        return self
