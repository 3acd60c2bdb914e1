"""A tracker of Accelerate that remembers what it is given."""

from typing import Any, ClassVar

from accelerate.tracking import GeneralTracker, on_main_process


class Remembers(GeneralTracker):
    """Keeps each call's step and values in `rows`; Accelerate makes the instance itself."""

    name = "remembers"
    requires_logging_directory = False
    rows: ClassVar[list[tuple[int | None, dict[str, Any]]]] = []

    def __init__(self, project: str = "test", **_: Any) -> None:
        super().__init__()
        self.rows.clear()

    @property
    def tracker(self) -> "Remembers":
        return self

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The settings, which no test asks for."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))
