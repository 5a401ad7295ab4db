"""CUDA sources as shared libraries for the CPU, by g++ against cuda_host.h.

Knows compilers and files, not kernels. A library is kept under the hash of everything that went into it, in
$SCDL_EMULATOR_CACHE or the machine's temporary folder: compiling the kernels takes some ten seconds, loading
them none. Nothing is ever written into the tree.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = (HERE / "cuda_host.h", HERE / "cuda_functions.h")
BASE = ("-std=c++17", "-g", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas")
FLAVOURS = {
    "plain": ("-O2",),
    "sanitized": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
}
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def compiler() -> str:
    """Give the C++ compiler, $CXX or g++; raises FileNotFoundError where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise FileNotFoundError("no C++ compiler (g++ or c++) to build the emulator with; install one, or name it in CXX")


def cache_directory() -> Path:
    """Give the folder that holds the libraries, made if need be."""
    folder = Path(os.environ.get("SCDL_EMULATOR_CACHE") or Path(tempfile.gettempdir()) / f"scdl-emulator-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def inputs(source: Path) -> list[Path]:
    """List the files that a CUDA source is made of: itself and what it includes from its own folder."""
    return [source, *(source.parent / name for name in INCLUDE.findall(source.read_text())), *HEADERS]


@cache
def library(source: Path, flavour: str = "plain") -> Path:
    """Compile `source` unless that was done before; returns the path of the library.

    flavour: plain, or sanitized (ASan and UBSan; load it in a process with `sanitizer_environment`).
    Raises RuntimeError with the compiler's words.
    """
    command = [compiler(), *BASE, *FLAVOURS[flavour]]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    content = [version.encode(), " ".join(command).encode(), *(path.read_bytes() for path in inputs(source))]
    key = hashlib.sha256(b"\0".join(content)).hexdigest()[:20]
    target = cache_directory() / f"{source.stem}-{flavour}-{key}.so"
    if not target.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        command += ["-include", str(HEADERS[0]), "-x", "c++", str(source), "-o", name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0 or run.stderr:
            Path(name).unlink()
            raise RuntimeError(f"{source} does not compile without warnings for the emulator:\n{run.stderr}")
        Path(name).rename(target)
    return target


def sanitizer_environment() -> dict[str, str]:
    """Give the variables under which a Python process can load a sanitized library."""
    names = ("libasan.so", "libubsan.so")
    said = [subprocess.run([compiler(), f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout for n in names]
    paths = [line.strip() for line in said]
    if not all(Path(path).is_absolute() for path in paths):
        raise FileNotFoundError(f"{compiler()} has no ASan and UBSan libraries: {paths}")
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
