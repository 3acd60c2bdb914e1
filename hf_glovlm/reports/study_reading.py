"""How to read the figures of a study's report and of a comparison."""

__all__ = ["READING"]

READING = {
    "first": (
        "A study runs every method several times, each time with other labelled images (a label "
        "draw), and tests it on patients that gave none. The best of several lines looks better "
        "than it is, since luck is chosen along with skill; the difference from a reference that "
        "was named before, with its interval, is the safer number."
    ),
    "goals": (
        "Goals stand in the study's configuration, so they were written before the run. A missed "
        "one is a result like any other."
    ),
    "curves": (
        "Each line is the mean over label draws; its band is the 95% interval over patients "
        "crossed with draws: what could be expected with other patients and other labelled "
        "images. Look first whether a line still rises at its right end, where more labels would "
        "help. Bands that overlap do not show that two methods are alike, because both were "
        "tested on the same patients: the paired differences below answer that."
    ),
    "levels": (
        "Each dot is the mean over label draws, its line the 95% interval over patients crossed "
        "with draws. The filled one is the reference. Overlapping lines do not show that methods "
        "are alike: see the paired differences."
    ),
    "grid": (
        "Darker is higher. The frame marks the best number of each column; a lead of a few "
        "thousandths is seldom more than luck. Read down a column to choose a method for the "
        "labels you have."
    ),
    "forest": (
        "Each dot is how much better (right of the line) or worse (left) a method is than the "
        "reference, draw by draw on the same patients; the line is its 95% interval over patients "
        "crossed with draws. Where it crosses 0, these patients cannot tell the two apart, which "
        "does not prove them equal. Of many comparisons some exclude 0 by chance: Holm's p "
        "accounts for all of them, and a dot is filled where it is below .05."
    ),
    "cost": (
        "Up is better, left is cheaper. A method right of and below another is not worth its cost "
        "here. Seconds depend on the machine and on what was kept in the cache of features; "
        "trainable parameters do not. What costs nothing stands at 1, since the axis may be "
        "logarithmic."
    ),
    "map": (
        "Each point is an image, as the backbone sees it before any adaptation, along the two "
        "directions in which the images differ most (principal components). Classes that lie "
        "apart can be learned from few labels. Classes that overlap here may still be separable "
        "in other directions: two of hundreds are shown, with the part of the variance that they "
        "hold. Stars are the texts of the classes; images and texts are each centred, so compare "
        "directions, not distances. If points gather by something else than class, it may be "
        "stain or scanner: the data audit looks for that."
    ),
    "controls": (
        "Controls know nothing of the lesion: the size of an image, statistics of its file, what "
        "lies outside of the outline, or labels that were shuffled. They should lie at chance "
        "(the line). One above it says that the classes can be guessed without looking at the "
        "glomerulus, and that part of every number here may come from that."
    ),
    "summary": (
        "Every line that was run is here, also those that lost. The value is the mean over label "
        "draws with its 95% interval where there is one; the spread is the standard deviation "
        "over draws, which redraw the same patients, so it is no interval. A click on a head "
        "sorts."
    ),
    "cells": (
        "One row a run: a backbone, a method, a number of labels, a draw. Single cells vary by "
        "luck; look here for outliers, not for winners."
    ),
    "failures": (
        "A cell that failed is missing from every mean above. It is tried again when the study is "
        "run again; finished cells are kept."
    ),
    "compared": (
        "Both runs were tested on the same images, so each image is compared with itself. The "
        "difference is the second run's value less the first's; its interval comes from drawing "
        "whole patients again and again. Where it crosses 0, these patients cannot tell the two "
        "apart."
    ),
    "right": (
        "Images that one of both names right, and the other wrong, are all that two runs differ in "
        "where the first class counts. If both numbers are small, so is the difference, whatever "
        "its p-value. No p-value is computed from these counts, since the images of one patient "
        "are not independent."
    ),
}
