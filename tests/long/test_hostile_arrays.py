"""Five thousand hostile arrays for `adapt_features`, over all methods on features."""

import pytest
from hostile_features import check

CASES, BLOCK = 5000, 500

pytestmark = pytest.mark.long


@pytest.mark.parametrize("block", range(CASES // BLOCK))
def test_arrays_end_in_logits_or_a_sentence(block: int) -> None:
    numbers = range(BLOCK * block, BLOCK * (block + 1))
    failures = [failure for number in numbers if (failure := check(number))]
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures[:20])
