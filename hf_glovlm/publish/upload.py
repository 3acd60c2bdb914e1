"""Upload to the Hub: a run is staged and checked, then sent in one commit."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GloVLMError
from .hub_errors import first_line, refusal, worth_waiting
from .licences import Part, check_publishing, describe_licence
from .source import ADAPTER_FILES, BESIDE, MODEL_FILES, PARTS, SHARD, check_repo_id, read_run
from .staging import staged

ATTEMPTS = 4  # of a whole push; the client itself repeats single requests before that
_OURS = (*MODEL_FILES, *ADAPTER_FILES, PARTS, BESIDE)
_COMMIT_WORDS: dict[Part, str] = {"full": "a model", "adapter": "an adapter", "head": "a head"}


@dataclass
class PushReport:
    """Report of an upload, or of one that was only tried out.

    Args:
        repo_id: Where.
        what: `full`, `adapter` or `head`.
        files: Bytes of every file that leaves.
        left_out: What of the run stays here, in sentences.
        notes: What else a reader should know.
        url: Page of the repository; `None` of a dry run.
        commit: The commit; `None` of a dry run.
        commit_url: Its page; `None` of a dry run.
    """

    repo_id: str
    what: Part
    files: dict[str, int]
    left_out: list[str]
    notes: list[str]
    url: str | None = None
    commit: str | None = None
    commit_url: str | None = None


def push(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    adapter_only: bool = False,
    merge: bool = False,
    dry_run: bool = False,
    reason: str | None = None,
    token: str | None = None,
    branch: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> PushReport:
    """Publish a run on the Hub: weights, code, processor, prompts, results and card.

    Everything is first laid out in a temporary folder, and only what lies there is sent: large
    files first, then one commit, which is there whole or not at all. The run is not touched. A push
    that failed is repeated a few times; a later one sends only what is missing.

    No image, no path, no name of a patient, slide or file leaves: results are written from a list
    of fields that may, predictions and episodes stay, and every text is searched for them again.

    Args:
        run: The output folder of `glovlm train`.
        repo_id: `owner/name`.
        private: Whether a new repository is private. An existing one is not changed.
        adapter_only: Leave the base's weights out: the adapter and the head, or the head alone of a
            method that left the towers as they were. `load_published` puts them onto the base.
        merge: Insist on merged weights: the adapter inside the model, as `RUN/model` holds it,
            which is also what is published by default.
        dry_run: Only report what would be published; no repository is asked for or touched.
            (Without the base's weights, these are loaded to compare, from the cache where they
            lie there.)
        reason: Why it may be published, where the licence of the base asks for one.
        token: Of the Hub; by default that of `hf auth login`.
        branch: Where to commit; made if it is not there. By default `main`.
        on_progress: Called with a sentence for each step.

    Raises:
        GloVLMError: The id or the run is wrong, the licence forbids it, something that names a
            person or a place would leave, the disk is full, or the Hub refuses.
    """
    notify = on_progress or (lambda sentence: None)
    check_repo_id(repo_id)
    if adapter_only and merge:
        raise GloVLMError("Give --adapter-only or --merge: an adapter is alone, or merged.")
    finished = read_run(Path(run).expanduser())
    has_adapter = (finished.folder / "adapter" / "adapter_config.json").is_file()
    if merge and not has_adapter:
        method = finished.results["config"]["method"]
        raise GloVLMError(
            f"Method '{method}' left no adapter that could be merged: push without --merge."
        )
    what: Part = "full"
    if adapter_only:
        what = "adapter" if has_adapter else "head"
    check_publishing(finished.config, what, reason)
    if not dry_run:
        _need_token(token)
    notify("Laying out what will leave.")
    with staged(finished, repo_id, what, reason) as stage:
        files = {
            path.relative_to(stage).as_posix(): path.stat().st_size
            for path in sorted(stage.rglob("*"))
            if path.is_file()
        }
        notes = describe_licence(finished.config, what, reason)
        if "cache" in str((finished.config.head or {}).get("kind")):
            notes.append("The head keeps the features of the support images.")
        report = PushReport(repo_id, what, files, finished.left_out, notes)
        if not dry_run:
            _upload(stage, report, private, token, branch, notify)
    return report


def _need_token(token: str | None) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise GloVLMError("HF_HUB_OFFLINE is set, so nothing can be published: unset it.")
    if not (token or get_token()):
        raise GloVLMError(
            "No token of the Hub was found: run `hf auth login` with one that may write, or set "
            "HF_TOKEN."
        )


def _upload(
    stage: Path,
    report: PushReport,
    private: bool,
    token: str | None,
    branch: str | None,
    notify: Callable[[str], None],
) -> None:
    """Send the folder in one commit, again where that may help; fill in the report."""
    hashes: dict[str, bytes] = {}
    for attempt in range(1, ATTEMPTS + 1):
        size = sum(report.files.values()) / 1e6
        notify(f"Sending {len(report.files)} files ({size:.1f} MB) to {report.repo_id}.")
        try:
            commit = _commit(stage, report, private, token, branch, hashes)
        except GloVLMError:
            raise
        except Exception as error:
            # A new push finds what is there already, a commit whose answer was lost included.
            wait = worth_waiting(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                raise refusal(report.repo_id, error, token, "published") from error
            notify(f"{first_line(error)} Trying again in {wait:.0f} s ({attempt} of {ATTEMPTS}).")
            time.sleep(wait)
        else:
            report.url = commit.commit_url.partition("/commit/")[0]
            report.commit, report.commit_url = commit.oid, commit.commit_url
            return


def _commit(
    stage: Path,
    report: PushReport,
    private: bool,
    token: str | None,
    branch: str | None,
    hashes: dict[str, bytes],
) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    api.create_repo(report.repo_id, private=private or None, exist_ok=True)
    if branch is not None:
        api.create_branch(report.repo_id, branch=branch, exist_ok=True)
    there = api.model_info(report.repo_id, revision=branch)
    if private and not there.private:
        raise GloVLMError(
            f"{report.repo_id} exists and is public: make it private on its page, or give another "
            "name. Nothing was published."
        )
    adds = [CommitOperationAdd(name, stage / name) for name in report.files]
    for add in adds:
        if add.path_in_repo in hashes:
            add.upload_info.sha256 = hashes[add.path_in_repo]
        hashes[add.path_in_repo] = add.upload_info.sha256
    # Merged weights and an adapter in one place would be applied twice.
    names = {file.rfilename for file in there.siblings or ()} - {*report.files}
    stale = filter(_is_ours, sorted(names))
    with warnings.catch_warnings():  # the client's own way of sending is going out of fashion
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        return api.create_commit(
            report.repo_id,
            [*adds, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"Publish {_COMMIT_WORDS[report.what]} with hf-glovlm",
            revision=branch,
            parent_commit=there.sha,
        )


def _is_ours(name: str) -> bool:
    """Whether a push may have written a file before: it is gone unless it is written again."""
    code = {file.name for file in (Path(__file__).parents[1] / "model").glob("*.py")}
    known = name in _OURS or name in code or name.startswith("figures/")
    return known or SHARD.fullmatch(name) is not None
