"""Packaging of mixlm."""

import re
from pathlib import Path

from setuptools import find_packages, setup

REPOSITORY = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (REPOSITORY / "mixlm" / "__init__.py").read_text("utf-8"))[1]

setup(
    name="mixlm",
    version=VERSION,
    description="MixLM and Switch encoders for transformers: retrieval and machine reading in Korean and any language",
    long_description=(REPOSITORY / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mixlm", "mixlm.*"]),
    package_data={"mixlm": ["py.typed", "configs/*.json", "sample/*.dat", "sample/*.json", "sample/README.md"]},
    install_requires=[
        "torch>=2.13",
        "transformers>=5.23,<6",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "fairscale>=0.4.13",
        "filelock>=4",
        "huggingface_hub>=2.4",
        "numpy>=2",
        "psutil>=7",
        "pyarrow>=24",
        "safetensors>=0.8",
        "tensorboard>=2.21",
        "tokenizers>=0.23.3",
        "tqdm>=4.67",
    ],
    extras_require={
        "korean": ["kiwipiepy>=0.24"],
        "retrieval": ["faiss-cpu>=1.15", "bm25s>=0.3.16", "kiwipiepy>=0.24", "PyStemmer>=3.1"],
        "demo": ["gradio>=6.31"],
        "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2", "sentence-transformers>=6.2"],
        "plot": ["matplotlib>=3.10"],
        "dev": [
            "bm25s>=0.3.16",
            "build",
            "faiss-cpu>=1.15",
            "gradio>=6.31",
            "hypothesis",
            "kiwipiepy>=0.24",
            "matplotlib>=3.10",
            "mteb>=2.26",
            "mypy",
            "onnx>=1.23",
            "onnxruntime>=1.32",
            "onnxscript>=0.7.2",
            "parameterized",
            "PyStemmer>=3.1",
            "pytest>=9",
            "pytest-timeout",
            "pytest-xdist",
            "pytrec-eval-terrier",
            "ruff",
            "selenium>=4.51",
            "sentence-transformers>=6.2",
            "typos",
        ],
    },
    entry_points={"console_scripts": ["mixlm = mixlm.cli:main"]},
)
