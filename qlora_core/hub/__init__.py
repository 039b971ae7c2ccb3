"""The Hub: who may write where, pushes of models, datasets and reports, their versions, a check of what arrived. Imports no torch.

A Hub error becomes a sentence here (`reason`), whoever meets it. A token is passed on to the Hub and goes nowhere else.
"""

from qlora_core.hub.access import Account, account, full_name, machine_token
from qlora_core.hub.acting import acting_as, acting_token
from qlora_core.hub.collections import CollectionItem, plan_collection, push_collection
from qlora_core.hub.datasets import dataset_push
from qlora_core.hub.faults import hub_errors, reason
from qlora_core.hub.files import RepoType
from qlora_core.hub.models import model_push
from qlora_core.hub.plans import PushPlan
from qlora_core.hub.probe import Also, Probe, probe
from qlora_core.hub.push import Push, Pushed
from qlora_core.hub.releases import Release
from qlora_core.hub.reports import report_push
from qlora_core.hub.versions import RolledBack, Version, change, measured, rollback, versions

__all__ = [
    "Account",
    "Also",
    "CollectionItem",
    "Probe",
    "Push",
    "PushPlan",
    "Pushed",
    "Release",
    "RepoType",
    "RolledBack",
    "Version",
    "account",
    "acting_as",
    "acting_token",
    "change",
    "dataset_push",
    "full_name",
    "hub_errors",
    "machine_token",
    "measured",
    "model_push",
    "plan_collection",
    "probe",
    "push_collection",
    "reason",
    "report_push",
    "rollback",
    "versions",
]
