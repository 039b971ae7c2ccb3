"""The Hub: who may write where, pushes of datasets and models, their versions, a check of what arrived. Imports no torch.

A Hub error becomes a sentence here (`reason`), whoever meets it. A token is passed on to the Hub and goes nowhere else.
"""

from qlora_core.hub.access import Account, account, full_name, machine_token
from qlora_core.hub.acting import acting_as, acting_token
from qlora_core.hub.collections import CollectionItem, check_collection, push_collection
from qlora_core.hub.dataset_push import DatasetPush, PushedDataset, dataset_versions
from qlora_core.hub.datasets import dataset_push, plan_dataset, push_dataset
from qlora_core.hub.faults import hub_errors, reason
from qlora_core.hub.files import RepoType
from qlora_core.hub.models import PushedModel, plan_push, push_model
from qlora_core.hub.plans import PushPlan
from qlora_core.hub.probe import Also, Probe, probe
from qlora_core.hub.releases import Release, RolledBack, Version, rollback, versions
from qlora_core.hub.reports import plan_report, push_report, report_push

__all__ = [
    "Account",
    "Also",
    "Probe",
    "RepoType",
    "CollectionItem",
    "DatasetPush",
    "PushPlan",
    "PushedDataset",
    "PushedModel",
    "Release",
    "RolledBack",
    "Version",
    "account",
    "acting_as",
    "acting_token",
    "check_collection",
    "dataset_push",
    "dataset_versions",
    "full_name",
    "hub_errors",
    "machine_token",
    "plan_dataset",
    "plan_push",
    "plan_report",
    "probe",
    "push_collection",
    "push_dataset",
    "push_model",
    "push_report",
    "reason",
    "report_push",
    "rollback",
    "versions",
]
