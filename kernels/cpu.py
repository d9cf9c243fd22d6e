"""What the processor is: the choice of a backend may depend on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

AMD = ("AuthenticAMD", "HygonGenuine")


@cache
def vendor() -> str:
    """Return the vendor as the processor spells it; empty where the system does not tell."""
    return _cpuinfo().get("vendor_id", "")


@cache
def flags() -> frozenset[str]:
    """Return the processor's features as Linux spells them; empty where the system does not tell."""
    return frozenset(_cpuinfo().get("flags", "").split())


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of Linux's table."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
