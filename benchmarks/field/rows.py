"""A row of the table for each model."""

import importlib
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .compare import VERDICTS, Outcome, captured, compare
from .expectation import FieldModel
from .training import DIFFERS, is_unchanged, make
from .truth import TrueSite, true_sites

_LONGEST = 160
ALL_VERDICTS = (*VERDICTS, "not installed", "error")


@dataclass
class Row:
    """What became of one model.

    Attributes:
        model: the model, and what is known of it.
        verdict: one of ``ALL_VERDICTS``.
        sites: its true sites.
        outcome: what capture made of them; None: it was not run.
        training: whether losses and weights are the same with the monitor.
        remark: what went wrong, or why it was not run.
        others: modules with a softmax that is no attention.
    """

    model: FieldModel
    verdict: str
    sites: Sequence[TrueSite] = ()
    outcome: Outcome | None = None
    training: str = ""
    remark: str = ""
    others: Sequence[str] = field(default_factory=list)


def row_of(model: FieldModel, *, with_training: bool = True) -> Row:
    """Run a model and tell what became of its sites; nothing that it does ends the program."""
    try:
        importlib.import_module(model.package)
    except ModuleNotFoundError as error:
        return Row(model, "not installed", remark=f"{error}")
    except Exception as error:
        return Row(model, "error", remark=f"import: {_short(error)}")
    try:
        sites, others = true_sites(*make(model), model)
    except Exception as error:
        return Row(model, "error", remark=f"without capture: {_short(error)}")
    try:
        outcome = compare(sites, *captured(*make(model)))
    except Exception as error:
        return Row(model, "wrong", sites, remark=f"under capture: {_short(error)}", others=others)
    row = Row(model, outcome.verdict, sites, outcome, others=others)
    if with_training:
        try:
            row.training = is_unchanged(model)
        except Exception as error:
            row.training = f"failed: {_short(error)}"
        if row.training == DIFFERS:
            row.verdict = "wrong"
    return row


def _short(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.name}, line {frame.lineno})"


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and how many there are of each verdict."""
    lines = [
        "| package | model | sites | found | heads said | heads found | error | self or cross | training | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row) for row in rows]
    lines += ["", summary(rows), ""]
    details = [(f"{row.model.package} {row.model.name}", _details(row)) for row in rows]
    lines += [f"- **{name}**: {text}" for name, text in details if text]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many models there are of each verdict, and how many sites."""
    models = Counter(row.verdict for row in rows)
    sites = Counter(verdict for row in rows if row.outcome for verdict in row.outcome.verdicts)
    counted = ", ".join(f"{models[verdict]} {verdict}" for verdict in ALL_VERDICTS if models[verdict])
    of_sites = ", ".join(f"{sites[verdict]} {verdict}" for verdict in VERDICTS if sites[verdict])
    return f"{len(rows)} models: {counted}. Their sites: {of_sites or 'none'}."


def _line(row: Row) -> str:
    outcome = row.outcome or Outcome()
    shown = [site for site in row.sites if site.pattern is not None]
    known = f"{outcome.kinds_right} of {outcome.kinds_known}" if outcome.kinds_known else ""
    cells = [
        row.model.package,
        row.model.name,
        str(row.model.sites),
        str(outcome.found) if row.outcome else "",
        _run_lengths([site.heads for site in shown]),
        _run_lengths(outcome.heads),
        "" if outcome.error is None else f"{outcome.error:.0e}",
        known,
        row.training,
        row.verdict,
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _run_lengths(numbers: Sequence[int]) -> str:
    """Write numbers in a row, those that repeat once: ``2 x4, 8``."""
    runs = [(number, len(list(same))) for number, same in groupby(numbers)]
    return ", ".join(f"{number} x{n}" if n > 1 else f"{number}" for number, n in runs)


def _details(row: Row) -> str:
    """What went wrong at the first site, and the first sentence of what was said."""
    texts = [row.remark] if row.remark else []
    if row.outcome is not None:
        if row.outcome.notes:
            texts.append(row.outcome.notes[0] + (f" (and {n} more)" if (n := len(row.outcome.notes) - 1) else ""))
        if row.outcome.sentences:
            texts.append(f"said: “{_first_sentence(row.outcome.sentences[0])}”")
    return "; ".join(" ".join(text.split()) for text in texts)


def _first_sentence(text: str) -> str:
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= _LONGEST else sentence[:_LONGEST] + " …"
