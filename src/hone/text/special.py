"""Tokens that no text is made of: what stands for a masked token, a removed span or a mode of work.

Objectives that change their inputs need tokens with a meaning of their own. Models have such tokens, with embeddings,
before anybody adds some: their makers keep a few in reserve (`<|reserved_special_token_0|>`, `<unused0>`,
`<extra_id_0>`), and every vocabulary of bytes has 13 that UTF-8 never uses, 0xC0, 0xC1 and 0xF5 to 0xFF. So no
embedding has to be added, and the model keeps its shape.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hone.errors import ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In the words of Llama 3, Gemma, BERT, T5, Mistral and Phi.
_RESERVED = re.compile(r"[<\[]\|?(reserved_special_token|unused|extra_id|SPECIAL|dummy)[_-]?(\d+)\|?[>\]]")
_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 has
_UNREADABLE = "\ufffd"  # what a token decodes to that is no character


def spare_ids(tokenizer: PreTrainedTokenizerBase, least: int = 1, most: int | None = None) -> list[int]:
    """Return ids of tokens that no text is made of, in an order that depends on the tokenizer alone.

    Args:
        tokenizer: of the model.
        least: so many are needed.
        most: more are not returned; None returns all there are.

    Raises:
        ModelError: there are fewer than `least`.
    """
    known: Any = tokenizer
    vocabulary = known.get_vocab()
    reserved = sorted(vocabulary[token] for token in vocabulary if _RESERVED.fullmatch(token))
    named = [vocabulary.get(name) for byte in _NEVER for name in (chr(byte), f"<0x{byte:02X}>")]
    unused = [token for token in named if token is not None and known.decode([token]) == _UNREADABLE]
    found = [*reserved, *unused]
    if len(found) < least:
        raise ModelError(
            f"this needs {least} tokens that no text is made of, and the tokenizer has {len(found)}: none like "
            "<|reserved_special_token_0|>, <unused0> or <extra_id_0>, and no tokens for bytes that UTF-8 never uses. "
            "Add some with tokenizer.add_tokens and model.resize_token_embeddings, and save the model with both"
        )
    return found[:most]


def mask_id(tokenizer: PreTrainedTokenizerBase, token: str | None = None) -> int:
    """Return the id of the mask token, or of the first spare token where the tokenizer has none.

    Args:
        tokenizer: of the model.
        token: the mask token as text, where the user names one.

    Raises:
        ModelError: there is neither, or no token with the name.
    """
    known: Any = tokenizer
    if token is not None:
        vocabulary = known.get_vocab()
        if token not in vocabulary:
            raise ModelError(f"the tokenizer has no token '{token}' ({nearest(token, vocabulary) or 'none is near'})")
        return int(vocabulary[token])
    own: Any = getattr(known, "mask_token_id", None)
    return spare_ids(tokenizer, 1, 1)[0] if own is None else int(own)
