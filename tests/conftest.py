"""Shapes and types in annotations are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("processive", "beartype.beartype")

import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import AbstractContextManager, contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SHARED = Path(os.environ.get("PROCESSIVE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when whatever comes first imports Triton

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the worker processes share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the shared data where that folder is absent."""
    if not SHARED.is_dir():
        for item in items:
            if "shared_data" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{SHARED} is absent"))


@pytest.fixture
def shared() -> Path:
    """Folder of real inputs; mark the test ``shared_data``."""
    return SHARED


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def interrupted() -> Callable[[int], AbstractContextManager[None]]:
    """``with interrupted(3): train(...)``: three steps are taken, and the next one raises KeyboardInterrupt."""

    @contextmanager
    def after(steps: int) -> Iterator[None]:
        from processive.training.engines import plain

        taken, left = plain.gradient_step, iter(range(steps))

        def stopping(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return taken(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(plain, "gradient_step", stopping)
            yield

    return after
