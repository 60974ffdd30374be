"""``Tokenizer``, and the choice of one."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
_SMALLEST_TRAINED = 256 + 1  # one token per byte, and the end of a document

LONGEST_WHOLE = 1_000_000  # characters
SPACE_AFTER_WORD = re.compile(r"\S\s")
_CUT_CONTEXT = 1000
_CUTS_TRIED = 100

# Words, digits, indentation, accents, other scripts, an emoji: what tokenizers differ in.
_PROBE = "The 3 quick foxes\n\tdidn't  pay 1,024.50; def f(x):\n        return x  # naïve Größe 東京 🙂"

# Letters that next to no text has, so that whoever keeps them keeps all: one who has no token for a letter, neither of
# its bytes nor for the unknown, leaves it out.
_RARE = "ꙮ𒀀"
Spans = Callable[[str], list[tuple[int, int]]]
"""Of a text, from where to where in it each of its tokens stands."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Choice of the tokenizer.

    Attributes:
        kind: ``train`` learns a byte-level BPE from the corpus' training documents,
            ``pretrained`` loads one.
        vocab_size: Tokens to learn, at least 257; a small corpus may give fewer. With
            ``pretrained``, the size it must have, or 0 for whatever it has.
        path: ``pretrained``: a ``tokenizer.json``, a folder, or a Hugging Face name.
            ``train``: None.
        end_of_document: ``pretrained``: the token to put between documents; None for the one that the
            tokenizer's own configuration names: its ``eos_token``, or ``bos_token`` or ``sep_token``.
        max_unknown: Share of unknown tokens in a corpus above which it is refused, in [0, 1].
    """

    kind: Literal["train", "pretrained"]
    vocab_size: int
    path: str | None
    end_of_document: str | None = None
    max_unknown: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_unknown <= 1.0:
            raise ValueError(f"tokenizer.max_unknown={self.max_unknown} must be in [0, 1]")
        if self.kind == "train":
            if self.end_of_document is not None:
                raise ValueError(
                    f"tokenizer.end_of_document={self.end_of_document} has no effect with tokenizer.kind=train, whose "
                    f"token is {END_OF_DOCUMENT}; tokenizer=pretrained tokenizer.path=PATH takes one that is there"
                )
            if self.path is not None:
                raise ValueError(
                    f"tokenizer.path={self.path} has no effect with tokenizer.kind=train: add tokenizer=pretrained"
                )
            if self.vocab_size < _SMALLEST_TRAINED:
                raise ValueError(
                    f"tokenizer.vocab_size={self.vocab_size} must be at least "
                    f"{_SMALLEST_TRAINED} (256 bytes and {END_OF_DOCUMENT})"
                )
        elif not self.path:
            raise ValueError("tokenizer.path must name a tokenizer with tokenizer.kind=pretrained")


class Tokenizer:
    """A tokenizer that adds no special token and recognises none in a text.

    The end-of-document token comes from the shard writer alone.

    Args:
        encode: Texts to token ids.
        decode: Token ids to text.
        vocabulary: Token to id.
        end_of_document: Id of the token after each document.
        definition: Bytes that define the tokenizer, for the fingerprint.
        unknown: Id of the token for what it does not know, or None.
        spans: Places of the tokens of a text; None where that is not known.

    Attributes:
        vocab_size: One more than the largest id.
        end_of_document: Id of the token after each document.
        end_token: That token.
        unknown: Id of the token for what it does not know; None where it has none, or ends documents with it.
        fingerprint: Hash of the definition and of the tokens of a fixed text: the same files
            read by another version of a library may cut words differently.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        vocabulary: dict[str, int],
        end_of_document: int,
        definition: bytes,
        unknown: int | None,
        spans: Spans | None = None,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = end_of_document
        self.end_token = next(token for token, index in vocabulary.items() if index == end_of_document)
        self.unknown = None if unknown == end_of_document else unknown
        self._spans = spans if spans and _count_outside(_PROBE + _RARE, spans(_PROBE + _RARE)) else None
        probe_tokens = json.dumps([encode([_PROBE])[0], end_of_document]).encode()
        self.fingerprint = xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_digest(definition) + probe_tokens)

    def describe(self) -> str:
        """Its size and its end-of-document token, in a line."""
        return f"tokenizer: {self.vocab_size:,} tokens, {self.end_token} (id {self.end_of_document}) ends each document"

    def describe_unknown(self, unknown: int, tokens: int, max_unknown: float) -> str:
        """Share of unknown tokens in a corpus, in a clause; nothing where there are none.

        Args:
            unknown: How many there are, and letters that ``count_left_out``.
            tokens: Tokens of the text.
            max_unknown: Share above which the corpus is refused.

        Raises:
            ValueError: The share is larger than ``max_unknown``.
        """
        if not unknown:
            return ""
        leaves_out = self._spans is not None
        share = unknown / (tokens + unknown if leaves_out else tokens)
        what = "which it leaves out" if leaves_out else f"id {self.unknown}"
        if share > max_unknown:
            raise ValueError(
                f"tokenizer: {share:.2%} of the text's tokens are unknown to it ({what}), more "
                f"than tokenizer.max_unknown={max_unknown}: it was made for other text; take another, or allow more"
            )
        return f"; {share:.2%} of the text's tokens are unknown to the tokenizer" + f", {what}" * leaves_out

    def count_left_out(self, texts: list[str]) -> int:
        """Characters of some texts that are no white space and that no token stands for.

        Always 0 for a tokenizer that has a token for all; the others are asked a second time.
        """
        if self._spans is None:
            return 0
        starts = [(text, start) for text in texts for start in range(0, len(text), LONGEST_WHOLE)]
        parts = (text[start : start + LONGEST_WHOLE] for text, start in starts)
        return sum(_count_outside(part, self._spans(part)) for part in parts)

    def encode_batch(self, texts: list[str]) -> list[list[int] | np.ndarray]:
        """Token ids of each text.

        A tokenizer takes a hundred bytes and more for each character that it works on, so a long text is cut at white
        space, where cutting does not change the tokens.
        """
        if all(len(text) <= LONGEST_WHOLE for text in texts):
            return list(self._encode(texts))
        return [self._encode_long(text) if len(text) > LONGEST_WHOLE else self._encode([text])[0] for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        parts, start = [], 0
        while start < len(text):
            stop = self._next_cut(text, start + LONGEST_WHOLE // 2)
            parts.append(np.array(self._encode([text[start:stop]])[0], dtype=np.uint32))  # half of what int64 takes
            start = stop
        return np.concatenate(parts)

    def _next_cut(self, text: str, start: int) -> int:
        """The first place from ``start`` on, before white space, where the tokens of both sides are those of the whole.

        What is around the place shows that: a tokenizer that looks at a whole text, or puts something before it, cuts
        nowhere.
        """
        for _ in range(_CUTS_TRIED):
            found = SPACE_AFTER_WORD.search(text, start)
            if found is None or found.end() - 1 >= len(text):
                break
            cut = found.end() - 1
            before, after = text[max(0, cut - _CUT_CONTEXT) : cut], text[cut : cut + _CUT_CONTEXT]
            whole, left, right = self._encode([before + after, before, after])
            if whole == [*left, *right]:
                return cut
            start = found.end() + _CUT_CONTEXT
        return len(text)

    def decode(self, ids: list[int]) -> str:
        """The text behind token ids, special tokens included."""
        return self._decode(ids)


def _count_outside(text: str, spans: list[tuple[int, int]]) -> int:
    inside = np.zeros(len(text), dtype=bool)
    for start, stop in spans:
        inside[start:stop] = True
    return sum(not text[place].isspace() for place in np.flatnonzero(~inside).tolist())
