"""The card of a model on the Hub: README.md and its pictures, made from a run; checks of one that a person has edited."""

from qlora_core.model_card.card import Card as Card
from qlora_core.model_card.card import CardText as CardText
from qlora_core.model_card.card import model_card as model_card
from qlora_core.model_card.licences import licence_names as licence_names
from qlora_core.model_card.licences import licence_problems as licence_problems
from qlora_core.model_card.licences import licence_warning as licence_warning
from qlora_core.model_card.metadata import validate as validate
