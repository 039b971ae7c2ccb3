"""What a run or a study leads to, on the Hub: agreed to by a person, pushed in one commit, proven, recorded. Knows no torch."""

from qlora_core.publishing.agreement import UNSEEN, Agreement, NotAgreed
from qlora_core.publishing.models import Publication, card_of, prepare
from qlora_core.publishing.parts import Part, dataset_of, dataset_part, model_part, report_part, run_or_study
from qlora_core.publishing.record import as_card_text, card_text, keep_card_text, published, read_card_text, shown
from qlora_core.publishing.together import Together, repositories

MODELS = ("adapter", "merged")
OF_A_RUN = (*MODELS, "dataset")

__all__ = [
    "MODELS",
    "OF_A_RUN",
    "UNSEEN",
    "Agreement",
    "NotAgreed",
    "Part",
    "Publication",
    "Together",
    "as_card_text",
    "card_of",
    "card_text",
    "dataset_of",
    "dataset_part",
    "keep_card_text",
    "model_part",
    "prepare",
    "published",
    "read_card_text",
    "report_part",
    "repositories",
    "run_or_study",
    "shown",
]
