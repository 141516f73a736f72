"""The tokenizer of models that start from nothing: byte-level BPE, trained on the run's own data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hone.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (BEGIN, END, PAD, *ROLES)
SMALLEST = len(SPECIAL) + 256  # every byte has a token, so no text is unknown

# One turn is its role, the text and <|end|>; no white space is added, since each character costs a small model a token.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("roles are system, user and assistant, got '" ~ message['role'] ~ "'") -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, in which every digit is a token of its own.

    It encodes any text and decodes it to the same characters. `<|begin|>` is put at the start of what is encoded,
    `<|end|>` ends a text and each turn of the chat template. Same texts, same tokenizer.

    Args:
        texts: what to learn the merges from.
        vocabulary: most tokens, special ones included; fewer come out where the texts have too few repeats.

    Raises:
        ModelError: the vocabulary is too small to hold every byte.
    """
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST:
        raise ModelError(f"vocabulary: expected at least {SMALLEST} (256 bytes and special tokens), got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B:1", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder in Hugging Face format, or by its Hub name.

    Args:
        path: the folder, or "owner/name"; "base" is the tokenizer of the shipped model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    from hone.text.loading import shipped_base

    try:
        # unless told, transformers asks on the terminal whether to run code that came with a tokenizer
        return AutoTokenizer.from_pretrained(shipped_base() if path == "base" else path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        expected = "a folder with a tokenizer or a Hub name"
        raise ModelError(f"tokenizer: expected {expected}, got '{path}': {error}") from error
