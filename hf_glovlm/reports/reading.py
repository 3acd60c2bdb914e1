"""How to read the figures and tables of reports: texts, by what they explain.

Those of the measures stand in `METRICS` (`Metric.reading`). The documentation has the same texts.
"""

__all__ = ["READING"]

READING: dict[str, str] = {
    # ------------------------------------------------------------------------ a run's report
    "sentence": (
        "Right means: the class with the highest probability is the class in the data. The "
        "interval is for new patients of the same kind, stained and scanned alike: were the test "
        "repeated on other such patients, about 95 of 100 intervals would hold the true share. It "
        "does not cover another laboratory, nor errors in the labels."
    ),
    "interval": (
        "Images of one patient resemble each other, so whole patients are drawn, with all their "
        "images, and not images one by one. With few patients the interval is wide, and that is "
        "the honest answer. Without patients in the data the interval is over images: too narrow."
    ),
    "baseline": (
        "What always naming the commonest class would reach. A model that lies close to it has "
        "learned little, however high its accuracy looks."
    ),
    "per_patient": (
        "Each dot is one patient, the lowest share first; the number of images stands in the "
        "table. A good mean can hide a patient who is wrong throughout: look there first, "
        "for stain, scanner or a label that is wrong."
    ),
    "mistakes": (
        "The errors of which the model was surest come first. Look for a label that is wrong, a "
        "bad crop, a stain that it has not seen, or a lesion that a person would argue about. "
        "Errors at low probability are expected; sure errors are the ones to explain."
    ),
    "heat_maps": (
        "Where in the image the score of the named class comes from. Warm is more. A map says "
        "where the model looked and not why; `glovlm explain-check` measures how faithful such "
        "maps are."
    ),
    "split": (
        "One mark is one patient, with the number of their images on that side. Support is what "
        "the model learned from; validation chose settings; calibration fitted the probabilities; "
        "test is what is measured here. No patient is on two sides, so that the numbers are for "
        "new patients."
    ),
    "metrics": (
        "Each measure asks another question. Read the one that fits your use, fixed beforehand, "
        "and not the highest. The interval tells how far chance among the patients may carry it."
    ),
    "per_class": (
        "Recall (sensitivity) is the share of a class's images that were named so; specificity is "
        "the share of other images that were not. AUC is how well the class is ranked above the "
        "others, at any threshold. A class with few patients has a wide interval: say so when you "
        "quote its number."
    ),
    "confusion": (
        "A row is the class in the data, a column the class that the model named. The diagonal is "
        "right. The shade is the share of the row; the number counts images. Look for one strong "
        "cell outside of the diagonal: these two classes are confused."
    ),
    "roc": (
        "Each point is one threshold on the probability of the class. Up: the share of its images "
        "that are found (sensitivity). Right: the share of other images that are falsely named "
        "(1 - specificity). The upper left corner is best, the diagonal is guessing. The band is "
        "the 95% interval over patients at each point. The curve does not know how rare the class "
        "is: see precision and recall."
    ),
    "precision_recall": (
        "Each point is one threshold. Right: the share of the class's images that are found "
        "(recall). Up: the share of the named images that are right (precision). The dashed line "
        "is guessing: how common the class is here. Precision falls where the class is rarer than "
        "in these data, so it does not carry over to another mix of classes."
    ),
    "threshold": (
        "Asked for one class alone: its probability against a threshold that was chosen on other "
        "patients than those measured here, where the sum of sensitivity and specificity was "
        "largest. A threshold that the test images choose looks better than it is. For your own "
        "use choose it by what a miss and a false alarm cost."
    ),
    "reliability": (
        "Images are gathered by how sure the model was. On the diagonal certainty and truth agree: "
        "of the images at 0.8, 80 in 100 are right. Below the diagonal the model is too sure. "
        "Points of few images scatter; their number is in the table."
    ),
    "sets": (
        "Instead of one class the model may name several, so that the right one is among them as "
        "often as promised. Small sets are useful, large ones are honest doubt. The promise holds "
        "for patients like those of the calibration."
    ),
    "abstention": (
        "The model may keep silent where it is unsure. Coverage is the share of images that it "
        "answers for, risk the share of errors among these."
    ),
    "controls": (
        "The same task without the tissue: from the size of the image or its file, from what lies "
        "outside of the outline, or with the labels shuffled. All of them should be near chance. "
        "One that is clearly above it shows that the labels can be guessed without looking at the "
        "glomerulus, and then the model's own number may be built on that, too."
    ),
    "subgroups": (
        "The same measures on the images of one stain, scanner or kind of kidney alone. A group "
        "of few patients has a wide interval: a difference counts only where the intervals lie "
        "apart."
    ),
    "budget": (
        "Every label that had a part in this model: those it learned from, those that chose its "
        "settings, those that calibrated it, and those of the runs that its backbone came from. "
        "Compare methods at the same budget; labels of the test are not among them."
    ),
    "cost": (
        "Wall-clock seconds of this run on this machine, the largest memory at one time, and how "
        "many numbers were trained. Seconds of two machines, or of a busy one, do not compare."
    ),
}
