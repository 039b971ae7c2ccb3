"""Entry point of the Space and of `make app`: settings from the environment, the page, a server. Decides nothing else."""

import os
import sys
import threading
import time
import traceback
from typing import Any

# Before gradio is imported: it reads this at import, and the page makes no request to other machines.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from qlora_core import queue
from qlora_core.errors import LabError
from qlora_core.settings import Settings
from qlora_core.ui.page import build_app
from qlora_core.ui.plots import PLOTLY_JS
from qlora_core.ui.preview import warm_up
from qlora_core.ui.theme import CSS, HEAD, theme

QUEUE_SECONDS = 2


def launch(demo: gr.Blocks, settings: Settings, **options: Any) -> Any:
    """Serve the page; host and port come from GRADIO_SERVER_NAME and GRADIO_SERVER_PORT."""
    settings.downloads.mkdir(parents=True, exist_ok=True)
    return demo.launch(
        theme=theme(),
        css=CSS,
        head=HEAD,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        allowed_paths=[str(settings.downloads), str(PLOTLY_JS)],
        **options,
    )


def keep_queue_going(settings: Settings) -> None:
    """Start what waits, whether or not a page is open: also what waited when the app went down."""
    while True:
        try:
            queue.start_next(settings)
        except Exception:
            # One entry that cannot be started must not end the queue for all others.
            traceback.print_exc()
        time.sleep(QUEUE_SECONDS)


def main() -> None:
    try:
        settings = Settings.from_environment()
    except LabError as error:
        sys.exit(str(error))
    threading.Thread(target=keep_queue_going, args=(settings,), daemon=True).start()
    threading.Thread(target=warm_up, args=(settings,), daemon=True).start()
    launch(build_app(settings), settings)


if __name__ == "__main__":
    main()
