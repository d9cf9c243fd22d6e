"""The one thing that setup.cfg cannot say: native kernels, which may be absent where there is no C compiler."""

import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FOLDER = Path("kernels/native")
SOURCES = sorted(path for kind in ("*.c", "*.h") for path in FOLDER.glob(kind))
VERSION = zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))  # what the package holds its sources against
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there


class BuildLibrary(build_ext):
    """Build a plain shared library: it is loaded by ctypes and serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file's name without Python's version in it."""
        return fullname.replace(".", "/") + ".so"


class BuildModules(build_py):
    """The root is the package, and this file stands in the root: it is no module of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package but for this file."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


class PlatformWheel(bdist_wheel):
    """One wheel per platform, not one per Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the wheel."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "processive.kernels.native._native",
            sources=sorted(str(path) for path in FOLDER.glob("*.c")),
            depends=sorted(str(path) for path in FOLDER.glob("*.h")),
            define_macros=[("NATIVE_VERSION", f"{VERSION}u")],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-fvisibility=hidden",
                "-g0",
                "-Werror=implicit-function-declaration",
                *OPENMP,
            ],
            extra_link_args=OPENMP,
            optional=True,
        )
    ],
    cmdclass={"build_py": BuildModules, "build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
