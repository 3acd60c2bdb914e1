"""hf-glovlm: few-shot adaptation of vision-language models to fine-grained glomerulus classes.

Every public name is imported when it is first used. transformers' Auto classes know the model as
soon as they are imported. Research use only, not for diagnosis.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # public names, by the module that holds them; for type checkers in __init__.pyi
    "backbones": ("BACKBONES", "load_backbone"),
    "data": (
        "check_dataset",
        "describe_reading",
        "draw_episode",
        "group_rows",
        "load_classes",
        "load_dataset",
        "load_episode",
        "open_image",
    ),
    "data.outlines": ("open_outlined",),
    "errors": ("GloVLMError",),
    "inference": (
        "Engine",
        "FeatureCache",
        "MemoryCache",
        "Predictions",
        "embed_images",
        "embed_prompts",
        "load_classifier",
        "open_engine",
        "predict",
    ),
    "inference.outlines": ("outline_notes",),
    "inference.sentences": (
        "build_zero_shot",
        "copy_sharing_weights",
        "describe_classes",
        "describe_image_scale",
        "describe_limits",
        "describe_predictions",
    ),
    "lab.phantoms": ("render_cohort", "write_cohort"),
    "methods": ("METHODS", "target_modules"),
    "metrics": ("compute_metrics", "evaluate_metric", "paired_differences"),
    "model": ("GloVLMConfig", "GloVLMForImageClassification", "GloVLMModel", "GloVLMProcessor"),
    "publish.adapter_only": ("load_published",),
    "publish.licences": ("check_publishing",),
    "publish.staging": ("check_identifiers",),
    "publish.onnx_graph": ("export_model",),
    "publish.upload": ("push",),
    "reports": ("write_report",),
    "runs": ("RunResult", "TrainConfig", "run"),
    "runs.comparison": ("compare_runs",),
    "runs.cross_validation": ("frozen_methods", "leave_patients_out"),
    "runs.evaluation": ("evaluate",),
    "runs.study": ("StudyConfig", "run_study"),
    "slides.classify": ("classify_slides",),
    "slides.config": ("SlideConfig",),
    "slides.mil": ("MilConfig", "train_mil"),
    "training": ("AdaptConfig", "adapt", "adapt_features"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", "explain", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "explain":
        return import_module(f"{__name__}.explain")
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AutoClasses(MetaPathFinder):
    """Registers the model with transformers' Auto classes once any of these was imported.

    Registering needs the classes of both sides, hence torch: some seconds, which a process that
    only asks for help or reads a table need not wait for. Modules of transformers import each
    other in circles, so registering waits until the outermost one is complete.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module of transformers as usual; look for Auto classes once it was executed."""
        if fullname.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if not self.depth and _auto_classes_imported() and self in sys.meta_path:
                sys.meta_path.remove(self)
                import_module(f"{__name__}.model")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _auto_classes_imported() -> bool:
    return any(name.startswith("transformers.models.auto.") for name in sys.modules)


if _auto_classes_imported():
    import_module(f"{__name__}.model")
else:
    sys.meta_path.insert(0, _AutoClasses())
