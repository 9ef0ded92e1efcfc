#!/usr/bin/env python
"""How long a search by vectors takes, how much of the best it finds, and how large the index is.

    python benchmarks/search_speed.py                  # 10,000 and 1,000,000 passages; the table of docs/retrieval.md

The vectors are synthetic, in clusters, as those of texts are: 256 numbers each, as mixlm-mini has. A question is the
vector of a passage with noise. What is measured is the time from a question's vector to its 20 hits, one question
after the other, from an index that was saved and is mapped into memory again.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import pages

from mixlm.errors import exits_on_user_error
from mixlm.retrieval.index_dense import KINDS, DenseIndex

RESULTS = Path(__file__).with_suffix(".json")
# The pages that show the table, and what they call its columns.
PAGES = {
    "retrieval.md": "passages|index|threads|p50 (ms)|p99 (ms)|recall@10|bytes per passage|build (min)",
    "retrieval.ko.md": "문단|색인|스레드|p50(ms)|p99(ms)|recall@10|문단당 바이트|만드는 시간(분)",
}
PLACE = "search speed"  # of the table on each
DIMENSION, TOP_K = 256, 20
QUESTIONS, WARM_UP = 500, 20
ROWS_PER_SHARD = 50_000
NOISE = 0.7  # of a passage around the centre of its cluster, and of a question around its passage; centres have 1


def shards(passages: int) -> Iterator[np.ndarray]:
    """Vectors of passages, [up to 50,000, 256] each, always the same."""
    centres = normal(0, (round(passages**0.5), DIMENSION))
    for number, first in enumerate(range(0, passages, ROWS_PER_SHARD), start=1):
        rows = min(ROWS_PER_SHARD, passages - first)
        noise = normal(number, (rows, DIMENSION))
        yield centres[np.arange(first, first + rows) % len(centres)] + NOISE * noise


def normal(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Normally distributed numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def measure(passages: int, kind: str) -> dict[str, str | int | float]:
    """Build, save, load and search an index."""
    began = time.perf_counter()
    index = DenseIndex.build(shards(passages), kind)
    minutes = (time.perf_counter() - began) / 60
    folder = Path(tempfile.mkdtemp(prefix="search-speed-"))
    try:
        index.save(folder / "index")
        size = sum(file.stat().st_size for file in (folder / "index").iterdir())
        index = DenseIndex.load(folder / "index")
        recall = index.recall()
        rows = np.linspace(0, passages - 1, QUESTIONS + WARM_UP).astype(np.int64)
        questions = index.vectors_of(rows) + NOISE * normal(-1 % 2**32, (len(rows), DIMENSION))
        seconds = []
        for question in questions:
            began = time.perf_counter()
            next(index.search(question[None], TOP_K))
            seconds.append(time.perf_counter() - began)
    finally:
        shutil.rmtree(folder)
    p50, p99 = np.percentile(1000 * np.array(seconds[WARM_UP:]), (50, 99))
    return {
        "passages": passages,
        "kind": kind,
        "threads": faiss.omp_get_max_threads(),
        "p50 (ms)": round(float(p50), 3),
        "p99 (ms)": round(float(p99), 3),
        "recall@10": round(recall, 4),
        "bytes per passage": round(size / passages),
        "build (min)": round(minutes, 2),
    }


def table(rows: list[dict], titles: list[str]) -> str:
    """As a page shows them."""
    shown = [[f"{cell:,}" if isinstance(cell, int | float) else cell for cell in row.values()] for row in rows]
    return pages.grid([dict(zip(titles, cells, strict=True)) for cells in shown])


def put_on_pages(rows: list[dict]) -> None:
    """Put the table in its place on each page."""
    for name, columns in PAGES.items():
        pages.replace(Path(__file__).parents[1] / "docs" / name, PLACE, table(rows, columns.split("|")))


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 1_000_000], metavar="N")
    arguments = parser.parse_args()
    rows = []
    for passages in arguments.passages:
        for kind in KINDS:
            rows.append(measure(passages, kind))
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    put_on_pages(rows)


if __name__ == "__main__":
    main()
