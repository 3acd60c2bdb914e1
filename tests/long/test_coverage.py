"""Two thousand cohorts a row: intervals over groups hold the truth at least 93 times in 100."""

import pytest

from hf_glovlm.lab.interval_bench import bench_intervals

pytestmark = pytest.mark.long

FROM_EIGHT = ("accuracy", "balanced_accuracy", "macro_auc")


@pytest.mark.parametrize("n_groups", [8, 10, 20, 40])
def test_intervals_hold_the_truth(n_groups: int) -> None:
    rows = bench_intervals(groups=(n_groups,))
    names = (*FROM_EIGHT, *(["macro_f1"] if n_groups >= 20 else []))
    of = {(r["metric"], r["value"]): r["coverage"] for r in rows if r["metric"] in names}
    assert min(of.values()) >= 0.93, of
