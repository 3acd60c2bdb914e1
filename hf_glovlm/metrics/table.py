"""The table of metrics: a row carries all that is known of a metric, its function too.

Undefined is not zero. A mean over classes (balanced accuracy, macro-AUC, macro-F1) is undefined in
a resample where a class of the labels vanished, because the mean over the remaining classes is
another quantity. Such resamples are left out of the interval and counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .resamples import Floats, Ints, Resamples, Sample, Statistic, mean_of

Scale = Literal["log-odds", "plain", "likelihood", "none"]

ECE_BINS = 15
SMALLEST = float(np.finfo(np.float64).eps)  # probability of the log loss; scikit-learn's, too


def _bin_gaps(sample: Sample) -> Floats:
    """Accuracy minus confidence of each image, in the column of its confidence's bin."""
    confidence = sample.probabilities.max(1, keepdims=True)
    gaps: Floats = np.eye(ECE_BINS)[confidence_bins(confidence[:, 0])] * (sample.right - confidence)
    return gaps


def _own_cosine(sample: Sample) -> Floats:
    assert sample.similarities is not None  # rows of similarities are left out without
    return np.take_along_axis(sample.similarities, sample.labels[:, None], axis=1)[:, 0]


def _cosine_gap(sample: Sample) -> Floats:
    assert sample.similarities is not None
    own, n_classes = _own_cosine(sample), sample.similarities.shape[1]
    gap: Floats = own - (sample.similarities.sum(1) - own) / (n_classes - 1)
    return gap


def _macro_f1(resamples: Resamples) -> Floats:
    # scikit-learn does so with labels=range(K), zero_division=0. Its default, labels=None, is the
    # mean over the classes in labels or predictions: an absent class does not count.
    hits, actual = resamples.hits, resamples.actual
    f1 = np.divide(2 * hits, actual + resamples.predicted, out=np.zeros_like(hits), where=hits > 0)
    vanished = (actual[resamples.present] == 0).any(0)
    return np.where(vanished, np.nan, f1.mean(0))


def _log_loss(sample: Sample) -> Floats:
    own = np.take_along_axis(sample.probabilities, sample.labels[:, None], axis=1)[:, 0]
    loss: Floats = -np.log(np.maximum(own, SMALLEST))
    return loss


def _note_clipped(sample: Sample) -> str:
    own = np.take_along_axis(sample.probabilities, sample.labels[:, None], axis=1)
    clipped = int((own < SMALLEST).sum())
    return f"{clipped} of the labels had a probability below {SMALLEST:.2g}" if clipped else ""


def _squared_steps(sample: Sample) -> Floats:
    assert sample.grades is not None  # rows of grades are left out without
    steps: Floats = (sample.grades[sample.labels] - sample.grades[sample.top]).astype(np.float64)
    return steps**2


