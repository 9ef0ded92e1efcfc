"""How texts are cut into tokens, the same way wherever text is read."""

from tokenizers import Tokenizer


def text_backend(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that cuts whole texts: "[SEP]" in a text is text, no token, and nothing is cut off or padded."""
    backend = Tokenizer.from_str(tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # is not among what `to_str` writes, so that a copy needs it again
    return backend
