"""Text in, documents out: streaming readers for corpus files and for anything the `datasets` library can load.

A corpus file is UTF-8 text, one sentence a line, a blank line between documents: `.dat`, `.dat.xz` or `.dat.gz`.
Text is composed to NFC: a Hangul syllable written as its letters (as file systems and some editors do) becomes the one
character that the vocabulary has.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, one_line
from ..progress import draws_over
from .text_files import numbered_lines

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

CORPUS_SUFFIXES = (".dat", ".dat.xz", ".dat.gz")

# A document is held in memory while it is read. No text has this many sentences: its file lacks the blank lines.
MAX_SENTENCES_PER_DOCUMENT = 1_000_000

# The border after a sentence-final mark, and the quotation mark or bracket that may close behind it.
SENTENCE_BORDER = re.compile(r"(?:(?<=[.!?。！？…])|(?<=[.!?。！？…][\"'”’」』)\]]))\s+")


@dataclass
class Document:
    """Consecutive sentences that belong together.

    Attributes:
        sentences: stripped, composed to NFC, none of them empty.
        source: the file, or the name of the dataset, it came from.
        line: number of its first line in the file (its first row in the dataset), counted from 1.
    """

    sentences: list[str]
    source: str
    line: int


def corpus_files(path: str | Path) -> list[Path]:
    """The corpus files under `path`, in the order in which they are read.

    Args:
        path: a corpus file, or a folder that is searched recursively; hidden files and folders are left out.

    Returns:
        The files, sorted by their path.

    Raises:
        UserError: the path does not exist, or is neither a corpus file nor a folder with at least one.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(CORPUS_SUFFIXES):
            raise UserError(f"{path}: not a corpus file; give a {', '.join(CORPUS_SUFFIXES)} file or a folder of them")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the folder that holds the corpus files")
    entries = visible_files(path)
    files = [entry for entry in entries if entry.name.endswith(CORPUS_SUFFIXES)]
    if not files:
        found = f"{len(entries)} other files, such as {entries[0].name}" if entries else "an empty folder"
        raise UserError(f"{path}: found {found}; put {', '.join(CORPUS_SUFFIXES)} files there")
    return files


