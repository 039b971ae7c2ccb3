"""A study's report to the Hub, from the Compare tab."""

from typing import Any

import gradio as gr

from qlora_core import publishing
from qlora_core.errors import ConfigError, LabError
from qlora_core.settings import Settings
from qlora_core.studies import StudyStore
from qlora_core.ui.identity import Identity
from qlora_core.ui.pushing import Pushing, Wish, further, further_asked, repository, target
from qlora_core.ui.uploads import safe_name


class StudyPush:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with gr.Accordion("Push this report to the Hub", open=False, elem_id="study-push"):
            with gr.Row():
                self.repository, self.public = target("study-push", "A dataset repository. Made if it is not there.")
                self.rows = gr.Checkbox(
                    label="With prompts and answers",
                    info="Of held-out rows, if their licence allows it.",
                    value=False,
                    min_width=220,
                    elem_id="study-push-rows",
                )
            with gr.Accordion("Branch, pull request, collection", open=False, elem_id="study-push-more"), gr.Row():
                self.further = further("study-push")
            self.pushing = Pushing(settings, "report-push", self.wish)

    def connect(self, study: gr.Textbox, identity: Identity, hidden: dict[str, Any]) -> None:
        asked = [study, self.repository, self.public, self.rows, *self.further]
        self.pushing.connect(asked, identity, hidden)
        study.change(self.show, [study, self.pushing.remembered], [self.repository, *self.pushing.outputs], **hidden)

    def show(self, study_id: str, remembered: str) -> tuple[Any, ...]:
        """The repository that a study went to, or a name for one; and this browser's own push of it."""
        try:
            study = StudyStore(self.settings).get(study_id)
            before = publishing.shown(study.path)
            name = before[-1]["repo_id"] if before else f"{safe_name(study.name)}-report"
        except (LabError, OSError):
            return "", *self.pushing.watch(None)
        return name, *self.pushing.again(remembered, study.study_id)

    def wish(self, study_id: str, name: str, public: bool, rows: bool, *further: Any) -> Wish:
        """Raises LabError with all that is missing."""
        problems, given, more, also = [], [], [], ()
        try:
            given.append(f"--repo-id={repository(name)}")
        except ConfigError as error:
            problems += error.problems
        try:
            more, also = further_asked(*further)
        except ConfigError as error:
            problems += error.problems
        try:
            study_id = StudyStore(self.settings).get(study_id).study_id
        except LabError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)
        given += [*(["--public"] if public else []), *(["--with-rows"] if rows else []), *more]
        return Wish(["push", study_id, "--what=report", *given], {name.strip(): "dataset"}, not public, also)
