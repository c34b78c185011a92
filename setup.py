"""Builds peftkern._cpu with cmake and ninja; everything else is in pyproject.toml.

Without a C++ compiler the Python part alone is installed, with a warning; PEFTKERN_REQUIRE_EXT=1: an error.
Where there is a compiler, a failing build is an error. PEFTKERN_CMAKE_ARGS is passed on to cmake.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def compiler_problem() -> str | None:
    """None if a C++17 compiler works, else what is wrong."""
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    found = [c for c in candidates if shutil.which(shlex.split(c)[0])]
    if not found:
        return f"no C++ compiler found (looked for {', '.join(candidates)})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        command = [*shlex.split(found[0]), "-std=c++17", str(source), "-o", str(Path(folder, "probe"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return f"`{found[0]} -std=c++17` cannot compile a small program: {result.stderr or result.returncode}"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        problem = compiler_problem()
        if problem:
            if os.environ.get("PEFTKERN_REQUIRE_EXT") == "1":
                raise SystemExit(f"PEFTKERN_REQUIRE_EXT=1, but {problem}")
            print(f"WARNING: peftkern: {problem}", file=sys.stderr)
            print("WARNING: peftkern is installed without its compiled CPU kernels", file=sys.stderr)
            if not self.inplace:
                target.unlink(missing_ok=True)  # what an earlier build left in the staging folder
            return
        if self.editable_mode or self.inplace:
            build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        else:
            build = Path(self.build_temp).resolve() / "cmake"
            # An isolated build's tools live in a folder that is gone by the next build.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("PEFTKERN_CMAKE_ARGS", "")),
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, never new bytes in an old one: a running process may have the old one mapped.
        fresh = target.with_suffix(".new")
        shutil.copyfile(build / target.name, fresh)
        os.replace(fresh, target)


setup(ext_modules=[Extension("peftkern._cpu", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
