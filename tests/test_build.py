"""Building and installing: with a compiler, without one, and what the package asks for."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CXX": "/bin/false"}


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PEFTKERN_")}
    return subprocess.run(
        [*command],
        cwd=cwd,
        # the build tools stand beside python in a virtual environment
        env={**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources alone, as a checkout has them."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("CMakeLists.txt", "MANIFEST.in", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "peftkern"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*.new", "__pycache__")
        )
    return copy


def test_what_the_package_asks_for() -> None:
    """torch at run time in a range that keeps an installed one; nothing of torch to build."""
    requirements = [r for r in importlib.metadata.requires("peftkern") or [] if "extra ==" not in r]
    assert sorted(requirements) == ["numpy", "torch>=2.11"]
    extras = importlib.metadata.metadata("peftkern").get_all("Provides-Extra") or []
    assert {"triton", "bnb", "peft", "bench", "test"} <= set(extras)
    build = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert build is not None
    names = {re.split(r"[<>=]", name.strip().strip('"'))[0] for name in build[1].split(",")}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}


def test_install_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    """The Python part is installed, build and package say that the kernels are missing, and it computes."""
    site = tmp_path / "site"
    install = f"-m pip install -v --no-deps --no-build-isolation --target {site}".split()
    result = run(sys.executable, *install, str(tree), cwd=tmp_path, **NO_COMPILER)
    assert result.returncode == 0, result.stdout
    assert "WARNING: peftkern is installed without its compiled CPU kernels" in result.stdout
    assert "`/bin/false -std=c++17` cannot compile" in result.stdout
    assert (site / "peftkern/__init__.py").exists()
    assert not list(site.glob("peftkern/*.so"))
    code = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, peftkern
    assert peftkern.__file__.startswith(sys.argv[1]), peftkern.__file__
    weight = peftkern.quantize_4bit(torch.randn(64, 64))
    y = peftkern.linear_4bit(torch.randn(2, 64), weight)
print(tuple(y.shape), [str(w.message) for w in caught if "peftkern._cpu" in str(w.message)])
"""
    # -S: without the hook of an editable install, which would lend its own extension
    torch_at = str(Path(torch.__file__).parents[1])
    result = run(sys.executable, "-S", "-c", code, str(site), torch_at, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("(2, 64) ["), result.stdout
    assert result.stdout.count("by its slow reference backend") == 1, result.stdout


def test_required_extension_without_a_compiler_is_an_error(tree: Path) -> None:
    result = run(sys.executable, "setup.py", "build_ext", cwd=tree, PEFTKERN_REQUIRE_EXT="1", **NO_COMPILER)
    assert result.returncode != 0
    assert "PEFTKERN_REQUIRE_EXT=1, but `/bin/false -std=c++17` cannot compile" in result.stdout


def test_a_stale_extension_is_not_packed(tree: Path) -> None:
    staging = tree / "build"
    build = [sys.executable, "setup.py", "build", "--build-base", str(staging)]
    assert run(*build, cwd=tree, **NO_COMPILER).returncode == 0
    (library,) = staging.glob("lib*/peftkern")
    stale = library / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"")
    assert run(*build, cwd=tree, **NO_COMPILER).returncode == 0
    assert not stale.exists()


def test_a_failing_build_is_an_error(tree: Path) -> None:
    """A compiler that works and a source that doesn't: never a silent install of the Python part."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")
    for source in tree.glob("csrc/**/*.cpp"):
        source.write_text("#error this file is broken\n")
    result = run(sys.executable, "setup.py", "build", cwd=tree)
    assert result.returncode != 0
    assert "this file is broken" in result.stdout


def test_wheel_contents(tree: Path, tmp_path: Path) -> None:
    """Every module of the package, its types, and nothing of tests, bench or csrc."""
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    assert run(*wheel, str(tree), cwd=tmp_path, **NO_COMPILER).returncode == 0
    (path,) = tmp_path.glob("peftkern-*.whl")
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    expected = {
        str(p.relative_to(tree))
        for p in (tree / "peftkern").rglob("*")
        if p.suffix in (".py", ".pyi", ".typed")
    }
    assert names == expected


def test_sdist_contents(tree: Path, tmp_path: Path) -> None:
    """What the module is built from travels: setuptools itself knows of no csrc and no CMakeLists.txt."""
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    result = run(sys.executable, "-c", build, cwd=tree)
    assert result.returncode == 0, result.stdout
    (path,) = tmp_path.glob("peftkern-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert len(sources) > 20
    assert names >= sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
