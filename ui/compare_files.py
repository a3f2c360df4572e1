"""The files of a comparison as the page offers them: JSON, CSV, the figures in one archive, the report."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.compare.record import RECORD_FILE
from engines.compare.results import CELLS_FILE, write_results
from engines.compare_figures import write_figures
from engines.compare_report import write_report

FIGURES_FILE, REPORT_FILE = "figures.zip", "report.html"


def write_tables(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """The whole record as JSON, and its cells as CSV."""
    write_results(record, folder)
    return folder / RECORD_FILE, folder / CELLS_FILE


def write_pictures(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Every figure as PNG in one archive, and the report as one HTML file. Takes seconds."""
    archive = folder / FIGURES_FILE
    scrap = archive.with_suffix(".part")
    with zipfile.ZipFile(scrap, "w", zipfile.ZIP_STORED) as packed:
        for picture in write_figures(record, folder / "figures"):
            packed.write(picture, picture.name)
    scrap.replace(archive)
    write_report(record, folder / REPORT_FILE)
    return archive, folder / REPORT_FILE
