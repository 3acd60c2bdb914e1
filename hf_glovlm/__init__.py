"""hf-glovlm: few-shot adaptation of image-text models to fine-grained glomerulus classes.

Research use only, not for diagnosis.
"""

__version__ = "0.1.0"
