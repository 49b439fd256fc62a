"""A finished result, published on the Hub in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from ...errors import PublishError
from ...recipe import HubRecipe

_STALE = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier result that must not stay beside those of a new one, which may be split in other ways."""


def check_publish(recipe: HubRecipe) -> None:
    """Raise where it can be known before a long run that it cannot be published.

    Raises:
        PublishError: the Hub cannot be reached, nobody is logged in, or the repository would be another's, or is public
            where it is to be private.
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
            f"hub.push_to_hub={recipe.push_to_hub!r}: {user['name']} is logged in, who may write to "
            f"{', '.join(owners)}. Log in as someone else by `hf auth login`, or choose a name below one of these."
        )


def publish(folder: Path, recipe: HubRecipe, message: str) -> str:
    """Publish a directory in one commit, which either has all of it or is not there.

    Weights of an earlier result that have no successor go in the same commit; whatever else is there stays.

    Args:
        folder: a finished output directory.
        recipe: where to.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        PublishError: the Hub refuses, or cannot be reached, or the repository is public where it is to be private.
    """
    api = HfApi()
    with _explained(recipe, "publish"):
        name = api.create_repo(recipe.push_to_hub, private=recipe.private or None, exist_ok=True).repo_id
        _check_private(recipe, name)  # one that was there before is as it was
        if recipe.revision is not None:
            api.create_branch(name, branch=recipe.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=recipe.revision,
            commit_message=message,
            delete_patterns=_STALE,
        )
    return commit.commit_url


def _check_private(recipe: HubRecipe, name: str) -> None:
    """Raise where a repository is there that everybody sees, and the result is to be private."""
    with suppress(RepositoryNotFoundError):
        if recipe.private and not HfApi().repo_info(name).private:
            raise PublishError(
                f"hub.private=True, and {name!r} is there and public: make it private in its settings, or publish "
                "under another name."
            )


@contextmanager
def _explained(recipe: HubRecipe, what: str) -> Iterator[None]:
    """Whatever the Hub or the way to it raises, as a `PublishError`."""
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
        hint = "Log in by `hf auth login` with a token that may write." if code in (401, 403) else "Try again later."
        raise PublishError(f"{failed}: the Hub answers {code}. {hint}") from error
    except Exception as error:  # what its HTTP library raises is of another name in each version of the client
        raise PublishError(f"{failed}: {type(error).__name__}. Is there a network? Try again.") from error
