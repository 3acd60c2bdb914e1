"""Public names for type checkers; `__init__.py` brings each in when it is first used."""

from . import explain as explain
from .backbones import BACKBONES as BACKBONES
from .backbones import load_backbone as load_backbone
from .data import check_dataset as check_dataset
from .data import describe_reading as describe_reading
from .data import draw_episode as draw_episode
from .data import group_rows as group_rows
from .data import load_classes as load_classes
from .data import load_dataset as load_dataset
from .data import load_episode as load_episode
from .data import open_image as open_image
from .data.outlines import open_outlined as open_outlined
from .errors import GloVLMError as GloVLMError
from .inference import Engine as Engine
from .inference import FeatureCache as FeatureCache
from .inference import MemoryCache as MemoryCache
from .inference import Predictions as Predictions
from .inference import embed_images as embed_images
from .inference import embed_prompts as embed_prompts
from .inference import load_classifier as load_classifier
from .inference import open_engine as open_engine
from .inference import predict as predict
from .inference.outlines import outline_notes as outline_notes
from .inference.sentences import build_zero_shot as build_zero_shot
from .inference.sentences import copy_sharing_weights as copy_sharing_weights
from .inference.sentences import describe_classes as describe_classes
from .inference.sentences import describe_image_scale as describe_image_scale
from .inference.sentences import describe_limits as describe_limits
from .inference.sentences import describe_predictions as describe_predictions
from .lab.phantoms import render_cohort as render_cohort
from .lab.phantoms import write_cohort as write_cohort
from .methods import METHODS as METHODS
from .methods import target_modules as target_modules
from .metrics import compute_metrics as compute_metrics
from .metrics import evaluate_metric as evaluate_metric
from .metrics import paired_differences as paired_differences
from .model import GloVLMConfig as GloVLMConfig
from .model import GloVLMForImageClassification as GloVLMForImageClassification
from .model import GloVLMModel as GloVLMModel
from .model import GloVLMProcessor as GloVLMProcessor
from .publish.adapter_only import load_published as load_published
from .publish.licences import check_publishing as check_publishing
from .publish.onnx_graph import export_model as export_model
from .publish.staging import check_identifiers as check_identifiers
from .publish.upload import push as push
from .reports import write_report as write_report
from .runs import RunResult as RunResult
from .runs import TrainConfig as TrainConfig
from .runs import run as run
from .runs.comparison import compare_runs as compare_runs
from .runs.cross_validation import frozen_methods as frozen_methods
from .runs.cross_validation import leave_patients_out as leave_patients_out
from .runs.evaluation import evaluate as evaluate
from .runs.study import StudyConfig as StudyConfig
from .runs.study import run_study as run_study
from .slides.classify import classify_slides as classify_slides
from .slides.config import SlideConfig as SlideConfig
from .slides.mil import MilConfig as MilConfig
from .slides.mil import train_mil as train_mil
from .training import AdaptConfig as AdaptConfig
from .training import adapt as adapt
from .training import adapt_features as adapt_features

__version__: str
__all__ = [
    "BACKBONES",
    "METHODS",
    "AdaptConfig",
    "Engine",
    "FeatureCache",
    "GloVLMConfig",
    "GloVLMError",
    "GloVLMForImageClassification",
    "GloVLMModel",
    "GloVLMProcessor",
    "MemoryCache",
    "MilConfig",
    "Predictions",
    "RunResult",
    "SlideConfig",
    "StudyConfig",
    "TrainConfig",
    "__version__",
    "adapt",
    "adapt_features",
    "build_zero_shot",
    "check_dataset",
    "check_identifiers",
    "check_publishing",
    "classify_slides",
    "compare_runs",
    "compute_metrics",
    "copy_sharing_weights",
    "describe_classes",
    "describe_image_scale",
    "describe_limits",
    "describe_predictions",
    "describe_reading",
    "draw_episode",
    "embed_images",
    "embed_prompts",
    "evaluate",
    "evaluate_metric",
    "explain",
    "export_model",
    "frozen_methods",
    "group_rows",
    "leave_patients_out",
    "load_backbone",
    "load_classes",
    "load_classifier",
    "load_dataset",
    "load_episode",
    "load_published",
    "open_engine",
    "open_image",
    "open_outlined",
    "outline_notes",
    "paired_differences",
    "predict",
    "push",
    "render_cohort",
    "run",
    "run_study",
    "target_modules",
    "train_mil",
    "write_cohort",
    "write_report",
]