def _quadratic_kappa(resamples: Resamples) -> Floats:
    grades = resamples.sample.grades
    assert grades is not None
    steps = (grades[:, None] - grades).astype(np.float64) ** 2
    chance = np.einsum("ar,ap,pr->r", resamples.actual, steps, resamples.predicted, optimize=True)
    kappa: Floats = 1 - resamples.total(_squared_steps)[0] * resamples.n / chance
    return kappa  # all of one grade, labels and predictions: 0 / 0


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`: all that is known of a metric, so that a row is all it takes to add one.

    Attributes:
        title: In tables.
        definition: In one sentence.
        higher_is_better: None where a metric describes and does not rank.
        function: From resamples to a value each, `[R]`, NaN where undefined; see also `mean_of`.
        bounds: The lowest and the highest value.
        interval: On `log-odds`, for a fraction of its range; on the `plain` scale; on that of the
            `likelihood`, for its negative logarithm; or `none`, where its bootstrap is biased. By
            default log-odds from 0 to 1, else plain.
        of_similarities: Whether it needs cosines of images and class texts; else it is left out.
        of_grades: Whether it needs classes that are grades; else it is left out.
        over_classes: Whether it is a mean over classes; its note then names those without labels.
        summarised: Whether the report of a study has a column for it.
        hub_name: What the Hub calls it, if otherwise.
        caveat: From the sample to what its note adds; empty for nothing.
        reading: How to read it, for a pathologist: range, what is good, what it hides.
    """

    title: str
    definition: str
    higher_is_better: bool | None
    function: Statistic
    bounds: tuple[float, float] = (0.0, 1.0)
    interval: Scale | None = None
    of_similarities: bool = False
    of_grades: bool = False
    over_classes: bool = False
    summarised: bool = True
    hub_name: str | None = None
    caveat: Callable[[Sample], str] | None = None
    reading: str = ""

    @property
    def scale(self) -> Scale:
        """Scale of its interval, `interval` with the default filled in."""
        return self.interval or ("log-odds" if self.bounds == (0, 1) else "plain")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "Accuracy",
        "Fraction of images whose top class is right.",
        True,
        lambda r: r.hits.sum(0) / r.n,
        summarised=False,
        reading="Of 100 images, how many got the right class as their first; 0 to 1, 1 is best. A "
        "common class decides it: naming every image `normal` is right in 90 of 100 where "
        "90 are normal.",
    ),
    "balanced_accuracy": Metric(
        "Balanced accuracy",
        "Mean recall over the classes present in the labels.",
        True,
        lambda r: (r.hits / r.actual)[r.present].mean(0),
        over_classes=True,
        reading="Of the images of each class, the share that was recognised, averaged over the "
        "classes; 0 to 1, and guessing among K classes gives 1/K. Rare classes count as "
        "much as common ones. It hides how many false alarms a rare lesion brings, and "
        "which class is missed: see the confusion matrix.",
    ),
    "macro_auc": Metric(
        "Macro-AUC",
        "Mean over the classes present in the labels of the one-vs-rest area under the ROC curve "
        "(Mann-Whitney; a tie counts one half).",
        True,
        lambda r: r.auc[r.present].mean(0),
        over_classes=True,
        hub_name="roc_auc",
        reading="How well a class's images are ranked above those of other classes: the chance "
        "that one of the class gets the higher probability. 0.5 is guessing, 1 is perfect "
        "order. It does not depend on a threshold or on how common a class is, so it "
        "hides wrong thresholds, wrong probabilities and the many false alarms of a rare "
        "class.",
    ),
    "auprc": Metric(
        "AUPRC",
        "Mean over the classes present in the labels of the one-vs-rest average precision (no "
        "interpolation; images of one score enter together).",
        True,
        lambda r: r.average_precision[r.present].mean(0),
        over_classes=True,
        hub_name="average_precision",
        reading="Of the images that are named as a class, the share that is right (precision), "
        "averaged along the way from the surest to the least sure; 1 is best. Guessing "
        "gives the share of the class among the images (its prevalence), and not one "
        "half: 0.3 is good for a lesion in 2 of 100 images and poor for one in 30. So "
        "compare it between methods on the same images and never between data sets.",
    ),
    "macro_f1": Metric(
        "Macro-F1",
        "Mean F1 over all classes of the task; an absent class counts 0.",
        True,
        _macro_f1,
        over_classes=True,
        hub_name="f1",
        reading="For each class the balance of what was missed and what was falsely named (F1), "
        "averaged over the classes; 0 to 1, 1 is best. It depends on how common the "
        "classes are in these images, so do not compare it between data sets.",
    ),
    "ece": Metric(
        "ECE",
        "Calibration error of the top class over 15 equal bins (lower, upper].",
        False,
        lambda r: np.abs(r.total(_bin_gaps)).sum(0) / r.n,
        interval="none",
        reading="How far stated certainty and truth lie apart: of images at 0.8, about 80 in 100 "
        "should be right. 0 is best; 0.1 means that the certainty is off by 10 points on "
        "average. It says nothing about telling classes apart: who always states the "
        "share of the commonest class has an ECE near 0. Small samples look worse than "
        "they are, so it has no interval.",
    ),
    "brier": Metric(
        "Brier",
        "Mean squared error summed over classes, 0 to 2.",
        False,
        mean_of(lambda sample: ((sample.probabilities - sample.one_hot) ** 2).sum(1)),
        bounds=(0.0, 2.0),
        interval="log-odds",
        summarised=False,
        hub_name="brier_score",
        reading="Mean squared distance of the stated probabilities from the truth; 0 is best and "
        "2 is being surely wrong every time. Stating 1/K for each of K classes gives 1 - "
        "1/K. It rewards order and honest certainty together, so it does not say which of "
        "the two is at fault.",
    ),
    "nll": Metric(
        "NLL",
        "Mean negative log-likelihood of the right class, in nats; a probability below 2.2e-16 "
        "counts as that.",
        False,
        mean_of(_log_loss),
        bounds=(0.0, float(-np.log(SMALLEST))),
        interval="likelihood",
        summarised=False,
        caveat=_note_clipped,
        reading="How surprised the model is by the right class, on average; 0 is best, and "
        "stating 1/K for each of K classes gives log K (0.69 for two, 1.61 for five). One "
        "image that is surely wrong can decide it. It rewards order and honest certainty "
        "together, and punishes being sure and wrong harder than the Brier score does.",
    ),
    "boundary_margin": Metric(
        "Boundary margin",
        "Mean of the largest minus the second largest probability.",
        None,
        mean_of(lambda sample: np.diff(np.partition(sample.probabilities, -2)[:, -2:])[:, 0]),
        summarised=False,
        reading="How far the first class lies ahead of the second, in probability, on average; 0 "
        "is undecided, 1 is sure. It describes the model's certainty and not whether it "
        "is right.",
    ),
    "quadratic_kappa": Metric(
        "Quadratic kappa",
        "Cohen's kappa of label and top class with the squared number of grades between as weight "
        "(Cohen 1968), for classes that are grades.",
        True,
        _quadratic_kappa,
        bounds=(-1.0, 1.0),
        interval="log-odds",
        of_grades=True,
        summarised=False,
        reading="Agreement on grades beyond chance, where a mistake of two grades counts four "
        "times one of a single grade; 1 is perfect, 0 is chance, below 0 is worse. It "
        "depends on how common the grades are, and a model that always stays near the "
        "middle can look good. See the confusion matrix for which grades are confused.",
    ),
    "alignment": Metric(
        "Alignment",
        "Mean cosine of an image and the text of its class.",
        None,
        mean_of(_own_cosine),
        bounds=(-1.0, 1.0),
        of_similarities=True,
        summarised=False,
        reading="How alike an image and the words for its class are to the model (cosine); -1 to "
        "1. Values of one model differ from those of another, so do not compare them "
        "between backbones. A high value does not mean that the right class wins: see the "
        "similarity gap.",
    ),
    "similarity_gap": Metric(
        "Similarity gap",
        "Alignment minus the mean cosine with the other classes.",
        None,
        mean_of(_cosine_gap),
        bounds=(-2.0, 2.0),
        of_similarities=True,
        summarised=False,
        reading="How much closer an image lies to the words for its own class than to those for "
        "the others, on average; above 0 is the right way round. A few very clear images "
        "can hide many that are wrong. It cannot be compared between backbones.",
    ),
}
# What every class has beside its counts: functions to `[K, R]`, under keys that no metric has.
PER_CLASS: dict[str, Statistic] = {
    "recall of a class": lambda r: r.hits / r.actual,
    "specificity of a class": lambda r: (r.n - r.actual - r.predicted + r.hits) / (r.n - r.actual),
    "auc of a class": lambda r: r.auc,
    "auprc of a class": lambda r: r.average_precision,
}


def confidence_bins(confidence: Floats) -> Ints:
    """Bin of the ECE, 0 ... 14, of each confidence, `[n]`; a bin holds its upper end."""
    return np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], confidence, side="left")
