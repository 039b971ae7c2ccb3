"""Texts -> rows that are nearly the same as an earlier one, by MinHash and locality-sensitive hashing. Keeps no text."""

from array import array
from dataclasses import dataclass

import numpy as np

from qlora_core.errors import ConfigError

SHINGLE, PERMUTATIONS, SEED = 5, 192, 1
# Of the pairs exactly at the threshold, so many become candidates; of nearer ones, more. Each band costs 4 bytes a row.
RECALL, BANDS = 0.99, 20
LOWEST = 0.6
# Signatures are computed for so many characters or rows at once: arrays that fit a processor's cache.
BATCH_CHARACTERS, BATCH_ROWS = 100_000, 256
# First rows looked at in a band: at least so many, and more where there are fewer rows. Only many rows of one template, alike
# but not near enough, have more.
DEPTH, DEPTH_TIMES_ROWS = 32, 4_000_000
# Odd numbers that mix the characters of a shingle into 64 bits (multilinear hashing, https://arxiv.org/abs/1202.4961).
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
# Of sentences, not of sums and programs: 3+4 is not 3-4.
_PUNCTUATION = dict.fromkeys(map(ord, '.,;:!?()"“”„«»…–—。，、；：！？（）「」『』《》،؛؟।'), " ") | dict.fromkeys(
    map(ord, "'’‘")
)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Pair:
    """Row `line` is near the earlier row `first_line`, the earliest that it is near to and that is near no earlier one.

    `similarity` is an estimate of the Jaccard similarity of the two rows' shingles: of the runs of five characters that occur
    in either, the share that occurs in both. Its standard error is about 0.03 where it is 0.8, and 0.02 where it is 0.9.
    """

    line: int
    first_line: int
    similarity: float


