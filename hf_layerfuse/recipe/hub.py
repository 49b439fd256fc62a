"""Where a result is published."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import RecipeError
from .strict import require, strict_recipe


@strict_recipe
class HubRecipe:
    """Where a result is published. Whoever is logged in does it: there is no token in a recipe.

    Attributes:
        push_to_hub: repository, `user/name`, which is made if it is not there; None publishes nothing.
        private: make it a private one. One that is there and public is refused.
        revision: branch to publish on, which is made from `main` if it is not there; by default, `main`.
    """

    push_to_hub: str | None = None
    private: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        require(
            self.push_to_hub is not None or not (self.private or self.revision),
            f"hub.private={self.private} and hub.revision={self.revision} are of a repository: set hub.push_to_hub.",
        )
        try:
            if self.push_to_hub is not None:
                validate_repo_id(self.push_to_hub)
        except HFValidationError as error:
            raise RecipeError(f"hub.push_to_hub={self.push_to_hub!r} is no name of a repository: {error}") from error
