"""What the command line does on the Hub: pushes models, datasets and reports, asks, lists and goes back. Decides nothing."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from qlora_core import hub, jobs, publishing
from qlora_core.cli_options import print_json
from qlora_core.data.locate import LINEAGE
from qlora_core.errors import HubError
from qlora_core.runs import Run
from qlora_core.settings import Settings
from qlora_core.study import Study

FOR_MODELS = ("onto", "version", "card")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "push",
        parents=[common],
        help="push a run's models, a prepared dataset or a study's report to the Hub, private by default",
    )
    command.add_argument(
        "source",
        metavar="RUN|STUDY|DIR",
        help="id of a run or a study, or its beginning; or folder of a prepared dataset",
    )
    command.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="made if it is not there, private")
    command.add_argument(
        "--what",
        metavar="WHAT[,WHAT]",
        help=f"of a run, one or more of {', '.join(publishing.OF_A_RUN)}; default adapter",
    )
    command.add_argument("--onto", choices=("original", "dequantized"), help="of merged: as for the command merge")
    audience = command.add_mutually_exclusive_group()
    audience.add_argument("--private", action="store_true", help="for nobody else to see (the default)")
    audience.add_argument("--public", action="store_true", help="for everybody to see")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--revision", metavar="BRANCH", help="a branch of a model, made if it is not there")
    where.add_argument("--pull-request", action="store_true", help="propose the change instead of making it")
    command.add_argument(
        "--collection", metavar="TITLE", help="put what is pushed into this collection, made if needed"
    )
    command.add_argument(
        "--with-rows",
        action="store_true",
        help="of a report: with prompts and answers of held-out rows, if their licence allows",
    )
    command.add_argument("--card", metavar="YAML", help="your words for the model card, by section")
    command.add_argument("--version", help="tag of a model's version, default the next of v1, v2, …")
    command.add_argument(
        "--force", action="store_true", help="over a much better version, and over what others changed there"
    )
    command.add_argument("--plan", action="store_true", help="say what a push would change, and change nothing")
    agreeing = command.add_mutually_exclusive_group()
    agreeing.add_argument(
        "--agreed", metavar="DIGEST", help="make the change that --plan has shown under this digest, and no other"
    )
    agreeing.add_argument("--yes", action="store_true", help="make any change, and whatever the dataset's licence says")
    command.add_argument("--token-from-stdin", action="store_true", help=argparse.SUPPRESS)  # jobs of the page
    command.set_defaults(command=_push)

    command = commands.add_parser(
        "probe", parents=[common], help="ask the Hub who the token is, where it may write, and what is there already"
    )
    command.add_argument("repo_id", metavar="OWNER/NAME", nargs="?", help="of a push that is to come")
    command.add_argument("--public", action="store_true", help="that push would be public")
    command.add_argument("--pull-request", action="store_true", help="that push would be a pull request")
    command.add_argument("--collection", action="store_true", help="that push would go into a collection")
    _add_kind(command)
    command.set_defaults(command=_probe)

    command = commands.add_parser("versions", parents=[common], help="versions of a model or a dataset on the Hub")
    command.add_argument("repo_id", metavar="OWNER/NAME")
    _add_kind(command)
    command.set_defaults(command=_versions)

    command = commands.add_parser("rollback", parents=[common], help="a new commit on the Hub with an earlier version")
    command.add_argument("repo_id", metavar="OWNER/NAME")
    command.add_argument("version")
    command.add_argument("--force", action="store_true", help="over what others changed there")
    command.add_argument("--plan", action="store_true", help="say what it would change, and change nothing")
    command.add_argument(
        "--seen", metavar="COMMIT", help="only while the repository is at the commit that --plan named"
    )
    _add_kind(command)
    command.set_defaults(command=_rollback)


def _add_kind(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kind", choices=("model", "dataset"), default="model", help="default model; reports are datasets"
    )


def _token(options: argparse.Namespace) -> str:
    """Of a page's job through its pipe; else that of `hf auth login` or HF_TOKEN."""
    token = sys.stdin.read().strip() if getattr(options, "token_from_stdin", False) else get_token()
    if not token:
        raise HubError("no token for the Hub; run `hf auth login`, or set HF_TOKEN, with write permission")
    return token


def _push(options: argparse.Namespace, settings: Settings) -> int:
    reporter = jobs.Reporter(lambda progress: print(progress.doing, file=sys.stderr))
    try:
        pushes = publishing.Together(
            tuple(_parts(options, settings, reporter)),
            collection=options.collection or "",
            private=not options.public,
            report=reporter,
        )
        agreed = publishing.UNSEEN if options.yes else options.agreed
        result = _shown(pushes.agreement) if options.plan else pushes.publish(agreed)
    except publishing.NotAgreed as error:
        if not options.json:
            raise
        print(error, file=sys.stderr)
        result = _shown(error.agreement) | {"changed": error.changed}
        reporter.end(jobs.DONE, result=result)
        print_json(result)
        return 2
    reporter.end(jobs.DONE, result=result)
    if options.json:
        print_json(result)
    elif "plan" in result:
        print("\n".join([*result["plan"], *result["warnings"], f"to agree to it: --agreed {result['agree']}"]))
    else:
        for entry in result["pushed"]:
            print((entry.get("pull_request") or entry["url"]) + ("" if entry["changed"] else ": nothing has changed"))
        if result["collection"]:
            print(result["collection"])
    unproven = [
        entry for entry in result.get("pushed", ()) if entry.get("proof", {}).get("state", "proven") != "proven"
    ]
    for entry in unproven:
        told = f"is pushed as commit {entry['commit'][:8]}, but not proven: {entry['proof']['reason']}"
        print(f"{entry['url']}: {told}", file=sys.stderr)
    return 1 if unproven else 0


