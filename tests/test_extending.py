"""One new entry of each kind, in a module of its own: the tables are all it takes to add one."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Glovlm
from test_mil import make_cohort
from tiny import tiny_clip, tiny_images

from hf_glovlm.backbones import BACKBONES
from hf_glovlm.errors import GloVLMError
from hf_glovlm.explain import HEAT_MAPS
from hf_glovlm.methods import METHODS
from hf_glovlm.metrics import METRICS, PairedRun, compute_metrics, paired_differences
from hf_glovlm.slides.mil.aggregators import AGGREGATORS

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "added")

TABLES: dict[str, dict[str, Any]] = {
    "new_metric": METRICS,
    "new_method": METHODS,
    "new_backbone": BACKBONES,
    "new_pooling": AGGREGATORS,
    "new_map": HEAT_MAPS,
}
ADDED = '''
import torch

from hf_glovlm.backbones import BACKBONES
from hf_glovlm.backbones.table import Backbone
from hf_glovlm.explain import MapMethod, register_map
from hf_glovlm.methods import FeatureMethod, Fitted
from hf_glovlm.methods.contract import register
from hf_glovlm.metrics import METRICS, Metric, mean_of
from hf_glovlm.model.heads import linear_head
from hf_glovlm.slides.mil.aggregators import (
    Aggregator,
    BagOutput,
    InstanceConfig,
    register_aggregator,
)

METRICS["new_metric"] = Metric(
    "New metric", "Mean log loss, base 2.", False, mean_of(lambda s: log_loss(s)), (0, 100)
)


def log_loss(sample):
    own = (sample.probabilities * sample.one_hot).sum(1)
    return -torch.from_numpy(own).clamp(min=2**-100).log2().numpy()


BACKBONES["new_backbone"] = Backbone(
    name="new_backbone",
    hub_id=PLACE,
    kind="dual",
    image_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    text_context=16,
    pretrained_on="nothing",
    license="apache-2.0",
    citation="none",
)


@register
class NewMethod(FeatureMethod):
    """Class means as weights."""

    name = "new_method"
    family = "training-free"
    trains = "nothing"
    needs_text = False
    citation = "none"

    def fit(self, support, config):
        means = torch.stack(
            [support.features[support.labels == k].mean(0) for k in range(support.num_classes)]
        )
        return Fitted(linear_head(means, -means.square().sum(1) / 2))


@register_aggregator
class NewPooling(Aggregator):
    """The median of the tiles' logits."""

    name = "new_pooling"
    citation = "none"
    permutation_invariant = True
    has_attention = False
    Config = InstanceConfig

    def aggregate(self, features):
        tile_logits = self.classify(self.embed(features)).float()
        return BagOutput(tile_logits.median(0).values, None, tile_logits)


@register_map
class NewMap(MapMethod):
    """The probability of the target wherever one looks."""

    name = "new_map"
    title = "New map"
    unit = "probability"
    citation = "none"

    def draw(self, case):
        return torch.full((case.view.rows * case.view.columns,), case.scores[0, case.target.index])
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The module imported; its entries leave the tables again."""
    folder = tmp_path_factory.mktemp("added")
    text = ADDED.replace("PLACE", repr(str(tiny_clip())))
    (folder / "added_entries.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("added_entries")
        yield
    finally:
        sys.path.remove(str(folder))
        for name, table in TABLES.items():
            table.pop(name, None)


def test_every_new_entry_is_in_its_table_and_named_to_who_mistypes_it() -> None:
    from hf_glovlm.backbones import load_backbone
    from hf_glovlm.explain.maps import find_map
    from hf_glovlm.methods import get_method
    from hf_glovlm.metrics import evaluate_metric
    from hf_glovlm.slides.mil.aggregators import build_aggregator

    assert all(name in table for name, table in TABLES.items())
    for find, wrong, name in (
        (evaluate_metric, "new_metrc", "new_metric"),
        (get_method, "new_methd", "new_method"),
        (load_backbone, "new_backbon", "new_backbone"),
        (find_map, "newmap", "new_map"),
        (lambda given: build_aggregator(given, 4, 2), "new_poolin", "new_pooling"),
    ):
        with pytest.raises(GloVLMError, match=f"Did you mean '{name}'"):
            find(wrong)


def test_a_new_metric_is_measured_compared_and_left_out_where_it_cannot_be() -> None:
    y, p = np.array([0, 1, 1, 0]), np.array([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [1, 0]])
    measured = compute_metrics(y, p, groups=list("abcd"), n_resamples=50)
    assert measured["metrics"]["new_metric"]["value"] == pytest.approx((1 + 2 + 1 + 0) / 4)
    low, high = measured["metrics"]["new_metric"]["ci95"]
    assert 0 <= low < 1 < high <= 3
    y, p = np.tile(y, 3), np.tile(p, (3, 1))
    runs = [PairedRun(0, y, list("abcdefghijkl"), p, np.eye(2)[y])]
    row = paired_differences(runs, ["new_metric"], n_resamples=50)["new_metric"]
    assert row["value"] == pytest.approx(-1)
    assert row["verdict"] == "better"  # lower is better, says the row


def test_new_entries_serve_the_command_line(glovlm: Glovlm, tmp_path: Path) -> None:
    for command, name in (("methods", "new_method"), ("backbones", "new_backbone")):
        done = glovlm(command, "--json")
        assert name in [row["name"] for row in json.loads(done.out)]
    data, run = tiny_images(tmp_path / "data"), tmp_path / "run"
    options = ("--shots", 2, "--n-resamples", 20, "--device", "cpu", "--no-cache")
    own = ("--backbone", "new_backbone", "--method", "new_method")
    done = glovlm("train", "--data", data, "--output-dir", run, *own, *options)
    assert done.code == 0, done.err
    assert "New metric" in done.out
    assert "New metric" in (run / "README.md").read_text()
    output = tmp_path / "measured.json"
    done = glovlm(
        "evaluate", run, "--data", data, "--output", output, "--allow-seen", "--n-resamples", 20
    )
    assert done.code == 0, done.err
    assert json.loads(output.read_text())["metrics"]["new_metric"]["value"] > 0
    image = next(data.rglob("*.png"))
    done = glovlm("explain", run, image, "--output-dir", tmp_path / "maps", "--method", "new_map")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "maps" / "new_map.json").read_text())["method"] == "New map"
    done = glovlm("explain", run, image, "--output-dir", tmp_path / "maps", "--method", "new")
    assert done.code == 2
    assert all(name in done.err for name in HEAT_MAPS)


def test_a_new_aggregator_serves_the_command_line(glovlm: Glovlm, tmp_path: Path) -> None:
    features, labels, _ = make_cohort(tmp_path / "features", slides=12, tiles=12, per_patient=2)
    own = ("--features", features, "--labels", labels, "--output-dir", tmp_path / "run")
    options = ("--epochs", 1, "--n-resamples", 20, "--device", "cpu", "--set", "width=8")
    done = glovlm("mil", *own, *options, "--aggregator", "new_pooling")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["aggregator"]["name"] == "new_pooling"
    assert "new_metric" in results["metrics"]
    done = glovlm("mil", *own, *options, "--aggregator", "new", "--overwrite")
    assert done.code == 2
    assert all(name in done.err for name in AGGREGATORS)
