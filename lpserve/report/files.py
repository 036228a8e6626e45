"""Which files a run leaves: scores.npz, the CSV tables, report.html and plan.json."""

from __future__ import annotations

from typing import Any

from lpserve.analysis.build_plan import Outcome
from lpserve.analysis.record import write_record_file
from lpserve.report.page import report_page
from lpserve.report.tables import interactions_csv, shapley_csv
from lpserve.store.run_folder import RunFolder


def write_outputs(folder: RunFolder, outcome: Outcome, *, config_json: dict[str, Any]) -> None:
    """Write every result file, each completely or not at all.

    plan.json comes last: a folder that holds it holds all the others.

    Args:
        config_json: the content of the run's config.json, shown on the page.
    """
    write_record_file(folder.path / "scores.npz", outcome.scored)
    folder.write("shapley.csv", shapley_csv(outcome))
    if outcome.analysis.interactions_PP is not None:
        folder.write("interactions.csv", interactions_csv(outcome))
    folder.write("report.html", report_page(outcome, config_json))
    folder.write("plan.json", outcome.plan.to_json())
