"""Kernels on the emulator, started as `kernels/gpu.py` starts them on a GPU.

Knows names, grids and words of 8 bytes, not what a kernel computes. A launch runs to its end before it returns:
there is no stream. `launches` counts them, for tests of what a batch costs.
"""

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

from emulator.build import library

KERNELS = Path(__file__).parents[2] / "kernels"
ERROR_BYTES = 500


class EmulatorError(Exception):
    """A launch that a GPU would have answered with a hang, a wrong result or a crash."""


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("grid_x", "grid_y", "block_x", "shared_bytes", "seed", "n_words")),
        ("words", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
    )


class Emulator:
    """Starts kernels of the CUDA sources in `folder`; a kernel's name begins with the name of its source.

    seed: for the order of blocks, warps and lanes; 0 is the natural order. flavour: as `build.library` has them.
    """

    def __init__(self, seed: int = 0, *, flavour: str = "plain", folder: Path = KERNELS) -> None:
        self.seed, self.launches = seed, 0
        self._flavour, self._folder = flavour, folder
        self._libraries: dict[Path, ctypes.CDLL] = {}

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Run a kernel. grid: up to two numbers, block: one; args: ints (numbers or addresses) and floats.

        Raises EmulatorError for barriers and shuffles that do not meet, LookupError for a name that no source has.
        """
        words = b"".join(struct.pack("<d", a) if isinstance(a, float) else struct.pack("<Q", int(a) & (2**64 - 1)) for a in args)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        launch = _Launch(
            grid_x=grid[0],
            grid_y=grid[1] if len(grid) > 1 else 1,
            block_x=block[0],
            shared_bytes=shared_bytes,
            seed=self.seed,
            n_words=len(args),
            words=ctypes.cast(words, ctypes.c_void_p),
            error=ctypes.cast(error, ctypes.c_char_p),
            error_bytes=ERROR_BYTES,
        )
        run = self._kernel(name)
        run.argtypes, run.restype = [ctypes.POINTER(_Launch)], None
        run(ctypes.byref(launch))
        self.launches += 1
        if error.value:
            raise EmulatorError(f"{name}: {error.value.decode()}")

    def _kernel(self, name: str) -> "ctypes._NamedFuncPointer":
        sources = [source for source in self._folder.glob("*.cu") if name.startswith(source.stem)]
        if not sources:
            raise LookupError(f"no CUDA source in {self._folder} for a kernel named {name}")
        source = max(sources, key=lambda path: len(path.stem))
        if source not in self._libraries:
            self._libraries[source] = ctypes.CDLL(str(library(source, self._flavour)))
        try:
            return self._libraries[source][f"emulate_{name}"]
        except AttributeError as error:
            raise LookupError(f"{source} exports no kernel named {name}") from error
