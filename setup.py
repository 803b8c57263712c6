"""Packaging: metadata, extras, and the kernels folder as gradcache_clip.kernels."""

import re
from itertools import chain
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "gradcache_clip" / "__init__.py").read_text()
).group(1)

# A range ends before the next major version where private parts of a library are used.
# What asks for a library says the same range everywhere, and `make test-oldest` reads it here.
ACCELERATE, DATASETS = "accelerate>=1.10", "datasets>=4.0"
OPEN_CLIP = "open_clip_torch>=3.3,<4"
SENTENCE_TRANSFORMERS = "sentence-transformers>=6.2,<7"
TRANSFORMERS = "transformers>=5.19,<6"
TRAIN = [
    DATASETS,
    "matplotlib>=3.10.8",
    "numpy>=2.0",
    "omegaconf>=2.3",
    "pillow>=10.3",
    "psutil>=5.9",
    "pydantic>=2.8",
    "rich>=15.0",
    "safetensors>=0.8",
    "scikit-learn>=1.5",
    "tensorboard>=2.17",
    "timm>=1.0.31",
    "tokenizers>=0.23.1",
    TRANSFORMERS,
    "webdataset>=0.2.100,<2",
]
DEEPSPEED = ["deepspeed>=0.19.4; platform_system == 'Linux'"]
# PyLate pins another sentence-transformers, so nothing asks for both.
DROP_INS = {
    "lightning": ["lightning>=2.5.5,<3"],
    "open-clip": [OPEN_CLIP],
    "sentence-transformers": [ACCELERATE, DATASETS, SENTENCE_TRANSFORMERS],
    "transformers": [ACCELERATE, TRANSFORMERS],
}
DOCS = ["math-core>=0.9,<0.10", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
BENCH = ["matplotlib>=3.10.8", "psutil>=5.9", "rich>=15.0"]
# What benchmarks compare with; none of it is needed to use the library.
PEERS = [
    "cut-cross-entropy>=25.1.1",
    "inf-cl>=1.2.1; platform_system == 'Linux'",
    "info-nce-pytorch>=0.1.4",
    "liger-kernel>=0.8.5",
    "lightly>=1.6",
    "memeff>=0.3.1; platform_system == 'Linux'",
    OPEN_CLIP,
    "pytorch-metric-learning>=2.9",
    SENTENCE_TRANSFORMERS,
    "siglip-kernel>=0.1.2; platform_system == 'Linux'",
]
ALL = {*TRAIN, *DEEPSPEED, *chain(*DROP_INS.values())}
TEST = [
    "bitsandbytes>=0.50",
    "hypothesis>=6.150",
    "jaxtyping>=0.2.30",
    "mypy>=1.11",
    "peft>=0.19",
    "pytest>=8.4",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.6.1",
    "ruff>=0.6",
    "tensordict>=0.15",
    "torch_geometric>=2.6,<3",
    # A CUDA build of torch brings its own; the interpreter and the compiler run beside others too.
    "triton>=3.7.1; platform_system == 'Linux'",
]

setup(
    name="gradcache-clip",
    version=VERSION,
    description="Exact large-batch contrastive training in the memory of one chunk",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The symlink gradcache_clip/kernels serves checkouts; this mapping serves wheels and archives.
    packages=[
        *find_packages(include=["gradcache_clip", "gradcache_clip.*"]),
        "gradcache_clip.kernels",
    ],
    package_dir={"gradcache_clip.kernels": "kernels"},
    package_data={
        "gradcache_clip": ["py.typed"],
        "gradcache_clip.kernels": ["README.md"],
        "gradcache_clip.memory": ["cards.json"],
    },
    install_requires=["torch>=2.13,<3"],
    extras_require={
        **DROP_INS,
        "deepspeed": DEEPSPEED,
        "pylate": ["pylate>=1.6,<2"],
        "train": TRAIN,
        "all": sorted(ALL),
        "bench": BENCH,
        "docs": DOCS,
        "peers": sorted({*BENCH, *PEERS}),
        "test": sorted({*ALL, *BENCH, *TEST}),
    },
    entry_points={"console_scripts": ["gradcache-clip = gradcache_clip.cli:command [train]"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
