"""The Compare tab's events: from the form's values to a running comparison, and from its record to what is shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from core.errors import FuseboxError, InvalidRequest
from engines.compare.events import CellDone, CellStarted, CompareEvent, Started
from engines.compare.jobs import Job
from engines.compare.queries import Query
from engines.compare.query_files import read_queries
from engines.compare_figures import PAGE_FIGURES, page_figures
from engines.compare_report.answers import LEGEND, answer_cards
from engines.compare_report.tables import failures, method_tables
from engines.compare_view import ModelView, model_view
from ui import texts
from ui.compare_files import write_pictures, write_tables
from ui.compare_form import OWN_FILE, CompareForm, limits_of
from ui.compare_view import cell_table, query_preview, recommendation, status_line
from ui.services import Services

UPDATES_PER_S = 3.0
"""More would take time from what is measured: the browser may run on the same machine."""


def read_form(values: tuple[Any, ...]) -> CompareForm:
    """The form's values in the order in which the tab lists them."""
    models, methods, combinations, source, built_in, own, quick, repeats, dtype, *sampling = values
    return CompareForm(tuple(models or ()), tuple(methods or ()), combinations or "", source, tuple(built_in or ()), tuple(own or ()), quick, repeats, dtype, tuple(sampling))


class CompareEvents:
    """Handlers of one tab. A visitor's job is found by its id in the page's state, its record stays here."""

    def __init__(self, services: Services) -> None:
        self.services = services

    def job(self, job_id: str | None) -> Job | None:
        """The visitor's job; None before the first, or when it has been forgotten."""
        try:
            return self.services.jobs.find(job_id) if job_id else None
        except InvalidRequest:
            return None

    def on_run(self, request: gr.Request, job_id: str | None, shown: str | None, metric: str, query: str | None, *values: Any) -> Iterator[list[Any]]:
        """Run was pressed: yields id, status, table, answers, the choices of model and query, and the buttons."""
        with self.services.visitor_stop(str(request.session_hash)) as stop:
            try:
                job = self.services.jobs.open(read_form(values).request(), job_id)
                events = self.services.jobs.stream(job, stop)
            except FuseboxError as error:
                yield [gr.skip(), status_line(None, str(error)), *[gr.skip()] * 4, *_buttons(False)]
                return
            drawn = 0.0
            for event in events:
                if isinstance(event, Started):
                    yield [job.id, *_drawn(job, shown, metric, query, True), *_buttons(True)]
                elif time.monotonic() - drawn > 1 / UPDATES_PER_S:
                    drawn = time.monotonic()
                    yield [gr.skip(), *_drawn(job, shown, metric, query, _changes_table(event)), *_buttons(True)]
        yield [job.id, *_drawn(job, shown, metric, query, True), *_buttons(False)]

    def on_stop(self, job_id: str | None) -> None:
        """Ask the running comparison to end at its next token."""
        job = self.job(job_id)
        if job is not None:
            job.stop.request()

    def on_view(self, job_id: str | None, shown: str | None, metric: str) -> str:
        """Another metric or model was chosen for the table."""
        job = self.job(job_id)
        return cell_table(_view(job, shown), metric, job.live.running if job else None)

    def on_query(self, job_id: str | None, shown: str | None, query: str | None) -> str:
        """Another query was chosen for the answers."""
        return _answers(_view(self.job(job_id), shown), query)

    def on_limits(self, job_id: str | None, shown: str | None, *limits: Any) -> str:
        """The recommendation under the limits as they are now."""
        job = self.job(job_id)
        try:
            return recommendation(job.live.record if job else {}, limits_of(*limits), shown)
        except InvalidRequest as error:
            return query_preview((), str(error))

    def on_result(self, job_id: str | None, shown: str | None, *limits: Any) -> list[Any]:
        """A comparison ended: recommendation, all tables, and the figures."""
        job = self.job(job_id)
        view = _view(job, shown)
        if job is None or view is None:
            return [self.on_limits(None, None, *limits), "", *[gr.Plot(visible=False)] * len(PAGE_FIGURES)]
        drawn = page_figures(job.live.record, view.model_id)
        return [self.on_limits(job_id, shown, *limits), failures(view) + method_tables(view), *(gr.Plot(drawn[name], visible=True) for name in PAGE_FIGURES)]

    def on_files(self, job_id: str | None) -> Iterator[list[Any]]:
        """Offer the record as files: JSON and CSV at once, the pictures when they are drawn."""
        job = self.job(job_id)
        if job is None or not job.live.record:
            yield [gr.DownloadButton(interactive=False)] * 4
            return
        tables = write_tables(job.live.record, job.folder)
        waiting = [gr.DownloadButton(interactive=False)] * 2
        yield [*_offered(tables), *waiting]
        yield [*_offered(tables), *_offered(write_pictures(job.live.record, job.folder))]

    def on_upload(self, path: str | None) -> list[Any]:
        """A file of queries came or went: the queries, their preview, which queries are asked, and the box, emptied of a file that is none."""
        if not path:
            return [(), query_preview(()), gr.skip(), gr.skip()]
        try:
            queries: tuple[Query, ...] = read_queries(Path(path))
        except InvalidRequest as error:
            return [(), query_preview((), str(error)), gr.skip(), None]
        return [queries, query_preview(queries), OWN_FILE, gr.skip()]

    def on_form(self, *values: Any) -> str:
        """The equal command."""
        return read_form(values).command()

    def on_load(self, job_id: str | None, shown: str | None, metric: str, query: str | None, *values: Any) -> list[Any]:
        """A visitor came, perhaps back: what their last comparison has, and the equal command."""
        job = self.job(job_id)
        return [*_drawn(job, shown, metric, query, True), *_buttons(job is not None and job.running), self.on_form(*values)]


def _changes_table(event: CompareEvent) -> bool:
    return isinstance(event, (CellStarted, CellDone))


def _buttons(running: bool) -> list[Any]:
    """Run and Stop."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def _view(job: Job | None, shown: str | None) -> ModelView | None:
    if job is None or not job.live.record:
        return None
    return model_view(job.live.record, shown) or model_view(job.live.record)


def _drawn(job: Job | None, shown: str | None, metric: str, query: str | None, whole: bool) -> list[Any]:
    """Status, table, answers, model choice, query choice; all but the status only when `whole`."""
    if not whole:
        return [status_line(job), *[gr.skip()] * 4]
    view = _view(job, shown)
    table = cell_table(view, metric, job.live.running if job else None)
    if view is None:
        return [status_line(job), table, _answers(None, None), gr.skip(), gr.skip()]
    models = [m["model_id"] for m in view.record["models"]]
    queries = [(f"{q['id']}: {q['question'][:80]}", q["id"]) for q in view.queries]
    asked = query if query in {name for _, name in queries} else queries[0][1]
    return [
        status_line(job), table, _answers(view, asked), gr.Dropdown(choices=models, value=view.model_id, visible=len(models) > 1),
        gr.Dropdown(choices=queries, value=asked, visible=True),
    ]


def _answers(view: ModelView | None, query: str | None) -> str:
    if view is None or query is None:
        return f'<p class="empty-note">{texts.COMPARE_NO_ANSWERS}</p>'
    return LEGEND + answer_cards(view, query)


def _offered(paths: tuple[Path, Path]) -> list[Any]:
    return [gr.DownloadButton(value=str(path), interactive=True) for path in paths]
