"""What a run or a study leads to, on the Hub: agreed to by a person, pushed in one commit, proven, recorded. Knows no torch."""

from qlora_core.publishing.agreement import UNSEEN, Agreement, NotAgreed
from qlora_core.publishing.models import WHAT, Publication, agreement, prepare, publish
from qlora_core.publishing.record import card_text, keep_card_text, published, read_card_text
from qlora_core.publishing.together import Together, repositories

__all__ = [
    "UNSEEN",
    "WHAT",
    "Agreement",
    "NotAgreed",
    "Publication",
    "Together",
    "agreement",
    "card_text",
    "keep_card_text",
    "prepare",
    "publish",
    "published",
    "read_card_text",
    "repositories",
]
