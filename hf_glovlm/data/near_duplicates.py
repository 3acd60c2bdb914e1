"""Near-duplicate search: connected components of images that look alike, without listing pairs.

Pairs grow with the square of the images, as 10,000 blank tiles make fifty million. Here rows that
are the same stand for each other, pairs are sought where parts of their codes agree, and rows that
a third one has already joined are not compared.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["link_near_duplicates"]

Rows = NDArray[np.intp]

_BITS = 64  # of a code
_LARGE = 64  # rows of a bucket with like codes that are too many to compare all with all
_WORDS = 64  # pairs of codes that take as long as a pair of thumbnails
_PAIRS = 1 << 18  # codes compared at once
_BLOCK = 256  # thumbnails compared at once, as many as a processor's cache holds


def link_near_duplicates(
    codes: NDArray[np.uint64],
    thumbnails: NDArray[np.uint8],
    distance: int = 6,
    apart: float = 10.0,
) -> list[list[int]]:
    """Near-duplicate clusters: connected components of pairs with near codes and near thumbnails.

    Exact: the components are those of all pairs. Codes that differ in at most `distance` of their
    bits agree in at least two of `distance + 2` bands, so that pairs are sought among rows with
    equal bits in two bands. A large bucket of rows with like codes is taken apart in balls: all
    rows near one of them are joined to it, and by the triangle inequality only rows within twice
    the distances can be near another row of the ball.

    Time is nearly linear in the rows, also where most are equal or lie in dense clusters, and never
    more than that of comparing the codes of all pairs twice. It becomes quadratic where many rows
    have near codes and yet no near thumbnails. Memory is linear.

    Args:
        codes: Perceptual hashes, `[n]`.
        thumbnails: Flattened small images, `[n, d]`.
        distance: Most differing bits of near codes.
        apart: Largest mean absolute difference of near thumbnails, 0 to 255.

    Returns:
        Rows of each cluster of more than one, ascending; clusters by their first row.
    """
    same: dict[tuple[int, bytes], list[int]] = {}
    for row, code in enumerate(codes.tolist()):
        same.setdefault((code, thumbnails[row].tobytes()), []).append(row)
    equal = list(same.values())
    del same
    first = np.array([rows[0] for rows in equal], dtype=np.intp)
    search = _Search(codes[first], thumbnails[first], distance, apart)
    search.join_all()
    clusters = [[row for one in members for row in equal[one]] for members in search.members]
    return sorted(sorted(rows) for rows in clusters if len(rows) > 1)


class _Search:
    """Search of the components of different rows.

    Attributes:
        component: Number of each row's component, `[n]`.
        members: Rows of each component, by its number; none where another one has taken them over.
    """

    def __init__(
        self,
        codes: NDArray[np.uint64],
        thumbnails: NDArray[np.uint8],
        distance: int,
        apart: float,
    ) -> None:
        self.codes, self.thumbnails = codes, thumbnails
        self.distance, self.most = distance, apart * thumbnails.shape[1]
        self.component: Rows = np.arange(len(codes))
        self.members: list[list[int]] = [[row] for row in range(len(codes))]
        self.compared = 0  # pairs, of codes

    def join_all(self) -> None:
        """Join all pairs of near rows."""
        everything = np.arange(len(self.codes))
        if not len(everything):
            return
        for bands in combinations(self._bands(), 2):
            self._join_agreeing(np.left_shift(bands[0], 8, dtype=np.uint16) | bands[1])
            if self.compared > len(everything) ** 2 // 2:  # so alike that bands do not part them
                self._join_balls(everything)
                break

    def _bands(self) -> list[NDArray[np.uint8]]:
        """Bits of the codes in bands of at most 8, `[n]` each.

        Bits that tell codes apart are shared out evenly.
        """
        n_bands = max(self.distance + 2, 8)
        bits = np.unpackbits(self.codes[:, None].view(np.uint8), axis=1)
        by_balance = np.argsort(np.abs(bits.mean(axis=0) - 0.5), kind="stable")
        return [np.packbits(bits[:, by_balance[b::n_bands]], axis=1)[:, 0] for b in range(n_bands)]

    def _join_agreeing(self, keys: NDArray[np.uint16]) -> None:
        """Join near rows that have a key, `[n]`, in common."""
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] ^ 1))
        sizes = np.diff(starts, append=len(keys))
        first = np.repeat(order[starts], sizes)  # of each row's bucket
        self._join_near(first, order)
        unlike = np.bitwise_count(self.codes[first] ^ self.codes[order]) > 2 * self.distance
        dense = (sizes > _LARGE) & (2 * np.add.reduceat(unlike, starts, dtype=np.intp) < sizes)
        split = np.logical_or.reduceat(self.component[first] != self.component[order], starts)
        step, at = 1, np.flatnonzero(np.repeat(split & ~dense, sizes))
        while len(at := at[at + step < len(keys)]) and len(at := at[keys[at] == keys[at + step]]):
            self._join_near(order[at], order[at + step])
            step += 1
        for bucket in np.flatnonzero(split & dense):
            self._join_balls(order[starts[bucket] :][: sizes[bucket]])

    def _join_balls(self, rows: Rows) -> None:
        """Join near rows of some that are many, `[m]`, ball by ball."""
        main = self.component[rows[0]]  # rows of one component are compared with others only
        while len(others := rows[self.component[rows] != main]):
            centre = others[0]
            bits = np.bitwise_count(self.codes[rows] ^ self.codes[centre])
            self.compared += len(rows)
            around = np.flatnonzero(bits <= 2 * self.distance)
            bits, gaps = bits[around], self._gaps(np.full(len(around), centre), rows[around])
            inside = (bits <= self.distance) & (gaps <= self.most)
            ball = rows[around[inside]]
            self._join(np.full(len(ball), centre), ball)
            fringe = ~inside & (bits <= self.distance + bits[inside].max())
            fringe &= gaps <= self.most + gaps[inside].max()
            self._join_across(ball, rows[around[fringe]])
            rows = np.delete(rows, around[inside])
            main = max(main, self.component[centre], key=lambda of: len(self.members[of]))

    def _join_across(self, ball: Rows, others: Rows) -> None:
        """Join the near ones of rows in one component, `[m]`, and others, `[k]`."""
        start = 0
        while start < len(ball):
            others = others[self.component[others] != self.component[ball[0]]]
            if not len(others):
                break
            here = ball[start : start + max(1, _PAIRS // len(others))]
            start += len(here)
            one, other = np.meshgrid(here, others, indexing="ij")
            self._join_near(one.ravel(), other.ravel())

    def _join_near(self, one: Rows, other: Rows) -> None:
        """Join the near ones of pairs of rows, `[m]` each."""
        self.compared += len(one)
        near = np.bitwise_count(self.codes[one] ^ self.codes[other]) <= self.distance
        one, other = one[near], other[near]
        for start in range(0, len(one), _BLOCK):
            a, b = one[start : start + _BLOCK], other[start : start + _BLOCK]
            apart = self.component[a] != self.component[b]
            a, b = a[apart], b[apart]
            near = self._gaps(a, b) <= self.most
            self._join(a[near], b[near])

    def _gaps(self, one: Rows, other: Rows) -> NDArray[np.uint32]:
        """Sums of absolute differences of the thumbnails of pairs of rows, `[m]` each."""
        self.compared += _WORDS * len(one)
        gaps = np.empty(len(one), dtype=np.uint32)
        for start in range(0, len(one), _BLOCK):
            here = slice(start, start + _BLOCK)
            a, b = self.thumbnails[one[here]], self.thumbnails[other[here]]
            (np.maximum(a, b) - np.minimum(a, b)).sum(axis=1, dtype=np.uint32, out=gaps[here])
        return gaps

    def _join(self, one: Rows, other: Rows) -> None:
        """Join the components of pairs of rows; the smaller is renumbered."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            kept, gone = int(self.component[a]), int(self.component[b])
            if kept == gone:
                continue
            if len(self.members[kept]) < len(self.members[gone]):
                kept, gone = gone, kept
            self.component[self.members[gone]] = kept
            self.members[kept] += self.members[gone]
            self.members[gone] = []
