"""The Hub: who may write where, pushes of datasets and models, their versions, a check of what arrived. Imports no torch.

A Hub error becomes a sentence here (`reason`), whoever meets it. A token is passed on to the Hub and goes nowhere else.
"""

from qlora_core.hub.access import Account, account, full_name
from qlora_core.hub.datasets import PushedDataset, push_dataset
from qlora_core.hub.faults import hub_errors, reason

__all__ = ["Account", "PushedDataset", "account", "full_name", "hub_errors", "push_dataset", "reason"]
