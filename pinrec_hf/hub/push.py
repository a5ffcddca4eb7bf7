"""`pinrec push`: one folder becomes one commit of a repo, of the listed files and no others."""

from __future__ import annotations

import os
import warnings
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from pinrec_hf.hub.card import is_local
from pinrec_hf.hub.facts import read_json
from pinrec_hf.hub.files import CARD, SURFACE_CONFIG, Listing


def push(listing: Listing, repo: str, *, private: bool | None = None, revision: str | None = None) -> CommitInfo:
    """Push the listed files as one commit, so that the repo has all of them or stays as it was.

    Files that an earlier push of such a folder left, and that this one has not, go; others in the repo stay.

    Args:
        listing: from `list_files`; the folder must have its card.
        repo: `"org/name"`; made if it does not exist.
        private: visibility of a repo that is made here; the account's default if None.
        revision: branch to commit to; made from the main one if it does not exist.

    Raises:
        ValueError: `listing` has no card, or an adapter's base is a folder of this machine.
        OSError: the Hub refuses, or cannot be reached; nothing was committed.
    """
    if CARD not in listing.sizes:
        raise ValueError(f"{listing.folder} has no README.md: write its card first, by `pinrec card`")
    if listing.kind == "adapter" and SURFACE_CONFIG not in listing.sizes:
        raise ValueError(f"{listing.folder} has no {SURFACE_CONFIG}: it is no adapter of training/finetune.py")
    if listing.kind == "adapter" and is_local(base := read_json(listing.folder / SURFACE_CONFIG)["base_model"]):
        raise ValueError(
            f"the adapter's base is {base}, a folder of this machine, which nobody else can load: push the base, then "
            f"name it by `pinrec card --model {listing.folder} --base ORG/NAME`"
        )
    api = HfApi(library_name="pinrec_hf")
    try:
        return _commit(api, listing, repo, private, revision)
    except (HTTPError, RuntimeError) as error:  # huggingface_hub gives a RuntimeError where an upload is refused
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise OSError(f"nothing was committed to {repo} at {api.endpoint}: {reason}") from error


def _commit(api: HfApi, listing: Listing, repo: str, private: bool | None, revision: str | None) -> CommitInfo:
    repo_type = listing.repo_type
    sdk = "gradio" if repo_type == "space" else None
    name = api.create_repo(repo, repo_type=repo_type, private=private, space_sdk=sdk, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
    operations: list[Any] = [CommitOperationAdd(path, os.fspath(listing.folder / path)) for path in listing.sizes]
    there = api.list_repo_files(name, repo_type=repo_type, revision=revision)
    # what an earlier push left, such as parts of a longer dataset, would be read as this one's
    old = [path for path in there if path not in listing.sizes and listing.may_hold(path)]
    operations += map(CommitOperationDelete, old)
    with warnings.catch_warnings():  # that a model repo holds a data file: the items are part of the model
        warnings.filterwarnings("ignore", message=".*about to commit a data file")
        return api.create_commit(
            name, operations, commit_message=f"Push {listing.kind} by pinrec_hf", repo_type=repo_type, revision=revision
        )
