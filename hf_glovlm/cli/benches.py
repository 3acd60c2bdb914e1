"""The command `glovlm bench`; which benches there are stands in `lab.benches.BENCHES`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ..environment import quiet_libraries
from ..errors import GloVLMError
from ..files import write_json
from ..lab.benches import BENCHES, Finished, choose_benches, load_function, run_benches, takers
from .console import check_output, note, print_json, print_rows
from .options import JsonFlag, Text, Texts, Whole

_ALONE = ", ".join(name for name, bench in BENCHES.items() if bench.alone)
_WIDTH = max(map(len, BENCHES))
LISTED = "\b\n" + "\n".join(f"{n:<{_WIDTH}} {bench.help}" for n, bench in BENCHES.items())


def _of(option: str) -> str:
    return f"For {', '.join(takers(option))}: "


def bench(
    names: Annotated[
        Texts, Argument(help=f"Which; all but {_ALONE}, which run alone, if none is named.")
    ] = None,
    backbone: Annotated[Text, Option(help=f"{_of('backbone')}what encodes.")] = None,
    data: Annotated[
        Text, Option(help=f"{_of('data')}labelled images; of tissue, pictures with outlines.")
    ] = None,
    cohorts: Annotated[
        Whole, Option(help=f"{_of('cohorts')}cohorts per truth (default: 2000).", min=2)
    ] = None,
    output: Annotated[Path | None, Option(help="Write the JSON here, after every bench.")] = None,
    compare: Annotated[
        Path | None, Option(help="JSON of an earlier run, to be put beside this one.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time the package, as ratios measured inside one run; some benches state how right it is."""
    quiet_libraries()
    given = {"backbone": backbone, "data": data, "cohorts": cohorts}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = choose_benches(names or [], options)
    check_output(output, "bench", [compare] if compare else [])
    from ..lab.benches.document import add_finished, compare_documents, new_document, read_document

    comparable = BENCHES[chosen[0]].summary is None
    if compare is not None and not comparable:
        raise GloVLMError(f"`bench {chosen[0]}` has no ratios to compare: leave --compare out.")
    before = read_document(compare) if compare is not None else None
    document, skipped = new_document(), []
    options |= {"progress": True, "on_row": _note_row}
    try:
        for done in _run_announced(chosen, options):
            if done.failure is not None and BENCHES[done.bench].alone:
                raise GloVLMError(done.failure)
            add_finished(document, done)
            state = "" if done.failure is None else ", not complete"
            note(f"{done.bench}: {done.seconds:.0f} s{state}")
            if done.unavailable and not names:
                skipped.append(done.bench)
            if output is not None:
                write_json(output, document)
    finally:  # also where it is interrupted: what is measured is measured
        if document["rows"] or document["unfinished"]:
            notes = compare_documents(document, before) if before is not None else []
            if output is not None:
                write_json(output, document)
            _print(document, chosen, as_json)
            for sentence in notes:
                note(sentence)
    for name, reason in document["unfinished"].items():
        note(f"{name} is {'left out' if name in skipped else 'not complete'}: {reason}")
    if len(document["unfinished"]) > len(skipped):
        raise typer.Exit(1)


def _run_announced(chosen: list[str], options: Mapping[str, Any]) -> Iterator[Finished]:
    """Run benches, each after a note of its name: a bar would take time from what is timed."""
    for number, name in enumerate(chosen, start=1):
        note(f"{name}, {number} of {len(chosen)} ...")
        yield from run_benches([name], options)


def _note_row(row: Mapping[str, Any]) -> None:
    note("{metric}, {groups} groups: {coverage:.3f}".format(**row))


def _print(document: Mapping[str, Any], chosen: list[str], as_json: bool) -> None:
    """Print the document, or its rows as a table."""
    from ..lab.benches.document import comparison_rows

    first, rows = BENCHES[chosen[0]], document["rows"]
    if as_json:
        print_json(document)
    elif not rows:
        note("nothing was measured")
    elif "before" in document:
        table = comparison_rows(rows)
        print_rows("Benches", table, tuple(table[0]), as_json)
    elif first.summary is not None:
        table = load_function(first.summary)(rows)
        print_rows(first.help, table, tuple(table[0]), as_json)
    else:
        print_rows("Benches", rows, first.shown, as_json)
