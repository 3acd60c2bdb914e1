"""Nearest support images of a model that keeps their features."""

from pathlib import Path

import numpy as np
import pytest
from test_explain import classifier
from tiny import CLASSES, tiny_clip, tiny_images

from hf_glovlm import adapt, embed_images, load_dataset
from hf_glovlm.data.splits import all_rows
from hf_glovlm.errors import GloVLMError
from hf_glovlm.explain import nearest_support


def test_the_nearest_support(tmp_path: Path) -> None:
    folder = tiny_images(tmp_path / "images", per_class=2)
    rows = all_rows(load_dataset(folder))
    adapted = adapt(str(tiny_clip()), "tip_adapter", rows)
    model, labels = adapted.model, [CLASSES[k] for k in rows["label"][:]]
    features = embed_images(model.glovlm, adapted.processor, rows)
    observed = nearest_support(model, features, k=2)
    assert observed.indices[:, 0].tolist() == list(range(6))
    assert [row[0] for row in observed.labels] == labels
    np.testing.assert_allclose(observed.cosines[:, 0], 1, atol=1e-5)
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    second = np.sort(unit @ unit.T, axis=1)[:, -2]
    np.testing.assert_allclose(observed.cosines[:, 1], second, atol=1e-5)
    assert nearest_support(model, features[:1], k=99).indices.shape == (1, 6)
    with pytest.raises(GloVLMError, match="of this model"):
        nearest_support(model, features[:, :5])
    with pytest.raises(GloVLMError, match="1 neighbour"):
        nearest_support(model, features, k=0)
    with pytest.raises(GloVLMError, match="'class_weights'"):
        nearest_support(classifier("clip")[0], features)
