"""Publish a finished result on the Hub in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from ...errors import PublishError
from ...recipe import HubRecipe
from ..results import SAMPLES

_STALE = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier result to delete, because a new one may be split into other files."""


def check_publish(recipe: HubRecipe) -> None:
    """Raise before a long run where its result could not be published.

    Raises:
        PublishError: The Hub cannot be reached, nobody is logged in, the owner of the repository is someone else, or
            the repository is public and `private` is set.
    """
    with _explained(recipe, "find out who is logged in"):
        user = HfApi().whoami()
        _check_private(
            recipe, recipe.push_to_hub if "/" in recipe.push_to_hub else f"{user['name']}/{recipe.push_to_hub}"
        )
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, slash, _ = recipe.push_to_hub.partition("/")
    if slash and owner not in owners:
        raise PublishError(
            f"hub.push_to_hub={recipe.push_to_hub!r}: the logged-in user {user['name']} can write only to "
            f"{', '.join(owners)}. Log in as another user with `hf auth login`, or choose a name under one of these."
        )


def publish(folder: Path, recipe: HubRecipe, message: str) -> str:
    """Publish a directory in one commit, completely or not at all.

    The same commit deletes weights of an earlier result that have no successor; all other files stay.

    Args:
        folder: Finished output directory.
        recipe: Repository to publish to.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        PublishError: The Hub refuses or cannot be reached, or the repository is public and `private` is set.
    """
    api = HfApi()
    with _explained(recipe, "publish"):
        name = api.create_repo(recipe.push_to_hub, private=recipe.private or None, exist_ok=True).repo_id
        _check_private(recipe, name)  # an existing repository keeps its visibility
        if recipe.revision is not None:
            api.create_branch(name, branch=recipe.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=recipe.revision,
            commit_message=message,
            delete_patterns=_STALE,
            ignore_patterns=SAMPLES,
        )
    return commit.commit_url


def _check_private(recipe: HubRecipe, name: str) -> None:
    """Raise if `private` is set and the repository exists and is public."""
    with suppress(RepositoryNotFoundError):
        if recipe.private and not HfApi().repo_info(name).private:
            raise PublishError(
                f"hub.private=True, but {name!r} exists and is public: make it private in its settings, or publish "
                "under another name."
            )


@contextmanager
def _explained(recipe: HubRecipe, what: str) -> Iterator[None]:
    """Turn every error of the Hub or the network into a `PublishError`."""
    failed = f"hub.push_to_hub={recipe.push_to_hub!r}: cannot {what}"
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError as error:
        raise PublishError(
            f"hub.push_to_hub={recipe.push_to_hub!r}, and nobody is logged in: run `hf auth login`, or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        hint = "Run `hf auth login` with a token that has write access." if code in (401, 403) else "Try again later."
        raise PublishError(f"{failed}: the Hub answers {code}. {hint}") from error
    except Exception as error:  # each version of the client raises other errors of its HTTP library
        raise PublishError(f"{failed}: {type(error).__name__}. Check the network, then try again.") from error
