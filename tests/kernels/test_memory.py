import platform

from processive.kernels import keep_freed_memory


def test_only_glibc_takes_it():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
