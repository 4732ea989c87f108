"""What pyproject.toml cannot say: when the compiled transforms are a must.

An installation goes on where there is no C compiler. A wheel that others will
install must not, so `make dist` and the workflow set the variable below.
"""

import os

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildExtensions(build_ext):
    def finalize_options(self):
        super().finalize_options()
        if os.environ.get("KERAS_RANDADAPT_REQUIRE_NATIVE") == "1":
            for extension in self.extensions or ():
                extension.optional = False


setup(cmdclass={"build_ext": BuildExtensions})
