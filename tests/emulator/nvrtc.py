"""The CUDA compiler as a library, by ctypes: what a machine without nvcc and without a GPU has from PyPI.

Knows NVRTC's C functions, not kernels. The wheel `nvidia-cuda-nvrtc` puts the library below `nvidia/`; a CUDA
toolkit puts it where the loader finds it.
"""

import ctypes
import ctypes.util
import importlib.util
from functools import cache
from pathlib import Path


@cache
def library() -> ctypes.CDLL | None:
    """Load NVRTC; None where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    found = sorted(str(path) for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*"))
    name = found[-1] if found else ctypes.util.find_library("nvrtc")
    if name is None:
        return None
    for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*"):  # some releases do not find them by themselves
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(name)


def compiled(text: str, options: list[str]) -> tuple[str, str]:
    """Compile a source; returns what the compiler says, and the PTX where options name a virtual architecture.

    Raises RuntimeError with the compiler's words where it fails.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None), "")
    try:
        status, size = nvrtc.nvrtcCompileProgram(program, len(options), flags), ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        _check(status, log.value.decode())
        nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetPTX(program, ptx)
        return log.value.decode(), ptx.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int, log: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC fails with {status}:\n{log}")
