"""The page as a whole: a status line, the tabs, and what leads from one to the other."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from qlora_core.run_status import ACTIVE
from qlora_core.settings import Settings
from qlora_core.ui import run_view
from qlora_core.ui.address import in_address
from qlora_core.ui.compare_tab import CompareTab, study_named
from qlora_core.ui.data_tab import DataTab
from qlora_core.ui.downloads import follow
from qlora_core.ui.endpoints import add_endpoints
from qlora_core.ui.identity import Identity, acting
from qlora_core.ui.publish_tab import PublishTab
from qlora_core.ui.runs_tab import RunsTab, default_run
from qlora_core.ui.status import status_html
from qlora_core.ui.train_tab import TrainTab

DATA, TRAIN, RUNS, COMPARE, PUBLISH = "data", "train", "runs", "compare", "publish"
# Handlers of the page are no API; several people may use them at once, and none shows gradio's own spinner.
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
# So that a reload in the middle of a push comes back to it.
TO_PUBLISH, FROM_PUBLISH = in_address("tab", "'publish'"), in_address("tab", "''")
CHECKING = '<p class="lab-hint" role="status">Checking the dataset and fetching the base model …</p>'
# Uploads are copied out of gradio's cache, so what lies there for a day can go.
DAY = 86_400


def build_app(settings: Settings) -> gr.Blocks:
    """The whole page. Keeps nothing that matters: everything is read from `settings.home`."""
    with gr.Blocks(title="QLoRA Lab", analytics_enabled=False, delete_cache=(DAY, DAY)) as demo:
        status = gr.HTML(status_html([]), elem_id="status")
        with gr.Accordion("Hugging Face account", open=False, elem_id="account"):
            identity = Identity()
        with gr.Tabs(selected=DATA, elem_id="tabs") as tabs:
            with gr.Tab("Data", id=DATA) as data_tab:
                data = DataTab(settings)
            with gr.Tab("Train", id=TRAIN) as train_tab:
                train = TrainTab(settings, data.rows.fields)
            with gr.Tab("Runs", id=RUNS) as runs_tab:
                runs = RunsTab(settings, status)
            with gr.Tab("Compare", id=COMPARE) as compare_tab:
                compare = CompareTab(settings, train)
            with gr.Tab("Publish", id=PUBLISH) as publish_tab:
                publish = PublishTab(settings)
        identity.connect(HIDDEN)
        identity.on_load(demo, HIDDEN)
        for pushing in (data.prepare.pushing, compare.push.pushing, publish.push.pushing):
            pushing.remembered.render()
        picked = data.connect(train.fields["base_model"], train.fields, identity, HIDDEN)
        train.connect(data.chosen, picked, identity, HIDDEN)
        train_tab.select(train.bases, None, train.fields["base_model"], **HIDDEN)
        runs.connect(HIDDEN)
        compare.connect(compare_tab, [data_tab, train_tab, runs_tab, publish_tab], data.chosen, identity, HIDDEN)
        publish.connect(identity, HIDDEN)
        _connect_tabs(tabs, publish_tab, data, train, runs, compare, publish, identity)
        publish_tab.select(None, runs.selected, None, js=TO_PUBLISH, **HIDDEN)
        for other in (data_tab, train_tab, runs_tab, compare_tab):
            other.select(None, runs.selected, None, js=FROM_PUBLISH, **HIDDEN)
        _open_page(demo, tabs, runs, compare, publish, settings)
        data.on_load(demo, HIDDEN)
        add_endpoints(settings)
    return demo


def _connect_tabs(
    tabs: gr.Tabs,
    publish_tab: gr.Tab,
    data: DataTab,
    train: TrainTab,
    runs: RunsTab,
    compare: CompareTab,
    publish: PublishTab,
    identity: Identity,
) -> None:
    def start(chosen: Any, *values: Any) -> Iterator[tuple[Any, Any, Any]]:
        yield CHECKING, gr.skip(), gr.skip()
        problems, run = train.begin(chosen, *values)
        yield problems, gr.Tabs(selected=RUNS) if run else gr.skip(), run.run_id if run else gr.skip()

    def copy_settings(selected: str) -> list[Any]:
        found = runs.settings_of(selected)
        if found is None:
            return [gr.skip(), gr.skip(), *(gr.skip() for _ in train.inputs)]
        chosen, config = found
        return [gr.Tabs(selected=TRAIN), chosen or gr.skip(), *train.fill(config)]

    def to_publish(selected: str) -> tuple[Any, Any]:
        return gr.Tabs(selected=PUBLISH), publish.choices(selected)

    def to_run(event: gr.EventData) -> tuple[Any, str]:
        return gr.Tabs(selected=RUNS), event.run

    for leads in (compare.runs, compare.strip):
        leads.select(to_run, None, [tabs, runs.selected], **HIDDEN)
    data.use.click(lambda: gr.Tabs(selected=TRAIN), None, tabs, **HIDDEN)
    train.change.click(lambda: gr.Tabs(selected=DATA), None, tabs, **HIDDEN)
    train.start.click(
        acting(start),
        [identity.token, data.chosen, *train.inputs],
        [train.problems, tabs, runs.selected],
        **HIDDEN,
    )
    runs.copy.click(copy_settings, runs.selected, [tabs, data.chosen, *train.inputs], **HIDDEN)
    runs.publish.click(to_publish, runs.selected, [tabs, publish.run], **HIDDEN)
    runs.download.click(publish.adapter, runs.selected, runs.problem, **HIDDEN).then(
        None, None, None, js=follow("run-problem"), **HIDDEN
    )
    publish_tab.select(publish.choices, [publish.run, runs.selected], publish.run, **HIDDEN)


def _open_page(
    demo: gr.Blocks, tabs: gr.Tabs, runs: RunsTab, compare: CompareTab, publish: PublishTab, settings: Settings
) -> None:
    def attach(request: gr.Request) -> tuple[str, str, Any, Any]:
        """A named study or run, or a running one, is shown at once; else the page opens with Data."""
        found = run_view.statuses(settings)
        named, study = (str(request.query_params.get(name) or "") for name in ("run", "study"))
        known = any(status.run_id == named for status in found)
        first = default_run(found)
        run_id = named if known else first.run_id if first else ""
        busy = any(status.state in ACTIVE for status in found)
        tab = COMPARE if study_named(settings, study) else RUNS if known or busy else None
        if request.query_params.get("tab") == PUBLISH:
            return run_id, study, gr.Tabs(selected=PUBLISH), publish.choices(run_id)
        return run_id, study, gr.Tabs(selected=tab) if tab else gr.skip(), gr.skip()

    demo.load(attach, None, [runs.selected, compare.selected, tabs, publish.run], **HIDDEN).then(
        runs.tick, [runs.selected, runs.cursor], runs.outputs, **HIDDEN
    )
