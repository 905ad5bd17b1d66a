"""``ptq push``: a checkpoint folder to the hub."""

from __future__ import annotations

import sys

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text, size_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import json_option, quiet_option
from ptqcli.cli.progress import track


@click.command(
    epilog=examples(
        "ptq push small my-name/Llama-3.2-1B-w4a16",
        "ptq push small my-name/Llama-3.2-1B-w4a16 --private --dry-run",
    )
)
@click.argument("checkpoint", shell_complete=completion.checkpoint)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--overwrite", is_flag=True, help="Add a commit to a repository that holds files already.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@json_option
@quiet_option
def command(
    checkpoint: str, repo: str, private: bool, overwrite: bool, message: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Put CHECKPOINT into a repository of the hub.

    REPO is OWNER/NAME, on the Hugging Face hub, and is made if it is not there. What belongs to the checkpoint goes there in one commit:
    weights, configuration, tokenizer, model card, licence, report. The report does not tell where on this machine the original lies. You
    have to be logged in (`hf auth login`).
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from ptqcli.pipeline.publishing import plan_publication, publish

    words = Output(as_json=as_json, quiet=quiet)
    silence_transformers()
    plan = plan_publication(find_checkpoint(checkpoint), repo)
    words.facts(
        [
            ("checkpoint", path_text(plan.folder)),
            ("repository", f"{repo}{' (private)' if private else ''}"),
            *((name, size_text(size)) for name, size in plan.files.items()),
            *([("left out", ", ".join(plan.left_out))] if plan.left_out else []),
            ("in all", size_text(plan.bytes)),
        ]
    )
    address = None
    if not dry_run:
        if quiet or not sys.stderr.isatty():
            disable_progress_bars()  # of the files on their way
        with track("file", quiet) as tracker:
            address = publish(plan, private=private, overwrite=overwrite, message=message, on_phase=tracker.say)
        words.say()
        words.facts([("published", address)])
    words.result({"repository": repo, "files": plan.files, "left_out": plan.left_out, "bytes": plan.bytes, "address": address})
