"""Loading models and the settings that lie beside them, from a folder or the Hub."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RemoteEntryNotFoundError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from .configuration import MixLMConfig, MixLMSwitchConfig
from .errors import UserError, one_line
from .files import json_text, write_whole

MODEL_TYPES = (MixLMConfig.model_type, MixLMSwitchConfig.model_type)

_ASKED_ONCE_SECONDS = 5
_OWN_CLASSES = (SafetensorError, StrictDataclassError)  # of errors that derive from none of Python's


def require_source(name: str) -> None:
    """Raise UserError where `name` means a folder that is not there: a Hub that is out of reach is tried for a minute.

    A name that nothing on the Hub can have means a folder. So does one whose first part is a folder here, unless it is
    a model in the Hub's cache, or the Hub, asked once, has it.
    """
    if os.path.exists(name):
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: no such folder; check its name") from error
    first, slash, _ = name.partition("/")
    if slash and os.path.isdir(first) and not _is_known_to_hub(name):
        raise UserError(f"{name}: no such folder, and no model that the Hub gives; check its name")


def _is_known_to_hub(name: str) -> bool:
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "tokenizer.json")):
        return True
    try:
        HfApi().model_info(name, timeout=_ASKED_ONCE_SECONDS)
    except (HTTPError, OSError):
        return False
    return True


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within it, transformers keeps to itself what it has to say of new weights: `from_pretrained` returns that too.

    Args:
        name: of what is loaded, for messages.

    Raises:
        UserError: it cannot be loaded. What a damaged file leads to has many classes.
    """
    require_source(name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, *_OWN_CLASSES) as error:
        reason = one_line(error)
        if "ignore_mismatched_sizes" in reason:  # what is wrong is in a report, which is not shown within `loading`
            reason = "its weights do not have the shapes that its config.json says; is that of another model?"
        raise UserError(f"{name}: cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def load_model(auto_class: Any, name: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model and the names of its new weights. No code of its folder runs, and nothing in it is a pickle.

    Args:
        auto_class: of transformers, for the head.
        name: a folder or Hub name.
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded.
    """
    with loading(name):
        model, report = auto_class.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
        )
    return model, sorted(report["missing_keys"])


def own_config(name: str, **fields: Any) -> PretrainedConfig:
    """The configuration of a model of this package.

    Args:
        name: a folder or Hub name.
        fields: to be changed.

    Raises:
        UserError: it cannot be loaded, or is of another library.
    """
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fields)
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"{name}: is of type {config.model_type}; give one of {' or '.join(MODEL_TYPES)}")
    return config


def require_room(model: PreTrainedModel, name: str, **lengths: int) -> None:
    """Raise UserError unless the model called `name` takes texts of these lengths in tokens, given by argument."""
    longest = model.config.max_position_embeddings
    for argument, length in lengths.items():
        if length > longest:
            raise UserError(f"--{argument}={length}: {name} takes at most {longest} tokens (max_position_embeddings)")


def require_token_types(config: PretrainedConfig, name: str) -> None:
    """Raise UserError unless a model of the configuration `name` can tell the two parts of a SOP example."""
    if config.type_vocab_size < 2:
        raise UserError(
            f"{name}: type_vocab_size={config.type_vocab_size}, but --task SOP tells its parts by two token types; "
            "set type_vocab_size to 2, or use --task ICT"
        )


def require_vocabulary(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError if the tokenizer has tokens that the model called `name` does not know."""
    known = model.config.vocab_size
    if len(tokenizer) > known:
        raise UserError(
            f"{name}: knows {known:,} tokens, and the tokenizer {tokenizer.name_or_path} has {len(tokenizer):,}; use "
            "the one that the model was trained with"
        )


class StoredSettings:
    """A dataclass that is kept as a small JSON file beside a model.

    Attributes:
        file_name: of that file.
        written_by: the program that writes it.
    """

    file_name: ClassVar[str]
    written_by: ClassVar[str]

    def save(self, folder: Path) -> None:
        """Write it into the folder of a model."""
        write_whole(folder / self.file_name, json_text(asdict(self)))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self | None:
        """What `save` has written, if there is anything.

        Args:
            name_or_path: a model's folder or Hub name.

        Raises:
            UserError: it is something else, or the Hub does not answer.
        """
        file = Path(name_or_path) / cls.file_name
        if not Path(name_or_path).is_dir():
            try:
                file = Path(hf_hub_download(str(name_or_path), cls.file_name))
            except RemoteEntryNotFoundError:
                return None
            except (OSError, ValueError) as error:
                # Where the Hub cannot be reached, it may have said before that there is none.
                if try_to_load_from_cache(str(name_or_path), cls.file_name) is _CACHED_NO_EXIST:
                    return None
                raise UserError(f"{name_or_path}: {cls.file_name} cannot be had: {one_line(error)}") from error
        try:
            values = json.loads(file.read_text("utf-8"))
            cls._require_types(values)
            return cls(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise UserError(f"{file}: is not what {cls.written_by} writes: {one_line(error)}") from error

    @classmethod
    def _require_types(cls, values: dict[str, Any]) -> None:
        """Raise TypeError or ValueError where a value cannot be that of its field: whole numbers are lengths."""
        for field in fields(cls):
            value = values.get(field.name, field.default) if isinstance(values, dict) else None
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise TypeError(f"{field.name} is {value!r:.40}, and no {field.type.__name__}")
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}, and below 1")


def hash_of_weights(model: PreTrainedModel) -> str:
    """By which a model is known again, whatever its folder is called: of the names and values of its weights."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().float().cpu().numpy().tobytes())
    return weights.hexdigest()
