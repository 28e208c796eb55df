"""Builds the Cython extensions of ``datapath``; everything else about the package is in pyproject.toml.

PFVOL_SANITIZE=1 builds them with AddressSanitizer and UndefinedBehaviorSanitizer (``make sanitize``).
"""

import os
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("PFVOL_SANITIZE") == "1"
COMPILE = ["-O2", "-g", "-fno-strict-aliasing", "-Wno-unused-function", "-Wno-unreachable-code", "-Wno-sign-compare"]
LINK = ["-pthread"]
if SANITIZE:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1"]
    COMPILE += flags
    LINK += flags

extensions = [
    Extension(
        "datapath." + Path(source).stem,
        [source],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        depends=sorted(glob("datapath/*.pxd") + glob("datapath/*.h")),
    )
    for source in sorted(glob("datapath/*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        nthreads=os.cpu_count() or 1,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
            "binding": True,
        },
    )
)
