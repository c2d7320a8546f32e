"""The upload of an export to the Hub (`convert-to-hf --push-to-hub NAME`).

What can be checked without the Hub is checked before anything is converted. What the Hub refuses
later costs nothing but the upload: the export is complete, and the message says how to go on.
"""

from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.files.output import HUGGING_FACE_MODEL

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
REFUSALS = {
    401: f"it does not know the token; {LOG_IN}",
    403: "the token may not write there; check the owner, and that the token has the write role",
    404: "there is no such owner or repository, or the token may not see it",
}
"""Status -> what it means."""


def check_upload(name: str) -> None:
    """Raise a `ConfigError` for a name that no repository can have, or if there is no token.

    The owner belongs to it, because the model card says how to load the model by its name.
    """
    try:
        validate_repo_id(name)
        is_valid = "/" in name
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ConfigError(
            f"--push-to-hub is {name[:100]!r}; expected OWNER/NAME, at most 96 letters, digits, "
            "'-', '_' and '.'"
        )
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"--push-to-hub {name} needs the Hub, and HF_HUB_OFFLINE is set; unset it, or convert "
            "without --push-to-hub and upload the directory later: hf upload"
        )
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"--push-to-hub {name} needs a token, and there is none; {LOG_IN}")


def upload(directory: Path, name: str, private: bool) -> str:
    """Upload an export, as one commit; return the address of the repository.

    Of what the repository has already, only what an export may hold is replaced or deleted: a
    pytorch_model.bin of an older model would be loaded in its place by some readers.

    Raises:
        WriteError: the Hub cannot be reached, or refuses it. The export stays as it is.
    """
    api = HfApi(library_name="annotated-mpnet")
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            commit_message="Upload by annotated-mpnet",
            delete_patterns=[
                *HUGGING_FACE_MODEL.files.split(),
                *(f"{each}/*" for each in HUGGING_FACE_MODEL.directories.split()),
            ],
        )
    except HfHubHTTPError as error:
        number = error.response.status_code
        advice = REFUSALS.get(number) or " ".join(
            (error.server_message or "try again later").split()
        )
        raise _failed(directory, name, f"the Hub answers {number}: {advice[:200]}") from error
    # Each version of the library has another one below it, with errors of its own.
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise _failed(
            directory, name, f"the upload failed ({said}); check the connection"
        ) from error
    return str(repository)


def _failed(directory: Path, name: str, reason: str) -> WriteError:
    return WriteError(
        f"--push-to-hub {name}: {reason}. The export is complete in {directory}; to upload it: hf "
        f"upload {name} {directory}"
    )