class NearDuplicates:
    """Finds near-duplicates among rows that are added one by one, in their order; then `pairs`.

    Texts are lower-cased, white space is folded and the punctuation of sentences left out; a shingle is a run of five
    characters, so that languages without spaces need nothing of their own. A shorter text is one shingle. The same rows in
    the same order give the same pairs. A row takes 200 bytes, and while `pairs` runs up to 150 more.

    Rows that differ in little are near however much the little means: long word problems with other numbers in them are. A
    group is a first row and the rows near it; two rows near a third need not be near each other.
    """

    def __init__(self, *, threshold: float = 0.8) -> None:
        """Raises ConfigError for a threshold below 0.6, at which most rows would have to be compared with each other, or
        above 1."""
        if not LOWEST <= threshold <= 1:
            raise ConfigError(
                f"near-duplicate threshold is {threshold}; it must lie between {LOWEST} and 1, such as 0.8"
            )
        self.threshold = threshold
        self.band_rows = _band_rows(threshold)
        self.bands = min(BANDS, PERMUTATIONS // self.band_rows)
        # Rows that were not compared with every row they could be near to, because they share a template with too many;
        # known after `pairs`.
        self.not_fully_compared = 0
        self._lines = array("q")
        self._signatures = bytearray()
        self._waiting: list[str] = []
        self._waiting_characters = 0

    @property
    def parameters(self) -> dict[str, int | float | str]:
        """What a person is told of how the rows were compared."""
        return {
            "threshold": self.threshold,
            "shingle": f"{SHINGLE} characters, lower-cased, without punctuation",
            "permutations": PERMUTATIONS,
            "bands": self.bands,
            "band_rows": self.band_rows,
        }

    def add(self, line: int, text: str) -> None:
        """Take the next row. `line` names it in the pairs."""
        folded = _folded(text)
        self._lines.append(line)
        self._waiting.append(folded)
        self._waiting_characters += len(folded)
        if self._waiting_characters >= BATCH_CHARACTERS or len(self._waiting) >= BATCH_ROWS:
            self._sign()

    def pairs(self) -> list[Pair]:
        """The rows that are near an earlier one, in their order, each once."""
        self._sign()
        signatures = np.frombuffer(self._signatures, np.uint8).reshape(-1, PERMUTATIONS)
        links = self._links(signatures)
        is_first = np.ones(len(links), bool)
        depth = max(DEPTH, DEPTH_TIMES_ROWS // len(links))
        found: list[Pair] = []
        self.not_fully_compared = 0
        for place in np.flatnonzero(links.any(axis=1)).tolist():
            candidates, all_of_them = _earlier_firsts(links, is_first, place, depth)
            similarity = _similarity(signatures[candidates - 1], signatures[place - 1])
            near = np.flatnonzero(similarity >= self.threshold)
            if len(near):
                is_first[place] = False
                first = self._lines[int(candidates[near[0]]) - 1]
                found.append(Pair(self._lines[place - 1], first, round(float(similarity[near[0]]), 4)))
            elif not all_of_them:
                self.not_fully_compared += 1
        return found

    def _links(self, signatures: np.ndarray) -> np.ndarray:
        """(places, bands): where the last earlier row with the same band stands, places counted from 1; 0 where there is none.

        Place 0 is no row, and links to itself.
        """
        # Zeros cost memory only where they are written over: for rows that share a band.
        links = np.zeros((len(signatures) + 1, self.bands), np.int32)
        for band in range(self.bands if len(signatures) else 0):
            keys = _keys(signatures[:, band * self.band_rows : (band + 1) * self.band_rows])
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            same = keys[1:] == keys[:-1]
            links[order[1:][same] + 1, band] = order[:-1][same] + 1
        return links

    def _sign(self) -> None:
        """Signatures of the waiting rows: of each 32-bit minimum 8 bits, which estimate nearly as well (b-bit minwise
        hashing, https://arxiv.org/abs/0910.3349)."""
        if not self._waiting:
            return
        hashes, offsets = _shingles(self._waiting)
        from rensa import RMinHash  # a worker that only trains runs without it

        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED)
        minima = np.array(matrix.to_rows(), np.uint32)
        self._signatures += ((minima * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8).tobytes()
        self._waiting.clear()
        self._waiting_characters = 0


def _band_rows(threshold: float) -> int:
    """The longest band, which has the fewest false candidates, that finds a pair at the threshold with `RECALL`."""
    for length in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**length) ** min(BANDS, PERMUTATIONS // length) >= RECALL:
            return length
    return 1


def _folded(text: str) -> str:
    """What is compared. A text of nothing but punctuation keeps it."""
    lower = text.lower()
    return (" ".join(lower.translate(_PUNCTUATION).split()) or " ".join(lower.split())).ljust(SHINGLE)


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every run of five characters, text after text, and where each text's begin and end."""
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    runs = len(characters) - SHINGLE + 1
    hashes = np.zeros(runs, np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += characters[place : place + runs] * np.uint64(factor)
    hashes ^= hashes >> _HALF
    hashes *= _MIX
    hashes ^= hashes >> _HALF
    ends = np.cumsum([len(text) for text in texts])
    whole = np.ones(len(characters), bool)
    for place in range(1, SHINGLE):  # runs that reach into the next text
        whole[ends - place] = False
    offsets = np.zeros(len(texts) + 1, np.uint64)
    offsets[1:] = ends - (SHINGLE - 1) * np.arange(1, len(texts) + 1)
    return hashes[whole[:runs]], offsets


def _earlier_firsts(links: np.ndarray, is_first: np.ndarray, place: int, depth: int) -> tuple[np.ndarray, bool]:
    """Places of the first rows that share a band with this one, ascending; False where there are more than were looked at.

    Earlier rows were here before, so that the links of those that are near another lead to first rows.
    """
    bands = np.arange(links.shape[1])
    at = links[place]
    behind = ~is_first[at]
    at[behind] = links[at[behind], bands[behind]]
    places: set[int] = set()
    for _ in range(depth):
        places.update(at.tolist())
        at = links[at, bands]
        if not at.any():
            break
    places.discard(0)
    return np.array(sorted(places), np.int64), not at.any()


def _similarity(candidates: np.ndarray, signature: np.ndarray) -> np.ndarray:
    equal = (candidates == signature).mean(axis=1)
    # Of different minima one in 256 has the same 8 bits.
    return (equal - 1 / 256) / (1 - 1 / 256)


def _keys(band: np.ndarray) -> np.ndarray:
    """One 64-bit key a row; two rows with the same bytes have the same."""
    words = -(-band.shape[1] // 8)
    padded = np.zeros((len(band), words * 8), np.uint8)
    padded[:, : band.shape[1]] = band
    columns = padded.view(np.uint64)
    keys = columns[:, 0].copy()
    for word in range(1, words):
        keys = (keys ^ (keys >> _HALF)) * _MIX + columns[:, word]
    return keys
