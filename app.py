"""Entry point of the page: `python app.py`, or a Hugging Face Space."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP threads that spin between two operations take the cores from server and browser: measured, the page froze for up to 9 s.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if "SPACE_ID" in os.environ:  # visitors are strangers there: the owner's token is not theirs to use
    os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")

from ui.app import build_app, launch_options

logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")

demo = build_app()

if __name__ == "__main__":
    demo.launch(**launch_options())
