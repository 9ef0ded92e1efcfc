"""What a folder of vectors or an index says of itself: a JSON file that has a hash of all else that it says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.hashing import hash_json
from ..errors import UserError
from ..files import json_text, write_whole

_HASH = "blake2b"


def write_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Write what `read_manifest` reads; the file has its old or its new content, whatever happens.

    Args:
        file: to be written or replaced.
        manifest: what JSON can hold, with a whole number `format`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(file, json_text({**manifest, _HASH: hash_json(manifest)}))


def read_manifest(file: Path, wanted_format: int, again: str) -> dict[str, Any]:
    """A manifest, exactly as it was written: nothing in it has to be checked.

    Args:
        file: where it is.
        wanted_format: the `format` that this version reads.
        again: how a new one is made, for messages.

    Raises:
        UserError: it is damaged, or of another format.
        OSError: it cannot be read.
    """
    try:
        manifest = json.loads(file.read_text("utf-8"))
        found, is_whole = manifest["format"], manifest.pop(_HASH, None) == hash_json(manifest)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is damaged; {again}") from error
    if found != wanted_format:
        raise UserError(f"{file}: is of format {found!r:.40}, this version has {wanted_format}; {again}")
    if not is_whole:
        raise UserError(f"{file}: is damaged; {again}")
    return manifest
