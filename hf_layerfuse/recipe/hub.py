"""Where a result is published."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import RecipeError
from .strict import require, strict_recipe


@strict_recipe
class HubRecipe:
    """Settings for publishing the result. Uploads use your Hub login: a recipe holds no token.

    Attributes:
        push_to_hub: Repository `user/name`, created if it does not exist; None publishes nothing.
        private: Whether the repository is private. An existing public one is an error.
        revision: Branch to publish on, created from `main` if it does not exist; `main` by default.
    """

    push_to_hub: str | None = None
    private: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        require(
            self.push_to_hub is not None or not (self.private or self.revision),
            f"hub.private={self.private} and hub.revision={self.revision} need a repository: set hub.push_to_hub.",
        )
        try:
            if self.push_to_hub is not None:
                validate_repo_id(self.push_to_hub)
        except HFValidationError as error:
            raise RecipeError(
                f"hub.push_to_hub={self.push_to_hub!r} is not a valid repository name: {error}"
            ) from error
