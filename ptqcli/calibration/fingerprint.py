"""What a checkpoint keeps of its calibration text, so that a text it is measured on can be told from it: numbers, no words.

Of every run of ``ngram`` tokens that stands in a window a hash of 32 bits is taken (``shingles.py``), and the smallest MOST of them are
kept, a sample that depends on the tokens alone (Broder 1997, bottom-k sketch). Of another text the hashes below the same bound are a sample
of its runs of tokens at the same rate; the share of them that is kept here estimates the share of the text that was calibrated on.

No text can be read out of it, but whoever holds a text can learn whether it was calibrated on.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass

from ptqcli.errors import PTQError

NGRAM = 32  # tokens: longer than what two texts have in common by chance, shorter than most documents
LEAST_NGRAM = 8  # of shorter windows; below, every text would be known
MOST = 4096  # hashes
HASH_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Of calibration windows.

    ngram: tokens in a run. ngrams: runs in all windows. tokens: in all windows. bound: every hash below it is kept. hashes: these, sorted,
    4 bytes each, the lowest first, in base64.
    """

    ngram: int
    ngrams: int
    tokens: int
    bound: int
    hashes: str

    @classmethod
    def of(cls, hashes: list[int], ngram: int, ngrams: int, tokens: int) -> Fingerprint:
        """Of all ``hashes``, sorted and each once."""
        kept, bound = hashes[:MOST], hashes[MOST] if len(hashes) > MOST else 1 << HASH_BITS
        packed = base64.b64encode(struct.pack(f"<{len(kept)}I", *kept)).decode()
        return cls(ngram=ngram, ngrams=ngrams, tokens=tokens, bound=bound, hashes=packed)

    def kept(self) -> list[int]:
        """The hashes. Raises PTQError where this is none that was ever written."""
        counts_fit = 1 <= self.ngram <= NGRAM and 0 < self.ngrams <= self.tokens and 0 < self.bound <= 1 << HASH_BITS
        if not counts_fit or len(self.hashes) > 6 * MOST:
            raise PTQError("the fingerprint of the calibration text is damaged")
        try:
            data = base64.b64decode(self.hashes, validate=True)
            found = list(struct.unpack(f"<{len(data) // 4}I", data))
        except (binascii.Error, struct.error, ValueError) as error:
            raise PTQError("the fingerprint of the calibration text is damaged") from error
        if found != sorted(set(found)) or (found and found[-1] >= self.bound):
            raise PTQError("the fingerprint of the calibration text is damaged")
        return found
