"""The running app through its own client."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest
from gradio_client import Client

pytestmark = pytest.mark.browser


def test_chat_compare_returns_text_and_metrics_for_each_method(app_url: str) -> None:
    result = Client(app_url, verbose=False).predict("What is gravity?", ["baseline", "bnb_nf4", "no_such"], 12, api_name="/chat_compare")
    assert set(result) == {"baseline", "bnb_nf4", "no_such"}
    for method in ("baseline", "bnb_nf4"):
        assert result[method]["text"]
        assert result[method]["metrics"]["decode_tok_s"] > 0
    assert result["baseline"]["metrics"]["agreement_share"] == 1.0
    assert "There is no method 'no_such'" in result["no_such"]["error"]


def test_two_clients_at_once_get_their_own(app_url: str) -> None:
    results: dict[str, Any] = {}

    def run(name: str, methods: list[str], question: str) -> None:
        results[name] = Client(app_url, verbose=False).predict(question, methods, 16, api_name="/chat_compare")

    alone = Client(app_url, verbose=False).predict("What is an atom?", ["bnb_int8"], 16, api_name="/chat_compare")
    threads = [
        threading.Thread(target=run, args=("a", ["baseline"], "What is an atom?")),
        threading.Thread(target=run, args=("b", ["bnb_int8"], "What is an atom?")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results["a"]) == {"baseline"} and set(results["b"]) == {"bnb_int8"}
    assert results["a"]["baseline"]["metrics"]["weights_packed_bytes"] == 0
    assert results["b"]["bnb_int8"]["metrics"]["weights_packed_bytes"] > 0
    assert results["b"]["bnb_int8"]["text"] == alone["bnb_int8"]["text"]


@pytest.mark.parametrize(
    ("message", "methods", "tokens", "said"),
    [
        ("", ["baseline"], 8, "empty"),
        ("hello", [], 8, "No method"),
        ("hello", ["baseline"], 0, "max_new_tokens is 0"),
        ("hello", ["baseline"], -1, "max_new_tokens is -1"),
        ("hello", ["baseline"], 10**9, "max_new_tokens is 1000000000"),
    ],
)
def test_bad_requests_are_said_in_words_and_the_next_works(app_url: str, message: str, methods: list[str], tokens: int, said: str) -> None:
    client = Client(app_url, verbose=False)
    with pytest.raises(Exception, match=said):
        client.predict(message, methods, tokens, api_name="/chat_compare")
    assert client.predict("What is rain?", ["baseline"], 4, api_name="/chat_compare")["baseline"]["text"]


def test_only_the_public_endpoint_is_listed_and_direct_calls_are_closed(app_url: str) -> None:
    listed = Client(app_url, verbose=False).view_api(return_format="dict")["named_endpoints"]
    assert set(listed) == {"/chat_compare", "/compare", "/compare_result"}
    request = urllib.request.Request(f"{app_url}gradio_api/run/chat_compare", data=b'{"data":["x",["baseline"],4,"embedded"]}', headers={"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 404


def test_huge_body_is_refused_before_it_is_sent(app_url: str) -> None:
    connection = http.client.HTTPConnection(app_url.removeprefix("http://").rstrip("/"), timeout=30)
    connection.putrequest("POST", "/gradio_api/call/chat_compare")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(9 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x", ".env", "app.py"])
def test_files_outside_are_not_served(app_url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{app_url}gradio_api/file={path}", timeout=10)
    assert refused.value.code in (403, 404)


def test_compare_tells_id_and_progress_and_returns_the_record(app_url: str) -> None:
    client = Client(app_url, verbose=False)
    job = client.submit(["baseline", "word_removal"], ["What is rain?", {"id": "w", "question": "What is wind?", "keywords": ["air"]}], api_name="/compare")
    last = job.result(timeout=120)
    told = job.outputs()
    assert len(told) >= 2 and len({state["job_id"] for state in told}) == 1
    shares = [state["progress"] for state in told]
    assert shares == sorted(shares) and shares[0] < 1 and shares[-1] == 1
    assert all(state["state"] == "running" and state["result"] is None for state in told[:-1])
    assert last["state"] == "finished" and last["result"]["complete"]
    assert {(c["method"], c["query"]) for c in last["result"]["cells"]} == {(m, q) for m in ("baseline", "word_removal") for q in ("q1", "w")}
    assert all(c["text"] and c["metrics"]["decode_tok_s"] > 0 for c in last["result"]["cells"])
    assert client.predict(last["job_id"], api_name="/compare_result")["result"] == last["result"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"methods": []}, "methods is"),
        ({"methods": ["baseline"], "queries": [{"question": ""}]}, "the question is empty"),
        ({"methods": ["baseline"], "queries": [3]}, "neither a text"),
        ({"methods": ["no_such"]}, "There is no method 'no_such'"),
        ({"methods": ["baseline"], "repeats": 0}, "repeats is 0"),
    ],
)
def test_bad_comparisons_are_said_in_words(app_url: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        Client(app_url, verbose=False).predict(**arguments, api_name="/compare")


def test_a_model_that_cannot_be_loaded_marks_its_cells_with_the_reason(app_url: str) -> None:
    state = Client(app_url, verbose=False).predict(["baseline"], ["What is rain?"], ["/no/such/folder"], api_name="/compare")
    assert [(c["status"], "/no/such/folder" in c["error"]) for c in state["result"]["cells"]] == [("failed", True)]