def _parts(options: argparse.Namespace, settings: Settings, report: jobs.Reporter) -> list[publishing.Part]:
    """What is to be pushed, in order. Raises LabError with all that is wrong with what was asked."""
    folder = Path(options.source).expanduser()
    if (folder / LINEAGE).is_file():
        _only_for_models(options, ["dataset"], ("dataset",))
        return [publishing.dataset_part(folder, options.repo_id, **_asked(options, report))]
    if folder.is_dir() or "/" in options.source:
        raise HubError(
            f"{options.source}: is no prepared dataset; make one with `python -m qlora_core prepare`, or name a run or a study"
        )
    found = publishing.run_or_study(options.source, settings)
    if isinstance(found, Study):
        _only_for_models(options, (options.what or "report").split(","), ("report",))
        return [publishing.report_part(found, options.repo_id, rows=options.with_rows, **_asked(options, report))]
    return _parts_of_run(found, options, report)


def _asked(options: argparse.Namespace, report: jobs.Reporter) -> dict[str, Any]:
    """What holds for whatever is pushed."""
    return {
        "token": _token(options),
        "private": not options.public,
        "revision": options.revision,
        "pull_request": options.pull_request,
        "force": options.force,
        "report": report,
    }


def _only_for_models(options: argparse.Namespace, what: Sequence[str], may: Sequence[str]) -> None:
    """Raises HubError naming every option and every thing that does not go with the source."""
    problems = [f"--what {one!r}: choose from {', '.join(may)}" for one in what if one not in may]
    if not set(what) & set(publishing.MODELS):
        given = [f"--{name.replace('_', '-')}" for name in FOR_MODELS if getattr(options, name)]
        problems += [f"{', '.join(given)}: only for models, adapter or merged"] if given else []
    if options.onto and "merged" not in what:
        problems.append("--onto: only for --what merged; an adapter is not merged")
    if options.with_rows and "report" not in what:
        problems.append("--with-rows: only for the report of a study")
    if problems:
        raise HubError(*problems)


def _parts_of_run(run: Run, options: argparse.Namespace, report: jobs.Reporter) -> list[publishing.Part]:
    what = list(dict.fromkeys((options.what or "adapter").split(",")))
    _only_for_models(options, what, publishing.OF_A_RUN)
    card = publishing.read_card_text(Path(options.card)) if options.card else None
    if card and not options.plan:
        publishing.keep_card_text(run, card)
    asked, parts = _asked(options, report), []
    token = asked.pop("token")
    # Before a merge that takes minutes.
    data = publishing.dataset_of(run) if "dataset" in what else None
    if options.collection and "merged" in what:
        owner = hub.full_name(options.repo_id, hub.account(token)).partition("/")[0]
        hub.plan_collection(options.collection, owner, token=token, private=not options.public)
    for one, name in publishing.repositories(options.repo_id, what).items():
        if one == "dataset":
            parts.append(publishing.dataset_part(data, name, run=run, token=token, **asked))
            continue
        how = publishing.Publication(
            what=one,
            private=not options.public,
            revision=options.revision,
            pull_request=options.pull_request,
            version=options.version or "",
            force=options.force,
            onto=options.onto if one == "merged" else None,
            card=card,
        )
        parts.append(publishing.model_part(run, *publishing.prepare(run, name, how, token=token, report=report)))
    return parts


def _shown(asked: publishing.Agreement) -> dict[str, Any]:
    told = {"plan": list(asked.sentences), "warnings": list(asked.warnings), "agree": asked.digest}
    return {**told, "needed": asked.needed}


def _probe(options: argparse.Namespace, settings: Settings) -> int:
    given: dict[hub.Also, bool] = {"pull request": options.pull_request, "collection": options.collection}
    also = [one for one, wanted in given.items() if wanted]
    found = hub.probe(_token(options), options.repo_id, kind=options.kind, private=not options.public, also=also)
    if options.json:
        names = ("ok", "name", "namespaces", "exists", "private", "may_write", "problems", "notes")
        print_json({name: getattr(found, name) for name in names})
    else:
        for sentence in found.sentences():
            print(sentence, file=sys.stderr if sentence in found.problems else sys.stdout)
    return 0 if found.ok else 2


def _versions(options: argparse.Namespace, settings: Settings) -> int:
    found = hub.versions(options.repo_id, get_token(), kind=options.kind)
    if options.json:
        print_json({"versions": [asdict(version) for version in found]})
        return 0
    for version, before in zip_longest(found, found[1:]):
        release, told = version.release, "not made here"
        if release:
            rows = f"rows {release.dataset_fingerprint[:8]}"
            told = f"{release.what:8} {hub.measured(release) or 'no metrics'}  {rows}"
            told += (
                f"  ({change} against {before.version})" if before and (change := hub.change(version, before)) else ""
            )
        print(f"{'*' if version.current else ' '} {version.version:10} {version.commit[:8]}  {told}")
    if not found:
        print("no versions yet")
    return 0


def _rollback(options: argparse.Namespace, settings: Settings) -> int:
    back = hub.rollback(
        options.repo_id,
        options.version,
        _token(options),
        kind=options.kind,
        force=options.force,
        plan=options.plan,
        seen=options.seen,
    )
    if options.json:
        print_json(asdict(back))
    elif options.plan:
        print(f"{back.url}: going back to {back.version} would make one new commit that")
        for doing, names in (("restores", back.restores), ("removes", back.removes)):
            print(f"  {doing} {', '.join(names) or 'nothing'}")
        print(f"to do just that: --seen {back.commit}")
    else:
        print(f"{back.url}: {'is at' if back.changed else 'was at'} {back.version}, commit {back.commit[:8]}")
    return 0
