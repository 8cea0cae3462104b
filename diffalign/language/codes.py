"""Clips as sentences: codec tokens in one stream, a word for each (codebook, code), so that any causal language model can
speak them and TRL can train it. MusicGen's own delayed codebooks are for ``likelihood.kind=codes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import _compat  # noqa: F401  (before transformers)
from ..errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, UNKNOWN, PLAY = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<play>")
# A caption, then <play>, the codes and the end. System messages are left out: there is one task.
TEMPLATE = (BEGIN + "{% for m in messages %}{% if m['role'] == 'user' %} {{ m['content'] }} " + PLAY +
            "{% elif m['role'] == 'assistant' %}{% generation %} {{ m['content'] }} " + END + "{% endgeneration %}{% endif %}"
            "{% endfor %}")


@dataclass(frozen=True, kw_only=True)
class FlatCodes:
    """Codes [C, T] <-> text of C * T words "k:code", frame by frame: the C codes of a frame follow one another, so that a
    clip's time runs with the text (the flattening of MusicGen, arXiv 2306.05284, section 2.2).

    codebooks: C. words: V, the codes of a codebook.
    """

    codebooks: int
    words: int

    def __post_init__(self):
        if self.codebooks < 1 or self.words < 1:
            raise ValueError(f"codebooks and words must be at least 1, got {self.codebooks}, {self.words}")

    def write(self, codes: Iterable) -> str:
        """codes: [C, T] whole numbers, array, tensor or lists. Raises DataError for what are no codes of this kind."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or len(codes) != self.codebooks or codes.dtype.kind not in "iu":
            raise DataError(f"codes must be whole numbers [{self.codebooks}, frames], got {codes.dtype} {list(codes.shape)}")
        wrong = codes[(codes < 0) | (codes >= self.words)]
        if wrong.size:
            raise DataError(f"a code is {wrong[0]}; they run from 0 to {self.words - 1}")
        return " ".join(f"{k}:{code}" for frame in codes.T.tolist() for k, code in enumerate(frame))

    def read(self, text: str) -> np.ndarray:
        """[C, T] int64. Raises DataError naming the first word that is out of place: a model may write any."""
        said = text.split()
        if not said or len(said) % self.codebooks:
            raise DataError(f"{len(said)} words are no whole frames of {self.codebooks} codes")
        return np.array([self._code(word, i) for i, word in enumerate(said)]).reshape(-1, self.codebooks).T

    def _code(self, word: str, place: int) -> int:
        codebook, code = place % self.codebooks, word.rpartition(":")[2]
        if not code.isdecimal() or int(code) >= self.words or word != f"{codebook}:{int(code)}":
            raise DataError(f"word {place} is {word[:20]!r}; its place is that of a code of codebook {codebook}")
        return int(code)

    def allowed(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[int], list[int]]:
        """For ``Writer``: the codebooks in their turn, so that what is sampled is a clip of whole frames, however long."""
        turns = [tokenizer.convert_tokens_to_ids([f"{k}:{code}" for code in range(self.words)]) for k in range(self.codebooks)]
        return lambda place: turns[place % self.codebooks]

    def tokenizer(self, captions: Iterable[str], longest: int) -> PreTrainedTokenizerFast:
        """A token for each word of the captions and of the codes, with the chat template that TRL and ``Rewriter`` ask for.
        longest: tokens of caption and clip that the model reads.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        spoken = sorted({word for caption in captions for word in caption.split()})
        played = [f"{k}:{code}" for k in range(self.codebooks) for code in range(self.words)]
        words = {word: i for i, word in enumerate([*SPECIALS, *spoken, *played])}
        made = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, bos_token=BEGIN, eos_token=END,
                                            unk_token=UNKNOWN, model_max_length=longest, additional_special_tokens=[PLAY])
        tokenizer.chat_template = TEMPLATE
        return tokenizer
