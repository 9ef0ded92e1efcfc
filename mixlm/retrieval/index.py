"""The index: a folder that has passages and everything by which they are found.

    passages.arrow     ids, titles and texts
    lexical/           their terms, as bm25s keeps them
    dense/             their vectors, as FAISS keeps them, if there are any
    manifest.json      what it was made from and how, with the hash of each file; written last

An index is whole or absent: it is written beside and renamed, and takes the place of an older one only then. Where
passages are added, changed or removed, what costs most stays: the vectors of the others (`mixlm.retrieval.vectors`),
and the graph or the lists that find candidates among them. BM25, in which a term is worth what all passages make it
worth, is made anew.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import __version__
from ..data.hashing import hash_file
from ..data.packages import required
from ..data.passages import Passage
from ..errors import UserError, file_error, one_line
from ..files import partial_name, require_inside, whole_folder
from ..progress import progress_bar
from .analysers import ANALYSERS, Analyser
from .hits import Found
from .lexical import K1, B, LexicalIndex
from .manifest import read_manifest, write_manifest
from .passages import StoredPassages, write_passages

if TYPE_CHECKING:
    from .index_dense import DenseIndex
    from .vectors import StoredVectors

FORMAT = 2

_MANIFEST = "manifest.json"
_PASSAGES = "passages.arrow"
_LEXICAL = "lexical"
_DENSE = "dense"
_AGAIN = "build it again with mixlm index"


class Index:
    """An index that is open for searching.

    Attributes:
        manifest: what its manifest.json has.
        passages: what is found, by row.
        lexical: finds them by common terms.
        dense: finds them by their vectors, if it has them.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.passages = StoredPassages(folder / _PASSAGES)
        by_id = self.passages.id_of_row
        self.lexical = LexicalIndex.load(folder / _LEXICAL, ANALYSERS[manifest["lexical"]["analyser"]](), by_id)
        self.dense = _dense_index().load(folder / _DENSE, by_id) if "dense" in manifest else None

    @property
    def model(self) -> str | None:
        """The folder, or the Hub name, that the encoder of its vectors had; None without vectors."""
        return self.manifest.get("dense", {}).get("model")

    @property
    def weight(self) -> float | None:
        """The weight of the dense scores in hybrid search that `store_tuning` has stored, if there is one."""
        return self.manifest.get("hybrid", {}).get("weight")

    def find(self, questions: Sequence[str], top_k: int) -> Iterator[Found]:
        """The best passages for each question by common terms alone."""
        return map(Found, self.lexical.search(questions, top_k))

    def require_tunable(self) -> None:
        """Raise UserError where `store_tuning` could not write; to be asked before the work of tuning."""
        try:
            with TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f"{self.folder}: nothing can be stored in it ({file_error(error)})") from error

    def store_tuning(self, of: str, tuning: dict[str, Any]) -> None:
        """Write how something is done with this index into its manifest; what else was stored meanwhile stays.

        Args:
            of: "hybrid" search, or "answers".
            tuning: `weight`, which may be None, and what else is worth knowing of it.

        Raises:
            UserError: another index lies there now, or the manifest cannot be read or written.
        """
        try:
            manifest = read_manifest(self.folder / _MANIFEST, FORMAT, _AGAIN)
            if manifest["files"] != self.manifest["files"]:
                raise UserError(f"{self.folder}: was built again meanwhile; tune again")
            write_manifest(self.folder / _MANIFEST, {**manifest, of: tuning})
        except OSError as error:
            raise UserError(f"{self.folder}: the manifest cannot be written ({file_error(error)})") from error
        self.manifest[of] = tuning


