"""What train_one.py and fine_tune_one.py do alike: a specification's file becomes a result's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixlm.errors import exits_on_user_error
from mixlm.files import write_whole


@exits_on_user_error
def make_one(make: Callable[[dict[str, Any], Path], dict[str, Any]], specification_file: str, folder: str) -> None:
    """Make the run, and leave result.json in its folder, whole or not at all.

    Args:
        make: the run, from its specification and a folder for its checkpoints, which are of no use afterwards;
            returns what is to be written down.
        specification_file, folder: as they are told on the command line.
    """
    result = make(json.loads(Path(specification_file).read_text("utf-8")), Path(folder))
    write_whole(Path(folder) / "result.json", json.dumps(result))
