"""`push`, `versions` and `rollback` of the command line: a run, or a prepared dataset, to the Hub. Prints; decides nothing."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from qlora_core import hub, jobs, publishing
from qlora_core.cli_options import print_json
from qlora_core.data.locate import LINEAGE
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.errors import HubError, RunError
from qlora_core.runs import RunStore
from qlora_core.settings import Settings

FOR_MODELS = ("what", "onto", "revision", "pull_request", "version", "force", "plan", "agreed", "yes", "card")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "push", parents=[common], help="push a run's model, or a prepared dataset, to the Hub, private by default"
    )
    command.add_argument(
        "source", metavar="RUN|DIR", help="id of a run or its beginning, or folder of a prepared dataset"
    )
    command.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="made if it is not there, private")
    command.add_argument(
        "--what", metavar="WHAT[,WHAT]", help=f"of a run, one or more of {', '.join(publishing.WHAT)}; default adapter"
    )
    command.add_argument("--onto", choices=("original", "dequantized"), help="of merged: as for the command merge")
    audience = command.add_mutually_exclusive_group()
    audience.add_argument("--private", action="store_true", help="for nobody else to see (the default)")
    audience.add_argument("--public", action="store_true", help="for everybody to see")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--revision", metavar="BRANCH", help="a branch of a model, made if it is not there")
    where.add_argument("--pull-request", action="store_true", help="propose the change instead of making it")
    command.add_argument("--card", metavar="YAML", help="your words for the model card, by section")
    command.add_argument("--version", help="tag of a model's version, default the next of v1, v2, …")
    command.add_argument(
        "--force", action="store_true", help="over a much better version, and over what others changed there"
    )
    command.add_argument(
        "--plan", action="store_true", help="of a run: say what a push would change, and change nothing"
    )
    agreeing = command.add_mutually_exclusive_group()
    agreeing.add_argument(
        "--agreed", metavar="DIGEST", help="make the change that --plan has shown under this digest, and no other"
    )
    agreeing.add_argument("--yes", action="store_true", help="make any change, and whatever the dataset's licence says")
    command.add_argument("--token-from-stdin", action="store_true", help=argparse.SUPPRESS)  # jobs of the page
    command.set_defaults(command=_push)

    command = commands.add_parser("versions", parents=[common], help="versions of a model on the Hub")
    command.add_argument("repo_id", metavar="OWNER/NAME")
    command.set_defaults(command=_versions)

    command = commands.add_parser("rollback", parents=[common], help="a new commit on the Hub with an earlier version")
    command.add_argument("repo_id", metavar="OWNER/NAME")
    command.add_argument("version")
    command.add_argument("--force", action="store_true", help="over what others changed there")
    command.add_argument("--plan", action="store_true", help="say what it would change, and change nothing")
    command.set_defaults(command=_rollback)


def _token(options: argparse.Namespace) -> str:
    """Of a page's job through its pipe; else that of `hf auth login` or HF_TOKEN."""
    token = sys.stdin.read().strip() if getattr(options, "token_from_stdin", False) else get_token()
    if not token:
        raise HubError("no token for the Hub; run `hf auth login`, or set HF_TOKEN, with write permission")
    return token


def _push(options: argparse.Namespace, settings: Settings) -> int:
    reporter = jobs.Reporter(lambda progress: print(progress.doing, file=sys.stderr))
    folder = Path(options.source).expanduser()
    if (folder / LINEAGE).is_file():
        result = _push_dataset(folder, options, reporter)
    elif folder.is_dir() or "/" in options.source:
        raise HubError(
            f"{options.source}: is no prepared dataset; make one with `python -m qlora_core prepare`, or name a run"
        )
    else:
        try:
            result = _push_run(options, settings, reporter)
        except publishing.NotAgreed as error:
            if not options.json:
                raise
            print(error, file=sys.stderr)
            result = _shown(error.agreement)
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
    unproven = [
        entry for entry in result.get("pushed", ()) if entry.get("proof", {}).get("state", "proven") != "proven"
    ]
    for entry in unproven:
        told = entry["proof"].get("reason") or "its logits differ from those of the model here"
        print(f"{entry['url']}: is pushed as commit {entry['commit'][:8]}, but not proven: {told}", file=sys.stderr)
    return 1 if unproven else 0


def _push_dataset(folder: Path, options: argparse.Namespace, report: jobs.Reporter) -> dict[str, Any]:
    if given := [f"--{name.replace('_', '-')}" for name in FOR_MODELS if getattr(options, name)]:
        raise HubError(f"{', '.join(given)}: only for runs; {folder} is a prepared dataset")
    lineage = PreparedSet.load(folder).lineage
    pushed = hub.push_dataset(
        folder,
        options.repo_id,
        token=_token(options),
        private=not options.public,
        commit_message=f"{lineage['name']}, version {lineage['version']}",
        report=report,
    )
    return {"pushed": [{"what": "dataset", "url": pushed.url, "commit": pushed.commit, "changed": pushed.changed}]}


def _push_run(options: argparse.Namespace, settings: Settings, report: jobs.Reporter) -> dict[str, Any]:
    run = RunStore(settings).get(options.source)
    what = list(dict.fromkeys((options.what or "adapter").split(",")))
    problems = [
        f"--what {one!r}: choose from {', '.join(publishing.WHAT)}" for one in what if one not in publishing.WHAT
    ]
    if options.onto and "merged" not in what:
        problems.append("--onto: only for --what merged; an adapter is not merged")
    if problems:
        raise RunError(*problems)
    if options.card:
        publishing.keep_card_text(run, publishing.read_card_text(Path(options.card)))
    token = _token(options)
    pushes = publishing.Together(run, tuple(
        publishing.prepare(
            run,
            name,
            publishing.Publication(
                what=one,
                private=not options.public,
                revision=options.revision,
                pull_request=options.pull_request,
                version=options.version or "",
                force=options.force,
                onto=options.onto if one == "merged" else None,
            ),
            token=token,
            report=report,
        )
        for one, name in publishing.repositories(options.repo_id, what).items()
    ))  # fmt: skip
    if options.plan:
        return _shown(pushes.agreement)
    return {"pushed": pushes.publish(publishing.UNSEEN if options.yes else options.agreed)}


def _shown(asked: publishing.Agreement) -> dict[str, Any]:
    told = {"plan": list(asked.sentences), "warnings": list(asked.warnings), "agree": asked.digest}
    return {**told, "needed": asked.needed}


def _versions(options: argparse.Namespace, settings: Settings) -> int:
    found = hub.versions(options.repo_id, get_token())
    if options.json:
        print_json({"versions": [asdict(version) for version in found]})
        return 0
    for version in found:
        release = version.release
        said = (
            f"{release.what:8} {_metrics(release)}  rows {release.dataset_fingerprint[:8]}"
            if release
            else "not made here"
        )
        print(f"{'*' if version.current else ' '} {version.version:10} {version.commit[:8]}  {said}")
    if not found:
        print("no versions yet")
    return 0


def _metrics(release: hub.Release) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in release.metrics.items()) or "no metrics"


def _rollback(options: argparse.Namespace, settings: Settings) -> int:
    back = hub.rollback(options.repo_id, options.version, _token(options), force=options.force, plan=options.plan)
    if options.json:
        print_json(asdict(back))
    elif options.plan:
        for doing, names in (("restores", back.restores), ("removes", back.removes)):
            print(f"{doing} {', '.join(names) or 'nothing'}")
    else:
        print(f"{back.url}: {'is at' if back.changed else 'was at'} {back.version}, commit {back.commit[:8]}")
    return 0