def build_index(
    passages: Iterable[Passage],
    out: Path,
    analyser: Analyser,
    vectors: "StoredVectors | None" = None,
    kind: str = "exact",
) -> dict[str, Any]:
    """Build an index for lexical search, and with vectors also for dense and hybrid search.

    If an index of this kind and encoder lies at `out`, its graph or lists are kept, and get the vectors that are new;
    unless more than a quarter of all would be of passages that are gone, or no more than half would stay as they are.

    Args:
        passages: at least one, each with its own id (`mixlm.data.passages.read_passages`, or those of `vectors`).
        out: the folder; an index that lies there is replaced once the new one is whole.
        analyser: takes passages apart, and later the questions.
        vectors: of these passages.
        kind: of `mixlm.retrieval.index_dense.KINDS`, for the vectors.

    Returns:
        Its manifest.

    Raises:
        UserError: `out` holds something else or cannot be written, there is no passage or none has a word, there are
            too few of them for the kind, or a package is not installed.
    """
    _require_replaceable(out)
    required("bm25s")  # rather than after all passages were read
    dense_index = _dense_index() if vectors is not None else None
    try:
        with whole_folder(out) as partial:
            reading = progress_bar(passages, desc="reading passages", unit=" passages")
            count, passages_hash = write_passages(partial / _PASSAGES, reading)
            if not count:
                raise UserError("there is no passage; give at least one")
            LexicalIndex.build(StoredPassages(partial / _PASSAGES), analyser).save(partial / _LEXICAL)
            parts = {
                "passages": {"count": count, "blake2b": passages_hash},
                "lexical": {"analyser": analyser.name, "k1": K1, "b": B},
                "libraries": {name: version(name) for name in ("bm25s", *analyser.libraries)},
            }
            if vectors is not None:
                assert count == len(vectors), "vectors of other passages"
                change = _change_of(out, vectors, kind)
                if change is None:
                    dense = dense_index.build(vectors.shards(), kind)
                else:
                    dense = dense_index.extend(out / _DENSE, change.added, change.rows)
                dense.save(partial / _DENSE)
                parts["dense"] = _describe(dense, vectors)
                if change is not None:
                    parts["dense"]["change"] = change.counts()
                parts["libraries"]["faiss"] = required("faiss").__version__
            return _write_manifest(partial, parts)
    except OSError as error:
        raise UserError(f"{out}: the index cannot be written there ({file_error(error)})") from error


