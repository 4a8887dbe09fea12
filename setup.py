"""Compiles csrc into prmfast._C (torch-free pybind11); everything else stands in pyproject.toml.

PRMFAST_CUDA=1 also compiles the CUDA sources with the nvcc that is found (CUDA_HOME, then PATH); the default builds
C++ only. PRMFAST_CUDA_ARCHITECTURES=90a (or 80) builds for one kind of GPU. PRMFAST_BUILD_JOBS bounds how many files
are compiled at a time. An -O flag in CXXFLAGS replaces ours.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

OPTIMISE = [] if re.search(r"(^|\s)-O", os.environ.get("CXXFLAGS", "")) else ["-O3"]
CPP_FLAGS = [*OPTIMISE, "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler", "-fPIC"]
CUDA_ARCHITECTURES = {
    "80": "[sm_80,compute_80]",
    "90a": "sm_90a",
}  # what is built for each; others make code from compute_80


def architectures() -> list[str]:
    """What nvcc is told to build: all of `CUDA_ARCHITECTURES`, or those that PRMFAST_CUDA_ARCHITECTURES names."""
    wanted = os.environ.get("PRMFAST_CUDA_ARCHITECTURES", ",".join(CUDA_ARCHITECTURES)).split(",")
    unknown = set(wanted) - set(CUDA_ARCHITECTURES)
    if unknown:
        raise RuntimeError(
            f"PRMFAST_CUDA_ARCHITECTURES must name {' and '.join(CUDA_ARCHITECTURES)}, got {','.join(sorted(unknown))}"
        )
    return [f"-gencode=arch=compute_{name},code={CUDA_ARCHITECTURES[name]}" for name in wanted]


def sources(suffix: str) -> list[str]:
    return sorted(str(path) for path in pathlib.Path("csrc").rglob(f"*{suffix}"))


def cuda_root() -> pathlib.Path | None:
    """The toolkit's folder. nvcc on PATH may be a wrapper script, so nvcc itself is asked where it lives."""
    if "CUDA_HOME" in os.environ:
        return pathlib.Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", told.stdout + told.stderr, re.MULTILINE)
    return pathlib.Path(top.group(1)).resolve() if top else pathlib.Path(nvcc).resolve().parent.parent


class BuildExtension(build_ext):
    """Adds nvcc-compiled objects to the one extension where CUDA is wanted."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        self.force = True  # setuptools compares files only, and PRMFAST_CUDA may have changed since the last build
        if os.environ.get("PRMFAST_CUDA", "0") == "1":
            root = cuda_root()
            if root is None:
                raise RuntimeError(
                    "PRMFAST_CUDA=1 needs nvcc: set CUDA_HOME or put nvcc on PATH, or unset PRMFAST_CUDA"
                )
            self.add_cuda(ext, root)
        super().build_extension(ext)

    def add_cuda(self, ext: Pybind11Extension, root: pathlib.Path) -> None:
        flags = architectures()
        pathlib.Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            target = str(pathlib.Path(self.build_temp) / (source.replace("/", "_") + ".o"))
            self.spawn([str(root / "bin" / "nvcc"), *NVCC_FLAGS, *flags, "-c", source, "-o", target])
            return target

        jobs = int(os.environ.get("PRMFAST_BUILD_JOBS", "0")) or os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            ext.extra_objects.extend(pool.map(compile_source, sources(".cu")))
        ext.define_macros.append(("PRMFAST_CUDA", "1"))
        ext.library_dirs.extend(str(root / lib) for lib in ("lib64", "targets/x86_64-linux/lib"))
        ext.libraries.extend(["cudart_static", "rt", "dl", "pthread"])


ParallelCompile("PRMFAST_BUILD_JOBS").install()  # as many files at a time as there are cores, or as it says

setup(
    ext_modules=[
        Pybind11Extension(
            "prmfast._C",
            sources(".cpp"),
            cxx_std=17,
            include_dirs=["csrc"],
            extra_compile_args=CPP_FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
