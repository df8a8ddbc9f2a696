"""Packaging: the repository root is the package ``listen``."""

from setuptools import find_packages, setup

SUBPACKAGES = find_packages(include=["data*", "training*", "evaluation*", "analysis*"])
setup(
    name="listen",
    version="0.1.0",
    package_dir={"listen": ".", **{f"listen.{name}": name.replace(".", "/") for name in SUBPACKAGES}},
    packages=["listen", *(f"listen.{name}" for name in SUBPACKAGES)],
    python_requires=">=3.10",
)
