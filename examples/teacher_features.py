"""Features of a frozen teacher for `loss.teacher`: any model that sentence-transformers loads.

    pip install sentence-transformers
    python examples/teacher_features.py weights/minilm data/wordnet/train.jsonl \\
        data/wordnet/teacher.safetensors

A model with prompts of its own, such as e5, gets them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from gradcache_clip.train.data import read_all_texts
from gradcache_clip.train.programs.teacher import save_teacher_features


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("data", help="data.train of the run")
    parser.add_argument("out", type=Path, help="a safetensors file")
    names = {"nargs": 2, "default": ["anchor", "positive"], "metavar": ("QUERY", "DOCUMENT")}
    parser.add_argument("--fields", **names)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    model = SentenceTransformer(options.model)
    rows = read_all_texts(options.data, options.fields, max_broken_share=0.05)
    queries, documents = ([*dict.fromkeys(column)] for column in zip(*rows, strict=True))
    settings = {"batch_size": options.batch_size, "convert_to_tensor": True}
    with torch.inference_mode():
        save_teacher_features(
            options.out,
            (queries, model.encode_query(queries, **settings).half()),
            (documents, model.encode_document(documents, **settings).half()),
        )
    print(f"{options.out}: {len(queries):,} queries and {len(documents):,} documents")


if __name__ == "__main__":
    main()
