"""The Compare tab's public endpoints: run a comparison and watch it, or look at one again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from core.errors import FuseboxError, InvalidRequest
from engines.compare.events import Finished
from engines.compare.jobs import Job
from engines.compare.queries import Query
from engines.compare.query_files import read_queries
from engines.compare.request import CompareRequest
from engines.sampling import sampling_from
from ui.services import Services

_TELL_S = 0.5


def register_compare_api(services: Services) -> None:
    """Offer `/compare` and `/compare_result`."""

    def compare(
        request: gr.Request, methods: list[str], queries: list[Any] | None = None, models: list[str] | None = None, quick: bool = True, max_new_tokens: int = 128,
        repeats: int = 1, temperature: float = 0.0, seed: int = 0, dtype: str = "auto", job_id: str = "",
    ) -> Iterator[dict[str, Any]]:
        """Compare methods over queries: tells job id and progress while it runs, and the whole record as result at the end.

        methods: names, or combinations joined by +; ["all"] for every one. queries: texts, or objects with question, keywords, kind and id; none for the
        built-in five. quick: at most 30 new tokens. job_id: of a comparison that was cut off, to go on with it.
        """
        try:
            sampling = sampling_from({"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed})
            asked = CompareRequest(_queries(queries), _names(methods, "methods"), _names(models or ["embedded"], "models"), repeats, sampling, dtype, quick=bool(quick))
            with services.visitor_stop(str(request.session_hash)) as stop:
                job = services.jobs.open(asked, job_id)
                told = 0.0
                for event in services.jobs.stream(job, stop):
                    if not isinstance(event, Finished) and time.monotonic() - told >= _TELL_S:
                        told = time.monotonic()
                        yield job_state(job)
            if job.failed is not None:
                raise InvalidRequest(job.failed)
            yield {**job_state(job), "result": job.live.record}
        except FuseboxError as error:
            raise gr.Error(str(error)) from error

    def compare_result(job_id: str) -> dict[str, Any]:
        """A comparison as far as it is, by its job id."""
        try:
            job = services.jobs.find(job_id)
        except FuseboxError as error:
            raise gr.Error(str(error)) from error
        return {**job_state(job), "result": job.live.record or None}

    gr.api(compare, api_name="compare", concurrency_limit=8, concurrency_id="compare")
    gr.api(compare_result, api_name="compare_result", concurrency_limit=16)


def job_state(job: Job) -> dict[str, Any]:
    """Id, state and progress; no result yet."""
    progress = job.live.progress
    state = "failed" if job.failed else "running" if job.running else "finished" if job.complete else "stopped"
    return {"job_id": job.id, "state": state, "progress": progress.fraction, "seconds_left": progress.seconds_left, "text": progress.text, "result": None}


def _queries(given: Sequence[Any] | None) -> tuple[Query, ...]:
    """Queries of a client, checked as those of a file are."""
    return read_queries(json.dumps(list(given)).encode(), "queries.json") if given else ()


def _names(given: Any, what: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise InvalidRequest(f'{what} is {str(given)[:60]}; it must be a list of names, for example ["baseline"].')
    return tuple(given)
