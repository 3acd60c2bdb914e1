"""Errors of the Hub: whether to retry, and one sentence for the user."""

import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime

from ..errors import GloVLMError

LONGEST_WAIT = 300.0  # seconds between two attempts, whatever the Hub asks for


def worth_waiting(error: BaseException, attempt: int) -> float | None:
    """Delay before a retry, in seconds; `None` for an error that no retry can mend.

    Args:
        error: What the client raised.
        attempt: How many were made: the wait doubles each time, and `Retry-After` may lengthen it.
    """
    backoff = 2.0**attempt
    for cause in _causes(error):
        status, headers = _status(cause), getattr(getattr(cause, "response", None), "headers", {})
        if status in (408, 412, 429) or (status or 0) >= 500:
            return min(max(seconds_asked(headers.get("Retry-After")), backoff), LONGEST_WAIT)
        # httpx, under whichever name the client brings it: no answer, or half of one.
        if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__):
            return backoff
    return None


def seconds_asked(stated: str | None) -> float:
    """Delay of a `Retry-After` header, which holds seconds or a date; 0 without one."""
    if stated is None:
        return 0.0
    with suppress(ValueError):
        return float(stated)
    with suppress(TypeError, ValueError):
        return parsedate_to_datetime(stated).timestamp() - time.time()
    return 0.0


def refusal(repo_id: str, error: BaseException, token: str | None, done: str) -> GloVLMError:
    """Error for the user from an error of the Hub, in one sentence and without the token.

    Args:
        repo_id: The repository.
        error: What the client raised.
        token: Removed from the text.
        done: `published` or `loaded`.
    """
    statuses = [status for cause in _causes(error) if (status := _status(cause))]
    status = statuses[0] if statuses else None
    if status == 401:
        what = (
            "the Hub does not know this token, or what it stands for may not see the repository: "
            "run `hf auth login` with one that may write."
        )
    elif status == 403:
        what = (
            "it belongs to somebody else, or the token may only read: give a name of your own or "
            "of an organisation that you may write to, and a token that may write."
        )
    elif status == 404:
        what = "there is no such repository, or it is private: check the name."
    elif worth_waiting(error, 1) is not None:
        what = (
            f"the Hub did not answer as it should ({first_line(error)}) Run the same command "
            "again later: what arrived is not sent again, and a commit is there whole or not at "
            "all."
        )
    else:
        what = first_line(error)
    text = f"{repo_id} cannot be {done}: {what}"
    from huggingface_hub import get_token

    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return GloVLMError(text)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """Message of the innermost cause, in one line."""
    lines = [line for e in _causes(error) for line in str(e).strip().splitlines()[:1] if line]
    return f"{(lines or [type(error).__name__])[-1].rstrip('.:')}."