def visible_files(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, sorted by their path, without what is hidden."""
    return sorted(
        entry for entry in folder.rglob("*") if entry.is_file() and not _is_hidden(entry.relative_to(folder))
    )


def read_documents(path: str | Path) -> Iterator[Document]:
    """Stream the documents of a corpus file or of a folder of corpus files (see `corpus_files`).

    A file's end also ends its last document. Windows line ends and a byte order mark are tolerated.

    Raises:
        UserError: as `corpus_files`; or a file that has no sentence, is not UTF-8, or is damaged.
    """
    for file in corpus_files(path):
        yield from _read_file(file)


def read_dataset_documents(
    dataset: "str | Path | AnyDataset",
    text_column: str = "text",
    config_name: str | None = None,
    streaming: bool = False,
) -> Iterator[Document]:
    """Stream a dataset's rows as documents (see `load_text_dataset` for the arguments).

    A text is split into sentences at its line breaks or, where it has none, after sentence-final punctuation that is
    followed by a space. Rows without text are passed over.

    Raises:
        UserError: as `load_text_dataset` and `documents_of_dataset`.
    """
    rows = load_text_dataset(dataset, text_column, config_name, streaming)
    return documents_of_dataset(rows, dataset_name(dataset), text_column)


def load_text_dataset(
    dataset: "str | Path | AnyDataset",
    text_column: str = "text",
    config_name: str | None = None,
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """The rows to pretrain on: split "train", or the only split.

    Args:
        dataset, config_name, streaming: as `load_splits`. In a .txt file a blank line ends a row.
        text_column: the column with the text.

    Raises:
        UserError: the dataset cannot be loaded, it has several splits and none is called "train", or the column is
            missing or does not hold text, as far as that is known before the rows of a stream are read.
    """
    from datasets import Value

    name = dataset_name(dataset)
    splits = load_splits(dataset, config_name, streaming)
    if "train" not in splits and len(splits) > 1:
        raise UserError(f'dataset {name}: has the splits {", ".join(splits)}; one of them must be called "train"')
    rows = splits["train" if "train" in splits else next(iter(splits))]

    if rows.features is not None:
        if text_column not in rows.features:
            raise UserError(
                f'dataset {name}: no column "{text_column}"; choose one of {", ".join(sorted(rows.features))}'
            )
        feature = rows.features[text_column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")):
            raise UserError(f'dataset {name}: column "{text_column}" holds {feature}; choose a column of text')
    return rows.select_columns([text_column])


def load_splits(
    dataset: "str | Path | AnyDataset", config_name: str | None = None, streaming: bool = False
) -> "dict[str, Dataset | IterableDataset]":
    """The splits of a `datasets` dataset by name; one without splits is "train".

    Args:
        dataset: a folder written by `save_to_disk`; a local .json, .jsonl, .csv, .parquet or .txt file, or a folder of
            them; the name of a dataset on the Hub; or what `datasets` has loaded, a stream or not.
        config_name: of a dataset on the Hub that has several configurations, such as "20231101.ko".
        streaming: read rows as they are asked for, rather than copying all of them to this machine's disk first.

    Raises:
        UserError: it cannot be loaded.
    """
    # Takes a second: only for those who use it.
    from datasets import Dataset, IterableDataset, disable_progress_bars, load_from_disk
    from datasets.exceptions import DatasetsError

    if not draws_over():
        disable_progress_bars()  # its bars would be one long line of a log
    if isinstance(dataset, str | Path):
        path = Path(dataset)
        is_saved_to_disk = path.is_dir() and any(
            (path / file).is_file() for file in ("state.json", "dataset_dict.json")
        )
        try:
            loaded = (
                load_from_disk(str(path))
                if is_saved_to_disk
                else _load_dataset(path, str(dataset), config_name, streaming)
            )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(
                f"dataset {dataset}: cannot be loaded ({type(error).__name__}: {error}); "
                "give a local file or folder, or a name that the Hub knows while it can be reached"
            ) from error
    else:
        loaded = dataset
    return {"train": loaded} if isinstance(loaded, Dataset | IterableDataset) else dict(loaded)


def dataset_name(dataset: "str | Path | AnyDataset") -> str:
    """What messages call a dataset: its name, or the class of what is loaded already."""
    return str(dataset) if isinstance(dataset, str | Path) else type(dataset).__name__


def dataset_fingerprint(rows: "Dataset | IterableDataset") -> str:
    """By which rows are known again, without reading them; of a stream: the files, or the functions, they come from.

    Raises:
        UserError: a stream comes from what differs in every process.
    """
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    if isinstance(rows, Dataset):
        return rows._fingerprint
    try:
        return Hasher.hash([rows._ex_iterable, rows.epoch])
    except Exception as error:  # whatever pickling leads to
        raise UserError(
            f"dataset {type(rows).__name__}: cannot be told from others ({type(error).__name__}: {one_line(error)}); "
            "make it of files, and of functions that can be pickled"
        ) from error


def documents_of_dataset(rows: "Dataset | IterableDataset", name: str, text_column: str) -> Iterator[Document]:
    """The documents of a dataset that is already loaded (`load_text_dataset`).

    Raises:
        UserError: a stream breaks off, or a row of it has no text column.
    """
    from datasets.exceptions import DatasetsError

    row = 0
    try:
        for batch in rows.iter(batch_size=1000):
            for text in batch[text_column]:
                row += 1
                sentences = split_sentences(text or "")
                if sentences:
                    yield Document(sentences, name, row)
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, DatasetsError) as error:
        raise UserError(
            f"dataset {name}, after row {row}: cannot be read on ({type(error).__name__}: {one_line(error)}); "
            f'is every row there an object with text in "{text_column}", and can its source be reached?'
        ) from error


def split_sentences(text: str) -> list[str]:
    """Split at line breaks or, where there are none, after sentence-final punctuation followed by a space. In NFC."""
    text = unicodedata.normalize("NFC", text.strip())
    pieces = text.splitlines() if "\n" in text or "\r" in text else SENTENCE_BORDER.split(text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_card(readme: Path) -> bool:
    """Whether it begins as a card of the Hub does, with fields."""
    return readme.is_file() and readme.read_bytes()[:3] == b"---"


def _load_dataset(path: Path, name: str, config_name: str | None, streaming: bool):
    from datasets import load_dataset

    texts = [path] if path.suffix == ".txt" else []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        # A README and a licence may lie there too, unless it is the card of a data set, which says what is what.
        is_described = config_name is not None or _is_card(path / "README.md")
        if not is_described and all(file.suffix in (".txt", ".md", "") for file in files):
            texts = [file for file in files if file.suffix == ".txt"]
    if texts:
        # By itself the library would make every line a row, and so a document of one sentence.
        return load_dataset(
            "text", data_files=[str(file) for file in texts], sample_by="paragraph", streaming=streaming
        )
    builders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file():
        if path.suffix not in builders:
            raise ValueError(f"{path.suffix or 'no suffix'} is not one of .txt, {', '.join(builders)}")
        return load_dataset(builders[path.suffix], data_files=str(path), streaming=streaming)
    return load_dataset(name, config_name, streaming=streaming)


def _read_file(file: Path) -> Iterator[Document]:
    sentences: list[str] = []
    first_line = 0
    has_sentences = False
    for number, line in numbered_lines(file):
        line = unicodedata.normalize("NFC", line.strip())
        if line:
            if not sentences:
                first_line = number
            elif len(sentences) == MAX_SENTENCES_PER_DOCUMENT:
                raise UserError(
                    f"{file}, line {number}: the document that starts at line {first_line} has more than "
                    f"{MAX_SENTENCES_PER_DOCUMENT:,} sentences; put a blank line between documents"
                )
            sentences.append(line)
        elif sentences:
            yield Document(sentences, str(file), first_line)
            sentences, has_sentences = [], True
    if sentences:
        yield Document(sentences, str(file), first_line)
    elif not has_sentences:
        raise UserError(f"{file}: the file has no sentence; remove it, or put text there, one sentence a line")