def open_index(folder: Path) -> Index:
    """Open an index, after a look at each file: all are there and have the content that they were written with.

    Raises:
        UserError: the folder is no index, is damaged, or was written by another version in another format.
    """
    try:
        manifest = read_manifest(folder / _MANIFEST, FORMAT, _AGAIN)
        _require_libraries(manifest["libraries"], folder)
        require_inside(manifest["files"], folder / _MANIFEST)
        hashes = _hashes(folder, manifest["files"])
        changed = [name for name, wanted in manifest["files"].items() if hashes[name] != wanted]
        if changed:
            raise UserError(f"{folder}: {', '.join(changed)} changed since the index was built; {_AGAIN}")
        return Index(folder, manifest)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a whole index ({file_error(error)}); {_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{folder}: the index cannot be read ({file_error(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # Its files are as they were written: by another version, of mixlm or of a library.
        raise UserError(f"{folder}: this version cannot open it ({one_line(error)}); {_AGAIN}") from error


def is_tuned(folder: Path) -> bool:
    """Whether an index lies there for which `Index.store_tuning` has stored something."""
    try:
        return not {"hybrid", "answers"}.isdisjoint(read_manifest(folder / _MANIFEST, FORMAT, _AGAIN))
    except (OSError, UserError):
        return False


class _Change(NamedTuple):
    """What has become of the passages of an index.

    Attributes:
        rows: of each of its vectors the row that the passage has now, -1 if it is gone; behind them, of each added.
        added: vectors that are new, [added, dimension].
    """

    rows: np.ndarray
    added: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many vectors are kept, added, and kept although their passages are gone."""
        gone = int((self.rows < 0).sum())
        return {"kept": len(self.rows) - len(self.added) - gone, "added": len(self.added), "gone": gone}


def _change_of(out: Path, vectors: "StoredVectors", kind: str) -> _Change | None:
    """From the index at `out` to one of these vectors; None where it is to be built from nothing."""
    if kind == "exact" or not (out / _MANIFEST).is_file():
        return None
    try:
        earlier = open_index(out)
    except UserError:
        return None
    told = earlier.manifest.get("dense", {})
    if any(told.get(name) != wanted for name, wanted in (("kind", kind), ("encoder", vectors.encoder))):
        return None
    row_of_id = {passage.id: row for row, passage in enumerate(earlier.passages)}
    rows = np.full(len(earlier.dense.vectors), -1, dtype=np.int64)
    added_rows, added, first = [], [np.empty((0, vectors.dimension), np.float32)], 0
    passages = iter(vectors.passages())
    for shard in progress_bar(vectors.shards(), desc="comparing vectors", unit=" shards"):
        found = np.asarray(shard, dtype=np.float32)
        row_before = np.array([row_of_id.get(passage.id, -1) for passage in islice(passages, len(found))])
        is_kept = row_before >= 0
        is_kept[is_kept] = (earlier.dense.vectors_of(row_before[is_kept]) == found[is_kept]).all(axis=1)
        numbers = np.arange(first, first + len(found))
        rows[earlier.dense.places_of(row_before[is_kept])] = numbers[is_kept]
        added_rows.append(numbers[~is_kept])
        added.append(found[~is_kept])
        first += len(found)
    change = _Change(np.concatenate([rows, *added_rows]), np.concatenate(added))
    kept, gone, total = change.counts()["kept"], change.counts()["gone"], len(change.rows)
    return change if 2 * kept > total and 4 * gone <= total else None


def _require_libraries(libraries: Mapping[str, str], folder: Path) -> None:
    """Raise UserError where a library may take texts apart, or read files, otherwise than when an index was built."""
    for name, then in libraries.items():
        if name == "faiss":  # it reads what its earlier versions have written
            continue
        try:
            now = version(name)
        except PackageNotFoundError as error:
            raise UserError(f"{name} is not installed; install it with: pip install 'mixlm[retrieval]'") from error
        if now.split(".")[:2] != then.split(".")[:2]:
            raise UserError(f"{folder}: was built with {name} {then}, and {now} is installed; {_AGAIN}")


def _require_replaceable(out: Path) -> None:
    """Raise UserError unless there is nothing at `out`, an empty folder, or an index.

    Also where somebody stands in it: their folder would be gone, whatever took its place.
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{out}: is the folder that this is run in, or holds it; use another name")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; use another name")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    left_over = partial_name(Path(_MANIFEST)).name  # of a killed `store_tuning`
    is_index = _PASSAGES in names and names <= {_MANIFEST, _PASSAGES, _LEXICAL, _DENSE, left_over}
    if names and not is_index:
        raise UserError(f"{out}: exists and is no index; use another name or delete it")


def _dense_index() -> type["DenseIndex"]:
    """Imported late: without vectors FAISS need not be installed."""
    from .index_dense import DenseIndex

    return DenseIndex


def _describe(dense: "DenseIndex", vectors: "StoredVectors") -> dict[str, Any]:
    description = {
        **dense.parameters,
        "dimension": vectors.dimension,
        "dtype": vectors.dtype,
        "encoder": vectors.encoder,
        "model": vectors.model,
    }
    return description if description["kind"] == "exact" else {**description, "recall@10": round(dense.recall(), 4)}


def _write_manifest(folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Written last: a folder that has a manifest has everything else."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = {"format": FORMAT, "mixlm": __version__, **parts, "files": _hashes(folder, files)}
    write_manifest(folder / _MANIFEST, manifest)
    return manifest


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash of the content of each file, by its name in the folder."""
    files = {name: folder / name for name in names}
    size = sum(file.stat().st_size for file in files.values())
    with progress_bar(desc="checking the index", total=size, unit="B", unit_scale=True) as progress:
        return {name: hash_file(file, progress) for name, file in files.items()}
