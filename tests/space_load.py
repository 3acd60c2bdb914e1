"""Many clients at once on the Space: `python tests/space_load.py --clients 50 --seconds 60`.

Prints how many answers came, errors, latencies and the server's memory. Run by hand; the tests run
a short version.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx


def press(url: str, image: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Let clients classify one image over and over, each uploading it anew.

    Returns:
        `answers`, `errors` (sentences), `median`, `p95` and `largest` latency in seconds.
    """
    content = image.read_bytes()
    end = time.monotonic() + seconds

    def work(number: int) -> tuple[list[float], list[str]]:
        took: list[float] = []
        errors: list[str] = []
        with httpx.Client(base_url=f"{url}gradio_api", timeout=300) as client:
            while not took or time.monotonic() < end:
                begin = time.monotonic()
                try:
                    _ask(client, f"{number}.png", content)
                except Exception as error:  # whatever it is, it counts
                    errors.append(f"{type(error).__name__}: {error}"[:200])
                    if len(errors) > 3:
                        break
                    continue
                took.append(time.monotonic() - begin)
        return took, errors

    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(work, range(clients)))
    took = sorted(value for part, _ in results for value in part)
    return {
        "answers": len(took),
        "errors": [error for _, part in results for error in part],
        "median": round(statistics.median(took), 3) if took else None,
        "p95": round(took[int(0.95 * (len(took) - 1))], 3) if took else None,
        "largest": round(took[-1], 3) if took else None,
    }


def _ask(client: httpx.Client, name: str, content: bytes) -> None:
    """One upload and one classification, as any client does it."""
    uploaded = client.post("/upload", files={"files": (name, io.BytesIO(content))})
    uploaded.raise_for_status()
    file = {
        "path": uploaded.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"},
    }  # fmt: skip
    called = client.post("/call/classify", json={"data": [[file], "", None]})
    called.raise_for_status()
    text = client.get(f"/call/classify/{called.json()['event_id']}").text
    if "event: complete" not in text:
        raise RuntimeError(text.strip().replace("\n", " ") or "no answer")
    result = json.loads(text.split("data: ", 1)[1])
    assert result[0]["answers"][0]["file_name"] == name


def _memory(pid: int) -> int:
    """Resident memory of a process in MB."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def main() -> None:
    """Serve the page in a process of its own, press it, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    from space_page import serve
    from uploads import make_examples

    with tempfile.TemporaryDirectory() as place:
        image = Path(place) / "drawing.png"
        image.write_bytes(make_examples()[0].content)
        with serve(Path(place) / "uploads") as page:
            one = press(page.url, image, clients=1, seconds=5)
            before = _memory(page.pid)
            many = press(page.url, image, options.clients, options.seconds)
            memory = {"before_mb": before, "after_mb": _memory(page.pid)}
            left = sum(path.is_file() for path in page.folder.rglob("*"))
    print(json.dumps({"one": one, "many": many, "memory": memory, "files_left": left}, indent=2))


if __name__ == "__main__":
    main()
