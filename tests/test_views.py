"""Augmented views: which images have them, how often they are encoded, and how much they weigh."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import Glovlm
from datasets import Dataset
from PIL import Image
from tiny import tiny_clip, tiny_images, tiny_pair
from tolerance import assert_same_numbers

from hf_glovlm.backbones import load_backbone
from hf_glovlm.data import all_rows, load_dataset
from hf_glovlm.errors import GloVLMError
from hf_glovlm.inference import MemoryCache, embed_images
from hf_glovlm.methods import METHODS, FeatureMethod, HeadMethod, Support
from hf_glovlm.runs.study import StudyConfig
from hf_glovlm.training import adapt
from hf_glovlm.training.adaptation import _leave_groups_out
from hf_glovlm.training.loop import fit
from hf_glovlm.training.losses import HeadStep

ON_FEATURES = [n for n, m in METHODS.items() if isinstance(m, FeatureMethod | HeadMethod)]
CLOSED = [n for n in ON_FEATURES if isinstance(METHODS[n], FeatureMethod)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images, four patients."""
    return tiny_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Dataset:
    return all_rows(load_dataset(folder))


def picture(size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------- the views


def test_a_view_is_decided_by_its_key() -> None:
    from hf_glovlm.inference.views import draw_view, view_key

    keys = {view_key(b"content", seed, number) for seed in range(3) for number in range(4)}
    assert len(keys) == 12
    assert view_key(b"other", 0, 0) not in keys
    views = [draw_view(picture(), key) for key in sorted(keys)]
    again = [draw_view(picture(), key) for key in sorted(keys)]
    assert [v.tobytes() for v in views] == [v.tobytes() for v in again]
    assert len({v.tobytes() for v in views}) == 12
    for view in views:
        assert view.mode == "RGB"
        assert 0.45 <= view.width * view.height / 1200 <= 1


def test_stains_are_jittered_where_they_are_and_glass_stays_white() -> None:
    from hf_glovlm.inference.views import STAINS, jitter_stains

    density = np.concatenate([0.8 * STAINS, np.zeros((1, 3)), STAINS.mean(0, keepdims=True)])
    pixels = (256 * np.exp(-density) - 1).round().astype(np.uint8)[None]
    image = Image.fromarray(pixels)
    assert np.asarray(jitter_stains(image, np.ones(3))).tolist() == pixels.tolist()
    more = np.asarray(jitter_stains(image, np.array([1.5, 1, 1])))[0].astype(float)
    assert np.abs(more[0] - (256 * np.exp(-1.2 * STAINS[0]) - 1)).max() < 2.5
    assert np.abs(more[1:4] - pixels[0, 1:4]).max() <= 1
    assert more[3].tolist() == [255, 255, 255]
    assert (more[4] < pixels[0, 4]).any()


def test_views_are_encoded_once_and_never_taken_for_the_image(rows: Dataset) -> None:
    model, processor = load_backbone(str(tiny_clip()))
    some, cache = rows.select(range(3)), MemoryCache()
    plain = embed_images(model, processor, some, cache=cache)
    views = embed_images(model, processor, some, cache=cache, views=4, seed=1)
    assert views.shape == (12, plain.shape[1])
    assert len(cache._vectors) == 3 + 12
    assert np.abs(views.reshape(3, 4, -1) - plain[:, None]).max(2).min() > 1e-4
    other = embed_images(model, processor, some, cache=cache, views=4, seed=2)
    assert np.abs(other - views).max(1).min() > 1e-4
    model.pool_images = None  # nothing is encoded again
    assert_same_numbers(embed_images(model, processor, some, cache=cache, views=4, seed=1), views)
    fewer = embed_images(model, processor, some.select([2]), cache=cache, views=2, seed=1)
    assert_same_numbers(fewer, views[8:10])
    assert_same_numbers(embed_images(model, processor, some, cache=cache), plain)


# ------------------------------------------------------------------------------ how much they weigh


def make_support(views: int = 0, spread: float = 0.0) -> Support:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    centres = torch.randn(3, 10, generator=generator)
    features = centres[labels] + torch.randn(6, 10, generator=generator)
    texts = torch.nn.functional.normalize(centres, dim=1)
    support = Support(features, labels, 3, texts, 20.0, query=torch.randn(9, 10), validation=None)
    if not views:
        return support
    noise = spread * torch.randn(6, views, 10, generator=generator)
    return replace(support, views=features.unsqueeze(1) + noise)


@pytest.mark.parametrize("name", sorted(set(CLOSED) - {"zero_shot"}))
def test_views_that_show_the_image_itself_change_nothing(name: str) -> None:
    """A label counts once, however many views of its image there are."""
    method: Any = METHODS[name]
    torch.manual_seed(0)
    supports = make_support(), make_support(views=3)
    supports = tuple(replace(s, query=supports[0].query) for s in supports)
    one, many = (method.fit(s, method.Config()).head for s in supports)
    x = torch.randn(5, 10)
    torch.testing.assert_close(many(x), one(x), atol=1e-4, rtol=1e-4)
    other = method.fit(make_support(views=3, spread=1.0), method.Config()).head
    assert (other(x) - one(x)).abs().max() > 1e-2


def test_a_key_is_the_mean_of_its_images_views_and_a_covariance_holds_them_all() -> None:
    support = make_support(views=5, spread=0.5)
    assert support.views is not None
    unit = support.views / support.views.norm(dim=2, keepdim=True)
    keys = unit.mean(1) / unit.mean(1).norm(dim=1, keepdim=True)
    tip: Any = METHODS["tip_adapter"]
    assert_same_numbers(tip.fit(support, tip.Config()).head.keys, keys)

    u = unit.double()
    means = torch.stack([u[support.labels == k].mean((0, 1)) for k in range(3)])
    scatter = sum(torch.outer(r, r) for r in (u - means[support.labels].unsqueeze(1)).flatten(0, 1))
    scatter = scatter / 5
    trace = scatter.trace() / (6 - 1)
    precision = 10 * torch.linalg.inv(scatter + trace * torch.eye(10).double())
    gda: Any = METHODS["gda"]
    head = gda.fit(support, gda.Config()).head
    weight = 20 * support.texts.double() + 0.1 * means @ precision
    torch.testing.assert_close(head.weight.double(), weight, atol=1e-4, rtol=1e-4)


def test_training_takes_one_view_an_epoch() -> None:
    from hf_glovlm.training.loop import feature_source

    support = make_support(views=3, spread=0.5)
    seen: list[torch.Tensor] = []

    class Watched(torch.nn.Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            seen.append(features.clone())
            return super().forward(features)

    method: Any = METHODS["classifier"]
    recipe = replace(method.recipe(3, method.Config()), epochs=4, batch_size=6)
    head = Watched(10, 3)
    source = feature_source(support.features, support.views, support.labels)
    step = HeadStep(head, lambda: None)
    fit(
        step,
        [{"params": list(head.parameters())}],
        source,
        recipe,
        accelerator=Accelerator(cpu=True),
    )
    assert support.views is not None
    for epoch, features in enumerate(seen):
        shown = support.views[:, epoch % 3]
        assert {tuple(f) for f in features.tolist()} == {tuple(f) for f in shown.tolist()}
    assert len(seen) == 4
    assert len(feature_source(support.features, None, support.labels).fetch([0, 1])) == 2


def test_what_is_left_out_is_measured_as_it_is() -> None:
    support = make_support(views=2, spread=1.0)
    labels = torch.arange(12) % 3
    support = replace(
        support, features=torch.randn(12, 10), views=torch.randn(12, 2, 10), labels=labels
    )
    groups = [f"p{i // 3}" for i in range(12)]
    folds, _ = _leave_groups_out(support, groups, stands_in=True)
    assert len(folds) == 4
    for i, fold in enumerate(folds):
        out = torch.arange(3 * i, 3 * i + 3)
        kept = [j for j in range(12) if j // 3 != i]
        assert support.views is not None
        assert fold.features.equal(support.features[out])
        assert fold.support.views is not None
        assert fold.support.views.equal(support.views[kept])
        assert len(fold.support.labels) == 9


# -------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["gda", "taskres", "prolip", "prompt_tuning"])
@pytest.mark.parametrize("backbone", ["clip", "pair"])
def test_only_the_labelled_images_have_views(name: str, backbone: str, rows: Dataset) -> None:
    model, processor = load_backbone(tiny_pair() if backbone == "pair" else str(tiny_clip()))
    cache = MemoryCache()
    recipe: dict[str, Any] = {} if name == "gda" else {"epochs": 2}
    adapted = adapt(
        model,
        name,
        rows.select(range(0, 24, 4)),
        processor=processor,
        validation=rows.select(range(1, 24, 4)),
        cache=cache,
        config={"views": 3, "recipe": recipe},
    )
    support, validation, views = 6, 6, 6 * 3
    assert len(cache._vectors) == support + validation + views
    assert adapted.facts["views"] == 3
    assert any("3 augmented views of each labelled image" in note for note in adapted.notes)


def test_a_run_with_views_counts_each_label_once_and_says_so(
    folder: Path, tmp_path: Path, glovlm: Glovlm
) -> None:
    shared = ["train", "--data", folder, "--backbone", tiny_clip(), "--shots", 2]
    values = {}
    for views in (0, 4):
        out = tmp_path / str(views)
        arguments = [*shared, "--method", "gda", "--n-resamples", 20, "--output-dir", out]
        done = glovlm(*arguments, *(["--views", views] if views else []))
        assert done.code == 0, done.err
        values[views] = json.loads((out / "results.json").read_text())
    support = values[4]["data"]["support"]
    assert support == values[0]["data"]["support"]
    assert support["label_budget"] == 6
    assert values[4]["config"]["views"] == 4
    assert "4 augmented views" in (tmp_path / "4" / "README.md").read_text()
    assert values[4]["data"]["split_hash"] == values[0]["data"]["split_hash"]


def test_a_study_compares_views_with_none() -> None:
    lines = ["gda", {"name": "gda", "label": "gda_views", "views": 10}]
    given = {"data": "nowhere", "backbone": "mini", "methods": lines, "reference": "gda"}
    study = StudyConfig.from_mapping(given)
    views = {c.method.name: study.train_config(c, "out").views for c in study.cells()}
    assert views == {"gda": 0, "gda_views": 10}


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("lora", "inside the vision tower.*--augment"),
        ("adapter", "inside the vision tower.*--augment"),
        ("zero_shot", "learns from no image"),
    ],
)
def test_views_are_refused_where_they_would_change_nothing(
    method: str, sentence: str, rows: Dataset
) -> None:
    model, processor = load_backbone(str(tiny_clip()))
    with pytest.raises(GloVLMError, match=sentence):
        adapt(model, method, rows.select(range(0, 24, 4)), processor=processor, config={"views": 2})
